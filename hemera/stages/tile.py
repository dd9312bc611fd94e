"""Cut tiles of both stains and measure them: the only stage that reads full-resolution pixels."""

import contextlib
import dataclasses
import hashlib
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from hemera import tables
from hemera.config import TileOptions
from hemera.dataset.shards import ShardWriter
from hemera.dataset.tiling import NotTiled, Outcome, Tile, Tiling
from hemera.errors import RegistrationError, SheetError, SlideError
from hemera.files.atomic import replacing
from hemera.files.digests import check_content
from hemera.files.geojson import read_polygons
from hemera.files.staging import local_copies
from hemera.imaging.background import Background
from hemera.imaging.codecs import SUFFIXES
from hemera.imaging.slide import open_slide
from hemera.imaging.tolerant import Losses, read_tiles
from hemera.registration.displacement import Displacement
from hemera.registration.displacement_files import read_displacement
from hemera.registration.local_quality import LocalQuality
from hemera.registration.verdict import effective_verdict
from hemera.sheet import Pair, read_sheet, unit_pairs

log = logging.getLogger(__name__)

Rows = list[dict[str, Any]]


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
    local_folder: Path | None = None,
    options: TileOptions,
) -> None:
    """Cut and measure the tiles of every pair of a unit.

    A pair whose images cannot be tiled is a row with its state and reason, never an error.

    Args:
        displacement: not given for pairs registered on input.
        workers: threads over the tiles of a pair; any number gives the same bytes.
        local_folder: on a disk of the node; the images of a pair are copied there while it is read.
    """
    described = tables.described(images_table)
    metadata = tables.provenance(options) | tables.inherited("describe", images_table)
    certificates: dict[str, dict[str, Any]] = {}
    if certificate is not None:
        metadata |= tables.inherited("register", certificate)
        for row in tables.read(certificate, tables.CERTIFICATE).to_pylist():
            certificates[row["pair"]] = row
    local: LocalQuality | None = None
    if registration_quality is not None:
        squares = tables.read(registration_quality, tables.QUALITY)
        local = LocalQuality.from_columns(squares.to_pydict())
    tile_rows: Rows = []
    outcomes: Rows = []
    with replacing(shard) as temporary, ShardWriter(temporary) as writer:
        for pair in unit_pairs(read_sheet(sheet), unit, block_count):
            verdict, refusal = effective_verdict(pair, certificates.get(pair.pair))
            outcome = Outcome(pair.pair, verdict)
            start = writer.position()
            try:
                images = described[pair.pair]
                field = _check(pair, images, refusal, displacement)
                rows = _tile(pair, images, field, outcome, writer, workers, local_folder, options)
            except (NotTiled, SlideError, RegistrationError, SheetError) as error:
                writer.rewind(start)
                unreadable = "unreadable" if isinstance(error, SlideError) else "refused"
                outcome.state = error.state if isinstance(error, NotTiled) else unreadable
                outcome.reason = str(error)
                log.warning("pair %s: %s: %s", pair.pair, outcome.state, error)
                rows = []
            if local is not None:
                _add_quality(rows, local)
            tile_rows += [{**row, "shard": f"{shard.parent.name}/{shard.name}"} for row in rows]
            outcomes.append(dataclasses.asdict(outcome))
    tables.write(tiles, tile_rows, tables.TILE, metadata)
    tables.write(pairs, outcomes, tables.PAIRS, metadata)


def _check(
    pair: Pair, images: Mapping[str, Any], refusal: str | None, displacement: Path | None
) -> Displacement | None:
    """Return the displacement of a pair, None where it comes registered, or raise NotTiled."""
    refused, wrong = (
        [row for row in images.values() if row["verdict"] == verdict]
        for verdict in ("refuse", "wrong_stain")
    )
    # Both images have the same reason where they contradict each other.
    reason = "; ".join(dict.fromkeys(row["reason"] for row in refused or wrong))
    if any(row["tissue"] is None for row in refused):
        raise NotTiled("unreadable", reason)
    if refused:
        raise NotTiled("refused" if images["he"]["tissue_fraction"] else "no_tissue", reason)
    if wrong and pair.verdict != "accept":
        raise NotTiled("wrong_stain", reason)
    if refusal is not None:
        raise NotTiled("refused", refusal)
    if pair.registered or pair.her2 is None:
        return None
    assert displacement is not None
    field = read_displacement(displacement)
    if field.empty:
        raise NotTiled("refused", "registration gave no map; give displacement in the sheet")
    return field


