"""DeepLIIF's networks applied to tiles; the only module that imports its package.

A tile is split into windows of the size that DeepLIIF scales to 512 px. Its BatchNorm uses the
statistics of its batch, so windows are never batched.
"""

import ast
import contextlib
import dataclasses
import io
import logging
import os
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from hemera.config import MaskOptions
from hemera.errors import EngineError
from hemera.files.faults import translated
from hemera.imaging.color import Color
from hemera.masks import label_format
from hemera.masks.deepliif import Options, versions
from hemera.masks.deepliif.model_files import (
    MODALITIES,
    OPTION_FILES,
    PACKAGE_REMEDY,
    REMEDY,
    check_model,
)
from hemera.masks.stain.membranes import find_membranes, measure_cells
from hemera.masks.stain.nuclei import Nuclei
from hemera.masks.stain.stains import Stains, estimate, separate

logger = logging.getLogger(__name__)

RGB = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

# Side of the window that DeepLIIF was trained on, px, and its resolution, um/px.
_WINDOW_PX = 512
_WINDOW_MPP = 0.25


class DeepliifEngine:
    """A DeepLIIF model in memory; see `hemera.masks.engine`."""

    def __init__(self, options: Options, shared: MaskOptions) -> None:
        """Load the model; EngineError without it or the device."""
        self._folder, self._raw = check_model(options.model)
        self.versions = versions(options)
        self._options, self._shared = options, shared
        self._package, self._postprocessing = import_deepliif()
        import torch

        torch.set_num_threads(options.torch_threads)
        if options.device == "cuda" and not torch.cuda.is_available():
            raise EngineError(
                "mask.engines.deepliif.device: cuda, but PyTorch finds no GPU; set auto or cpu"
            )
        on_gpu = options.device != "cpu" and torch.cuda.is_available()
        failure = f"{self._folder}: not a DeepLIIF model that can be loaded ({{error}}); {REMEDY}"
        with translated(EngineError, failure), _quiet():
            self._opt = _package_options(self._package, self._folder)
            self._opt.gpu_ids = [0] if on_gpu else []
            # The package caches them by these arguments and requests them again for every window.
            self._package.init_nets(str(self._folder), self._raw, self._opt)
            has_marker = list(self._opt.modalities_names)[MODALITIES:] == ["Marker"]
        self._marker = f"G{MODALITIES}" if has_marker else None
        if self._marker is None and options.marker is not None:
            raise EngineError(
                f"mask.engines.deepliif.marker: {options.marker}, but {self._folder} has no "
                f"modality Marker; set none, or {REMEDY}"
            )

    def prepare(
        self,
        tiles: Sequence[RGB],
        mpp: float,
        background: Color | None = None,
        excluded: Sequence[Mask | None] = (),
    ) -> Stains:
        """Return the stains of a pair, by which DAB intensity is measured."""
        return estimate(tiles, mpp, background, excluded)

    def segment(
        self, rgb: RGB, mpp: float, state: Stains, excluded: Mask | None = None
    ) -> label_format.Labelled:
        """Label one HER2 tile; a tile of one colour has an empty mask and the note ``blank``.

        Class and sign are DeepLIIF's own; a boundary is the pixel around its cells. The class
        of the membranes is measured as in the engine `stain`, without `excluded` pixels. `mpp` sets
        the magnification.
        """
        if self._package.is_empty(Image.fromarray(rgb)):
            return label_format.blank((rgb.shape[0], rgb.shape[1]), "blank")
        seg, marker = self.infer(rgb, mpp)
        options, package = self._options, self._postprocessing
        labels, found, defaults = package.get_cells_info(
            seg,
            marker,
            magnification(window_px(mpp)),
            package.DEFAULT_NOISE_THRESH,
            options.threshold,
            None,
        )
        size_px = defaults["size_thresh"] if options.size_px is None else options.size_px
        package.create_cell_classification(labels, found, size_px, options.marker)
        classes, inside, nuclei = self._nuclei(labels, found)
        separated = separate(rgb, state)
        if excluded is not None:
            separated[excluded] = 0
        membranes = find_membranes(separated, mpp, state, self._shared)
        _, cells = measure_cells(Nuclei.from_labels(nuclei), membranes, mpp, self._shared)
        negative = np.bincount(
            nuclei.ravel(), classes.ravel() == label_format.NEGATIVE, len(cells) + 1
        )
        return label_format.Labelled(
            label_format.pack(classes, inside, membranes.classes),
            dataclasses.replace(cells, positive=np.asarray(negative[1:] == 0)),
        )

    def infer(self, rgb: RGB, mpp: float) -> tuple[RGB, RGB | None]:
        """Return DeepLIIF's segmentation and marker images of a tile, (H, W, 3) uint8 each.

        As the package's `inference`, except that a window which it visits twice (at the edge of a
        tile that its step does not divide) is inferred once. The marker is None for a model that
        has none. EngineError when the networks cannot be run or return values that are not finite.
        """
        import dask

        package, size = self._package, window_px(mpp)
        tiler = package.InferenceTiler(Image.fromarray(rgb), size, size // 16)
        inferred: dict[tuple[int, int], Any] = {}
        failure = (
            f"{self._folder}: its networks cannot be run on a tile ({{error}}); {REMEDY}, or set "
            "mask.engines.deepliif.device cpu if the GPU's memory was too small"
        )
        with (
            translated(EngineError, failure),
            _quiet(),
            # One network after the other: threads of dask would each start threads of their own.
            dask.config.set(scheduler="synchronous"),
            # The package casts NaN to a gray level.
            np.errstate(invalid="raise"),
        ):
            for window in tiler:
                place = tiler.x, tiler.y
                if place not in inferred:
                    inferred[place] = package.run_wrapper(
                        window,
                        package.run_dask,
                        str(self._folder),
                        eager_mode=self._raw,
                        opt=self._opt,
                        seg_only=True,
                        seg_weights=list(self._options.seg_weights),
                    )
                tiler.stitch(inferred[place])
        images = tiler.results()
        seg = np.asarray(images[f"G{self._opt.mod_id_seg}"], np.uint8)
        return seg, None if self._marker is None else np.asarray(images[self._marker], np.uint8)

    def _nuclei(
        self, labels: npt.NDArray[np.uint8], found: Any
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_], npt.NDArray[np.int32]]:
        """Return classes, insides and numbered nuclei of the package's label image and cells."""
        names = self._postprocessing
        table = np.zeros(256, np.uint8)
        table[names.LABEL_NEGATIVE] = label_format.NEGATIVE
        table[names.LABEL_POSITIVE] = label_format.POSITIVE
        table[[names.LABEL_BORDER_POS, names.LABEL_BORDER_NEG]] = label_format.BOUNDARY
        classes = table[labels]
        inside = (classes == label_format.NEGATIVE) | (classes == label_format.POSITIVE)
        # The package marks the first pixel of a cell, its place in the list, as boundary.
        filled = inside.astype(np.uint8)
        first = np.array([(cell[3], cell[4]) for cell in found], np.int64).reshape(-1, 2)
        first = first[classes[first[:, 1], first[:, 0]] == label_format.BOUNDARY]
        filled[first[:, 1], first[:, 0]] = 1
        count, pieces = cv2.connectedComponents(filled, connectivity=8)
        number = np.zeros(count, np.int32)
        number[pieces[first[:, 1], first[:, 0]]] = np.arange(1, len(first) + 1)
        return classes, inside, number[pieces]


