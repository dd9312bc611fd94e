"""Annotations in GeoJSON, as QuPath and others export them, and carried to another slide.

Frame: level-0 pixels of a slide, unshifted by its bounds, edges at the integers.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hemera.errors import SheetError

Points = npt.NDArray[np.float64]
"""(N, 2) points as (x, y)."""

Carry = Callable[[Points], Points]
"""Takes points of one slide to another, level-0 pixels both; NaN where there is no partner."""

COORDINATE_MAX = 1e7
"""No slide is ten million pixels wide."""

GEOMETRIES = ("geometry", "nucleusGeometry")
"""Members of a feature that are geometries; the second is QuPath's, for the nucleus of a cell."""

_OWN_FRAME = ("bbox", "isEllipse")
"""Members that no longer hold on the other slide; by the second QuPath would draw an upright
ellipse into the bounding box and forget the points."""

_KINDS = {
    "Point": "points", "MultiPoint": "points", "LineString": "line", "MultiLineString": "line",
    "Polygon": "ring", "MultiPolygon": "ring",
}  # fmt: skip
_LEAST = {"points": 1, "line": 2, "ring": 3}
"""Points without which nothing is left."""

_FLOOR_PX = 2.0
"""Pieces of an edge below this length are straight."""
_PIECES_MAX = 4096
_BATCH = 200_000
_DECIMALS = 3


@dataclasses.dataclass(frozen=True, eq=False)
class _Path:
    """Points that belong together; a ring does not repeat its first."""

    kind: str
    points: Points


@dataclasses.dataclass(frozen=True)
class Carried:
    """What became of one feature."""

    feature: Any
    """On the other slide; None: nothing of it is left."""
    lost: int
    """Vertices without a partner."""


def read_polygons(path: Path) -> list[list[npt.NDArray[np.float64]]]:
    """Read the polygons of a GeoJSON file, as QuPath and others export it.

    Args:
        path: a geometry, a feature, a collection or a list of these, in level-0 pixels of H&E.

    Returns:
        Of each polygon its outer ring and its holes, (M, 2) points (x, y).

    Raises:
        SheetError: when it is not GeoJSON or holds no polygon.
    """
    found: list[list[npt.NDArray[np.float64]]] = []

    def collect(node: Any) -> None:
        if isinstance(node, list):
            for item in node:
                collect(item)
            return
        kind = node.get("type")
        if kind == "FeatureCollection":
            collect(node["features"])
        elif kind == "Feature":
            collect(node["geometry"] or [])
        elif kind == "GeometryCollection":
            collect(node["geometries"])
        elif kind == "Polygon":
            found.append([_ring(ring) for ring in node["coordinates"]])
        elif kind == "MultiPolygon":
            found.extend([_ring(ring) for ring in rings] for rings in node["coordinates"])

    try:
        collect(json.loads(path.read_text(encoding="utf-8-sig")))
    except FileNotFoundError:
        raise SheetError(f"{path}: no such file; correct roi in pairs.tsv") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise SheetError(
            f"{path.name}: not GeoJSON ({' '.join(str(error).split())}); export the "
            "annotation again"
        ) from error
    found = [rings for rings in found if rings]
    if not found:
        raise SheetError(f"{path.name}: holds no polygon; draw the region as an area")
    return found


def _ring(points: Any) -> npt.NDArray[np.float64]:
    ring = np.asarray(points, np.float64)
    if ring.ndim != 2 or ring.shape[1] < 2 or len(ring) < 3 or not np.isfinite(ring).all():
        raise ValueError("a ring needs three points [x, y] or more")
    return ring[:, :2]


def features(document: Any) -> Iterator[Any]:
    """Yield the features of a document, or its bare geometries, in order."""
    if isinstance(document, list):
        for item in document:
            yield from features(item)
    elif isinstance(document, dict) and document.get("type") == "FeatureCollection":
        yield from features(document["features"])
    else:
        yield document


def with_features(document: Any, replaced: Iterator[Any]) -> Any:
    """Return a document with other features in the place of its own; None leaves one out.

    Args:
        document: a feature, a geometry, a collection or a list of these.
        replaced: what stands in the place of each of `features`.
    """
    if isinstance(document, list):
        return [
            item
            for item in (with_features(item, replaced) for item in document)
            if item is not None
        ]
    if isinstance(document, dict) and document.get("type") == "FeatureCollection":
        kept = {key: value for key, value in document.items() if key not in _OWN_FRAME}
        return {**kept, "features": with_features(document["features"], replaced)}
    return next(replaced)


