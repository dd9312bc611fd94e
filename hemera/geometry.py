"""Grids, resolutions and levels: all arithmetic that places a tile.

Frame: x to the right, y down, continuous in pixels whose edges are the integers; the centre of
the first pixel is at 0.5. A point in micrometres is ``x_um = x_px * mpp`` with the same origin.
A position on level 0 is rounded to whole pixels once, in `grid_positions`, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

EQUAL_MPP = 1e-3
"""Two resolutions that differ by less than this share are the same: half a pixel over a tile."""


def same_mpp(a: float, b: float) -> bool:
    """Tell whether two resolutions are the same to the accuracy scanners state them."""
    return abs(a - b) <= EQUAL_MPP * max(a, b)


def level_downsample(
    size_px: tuple[int, int], level_size_px: tuple[int, int]
) -> tuple[float, float]:
    """Return by how much a level is coarser than level 0, along x and y.

    A pyramid is made by whole factors, and what does not divide is dropped or padded: 787 rows
    become 393 by a factor of 2, not 2.0025. So a whole factor that explains the size along both
    axes is taken as it stands; only otherwise the ratio of the sizes.
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

    Level 0 where none is: the caller then upsamples.
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
        (N, 2) top-left corners (x, y) in whole level-0 pixels.
    """

    # A tile may hang over by what rounding its corner can shift it, never by a whole pixel.
    def along(length: int) -> npt.NDArray[np.int64]:
        count = int(np.floor((length - side_px) / stride_px + 1e-9)) + 1
        if length + 1e-6 < side_px:
            return np.zeros(0, np.int64)
        corners = np.floor(np.arange(count) * stride_px + 0.5).astype(np.int64)
        return corners[corners + side_px <= length + 0.5]

    x, y = along(width_px), along(height_px)
    return np.stack([np.tile(x, len(y)), np.repeat(y, len(x))], axis=1)


def lattice_centres(
    x_px: float, y_px: float, size: int, scale: float, step: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the coarse lattice over a tile on which a displacement is evaluated.

    The nodes lie on the tile's pixel coordinates 0, step, 2 step ... size (edges included), so
    that every pixel centre of the tile lies between nodes.

    Args:
        x_px: left edge of the tile on level 0.
        y_px: its top edge.
        size: side of the tile in its own pixels.
        scale: level-0 pixels per pixel of the tile.
        step: distance of the nodes in pixels of the tile.

    Returns:
        The nodes in tile pixels (N,), and their level-0 points (N, N, 2) as (x, y).
    """
    nodes = np.minimum(np.arange(0, size + step, step, dtype=np.float64), size)
    nodes = np.unique(nodes)
    points = np.empty((len(nodes), len(nodes), 2))
    points[..., 0] = x_px + nodes[None, :] * scale
    points[..., 1] = y_px + nodes[:, None] * scale
    return nodes, points
