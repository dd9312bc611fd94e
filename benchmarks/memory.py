"""How much memory the tile stage takes on a slide of 100,000 x 80,000 px, all of it tissue.

The slide costs next to nothing: its tile tables name the same few hundred stored tiles over and
over. The stage runs in a process of its own; printed is its peak resident memory. Goal: at most
1 GiB whatever the slide (stretch 0.5). The shard that it writes takes some gigabytes for a moment.
"""

from __future__ import annotations

import resource
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import simplejpeg
from _synthetic import MPP, texture

from hemera.config import DescribeOptions, TileOptions
from hemera.stages import describe, tile

WIDTH_PX, HEIGHT_PX = 100_000, 80_000
TILE_PX = 512


def write_shared(path: Path, width: int, height: int, seed: int) -> None:
    """Write a BigTIFF pyramid whose levels share 16 stored tiles."""
    patch = texture(2048, seed)
    tiles = [
        simplejpeg.encode_jpeg(
            np.ascontiguousarray(patch[y : y + TILE_PX, x : x + TILE_PX]), 85, "RGB", "420"
        )
        for y in range(0, 2048, TILE_PX)
        for x in range(0, 2048, TILE_PX)
    ]
    with path.open("wb") as file:
        file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))
        places = []
        for data in tiles:
            places.append((file.tell(), len(data)))
            file.write(data)
        link = 8
        for level, factor in enumerate((1, 4, 16, 64)):
            size = -(-width // factor), -(-height // factor)
            count = -(-size[0] // TILE_PX) * -(-size[1] // TILE_PX)
            chosen = [places[(n * 7 + n // 50) % len(places)] for n in range(count)]
            offsets = file.tell()
            file.write(np.array([place[0] for place in chosen], "<u8").tobytes())
            counts = file.tell()
            file.write(np.array([place[1] for place in chosen], "<u4").tobytes())
            per_cm = struct.pack("<2I", round(1e4 / MPP / factor * 100), 100)
            start = file.tell()
            tags = [
                (254, 4, 1, struct.pack("<I", 1 if level else 0)),
                (256, 4, 1, struct.pack("<I", size[0])),
                (257, 4, 1, struct.pack("<I", size[1])),
                (258, 3, 3, struct.pack("<3H", 8, 8, 8)),
                (259, 3, 1, struct.pack("<H", 7)),
                (262, 3, 1, struct.pack("<H", 6)),
                (277, 3, 1, struct.pack("<H", 3)),
                (282, 5, 1, per_cm),
                (283, 5, 1, per_cm),
                (284, 3, 1, struct.pack("<H", 1)),
                (296, 3, 1, struct.pack("<H", 3)),
                (322, 4, 1, struct.pack("<I", TILE_PX)),
                (323, 4, 1, struct.pack("<I", TILE_PX)),
                (324, 16, count, struct.pack("<Q", offsets)),
                (325, 4, count, struct.pack("<Q", counts)),
                (530, 3, 2, struct.pack("<2H", 2, 2)),
            ]
            file.write(struct.pack("<Q", len(tags)))
            for code, kind, number, value in tags:
                file.write(struct.pack("<HHQ", code, kind, number) + value.ljust(8, b"\0"))
            next_link = file.tell()
            file.write(struct.pack("<Q", 0))
            file.seek(link)
            file.write(struct.pack("<Q", start))
            file.seek(0, 2)
            link = next_link


def work(folder: Path, workers: int) -> None:
    """Run the stage, and print what it took."""
    started, before = time.monotonic(), time.process_time()
    tile.run(
        sheet=folder / "pairs.tsv",
        unit="p",
        block_count=1,
        images_table=folder / "describe.parquet",
        shard=folder / "tiles" / "p.tar",
        tiles=folder / "tiles" / "p.parquet",
        pairs=folder / "tiles" / "p.pairs.parquet",
        workers=workers,
        options=TileOptions(size_px=TILE_PX),
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    count = (WIDTH_PX // TILE_PX) * (HEIGHT_PX // TILE_PX)
    sys.stdout.write(
        f"tile, {WIDTH_PX} x {HEIGHT_PX} px, {count} pairs of tiles, {workers} workers: peak "
        f"{peak:.0f} MiB (goal 1024), {time.monotonic() - started:.0f} s, "
        f"{1e3 * (time.process_time() - before) / count:.1f} ms of processor time per pair\n"
    )


def main() -> None:
    """Make the pair, then run the stage with one and with two workers."""
    if len(sys.argv) == 3:
        work(Path(sys.argv[1]), int(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed, stain in enumerate(("he", "her2")):
            write_shared(folder / f"{stain}.tif", WIDTH_PX, HEIGHT_PX, seed)
        header = "pair\tcase\tdataset\the\ther2\tregistered"
        (folder / "pairs.tsv").write_text(f"{header}\np\tp\town\the.tif\ther2.tif\ttrue\n")
        describe.run(
            sheet=folder / "pairs.tsv",
            unit="p",
            block_count=1,
            images_table=folder / "describe.parquet",
            options=DescribeOptions(),
        )
        for workers in (1, 2):
            subprocess.run([sys.executable, __file__, name, str(workers)], check=True)


if __name__ == "__main__":
    main()
