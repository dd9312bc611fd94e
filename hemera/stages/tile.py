"""Cut tiles of both stains and measure them: the only stage that reads full-resolution pixels."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import logging
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from hemera import tables
from hemera.config import TileOptions
from hemera.dataset.shards import ShardWriter
from hemera.errors import RegistrationError, SheetError, SlideError
from hemera.imaging.codecs import SUFFIXES, encode
from hemera.imaging.color import DENSITY_STEP, density, saturation
from hemera.imaging.geometry import grid_positions, polygon_share, same_mpp, tissue_share
from hemera.imaging.quality import histogram_similarity, sharpness
from hemera.imaging.resample import halved
from hemera.imaging.slide import Slide, open_slide
from hemera.interop.geojson import read_polygons
from hemera.io.atomic import replacing
from hemera.io.threads import in_order
from hemera.registration import displacement as fields
from hemera.registration.displacement import Displacement
from hemera.registration.displacement_files import read_displacement
from hemera.registration.local_quality import LocalQuality
from hemera.registration.verdict import effective_verdict
from hemera.registration.warping import read_displaced
from hemera.sheet import Pair, read_sheet, unit_pairs

log = logging.getLogger(__name__)

RGB = npt.NDArray[np.uint8]

DESCRIBE_COLUMNS = (
    "pair", "stain", "verdict", "reason", "reader", "mpp", "background", "tissue_threshold",
    "tissue_fraction", "tissue",
)  # fmt: skip
"""What is read of `tables.DESCRIBE`; the thumbnails of a block's images fill memory for nothing."""

UPSAMPLING_MAX = 0.01
"""A resolution is finer than an H&E image's own from this share on: scanners differ by less."""

HER2_UPSAMPLING_MAX = 0.10
"""The same for HER2, which is resampled through the displacement anyhow."""

ROI_SHARE_MIN = 0.5
"""A tile belongs to the region of interest when at least half of it lies inside."""


def run(
    *,
    sheet: Path,
    unit: str,
    block_count: int,
    images_table: Path,
    displacement: Path | None = None,
    certificate: Path | None = None,
    registration_quality: Path | None = None,
    shard: Path,
    tiles: Path,
    pairs: Path,
    workers: int = 1,
    options: TileOptions,
) -> None:
    """Tile every pair of a unit.

    A pair that cannot be tiled is a row of `pairs` with its state and reason, never an error.

    Args:
        sheet: the sheet of pairs.
        unit: the unit.
        block_count: blocks that image pairs are cut into.
        images_table: what describe found, `tables.DESCRIBE`.
        displacement: from H&E to HER2; None for pairs that come registered.
        certificate: verdict on it, `tables.CERTIFICATE`; None for pairs that come registered.
        registration_quality: its local quality, `tables.QUALITY`; None likewise.
        shard: tar of the tiles.
        tiles: table `tables.TILE`, in the order of the shard.
        pairs: table `tables.PAIRS`.
        workers: threads over the tiles of a pair; any number gives the same bytes.
        options: settings.

    Raises:
        SheetError: when the sheet cannot be used.
    """
    described: dict[str, dict[str, dict[str, Any]]] = collections.defaultdict(dict)
    for row in tables.read(images_table, tables.DESCRIBE, DESCRIBE_COLUMNS).to_pylist():
        described[row["pair"]][row["stain"]] = row
    verdicts: dict[str, dict[str, Any]] = {}
    if certificate is not None:
        for row in tables.read(certificate, tables.CERTIFICATE).to_pylist():
            verdicts[row["pair"]] = row
    local: LocalQuality | None = None
    if registration_quality is not None:
        squares = tables.read(registration_quality, tables.QUALITY)
        local = LocalQuality.from_columns(squares.to_pydict())
    tile_rows: list[dict[str, Any]] = []
    pair_rows: list[dict[str, Any]] = []
    shard_name = f"{shard.parent.name}/{shard.name}"
    with replacing(shard) as temporary, ShardWriter(temporary) as writer:
        for pair in unit_pairs(read_sheet(sheet), unit, block_count):
            registration, refusal = effective_verdict(pair, verdicts.get(pair.pair))
            state = _PairState(pair.pair, registration)
            rows = _tile_pair(
                pair, described.get(pair.pair, {}), displacement, refusal, state, writer,
                workers, options,
            )  # fmt: skip
            if local is not None:
                _add_quality(rows, local)
            if state.reason:
                log.warning("pair %s: %s: %s", pair.pair, state.state, state.reason)
            tile_rows += [{**row, "shard": shard_name} for row in rows]
            pair_rows.append(dataclasses.asdict(state))
    metadata = tables.provenance(options) | tables.inherited("describe", images_table)
    if certificate is not None:
        metadata |= tables.inherited("register", certificate)
    tables.write(tiles, tile_rows, tables.TILE, metadata)
    tables.write(pairs, pair_rows, tables.PAIRS, metadata)