def window_px(mpp: float) -> int:
    """Return the pixels that DeepLIIF scales to 512 at a resolution: 512 at 40x, 256 at 20x."""
    return max(1, round(_WINDOW_PX * _WINDOW_MPP / mpp))


def magnification(size: int) -> str:
    """Return the magnification that selects DeepLIIF's thresholds for a window size."""
    return "40x" if size > 384 else ("20x" if size > 192 else "10x")


def _package_options(package: types.ModuleType, folder: Path) -> Any:
    """Return the package's options of a model, whose values it would run as Python code."""
    from deepliif import options as theirs

    # Not the cached function, which may return another file of this name.
    read = package.get_opt.__wrapped__
    with mock.patch.object(theirs, "eval", ast.literal_eval, create=True):
        made = read(str(folder))
        path = next(folder / name for name in OPTION_FILES if (folder / name).exists())
        # For raw networks, the package always assumes 64.
        made.ngf = theirs.read_model_params(path).get("ngf", made.ngf)
    # Part of the names of files.
    made.epoch = "latest"
    return made


def import_deepliif() -> tuple[types.ModuleType, types.ModuleType]:
    """Import DeepLIIF with empty modules in place of its whole-slide readers."""
    for name in ("bioformats", "bioformats.omexml", "javabridge"):
        sys.modules.setdefault(name, types.ModuleType(name))
    # It would override the directory that the configuration names.
    os.environ.pop("DEEPLIIF_MODEL_DIR", None)
    failure = f"deepliif: the package cannot be imported ({{error}}); {PACKAGE_REMEDY}"
    with translated(EngineError, failure), _quiet():
        from deepliif import models, postprocessing
    return models, postprocessing


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Send what the package prints to the log."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        for line in printed.getvalue().splitlines():
            logger.debug("deepliif: %s", line)
