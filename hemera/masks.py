"""The label byte: class, nucleus and DAB intensity of every pixel in one 8-bit image.

Bits 0-1 hold the class (0 background, 1 negative cell, 2 positive cell, 3 cell boundary), bit 2
the nucleus, bits 3-4 the DAB intensity (0 to 3). Bits 5-7 are zero.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

BACKGROUND, NEGATIVE, POSITIVE, BOUNDARY = range(4)

_NUCLEUS_SHIFT = 2
_INTENSITY_SHIFT = 3
_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=np.uint8)


def pack(
    classes: npt.NDArray[np.integer],
    nucleus: npt.NDArray[np.bool_],
    intensity: npt.NDArray[np.integer],
) -> npt.NDArray[np.uint8]:
    """Return the label image of three images of the same shape.

    Args:
        classes: (H, W), 0 background, 1 negative cell, 2 positive cell, 3 boundary.
        nucleus: (H, W), true inside a nucleus.
        intensity: (H, W), 0 none, 1 weak, 2 moderate, 3 strong.

    Raises:
        ValueError: when the shapes differ or a value does not fit its two bits.
    """
    if not classes.shape == nucleus.shape == intensity.shape:
        raise ValueError(
            f"classes, nucleus, intensity: shapes {classes.shape}, {nucleus.shape}, "
            f"{intensity.shape} differ; give images of one shape"
        )
    for name, values in (("classes", classes), ("intensity", intensity)):
        if values.size and (int(values.min()) < 0 or int(values.max()) > 3):
            raise ValueError(f"{name}: values outside 0 to 3; give one of four")
    mask = classes.astype(np.uint8)
    mask |= nucleus.astype(np.uint8) << _NUCLEUS_SHIFT
    mask |= intensity.astype(np.uint8) << _INTENSITY_SHIFT
    return mask


def classes(mask: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return the class of every pixel, (H, W) uint8: 0 to 3."""
    return mask & np.uint8(3)


def nuclei(mask: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Return the nuclear mask, (H, W) bool."""
    bits: npt.NDArray[np.bool_] = (mask & np.uint8(1 << _NUCLEUS_SHIFT)) != 0
    return bits


def intensity(mask: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return the DAB intensity of every pixel, (H, W) uint8: 0 to 3."""
    return (mask >> np.uint8(_INTENSITY_SHIFT)) & np.uint8(3)


def positive(mask: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Return the HER2-positive mask, (H, W) bool: positive cells with their boundary.

    A boundary pixel belongs to a positive cell when one of its eight neighbours is of class 2;
    where a positive and a negative cell meet, their common boundary counts as positive.
    """
    labels = classes(mask)
    inside: npt.NDArray[np.bool_] = labels == POSITIVE
    if not inside.any():
        return inside
    near = cv2.dilate(inside.astype(np.uint8), _EIGHT_NEIGHBOURS).astype(bool)
    inside |= near & (labels == BOUNDARY)
    return inside