def title(feature: Any, number: int) -> str:
    """Return what a message calls a feature: its name or id, else its number, from 1."""
    if isinstance(feature, dict):
        properties = feature.get("properties")
        name = properties.get("name") if isinstance(properties, dict) else None
        for text in (name, feature.get("id")):
            if isinstance(text, str | int) and text != "":
                return f"feature {number} ({text})"
    return f"feature {number}"


def carry_features(
    items: Iterable[Any], carry: Carry, *, tolerance_px: float, step_px: float
) -> Iterator[Carried]:
    """Carry features to another slide, whatever else they hold kept as it is.

    A straight edge becomes a curve on the other slide: points are added to it where its chord
    would stray from the curve. Rings stay closed and run the way round they did, also through a
    map that mirrors. A vertex without partner is left out; so is what then has too few vertices:
    a hole, a polygon of several, a nucleus, at last the feature.

    Args:
        items: features or bare geometries, as parsed from JSON; a geometry of None stays.
        carry: the map.
        tolerance_px: how far an edge may stray from the curve, pixels of the other slide.
        step_px: no piece of an edge longer than this is taken for straight unseen: the distance of
            two nodes of the map.

    Yields:
        One result per item, in order.

    Raises:
        ValueError: when an item is no GeoJSON; it says which, from 1.
    """
    batch: list[tuple[Any, list[_Path]]] = []
    count = 0

    def finish() -> Iterator[Carried]:
        paths = [path for _, own in batch for path in own]
        results = iter(_carry_paths(paths, carry, tolerance_px, step_px))
        for item, own in batch:
            ours = [next(results) for _ in own]
            yield Carried(_rebuilt(item, iter(ours)), sum(lost for _, lost in ours))

    for number, item in enumerate(items, 1):
        try:
            paths = list(_paths_of_item(item))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{title(item, number)}: {_one_line(error)}") from error
        batch.append((item, paths))
        count += sum(_work(path, step_px) for path in paths)
        if count >= _BATCH:
            yield from finish()
            batch, count = [], 0
    yield from finish()


def _work(path: _Path, step_px: float) -> int:
    """Return how many points a path will have at most while its edges are followed, or nearly."""
    if path.kind == "points":
        return len(path.points)
    length = np.abs(np.diff(path.points, axis=0)).sum()
    return len(path.points) + int(length / step_px)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"lacks {text}" if isinstance(error, KeyError) else text


def _paths_of_item(item: Any) -> Iterator[_Path]:
    """Yield the paths of a feature or a bare geometry, in the order of `_rebuilt`."""
    if not isinstance(item, dict):
        raise ValueError(f"{type(item).__name__} in the place of a feature")
    if item.get("type") != "Feature":
        yield from _paths(item)
        return
    for name in GEOMETRIES:
        if item.get(name) is not None:
            yield from _paths(item[name])


def _paths(geometry: Any) -> Iterator[_Path]:
    kind = geometry["type"]
    if kind == "GeometryCollection":
        for part in geometry["geometries"]:
            yield from _paths(part)
        return
    if kind not in _KINDS:
        raise ValueError(f"type {kind!r} is no geometry")
    given = geometry["coordinates"]
    if not isinstance(given, list):
        raise ValueError(f"coordinates of {kind} are no list")
    if kind == "MultiPolygon":
        rings = [ring for polygon in given for ring in polygon]
    elif kind in ("Polygon", "MultiLineString"):
        rings = given
    elif kind == "Point":
        rings = [[given]] if given else []
    else:
        rings = [given] if given else []
    for ring in rings:
        yield _path(_KINDS[kind], ring)


def _path(kind: str, given: Any) -> _Path:
    points = np.array([position[:2] for position in given], np.float64)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError("a position is not [x, y]")
    if not (np.abs(points) <= COORDINATE_MAX).all():
        raise ValueError(f"a coordinate beyond {COORDINATE_MAX:g} is no pixel of a slide")
    if kind == "ring" and len(points) > 1 and (points[0] == points[-1]).all():
        points = points[:-1]
    if len(points) < _LEAST[kind]:
        raise ValueError(f"a {kind} of {len(points)} points; it needs {_LEAST[kind]}")
    return _Path(kind, points)


