"""Tissue outlines: which pixels of an image show tissue, which background."""

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from hemera.config import DescribeOptions
from hemera.imaging.color import DENSITY_STEP, density, saturation

RGB = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

PIECE_UM2 = 40_000.0
"""Largest hole that is filled, and smallest piece of tissue, um^2."""

PIECE_FRACTION_MAX = 0.01
"""At most this fraction of the image: a BCI image is smaller than a hole may be on a slide."""


def find_tissue(
    rgb: RGB, stain: str, background: tuple[int, int, int], mpp: float, options: DescribeOptions
) -> tuple[Mask, float]:
    """Return the outline of the tissue (H, W) on an overview of a slide, and its threshold.

    H&E by saturation, 0 to 1, IHC by optical density: haematoxylin alone is too pale for
    saturation.
    """
    if stain == "he":
        values, unit = saturation(rgb), 1 / 255
        low, high = options.he_saturation_min, options.he_saturation_max
    else:
        values, unit = density(rgb, background), DENSITY_STEP
        low, high = options.ihc_density_min, options.ihc_density_max
    threshold = tissue_threshold(values, low / unit, high / unit)
    piece_px = min(PIECE_UM2 / mpp**2, PIECE_FRACTION_MAX * values.size)
    return clean_outline(values > threshold, piece_px), threshold * unit


def tissue_threshold(values: RGB, lowest: float, highest: float) -> float:
    """Return Otsu's threshold between background and tissue, clipped to two bounds.

    Otsu's method splits any image in two: where all of it is tissue, pale from dark; where all is
    background, noise from noise. Hence the bounds, in units of `values`.
    """
    counts = np.bincount(values.ravel(), minlength=256)
    return float(np.clip(otsu(counts)[0] + 0.5, lowest, highest))


def otsu(counts: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
    """Return the bins after which a histogram is best divided in two (Otsu 1979).

    One bin, or several where the bins between the classes are empty.
    """
    counts = counts.astype(float)
    below = np.cumsum(counts)
    above = counts.sum() - below
    weighted = np.cumsum(counts * np.arange(len(counts)))
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = weighted / below - (weighted[-1] - weighted) / above
    between = np.nan_to_num(below * above * distance**2)
    return np.flatnonzero(between >= between.max() * (1 - 1e-9))


def clean_outline(mask: Mask, piece_px: float) -> Mask:
    """Fill holes of a mask up to an area, and drop smaller pieces; a hole touches no edge."""
    # Inside a frame of background, which joins all background at the edge.
    framed = np.pad(mask, 1).astype(np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(1 - framed, connectivity=4)
    fill = stats[:, cv2.CC_STAT_AREA] <= piece_px
    fill[[0, labels[0, 0]]] = False
    framed[fill[labels]] = 1
    _, labels, stats, _ = cv2.connectedComponentsWithStats(framed, connectivity=8)
    drop = stats[:, cv2.CC_STAT_AREA] < piece_px
    framed[drop[labels]] = 0
    return framed[1:-1, 1:-1].astype(bool)
