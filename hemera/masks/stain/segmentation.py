"""One HER2 tile labelled by the engine `stain`."""

from __future__ import annotations

import dataclasses
import math

import cv2
import numpy as np
import numpy.typing as npt

from hemera.config import MaskOptions
from hemera.imaging.artefacts import ihc_artefacts
from hemera.masks import label_format
from hemera.masks.stain.membranes import dab_classes, measure_cells
from hemera.masks.stain.nuclei import find_nuclei
from hemera.masks.stain.stains import Stains, separate

# A tile finer than three quarters of this is segmented at this resolution, um/px, at which nuclei
# and membranes are resolved.
_WORKING_MPP = 0.5


def segment(
    rgb: npt.NDArray[np.uint8], mpp: float, stains: Stains, options: MaskOptions
) -> label_format.Labelled:
    """Label one HER2 tile.

    A tile finer than 0.375 um/px is segmented at 0.5 um/px, and its labels are resampled to the
    grid of the tile.

    Args:
        rgb: (H, W, 3) uint8.
        mpp: its resolution, um/px.
        stains: of its pair, see `stains.estimate`.
        options: thresholds.
    """
    height, width = rgb.shape[:2]
    work, work_mpp = rgb, mpp
    if mpp < 0.75 * _WORKING_MPP:
        size = max(1, round(width * mpp / _WORKING_MPP)), max(1, round(height * mpp / _WORKING_MPP))
        work = np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), np.uint8)
        work_mpp = mpp * math.sqrt(width * height / (size[0] * size[1]))
    separated = separate(work, stains)
    excluded = ihc_artefacts(
        work, work_mpp, stains.background, stains.vectors, stains.nuclear_density
    )
    if excluded is not None:
        separated[excluded] = 0
    haematoxylin = np.ascontiguousarray(separated[..., 0])
    nuclei = find_nuclei(haematoxylin, work_mpp, stains.nuclear_density, options, excluded)
    dab, membrane = dab_classes(separated, work_mpp, stains, options)
    grown, cells = measure_cells(nuclei, membrane, work_mpp, options)
    labels = nuclei.labels
    if work is not rgb:
        rows = np.minimum((np.arange(height) + 0.5) * (size[1] / height), size[1] - 1).astype(int)
        columns = np.minimum((np.arange(width) + 0.5) * (size[0] / width), size[0] - 1).astype(int)
        labels, dab, grown = (
            np.ascontiguousarray(image[rows][:, columns]) for image in (labels, dab, grown)
        )
        cells = dataclasses.replace(
            cells,
            x_px=cells.x_px * np.float32(width / size[0]),
            y_px=cells.y_px * np.float32(height / size[1]),
            area_px=np.bincount(labels.ravel(), minlength=len(cells) + 1)[1:].astype(np.int32),
        )
    return label_format.Labelled(
        label_format.pack(_classes(grown, cells.positive), labels > 0, dab),
        cells,
        excluded_fraction=0.0 if excluded is None else float(excluded.mean()),
    )


def _classes(
    cells: npt.NDArray[np.int32], positive: npt.NDArray[np.bool_]
) -> npt.NDArray[np.uint8]:
    """Return the class image (H, W) of numbered cells: class inside, boundary around."""
    inside = np.where(positive, label_format.POSITIVE, label_format.NEGATIVE)
    image = np.concatenate([[label_format.BACKGROUND], inside]).astype(np.uint8)[cells]
    image[label_format.boundaries(cells)] = label_format.BOUNDARY
    return image
