"""The label byte: class, nucleus and DAB intensity of every pixel in one 8-bit image.

Bits 0-1 are the class (0 background, 1 negative cell, 2 positive cell, 3 cell boundary), bit 2
the nucleus, bits 3-4 the DAB intensity (0 to 3) of the membranes or, for a nuclear marker, of the
nuclei, bit 5 an excluded pixel: an artefact or a place that HER2 does not cover, of which nothing
is known. Its other bits are zero, as are bits 6-7.
"""

import dataclasses
import math

import cv2
import numpy as np
import numpy.typing as npt

from hemera.masks.her2_score import h_scores

BACKGROUND, NEGATIVE, POSITIVE, BOUNDARY = range(4)

_NUCLEUS_SHIFT = 2
_INTENSITY_SHIFT = 3
_EXCLUDED = np.uint8(1 << 5)
_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=np.uint8)


@dataclasses.dataclass(frozen=True)
class Cells:
    """The cells of one tile, one entry per cell in every array; cell k of the table is entry k - 1.

    `x_px` and `y_px` are the centroid of the nucleus in the tile (pixel edges at integers),
    `area_px` its pixels, `intensity` the DAB class 0 to 3 of the membrane around it, and
    `completeness` the stained fraction of that membrane. `membrane_od` is the optical density of
    DAB that the membrane adds to `cytoplasm_od`, that of diffuse staining beside it; `nucleus_od`
    is that of the nucleus; NaN where an engine does not measure it.
    """

    x_px: npt.NDArray[np.float32]
    y_px: npt.NDArray[np.float32]
    area_px: npt.NDArray[np.int32]
    positive: npt.NDArray[np.bool_]
    intensity: npt.NDArray[np.uint8]
    completeness: npt.NDArray[np.float32]
    membrane_od: npt.NDArray[np.float32]
    cytoplasm_od: npt.NDArray[np.float32]
    nucleus_od: npt.NDArray[np.float32]

    def __len__(self) -> int:
        """Return the number of cells."""
        return len(self.x_px)


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Result of an engine for one tile: label image (H, W) uint8, its cells, a note or None."""

    mask: npt.NDArray[np.uint8]
    cells: Cells
    note: str | None = None


def statistics(labelled: Labelled) -> dict[str, float | int | None]:
    """Return the measured columns of a row of `tables.MASK`, fractions of all pixels."""
    mask, cells = labelled.mask, labelled.cells
    pixels = np.bincount(intensity(mask).ravel(), minlength=4) / mask.size
    strength = np.bincount(cells.intensity, minlength=4)
    return {
        "nucleus_fraction": float(nuclei(mask).mean()),
        "positive_fraction": float(positive(mask).mean()),
        "weak_fraction": float(pixels[1]),
        "moderate_fraction": float(pixels[2]),
        "strong_fraction": float(pixels[3]),
        "excluded_fraction": float(excluded(mask).mean()),
        "cells": len(cells),
        "positive_cells": int(cells.positive.sum()),
        "weak_cells": int(strength[1]),
        "moderate_cells": int(strength[2]),
        "strong_cells": int(strength[3]),
        "h_score": float(h_scores(strength[None])[0]) if len(cells) else None,
        "membrane_od": _mean(cells.membrane_od),
        "cytoplasm_od": _mean(cells.cytoplasm_od),
    }


def _mean(values: npt.NDArray[np.float32]) -> float | None:
    """Return the mean of the values of all cells; None without cells, or where one is NaN."""
    mean = float(values.mean(dtype=np.float64)) if len(values) else math.nan
    return None if math.isnan(mean) else mean


def blank(shape: tuple[int, int], note: str | None = None) -> Labelled:
    """Return the result for a tile (H, W) without cells: an empty mask."""
    nothing = Cells(
        np.zeros(0, np.float32),
        np.zeros(0, np.float32),
        np.zeros(0, np.int32),
        np.zeros(0, np.bool_),
        np.zeros(0, np.uint8),
        *(np.zeros(0, np.float32),) * 4,
    )
    return Labelled(np.zeros(shape, np.uint8), nothing, note)


def exclude(labelled: Labelled, where: npt.NDArray[np.bool_]) -> Labelled:
    """Return a result without what is at the pixels (H, W) of `where`.

    Cells with their centroid there are left out.
    """
    cells = labelled.cells
    rows, columns = (
        np.clip(centre.astype(np.int64), 0, side - 1)
        for centre, side in zip((cells.y_px, cells.x_px), where.shape, strict=True)
    )
    kept = ~where[rows, columns]
    return dataclasses.replace(
        labelled,
        mask=np.where(where, _EXCLUDED, labelled.mask),
        cells=Cells(**{name: values[kept] for name, values in vars(cells).items()}),
    )


def boundaries(labels: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    """Return the contours of labelled cells, (H, W) bool: one pixel wide, inside the cells.

    A pixel is on a contour when one of its four neighbours has a smaller label, 0 included:
    so between two cells that touch, one side only is contour; the edge of the image is not.
    Labels are at most 65535.
    """
    numbers = labels.astype(np.uint16)
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    contour: npt.NDArray[np.bool_] = cv2.erode(numbers, cross) < numbers
    return contour


def pack(
    classes: npt.NDArray[np.integer],
    nucleus: npt.NDArray[np.bool_],
    intensity: npt.NDArray[np.integer],
) -> npt.NDArray[np.uint8]:
    """Return the label image (H, W) of three images; classes and intensities are from 0 to 3."""
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


def excluded(mask: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Return the excluded pixels, (H, W) bool, which losses and metrics ignore."""
    bits: npt.NDArray[np.bool_] = (mask & _EXCLUDED) != 0
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
