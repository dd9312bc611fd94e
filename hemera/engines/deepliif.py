"""DeepLIIF as the HEMERA paper uses it, through its own package.

DeepLIIF (Ghahremani et al., Nat Mach Intell 4, 2022) was trained for nuclear markers; on HER2's
membranes its cells are an extrapolation, which the engine `stain` is there to check.

The model directory is the user's (Zenodo record 4751737). Serialized networks (`G1.pt` ...) are
TorchScript and run what their maker wrote: name a directory you trust. Raw networks
(`latest_net_G1.pth` ...) are read as weights only.

A tile is looked at in windows of the size that DeepLIIF scales to 512 px. Its BatchNorm uses the
statistics of what it sees at once, so windows are never batched as they are; raw networks can be,
once every BatchNorm is an instance normalisation with the same weights.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import hashlib
import io
import logging
import os
import pickle
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from hemera import masks
from hemera.config import MaskOptions
from hemera.engines import stain
from hemera.errors import EngineError

logger = logging.getLogger(__name__)

RECORD = "Zenodo record 4751737 (DeepLIIF_Latest_Model.zip)"
_REMEDY = f"unpack {RECORD} there"
_MODALITIES = 4
_TILE_40X = 512
_MPP_40X = 0.25
_VARIANCE_MIN = 9.0
"""Below this variance of gray DeepLIIF answers with a constant image."""

_Place = tuple[int, int]


class Model:
    """A DeepLIIF model in memory, and what turns its answer into labels."""

    def __init__(self, options: MaskOptions) -> None:
        """Load the model once.

        Args:
            options: model directory, weights of the segmentations, thresholds, device, threads.

        Raises:
            EngineError: when the directory is missing or incomplete, holds something else than a
                DeepLIIF model, or the device is not there.
        """
        if options.deepliif_model is None:
            raise EngineError(
                f"mask.deepliif_model: not given; download {RECORD} and name its directory, "
                "or set mask.engines [stain] and mask.target stain"
            )
        self._folder = Path(options.deepliif_model)
        self._raw = check_model(self._folder)
        if options.deepliif_sha256 is not None:
            check_digest(self._folder, options.deepliif_sha256)
        self._options = options
        self._package, self._postprocessing = _package()
        import torch

        torch.set_num_threads(options.torch_threads)
        if options.device == "cuda" and not torch.cuda.is_available():
            raise EngineError("mask.device: cuda, and PyTorch sees no GPU; set auto or cpu")
        on_gpu = options.device != "cpu" and torch.cuda.is_available()
        try:
            with _quiet():
                # The package keeps the object it returns.
                self._opt = copy.copy(self._package.get_opt(str(self._folder)))
                self._opt.gpu_ids = [0] if on_gpu else []
                # Raw networks: the package assumes 64 whatever was trained.
                self._opt.ngf = self._trained_width()
                self._check_kind()
                self._networks = self._package.init_nets(str(self._folder), self._raw, self._opt)
        except (
            AttributeError,
            EOFError,
            KeyError,
            OSError,
            RuntimeError,
            TypeError,
            ValueError,
            pickle.UnpicklingError,
        ) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise EngineError(
                f"{self._folder}: not a DeepLIIF model that can be loaded ({reason[0]}); {_REMEDY}"
            ) from error
        # What is serialized cannot be altered.
        self._batch = options.deepliif_batch if self._raw else 1
        if self._batch > 1:
            for network in self._networks.values():
                by_instance(network)
        elif options.deepliif_batch > 1:
            logger.warning(
                "mask.deepliif_batch: %s holds serialized networks, which are never batched",
                self._folder,
            )
        names = list(self._opt.modalities_names)
        self._marker = f"G{names.index('Marker')}" if "Marker" in names else None
        if self._marker is None and options.deepliif_marker is not None:
            raise EngineError(
                f"mask.deepliif_marker: {options.deepliif_marker}, and {self._folder} names no "
                f"modality Marker; set none, or {_REMEDY}"
            )

    def segment(
        self, rgb: npt.NDArray[np.uint8], mpp: float, stains: stain.Stains
    ) -> masks.Labelled:
        """Label one HER2 tile.

        Class and sign are DeepLIIF's own; a boundary is the pixel around its cells. DAB
        intensity, and the membrane of every cell, are measured on the tile as engine `stain` does.

        Args:
            rgb: (H, W, 3) uint8.
            mpp: its resolution, um/px; sets the magnification.
            stains: of its pair, for the DAB intensity.

        Returns:
            An empty mask with the note ``blank`` for a tile of one colour.
        """
        if is_blank(rgb):
            return masks.blank((rgb.shape[0], rgb.shape[1]), "blank")
        seg, marker = self.infer(rgb, mpp)
        options = self._options
        labels, cells, defaults = self._postprocessing.get_cells_info(
            seg,
            marker,
            resolution(tile_size(mpp)),
            self._postprocessing.DEFAULT_NOISE_THRESH,
            options.deepliif_threshold,
            None,
        )
        smallest = (
            defaults["size_thresh"]
            if options.deepliif_size_px is None
            else options.deepliif_size_px
        )
        self._postprocessing.create_cell_classification(
            labels, cells, smallest, options.deepliif_marker
        )
        return self._labelled(labels, cells, rgb, mpp, stains)

    def infer(
        self, rgb: npt.NDArray[np.uint8], mpp: float
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8] | None]:
        """Return DeepLIIF's segmentation and marker images of a tile, (H, W, 3) uint8 each.

        The package's `inference`, window by window, but that one it comes to twice (at the edge of
        a tile that its step does not divide) is looked at once. The marker is None for a model that
        names none.

        Raises:
            EngineError: when the networks load and cannot be run.
        """
        import dask
        from PIL import Image

        size = tile_size(mpp)
        tiler = self._package.InferenceTiler(Image.fromarray(rgb), size, size // 16)
        windows: dict[_Place, Any] = {}
        for window in tiler:
            windows[tiler.x, tiler.y] = window
        # One network after the other: threads of dask would each bring threads of their own.
        try:
            with _quiet(), dask.config.set(scheduler="synchronous"):
                seen = self._answers(windows)
        except (RuntimeError, TypeError, ValueError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise EngineError(
                f"{self._folder}: its networks cannot be run on a tile ({reason[-1]}); {_REMEDY}, "
                "or set mask.device cpu if the GPU's memory was too small"
            ) from error
        for _ in tiler:
            tiler.stitch(seen[tiler.x, tiler.y])
        images = tiler.results()
        seg = np.asarray(images[f"G{self._opt.mod_id_seg}"], np.uint8)
        return seg, None if self._marker is None else np.asarray(images[self._marker], np.uint8)

    def _answers(self, windows: dict[_Place, Any]) -> dict[_Place, dict[str, Any]]:
        """Return what the networks make of every window (PIL images): images, by network."""
        package, opt = self._package, self._opt
        asked: dict[str, Any] = {
            "eager_mode": self._raw,
            "opt": opt,
            "seg_only": True,
            "seg_weights": list(self._options.deepliif_seg_weights),
        }
        result: dict[_Place, dict[str, Any]] = {}
        together = []
        for place, window in windows.items():
            if self._batch > 1 and not package.is_empty(window):
                together.append(place)
            else:
                result[place] = package.run_wrapper(
                    window, package.run_dask, str(self._folder), **asked
                )
        import torch

        for start in range(0, len(together), self._batch):
            places = together[start : start + self._batch]
            side = (opt.scale_size, opt.scale_size)
            batch = torch.cat([package.transform(windows[place].resize(side)) for place in places])
            images = package.run_dask(batch, nets=self._networks, output_tensor=True, **asked)
            for row, place in enumerate(places):
                result[place] = {
                    name: package.tensor_to_pil(image[row : row + 1].cpu())
                    for name, image in images.items()
                }
        return result

    def _labelled(
        self,
        labels: npt.NDArray[np.uint8],
        found: Any,
        rgb: npt.NDArray[np.uint8],
        mpp: float,
        stains: stain.Stains,
    ) -> masks.Labelled:
        """Turn the package's label image and list of cells into HEMERA's."""
        names = self._postprocessing
        table = np.zeros(256, np.uint8)
        table[names.LABEL_NEGATIVE] = masks.NEGATIVE
        table[names.LABEL_POSITIVE] = masks.POSITIVE
        table[[names.LABEL_BORDER_POS, names.LABEL_BORDER_NEG]] = masks.BOUNDARY
        classes = table[labels]
        inside = (classes == masks.NEGATIVE) | (classes == masks.POSITIVE)
        # The package marks the first pixel of a cell as boundary: its place in the list.
        filled = inside.astype(np.uint8)
        first = np.array([(cell[3], cell[4]) for cell in found], np.int64).reshape(-1, 2)
        border = classes[first[:, 1], first[:, 0]] == masks.BOUNDARY
        first = first[border]
        filled[first[:, 1], first[:, 0]] = 1
        count, pieces = cv2.connectedComponents(filled, connectivity=8)
        number = np.zeros(count, np.int32)
        number[pieces[first[:, 1], first[:, 0]]] = np.arange(1, len(first) + 1)
        nuclei: npt.NDArray[np.int32] = number[pieces]
        dab, membrane = stain.membranes(stain.separate(rgb, stains), mpp, stains, self._options)
        _, cells = stain.measure(stain.territories(nuclei), membrane, mpp, self._options)
        negative = np.bincount(nuclei.ravel(), classes.ravel() == masks.NEGATIVE, len(cells) + 1)
        positive: npt.NDArray[np.bool_] = negative[1:] == 0
        return masks.Labelled(
            masks.pack(classes, inside, dab),
            masks.Cells(
                cells.x_px,
                cells.y_px,
                cells.area_px,
                positive,
                cells.intensity,
                cells.completeness,
            ),
        )

    def _trained_width(self) -> int:
        """Return the width that the options file of the model names, or the package's 64."""
        for name in _OPTION_FILES:
            path = self._folder / name
            if path.is_file():
                match = re.search(r"^\s*ngf:\s*(\d+)", path.read_text(), flags=re.MULTILINE)
                if match:
                    return int(match[1])
        return 64

    def _check_kind(self) -> None:
        opt = self._opt
        if opt.model not in ("DeepLIIF", "DeepLIIFKD") or not opt.seg_gen:
            raise EngineError(
                f"{self._folder}: a model of kind {opt.model} without DeepLIIF's segmentation; "
                f"{_REMEDY}"
            )
        if opt.modalities_no != _MODALITIES:
            raise EngineError(
                f"{self._folder}: a model of {opt.modalities_no} modalities; HEMERA needs the "
                f"published one of {_MODALITIES}, {_REMEDY}"
            )


