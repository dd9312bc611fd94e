"""A registered pair as a Zarr store for SpatialData, with an OME-Zarr scene in it.

The store is a SpatialData container: both images on their own grids, tiles and cells of H&E as
shapes. Its transformations are at most affine, so HER2 has the affine part of the displacement.
The group `SCENE` in it is a hierarchy of OME-Zarr 0.6 of its own, because all metadata of a
hierarchy must be of one version: the same images, and the displacement itself.

Frames: both slides have their coordinate systems as `hemera.registration.displacement`. OME-Zarr
places the origin of an array at the centre of its first pixel, SpatialData at the corner of it.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely
import zarr

from hemera import tables
from hemera.errors import RegistrationError
from hemera.files import layout
from hemera.imaging.slide import Slide, open_slide
from hemera.imaging.tolerant import LOST_MAX, Losses, read_tiles
from hemera.interop.qupath import MEASURED, Study, tiles_of
from hemera.registration.displacement import Displacement, map_grid, node_points
from hemera.registration.registered_pair import PairSlide, RegisteredPair

log = logging.getLogger(__name__)

SCENE = "scene.ome.zarr"
FIELD = "coordinateTransformations/displacement"
"""The place of the displacement in the scene, as the specification recommends."""
SYSTEM = "global"
"""The coordinate system of SpatialData: um of H&E; the default of its functions."""

_VERSION, _SPATIALDATA = "0.6", "0.5-dev-spatialdata"
_CHUNK_PX = 1024
_FIELD_NODES = 512

_TILE = ("name", "accepted", "reason", "tissue_fraction", "registration_error_um")
_WINDOW = {"start": 0, "end": 255, "min": 0, "max": 255}
_OMERO = {
    "channels": [
        {"label": label, "color": color, "window": _WINDOW}
        for label, color in (("r", "FF0000"), ("g", "00FF00"), ("b", "0000FF"))
    ]
}
_CHANNEL: dict[str, Any] = {"name": "c", "type": "channel", "discrete": True}
_SPACE: list[dict[str, Any]] = [
    {"name": name, "type": "space", "unit": "micrometer"} for name in "yx"
]


@dataclasses.dataclass(frozen=True)
class Image:
    """(width, height) of the levels of an image, finest first, and um per pixel of the first."""

    sizes_px: list[tuple[int, int]]
    mpp: float


def _image_of(slide: PairSlide, mpp: float) -> Image:
    """Return how a slide is stored at a resolution, its own where that is coarser."""
    mpp = max(mpp, slide.mpp)
    width, height = (max(1, math.ceil(side / mpp - 1e-6)) for side in slide.size_um)
    sizes = [(width, height)]
    while max(sizes[-1]) > _CHUNK_PX and min(sizes[-1]) > 1:
        sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
    return Image(sizes, mpp)


def write_store(
    folder: Path, pair: RegisteredPair, unit: str, study: Study, *, mpp: float, workers: int
) -> None:
    """Write the store of a pair into a new folder, named as the pair in it.

    Args:
        unit: of the results of the pair.
        mpp: of the images, um per pixel.
        workers: threads; any number gives the same bytes.
    """
    scene = folder / SCENE
    _write_group(folder, {"spatialdata_attrs": {"version": "0.2"}})
    _write_group(scene, {"ome": {"version": _VERSION, "scene": _scene()}})
    _write_group(folder / "images", {})
    for stain, slide in zip(tables.STAINS, (pair.he, pair.her2), strict=True):
        image, place = _image_of(slide, mpp), folder / "images" / stain
        _write_group(place, _spatialdata_image(stain, image, pair))
        _write_group(scene / stain, _multiscale(stain, _CHANNEL, image, omero=_OMERO))
        with open_slide(slide.path, mpp=slide.mpp) as source:
            _write_levels(place, source, image, f"{folder.stem}, {stain}", workers)
        for level in map(str, range(len(image.sizes_px))):
            # The same files: readers reject a path to arrays of another hierarchy.
            shutil.copytree(place / level, scene / stain / level, copy_function=_link)
    _write_displacement(scene, pair)
    rows = tiles_of(pair.name, study)
    for row in rows:
        row["name"] = folder.stem + row["tile"].removeprefix(pair.name)
    if rows:
        _write_group(folder / "shapes", {})
        _write_tiles(folder, rows)
    accepted = {row["tile"]: row for row in rows if row["accepted"]}
    if accepted:
        cells = tables.read(layout.path(layout.CELLS, study.results, unit=unit), tables.CELLS)
        own = pc.is_in(cells["tile"], pa.array([*accepted]))
        cells = cells.filter(pc.and_(own, pc.equal(cells["engine"], study.engine)))
        # SpatialData has no form for a table of shapes without any.
        if cells.num_rows:
            _write_cells(folder, accepted, cells)
    error_um = _affine_error_um(pair.displacement)
    log.info(
        "%s: the affine part, for SpatialData, is %.3g um off in the median, at most %.3g um",
        folder.stem, np.median(error_um), error_um.max(),
    )  # fmt: skip


def _write_group(folder: Path, attributes: dict[str, Any]) -> None:
    """Write a group of Zarr; the library needs hard links for it, which some file systems lack."""
    folder.mkdir(parents=True)
    group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    (folder / "zarr.json").write_text(json.dumps(group, indent=1) + "\n")


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # The file system has no hard links.
        shutil.copyfile(source, target)


def _write_levels(folder: Path, slide: Slide, image: Image, name: str, workers: int) -> None:
    """Write the levels of an image chunk by chunk, each the mean of 2 x 2 px of the one before."""
    arrays = [
        _array(folder / str(level), (3, height, width), _CHUNK_PX, np.uint8, "cyx")
        for level, (width, height) in enumerate(image.sizes_px)
    ]
    places = _places(image.sizes_px[0])
    losses = Losses(name, len(places), LOST_MAX)

    def read(place: tuple[int, int, int, int]) -> npt.NDArray[np.uint8]:
        x, y, width, height = place
        scale = image.mpp / slide.mpp
        return slide.read(x * scale, y * scale, width, height, image.mpp)

    with contextlib.closing(read_tiles(read, places, workers, losses)) as blocks:
        for (x, y, width, height), pixels in zip(places, blocks, strict=True):
            block = np.empty((height, width, 3), np.uint8)
            block[:] = slide.background if pixels is None else pixels
            arrays[0][:, y : y + height, x : x + width] = np.moveaxis(block, -1, 0)
    for finer, coarser, size in zip(arrays, arrays[1:], image.sizes_px[1:], strict=False):
        for x, y, width, height in _places(size):
            block = np.asarray(finer[:, 2 * y : 2 * (y + height), 2 * x : 2 * (x + width)])
            half = cv2.resize(
                np.ascontiguousarray(np.moveaxis(block, 0, -1)), (width, height),
                interpolation=cv2.INTER_AREA,
            )  # fmt: skip
            coarser[:, y : y + height, x : x + width] = np.moveaxis(half, -1, 0)


def _places(size_px: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """Return the chunks of an image: x, y, width and height."""
    width, height = size_px
    return [
        (x, y, min(_CHUNK_PX, width - x), min(_CHUNK_PX, height - y))
        for y in range(0, height, _CHUNK_PX)
        for x in range(0, width, _CHUNK_PX)
    ]


def _array(path: Path, shape: tuple[int, int, int], side: int, dtype: Any, axes: str) -> Any:
    chunks = shape[0], min(side, shape[1]), min(side, shape[2])
    return zarr.create_array(
        path, shape=shape, chunks=chunks, dtype=dtype, dimension_names=list(axes)
    )


def _write_displacement(scene: Path, pair: RegisteredPair) -> None:
    """Write the displacement on nodes half as far apart, the first at the corner of H&E.

    Between these nodes it is the same bilinear function as between its own, which are among them.
    They cover the slide from edge to edge, since the specification has no value beyond them, and
    need no translation, which some readers ignore.
    """
    d = pair.displacement
    step = d.mpp / 2
    width, height = (math.ceil(side / step - 1e-6) + 1 for side in pair.he.size_um)
    nodes = Image([(width, height)], step)
    component = {"name": "d", "type": "displacement", "discrete": True}
    _write_group((scene / FIELD).parent, {})
    _write_group(scene / FIELD, _multiscale("displacement", component, nodes, from_edge=False))
    array = _array(scene / FIELD / "0", (2, height, width), _FIELD_NODES, np.float32, "dyx")
    x_um = np.arange(width) * step
    for top in range(0, height, _FIELD_NODES):
        rows = min(_FIELD_NODES, height - top)
        moving = map_grid(d, -step / 2, (top - 0.5) * step, step, width, rows)
        moving[..., 0] -= x_um
        moving[..., 1] -= ((top + np.arange(rows)) * step)[:, None]
        # Components in the order of the axes, y first.
        array[:, top : top + rows] = np.moveaxis(moving[..., ::-1], -1, 0).astype(np.float32)


def _affine_error_um(d: Displacement) -> npt.NDArray[np.float64]:
    """Return the distance of a displacement from its affine part at its nodes."""
    moving = node_points(d) @ (d.affine.matrix - np.eye(2)).T + d.affine.offset_um
    error: npt.NDArray[np.float64] = np.linalg.norm(d.vectors_um - moving, axis=-1)
    return error


def _scene() -> dict[str, Any]:
    """Return the transformation of H&E to HER2, and those of the images, which drop channels."""
    systems: list[dict[str, Any]] = [{"name": stain, "axes": _SPACE} for stain in tables.STAINS]
    images: list[dict[str, Any]] = [
        {
            "type": "projectAxis",
            "droppedInputs": [0],
            "input": {"path": stain, "name": "physical"},
            "output": {"name": stain},
        }
        for stain in tables.STAINS
    ]
    registration = {
        "type": "displacements",
        "path": FIELD,
        "interpolation": "linear",
        "input": {"name": "he"},
        "output": {"name": "her2"},
    }
    return {"coordinateSystems": systems, "coordinateTransformations": [registration, *images]}


def _multiscale(
    name: str, first: dict[str, Any], image: Image, *, from_edge: bool = True, **more: Any
) -> dict[str, Any]:
    """Return the attributes of an image of OME-Zarr 0.6 in um.

    `from_edge`: the origin is the corner of the first pixel, else its centre.
    """
    datasets = []
    for level in range(len(image.sizes_px)):
        mpp = image.mpp * 2**level
        ends = {"input": {"path": str(level)}, "output": {"name": "physical"}}
        scale = {"type": "scale", "scale": [1.0, mpp, mpp]}
        shift = {"type": "translation", "translation": [0.0, mpp / 2, mpp / 2]}
        whole = {"type": "sequence", "transformations": [scale, shift]} if from_edge else scale
        datasets.append({"path": str(level), "coordinateTransformations": [{**whole, **ends}]})
    systems = [{"name": "physical", "axes": [first, *_SPACE]}]
    multiscale = {
        "name": name,
        "type": "mean",
        "metadata": {"description": "each level halves the one before"},
        "coordinateSystems": systems,
        "datasets": datasets,
    }
    return {"ome": {"version": _VERSION, "multiscales": [multiscale], **more}}


def _spatialdata_image(stain: str, image: Image, pair: RegisteredPair) -> dict[str, Any]:
    """Return the attributes of an image of SpatialData, in its version of OME-Zarr 0.5."""
    matrix = np.diag([1.0, image.mpp, image.mpp, 1.0])[:3]
    if stain == "her2":
        affine = pair.displacement.affine
        if abs(affine.determinant) < 1e-6:
            raise RegistrationError(
                f"pair {pair.name}: its displacement maps H&E to a line; register it again, or set "
                "verdict to refuse in the sheet"
            )
        back = np.linalg.inv(affine.matrix)
        # Axes in the order c, y, x.
        matrix[1:, 1:3] = back[::-1, ::-1] * image.mpp
        matrix[1:, 3] = -(back @ affine.offset_um)[::-1]
    axes = [{"name": "c", "type": "channel"}, *({"name": n, "type": "space"} for n in "yx")]
    multiscale = {
        "name": stain,
        "axes": axes,
        "datasets": [
            {
                "path": str(level),
                "coordinateTransformations": [
                    {"type": "scale", "scale": [1.0, float(2**level), float(2**level)]}
                ],
            }
            for level in range(len(image.sizes_px))
        ],
        "coordinateTransformations": [
            {"type": "affine", "affine": matrix.tolist(), **_ends("cyx", axes)}
        ],
    }
    ome = {"version": _SPATIALDATA, "omero": _OMERO, "multiscales": [multiscale]}
    return {"ome": ome, "spatialdata_attrs": {"version": "0.3"}}


def _ends(name: str, axes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    axes = [axis if axis["type"] == "channel" else {**axis, "unit": "unit"} for axis in axes]
    return {"input": {"name": name, "axes": axes}, "output": {"name": SYSTEM, "axes": axes}}


def _write_tiles(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write all tiles as squares."""
    boxes = []
    for row in rows:
        x, y, side = row["x_px"], row["y_px"], row["size_px"] * row["mpp"] / row["he_mpp"]
        boxes.append(shapely.box(x, y, x + side, y + side))
    columns = {name: [row[name] for row in rows] for name in _TILE}
    _write_shapes(folder / "shapes" / "tiles", pa.table(columns), boxes, rows[0]["he_mpp"])


