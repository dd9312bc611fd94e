"""Nuclei by number from two maps: how near a pixel is to a centre, and whether it is inside."""

import math

import cv2
import numpy as np
import numpy.typing as npt

from hemera.errors import EngineError
from hemera.imaging.morphology import disc, fill_holes, merged

Labels = npt.NDArray[np.int32]
Numbers = npt.NDArray[np.uint16]
Map = npt.NDArray[np.uint8]

# Smallest value of a maximum of the map of centres, and of the map of insides: out of 255. Chosen
# leaving one source of real images out at a time; see docs/how-to/masks.md.
_CENTRE_MIN = 0.25
_INSIDE_MIN = 0.30
# Smallest distance between two centres, and standard deviation of the blur of their map, um.
_SEPARATION_UM = 4.0
_BLUR_UM = 0.6
# Largest hole that is filled, um^2.
_HOLE_UM2 = 8.0
_CROSS = np.asarray(cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3)), np.uint8)
# Values of the map of centres down to which nuclei grow, one after the other, and their largest
# radius, um.
_LEVELS = (0.7, 0.45, 0.25, 0.1, 0.0)
_GROWTH_UM = 12.0
# Two maxima belong to one nucleus where the map between them falls by less than this.
_SADDLE_MIN = 0.9


def numbered(
    centre: Map,
    inside: Map,
    mpp: float,
    centre_min: float = _CENTRE_MIN,
    inside_min: float = _INSIDE_MIN,
    area_min_um2: float = 0.0,
) -> Labels:
    """Return nuclei (H, W), numbered from 1 without gaps, each one piece, from both maps.

    Each maximum of the map of centres is a nucleus. From there it grows within the insides, down
    the map of centres in steps, until it meets another.

    Args:
        centre: (H, W), 0 to 255.
        inside: (H, W), 0 to 255.
        mpp: their resolution, um/px.
        centre_min: smallest value of a maximum, 0 to 1.
        inside_min: smallest value inside of a nucleus, 0 to 1.
        area_min_um2: smallest area of a nucleus.
    """
    # In integers, so that the blur is exact.
    wide = centre.astype(np.uint16) * np.uint16(256)
    ridge = np.asarray(cv2.GaussianBlur(wide, (0, 0), max(_BLUR_UM / mpp, 0.5)), np.uint16)
    mask = _filled(inside, mpp, inside_min)
    peaks = ridge >= cv2.dilate(ridge, disc(_SEPARATION_UM, mpp))
    peaks &= (ridge >= 255 * 256 * centre_min) & (mask > 0)
    count, found = cv2.connectedComponents(peaks.view(np.uint8))
    markers = np.asarray(found, np.int32)
    # OpenCV grows numbers of 16 bits.
    if count > np.iinfo(np.uint16).max:
        raise EngineError(
            f"more than {np.iinfo(np.uint16).max} nuclei on a tile; use smaller tiles"
        )
    labels = _grown(markers.astype(np.uint16), ridge, mask, _GROWTH_UM / mpp)
    peak = np.zeros(count, np.uint16)
    np.maximum.at(peak, markers[peaks], ridge[peaks])
    labels = merged(labels, ridge, peak, _SADDLE_MIN)
    area = np.bincount(labels.ravel(), minlength=count)
    kept = (area > 0) & (area * mpp**2 >= area_min_um2)
    kept[0] = False
    numbers = np.where(kept, np.cumsum(kept), 0).astype(np.int32)
    return np.take(numbers, labels, mode="clip")


def _filled(inside: Map, mpp: float, inside_min: float) -> Map:
    """Return the insides (H, W), 0 or 1, without small holes; the map is filled there, too."""
    mask = (inside >= 255 * inside_min).view(np.uint8)
    before = mask.copy()
    fill_holes(mask, _HOLE_UM2 / mpp**2)
    inside[mask > before] = 255
    return mask


def _grown(labels: Numbers, ridge: Numbers, mask: Map, reach_px: float) -> Numbers:
    """Grow numbered markers within a mask, first where the ridge is high; all (H, W)."""
    steps = max(2, math.ceil(reach_px / len(_LEVELS)))
    for level in _LEVELS:
        allowed = mask & (ridge >= 255 * 256 * level).view(np.uint8)
        for _ in range(steps):
            # Of two that meet, the higher number takes the pixel.
            around = cv2.dilate(labels, _CROSS)
            cv2.copyTo(around, allowed & (labels == 0).view(np.uint8), labels)
    return labels


def enlarged(
    labels: Labels, inside: Map, shape: tuple[int, int], inside_min: float = _INSIDE_MIN
) -> Labels:
    """Return nuclei (H, W) in another size, with the outline of the enlarged map of insides."""
    numbers = labels.astype(np.uint16)
    # A pixel further, because the outline is between pixels.
    around = cv2.dilate(numbers, _CROSS)
    cv2.copyTo(around, (numbers == 0).view(np.uint8), numbers)
    size = shape[::-1]
    near = cv2.resize(numbers, size, interpolation=cv2.INTER_NEAREST_EXACT)
    smooth = cv2.resize(inside, size, interpolation=cv2.INTER_LINEAR)
    return np.asarray(near * (smooth >= 255 * inside_min), np.int32)