def _add_quality(rows: list[dict[str, Any]], local: LocalQuality) -> None:
    """Give each tile the quality of the registration at its centre."""
    centres = [
        [row[f"{axis}_px"] * row["he_mpp"] + row["size_px"] * row["mpp"] / 2 for axis in "xy"]
        for row in rows
    ]
    for name, values in local.at(centres).items():
        for row, value in zip(rows, values.tolist(), strict=True):
            row[f"registration_{name}"] = None if math.isnan(value) else value


@dataclasses.dataclass
class _PairState:
    """A row of PAIRS while it is being found out."""

    pair: str
    registration: str
    state: str = "tiled"
    reason: str | None = None
    tiles_grid: int = 0
    tiles_tissue: int = 0
    tiles_unreadable: int = 0
    tiles_written: int = 0

    def end(self, state: str, reason: str) -> list[dict[str, Any]]:
        self.state, self.reason = state, reason
        return []


@dataclasses.dataclass(frozen=True)
class _Plan:
    """All that the tiles of one pair have in common."""

    pair: Pair
    he: Slide
    her2: Slide
    mpp: float
    displacement: Displacement | None
    saturation_min: float
    density_min: float
    options: TileOptions

    @property
    def side_px(self) -> float:
        """Side of a tile on level 0 of H&E."""
        return self.options.size_px * self.mpp / self.he.mpp


@dataclasses.dataclass(frozen=True)
class _Tile:
    """One tile, measured and encoded."""

    row: dict[str, Any]
    he: bytes
    her2: bytes


def _tile_pair(
    pair: Pair,
    described: dict[str, dict[str, Any]],
    displacement: Path | None,
    refusal: str | None,
    state: _PairState,
    writer: ShardWriter,
    workers: int,
    options: TileOptions,
) -> list[dict[str, Any]]:
    """Tile one pair into the shard; return its rows of TILE, and the outcome in `state`."""
    if set(described) != set(tables.STAINS):
        return state.end("refused", "describe has no rows for the pair; run describe again")
    for row in described.values():
        if row["verdict"] == "refuse":
            outcome = (
                "unreadable" if row["tissue"] is None
                else "refused" if row["tissue_fraction"] else "no_tissue"
            )  # fmt: skip
            return state.end(outcome, row["reason"])
    if refusal is not None:
        return state.end("refused", refusal)
    field: Displacement | None = None
    if not pair.registered:
        if displacement is None:
            return state.end("refused", "no displacement for the pair; run register")
        try:
            field = read_displacement(displacement)
        except RegistrationError as error:
            return state.end("refused", str(error))
        if field.empty:
            return state.end("refused", "registration gave no map; give displacement in pairs.tsv")
    with contextlib.ExitStack() as stack:
        try:
            he, her2 = (
                stack.enter_context(
                    open_slide(
                        path,
                        mpp=described[stain]["mpp"],
                        reader=described[stain]["reader"],
                        mpp_min=0,
                        mpp_max=math.inf,
                        mpp_column=f"{stain}_mpp",
                        background=_colour(described[stain]["background"]),
                    )
                )
                for stain, path in (("he", pair.he), ("her2", pair.her2))
            )
        except SlideError as error:
            return state.end("unreadable", str(error))
        mpp, fault = tile_mpp(he, her2, options)
        if fault:
            return state.end("refused", fault)
        plan = _Plan(
            pair,
            he,
            her2,
            mpp,
            field,
            max(described["he"]["tissue_threshold"], options.saturation_min),
            max(described["her2"]["tissue_threshold"], options.density_min),
            options,
        )
        return _tile_plan(plan, described["he"]["tissue"], state, writer, workers)


