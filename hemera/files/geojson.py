"""Annotations in GeoJSON, as QuPath and others export them: read, written, transformed.

Frame: level-0 pixels of a slide, not shifted by its bounds, edges at the integers.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
import shapely.geometry

from hemera.errors import SheetError
from hemera.files.faults import brief, is_transient, translated

Points = npt.NDArray[np.float64]
"""(N, 2) points as (x, y)."""

Transform = Callable[[Points], Points]
"""Returns the corresponding points on another slide, level-0 pixels both; NaN where there is none.
"""

COORDINATE_MAX = 1e7
"""No slide is ten million pixels wide."""

GEOMETRIES = ("geometry", "nucleusGeometry")
"""Members of a feature that are geometries; the second is QuPath's, for the nucleus of a cell."""

_NOT_KEPT = ("bbox", "isEllipse")
"""Members that are not valid on the other slide: QuPath draws an ellipse into the
bounding box of its points."""

_PIECES = 8
"""An edge is divided into pieces of this fraction of the distance of two nodes of the map."""
_BATCH = 2000
_DECIMALS = 3


@dataclasses.dataclass(frozen=True)
class Transformed:
    """A feature on the other slide."""

    feature: Any
    """None without any corresponding point."""
    lost: bool
    """Whether some of its vertices have none."""


def read_features(path: Path) -> tuple[Any, list[Any]]:
    """Read a GeoJSON document: a feature, a geometry, a collection or a list of these.

    Returns:
        The document as parsed, and its `features`.

    Raises:
        SheetError: when there is no such file or it is not GeoJSON.
    """
    if not path.is_file():
        raise SheetError(f"{path}: no such file; name a GeoJSON file")
    with translated(SheetError, f"{path.name}: not GeoJSON ({{error}}); export it again"):
        document = json.loads(path.read_text(encoding="utf-8-sig"))
        return document, list(features(document))


def read_polygons(path: Path) -> list[list[Points]]:
    """Read the polygons of a GeoJSON file, ignoring other geometries.

    Returns:
        Of each polygon its outer ring and its holes, closed, (M, 2) level-0 pixels.

    Raises:
        SheetError: when it is not GeoJSON or contains no polygon.
    """
    found: list[list[Points]] = []
    for number, item in enumerate(read_features(path)[1], 1):
        message = f"{path.name}: not GeoJSON ({title(item, number)}: {{error}}); export it again"
        with translated(SheetError, message):
            shapes = list(_shapes(item).values())[:1]
        # Twice: a collection may contain a MultiPolygon.
        for part in shapely.get_parts(shapely.get_parts(shapes)):
            if isinstance(part, shapely.Polygon) and not part.is_empty:
                rings = part.exterior, *part.interiors
                found.append([shapely.get_coordinates(ring) for ring in rings])
    if not found:
        raise SheetError(f"{path.name}: contains no polygon; draw the region as an area")
    return found


def features(document: Any) -> Iterator[Any]:
    """Yield the features of a document, or its bare geometries, in order."""
    if isinstance(document, list):
        for item in document:
            yield from features(item)
    elif isinstance(document, dict) and document.get("type") == "FeatureCollection":
        yield from features(list(document["features"]))
    else:
        yield document


def with_features(document: Any, replaced: Iterator[Any]) -> Any:
    """Return a document with other features in place of its own; None leaves one out."""
    if isinstance(document, list):
        items = [with_features(item, replaced) for item in document]
        return [item for item in items if item is not None]
    if isinstance(document, dict) and document.get("type") == "FeatureCollection":
        kept = {key: value for key, value in document.items() if key not in _NOT_KEPT}
        return {**kept, "features": with_features(document["features"], replaced)}
    return next(replaced)


def title(feature: Any, number: int) -> str:
    """Return how a message names a feature: by its number, from 1, and its name or id."""
    name = None
    if isinstance(feature, dict):
        properties = feature.get("properties")
        name = properties.get("name") if isinstance(properties, dict) else None
        name = name or feature.get("id")
    return f"feature {number} ({name})" if isinstance(name, str | int) else f"feature {number}"


def annotation(polygon: shapely.Polygon, name: str, color: tuple[int, int, int]) -> dict[str, Any]:
    """Return a polygon as an annotation of a class, as QuPath imports it."""
    return {
        "type": "Feature",
        "geometry": dict(shapely.geometry.mapping(polygon)),
        "properties": {
            "objectType": "annotation",
            "classification": {"name": name, "color": list(color)},
        },
    }


