"""Folds of the tissue: long bands in which the densities of several layers add up."""

import math
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from hemera.imaging.morphology import at_mpp

Float = npt.NDArray[np.float32]

# Resolution at which bands are searched for, um/px.
_BAND_MPP = 4.0
# The lowest density within this width, um: that of a fold is the sum of the lowest of its layers,
# while a band of crowded nuclei has the pale gaps of other tissue.
_LOWEST_UM = 8.0
# Widths of bands, um; how far from a band its sides are, and their largest width, um.
_WIDTHS_UM = (16.0, 32.0, 64.0, 120.0)
_APART_UM = 8.0
_SIDE_UM = 32.0
# A band exceeds both sides in every piece of the first length along the second, um, at most this
# fraction of the image; smallest side of an image, px.
_PIECE_UM = 32.0
_LENGTH_UM = 110.0
_LENGTH_FRACTION = 0.7
_SIDE_PX = 12
_ANGLES = 12
# Density from which a pixel of this resolution shows tissue, of which both sides must consist by
# this fraction: the surface of an organ is a dense band beside background.
_TISSUE_DENSITY = 0.02
_TISSUE_FRACTION = 0.75
# Smallest fraction of a piece that is inside the image.
_COVERED = 0.9
# Smallest density of a channel to which its excess is compared.
_REFERENCE_MIN = 0.03


def fold_contrast(density: Float, mpp: float) -> Float:
    """Return by how much bands exceed the tissue at both of their sides.

    A fold of k layers has the densities of k layers in all channels: relative to the mean of the
    tissue of the image it exceeds its sides by k - 1 on average. The contrast is the smallest over
    the channels, over both sides and over the pieces of a straight length, hence that of every part
    of a fold, and near 0 for a border of dense tissue, which has one side.

    Args:
        density: (H, W, 3) optical densities.
        mpp: their resolution, um/px; at most 4.

    Returns:
        (h, w) at 4 um/px: the largest contrast of the bands that cover a pixel, 0 without any.
    """
    at = _BAND_MPP
    lowest = 2 * int(_LOWEST_UM / mpp / 2) + 1
    pale = cv2.erode(density, np.ones((lowest, lowest), np.uint8)) if lowest > 1 else density
    pale = at_mpp(np.asarray(pale, np.float32), mpp, at)
    tissue = at_mpp(density, mpp, at).mean(axis=2) > _TISSUE_DENSITY
    found = np.zeros(tissue.shape, np.float32)
    if not tissue.any() or min(tissue.shape) < _SIDE_PX:
        return found
    pale = pale / np.maximum(pale[tissue].mean(axis=0), _REFERENCE_MIN)
    # Contiguous planes, for speed; what is outside the image is no tissue.
    planes = [*cv2.split(np.asarray(pale, np.float32)), tissue.astype(np.float32)]
    planes.append(np.ones_like(found))
    length_um = min(_LENGTH_UM, _LENGTH_FRACTION * at * min(tissue.shape))
    length = round(length_um / at)
    piece = max(1, round(min(_PIECE_UM, length_um / 3) / at))
    height, width = tissue.shape
    side = math.ceil(math.hypot(height, width)) + 2
    for k in range(_ANGLES):
        turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), 180 * k / _ANGLES, 1)
        turn[:, 2] += (side - width) / 2, (side - height) / 2
        turned = [cv2.warpAffine(plane, turn, (side, side)) for plane in planes]
        bands = _horizontal(np.asarray(turned, np.float32), at, piece, length)
        if bands.any():
            back = cv2.warpAffine(bands, turn, (width, height), flags=cv2.WARP_INVERSE_MAP)
            found = np.maximum(found, back)
    return found


def _horizontal(planes: Float, mpp: float, piece: int, length: int) -> Float:
    """Return the contrast of horizontal bands (H, W), at every pixel that they cover.

    `planes` (5, H, W) are relative densities of three channels, tissue, and what is inside the
    image.
    """
    found = np.zeros(planes.shape[1:], np.float32)
    along = np.ones((1, max(1, length - piece + 1)), np.uint8)
    for width_um in _WIDTHS_UM:
        width, beside = round(width_um / mpp), round(min(width_um, _SIDE_UM) / mpp)
        covered = cv2.blur(planes[4], (piece, width)) > _COVERED
        apart = width // 2 + round(_APART_UM / mpp) + beside // 2
        flank = cv2.blur(planes[3], (piece, beside)) > _TISSUE_FRACTION
        covered &= _shifted(flank, apart) & _shifted(flank, -apart)
        if not covered.any():
            continue
        contrast = np.where(covered, np.float32(np.inf), np.float32(0))
        for plane in planes[:3]:
            band, flank = cv2.blur(plane, (piece, width)), cv2.blur(plane, (piece, beside))
            denser = np.maximum(_shifted(flank, apart), _shifted(flank, -apart))
            np.minimum(contrast, band - denser, out=contrast)
        np.maximum(contrast, 0, out=contrast)
        continuous = cv2.erode(contrast, along, borderType=cv2.BORDER_CONSTANT, borderValue=0)
        if continuous.any():
            whole = np.ones((width, length), np.uint8)
            found = np.maximum(found, cv2.dilate(continuous, whole))
    return found


def _shifted(image: npt.NDArray[Any], rows: int) -> npt.NDArray[Any]:
    """Return an image moved down by a number of rows, 0 where nothing is moved to."""
    result = np.zeros_like(image)
    if abs(rows) < len(image):
        if rows >= 0:
            result[rows:] = image[: len(image) - rows]
        else:
            result[:rows] = image[-rows:]
    return result