def tile_mpp(he: Slide, her2: Slide, options: TileOptions) -> tuple[float, str | None]:
    """Return the resolution of a pair's tiles, and what stands against it, or None.

    A resolution that a level of the H&E image has, but for rounding, is taken as that level's.
    """
    mpp = he.mpp if options.mpp is None else options.mpp
    for level_mpp in he.level_mpps:
        if same_mpp(mpp, level_mpp):
            mpp = level_mpp
    if not options.upsample:
        for slide, limit in ((he, UPSAMPLING_MAX), (her2, HER2_UPSAMPLING_MAX)):
            if slide.mpp > mpp * (1 + limit):
                return mpp, (
                    f"{slide.path.name}: {slide.mpp:.4g} um/px is coarser than the tiles' "
                    f"{mpp:.4g}; set tile.mpp to {max(he.mpp, her2.mpp):.4g} or more, or "
                    "tile.upsample: true"
                )
    return mpp, None


def _tile_plan(
    plan: _Plan, tissue_png: bytes, state: _PairState, writer: ShardWriter, workers: int
) -> list[dict[str, Any]]:
    options, he = plan.options, plan.he
    width, height = he.size_px
    if min(width, height) + 1e-6 < plan.side_px:
        return state.end(
            "refused",
            f"{he.path.name}: {width} x {height} px at {he.mpp:.4g} um/px is smaller than a tile "
            f"of {plan.side_px:.0f} px; lower tile.size_px",
        )
    stride = (options.stride_px or options.size_px) * plan.mpp / he.mpp
    corners = grid_positions(width, height, plan.side_px, stride)
    state.tiles_grid = len(corners)
    outline = _outline(tissue_png)
    corners = corners[tissue_share(outline, he.size_px, corners, plan.side_px) >= max(
        options.tissue_floor, 1e-9
    )]  # fmt: skip
    state.tiles_tissue = len(corners)
    if not len(corners):
        return state.end(
            "no_tissue",
            f"{he.path.name}: none of {state.tiles_grid} positions holds "
            f"{options.tissue_floor:.0%} tissue; lower tile.tissue_floor",
        )
    if plan.pair.roi is not None:
        try:
            polygons = read_polygons(plan.pair.roi)
        except SheetError as error:
            return state.end("refused", str(error))
        corners = corners[polygon_share(polygons, corners, plan.side_px) >= ROI_SHARE_MIN]
        if not len(corners):
            return state.end(
                "no_tissue",
                f"{plan.pair.roi.name}: none of {state.tiles_tissue} positions with tissue lies "
                "inside; draw it on level-0 pixels of the H&E slide",
            )
    start = writer.position()
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    allowed = options.bad_tiles_max * len(corners)
    suffix = SUFFIXES[options.codec]
    with contextlib.closing(in_order(functools.partial(_cut, plan), corners, workers)) as results:
        for result in tqdm(
            results, total=len(corners), desc=plan.pair.pair, unit="tile", disable=None, leave=False
        ):
            if isinstance(result, SlideError):
                faults.append(str(result))
                log.warning("pair %s: a tile is left out: %s", plan.pair.pair, result)
                if len(faults) > allowed:
                    break
                continue
            row = result.row
            for stain, data in (("he", result.he), ("her2", result.her2)):
                offset, length = writer.add(f"{row['tile']}.{stain}.{suffix}", data)
                row |= {
                    f"{stain}_offset": offset,
                    f"{stain}_length": length,
                    f"{stain}_sha256": hashlib.sha256(data).hexdigest(),
                }
            rows.append(row)
    state.tiles_unreadable = len(faults)
    if len(faults) > allowed:
        writer.rewind(start)
        return state.end(
            "unreadable",
            f"{len(faults)} of {len(corners)} tiles cannot be read, over "
            f"{options.bad_tiles_max:.0%} (tile.bad_tiles_max); the first: {faults[0]}",
        )
    state.tiles_written = len(rows)
    return rows


