"""Measures of the quality of a tile: its sharpness, and the similarity of the two stains."""

import math

import cv2
import numpy as np
import numpy.typing as npt

from hemera.imaging.color import STAIN_UNIT, WHITE, Color, gray, haematoxylin

RGB = npt.NDArray[np.uint8]
Histogram = npt.NDArray[np.float64]

SHARPNESS_MPP = 0.5
"""Resolution at which `sharpness` is stated, um/px."""
SHARPNESS_EXPONENT = 2.0
"""How the variance of the Laplacian grows with um/px around 0.5: 1.5 to 2.4 on sections in focus
(0 for noise, 4 for an image blurred by the optics)."""

HISTOGRAM_BINS = 64
SIMILARITY_RANGE = 4.0
"""Histograms of similarity reach this many standard deviations to either side."""
_FINE_BINS = 2048


def sharpness(rgb: RGB, mpp: float) -> float:
    """Return the variance of the Laplacian of luminance, as it would be at `SHARPNESS_MPP`.

    A tile finer than that is first averaged by the nearest integer factor; the remaining ratio is
    raised to `SHARPNESS_EXPONENT`.
    """
    luminance = gray(rgb)
    factor = max(1, round(SHARPNESS_MPP / mpp))
    factor = max(1, min(factor, min(luminance.shape) // 3))
    if factor > 1:
        height, width = (side // factor for side in luminance.shape)
        luminance = cv2.resize(
            luminance[: height * factor, : width * factor],
            (width, height),
            interpolation=cv2.INTER_AREA,
        ).astype(np.uint8, copy=False)
    # 16 bits fit the response of the 3 x 3 kernel (at most 4 * 255) and are twice as fast as 64.
    _, deviation = cv2.meanStdDev(cv2.Laplacian(luminance, cv2.CV_16S))
    scale: float = math.pow(SHARPNESS_MPP / (factor * mpp), SHARPNESS_EXPONENT)
    return float(deviation[0, 0]) ** 2 * scale


def histogram_similarity(
    he: RGB, her2: RGB, he_background: Color = WHITE, her2_background: Color = WHITE
) -> float | None:
    """Return the correlation of the haematoxylin histograms of two stains, None for a constant.

    Haematoxylin is relative to the backgrounds of both.

    Each is centred on its median and divided by its standard deviation, so that brightness and
    contrast do not matter. It separates true pairs from false ones weakly.
    """
    return histogram_correlation(
        haematoxylin_histogram(he, he_background), haematoxylin_histogram(her2, her2_background)
    )


def histogram_correlation(first: Histogram | None, second: Histogram | None) -> float | None:
    """Return the correlation of two of `haematoxylin_histogram`, None where one is None."""
    if first is None or second is None:
        return None
    first, second = first - first.mean(), second - second.mean()
    norm = math.sqrt(float(first @ first) * float(second @ second))
    return float(first @ second) / norm if norm else None


def haematoxylin_histogram(rgb: RGB, background: Color) -> Histogram | None:
    """Count haematoxylin in bins over `SIMILARITY_RANGE` deviations around its median.

    (HISTOGRAM_BINS,); None of an image of one colour.
    """
    stain = haematoxylin(rgb, background)
    _, spread = cv2.meanStdDev(stain)
    deviation = float(spread[0, 0])
    if deviation * STAIN_UNIT < 1e-3:
        return None
    # Median and bins follow from one fine histogram, in which exact zeros have a bin of their own.
    width = float(stain.max()) * 1.0001 / _FINE_BINS
    fine = cv2.calcHist([stain], [0], None, [_FINE_BINS], [0, width * _FINE_BINS]).ravel()
    zero = stain.size - cv2.countNonZero(stain)
    counts = np.concatenate([[zero], fine])
    counts[1] -= zero
    values = np.concatenate([[0.0], (np.arange(_FINE_BINS) + 0.5) * width])
    cumulative = np.cumsum(counts)
    half = stain.size / 2
    place = int(np.searchsorted(cumulative, half))
    inside = (half - cumulative[place - 1]) / counts[place] - 0.5 if place else 0.0
    scaled = (values - (values[place] + inside * width)) / deviation
    index = np.floor((scaled / SIMILARITY_RANGE + 1) * HISTOGRAM_BINS / 2).astype(np.int64)
    kept = (index >= 0) & (index < HISTOGRAM_BINS)
    counted = np.bincount(index[kept], weights=counts[kept], minlength=HISTOGRAM_BINS)
    return counted.astype(np.float64)
