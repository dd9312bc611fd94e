"""Numbers that describe colour and texture of an H&E image, without a network."""

import itertools
import math

import cv2
import numpy as np
import numpy.typing as npt

from hemera.imaging.color import HED_FROM_RGB, Color, optical_density

RGB = npt.NDArray[np.uint8]
Float = npt.NDArray[np.float32]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SCALES_UM = (0.4, 0.8, 1.6, 3.2)
"""Standard deviations of the finer Gaussian of each difference; the coarser one has twice that."""
LEVELS = (0.15, 0.3, 0.45, 0.6)
"""Optical densities of haematoxylin of which the exceeded area is counted."""

_CHANNELS = ("red", "green", "blue", "haematoxylin", "eosin")
_TEXTURED = ("green", "haematoxylin", "eosin")
_CORRELATED = (("red", "green"), ("red", "blue"), ("green", "blue"), ("haematoxylin", "eosin"))

NAMES = (
    *(
        f"{channel}_{name}"
        for channel in _CHANNELS
        for name in ("mean", "std", "skewness", *(f"q{round(100 * q):02d}" for q in QUANTILES))
    ),
    *(f"{channel}_energy_{scale:g}um" for channel in _TEXTURED for scale in SCALES_UM),
    *(f"haematoxylin_skewness_{scale:g}um" for scale in SCALES_UM),
    *(f"{first}_{second}_correlation" for first, second in _CORRELATED),
    *(f"haematoxylin_above_{level:g}" for level in LEVELS),
)
"""The 64 numbers, in their order."""


def statistics(rgb: RGB, background: Color, mpp: float) -> Float:
    """Return the 64 numbers of `NAMES` of an image (H, W, 3), finite for any image.

    Moments and quantiles of the optical density over `background` in red, green and blue, and of
    haematoxylin and eosin (Ruifrok and Johnston 2001); the logarithm of the standard deviation of
    differences of Gaussians in three of these, at scales in um (`mpp`: um per pixel); correlations;
    fractions of the area above levels of haematoxylin.
    """
    density = optical_density(rgb, background)
    stains = cv2.transform(density, np.ascontiguousarray(HED_FROM_RGB[:, :2].T, np.float32))
    split = [
        np.asarray(image, np.float32) for each in (density, stains) for image in cv2.split(each)
    ]
    images: dict[str, Float] = dict(zip(_CHANNELS, split, strict=True))
    found: list[float] = []
    for channel in images.values():
        mean, deviation = _moments(channel)
        found += [mean, deviation, _skewness(channel, mean, deviation)]
        found += _quantiles(channel)
    skews = []
    for name in _TEXTURED:
        # Each scale is twice the last, so that the coarser of one is the finer of the next.
        sigmas = [max(scale / mpp, 0.3) for scale in (*SCALES_UM, 2 * SCALES_UM[-1])]
        blurred = [cv2.GaussianBlur(images[name], (0, 0), sigma) for sigma in sigmas]
        for fine, coarse in itertools.pairwise(blurred):
            difference = np.asarray(fine - coarse, np.float32)
            mean, deviation = _moments(difference)
            found.append(math.log10(deviation + 1e-4))
            if name == "haematoxylin":
                skews.append(_skewness(difference, mean, deviation))
    found += skews
    found += [_correlation(images[first], images[second]) for first, second in _CORRELATED]
    found += [float((images["haematoxylin"] > level).mean()) for level in LEVELS]
    return np.array(found, np.float32)


def _quantiles(image: Float) -> list[float]:
    """Return the values at `QUANTILES`, each that of a pixel."""
    places = [round(part * (image.size - 1)) for part in QUANTILES]
    ordered = np.partition(image.ravel(), places)
    return [float(ordered[place]) for place in places]


def _moments(image: Float) -> tuple[float, float]:
    mean, deviation = cv2.meanStdDev(image)
    return float(mean[0, 0]), float(deviation[0, 0])


def _skewness(image: Float, mean: float, deviation: float) -> float:
    """Return the third standardised moment, 0 for a constant image."""
    if deviation < 1e-6:
        return 0.0
    centred = image - np.float32(mean)
    # ** is slower by far.
    cubes = centred * centred * centred
    return float(cubes.mean()) / deviation**3


def _correlation(first: Float, second: Float) -> float:
    """Return the correlation of two images, 0 where one is constant."""
    (mean, deviation), (other, spread) = _moments(first), _moments(second)
    if deviation < 1e-6 or spread < 1e-6:
        return 0.0
    product = float(np.dot(first.ravel(), second.ravel())) / first.size
    return (product - mean * other) / (deviation * spread)
