"""What applying a displacement adds to its error, by HEMERA's tiles and by the engine's own warp.

A given field is applied to a picture that is a formula of the place, by HEMERA's tiles and by
DeeperHistReg's full-resolution warp; what each adds to the field is measured against the formula
(goal for HEMERA: median <= 0.05 px).
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile

from hemera.imaging.slide import open_slide
from hemera.registration import displacement as fields
from hemera.registration.warping import read_displaced

RGB = npt.NDArray[np.uint8]
Points = npt.NDArray[np.float64]

MPP = 0.5
FIXED_PX, MOVING_PX = (2050, 1600), (2050, 1600)
"""Equal, so that the engine's warp needs no padding: what it adds then is its own."""

TILE_PX = 512
WINDOW_PX = 32


def picture(points_px: Points) -> npt.NDArray[np.float64]:
    """The moving picture as a formula of the place: (..., 2) to (..., 3), 60 to 200 levels."""
    x, y = points_px[..., 0], points_px[..., 1]
    red = 130 + 60 * np.sin(x / 9 + 0.5) * np.cos(y / 11)
    green = 130 + 50 * np.cos(x / 8 - y / 13) + 15 * np.sin(y / 7)
    blue = 130 + 60 * np.sin(y / 9 + 1) * np.sin(x / 12)
    return np.stack([red, green, blue], axis=-1)


def beside(
    found: RGB, ideal: Callable[[Points], npt.NDArray[np.float64]], origin: Points
) -> Points:
    """Distance, in pixels, of what was resampled from what it should be, window by window.

    Least squares on the gradient of the ideal picture (one step of Lucas and Kanade).
    """
    height, width = found.shape[:2]
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    points = np.stack([x, y], axis=-1) + origin
    step = np.array([0.25, 0.0])
    goal = ideal(points)
    along_x = (ideal(points + step) - ideal(points - step)) / 0.5
    along_y = (ideal(points + step[::-1]) - ideal(points - step[::-1])) / 0.5
    difference = found - goal

    def pooled(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        rows, columns = height // WINDOW_PX, width // WINDOW_PX
        part = values.sum(axis=-1)[: rows * WINDOW_PX, : columns * WINDOW_PX]
        return part.reshape(rows, WINDOW_PX, columns, WINDOW_PX).sum(axis=(1, 3))

    a, b, c = pooled(along_x**2), pooled(along_x * along_y), pooled(along_y**2)
    d, e = pooled(along_x * difference), pooled(along_y * difference)
    determinant = a * c - b * b
    return np.hypot((c * d - b * e) / determinant, (a * e - b * d) / determinant)


def exactness() -> Iterator[str]:
    """Apply fields on grids two and five times as coarse as the slide, both ways."""
    yield "field, grid      added by              median px   p90 px   max px"
    grid_px = np.stack(
        np.meshgrid(np.arange(MOVING_PX[0]) + 0.5, np.arange(MOVING_PX[1]) + 0.5), axis=-1
    )
    moving = np.rint(picture(grid_px)).astype(np.uint8)
    warping = _engine_warping()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "moving.tif"
        tifffile.imwrite(path, moving, tile=(256, 256), photometric="rgb", compression="deflate")
        for factor in (2, 5):
            width, height = FIXED_PX[0] // factor, FIXED_PX[1] // factor
            field = _field(width, height, factor)
            d = fields.from_engine_field(
                field,
                fixed_size=(width, height),
                fixed_pad=(0, 0),
                moving_pad=(0, 0),
                mpp=MPP * factor,
            )

            def ideal(points: Points, factor: int = factor) -> npt.NDArray[np.float64]:
                return picture(points + factor * _bend(points / factor))

            ours = []
            with open_slide(path, mpp=MPP) as slide:
                for y in range(0, FIXED_PX[1] - TILE_PX, TILE_PX):
                    for x in range(0, FIXED_PX[0] - TILE_PX, TILE_PX):
                        tile, coverage, *_ = read_displaced(
                            slide, d, x * MPP, y * MPP, size_px=TILE_PX, mpp=MPP
                        )
                        if coverage == 1:
                            ours.append(beside(tile, ideal, np.array([x, y])).ravel())
            vips = warping.pyvips.Image.new_from_memory(moving.data, *MOVING_PX, 3, "uchar")
            warped = warping.warp_pyvips_with_np_df(vips, field).numpy()
            margin = 128
            inner = warped[margin:-margin, margin:-margin]
            theirs = beside(inner, ideal, np.array([margin, margin])).ravel()
            for who, errors in (
                ("HEMERA's tiles", np.concatenate(ours)),
                ("engine's warp", theirs),
            ):
                yield (
                    f"x{factor}, {width} x {height:<6} {who:<20} {np.median(errors):10.3f}"
                    f" {np.percentile(errors, 90):8.3f} {errors.max():8.3f}"
                )


def _bend(points_px: Points) -> Points:
    """The field in pixels of its grid: a shift, a turn, a bend, and what changes within ten nodes.

    The last is what an engine's field has, and what a coarser lattice would miss.
    """
    x, y = points_px[..., 0], points_px[..., 1]
    return np.stack(
        [
            4.3 + 0.02 * y + 2.0 * np.sin(y / 60) + 0.15 * np.sin(x / 3) * np.cos(y / 4),
            -3.1 - 0.02 * x + 1.5 * np.cos(x / 75) + 0.15 * np.cos(x / 4) * np.sin(y / 3),
        ],
        axis=-1,
    )


def _field(width: int, height: int, factor: int) -> npt.NDArray[np.float32]:
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    return np.moveaxis(_bend(np.stack([x, y], axis=-1)), -1, 0).astype(np.float32)


def _engine_warping() -> Any:
    importlib.import_module("deeperhistreg")
    return importlib.import_module("dhr_utils.warping")


def main() -> None:
    """Print the table."""
    for line in exactness():
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
