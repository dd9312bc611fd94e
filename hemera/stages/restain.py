"""Generate the HER2 of the H&E tiles of a unit, of cases that the generator has not seen."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from hemera import tables
from hemera.config import RestainOptions
from hemera.dataset.index import TileIndex
from hemera.dataset.shards import ShardWriter, read_member
from hemera.evaluation.metrics import to_uint8
from hemera.files.atomic import replacing
from hemera.imaging import codecs
from hemera.imaging.color import WHITE, normalise_background
from hemera.networks import storage
from hemera.training.session import session, to_unit

log = logging.getLogger(__name__)

RGB = npt.NDArray[np.uint8]
Rows = list[dict[str, Any]]


def run(
    *,
    tiles: Path,
    tile_shard: Path,
    case_tiles: Path,
    index: Path,
    generator: Path,
    generator_metadata: Path,
    shard: Path,
    virtual_tiles: Path,
    options: RestainOptions,
) -> None:
    """Write a shard with H&E and generated HER2 of the accepted H&E tiles of unseen cases.

    It has the format of stage tile, so that stage mask makes label images of it. HER2 is over
    white. The table is that of the tiles, without what is measured on HER2; its metadata have the
    cases that the generator has seen.

    Args:
        case_tiles: table of the tiles of stage cases.
        index: that the generator was trained on, which has the cases that it has seen.
        generator: weights of stage train_generation, with `generator_metadata`.
        shard: written: shard of tiles.
        virtual_tiles: written: table of tiles.

    Raises:
        TrainingError: when the generator was trained on another index.
    """
    opened = TileIndex(index)
    net, described = storage.load_generation(generator, generator_metadata)
    storage.check_index(generator_metadata.parent.name, described, opened.fingerprint)
    seen = opened.cases_seen("generation")
    known = tables.read(case_tiles, tables.STATUS_TILES).to_pylist()
    used = {row["tile"] for row in known if row["accepted"] and row["case"] not in seen}
    rows = [row for row in tables.read(tiles, tables.TILE).to_pylist() if row["tile"] in used]
    over_white = storage.background_is_white(described)
    background = WHITE if over_white else _background(opened)
    made: Rows = []
    with (
        session(seed=0, threads=options.torch_threads, device=options.device) as device,
        replacing(shard) as temporary,
        ShardWriter(temporary) as writer,
    ):
        net.requires_grad_(False).to(device)
        for row, he, rgb in _generated(net, tile_shard, rows, over_white, device, options):
            data = codecs.encode(
                normalise_background(rgb, background), options.codec, options.quality
            )
            place = {**row, **{name: None for name in row if name.startswith("her2_")}}
            for stain, stored in (("he", he), ("her2", data)):
                offset, length = writer.add(
                    f"{row['tile']}.{stain}.{codecs.suffix(stored)}", stored
                )
                place |= {f"{stain}_offset": offset, f"{stain}_length": length,
                          f"{stain}_sha256": hashlib.sha256(stored).hexdigest()}  # fmt: skip
            place |= {"her2_background": list(WHITE), "her2_mpp": row["mpp"],
                      "shard": f"{shard.parent.name}/{shard.name}"}  # fmt: skip
            made.append(place)
    metadata = tables.provenance(options) | {
        "generator_sha256": described["weights_sha256"],
        "trained_on": json.dumps(seen),
    }
    tables.write(virtual_tiles, made, tables.TILE, metadata)
    log.info("%s: HER2 generated for %d tiles", shard.stem, len(made))


def _background(index: TileIndex) -> tuple[int, int, int]:
    """Return the median background of the HER2 that a generator was trained on."""
    found = index.select(["her2_background"], network="generation", split="train", refused=True)
    values = np.array(found["her2_background"].to_pylist(), np.uint8)
    red, green, blue = np.rint(np.median(values, axis=0)).astype(int).tolist()
    return red, green, blue


def _generated(
    net: Callable[[torch.Tensor], torch.Tensor],
    shard: Path,
    rows: Rows,
    over_white: bool,
    device: torch.device,
    options: RestainOptions,
) -> Iterator[tuple[Mapping[str, Any], bytes, RGB]]:
    """Yield each row with the bytes of its H&E and its generated HER2."""
    starts = range(0, len(rows), options.batch_size)
    for start in tqdm(starts, "restain", unit="batch", disable=None, leave=False):
        own = rows[start : start + options.batch_size]
        stored = [
            read_member(shard, row["he_offset"], row["he_length"], row["he_sha256"]) for row in own
        ]
        images = [codecs.decode(data) for data in stored]
        if over_white:
            pairs = zip(images, own, strict=True)
            images = [normalise_background(rgb, tuple(row["he_background"])) for rgb, row in pairs]
        batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        with torch.inference_mode():
            output = net(2 * to_unit(batch, device) - 1).float().cpu().permute(0, 2, 3, 1)
        generated = to_uint8(output.numpy())
        yield from zip(own, stored, generated, strict=True)