def _write_cells(folder: Path, tiles: dict[str, dict[str, Any]], cells: pa.Table) -> None:
    """Write cells as discs of the area of their nuclei."""
    of_cells = [tiles[name] for name in cells["tile"].to_pylist()]
    place = [(row["x_px"], row["y_px"], row["mpp"] / row["he_mpp"]) for row in of_cells]
    at = np.array(place).reshape(-1, 3)
    centres = at[:, :2] + np.stack([cells["x_px"], cells["y_px"]], axis=-1) * at[:, 2:]
    radius = np.sqrt(cells["area_px"].to_numpy() / math.pi) * at[:, 2]
    columns = {"name": [row["name"] for row in of_cells], "radius": radius}
    columns |= {name: cells[name] for name in ("intensity", *MEASURED)}
    he_mpp = next(iter(tiles.values()))["he_mpp"]
    _write_shapes(folder / "shapes" / "cells", pa.table(columns), shapely.points(centres), he_mpp)


def _write_shapes(folder: Path, table: pa.Table, shapes: Any, he_mpp: float) -> None:
    """Write shapes in level-0 pixels of H&E as GeoParquet."""
    axes = [{"name": axis, "type": "space"} for axis in "xy"]
    scale = {"type": "scale", "scale": [he_mpp, he_mpp], **_ends("xy", axes)}
    attributes = {
        "encoding-type": "ngff:shapes",
        "axes": ["x", "y"],
        "coordinateTransformations": [scale],
        "spatialdata_attrs": {"version": "0.3"},
    }
    _write_group(folder, attributes)
    column: dict[str, Any] = {"encoding": "WKB", "geometry_types": [], "crs": None}
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
    table = table.append_column("geometry", pa.array(shapely.to_wkb(shapes), pa.binary()))
    table = table.replace_schema_metadata({"geo": json.dumps(geo)})
    pq.write_table(table, folder / "shapes.parquet")
