"""Colour of stained sections, (H, W, 3) uint8 RGB; optical densities are decimal logarithms."""

import functools
import math

import cv2
import numpy as np
import numpy.typing as npt

RGB = npt.NDArray[np.uint8]
Float = npt.NDArray[np.float32]
Color = tuple[int, int, int]

WHITE = (255, 255, 255)

RGB_FROM_HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Absorption of haematoxylin, eosin and DAB in red, green and blue (Ruifrok and Johnston 2001)."""
HED_FROM_RGB = np.linalg.inv(RGB_FROM_HED)

STAIN_UNIT = 6.0
"""Optical density of one unit of `haematoxylin`: scikit-image divides by log 1e-6."""

DENSITY_STEP = 0.002
"""Optical density of one step of `density`."""


def haematoxylin(rgb: RGB, background: Color = WHITE) -> Float:
    """Return the haematoxylin, (H, W), of ``skimage.color.rgb2hed``, in `STAIN_UNIT` densities.

    Relative to the colour of the background, which rgb2hed takes as white.
    """
    logs = np.asarray(cv2.LUT(np.ascontiguousarray(rgb), _logs(background)), np.float32)
    stain = cv2.transform(logs, HED_FROM_RGB[:, :1].T)
    return np.maximum(stain, 0, out=stain)


@functools.lru_cache(maxsize=64)
def _logs(background: Color) -> Float:
    """Return what `haematoxylin` makes of every value of every channel, (1, 256, 3)."""
    ratio = np.arange(256)[:, None] / np.maximum(background, 1)
    logs = np.log(np.clip(ratio, 1e-6, 1.0)) / math.log(1e-6)
    return logs.astype(np.float32)[None]


def optical_density(rgb: RGB, background: Color = WHITE) -> Float:
    """Return the optical density (H, W, 3), 0 where a pixel is at least as bright as background."""
    table = np.maximum(_densities(background), 0).astype(np.float32)
    return np.asarray(cv2.LUT(np.ascontiguousarray(rgb), table), np.float32)


def unmixing_matrix(vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the (3, 3) matrix from densities, as a row, to two stains and a residual.

    `vectors` (2, 3) are unit vectors in optical density; the residual is along their normal.
    """
    normal = np.cross(vectors[0], vectors[1])
    normal = normal / np.linalg.norm(normal)
    return np.asarray(np.linalg.inv(np.vstack([vectors, normal])), np.float64)


def normalise_background(rgb: RGB, background: Color) -> RGB:
    """Return an image (H, W, 3) divided by its background, which becomes white; clipped at 255.

    The optical density over white is then that over the background, up to rounding.
    """
    if background == WHITE:
        return rgb
    return np.asarray(cv2.LUT(np.ascontiguousarray(rgb), _over_background(background)), np.uint8)


@functools.lru_cache(maxsize=64)
def _over_background(background: Color) -> RGB:
    """Return every value of every channel over the background, (1, 256, 3)."""
    ratio = np.arange(256)[:, None] * 255 / np.maximum(background, 1)
    return np.rint(ratio).clip(max=255).astype(np.uint8)[None]


def density(rgb: RGB, background: Color) -> RGB:
    """Return the optical density in the channel that absorbs most, (H, W), in `DENSITY_STEP`.

    A gray haze is background where `background` is that gray; a pale counterstain is not, because
    it absorbs in one channel more than in the others.
    """
    steps = cv2.LUT(np.ascontiguousarray(rgb), _density_steps(background))
    red, green, blue = cv2.split(np.asarray(steps))
    return np.asarray(cv2.max(cv2.max(red, green), blue), np.uint8)


@functools.lru_cache(maxsize=64)
def _density_steps(background: Color) -> npt.NDArray[np.uint8]:
    return np.clip(np.rint(_densities(background) / DENSITY_STEP), 0, 255).astype(np.uint8)


def _densities(background: Color) -> npt.NDArray[np.float64]:
    """Return the optical density of every value of every channel, (1, 256, 3)."""
    value = np.maximum(np.arange(256), 1) / np.maximum(np.array(background, float), 1)[:, None]
    return np.ascontiguousarray(-np.log10(value).T)[None]


def gray(rgb: RGB) -> RGB:
    """Return the luminance as OpenCV rounds it, (H, W) uint8."""
    return np.asarray(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), np.uint8)


def saturation(rgb: RGB) -> RGB:
    """Return the saturation of HSV, (H, W) uint8; 0 where near-black makes it noise."""
    hsv = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)
    result = np.array(hsv[..., 1], np.uint8)
    result[hsv[..., 2] < 30] = 0
    return result
