"""Warping: HER2 pixels read on the H&E grid, label images mapped to the other slide."""

import math
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from hemera.errors import SlideError
from hemera.imaging.geometry import best_level, lattice_count, spread_lattice
from hemera.imaging.resample import remap
from hemera.imaging.slide import Slide
from hemera.registration import displacement as fields
from hemera.registration.displacement import Displacement, Points

RGB = npt.NDArray[np.uint8]

SPREAD_MAX = 8
"""A displacement may spread a tile over a region of HER2 at most this many times its side."""

LATTICE_MAX_PX = 16
"""Largest distance of points at which a displacement is evaluated for labels."""

_STRIP_PX = 16_000_000


def read_displaced(
    her2: Slide,
    field: Displacement,
    left_um: float,
    top_um: float,
    *,
    size_px: int,
    mpp: float,
) -> tuple[RGB, float, tuple[float, float], npt.NDArray[np.bool_] | None]:
    """Read HER2 for a square tile of the H&E grid: one region, remapped once.

    Returns:
        (size, size, 3) pixels, with the slide's background outside HER2; the fraction of the tile
        that HER2 and the displacement cover; the tile's top-left corner on HER2, (x, y) in its
        level-0 pixels; the covered pixels (size, size), None where HER2 covers all of them.
    """
    origin, at = fields.map_tile(field, left_um, top_um, mpp, size_px)
    origin, at = origin / her2.mpp, at / np.float32(her2.mpp)
    first = fields.map_points(field, [[left_um, top_um]])[0] / her2.mpp
    corner = float(first[0]), float(first[1])
    # HER2 pixels per pixel of the tile; one pixel of the tile is added on every side.
    scale = mpp / her2.mpp
    flat = at.reshape(-1, 2)
    low, high = origin + flat.min(axis=0) - scale, origin + flat.max(axis=0) + scale
    outside = bool((low < 0).any() or (high > her2.size_px).any())
    low, high = np.maximum(low, 0), np.minimum(high, her2.size_px)
    if (low >= high).any():
        return _empty(her2, size_px), 0.0, corner, np.zeros((size_px, size_px), bool)
    # Larger regions do not fit into memory either.
    side_px = size_px * mpp / her2.mpp
    width, height = (high - low).tolist()
    if max(width, height) > SPREAD_MAX * side_px:
        raise SlideError(
            f"the displacement spreads the tile at {left_um:.0f}, {top_um:.0f} um over "
            f"{width:.0f} x {height:.0f} px of HER2, more than {SPREAD_MAX} times its side of "
            f"{side_px:.0f}; correct the displacement"
        )
    # The next finer level; where it is finer by two or more, averaged over complete pixels, so that
    # sampling skips none.
    level = best_level(her2.level_downsamples, scale)
    steps = her2.level_downsamples[level]
    factor = max(1, math.floor(scale / max(steps) + 1e-3))
    unit = steps[0] * factor, steps[1] * factor
    x0, y0 = (math.floor(v / u) - 2 for v, u in zip(low, unit, strict=True))
    x1, y1 = (math.ceil(v / u) + 2 for v, u in zip(high, unit, strict=True))
    # Pixel indices in the region that is read.
    columns = at[..., 0] / np.float32(unit[0]) + np.float32(origin[0] / unit[0] - 0.5 - x0)
    rows = at[..., 1] / np.float32(unit[1]) + np.float32(origin[1] / unit[1] - 0.5 - y0)
    coverage, within = 1.0, None
    if outside:
        within = (
            (columns >= -0.5 - x0)
            & (columns < her2.size_px[0] / unit[0] - 0.5 - x0)
            & (rows >= -0.5 - y0)
            & (rows < her2.size_px[1] / unit[1] - 0.5 - y0)
        )
        coverage = cv2.countNonZero(within.view(np.uint8)) / within.size
    # Far from its nodes a displacement is extrapolated.
    coverage = min(coverage, _spanned(field, left_um, top_um, size_px * mpp))
    region = _averaged(her2, level, (x0, y0, x1, y1), factor)
    pixels = remap(region, columns, rows, cubic=True)
    if within is not None:
        pixels[~within] = her2.background
    return pixels, coverage, corner, within


