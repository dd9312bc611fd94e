"""Grids, resolutions and levels: all arithmetic that places a tile.

Frame: x to the right, y down, continuous in pixels whose edges are the integers; the centre of
the first pixel is at 0.5. A point in micrometres is ``x_um = x_px * mpp`` with the same origin.
A position on level 0 is rounded to integer pixels once, in `grid_positions`, and nowhere else.
"""

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt
import shapely
from scipy import ndimage

Points = npt.NDArray[np.float64]

EQUAL_MPP = 1e-3
"""Two resolutions with a smaller relative difference are the same: half a pixel over a tile."""


def same_mpp(a: float, b: float) -> bool:
    """Return whether two resolutions are the same to the accuracy scanners state them."""
    return abs(a - b) <= EQUAL_MPP * max(a, b)


def level_downsample(
    size_px: tuple[int, int], level_size_px: tuple[int, int]
) -> tuple[float, float]:
    """Return by how much a level is coarser than level 0, along x and y.

    An integer factor if one explains both sizes, with a remainder dropped or padded: 787 rows
    become 393 by a factor of 2, not 2.0025. Otherwise the ratio of the sizes.
    """
    ratio = max(size_px[0] / level_size_px[0], size_px[1] / level_size_px[1])
    for factor in sorted({max(1, round(ratio)), max(1, int(ratio))}):
        if all(
            full // factor <= level <= -(-full // factor)
            for full, level in zip(size_px, level_size_px, strict=True)
        ):
            return float(factor), float(factor)
    return size_px[0] / level_size_px[0], size_px[1] / level_size_px[1]


def best_level(downsamples: Sequence[tuple[float, float]], scale: float) -> int:
    """Return the coarsest level that is at least as fine as `scale` level-0 pixels, else 0."""
    limit = scale * (1 + EQUAL_MPP)
    fine = [level for level, steps in enumerate(downsamples) if max(steps) <= limit]
    return max(fine, key=lambda level: downsamples[level][0], default=0)


def grid_positions(
    width_px: int, height_px: int, side_px: float, stride_px: float
) -> npt.NDArray[np.int64]:
    """Return the top-left corners (N, 2) of square tiles inside an image, row by row, level 0."""
    x, y = (_corners(length, side_px, stride_px) for length in (width_px, height_px))
    return np.stack([np.tile(x, len(y)), np.repeat(y, len(x))], axis=1)


def _corners(length: int, side: float, stride: float) -> npt.NDArray[np.int64]:
    count = max(0, int(np.floor((length - side) / stride + 1e-9)) + 1)
    corners: npt.NDArray[np.int64] = np.floor(np.arange(count) * stride + 0.5).astype(np.int64)
    # Rounding up may push the last tile over the edge by less than a pixel: it stays, moved back.
    last = max(0, int(np.floor(length - side + 1e-9)))
    corners[corners > last] = last
    return corners


def tissue_fraction(
    outline: npt.NDArray[np.bool_],
    size_px: tuple[int, int],
    corners_px: npt.NDArray[np.int64],
    side_px: float,
) -> npt.NDArray[np.float64]:
    """Return the fraction (N,) of each tile inside an outline, by exact area.

    The outline (H, W) covers an image of `size_px` (width, height); `corners_px` (N, 2) are the
    top-left corners of the tiles, all on level 0.
    """
    # The integral of an image constant in each pixel is bilinear between the pixels' corners.
    integral = cv2.integral(outline.astype(np.uint8), sdepth=cv2.CV_64F)
    scale = np.array(outline.shape[::-1]) / size_px
    left, top = (corners_px * scale).T
    right, bottom = ((corners_px + side_px) * scale).T
    y = np.concatenate([bottom, bottom, top, top])
    x = np.concatenate([right, left, right, left])
    upto = ndimage.map_coordinates(integral, [y, x], order=1, mode="nearest").reshape(4, -1)
    inside = upto[0] - upto[1] - upto[2] + upto[3]
    fraction: npt.NDArray[np.float64] = inside / (side_px**2 * scale.prod())
    return fraction.clip(0.0, 1.0)


def spread_lattice(
    lattice: npt.NDArray[np.float64], step: int, size: int
) -> npt.NDArray[np.float32]:
    """Interpolate a coordinate known on a coarse lattice to the pixel centres of a tile.

    Args:
        lattice: (N, N) values at the centres of squares of `step` pixels, from one outside the
            tile, left and above, to one beyond its right and lower edge. Relative to a point near
            the tile, because the result has single precision.
        step: side of a square in pixels of the tile.
        size: side of the tile.
    """
    # Not cv2.remap, whose coordinates come in steps of 1/32: cv2.resize interpolates exactly.
    side = lattice.shape[0] * step
    coarse = lattice.astype(np.float32)
    fine = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_LINEAR)
    return np.asarray(fine[step : step + size, step : step + size], np.float32)


def lattice_count(step: int, size: int) -> int:
    """Return how many nodes along a side the lattice of `spread_lattice` needs."""
    return -(-size // step) + 2


def polygon_fraction(
    polygons: Sequence[shapely.Polygon], corners_px: npt.NDArray[np.int64], side_px: float
) -> npt.NDArray[np.float64]:
    """Return the fraction (N,) of each tile inside polygons, as `tissue_fraction` does."""
    region = shapely.union_all(shapely.make_valid(polygons))
    x, y = corners_px.T
    tiles = shapely.box(x, y, x + side_px, y + side_px)
    fraction: npt.NDArray[np.float64] = shapely.area(shapely.intersection(tiles, region))
    return fraction / side_px**2