def by_instance(network: Any) -> None:
    """Replace, in place, every BatchNorm of a network by instance normalisation, weights kept.

    On one image both are the same formula: mean and variance over its pixels. On a batch only the
    latter keeps the images apart.
    """
    import torch

    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is torch.nn.BatchNorm2d:
                own = torch.nn.InstanceNorm2d(child.num_features, child.eps, affine=child.affine)
                if child.affine:
                    own.weight, own.bias = child.weight, child.bias
                setattr(module, name, own.train(child.training))


def tile_size(mpp: float) -> int:
    """Return the pixels that DeepLIIF scales to 512 at a resolution: 512 at 40x, 256 at 20x."""
    return max(1, round(_TILE_40X * _MPP_40X / mpp))


def resolution(size: int) -> str:
    """Return the magnification class DeepLIIF's thresholds go by for a tile size."""
    return "40x" if size > 384 else ("20x" if size > 192 else "10x")


def is_blank(rgb: npt.NDArray[np.uint8]) -> bool:
    """Say whether a tile is one that DeepLIIF does not look at: gray of nearly one value."""
    gray = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    seen = gray[(gray != 0) & (gray != 255)]
    return seen.size == 0 or float(np.var(seen, dtype=np.float64)) < _VARIANCE_MIN


_OPTION_FILES = ("test_opt.txt", "train_opt.txt")


