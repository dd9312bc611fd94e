"""Rings of GeoJSON, and how far they are from the curve that they should follow."""

import itertools

import numpy as np


def rectangle(x0, y0, x1, y1):
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]


def stray(line, transform, ring):
    """How far the curve that `line` becomes is from the edges of `ring`, at most."""
    ring = np.array(ring, float)
    worst = 0.0
    for begin, end in itertools.pairwise(line):
        share = np.linspace(0, 1, 4001)[:, None]
        curve = transform(np.array(begin) * (1 - share) + np.array(end) * share)
        nearest = np.full(len(curve), np.inf)
        for a, b in itertools.pairwise(ring):
            along = b - a
            at = np.clip((curve - a) @ along / (along @ along), 0, 1)
            nearest = np.minimum(nearest, np.hypot(*(curve - a - at[:, None] * along).T))
        worst = max(worst, nearest.max())
    return worst


def geometry(kind, coordinates):
    return {"type": kind, "coordinates": coordinates}


def feature(shape, **members):
    return {"type": "Feature", "geometry": shape, **members}


def collection(*shapes):
    return {"type": "GeometryCollection", "geometries": list(shapes)}
