"""What is measured on pixels: stains, sharpness, tissue, similarity; and resampling by area.

Arrays are (H, W, 3) uint8 RGB unless said otherwise. Nothing here reads a file.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import scipy.sparse

RGB = npt.NDArray[np.uint8]
Float = npt.NDArray[np.float32]

WHITE = (255, 255, 255)

# Ruifrok and Johnston (2001): absorption of haematoxylin, eosin and DAB in R, G, B.
RGB_FROM_HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
HED_FROM_RGB = np.linalg.inv(RGB_FROM_HED)

STAIN_UNIT = 6.0
"""Optical density (base 10) of one unit of `separate_stains`: scikit-image divides by log 1e-6."""

SHARPNESS_MPP = 0.5
"""Resolution at which `sharpness` is stated, um/px."""

SHARPNESS_EXPONENT = 2.0
"""How the variance of the Laplacian grows with um/px around 0.5: 1.5 to 2.4 on sections in focus
(a noisy picture has 0, one that the optics blur 4)."""

DENSITY_STEP = 0.002
"""Optical density of one step of `density`."""

_FINE_BINS = 2048
SIMILARITY_RANGE = 4.0
"""Histograms of similarity run over this many standard deviations on either side."""


def optical_density(rgb: RGB, background: tuple[int, int, int] = WHITE) -> Float:
    """Return the optical density to base 10 relative to bare glass.

    Args:
        rgb: the image.
        background: colour of bare glass.

    Returns:
        (H, W, 3) float32, 0 on glass and where a pixel is brighter than glass.
    """
    value = np.maximum(np.arange(256), 1) / np.maximum(np.array(background, float), 1)[:, None]
    table = np.maximum(-np.log10(value), 0).astype(np.float32)
    return _look_up(rgb, table)


def separate_stains(rgb: RGB, background: tuple[int, int, int] = WHITE) -> Float:
    """Separate haematoxylin, eosin and DAB as ``skimage.color.rgb2hed`` does.

    Args:
        rgb: the image.
        background: colour of bare glass; white gives scikit-image's values.

    Returns:
        (H, W, 3) float32, not negative, in units of `STAIN_UNIT` optical densities.
    """
    value = np.arange(256) / np.maximum(np.array(background, float), 1)[:, None]
    table = (np.log(np.clip(value, 1e-6, 1.0)) / math.log(1e-6)).astype(np.float32)
    stains = cv2.transform(_look_up(rgb, table), HED_FROM_RGB.T)
    return np.maximum(stains, 0, out=stains)


_LOGS = np.repeat(
    (np.log(np.clip(np.arange(256) / 255, 1e-6, 1.0)) / math.log(1e-6)).astype(np.float32), 3
).reshape(1, 256, 3)


def haematoxylin(rgb: RGB) -> Float:
    """Return the haematoxylin of `separate_stains` alone, (H, W) float32."""
    logs = np.asarray(cv2.LUT(np.ascontiguousarray(rgb), _LOGS), np.float32)
    stain = cv2.transform(logs, HED_FROM_RGB[:, :1].T)
    return np.maximum(stain, 0, out=stain)


def _look_up(rgb: RGB, table: Float) -> Float:
    """Map every value of channel c through ``table[c]``."""
    result = cv2.LUT(np.ascontiguousarray(rgb), np.ascontiguousarray(table.T)[None])
    return np.asarray(result, np.float32)


def gray(rgb: RGB) -> RGB:
    """Return the luminance as OpenCV rounds it, (H, W) uint8."""
    return np.asarray(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), np.uint8)


def sharpness(rgb: RGB, mpp: float) -> float:
    """Return the variance of the Laplacian of gray, as it would be at `SHARPNESS_MPP`.

    A tile finer than that is first averaged by the whole factor that comes nearest; the ratio
    that remains enters as a power of it, with the exponent measured on real sections in focus
    (`SHARPNESS_EXPONENT`). So 0.25 um/px is measured at 0.5 exactly, and 0.92 is extrapolated.

    Args:
        rgb: the tile; (H, W, 3) RGB or (H, W) gray.
        mpp: its resolution, um/px.
    """
    luminance = gray(rgb) if rgb.ndim == 3 else rgb
    factor = max(1, round(SHARPNESS_MPP / mpp))
    factor = max(1, min(factor, min(luminance.shape) // 3))
    if factor > 1:
        height, width = (side // factor for side in luminance.shape)
        luminance = cv2.resize(
            luminance[: height * factor, : width * factor],
            (width, height),
            interpolation=cv2.INTER_AREA,
        ).astype(np.uint8, copy=False)
    # 16 bits hold the response of the 3 x 3 kernel (at most 4 * 255) and are twice as fast as 64.
    _, deviation = cv2.meanStdDev(cv2.Laplacian(luminance, cv2.CV_16S))
    scale: float = math.pow(SHARPNESS_MPP / (factor * mpp), SHARPNESS_EXPONENT)
    return float(deviation[0, 0]) ** 2 * scale


def saturation(rgb: RGB) -> RGB:
    """Return the saturation of HSV, 0 to 255, with near-black as 0: there it is only noise."""
    hsv = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)
    result = np.array(hsv[..., 1], np.uint8)
    result[hsv[..., 2] < 30] = 0
    return result


def density(rgb: RGB, background: tuple[int, int, int]) -> RGB:
    """Return the optical density above glass in the channel that absorbs most.

    A gray haze is glass where `background` is that gray; a pale counterstain is not, because it
    absorbs in one channel more than in the others.

    Returns:
        (H, W) uint8 in steps of `DENSITY_STEP`, up to 0.51.
    """
    steps = cv2.LUT(np.ascontiguousarray(rgb), _density_table(background))
    red, green, blue = cv2.split(np.asarray(steps))
    return np.asarray(cv2.max(cv2.max(red, green), blue), np.uint8)


@functools.lru_cache(maxsize=64)
def _density_table(background: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    value = np.maximum(np.arange(256), 1) / np.maximum(np.array(background, float), 1)[:, None]
    steps = np.clip(np.rint(-np.log10(value) / DENSITY_STEP), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(steps.T)[None]


def tissue_threshold(values: RGB, lowest: float, highest: float) -> float:
    """Return Otsu's threshold between glass and tissue, kept to where glass can end.

    Otsu splits any picture in two. Where all of it is tissue it would split pale from dark, and
    where all is glass, noise from noise: hence the two bounds.

    Args:
        values: `saturation` or `density` of an image, uint8.
        lowest: the threshold never falls below this, in units of `values`.
        highest: nor rises above this.
    """
    counts = np.bincount(values.ravel(), minlength=256).astype(float)
    levels = np.arange(256)
    below = np.cumsum(counts)
    above = counts.sum() - below
    weighted = np.cumsum(counts * levels)
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = weighted / below - (weighted[-1] - weighted) / above
    between = np.nan_to_num(below * above * distance**2)
    otsu = float(np.argmax(between)) + 0.5
    return float(np.clip(otsu, lowest, highest))


def outline(
    mask: npt.NDArray[np.bool_], *, hole_px: float, speck_px: float
) -> npt.NDArray[np.bool_]:
    """Clean a tissue mask: small holes are filled, small pieces dropped.

    Args:
        mask: (H, W).
        hole_px: holes up to this area are filled; holes touch no edge of the image.
        speck_px: pieces below this area are dropped.
    """
    result = mask.astype(np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(1 - result, connectivity=4)
    height, width = mask.shape
    left, top = stats[:, cv2.CC_STAT_LEFT], stats[:, cv2.CC_STAT_TOP]
    inside = (
        (left > 0)
        & (top > 0)
        & (left + stats[:, cv2.CC_STAT_WIDTH] < width)
        & (top + stats[:, cv2.CC_STAT_HEIGHT] < height)
    )
    fill = (stats[:, cv2.CC_STAT_AREA] <= hole_px) & inside
    fill[0] = False
    result[fill[labels]] = 1
    _, labels, stats, _ = cv2.connectedComponentsWithStats(result, connectivity=8)
    drop = stats[:, cv2.CC_STAT_AREA] < speck_px
    drop[0] = False
    result[drop[labels]] = 0
    return result.astype(bool)


def glass_colour(rgb: RGB) -> tuple[int, int, int]:
    """Estimate the colour of bare glass: the commonest of the brightest grays.

    Brightness is that of the darkest channel, in which every stain is darker than glass; glass
    itself may be as dark as 140. Where next to nothing is bright and gray, all of the image is
    tissue: then the brightest colour it holds stands in.
    """
    lightness = rgb.min(axis=2)
    clear = (lightness >= 120) & (rgb.max(axis=2) - lightness < 26)
    if clear.mean() < 0.005:
        return _colour(np.percentile(rgb.reshape(-1, 3), 99.5, axis=0))
    counts = np.bincount(lightness[clear], minlength=256).astype(float)
    brightest = int(np.searchsorted(np.cumsum(counts), 0.99 * counts.sum()))
    lowest = int(brightest * 0.94)
    smooth = np.convolve(counts, np.ones(5), mode="same")
    mode = lowest + int(np.argmax(smooth[lowest : brightest + 1]))
    if mode <= lowest + 1:
        # It still rises towards the dark: the peak is tissue, glass only its bright flank.
        mode = brightest
    near = clear & (np.abs(lightness.astype(int) - mode) <= 3)
    return _colour(np.median(rgb[near], axis=0))


def _colour(values: npt.NDArray[np.floating[Any]]) -> tuple[int, int, int]:
    red, green, blue = (round(float(value)) for value in values)
    return red, green, blue


def halved(rgb: RGB) -> RGB:
    """Return an image at half its resolution: what depends on colour is measured on it.

    Chroma is stored at half resolution anyway, and every fourth of the pixels says as much of a
    tile's colours. An odd last row or column goes.
    """
    height, width = rgb.shape[0] // 2, rgb.shape[1] // 2
    whole = rgb[: 2 * height, : 2 * width]
    return np.asarray(cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def histogram_similarity(he: RGB, her2: RGB, bins: int = 64) -> float | None:
    """Compare the haematoxylin of two stains whatever their brightness and contrast.

    Each is centred on its median and divided by its standard deviation; the result is the
    correlation of the histograms of both. It separates true pairs from false ones weakly.

    Returns:
        -1 to 1, or None where one of the two is flat.
    """
    first, second = (_centred_histogram(rgb, bins) for rgb in (he, her2))
    if first is None or second is None:
        return None
    first, second = first - first.mean(), second - second.mean()
    norm = math.sqrt(float(first @ first) * float(second @ second))
    return float(first @ second) / norm if norm else None


def _centred_histogram(rgb: RGB, bins: int) -> npt.NDArray[np.float64] | None:
    """Count haematoxylin in `bins` over `SIMILARITY_RANGE` deviations around its median."""
    stain = haematoxylin(rgb)
    _, spread = cv2.meanStdDev(stain)
    deviation = float(spread[0, 0])
    if deviation * STAIN_UNIT < 1e-3:
        return None
    # Once, finely: median and bins come from that. What is exactly 0 is a heap of its own.
    width = float(stain.max()) * 1.0001 / _FINE_BINS
    fine = cv2.calcHist([stain], [0], None, [_FINE_BINS], [0, width * _FINE_BINS]).ravel()
    zero = stain.size - cv2.countNonZero(stain)
    counts = np.concatenate([[zero], fine])
    counts[1] -= zero
    values = np.concatenate([[0.0], (np.arange(_FINE_BINS) + 0.5) * width])
    upto = np.cumsum(counts)
    half = stain.size / 2
    place = int(np.searchsorted(upto, half))
    inside = (half - upto[place - 1]) / counts[place] - 0.5 if place else 0.0
    median = values[place] + inside * width
    scaled = (values - median) / deviation
    index = np.floor((scaled / SIMILARITY_RANGE + 1) * bins / 2).astype(np.int64)
    kept = (index >= 0) & (index < bins)
    counted = np.bincount(index[kept], weights=counts[kept], minlength=bins)
    return counted.astype(np.float64)


@functools.lru_cache(maxsize=64)
def _area_weights(length: int, origin: float, step: float, count: int) -> scipy.sparse.csr_array:
    """Return (count, length) weights that average over [origin + i step, origin + (i + 1) step)."""
    edges = np.clip(origin + step * np.arange(count + 1), 0, length)
    first = np.floor(edges[:-1]).astype(int)
    reach = math.ceil(step) + 1
    columns = first[:, None] + np.arange(reach)[None]
    low = np.maximum(edges[:-1, None], columns)
    high = np.minimum(edges[1:, None], columns + 1)
    weights = np.maximum(high - low, 0)
    total = weights.sum(axis=1, keepdims=True)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    rows = np.repeat(np.arange(count), reach)
    columns = np.minimum(columns, length - 1)
    return scipy.sparse.csr_array(
        (weights.ravel().astype(np.float32), (rows, columns.ravel())),
        shape=(count, length),
    )


def area_resample(
    rgb: RGB,
    left: float,
    top: float,
    step_x: float,
    step_y: float,
    width: int,
    height: int,
) -> RGB:
    """Shrink a region by the exact mean over the area of each pixel of the result.

    Args:
        rgb: the source.
        left: left edge of the region in source pixels; may be a fraction.
        top: its top edge.
        step_x: source pixels per pixel of the result, at least 1.
        step_y: the same along y.
        width: of the result.
        height: of the result.

    Returns:
        (height, width, 3) uint8.
    """
    x0, y0 = round(left), round(top)
    x1, y1 = round(left + width * step_x), round(top + height * step_y)
    whole = max(
        abs(left - x0),
        abs(top - y0),
        abs(left + width * step_x - x1),
        abs(top + height * step_y - y1),
    )
    if whole < 1e-6 and min(x0, y0) >= 0 and x1 <= rgb.shape[1] and y1 <= rgb.shape[0]:
        region = rgb[y0:y1, x0:x1]
        if region.shape[:2] == (height, width):
            return region.copy()
        return np.asarray(
            cv2.resize(region, (width, height), interpolation=cv2.INTER_AREA), np.uint8
        )
    rows = _area_weights(rgb.shape[0], top, step_y, height)
    columns = _area_weights(rgb.shape[1], left, step_x, width)
    source = rgb.astype(np.float32)
    tall = (rows @ source.reshape(rgb.shape[0], -1)).reshape(height, rgb.shape[1], 3)
    turned = np.ascontiguousarray(tall.transpose(1, 0, 2)).reshape(rgb.shape[1], -1)
    wide = (columns @ turned).reshape(width, height, 3).transpose(1, 0, 2)
    return np.ascontiguousarray(np.clip(np.rint(wide), 0, 255).astype(np.uint8))


def shift_resample(
    rgb: RGB,
    left: float,
    top: float,
    step_x: float,
    step_y: float,
    width: int,
    height: int,
) -> RGB:
    """Enlarge a region by bilinear interpolation between pixel centres.

    The arguments are those of `area_resample`, with steps below 1.
    """
    x = left + (np.arange(width, dtype=np.float32) + 0.5) * step_x - 0.5
    y = top + (np.arange(height, dtype=np.float32) + 0.5) * step_y - 0.5
    return remap(
        rgb,
        np.broadcast_to(x.astype(np.float32), (height, width)),
        np.broadcast_to(y.astype(np.float32)[:, None], (height, width)),
        cubic=False,
    )


def remap(rgb: RGB, x: Float, y: Float, *, cubic: bool) -> RGB:
    """Sample an image at pixel indices (the centre of pixel 0 is 0); its edge is repeated.

    Args:
        rgb: the source.
        x: (H, W) column indices.
        y: (H, W) row indices.
        cubic: bicubic, which keeps three quarters of the sharpness where bilinear keeps less than
            half of it; else bilinear, which never overshoots.
    """
    return np.asarray(
        cv2.remap(
            rgb,
            np.ascontiguousarray(x, np.float32),
            np.ascontiguousarray(y, np.float32),
            cv2.INTER_CUBIC if cubic else cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        ),
        np.uint8,
    )
