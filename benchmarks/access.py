"""What a shuffled training triplet costs beside its decoding, and loading against a PNG folder.

H&E and HER2 of 512 x 512 px as the tile stage stores them, JPEG of quality 95, and their mask.
Goal: at most 5 % of the decode time is spent on anything else (stretch 2 %). The SHA-256 of the
three members (goal 3 %) is compared when a process reads them first, so not in these figures.
"""

from __future__ import annotations

import hashlib
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from _synthetic import ratio, texture
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor

from hemera.__main__ import keep_freed_memory
from hemera.config import TrainSegmentationOptions
from hemera.dataset.shards import ShardReader, ShardWriter
from hemera.dataset.torch_dataset import TileDataset
from hemera.imaging.codecs import decode, decode_mask, encode, encode_mask
from hemera.masks import label_format
from hemera.training.batches import TrainingSampler

TILE_PX = 512
TILES = 128
BATCH = 8
ROUNDS = 5


def draw_mask(seed: int) -> np.ndarray:
    """Draw a label image of some 300 cells."""
    rng = np.random.default_rng(seed)
    classes = np.zeros((TILE_PX, TILE_PX), np.uint8)
    nucleus = np.zeros_like(classes)
    for x, y in rng.integers(0, TILE_PX, (300, 2)).tolist():
        axes = rng.integers(8, 16, 2).tolist()
        angle = int(rng.integers(180))
        cv2.ellipse(classes, (x, y), axes, angle, 0, 360, int(rng.integers(1, 3)), -1)
        cv2.ellipse(classes, (x, y), axes, angle, 0, 360, 3, 1)
        cv2.ellipse(nucleus, (x, y), [axis - 4 for axis in axes], angle, 0, 360, 1, -1)
    return label_format.pack(classes, nucleus > 0, np.where(classes == 2, 2, 0))