def check_package() -> None:
    """Check that DeepLIIF can be imported.

    Raises:
        EngineError: when it cannot.
    """
    _package()


def check_model(folder: Path) -> bool:
    """Check a model directory without loading it.

    Returns:
        Whether its networks are raw (`latest_net_G1.pth` ...) rather than serialized.

    Raises:
        EngineError: naming what is missing, or an options file that would run code.
    """
    if not folder.is_dir():
        raise EngineError(f"mask.deepliif_model: {folder} is no directory; {_REMEDY}")
    present = {path.name for path in folder.iterdir()}
    raw = not any(re.fullmatch(r"G\w+\.pt", name) for name in present) and any(
        re.fullmatch(r"\w+_net_G\w+\.pth", name) for name in present
    )
    pattern = r"\w+_net_(G\w+)\.pth" if raw else r"(G\w+)\.pt"
    names = {match[1] for name in present if (match := re.fullmatch(pattern, name))}
    # Newer models call the segmentation S and count from the input, 0; the published one 5 and 1.
    letter = "S" if any(name.startswith("GS") for name in names) else "5"
    start = 0 if f"G{letter}0" in names else 1
    wanted = [f"G{k}" for k in range(1, _MODALITIES + 1)]
    wanted += [f"G{letter}{k}" for k in range(start, start + _MODALITIES + 1)]
    missing = [
        f"latest_net_{name}.pth" if raw else f"{name}.pt" for name in wanted if name not in names
    ]
    if not present & set(_OPTION_FILES):
        missing.append("train_opt.txt")
    if missing:
        raise EngineError(
            f"{folder}: an incomplete DeepLIIF model, lacks {', '.join(missing)}; {_REMEDY}"
        )
    for name in sorted(present & set(_OPTION_FILES)):
        _check_options_file(folder / name)
    return raw