def _cut(plan: _Plan, corner: npt.NDArray[np.int64]) -> _Tile | SlideError:
    """Read, measure and encode one tile; return the error where it cannot be decoded."""
    x, y = int(corner[0]), int(corner[1])
    size, options = plan.options.size_px, plan.options
    try:
        he = plan.he.read(x, y, size, size, plan.mpp)
        her2, coverage, (her2_x, her2_y) = _read_her2(plan, x, y)
    except SlideError as error:
        return error
    folding = 0.0
    if plan.displacement is not None:
        left, top = x * plan.he.mpp, y * plan.he.mpp
        side_um = size * plan.mpp
        folding = fields.folding_fraction(
            plan.displacement,
            box_um=(left, top, left + side_um, top + side_um),
            mirrored=plan.displacement.affine.determinant < 0,
        )
    # Colour from half the resolution: a quarter of the cost. Sharpness is all of the pixels'.
    small_he, small_her2 = halved(he), halved(her2)
    tissue = saturation(small_he) > plan.saturation_min * 255
    her2_tissue = density(small_her2, plan.her2.background) > plan.density_min / DENSITY_STEP
    row = {
        "tile": f"{plan.pair.pair}_{x:06d}_{y:06d}",
        "pair": plan.pair.pair,
        "x_px": x,
        "y_px": y,
        "her2_x_px": her2_x,
        "her2_y_px": her2_y,
        "size_px": size,
        "mpp": plan.mpp,
        "he_mpp": plan.he.mpp,
        "her2_mpp": plan.her2.mpp,
        "registration_error_um": None,
        "registration_ncc": None,
        "registration_margin": None,
        "tissue_fraction": cv2.countNonZero(tissue.view(np.uint8)) / tissue.size,
        "her2_tissue_fraction": cv2.countNonZero(her2_tissue.view(np.uint8)) / tissue.size,
        "he_sharpness": sharpness(he, plan.mpp),
        "her2_sharpness": sharpness(her2, plan.mpp),
        "histogram_similarity": histogram_similarity(small_he, small_her2, options.histogram_bins),
        "her2_coverage_fraction": coverage,
        "folding_fraction": folding,
    }
    stored_he = stored_her2 = None
    if options.codec == "jpeg" and options.copy_stored:
        stored_he = plan.he.stored_jpeg(x, y, size, size, plan.mpp)
        # HER2 lies on H&E's grid where both come registered at one resolution.
        if plan.displacement is None and not plan.pair.mirrored and _alike(plan):
            stored_her2 = plan.her2.stored_jpeg(x, y, size, size, _registered_mpp(plan))
    return _Tile(
        row,
        stored_he or encode(he, options.codec, options.quality),
        stored_her2 or encode(her2, options.codec, options.quality),
    )


def _alike(plan: _Plan) -> bool:
    """Tell whether both images have one resolution: then pixel lies on pixel."""
    return same_mpp(plan.he.mpp, plan.her2.mpp)


def _registered_mpp(plan: _Plan) -> float:
    """Return the resolution to ask HER2 for where it comes registered."""
    return plan.mpp * plan.her2.mpp / plan.he.mpp if _alike(plan) else plan.mpp


def _read_her2(plan: _Plan, x: int, y: int) -> tuple[RGB, float, tuple[float, float]]:
    """Read HER2 for the tile at (x, y): pixels, share covered, where its top-left corner lies."""
    if plan.displacement is None:
        return _read_registered(plan, x, y)
    return read_displaced(
        plan.her2,
        plan.displacement,
        x,
        y,
        grid_mpp=plan.he.mpp,
        size_px=plan.options.size_px,
        mpp=plan.mpp,
        pair=plan.pair.pair,
    )


def _read_registered(plan: _Plan, x: int, y: int) -> tuple[RGB, float, tuple[float, float]]:
    """Read the same place of an image that comes registered: no resampling where mpp agree."""
    he, her2, size = plan.he, plan.her2, plan.options.size_px
    ratio = 1.0 if _alike(plan) else he.mpp / her2.mpp
    mpp = _registered_mpp(plan)
    side = plan.side_px * ratio
    left, top = x * ratio, y * ratio
    corner = left, top
    if plan.pair.mirrored:
        left = her2.size_px[0] - left - side
        corner = left + side, top
    pixels = her2.read(left, top, size, size, mpp)
    if plan.pair.mirrored:
        pixels = np.ascontiguousarray(pixels[:, ::-1])
    inside = [
        max(0.0, min(low + side, length) - max(low, 0.0)) / side
        for low, length in ((left, her2.size_px[0]), (top, her2.size_px[1]))
    ]
    return pixels, min(1.0, inside[0] * inside[1]), corner


def _colour(values: list[int]) -> tuple[int, int, int]:
    red, green, blue = values
    return red, green, blue


def _outline(png: bytes) -> npt.NDArray[np.bool_]:
    image = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_GRAYSCALE)
    return np.asarray(image) > 0
