"""What finds nuclei for the engine `stain`: a network, thresholds, or a model of InstanSeg."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hemera.errors import EngineError
from hemera.masks.stain import Options, nucleus_files
from hemera.masks.stain.nuclei import Nuclei, find_nuclei
from hemera.masks.stain.stains import Stains

Mask = npt.NDArray[np.bool_]


class Detector(Protocol):
    """Finds the nuclei of one tile."""

    def find(
        self,
        rgb: npt.NDArray[np.uint8],
        haematoxylin: npt.NDArray[np.float32],
        mpp: float,
        stains: Stains,
        excluded: Mask | None,
    ) -> Nuclei:
        """Return the nuclei.

        Args:
            rgb: (H, W, 3) uint8.
            haematoxylin: (H, W), its density of haematoxylin.
            mpp: resolution of both, um/px.
            stains: of its pair.
            excluded: (H, W), pixels that belong to no nucleus.
        """


@dataclasses.dataclass(frozen=True)
class Classical:
    """Thresholds of the density of haematoxylin, see `find_nuclei`."""

    options: Options

    def find(
        self,
        rgb: npt.NDArray[np.uint8],
        haematoxylin: npt.NDArray[np.float32],
        mpp: float,
        stains: Stains,
        excluded: Mask | None,
    ) -> Nuclei:
        """Return the nuclei, see `Detector`."""
        return find_nuclei(haematoxylin, mpp, stains.nuclear_density, self.options, excluded)


def load(options: Options) -> Detector:
    """Return what finds nuclei with these options.

    Raises:
        EngineError: when its weights or its package are missing or unusable.
    """
    named = options.nuclei
    if named == nucleus_files.CLASSICAL:
        return Classical(options)
    missing = nucleus_files.requirements(named)
    if missing:
        raise EngineError("\n".join(missing))
    if nucleus_files.is_instanseg(named):
        from hemera.masks.stain.instanseg import InstanSegDetector

        return InstanSegDetector(Path(named), options)
    from hemera.masks.stain.network import NetworkDetector

    return NetworkDetector(nucleus_files.weights_file(named), options)
