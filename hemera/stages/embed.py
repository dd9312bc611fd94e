"""Compute the features of the H&E tiles of a unit by one encoder."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from hemera import tables
from hemera.config import STATISTICS, EmbedOptions
from hemera.dataset.features import ViewList, write_features
from hemera.dataset.shards import read_member
from hemera.errors import TrainingError
from hemera.files.threads import in_order
from hemera.imaging import texture
from hemera.imaging.codecs import decode
from hemera.imaging.color import saturation
from hemera.networks.tile_encoders import RECIPES, load_tile_encoder
from hemera.training.session import PRECISIONS, session, to_unit

log = logging.getLogger(__name__)

RGB = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.float32]

UPSAMPLING_MAX = 1.25
"""Magnification of a view to the input of an encoder from which a warning is logged."""


def run(
    *,
    tiles: Path,
    tile_shard: Path,
    images_table: Path,
    encoder: str,
    features: Path,
    options: EmbedOptions,
) -> None:
    """Write the features of the H&E tiles of a unit; a unit without tiles has zero rows.

    Args:
        images_table: table of stage describe, for the sizes of the slides.
        encoder: its name; `statistics` needs no weights.
        features: written: HDF5 in TRIDENT's layout.
    """
    rows = tables.read(tiles, tables.TILE).to_pylist()
    made_with = json.loads(tables.read_metadata(tiles).get("options", "{}"))
    saturation_min = 255 * float(made_with.get("saturation_min", 0.0))
    views = ViewList()
    with session(seed=0, threads=options.torch_threads, device=options.device) as device:
        compute, width, described = _encoder(encoder, device, rows, options)
        cut = _views(tile_shard, rows, saturation_min, views, options)
        count = write_features(
            features,
            _batches(cut, compute, options.batch_size),
            width,
            views,
            {
                "encoder": encoder,
                "options": tables.provenance(options)["options"],
                "trained_on": [],
                **described,
                **_mpp(rows),
                **({} if rows else {"reason": "the unit has no tiles"}),
            },
            _trident(tables.described(images_table), rows, options),
        )
    log.info("%s: %d views of %d tiles, %d features", features.name, count, len(rows), width)


Compute = Callable[[list[RGB], list[dict[str, Any]]], Rows]


def _encoder(
    name: str, device: torch.device, rows: Sequence[dict[str, Any]], options: EmbedOptions
) -> tuple[Compute, int, dict[str, Any]]:
    """Return what computes the features of views, their number, and what the file records."""
    if name == STATISTICS:
        return (
            _statistics,
            len(texture.NAMES),
            {"encoder_sha256": STATISTICS, "pretraining": "none"},
        )
    if missing := options.missing(name):
        raise TrainingError("\n".join(missing))
    path = options.path(name)
    assert path is not None
    net, sha256 = load_tile_encoder(name, path)
    net.to(device)
    precision = PRECISIONS[options.precision]

    def compute(views: list[RGB], _: list[dict[str, Any]]) -> Rows:
        batch = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)
        with (
            torch.inference_mode(),
            torch.autocast(device.type, precision, enabled=precision != torch.float32),
        ):
            found: Rows = net(to_unit(batch, device)).float().cpu().numpy()
        return found

    sides = {row["size_px"] // options.split for row in rows}
    factor = net.recipe.resize_px / max(sides) if sides else 1.0
    if factor > UPSAMPLING_MAX:
        log.warning(
            "%s: views of %d px are magnified %.2f times to %d px, which the encoder was not made "
            "for; lower embed.split", name, max(sides), factor, net.recipe.resize_px,
        )  # fmt: skip
    tcga = RECIPES[name].tcga if name in RECIPES else "unknown"
    described = {"encoder_sha256": sha256, "pretraining": f"TCGA: {tcga}", "magnified": factor}
    return compute, net.width, described


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
    saturation_min: float,
    views: ViewList,
    options: EmbedOptions,
) -> Iterator[tuple[RGB, dict[str, Any]]]:
    """Yield the views with tissue of all tiles in order, each with the row of its tile."""

    def read(row: dict[str, Any]) -> RGB:
        return decode(read_member(shard, row["he_offset"], row["he_length"], row["he_sha256"]))

    images = in_order(read, rows, options.readers)
    shown = tqdm(images, "embed", len(rows), unit="tile", disable=None, leave=False)
    for row, rgb in zip(rows, shown, strict=True):
        side = row["size_px"] // options.split
        level0 = side * row["mpp"] / row["he_mpp"]
        tissue = saturation(rgb) > saturation_min
        for i in range(options.split):
            for j in range(options.split):
                place = np.s_[i * side : (i + 1) * side, j * side : (j + 1) * side]
                if float(tissue[place].mean()) < options.min_view_tissue:
                    continue
                x, y = round(row["x_px"] + j * level0), round(row["y_px"] + i * level0)
                views.add(x, y, level0, row["tile"], row["pair"])
                yield np.ascontiguousarray(rgb[place]), row


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
