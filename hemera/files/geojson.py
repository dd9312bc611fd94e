"""Annotations in GeoJSON, as QuPath and others export them.

Frame: level-0 pixels of a slide, not shifted by its bounds, edges at the integers.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import shapely
import shapely.geometry

from hemera.errors import SheetError
from hemera.files import json_text
from hemera.files.faults import translated

COORDINATE_MAX = 1e7
"""No slide is ten million pixels wide."""

GEOMETRIES = ("geometry", "nucleusGeometry")
"""Members of a feature that are geometries; the second is QuPath's, for the nucleus of a cell."""

_NOT_KEPT = ("bbox", "isEllipse")
"""Members that are not valid for other geometries: QuPath draws an ellipse into the bounding box of
its points."""


@dataclasses.dataclass(frozen=True)
class Feature:
    """A feature, or a bare geometry, of a GeoJSON document."""

    item: Any
    """As parsed from JSON."""
    title: str
    """How a message names it: by its number, from 1, and its name or id."""
    shapes: dict[str, Any]
    """Its geometries by member, "" for a bare one; none that is empty."""

    def replaced(self, shapes: Mapping[str, Any]) -> Any:
        """Return the item with these in place of its `shapes`; all other members are kept.

        None removes the geometry of a nucleus; without its main geometry, the item is None.
        """
        if any(shapes.get(name, self) is None for name in ("", "geometry")):
            return None
        if "" in shapes:
            return _geometry(self.item, shapes[""])
        members = {name: value for name, value in self.item.items() if name not in _NOT_KEPT}
        for name, shape in shapes.items():
            if shape is None:
                del members[name]
            else:
                members[name] = _geometry(members[name], shape)
        return members


def read_features(path: Path) -> tuple[Any, list[Feature]]:
    """Read a GeoJSON document as parsed, and its features.

    It is a feature, a geometry, a collection of features or a list of these.
    """
    if not path.is_file():
        raise SheetError(f"{path}: no such file; name a GeoJSON file")
    with translated(SheetError, f"{path.name}: not GeoJSON ({{error}}); export it again"):
        document = json_text.loads(path.read_text(encoding="utf-8-sig"))
        items = document
        if isinstance(document, dict):
            items = document.get("features", [document])
        named = [(item, _title(item, number)) for number, item in enumerate(items, 1)]
    found = []
    for item, title in named:
        message = f"{path.name}: not GeoJSON ({title}: {{error}}); export it again"
        with translated(SheetError, message):
            found.append(Feature(item, title, _shapes(item)))
    return document, found


def read_polygons(path: Path) -> list[shapely.Polygon]:
    """Read the polygons of a GeoJSON file, ignoring other geometries; SheetError without any."""
    shapes = [shape for feature in read_features(path)[1] for shape in feature.shapes.values()]
    # Twice: a collection may contain a MultiPolygon.
    parts = shapely.get_parts(shapely.get_parts(shapes))
    found = [part for part in parts if isinstance(part, shapely.Polygon)]
    if not found:
        raise SheetError(f"{path.name}: contains no polygon; draw the region as an area")
    return found


def with_features(document: Any, items: Sequence[Any]) -> Any:
    """Return a document with other items in place of its own; None without any."""
    if isinstance(document, list):
        return list(items)
    if "features" in document:
        kept = {name: value for name, value in document.items() if name not in _NOT_KEPT}
        return {**kept, "features": list(items)}
    return next(iter(items), None)


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


def _title(item: Any, number: int) -> str:
    properties = item.get("properties") or {}
    name = properties.get("name") or item.get("id")
    return f"feature {number}" if name is None else f"feature {number} ({name})"


def _shapes(item: Any) -> dict[str, Any]:
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


def _geometry(before: dict[str, Any], shape: Any) -> dict[str, Any]:
    """Return a geometry with the other members of the one it replaces."""
    own = ("coordinates", "geometries", *_NOT_KEPT)
    kept = {name: value for name, value in before.items() if name not in own}
    return {**kept, **shapely.geometry.mapping(shape)}