def write_tiles(folder: Path) -> Path:
    """Write index, shards of eight units, and the same tiles as a folder of PNG."""
    for name in ("tile", "mask", "index", "png"):
        (folder / name).mkdir()
    sheets = {"he": texture(1024, 1), "her2": texture(1024, 2)}
    rows = []
    for unit in range(8):
        with (
            ShardWriter(folder / "tile" / f"{unit}.tar") as tiles,
            ShardWriter(folder / "mask" / f"{unit}.tar") as labels,
        ):
            for number in range(TILES // 8):
                tile = f"unit{unit}_{number:06d}"
                row: dict[str, Any] = {"tile": tile, "accepted": True, "split": "train"}
                row |= {"shard": f"tile/{unit}.tar", "stain_shard": f"mask/{unit}.tar"}
                row |= {"he_background": [255, 255, 255], "her2_background": [255, 255, 255]}
                y, x = 17 * number % TILE_PX, (61 * unit + 29 * number) % TILE_PX
                for name, sheet in sheets.items():
                    pixels = np.ascontiguousarray(sheet[y : y + TILE_PX, x : x + TILE_PX])
                    PIL.Image.fromarray(pixels).save(folder / "png" / f"{tile}.{name}.png")
                    row |= added(tiles, f"{tile}.{name}.jpg", encode(pixels), name)
                mask = draw_mask(unit * TILES + number)
                PIL.Image.fromarray(mask).save(folder / "png" / f"{tile}.mask.png")
                row |= added(labels, f"{tile}.stain.png", encode_mask(mask), "stain")
                rows.append(row)
    index = folder / "index" / "index.parquet"
    pq.write_table(
        pa.Table.from_pylist(rows).replace_schema_metadata({"mask_target": "stain"}), index
    )
    return index


def added(shard: ShardWriter, member: str, data: bytes, name: str) -> dict[str, Any]:
    """Add a member to a shard; return its columns of the index."""
    place = dict(zip((f"{name}_offset", f"{name}_length"), shard.add(member, data), strict=True))
    return {**place, f"{name}_sha256": hashlib.sha256(data).hexdigest()}


DIGESTS = "SHA-256, first time"


class Folder(Dataset[dict[str, Any]]):
    """Three PNG per tile, read by Pillow: what a training script does."""

    def __init__(self, folder: Path) -> None:
        """List the tiles."""
        self.folder = folder
        self.tiles = sorted(path.name.split(".")[0] for path in folder.glob("*.he.png"))

    def __len__(self) -> int:
        """Return the number of tiles."""
        return len(self.tiles)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Return the three images of a tile."""
        item: dict[str, Any] = {"tile": self.tiles[i]}
        for name in ("he", "her2", "mask"):
            with PIL.Image.open(self.folder / f"{self.tiles[i]}.{name}.png") as image:
                item[name] = pil_to_tensor(image)
        return item


def access(index: Path) -> None:
    """Print which fraction of a triplet's decode time is spent on anything else."""
    rows = pq.read_table(index).to_pylist()
    reader = ShardReader(index.parent.parent)
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    stored = []
    for row in rows:
        members = [
            reader.read(row[shard], row[f"{name}_offset"], row[f"{name}_length"])
            for shard, name in (("shard", "he"), ("shard", "her2"), ("stain_shard", "stain"))
        ]
        stored.append(members)
    seen = {
        "whole tiles": TileDataset(index),
        "flipped and turned": TileDataset(index, flips=(0, 1), turns=True),
        "the same, cut to 256": TileDataset(index, flips=(0, 1), turns=True, crop_px=256),
    }

    def triplet(i: int) -> None:
        he, her2, mask = stored[i]
        decode(he)
        decode(her2)
        decode_mask(mask)

    def digests(i: int) -> None:
        for member in stored[i]:
            hashlib.sha256(member).digest()

    of_stored = {"decode": triplet, DIGESTS: digests}
    times: dict[str, list[float]] = {name: [] for name in (*of_stored, *seen)}
    for number in range(ROUNDS + 1):
        sums = dict.fromkeys(times, 0.0)
        for i in order:
            # In turn for every tile: a busy machine disturbs all alike.
            for name in times:
                started = time.process_time()
                if name in of_stored:
                    of_stored[name](i)
                else:
                    seen[name][number + 1, i]
                sums[name] += time.process_time() - started
        # The first round fills caches.
        if number:
            for name, total in sums.items():
                times[name].append(total)
    each = statistics.median(times["decode"]) / len(order) * 1e3
    kilobytes = sum(len(member) for members in stored for member in members) / len(stored) / 1e3
    sys.stdout.write(
        f"a shuffled triplet of {TILE_PX} px, {kilobytes:.0f} KB, {each:.2f} ms to decode; "
        "anything else, fraction of that (goal 5 %, stretch 2 %)\n"
    )
    middle, least, most = (100 * value for value in ratio(times, DIGESTS, "decode"))
    sys.stdout.write(f"  {DIGESTS:<22} {middle:5.1f} % ({least:.1f} to {most:.1f})\n")
    for name in seen:
        middle, least, most = (100 * (value - 1) for value in ratio(times, name, "decode"))
        sys.stdout.write(f"  {name:<22} {middle:5.1f} % ({least:.1f} to {most:.1f})\n")


def loading(index: Path) -> None:
    """Print samples per second of the loader and of one over a folder of PNG."""
    tiles = TileDataset(index)
    folder = Folder(index.parent.parent / "png")

    def ours(workers: int) -> DataLoader[dict[str, Any]]:
        options = TrainSegmentationOptions(batch_size=BATCH, epochs=1)
        sampler = TrainingSampler(len(tiles), options)
        return DataLoader(tiles, batch_sampler=sampler, num_workers=workers)

    def theirs(workers: int) -> DataLoader[dict[str, Any]]:
        return DataLoader(folder, batch_size=BATCH, shuffle=True, num_workers=workers)

    sys.stdout.write(f"loading batches of {BATCH}, samples per second of wall time\n")
    for workers in (0, 2):
        speeds: dict[str, list[float]] = {"HEMERA": [], "PNG folder": []}
        for number in range(ROUNDS + 1):
            for name, loader in (("HEMERA", ours(workers)), ("PNG folder", theirs(workers))):
                started = time.perf_counter()
                count = sum(len(batch["tile"]) for batch in loader)
                if number:
                    speeds[name].append(count / (time.perf_counter() - started))
        middle, least, most = ratio(speeds, "HEMERA", "PNG folder")
        medians = {name: statistics.median(each) for name, each in speeds.items()}
        sys.stdout.write(
            f"  {workers} workers: HEMERA {medians['HEMERA']:.0f}, PNG folder "
            f"{medians['PNG folder']:.0f}: {middle:.1f} x ({least:.1f} to {most:.1f})\n"
        )


def main() -> None:
    """Measure both on one set of tiles."""
    torch.set_num_threads(1)
    # As the command line does.
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as name:
        index = write_tiles(Path(name))
        access(index)
        loading(index)


if __name__ == "__main__":
    main()
