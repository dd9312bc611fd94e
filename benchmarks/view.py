"""What `hemera view` needs for a pair of 100,000 x 80,000 px.

Two pyramids of JPEG tiles, each stored separately, are written from crops of synthetic tissue
(5 GB), with a map that turns and bends. A server is started as a user starts it, and asked as a
browser asks: for the pair, the whole of both stains, and rows of three tiles at random places and
levels, by one and by two at a time. Goals, on two idle processors: first picture below 1 s, 95th
percentile of a tile below 150 ms, memory below 1 GiB. The files were written just before, so
that they are read from memory.
"""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import tifffile

from hemera import tables
from hemera.config import RegisterOptions
from hemera.demo import write_cohort
from hemera.registration.displacement import Displacement
from hemera.registration.displacement_files import write_displacement

SIZE_PX, TILE_PX, MPP = (100_000, 80_000), 512, 0.25
LEVELS, CROPS, NODE_UM = 8, 8, 32.0
ROWS = 100
"""Of three tiles."""


def write_slide(path: Path, source: Path) -> None:
    """Write a pyramid whose tiles are crops of the middle of another slide."""
    image = tifffile.imread(source, level=0)
    tops, lefts = (
        np.linspace(side * 0.2, side * 0.8 - TILE_PX, CROPS).astype(int) for side in image.shape[:2]
    )
    crops = [
        bytes(
            simplejpeg.encode_jpeg(
                np.ascontiguousarray(image[top : top + TILE_PX, left : left + TILE_PX]),
                80, colorspace="RGB", colorsubsampling="420",
            )
        )
        for top in tops
        for left in lefts
    ]  # fmt: skip
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for level in range(LEVELS):
            width, height = (math.ceil(side / 2**level) for side in SIZE_PX)
            count = math.ceil(width / TILE_PX) * math.ceil(height / TILE_PX)
            per_cm = 1e4 / (MPP * 2**level)
            first = {"subifds": LEVELS - 1} if level == 0 else {"subfiletype": 1}
            file.write(
                (crops[number * 29 % len(crops)] for number in range(count)),
                shape=(height, width, 3), dtype="uint8", tile=(TILE_PX, TILE_PX),
                compression="jpeg", photometric="ycbcr", subsampling=(2, 2), metadata=None,
                resolution=(per_cm, per_cm), resolutionunit="CENTIMETER", **first,
            )  # fmt: skip


def write_study(folder: Path) -> None:
    """Write the slides, their registration, the sheet and the configuration."""
    write_cohort(folder / "demo", "small", workers=2)
    for stain in ("he", "her2"):
        source = folder / "demo" / "acrobat" / f"0_{stain.upper()}_train.tif"
        write_slide(folder / f"{stain}.tif", source)
    x, y = np.meshgrid(
        *((np.arange(int(side * MPP / NODE_UM)) + 0.5) * NODE_UM for side in SIZE_PX)
    )
    angle = np.radians(4)
    to_x = np.cos(angle) * x - np.sin(angle) * y + 600 + 20 * np.sin(y / 900)
    to_y = np.sin(angle) * x + np.cos(angle) * y - 300 + 20 * np.cos(x / 700)
    vectors = np.stack([to_x - x, to_y - y], axis=-1).astype(np.float32)
    register = folder / "results" / "register"
    write_displacement(register / "big.displacement.npz", Displacement(vectors, NODE_UM))
    row = {"pair": "big", "verdict": "pass", "engine": "own"}
    metadata = tables.provenance(RegisterOptions())
    tables.write(register / "big.parquet", [row], tables.CERTIFICATE, metadata)
    (folder / "pairs.tsv").write_text(
        "pair\tcase\tdataset\the\ther2\nbig\tc\tx\the.tif\ther2.tif\n"
    )
    engines = "mask:\n  engines:\n    stain: {}\n"
    (folder / "config.yaml").write_text(f"preset: no_weights\nsheet: pairs.tsv\n{engines}")


class Visitor:
    """Asks a server for tiles, and keeps the times in ms."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.times: dict[str, list[float]] = {"he": [], "her2": []}

    def get(self, path: str) -> bytes:
        """Return what the server answers."""
        with urllib.request.urlopen(self.address + path, timeout=300) as answer:
            return bytes(answer.read())

    def visit(self, facts: dict[str, Any], rows: int, seed: int) -> None:
        """Ask for rows of three neighbouring tiles, half of them at the full resolution."""
        drawn, top = random.Random(seed), facts["level_max"]
        for _ in range(rows):
            level = drawn.choice([*range(2, top), *[top] * (top - 2)])
            across, down = (
                max(1, int(facts[side] / 2 ** (top - level)) // TILE_PX)
                for side in ("width", "height")
            )
            stain = drawn.choice(["he", "her2"])
            column, row = drawn.randrange(across), drawn.randrange(down)
            for place in range(column, min(column + 3, across)):
                began = time.perf_counter()
                self.get(f"tile/big/{stain}/{level}/{place}/{row}")
                self.times[stain].append(1e3 * (time.perf_counter() - began))

    def report(self, words: str) -> None:
        """Print the times, and forget them."""
        for stain, times in self.times.items():
            middle, high = np.percentile(times, (50, 95))
            print(
                f"| {words} | {stain} | {len(times)} | {middle:.0f} | {high:.0f} |"
                f" {max(times):.0f} |"
            )
            times.clear()


def memory_mib(process: int) -> int:
    """Return the largest memory of a process so far."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) // 1024


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_study(folder)
        command = [sys.executable, "-m", "hemera", "view", str(folder), "--no-browser"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            visitor = Visitor(process.stderr.readline().split()[-1])
            visitor.get("")
            began = time.perf_counter()
            facts = json.loads(visitor.get("api/pair/big"))
            for stain in ("he", "her2"):
                visitor.get(f"tile/big/{stain}/0/0/0")
            first = time.perf_counter() - began
            print(f"Load of the machine: {os.getloadavg()[0]:.1f}.\n")
            print("| requests | stain | tiles | median, ms | 95th percentile, ms | largest, ms |")
            print("|---|---|---|---|---|---|")
            visitor.visit(facts, ROWS, seed=1)
            visitor.report("one at a time")
            pair = [
                threading.Thread(target=visitor.visit, args=(facts, ROWS // 2, seed))
                for seed in (2, 3)
            ]
            for thread in pair:
                thread.start()
            for thread in pair:
                thread.join()
            visitor.report("two at a time")
            print(f"\nBoth stains as a whole after {first:.2f} s (goal 1).")
            print(f"Memory: {memory_mib(process.pid)} MiB (goal 1,024).")
            process.send_signal(signal.SIGINT)


if __name__ == "__main__":
    main()