def digest(folder: Path) -> str:
    """Return the SHA-256 over a model's networks: of each, by name, its name and its SHA-256."""
    state = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".pt", ".pth")):
        with path.open("rb") as file:
            own = hashlib.file_digest(file, "sha256").hexdigest()
        state.update(f"{own}  {path.name}\n".encode())
    return state.hexdigest()


def check_digest(folder: Path, wanted: str) -> None:
    """Hold a model's networks to their digest, before anything of them is loaded.

    Raises:
        EngineError: naming both, when they differ.
    """
    found = digest(folder)
    if found != wanted.lower():
        raise EngineError(
            f"{folder}: its networks have the SHA-256 {found}, and mask.deepliif_sha256 is "
            f"{wanted}; {_REMEDY}, or mend the digest"
        )


def _check_options_file(path: Path) -> None:
    """Refuse an options file that would run code: DeepLIIF evaluates its values as Python."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"{path}: not a text file ({error}); {_REMEDY}") from error
    for line in lines:
        key, colon, value = line.partition(":")
        value = re.sub(r"\[default.+?\]", "", value).strip()
        if colon and not _is_harmless(value):
            raise EngineError(
                f"{path}: the value of {key.strip()} is code, not an option; {_REMEDY}"
            )


def _is_harmless(value: str) -> bool:
    try:
        tree = ast.parse(value, mode="eval").body
    except (SyntaxError, ValueError):
        return True  # DeepLIIF takes for text what Python cannot read
    if isinstance(tree, ast.Constant) and isinstance(tree.value, str):
        return _is_harmless(tree.value)  # evaluated once more
    plain = (
        ast.Constant,
        ast.Name,
        ast.List,
        ast.Tuple,
        ast.Dict,
        ast.Set,
        ast.UnaryOp,
        ast.BinOp,
        ast.operator,
        ast.unaryop,
        ast.expr_context,
    )
    return all(isinstance(node, plain) for node in ast.walk(tree))


def _package() -> tuple[types.ModuleType, types.ModuleType]:
    """Import DeepLIIF; its whole-slide readers, which HEMERA does not use, are stood in for."""
    for name in ("bioformats", "bioformats.omexml", "javabridge"):
        sys.modules.setdefault(name, types.ModuleType(name))
    # It would override the directory that the configuration names.
    if os.environ.pop("DEEPLIIF_MODEL_DIR", None) is not None:
        logger.warning("DEEPLIIF_MODEL_DIR is set and not heeded; mask.deepliif_model counts")
    try:
        with _quiet():
            from deepliif import models, postprocessing
    except ImportError as error:
        raise EngineError(
            f"deepliif: the package cannot be imported ({error}); install requirements.lock, or "
            "set mask.engines [stain] and mask.target stain"
        ) from error
    return models, postprocessing


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Send what the package prints to the log."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    finally:
        for line in said.getvalue().splitlines():
            logger.debug("deepliif: %s", line)