def transform_features(
    items: Iterable[Any], transform: Transform, *, tolerance_px: float, step_px: float
) -> Iterator[Transformed]:
    """Transform features to another slide; all other members are kept as they are.

    A straight edge becomes a curve on the other slide: it is divided into short pieces, and points
    are removed again as long as the line stays within `tolerance_px`. Vertices without a
    corresponding point are left out, and what then has too few of them: a hole, a polygon of
    several, a nucleus, at last the feature.

    Args:
        items: features or bare geometries, as parsed from JSON.
        transform: the map.
        tolerance_px: how far a line may deviate, pixels of the other slide.
        step_px: distance of two nodes of the map, pixels of this slide.

    Yields:
        One result per item, in order.

    Raises:
        ValueError: when an item is not GeoJSON; the message names it.
    """
    numbered = enumerate(items, 1)
    while batch := list(itertools.islice(numbered, _BATCH)):
        shapes: list[dict[str, Any]] = []
        for number, item in batch:
            try:
                shapes.append(_shapes(item))
            except Exception as error:
                if is_transient(error):
                    raise
                raise ValueError(f"{title(item, number)}: {brief(error)}") from error
        flat = [shape for own in shapes for shape in own.values()]
        results = iter(_transformed(flat, transform, tolerance_px, step_px))
        for (_, item), own in zip(batch, shapes, strict=True):
            changed = {name: next(results) for name in own}
            yield Transformed(
                _rebuilt(item, {name: shape for name, (shape, _) in changed.items()}),
                any(lost for _, lost in changed.values()),
            )


def _shapes(item: Any) -> dict[str, Any]:
    """Return the geometries of an item by their member, "" for a bare one; none that is empty."""
    if not isinstance(item, dict):
        raise ValueError(f"{type(item).__name__} in place of a feature")
    if item["type"] != "Feature":
        shapes = {"": _shape(item)}
    else:
        shapes = {name: _shape(item[name]) for name in GEOMETRIES if item.get(name) is not None}
    return {name: shape for name, shape in shapes.items() if not shape.is_empty}


def _shape(geometry: Any) -> Any:
    shape = _filled(shapely.force_2d(shapely.geometry.shape(geometry)))
    if not (np.abs(shapely.get_coordinates(shape)) <= COORDINATE_MAX).all():
        raise ValueError(f"a coordinate beyond {COORDINATE_MAX:g} is not a pixel of a slide")
    return shape


def _filled(shape: Any) -> Any:
    """Remove empty members: GEOS 3.14 crashes when it divides them."""
    if not hasattr(shape, "geoms"):
        return shape
    return type(shape)([_filled(part) for part in shape.geoms if not part.is_empty])


def _rebuilt(item: Any, changed: dict[str, Any]) -> Any:
    """Put transformed geometries into an item; None when no geometry is left."""
    if "" in changed:
        return _member(item, changed[""])
    if "geometry" in changed and changed["geometry"] is None:
        return None
    members = {**item, **{name: _member(item[name], shape) for name, shape in changed.items()}}
    return {
        name: value
        for name, value in members.items()
        if name not in _NOT_KEPT and not (name in changed and value is None)
    }


def _member(before: dict[str, Any], shape: Any) -> dict[str, Any] | None:
    """Return a geometry with the other members of the one it replaces."""
    if shape is None:
        return None
    own = ("coordinates", "geometries", *_NOT_KEPT)
    kept = {key: value for key, value in before.items() if key not in own}
    return {**kept, **shapely.geometry.mapping(shape)}


def _transformed(
    shapes: Sequence[Any], transform: Transform, tolerance_px: float, step_px: float
) -> Iterator[tuple[Any, bool]]:
    """Yield each geometry on the other slide, None where it is lost, and whether any point is."""
    if not shapes:
        return
    # GEOS drops pieces of invalid polygons when it divides them.
    before = np.array([_valid(shape) or shape for shape in shapes], object)
    divided = shapely.segmentize(before, step_px / _PIECES)
    counts = shapely.get_num_coordinates(divided)
    every = np.round(transform(shapely.get_coordinates(divided)), _DECIMALS)
    moved = np.split(every, np.cumsum(counts)[:-1])
    is_longer = counts > shapely.get_num_coordinates(before)
    for shape, points, longer in zip(divided, moved, is_longer, strict=True):
        lost = bool(np.isnan(points).any())
        result = _rest(shape, iter(points)) if lost else shapely.set_coordinates([shape], points)[0]
        result = _valid(result)
        if result is not None and longer:
            result = result.simplify(tolerance_px / 2)
        yield result, lost


def _rest(shape: Any, points: Iterator[Points]) -> Any:
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


def _finite(shape: Any, points: Iterator[Points]) -> Points:
    own = np.array(list(itertools.islice(points, len(shape.coords))))
    result: Points = own[~np.isnan(own).any(axis=1)]
    return result


def _valid(shape: Any) -> Any:
    """Make polygons valid, without lines and points; None when no area is left."""
    if not isinstance(shape, shapely.Polygon | shapely.MultiPolygon) or shape.is_valid:
        return shape
    parts = shapely.get_parts(shapely.make_valid(shape))
    areas = [area for part in parts for area in shapely.get_parts(part) if area.area > 0]
    if not areas:
        return None
    return areas[0] if len(areas) == 1 else shapely.MultiPolygon(areas)