_Result = tuple[list[list[float]] | None, int]
"""Positions of a path on the other slide, a ring closed; and how many vertices were lost."""


def _rebuilt(item: Any, results: Iterator[_Result]) -> Any:
    """Put carried paths into a feature or a geometry; None when nothing is left of it."""
    if item.get("type") != "Feature":
        return _geometry(item, results)
    carried = {
        name: _geometry(item[name], results) for name in GEOMETRIES if item.get(name) is not None
    }
    if GEOMETRIES[0] in carried and carried[GEOMETRIES[0]] is None:
        return None
    return {
        key: value
        for key, value in {**item, **carried}.items()
        if key not in _OWN_FRAME and not (key in carried and value is None)
    }


def _geometry(geometry: Any, results: Iterator[_Result]) -> Any:
    kind = geometry["type"]
    kept = {key: value for key, value in geometry.items() if key not in _OWN_FRAME}
    if kind == "GeometryCollection":
        given = geometry["geometries"]
        parts = [part for part in (_geometry(part, results) for part in given) if part is not None]
        return {**kept, "geometries": parts} if parts or not given else None
    given = geometry["coordinates"]
    if not given:
        return kept
    coordinates: Any
    if kind == "MultiPolygon":
        coordinates = [
            polygon for polygon in (_polygon(rings, results) for rings in given) if polygon
        ]
    elif kind == "Polygon":
        coordinates = _polygon(given, results)
    elif kind == "MultiLineString":
        coordinates = [line for line in (next(results)[0] for _ in given) if line is not None]
    else:
        coordinates = next(results)[0]
        if kind == "Point" and coordinates is not None:
            coordinates = coordinates[0]
    return {**kept, "coordinates": coordinates} if coordinates else None


def _polygon(rings: Any, results: Iterator[_Result]) -> list[list[list[float]]]:
    """Return outer ring and holes; empty without the outer ring."""
    carried = [next(results)[0] for _ in rings]
    if not carried or carried[0] is None:
        return []
    return [ring for ring in carried if ring is not None]


def _carry_paths(
    paths: list[_Path], carry: Carry, tolerance_px: float, step_px: float
) -> list[_Result]:
    """Carry many paths at once: one call of the map serves all their points."""
    if not paths:
        return []
    counts = np.array([len(path.points) for path in paths])
    vertices = np.concatenate([path.points for path in paths])
    ends = np.cumsum(counts)
    # One edge begins at each vertex; that of a lone point or at the end of a line has no length.
    following = np.arange(len(vertices)) + 1
    for path, end, count in zip(paths, ends, counts, strict=True):
        if path.kind == "points":
            following[end - count : end] -= 1
        else:
            following[end - 1] = end - count if path.kind == "ring" else end - 1
    carried = carry(vertices)
    edges, shares, inner = _bent(
        vertices, vertices[following], carried, carried[following], carry, tolerance_px, step_px
    )
    owner = np.concatenate([np.arange(len(vertices)), edges])
    order = np.lexsort([np.concatenate([np.zeros(len(vertices)), shares]), owner])
    every = np.concatenate([carried, inner])[order]
    starts = np.searchsorted(owner[order], np.concatenate([[0], ends]))
    lost = np.isnan(carried[:, 0])
    results: list[_Result] = []
    for n, path in enumerate(paths):
        points = every[starts[n] : starts[n + 1]]
        points = points[np.isfinite(points).all(axis=1)]
        gone = int(lost[ends[n] - counts[n] : ends[n]].sum())
        if len(points) < _LEAST[path.kind]:
            results.append((None, gone))
            continue
        if path.kind == "ring":
            if _area(path.points) * _area(points) < 0:
                points = np.concatenate([points[:1], points[:0:-1]])
            points = np.concatenate([points, points[:1]])
        results.append((np.round(points, _DECIMALS).tolist(), gone))
    return results