def _tile(
    pair: Pair,
    images: Mapping[str, dict[str, Any]],
    field: Displacement | None,
    outcome: Outcome,
    writer: ShardWriter,
    workers: int,
    local_folder: Path | None,
    options: TileOptions,
) -> Rows:
    """Write the tiles of a pair into the shard; return their rows of TILE."""
    paths = dict(zip(tables.STAINS, pair.images, strict=False))
    for stain, path in paths.items():
        check_content(path, images[stain]["content_digest"])
    with contextlib.ExitStack() as stack:
        paths = stack.enter_context(local_copies(paths, local_folder))
        slides = [
            stack.enter_context(
                open_slide(
                    path,
                    mpp=images[stain]["mpp"],
                    reader=images[stain]["reader"],
                    mpp_column=f"{stain}_mpp",
                    background=_background(images[stain]),
                )
            )
            for stain, path in paths.items()
        ]
        he, her2 = slides if len(slides) == 2 else (slides[0], None)
        outlines = {stain: _image(row["tissue"]) for stain, row in images.items()}
        artefacts = {
            stain: np.zeros_like(outlines[stain])
            if row["artefacts"] is None
            else _image(row["artefacts"])
            for stain, row in images.items()
        }
        tiling = Tiling(
            pair,
            he,
            her2,
            field,
            max(images["he"]["tissue_threshold"], options.saturation_min),
            max(images["her2"]["tissue_threshold"] if her2 else 0.0, options.density_min),
            (
                _tissue_density(images["he"]),
                _tissue_density(images["her2"]) if her2 else math.inf,
            ),
            (
                None if pair.he_artefacts is None else artefacts["he"],
                None if pair.her2_artefacts is None else artefacts["her2"],
            ),
            options,
        )
        corners = tiling.positions(
            outlines["he"] > 0,
            (artefacts["he"], artefacts["her2"] if her2 else np.zeros((1, 1), np.uint8)),
            None if pair.roi is None else read_polygons(pair.roi),
            outcome,
        )
        losses = Losses(
            f"pair {pair.pair}", len(corners), options.bad_tiles_max, option="tile.bad_tiles_max"
        )
        cut = stack.enter_context(
            contextlib.closing(read_tiles(tiling.tile, list(corners), workers, losses))
        )
        shown = tqdm(cut, pair.pair, len(corners), unit="tile", disable=None, leave=False)
        try:
            rows = [_add(writer, tile, SUFFIXES[options.codec]) for tile in shown if tile]
        finally:
            outcome.tiles_unreadable = losses.lost
    outcome.tiles_written = len(rows)
    return rows


def _background(described: Mapping[str, Any]) -> Background:
    """Return the background and fill of a described image."""
    values = described["fill"] or []
    red, green, blue = described["background"]
    return Background(
        (red, green, blue),
        described["background_measured"],
        tuple(zip(values[::3], values[1::3], values[2::3], strict=True)),
    )


def _image(data: bytes) -> npt.NDArray[np.uint8]:
    """Return a PNG of one channel, (H, W)."""
    return np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE), np.uint8)


def _tissue_density(described: Mapping[str, Any]) -> float:
    """Return the typical density of a slide, infinite where it has no tissue."""
    found = described["tissue_density"]
    return math.inf if found is None else float(found)


def _add(writer: ShardWriter, tile: Tile, suffix: str) -> dict[str, Any]:
    """Write the images of a tile into the shard; return its row of TILE."""
    row = dict(tile.row)
    for stain, data in (("he", tile.he), ("her2", tile.her2)):
        if data is None:
            continue
        offset, length = writer.add(f"{row['tile']}.{stain}.{suffix}", data)
        row |= {
            f"{stain}_offset": offset,
            f"{stain}_length": length,
            f"{stain}_sha256": hashlib.sha256(data).hexdigest(),
        }
    return row


def _add_quality(rows: Rows, local: LocalQuality) -> None:
    """Add to each tile the quality of the registration at its centre."""
    centres = [
        [row[f"{axis}_px"] * row["he_mpp"] + row["size_px"] * row["mpp"] / 2 for axis in "xy"]
        for row in rows
    ]
    for name, values in local.at(centres).items():
        for row, value in zip(rows, values.tolist(), strict=True):
            row[f"registration_{name}"] = None if math.isnan(value) else value
