"""What the benchmarks share: slides whose texture does not compress trivially, and a stopwatch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
import tifffile

RGB = npt.NDArray[np.uint8]

MPP = 0.25


def texture(side: int, seed: int = 0) -> RGB:
    """Tissue-like pixels (side, side, 3): nuclei, fibres and the noise of a camera.

    About 75 KB as JPEG of quality 85 per 512 x 512, what a scanner's tile of dense tissue has.
    """
    rng = np.random.default_rng(seed)
    fields = [
        cv2.GaussianBlur(rng.normal(size=(side, side)).astype(np.float32), (0, 0), sigma) * sigma
        for sigma in (2.0, 7.0, 25.0)
    ]
    nuclei = 1 / (1 + np.exp(-6 * (fields[1] * 1.6 - 0.5)))
    pink = 0.25 + 0.12 * fields[0] + 0.1 * fields[2]
    density = nuclei[..., None] * (0.75, 0.8, 0.3) + pink[..., None] * (0.1, 0.8, 0.25)
    image = 245 * 10 ** -density.clip(0) + rng.normal(size=(side, side, 1)) * 3.2
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def write_slide(
    path: Path, side_px: int, tile_px: int, *, seed: int = 0, quality: int = 85
) -> None:
    """Write a square JPEG-tiled pyramid; a patch of texture of 2,048 px is repeated, shifted."""
    patch = texture(2048, seed)
    tiles: dict[tuple[int, int], bytes] = {}

    def stored(count: int) -> list[bytes]:
        found = []
        for row in range(count):
            for column in range(count):
                key = row * 7 % (2048 // tile_px), (column * 3 + row) % (2048 // tile_px)
                if key not in tiles:
                    y, x = key[0] * tile_px, key[1] * tile_px
                    pixels = np.ascontiguousarray(patch[y : y + tile_px, x : x + tile_px])
                    tiles[key] = simplejpeg.encode_jpeg(
                        pixels, quality, colorspace="RGB", colorsubsampling="420"
                    )
                found.append(tiles[key])
        return found

    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        size = side_px
        while size >= min(2048, side_px):
            writer.write(
                iter(stored(-(-size // tile_px))),
                shape=(size, size, 3),
                dtype=np.uint8,
                tile=(tile_px, tile_px),
                photometric="ycbcr",
                compression="jpeg",
                subsampling=(2, 2),
                resolution=(1e4 / MPP * size / side_px, 1e4 / MPP * size / side_px),
                resolutionunit="CENTIMETER",
                subfiletype=0 if size == side_px else 1,
                metadata=None,
            )
            size //= 4


def interleaved(
    sides: Mapping[str, Callable[[], object]], rounds: int = 5
) -> dict[str, list[float]]:
    """Run every side in turn, so many rounds; return seconds of processor time of each run."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            started = time.process_time()
            run()
            # The first round fills caches.
            if number:
                found[name].append(time.process_time() - started)
    return found


def ratio(times: Mapping[str, list[float]], over: str, under: str) -> tuple[float, float, float]:
    """Return the median over the rounds of one side's time over another's, least and most."""
    each = [a / b for a, b in zip(times[over], times[under], strict=True)]
    return statistics.median(each), min(each), max(each)
