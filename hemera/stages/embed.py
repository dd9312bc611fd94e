"""Compute the features of the tiles of a unit by one encoder."""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from hemera import tables
from hemera.config import OF_HER2, STATISTICS, EmbedOptions
from hemera.dataset.features import ViewList, write_features
from hemera.dataset.shards import read_member
from hemera.dataset.views import cut_views
from hemera.files.threads import in_order
from hemera.imaging import texture
from hemera.imaging.codecs import decode
from hemera.imaging.color import saturation

log = logging.getLogger(__name__)

RGB = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.float32]


def run(
    *,
    tiles: Path,
    tile_shard: Path,
    images_table: Path,
    encoder: str,
    encoder_weights: Path | None = None,
    encoder_metadata: Path | None = None,
    index: Path | None = None,
    features: Path,
    options: EmbedOptions,
) -> None:
    """Write the features of the tiles of a unit; a unit without tiles has zero rows.

    Views are cut where H&E is tissue, so that the rows of all encoders are of the same views; the
    encoders of HER2 have those of tiles with HER2.

    Args:
        images_table: table of stage describe, for the sizes of the slides.
        encoder: its name; `statistics` needs no weights.
        encoder_weights: of an encoder of stage train_encoder, or SegmentationNet's of segmenter,
            with its `encoder_metadata`.
        encoder_metadata: the JSON beside them.
        index: that segmenter was trained on, for the cases that it has seen.
        features: written: HDF5 in TRIDENT's layout.
    """
    rows = tables.read(tiles, tables.TILE).to_pylist()
    if encoder in OF_HER2:
        rows = [row for row in rows if row["her2_offset"] is not None]
    inherited = tables.inherited("tile", tiles)
    made_with = json.loads(inherited.get("options_tile", "{}"))
    saturation_min = 255 * float(made_with.get("saturation_min", 0.0))
    views = ViewList()
    trained_here = (encoder_weights, encoder_metadata, index)
    with _opened(encoder, trained_here, rows, options) as (compute, width, described):
        stain = "her2" if encoder in OF_HER2 else "he"
        cut = _views(tile_shard, rows, stain, saturation_min, views, options)
        count = write_features(
            features,
            _batches(cut, compute, options.batch_size),
            width,
            views,
            {
                "encoder": encoder,
                "options": tables.provenance(options)["options"],
                **inherited,
                "trained_on": [],
                **({"stain": stain} if stain == "her2" else {}),
                **described,
                **_mpp(rows),
                **({} if rows else {"reason": "the unit has no tiles"}),
            },
            _trident(tables.described(images_table), rows, options),
        )
    log.info("%s: %d views of %d tiles, %d features", features.name, count, len(rows), width)


Compute = Callable[[list[RGB], list[dict[str, Any]]], Rows]
Opened = contextlib.AbstractContextManager[tuple[Compute, int, dict[str, Any]]]


def _opened(
    name: str,
    trained_here: tuple[Path | None, Path | None, Path | None],
    rows: Sequence[dict[str, Any]],
    options: EmbedOptions,
) -> Opened:
    """Open what computes the features of views, their number, and what the file records."""
    if name == STATISTICS:
        facts = {"encoder_sha256": STATISTICS, "pretraining": "none"}
        return contextlib.nullcontext((_statistics, len(texture.NAMES), facts))
    # PyTorch takes seconds to import, which the job of each unit would wait for.
    from hemera.inference.view_encoders import open_encoder

    return open_encoder(name, trained_here, rows, options)


def _statistics(views: list[RGB], rows: list[dict[str, Any]]) -> Rows:
    cv2.setNumThreads(1)
    return np.stack(
        [
            texture.statistics(view, tuple(row["he_background"]), row["mpp"])
            for view, row in zip(views, rows, strict=True)
        ]
    )


def _views(
    shard: Path,
    rows: Sequence[dict[str, Any]],
    stain: str,
    saturation_min: float,
    views: ViewList,
    options: EmbedOptions,
) -> Iterator[tuple[RGB, dict[str, Any]]]:
    """Yield the views with tissue on H&E of all tiles in order, each with the row of its tile."""

    def member(row: dict[str, Any], stain: str) -> RGB:
        place = (row[f"{stain}_{name}"] for name in ("offset", "length", "sha256"))
        return decode(read_member(shard, *place))

    def read(row: dict[str, Any]) -> tuple[RGB, RGB]:
        he = member(row, "he")
        return he, he if stain == "he" else member(row, stain)

    images = in_order(read, rows, options.readers)
    shown = tqdm(images, "embed", len(rows), unit="tile", disable=None, leave=False)
    for row, (he, rgb) in zip(rows, shown, strict=True):
        side = row["size_px"] // options.split
        level0 = side * row["mpp"] / row["he_mpp"]
        tissue = saturation(he) > saturation_min
        for i, j, view in cut_views(rgb, tissue, options.split, options.min_view_tissue):
            x, y = round(row["x_px"] + j * level0), round(row["y_px"] + i * level0)
            views.add(x, y, level0, row["tile"], row["pair"])
            yield view, row


def _batches(
    views: Iterator[tuple[RGB, dict[str, Any]]], compute: Compute, size: int
) -> Iterator[Rows]:
    """Yield the features of views, `size` of them at once and of one shape."""
    images: list[RGB] = []
    rows: list[dict[str, Any]] = []
    for view, row in views:
        if images and (len(images) == size or images[0].shape != view.shape):
            yield compute(images, rows)
            images, rows = [], []
        images.append(view)
        rows.append(row)
    if images:
        yield compute(images, rows)


def _mpp(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"mpp": float(rows[0]["mpp"])} if rows else {}


def _trident(
    described: dict[str, dict[str, dict[str, Any]]],
    rows: Sequence[dict[str, Any]],
    options: EmbedOptions,
) -> dict[str, Any]:
    """Return the attributes of `coords` as TRIDENT has them; a block those of its first tile.

    Magnifications are 10 / mpp.
    """
    if not rows:
        return {"overlap": 0}
    first = rows[0]
    image = described[first["pair"]]["he"]
    side = first["size_px"] // options.split
    return {
        "patch_size": side,
        "patch_size_level0": round(side * first["mpp"] / first["he_mpp"]),
        "level0_magnification": round(10 / first["he_mpp"]),
        "target_magnification": round(10 / first["mpp"]),
        "overlap": 0,
        "name": first["pair"],
        "level0_width": image["width_px"],
        "level0_height": image["height_px"],
    }
