"""Displacements that are a formula of the place."""

import numpy as np

from hemera.registration.displacement import Displacement, node_points


def field_of(function, width=129, height=65, mpp=4.0):
    """Return the displacement that maps each of height x width nodes to function(node), um."""
    nodes = node_points(Displacement(np.zeros((height, width, 2), np.float32), mpp))
    return Displacement((function(nodes) - nodes).astype(np.float32), mpp)


def to_her2(points_um):
    """The place on HER2 of a point of H&E, um: a swirl that decays, sheared and shifted."""
    points_um = np.asarray(points_um, float)
    x, y = points_um[..., 0] - 260, points_um[..., 1] - 130
    angle = 0.25 * np.exp(-(x**2 + y**2) / 120**2)
    x, y = np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y
    return np.stack([1.01 * x + 0.06 * y + 285, -0.03 * x + 0.99 * y + 150], axis=-1)


def to_he(points_um):
    """The way back, by as many steps as it takes."""
    goal = np.asarray(points_um, float)
    points = goal - (25, 20)
    for _ in range(200):
        points = points + 0.7 * (goal - to_her2(points))
    assert np.abs(to_her2(points) - goal).max() < 1e-9
    return points