def _area(ring: Points) -> float:
    """Return the area of a ring, signed by the way round it runs."""
    x, y = (ring - ring[0]).T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def _bent(
    begin: Points,
    end: Points,
    carried_begin: Points,
    carried_end: Points,
    carry: Carry,
    tolerance_px: float,
    step_px: float,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], Points]:
    """Find the points that edges need so that their pieces follow the curves they become.

    Half of the tolerance is spent on what is found, half on what of it can be spared.

    Returns:
        Of each point the edge, the share of the way along it, and where it lies on the other slide.
    """
    length = np.hypot(*(end - begin).T)
    number = np.clip(np.ceil(length / step_px), 1, _PIECES_MAX).astype(np.int64)
    edge = np.repeat(np.arange(len(begin)), number)
    place = np.arange(len(edge)) - np.repeat(np.cumsum(number) - number, number)
    low, high = place / number[edge], (place + 1) / number[edge]
    low_at, high_at = carried_begin[edge], carried_end[edge]
    edges, shares, points = [], [], []

    def at(edge: npt.NDArray[np.int64], share: npt.NDArray[np.float64]) -> Points:
        return carry(begin[edge] + (end[edge] - begin[edge]) * share[:, None])

    first = np.flatnonzero(place > 0)
    if len(first):
        nodes = at(edge[first], low[first])
        low_at[first] = nodes
        # Behind the piece that ends at a node comes the one that begins there.
        high_at[first - 1] = nodes
        edges.append(edge[first])
        shares.append(low[first])
        points.append(nodes)
    while True:
        seen = np.flatnonzero((high - low) * length[edge] > _FLOOR_PX)
        edge, low, high = edge[seen], low[seen], high[seen]
        low_at, high_at = low_at[seen], high_at[seen]
        if not len(edge):
            break
        quarters = np.stack([low + (high - low) * share for share in (0.25, 0.5, 0.75)])
        between = at(np.tile(edge, 3), quarters.ravel()).reshape(3, -1, 2)
        stray = np.max([_distance(quarter, low_at, high_at) for quarter in between], axis=0)
        # Comparing with NaN gives False: where there is no partner, nothing can be mended.
        open_ = np.flatnonzero(stray > tolerance_px / 2)
        middle, middle_at = quarters[1][open_], between[1][open_]
        edges.append(edge[open_])
        shares.append(middle)
        points.append(middle_at)
        edge = np.tile(edge[open_], 2)
        low, high = np.concatenate([low[open_], middle]), np.concatenate([middle, high[open_]])
        low_at, high_at = (
            np.concatenate([low_at[open_], middle_at]),
            np.concatenate([middle_at, high_at[open_]]),
        )
    if not edges:
        return np.empty(0, np.int64), np.empty(0), np.empty((0, 2))
    edge, share, found = np.concatenate(edges), np.concatenate(shares), np.concatenate(points)
    order = np.lexsort([share, edge])
    order = order[np.isfinite(found[order]).all(axis=1)]
    edge, share, found = edge[order], share[order], found[order]
    kept = np.zeros(len(edge), np.bool_)
    bounds = np.flatnonzero(np.diff(edge, prepend=-1, append=-1))
    for start, stop in itertools.pairwise(bounds.tolist()):
        n = edge[start]
        line = np.concatenate([carried_begin[n, None], found[start:stop], carried_end[n, None]])
        kept[start:stop] = _needed(line, tolerance_px / 2)[1:-1]
    return edge[kept], share[kept], found[kept]


def _needed(line: Points, tolerance_px: float) -> npt.NDArray[np.bool_]:
    """Tell which points of a line it needs to stay within a tolerance (Douglas and Peucker)."""
    needed = np.zeros(len(line), np.bool_)
    needed[[0, -1]] = True
    parts = [(0, len(line) - 1)]
    while parts:
        first, last = parts.pop()
        if last - first < 2:
            continue
        stray = _distance(line[first + 1 : last], line[first], line[last])
        # An edge whose end has no partner keeps all that is between.
        farthest = int(np.argmax(stray)) if not np.isnan(stray).any() else (last - first) // 2 - 1
        if not stray[farthest] <= tolerance_px:
            middle = first + 1 + farthest
            needed[middle] = True
            parts += [(first, middle), (middle, last)]
    return needed


def _distance(points: Points, begin: Points, end: Points) -> npt.NDArray[np.float64]:
    """Return how far points lie from pieces of straight lines."""
    along = end - begin
    square = np.maximum((along**2).sum(axis=-1), math.ulp(1.0))
    share = np.clip(((points - begin) * along).sum(axis=-1) / square, 0, 1)
    beside = points - begin - share[..., None] * along
    result: npt.NDArray[np.float64] = np.hypot(beside[..., 0], beside[..., 1])
    return result
