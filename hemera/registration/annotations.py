"""Geometries of annotations, transformed to the other slide of a pair."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

from hemera.files.geojson import Feature
from hemera.registration.displacement import Points

Transform = Callable[[Points], Points]
"""Returns the corresponding points (N, 2) on another slide; NaN where there is none."""

Shapes = npt.NDArray[np.object_]

_PIECES = 8
"""An edge is divided into pieces of this fraction of the distance of two nodes of the map."""
_BATCH = 2000
_DECIMALS = 3


def transform_features(
    features: Sequence[Feature], transform: Transform, *, tolerance_px: float, step_px: float
) -> Iterator[tuple[Any, bool]]:
    """Transform features to another slide; level-0 pixels both.

    A straight edge becomes a curve on the other slide: it is divided into short pieces, and points
    are removed again as long as the line stays within `tolerance_px`. Vertices without a
    corresponding point are left out, and what then has too few of them: a hole, a polygon of
    several, a nucleus, at last the feature.

    Args:
        tolerance_px: how far a line may deviate, pixels of the other slide.
        step_px: distance of two nodes of the map, pixels of this slide.

    Yields:
        For each feature the item for the other slide, None without any corresponding point, and
        whether some of its vertices have none.
    """
    for start in range(0, len(features), _BATCH):
        batch = features[start : start + _BATCH]
        shapes = [shape for feature in batch for shape in feature.shapes.values()]
        moved = _transformed(np.array(shapes, object), transform, tolerance_px, step_px)
        results = iter(zip(*moved, strict=True))
        for feature in batch:
            changed = {name: next(results) for name in feature.shapes}
            item = feature.replaced({name: shape for name, (shape, _) in changed.items()})
            yield item, any(lost for _, lost in changed.values())


def _transformed(
    shapes: Shapes, transform: Transform, tolerance_px: float, step_px: float
) -> tuple[Shapes, npt.NDArray[np.bool_]]:
    """Return geometries on the other slide, None where one is lost, and whether any point is."""
    if not len(shapes):
        return shapes, np.zeros(0, np.bool_)
    # GEOS drops pieces of invalid polygons when it divides them.
    valid = _valid(shapes)
    before = np.where(shapely.is_missing(valid), shapes, valid)
    divided = shapely.segmentize(before, step_px / _PIECES)
    counts = shapely.get_num_coordinates(divided)
    points = np.round(transform(shapely.get_coordinates(divided)), _DECIMALS)
    starts = np.cumsum(counts) - counts
    lost = np.logical_or.reduceat(np.isnan(points).any(axis=1), starts)
    results = np.empty_like(divided)
    results[~lost] = shapely.set_coordinates(divided[~lost], points[~np.repeat(lost, counts)])
    for n in np.flatnonzero(lost):
        results[n] = _rest(divided[n], iter(points[starts[n] :]))
    results = _valid(results)
    is_longer = counts > shapely.get_num_coordinates(before)
    results[is_longer] = shapely.simplify(results[is_longer], tolerance_px / 2)
    return results, lost


def _rest(shape: Any, points: Iterator[Any]) -> Any:
    """Rebuild a geometry from those of its points that are not NaN; None when too few are left."""
    if hasattr(shape, "geoms"):
        parts = [_rest(part, points) for part in shape.geoms]
        parts = [part for part in parts if part is not None]
        return type(shape)(parts) if parts else None
    if isinstance(shape, shapely.Polygon):
        outer, *holes = (_finite(ring, points) for ring in (shape.exterior, *shape.interiors))
        if len(np.unique(outer, axis=0)) < 3:
            return None
        return shapely.Polygon(outer, [hole for hole in holes if len(np.unique(hole, axis=0)) >= 3])
    left = _finite(shape, points)
    return type(shape)(left) if len(left) >= min(len(shape.coords), 2) else None


def _finite(shape: Any, points: Iterator[Any]) -> Points:
    own = np.array(list(itertools.islice(points, len(shape.coords))))
    result: Points = own[~np.isnan(own).any(axis=1)]
    return result


def _valid(shapes: Shapes) -> Shapes:
    """Make polygons valid, without lines and points; None where no area is left."""
    types = [shapely.GeometryType.POLYGON, shapely.GeometryType.MULTIPOLYGON]
    wrong = np.isin(shapely.get_type_id(shapes), types) & ~shapely.is_valid(shapes)
    results = shapes.copy()
    for n in np.flatnonzero(wrong):
        # Twice: what is made valid may be a collection with a MultiPolygon.
        parts = shapely.get_parts(shapely.get_parts(shapely.make_valid(shapes[n])))
        areas = parts[shapely.area(parts) > 0]
        results[n] = shapely.MultiPolygon(areas) if len(areas) > 1 else next(iter(areas), None)
    return results
