"""The engine `stain`: one HER2 tile labelled from its two stains."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from hemera.config import MaskOptions
from hemera.imaging.color import Color
from hemera.masks import label_format
from hemera.masks.stain import Options, detectors, versions
from hemera.masks.stain.membranes import find_membranes, measure_cells
from hemera.masks.stain.nuclear_marker import measure_nuclei, nuclear_stain
from hemera.masks.stain.nuclei import Nuclei, Tile
from hemera.masks.stain.stains import Stains, estimate, separate

RGB = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

# A tile finer than three quarters of this is segmented at this resolution, um/px, at which nuclei
# and membranes are resolved.
_WORKING_MPP = 0.5

# Fraction of the DAB above moderate staining that is subtracted from haematoxylin before nuclei are
# segmented: dark brown absorbs in all channels, and its separation leaves some haematoxylin.
_BROWN = np.float32(0.2)


@dataclasses.dataclass(frozen=True)
class StainEngine:
    """Thresholds of nuclei and, shared by all engines, of DAB; see `hemera.masks.engine`."""

    options: Options
    shared: MaskOptions

    @functools.cached_property
    def versions(self) -> Mapping[str, str]:
        """See `hemera.masks.engine.EngineModule.versions`."""
        return versions(self.options)

    @functools.cached_property
    def find(self) -> Callable[[Tile], Nuclei]:
        """What finds nuclei; EngineError when its weights or its package are missing."""
        return detectors.load(self.options)

    def prepare(
        self,
        tiles: Sequence[RGB],
        mpp: float,
        background: Color | None = None,
        excluded: Sequence[Mask | None] = (),
    ) -> Stains:
        """Return the stains of a pair."""
        return estimate(tiles, mpp, background, excluded)

    def segment(
        self, rgb: RGB, mpp: float, state: Stains, excluded: Mask | None = None
    ) -> label_format.Labelled:
        """Label one HER2 tile.

        A tile finer than 0.375 um/px is segmented at 0.5 um/px, and its labels are resampled to its
        own grid.

        Args:
            rgb: (H, W, 3) uint8.
            mpp: its resolution, um/px.
            state: stains of its pair.
            excluded: pixels (H, W) that belong to no cell.
        """
        height, width = rgb.shape[:2]
        work, work_mpp = rgb, mpp
        if mpp < 0.75 * _WORKING_MPP:
            size = tuple(max(1, round(side * mpp / _WORKING_MPP)) for side in (width, height))
            work = np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), np.uint8)
            work_mpp = mpp * math.sqrt(width * height / math.prod(size))
            if excluded is not None:
                excluded = _nearest(excluded, *size)
        separated = separate(work, state)
        if excluded is not None:
            separated[excluded] = 0
        labels, stained, grown, cells = self._cells(work, separated, work_mpp, state, excluded)
        positive = cells.intensity >= self.options.positive_intensity_min
        cells = dataclasses.replace(cells, positive=positive)
        if work is not rgb:
            labels, stained, grown = (
                _nearest(image, width, height) for image in (labels, stained, grown)
            )
            cells = dataclasses.replace(
                cells,
                x_px=cells.x_px * np.float32(width / size[0]),
                y_px=cells.y_px * np.float32(height / size[1]),
                area_px=np.bincount(labels.ravel(), minlength=len(cells) + 1)[1:].astype(np.int32),
            )
        mask = label_format.pack(_classes(grown, positive), labels > 0, stained)
        return label_format.Labelled(mask, cells, state.note)

    def _cells(
        self,
        rgb: RGB,
        separated: npt.NDArray[np.float32],
        mpp: float,
        state: Stains,
        excluded: npt.NDArray[np.bool_] | None,
    ) -> tuple[
        npt.NDArray[np.int32], npt.NDArray[np.uint8], npt.NDArray[np.int32], label_format.Cells
    ]:
        """Return the nuclei, staining and cells of a tile (H, W), and the table of the cells."""
        options, shared = self.options, self.shared
        tile = Tile(rgb, mpp, state, self._nuclear_stain(separated), excluded)
        nuclei = self.find(tile)
        if options.compartment == "nucleus":
            return nuclei.labels, *measure_nuclei(nuclei, separated, mpp, state, options, shared)
        membranes = find_membranes(separated, mpp, state, shared)
        grown, cells = measure_cells(nuclei, membranes, mpp, shared)
        return nuclei.labels, membranes.classes, grown, cells

    def _nuclear_stain(self, separated: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the density (H, W) that nuclei are found in."""
        if self.options.compartment == "nucleus":
            return nuclear_stain(separated)
        haematoxylin, dab = (cv2.extractChannel(separated, k) for k in (0, 1))
        brown = np.maximum(dab - np.float32(self.shared.dab_moderate), 0)
        return np.asarray(haematoxylin - _BROWN * brown, np.float32)


def _nearest(image: npt.NDArray[Any], width: int, height: int) -> npt.NDArray[Any]:
    """Return an image (H, W) resampled to another size without interpolation."""
    rows, columns = (
        np.minimum((np.arange(full) + 0.5) * (side / full), side - 1).astype(int)
        for full, side in zip((height, width), image.shape, strict=True)
    )
    return np.ascontiguousarray(image[rows][:, columns])


def _classes(
    cells: npt.NDArray[np.int32], positive: npt.NDArray[np.bool_]
) -> npt.NDArray[np.uint8]:
    """Return the class image (H, W) of numbered cells: class inside, boundary around."""
    inside = np.where(positive, label_format.POSITIVE, label_format.NEGATIVE)
    of = np.concatenate([[label_format.BACKGROUND], inside]).astype(np.uint8)
    image = np.take(of, cells, mode="clip")
    np.putmask(image, label_format.boundaries(cells), label_format.BOUNDARY)
    return image
