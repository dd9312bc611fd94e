"""Colour of the background: empty places of a slide or of a ready-made image.

It is measured once per image, in `describe`; the tables of tiles contain it. Densities of masks,
similarity and artefacts are relative to it.
"""

import dataclasses
from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

from hemera.imaging.color import WHITE, Color
from hemera.imaging.morphology import at_mpp, coarse

RGB = npt.NDArray[np.uint8]

# Background is at most this fraction darker than the brightest pixels, and neighbouring pixels at
# `COARSE_MPP` differ by at most the second fraction: stroma is textured, background is not.
_DARKER_MAX = 0.05
_TEXTURE_MAX = 0.04
# Smallest fraction of the pixels that makes a background.
_FRACTION_MIN = 0.01
# Without background: resolution, um/px, and percentile of each channel that replace it. On windows
# of tissue from 11 real images whose background is known, the mean error is 0.01 to 0.02 in
# density; the 99th percentile at `COARSE_MPP` errs by 0.02 to 0.10.
_GAPS_MPP = 1.0
_GAPS_PERCENTILE = 99.9


@dataclasses.dataclass(frozen=True)
class Background:
    """Colour of the background (r, g, b), 0 to 255, and whether there is background to measure."""

    color: Color
    measured: bool


def measure_background(images: Sequence[RGB], mpp: float) -> Background:
    """Measure the background of images of one slide: the brightest pixels without texture.

    At `COARSE_MPP`, where noise and the bright halos of sharpened edges are averaged, a pixel is
    background when it is nearly as bright as the brightest ones and as its neighbours; the colour
    is the median of the brighter quarter of them, because pale tissue may be among the rest.
    Where fewer than 1 % of the pixels are background, all of the images is tissue: the colour is
    then the 99.9th percentile of every channel at 1 um/px, of the gaps between cells. Without
    images it is white.

    Args:
        images: (H, W, 3) uint8 RGB each, of any sizes.
        mpp: their resolution, um/px.
    """
    if not images:
        return Background(WHITE, measured=False)
    small = [coarse(image, mpp) for image in images]
    light = [image.mean(axis=2, dtype=np.float32) for image in small]
    top = np.percentile(np.concatenate([image.ravel() for image in light]), 99.5)
    even = np.concatenate([(_range(image) <= _TEXTURE_MAX * top).ravel() for image in light])
    brightness = np.concatenate([image.ravel() for image in light])
    clear = even & (brightness >= (1 - _DARKER_MAX) * top)
    if clear.mean() < _FRACTION_MIN:
        gaps = np.concatenate([at_mpp(image, mpp, _GAPS_MPP).reshape(-1, 3) for image in images])
        return Background(_rounded(np.percentile(gaps, _GAPS_PERCENTILE, axis=0)), measured=False)
    pixels = np.concatenate([image.reshape(-1, 3) for image in small])
    brightest = clear & (brightness >= np.percentile(brightness[clear], 75))
    return Background(_rounded(np.median(pixels[brightest], axis=0)), measured=True)


def _range(image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the largest difference within 3 x 3 pixels, (H, W)."""
    kernel = np.ones((3, 3), np.uint8)
    return np.asarray(cv2.dilate(image, kernel) - cv2.erode(image, kernel), np.float32)


def _rounded(values: npt.NDArray[np.floating]) -> Color:
    red, green, blue = (round(float(value)) for value in values)
    return red, green, blue
