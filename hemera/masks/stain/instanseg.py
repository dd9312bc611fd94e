"""Nuclei by a TorchScript model of InstanSeg, through its own package.

InstanSeg: Goldsborough et al. (arXiv 2408.15954), Apache-2.0; the models are those of QuPath.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from hemera.errors import EngineError
from hemera.files.faults import translated
from hemera.imaging.morphology import detached_pixels
from hemera.masks.stain import Options
from hemera.masks.stain.nuclei import Nuclei, Tile

_REMEDY = "give a TorchScript model of InstanSeg (instanseg.pt) for brightfield images"


class InstanSegDetector:
    """A model of InstanSeg."""

    def __init__(self, model: Path, options: Options) -> None:
        """Load the model.

        Raises:
            EngineError: when the file is not a model of InstanSeg.
        """
        self._model = model
        self._area_um2 = options.nucleus_area_min_um2, options.nucleus_area_max_um2
        with translated(EngineError, f"{model}: not a TorchScript model ({{error}}); {_REMEDY}"):
            script = torch.jit.load(str(model), map_location="cpu").eval()
        for name in ("pixel_size", "cells_and_nuclei"):
            if not hasattr(script, name):
                raise EngineError(f"{model}: a TorchScript model without {name}; {_REMEDY}")
        from instanseg import InstanSeg

        with translated(EngineError, f"{model}: InstanSeg cannot use it ({{error}}); {_REMEDY}"):
            self._instanseg = InstanSeg(script, device="cpu", verbosity=0)

    def find(self, tile: Tile) -> Nuclei:
        """Return the nuclei of a tile; InstanSeg normalises its colours."""
        failure = f"{self._model}: InstanSeg failed on a tile ({{error}}); {_REMEDY}"
        with translated(EngineError, failure), torch.inference_mode():
            instances = self._instanseg.eval_small_image(
                tile.rgb, pixel_size=tile.mpp, target="nuclei", return_image_tensor=False
            )
            found = instances.reshape(instances.shape[-2:]).numpy().astype(np.int32)
        if tile.excluded is not None:
            found[tile.excluded] = 0
        return Nuclei.from_labels(_plausible(found, tile.mpp, self._area_um2))


def _plausible(
    found: npt.NDArray[np.int32], mpp: float, area_um2: tuple[float, float]
) -> npt.NDArray[np.int32]:
    """Return numbered nuclei (H, W) of plausible area, without gaps in their numbers."""
    count = int(found.max(initial=0)) + 1
    present = np.bincount(found.ravel(), minlength=count) > 0
    detached = detached_pixels(found, int(present[1:].sum()))
    if detached is not None:
        found[detached] = 0
    area = np.bincount(found.ravel(), minlength=count) * mpp**2
    kept = (area >= area_um2[0]) & (area <= area_um2[1])
    kept[0] = False
    return np.where(kept, np.cumsum(kept), 0).astype(np.int32)[found]
