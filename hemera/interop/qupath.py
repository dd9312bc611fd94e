"""Tissue, artefacts, regions, tiles and cells of slides as GeoJSON, and a script for QuPath.

Frame: level-0 pixels of each slide. Tiles and cells are found on the grid of H&E; on HER2 they are
transformed as by ``hemera warp annotations``.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import shapely
from scipy import ndimage
from skimage.segmentation import expand_labels

from hemera import tables
from hemera.dataset.shards import ShardReader
from hemera.files import layout
from hemera.files.geojson import Feature, read_polygons
from hemera.imaging.artefacts import KINDS
from hemera.imaging.codecs import decode_mask
from hemera.imaging.outlines import trace
from hemera.masks import label_format
from hemera.registration.annotations import transform_features
from hemera.registration.registered_pair import load_pair
from hemera.sheet import Pair

Color = tuple[int, int, int]

SCRIPT = "project.groovy"
SLIDES = "slides.json"
ACCEPTED, REFUSED = (30, 160, 90), (215, 60, 50)
INTENSITIES: tuple[tuple[str, Color], ...] = (
    ("Negative", (112, 112, 225)),
    ("1+", (255, 215, 0)),
    ("2+", (225, 150, 50)),
    ("3+", (200, 50, 50)),
)
"""Classes of cells, as QuPath names and colours them."""
TOLERANCE_PX = 0.1
MEASURED = ("completeness", "membrane_od", "cytoplasm_od", "nucleus_od")

_TILE = (
    "tile", "x_px", "y_px", "size_px", "mpp", "he_mpp", "accepted", "reason", "tissue_fraction",
    "registration_error_um",
)  # fmt: skip
_MASK = ("shard", "offset", "length", "sha256")


@dataclasses.dataclass(frozen=True)
class Study:
    """Where the results of a study are, and the mask engine whose cells are exported."""

    results: Path
    engine: str


def write_pair(
    folder: Path, name: str, pair: Pair, unit: str, study: Study
) -> list[dict[str, Any]]:
    """Write ``{name}.{stain}.geojson`` of both slides of a pair.

    Returns:
        For each slide what `SCRIPT` reads: image, stain, name of the file, um per pixel.
    """
    rows = tables.read(layout.path(layout.IMAGES_TABLE, study.results, unit=unit), tables.DESCRIBE)
    described = {row["stain"]: row for row in rows.to_pylist() if row["pair"] == pair.pair}
    tiles = tiles_of(pair.pair, study)
    of_grid = functools.partial(_on_grid, pair, unit, tiles, study)
    slides = []
    for stain, image in zip(tables.STAINS, pair.images, strict=False):
        row = described.get(stain, {})
        items: Iterable[Any] = (feature.replaced(feature.shapes) for feature in of_grid())
        if stain == "her2" and tiles:
            registered = load_pair(pair, study.results)
            transform = functools.partial(registered.transform_px, to="her2")
            step_px = registered.displacement.mpp / registered.he.mpp
            moved = transform_features(
                list(of_grid()), transform, tolerance_px=TOLERANCE_PX, step_px=step_px
            )
            items = (item for item, _ in moved if item is not None)
        own = (feature.replaced(feature.shapes) for feature in _of_slide(row))
        path = folder / f"{name}.{stain}.geojson"
        _write(path, own, items if stain == "he" or tiles else ())
        slides.append(
            {
                "image": str(image.resolve()),
                "stain": stain,
                "objects": path.name,
                "mpp": row.get("mpp"),
            }
        )
    return slides


def write_project(folder: Path, slides: Iterable[Mapping[str, Any]], place: Path) -> None:
    """Write the script that builds a project of QuPath, and what it reads.

    `place` is where the folder will be.
    """
    (folder / SLIDES).write_text(json.dumps(list(slides), indent=1) + "\n")
    script = resources.files("hemera.interop").joinpath(SCRIPT).read_text()
    quoted = str(place.absolute()).replace("\\", "\\\\").replace("'", "\\'")
    (folder / SCRIPT).write_text(script.replace("@FOLDER@", quoted))


def _write(path: Path, *parts: Iterable[Any]) -> None:
    """Write features, one per line, without having all of them in memory as text."""
    with path.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        separator = "\n"
        for part in parts:
            for item in part:
                file.write(separator + json.dumps(item, allow_nan=False))
                separator = ",\n"
        file.write("\n]}\n")


def _feature(
    kind: str,
    name: str,
    color: Color,
    shapes: Mapping[str, Any],
    measurements: Mapping[str, float | None] | None = None,
    **properties: Any,
) -> Feature:
    """Return an object of QuPath: annotation, tile or cell, with its class and measurements."""
    finite = {
        name: value
        for name, value in (measurements or {}).items()
        if value is not None and math.isfinite(value)
    }
    item = {
        "type": "Feature",
        **{member: {} for member in shapes},
        "properties": {
            "objectType": kind,
            "classification": {"name": name, "color": list(color)},
            **properties,
            **({"measurements": finite} if finite else {}),
        },
    }
    return Feature(item, name, dict(shapes))


def _of_slide(row: Mapping[str, Any]) -> Iterator[Feature]:
    """Yield tissue and artefacts of a slide from its row of describe."""
    if row.get("tissue") is None:
        return
    tissue = decode_mask(row["tissue"]) > 0
    found = [("Tissue", (150, 120, 190), tissue)]
    if row["artefacts"] is not None:
        kinds = decode_mask(row["artefacts"])
        found += [
            (f"Artefact: {kind}", (90, 90, 90), kinds == number)
            for number, kind in enumerate(KINDS, 1)
        ]
    for name, color, mask in found:
        scale = row["width_px"] / mask.shape[1], row["height_px"] / mask.shape[0]
        for polygon in trace(mask):
            shape = shapely.transform(polygon, lambda points, scale=scale: points * scale)
            yield _feature("annotation", name, color, {"geometry": shape}, isLocked=True)


def tiles_of(pair: str, study: Study) -> list[dict[str, Any]]:
    """Return the rows of the tiles of a pair, with the place of their masks."""
    columns = [*_TILE, *(f"{study.engine}_{name}" for name in _MASK)]
    path = layout.path(layout.FILTERED, study.results)
    rows = tables.read(path, tables.filtered((study.engine,)), ["pair", *columns])
    return list(rows.filter(pc.equal(rows["pair"], pair)).to_pylist())


def _on_grid(pair: Pair, unit: str, tiles: list[dict[str, Any]], study: Study) -> Iterator[Feature]:
    """Yield the region of interest, the tiles, and the cells of accepted tiles, on H&E."""
    if pair.roi is not None:
        for polygon in read_polygons(pair.roi):
            yield _feature("annotation", "Region", (60, 60, 220), {"geometry": polygon})
    for row in tiles:
        side = row["size_px"] * row["mpp"] / row["he_mpp"]
        x, y = row["x_px"], row["y_px"]
        name = "Accepted" if row["accepted"] else f"Refused: {row['reason']}"
        measured = {key: row[key] for key in ("tissue_fraction", "registration_error_um")}
        shapes = {"geometry": shapely.box(x, y, x + side, y + side)}
        yield _feature("tile", name, ACCEPTED if row["accepted"] else REFUSED, shapes, measured)
    accepted = [row for row in tiles if row["accepted"]]
    if not accepted:
        return
    path = layout.path(layout.CELLS, study.results, unit=unit)
    table = tables.read(path, tables.CELLS)
    table = table.filter(pc.equal(table["engine"], study.engine))
    reader = ShardReader(study.results)
    for row in accepted:
        shard, offset, length, sha256 = (row[f"{study.engine}_{name}"] for name in _MASK)
        if shard is None:
            continue
        mask = decode_mask(reader.read(shard, offset, length, bytes.fromhex(sha256)))
        cells = table.filter(pc.equal(table["tile"], row["tile"])).to_pylist()
        yield from _cells(mask, cells, row)


def _cells(
    mask: npt.NDArray[np.uint8], cells: list[dict[str, Any]], row: Mapping[str, Any]
) -> Iterator[Feature]:
    """Yield the cells of a tile with the outlines of cell and nucleus in its mask.

    A cell is the piece of the mask, between contours, that its centre is in; the contours, one
    pixel wide, are divided between neighbours. A cell without a piece of its own is a disc of the
    area of its nucleus.
    """
    classes = label_format.classes(mask)
    inside = (classes == label_format.NEGATIVE) | (classes == label_format.POSITIVE)
    pieces = cv2.connectedComponents(inside.view(np.uint8), connectivity=4)[1]
    labels = expand_labels(pieces, 1.5) * (classes > 0)
    nuclei = label_format.nuclei(mask)
    places = ndimage.find_objects(labels)
    scale = row["mpp"] / row["he_mpp"]
    free = set(range(1, len(places) + 1))
    for cell in cells:
        height, width = labels.shape
        at = min(int(cell["y_px"]), height - 1), min(int(cell["x_px"]), width - 1)
        number = int(labels[at])
        shapes = {"geometry": shapely.Point(cell["x_px"], cell["y_px"])}
        shapes["geometry"] = shapes["geometry"].buffer(math.sqrt(cell["area_px"] / math.pi), 8)
        if number in free:
            free.remove(number)
            place = places[number - 1]
            own = labels[place] == number
            corner = place[1].start, place[0].start
            shapes = {"geometry": _largest(own, corner)}
            if (own & nuclei[place]).any():
                shapes["nucleusGeometry"] = _largest(own & nuclei[place], corner)
        for member, shape in shapes.items():
            points = shapely.get_coordinates(shape) * scale + (row["x_px"], row["y_px"])
            shapes[member] = shapely.set_coordinates(shape, points)
        measured = {name: cell[name] for name in MEASURED}
        measured["area_um2"] = cell["area_px"] * row["mpp"] ** 2
        name, color = INTENSITIES[cell["intensity"]]
        yield _feature("cell", name, color, shapes, measured)


def _largest(mask: npt.NDArray[np.bool_], corner: tuple[int, int]) -> shapely.Polygon:
    """Return the outline of the largest piece of a mask, moved by its corner (x, y)."""
    largest = max(trace(mask), key=lambda polygon: polygon.area)
    return shapely.transform(largest, lambda points: points + corner)
