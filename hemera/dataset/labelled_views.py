"""Views of tiles with labels, for the training of encoders: from scores, cells, masks, regions."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import shapely
from tqdm import tqdm

from hemera import tables
from hemera.dataset import cases as labelled
from hemera.dataset import criteria
from hemera.dataset.shards import read_member
from hemera.dataset.views import cut_views
from hemera.errors import SheetError
from hemera.files import layout
from hemera.files.geojson import read_features
from hemera.imaging.codecs import decode, decode_mask
from hemera.imaging.color import DENSITY_STEP, density, saturation
from hemera.masks import label_format
from hemera.masks.her2_score import her2_scores
from hemera.sheet import SCORES

RGB = npt.NDArray[np.uint8]
Map = npt.NDArray[np.uint8]
Row = Mapping[str, Any]

UNKNOWN = 255
"""Label of a pixel of which nothing is known."""
HALF = 0.5
"""Fraction of a view that is annotated with a class from which it has the label."""


class Box(NamedTuple):
    """A view of a tile: first row and column, and side, px."""

    top: int
    left: int
    side: int


Label = int | Map | None
OfTile = Callable[[Row], Callable[[Box], Label]]
"""From the row of a tile, the label of each of its views; None: it has none."""
OfUnit = Callable[[str], OfTile]
"""The same of the tiles of a unit."""


class LabelledView(NamedTuple):
    """A view, (S, S, 3), with case, name, and its label: one number, or one per pixel (S, S)."""

    case: str
    name: str
    rgb: RGB
    label: int | Map
    mpp: float


@dataclasses.dataclass(frozen=True)
class Source:
    """Which views are cut, and their labels.

    Attributes:
        stain: he or her2.
        labels: see `OfUnit`.
        cases: those whose views are used.
        limits: of `criteria.stain_refusals`.
    """

    stain: Literal["he", "her2"]
    labels: OfUnit
    cases: frozenset[str]
    limits: Mapping[str, Any]


def labelled_views(
    source: Source, case_tiles: Path, results: Path, *, split: int, tissue_min: float
) -> Iterator[LabelledView]:
    """Yield the views of the accepted tiles of a stain that have a label, unit by unit.

    Args:
        source: see there.
        case_tiles: table of the tiles of stage cases.
        results: folder of results, with tables and shards of stage tile.
        split: views along a side of a tile.
        tissue_min: smallest tissue fraction of a view.

    Raises:
        LeakageError: when two cases, of which one may be judged, have the same tile.
    """
    known = tables.read(case_tiles, tables.STATUS_TILES).to_pylist()
    of_tile = {row["tile"]: row["case"] for row in known}
    digests: list[tuple[str, str, str]] = []
    stain = source.stain
    units = sorted({row["unit"] for row in known})
    for unit in tqdm(units, f"{stain} tiles", unit="unit", disable=None):
        path = layout.path(layout.TILES, results, unit=unit)
        table = tables.read(path, tables.TILE)
        made_with = json.loads(tables.read_metadata(path).get("options", "{}"))
        shard = layout.path(layout.TILE_SHARD, results, unit=unit)
        refused = criteria.stain_refusals(table, source.limits, stain).tolist()
        rows = [row for row, reason in zip(table.to_pylist(), refused, strict=True) if not reason]
        digests += [(row[f"{stain}_sha256"], of_tile[row["tile"]], row["tile"]) for row in rows]
        used = [row for row in rows if of_tile[row["tile"]] in source.cases]
        labels_of = source.labels(unit) if used else None
        for row in used:
            assert labels_of is not None
            label_of = labels_of({**row, "case": of_tile[row["tile"]]})
            data = read_member(
                shard, row[f"{stain}_offset"], row[f"{stain}_length"], row[f"{stain}_sha256"]
            )
            rgb = decode(data)
            tissue = _tissue(rgb, row, stain, made_with)
            for i, j, view in cut_views(rgb, tissue, split, tissue_min):
                side = len(view)
                label = label_of(Box(i * side, j * side, side))
                if label is not None:
                    name = f"{row['tile']}_{i}_{j}"
                    yield LabelledView(of_tile[row["tile"]], name, view, label, row["mpp"])
    labelled.check_images(digests)


def _tissue(rgb: RGB, row: Row, stain: str, options: Mapping[str, Any]) -> npt.NDArray[np.bool_]:
    """Return which pixels of a tile are tissue, as stage tile measured it."""
    if stain == "he":
        return saturation(rgb) > 255 * float(options.get("saturation_min", 0.0))
    density_min = float(options.get("density_min", 0.0)) / DENSITY_STEP
    return density(rgb, tuple(row["her2_background"])) > density_min


def from_scores(scores: Mapping[str, str]) -> OfUnit:
    """Return labels that are the scores of the cases: 0 to 3."""

    def label(row: Row, _: Box) -> Label:
        return SCORES.index(scores[row["case"]])

    return lambda unit: lambda row: functools.partial(label, row)


def from_cells(results: Path, engine: str, cells_min: int) -> OfUnit:
    """Return labels that are the ASCO/CAP score of the cells of a view, 0 to 3: silver labels.

    Args:
        results: folder of results, with the cells of stage mask.
        engine: whose cells are read.
        cells_min: fewest cells of a view with a label.
    """

    def of_unit(unit: str) -> OfTile:
        path = layout.path(layout.CELLS, results, unit=unit)
        columns = ["tile", "engine", "x_px", "y_px", "intensity"]
        cells = tables.read(path, tables.CELLS, columns)
        own = cells.filter(pc.equal(cells["engine"], engine)).to_pandas()
        by_tile = {str(tile): group for tile, group in own.groupby("tile")}

        def label(row: Row, box: Box) -> Label:
            group = by_tile.get(row["tile"])
            if group is None:
                return None
            x, y = group["x_px"].to_numpy(), group["y_px"].to_numpy()
            inside = (x >= box.left) & (x < box.left + box.side)
            inside &= (y >= box.top) & (y < box.top + box.side)
            if inside.sum() < cells_min:
                return None
            counts = np.bincount(group["intensity"].to_numpy()[inside], minlength=len(SCORES))
            return max(0, int(her2_scores(counts[None])[0]) - 1)

        return lambda row: functools.partial(label, row)

    return of_unit


def from_masks(results: Path, engine: str) -> OfUnit:
    """Return labels of pixels: 0 background, 1 to 4 cells of intensity 0 to 3: silver labels.

    Excluded pixels are `UNKNOWN`. A view without another pixel has no label.
    """

    def of_unit(unit: str) -> OfTile:
        path = layout.path(layout.MASKS, results, unit=unit)
        rows = tables.read(path, tables.MASK).to_pylist()
        by_tile = {row["tile"]: row for row in rows if row["engine"] == engine}
        shard = layout.path(layout.MASK_SHARD, results, unit=unit)

        def of_tile(row: Row) -> Callable[[Box], Label]:
            if row["tile"] not in by_tile:
                return lambda box: None
            place = by_tile[row["tile"]]
            data = read_member(shard, place["offset"], place["length"], place["sha256"])
            found = stain_map(decode_mask(data))

            def label(box: Box) -> Label:
                own = found[box.top : box.top + box.side, box.left : box.left + box.side]
                return own if (own != UNKNOWN).any() else None

            return label

        return of_tile

    return of_unit


def stain_map(mask: Map) -> Map:
    """Return the classes of a stain map, (H, W), of a label image."""
    cell = label_format.classes(mask) != label_format.BACKGROUND
    found = np.where(cell, 1 + label_format.intensity(mask), 0)
    return np.where(label_format.excluded(mask), UNKNOWN, found).astype(np.uint8)


def from_annotations(files: Mapping[str, Path], classes: Sequence[str]) -> OfUnit:
    """Return labels of views of H&E: 1 tumour, 0 something else, by regions of the sheet.

    A view with a smaller annotated fraction than `HALF` has no label.

    Args:
        files: GeoJSON by pair, in level-0 pixels of H&E, whose regions have a classification.
        classes: names that are tumour, in any case.
    """
    tumour = {name.lower() for name in classes}
    read = functools.cache(functools.partial(read_regions, tumour=frozenset(tumour)))

    def label(row: Row, box: Box) -> Label:
        scale = row["mpp"] / row["he_mpp"]
        x, y = row["x_px"] + box.left * scale, row["y_px"] + box.top * scale
        view = shapely.box(x, y, x + box.side * scale, y + box.side * scale)
        inside, other = (
            shapely.area(shapely.intersection(region, view)) / view.area
            for region in read(files[row["pair"]])
        )
        return 1 if inside >= HALF else 0 if other >= HALF else None

    def of_tile(row: Row) -> Callable[[Box], Label]:
        return functools.partial(label, row) if row["pair"] in files else lambda box: None

    return lambda unit: of_tile


def read_regions(path: Path, tumour: frozenset[str] = frozenset()) -> tuple[Any, Any]:
    """Return the tumour, and what is annotated with another class, as one geometry each.

    `tumour` are its names in lower case. SheetError where no region has a classification.
    """
    found: tuple[list[Any], list[Any]] = ([], [])
    for feature in read_features(path)[1]:
        properties = feature.item.get("properties") or {}
        name = (properties.get("classification") or {}).get("name")
        if name:
            found[name.lower() not in tumour].extend(feature.shapes.values())
    if not any(found):
        raise SheetError(
            f"{path.name}: no region with a classification; draw the regions as annotations with "
            "a class, such as Tumor and Stroma in QuPath"
        )
    inside, other = (shapely.union_all(own) for own in found)
    return inside, shapely.difference(other, inside)
