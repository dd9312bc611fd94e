"""Displacements that are a formula of the place."""

import numpy as np

from hemera.registration.displacement import Displacement, node_points


def field_of(function, width=129, height=65, mpp=4.0):
    """Return the displacement that maps each of height x width nodes to function(node), um."""
    nodes = node_points(Displacement(np.zeros((height, width, 2), np.float32), mpp))
    return Displacement((function(nodes) - nodes).astype(np.float32), mpp)