def _empty(slide: Slide, size_px: int) -> RGB:
    """Return a tile of background."""
    return np.full((size_px, size_px, 3), slide.background, np.uint8)


def _averaged(slide: Slide, level: int, box: tuple[int, int, int, int], factor: int) -> RGB:
    """Read (left, top, right, bottom) of a level in pixels that are `factor` of its own wide."""
    x0, y0, x1, y1 = box
    if factor == 1:
        return slide.read_level(level, x0, y0, x1 - x0, y1 - y0)
    width = x1 - x0
    region = np.empty((y1 - y0, width, 3), np.uint8)
    # In strips, because a slide without levels may have hundreds of times as many pixels there.
    rows = max(1, _STRIP_PX // (width * factor**2))
    for top in range(y0, y1, rows):
        count = min(rows, y1 - top)
        strip = slide.read_level(level, x0 * factor, top * factor, width * factor, count * factor)
        averaged = cv2.resize(strip, (width, count), interpolation=cv2.INTER_AREA)
        region[top - y0 : top - y0 + count] = averaged
    return region


def _spanned(field: Displacement, left_um: float, top_um: float, side_um: float) -> float:
    """Return the fraction of a tile that is on the grid of a displacement, or within one node."""
    height, width = field.vectors_um.shape[:2]
    fraction = 1.0
    for low, count in ((left_um, width), (top_um, height)):
        end = min(low + side_um, (count + 1) * field.mpp)
        fraction *= max(0.0, end - max(low, -field.mpp)) / side_um
    return min(1.0, fraction)


def lattice_px(field: Displacement, mpp: float) -> int:
    """Return how many pixels apart a displacement has to be evaluated at a resolution."""
    return min(max(int(field.mpp / 2 / mpp), 1), LATTICE_MAX_PX)


def warp_labels(
    labels: npt.NDArray[np.integer[Any]],
    back: Callable[[Points], Points],
    x_px: int,
    y_px: int,
    *,
    size_px: int,
    pixel_um: tuple[float, float],
    label_um: tuple[float, float],
    lattice_px: int,
) -> npt.NDArray[np.integer[Any]]:
    """Return a square tile of a label image on the other slide, by the nearest label.

    Args:
        labels: (H, W), over the whole slide they were made on; may be memory-mapped.
        back: maps points of the other slide to the labels' slide, both um; NaN: no such point.
        x_px: left edge of the tile, in its own pixels.
        pixel_um: width and height of a pixel of the tile.
        lattice_px: `back` is evaluated at points this far apart, and interpolated between.
    """
    count = lattice_count(lattice_px, size_px)
    steps = (np.arange(count) - 0.5) * lattice_px
    nodes = np.stack(np.meshgrid(x_px + steps, y_px + steps), axis=-1) * pixel_um
    at = (back(nodes.reshape(-1, 2)) / label_um).reshape(nodes.shape)
    tile = np.zeros((size_px, size_px), labels.dtype)
    if np.isnan(at).all():
        return tile
    # Relative to a point near the tile, because interpolation is in single precision.
    base = np.floor(np.nanmin(at, axis=(0, 1)))
    columns, rows = (
        spread_lattice(at[..., axis] - base[axis], lattice_px, size_px).astype(np.float64)
        + base[axis]
        for axis in (0, 1)
    )
    nowhere = np.nonzero(np.isnan(columns))
    if len(nowhere[0]):
        # Around a node without corresponding point: pixel by pixel, so that only those are lost.
        points = np.stack([nowhere[1] + x_px + 0.5, nowhere[0] + y_px + 0.5], axis=-1)
        own = back(points * pixel_um) / label_um
        columns[nowhere], rows[nowhere] = own[:, 0], own[:, 1]
    height, width = labels.shape
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    tile[inside] = labels[rows[inside].astype(np.int64), columns[inside].astype(np.int64)]
    return tile
