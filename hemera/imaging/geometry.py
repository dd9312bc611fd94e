"""Grids, resolutions and levels: all arithmetic that places a tile.

Frame: x to the right, y down, continuous in pixels whose edges are the integers; the centre of
the first pixel is at 0.5. A point in micrometres is ``x_um = x_px * mpp`` with the same origin.
A position on level 0 is rounded to integer pixels once, in `grid_positions`, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt
import shapely

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

    Pyramids have integer factors, and a remainder is dropped or padded: 787 rows become 393 by a
    factor of 2, not 2.0025. So an integer factor that explains the size along both axes is used;
    otherwise the ratio of the sizes.
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
    """Return the coarsest level that is still at least as fine as `scale` level-0 pixels.

    Level 0 where no level is; the caller then upsamples.
    """
    best = 0
    for level, (fx, fy) in enumerate(downsamples):
        if max(fx, fy) <= scale * (1 + EQUAL_MPP) and fx > downsamples[best][0]:
            best = level
    return best


def grid_positions(
    width_px: int, height_px: int, side_px: float, stride_px: float
) -> npt.NDArray[np.int64]:
    """Place square tiles on an image, row by row; none reaches over the edge.

    Args:
        width_px: width of the image on level 0.
        height_px: its height.
        side_px: side of a tile in level-0 pixels, a fraction where the tile is resampled.
        stride_px: distance between neighbours in level-0 pixels.

    Returns:
        (N, 2) top-left corners (x, y) in integer level-0 pixels.
    """
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
    """Return the fraction of each tile inside an outline, by exact area.

    Args:
        outline: (H, W), covers the image from edge to edge.
        size_px: (width, height) of the image on level 0.
        corners_px: (N, 2) top-left corners (x, y) on level 0.
        side_px: side of the tiles on level 0.

    Returns:
        (N,) between 0 and 1.
    """
    height, width = outline.shape
    table = np.zeros((height + 1, width + 1))
    table[1:, 1:] = np.cumsum(np.cumsum(outline, axis=0, dtype=np.int64), axis=1)
    scale_x, scale_y = width / size_px[0], height / size_px[1]
    left = np.clip(corners_px[:, 0] * scale_x, 0, width)
    top = np.clip(corners_px[:, 1] * scale_y, 0, height)
    right = np.clip((corners_px[:, 0] + side_px) * scale_x, 0, width)
    bottom = np.clip((corners_px[:, 1] + side_px) * scale_y, 0, height)

    # The integral of an image constant in each pixel is bilinear between the pixels' corners.
    def upto(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        j = np.minimum(x.astype(np.int64), width - 1)
        i = np.minimum(y.astype(np.int64), height - 1)
        u, v = x - j, y - i
        upper = table[i, j] * (1 - u) + table[i, j + 1] * u
        lower = table[i + 1, j] * (1 - u) + table[i + 1, j + 1] * u
        result: npt.NDArray[np.float64] = upper * (1 - v) + lower * v
        return result

    inside = upto(right, bottom) - upto(left, bottom) - upto(right, top) + upto(left, top)
    fraction: npt.NDArray[np.float64] = inside / (side_px * scale_x * side_px * scale_y)
    return fraction.clip(0.0, 1.0)


def spread_lattice(
    lattice: npt.NDArray[np.float64], step: int, size: int
) -> npt.NDArray[np.float32]:
    """Interpolate a coordinate known on a coarse lattice to every pixel of a tile.

    Args:
        lattice: (N, N) values at the centres of squares of `step` pixels; the first square is
            outside the tile, left and above, and the last beyond its right and lower edge. Counted
            relative to a point near the tile, because the result has single precision.
        step: side of a square in pixels of the tile.
        size: side of the tile.

    Returns:
        (size, size) values at the pixel centres.
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
    """Return the fraction of each tile inside the union of polygons, by exact area.

    Args:
        polygons: level-0 pixels.
        corners_px: (N, 2) top-left corners of the tiles.
        side_px: their side.

    Returns:
        (N,) between 0 and 1.
    """
    region = shapely.union_all(shapely.make_valid(polygons))
    x, y = corners_px.T
    tiles = shapely.box(x, y, x + side_px, y + side_px)
    fraction: npt.NDArray[np.float64] = shapely.area(shapely.intersection(tiles, region))
    return fraction / side_px**2
