"""DeepLIIF as the HEMERA paper uses it, through its own package.

DeepLIIF (Ghahremani et al., Nat Mach Intell 4, 2022) was trained for nuclear markers; on HER2's
membranes its cells are an extrapolation, which the engine `stain` is there to check.

The model directory is the user's (Zenodo record 4751737). Serialized networks (`G1.pt` ...) are
TorchScript and run what their maker wrote: name a directory you trust. Raw networks
(`latest_net_G1.pth` ...) are read as weights only, whatever the environment says. The options file
is read here, as plain values: the package would evaluate it as Python.

A tile is looked at in windows of the size that DeepLIIF scales to 512 px. Its BatchNorm uses the
statistics of what it sees at once, so windows are never batched as they are; raw networks can be,
once every BatchNorm is an instance normalisation with the same weights.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import logging
import os
import pickle
import re
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from hemera.config import MaskOptions
from hemera.errors import EngineError
from hemera.masks import label_format
from hemera.masks.stain import stains as stain
from hemera.masks.stain.membranes import dab_classes, measure_cells
from hemera.masks.stain.nuclei import Nuclei

logger = logging.getLogger(__name__)

RECORD = "Zenodo record 4751737 (DeepLIIF_Latest_Model.zip)"
_REMEDY = f"unpack {RECORD} there"
_MODALITIES = 4
_KINDS = ("DeepLIIF", "DeepLIIFKD")
_WIDTH = 64
_VALUE_LENGTH = 4096
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
                "or set mask.engines [stain] and index.target stain"
            )
        self._folder = Path(options.deepliif_model)
        self._raw = check_model(self._folder)
        self.sha256 = digest(self._folder)
        """What `digest` says of what was loaded."""
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
            with _quiet(), _weights_only():
                self._opt = _package_options(self._package, self._folder)
                self._opt.gpu_ids = [0] if on_gpu else []
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
            raise _unloadable(self._folder, reason[0]) from error
        # In the dictionary that the package keeps, for it asks for it again with every window.
        for name, network in self._networks.items():
            self._networks[name] = _watched(self._folder, name, network)
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
    ) -> label_format.Labelled:
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
            return label_format.blank((rgb.shape[0], rgb.shape[1]), "blank")
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
        except (
            AttributeError,
            LookupError,
            OverflowError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
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
    ) -> label_format.Labelled:
        """Turn the package's label image and list of cells into HEMERA's."""
        names = self._postprocessing
        table = np.zeros(256, np.uint8)
        table[names.LABEL_NEGATIVE] = label_format.NEGATIVE
        table[names.LABEL_POSITIVE] = label_format.POSITIVE
        table[[names.LABEL_BORDER_POS, names.LABEL_BORDER_NEG]] = label_format.BOUNDARY
        classes = table[labels]
        inside = (classes == label_format.NEGATIVE) | (classes == label_format.POSITIVE)
        # The package marks the first pixel of a cell as boundary: its place in the list.
        filled = inside.astype(np.uint8)
        first = np.array([(cell[3], cell[4]) for cell in found], np.int64).reshape(-1, 2)
        border = classes[first[:, 1], first[:, 0]] == label_format.BOUNDARY
        first = first[border]
        filled[first[:, 1], first[:, 0]] = 1
        count, pieces = cv2.connectedComponents(filled, connectivity=8)
        number = np.zeros(count, np.int32)
        number[pieces[first[:, 1], first[:, 0]]] = np.arange(1, len(first) + 1)
        nuclei: npt.NDArray[np.int32] = number[pieces]
        dab, membrane = dab_classes(stain.separate(rgb, stains), mpp, stains, self._options)
        _, cells = measure_cells(Nuclei.from_labels(nuclei), membrane, mpp, self._options)
        negative = np.bincount(
            nuclei.ravel(), classes.ravel() == label_format.NEGATIVE, len(cells) + 1
        )
        positive: npt.NDArray[np.bool_] = negative[1:] == 0
        return label_format.Labelled(
            label_format.pack(classes, inside, dab),
            label_format.Cells(
                cells.x_px,
                cells.y_px,
                cells.area_px,
                positive,
                cells.intensity,
                cells.completeness,
            ),
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
    stem = "latest_net_{}.pth" if raw else "{}.pt"
    missing = [stem.format(name) for name in wanted if name not in names]
    if not present & set(_OPTION_FILES):
        missing.append("train_opt.txt")
    if missing:
        raise EngineError(
            f"{folder}: an incomplete DeepLIIF model, lacks {', '.join(missing)}; {_REMEDY}"
        )
    _check_kind(folder, read_options(folder))
    for path in sorted(folder.iterdir()):
        if re.fullmatch(pattern, path.name) and not _is_network(path, raw):
            raise _unloadable(folder, f"{path.name} is no network, or not whole")
    return raw


def _is_network(path: Path, raw: bool) -> bool:
    """Say whether a file ends as a network of PyTorch does, without reading what it holds."""
    try:
        if zipfile.is_zipfile(path):
            return True
        # What old versions of PyTorch saved is a pickle.
        return raw and path.read_bytes()[:1] == b"\x80"
    except OSError:
        return False


def _unloadable(folder: Path, reason: str) -> EngineError:
    return EngineError(f"{folder}: not a DeepLIIF model that can be loaded ({reason}); {_REMEDY}")


def _check_kind(folder: Path, options: dict[str, Any]) -> None:
    """Refuse options of a model that is not DeepLIIF's with four modalities and a segmentation."""
    kind = options.get("model")
    if kind not in _KINDS or not options.get("seg_gen", True):
        raise EngineError(
            f"{folder}: a model of kind {kind} without DeepLIIF's segmentation; {_REMEDY}"
        )
    # Before there were modalities, targets counted the segmentation too.
    count = options.get("modalities_no")
    if count is None and isinstance(options.get("targets_no"), int):
        count = options["targets_no"] - 1
    if type(count) is not int or count != _MODALITIES:
        raise EngineError(
            f"{folder}: a model of {count} modalities; HEMERA needs the "
            f"published one of {_MODALITIES}, {_REMEDY}"
        )
    if options.get("input_no", 1) != 1:
        raise _unloadable(folder, "it looks at more images than one")
    names = options.get("modalities_names", [])
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise _unloadable(folder, "modalities_names is no list of names")
    if "Marker" in names and names.index("Marker") != _MODALITIES:
        raise _unloadable(folder, "its modality Marker is not the last")
    # It names the files that are read: nothing outside of the folder.
    if not re.fullmatch(r"\w+", str(options.get("epoch", "latest"))):
        raise _unloadable(folder, "its epoch is no name of a file")
    width = options.get("ngf", _WIDTH)
    if type(width) is not int or not 1 <= width <= 1024:
        raise _unloadable(folder, f"ngf is {width}")


def digest(folder: Path) -> str:
    """Return the SHA-256 over a model: of each file, its SHA-256 and its name, as sha256sum does.

    The files are the networks by name, then the options files, which say how they are built.
    """
    state = hashlib.sha256()
    networks = sorted(path for path in folder.iterdir() if path.suffix in (".pt", ".pth"))
    for path in [*networks, *(folder / name for name in _OPTION_FILES)]:
        if path.is_file():
            with path.open("rb") as file:
                own = hashlib.file_digest(file, "sha256").hexdigest()
            state.update(f"{own}  {path.name}\n".encode())
    return state.hexdigest()


def check_digest(folder: Path, wanted: str) -> None:
    """Hold a model to its digest, before anything of them is loaded.

    Raises:
        EngineError: naming both, when they differ.
    """
    found = digest(folder)
    if found != wanted.lower():
        raise EngineError(
            f"{folder}: its files have the SHA-256 {found}, and mask.deepliif_sha256 is "
            f"{wanted}; {_REMEDY}, or mend the digest"
        )


def read_options(folder: Path) -> dict[str, Any]:
    """Read a model's options as plain values: numbers, texts, truths, None and lists of these.

    Lines and defaults are taken apart as the package does; nothing is evaluated.

    Raises:
        EngineError: when the file is no text, or a value is code.
    """
    path = next(folder / name for name in _OPTION_FILES if (folder / name).exists())
    try:
        # Not `splitlines`, which parts lines where Python's files have none.
        lines = path.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"{path}: not a text file ({error}); {_REMEDY}") from error
    found = {}
    for line in lines:
        key, colon, value = line.partition(":")
        for part in re.findall(r"\[.+?\]", value):
            if part.startswith("[default"):
                value = value.replace(part, "")
        key, value = key.strip(), value.strip()
        if not colon or not key.isidentifier() or key.startswith("_"):
            continue
        if len(value) > _VALUE_LENGTH or not _is_plain(value):
            raise EngineError(f"{path}: the value of {key} is code, not an option; {_REMEDY}")
        found[key] = _value(value)
    return found


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, TypeError, ValueError, MemoryError, RecursionError):
        return text  # as the package does with what Python cannot evaluate


def _is_plain(value: str) -> bool:
    """Say whether a value, or the text in it, is anything but an expression that does something."""
    try:
        nodes = list(ast.walk(ast.parse(value, mode="eval").body))
    except (SyntaxError, ValueError):
        return True
    except (MemoryError, RecursionError):
        return False
    plain = (
        ast.Constant,
        ast.Name,
        ast.Attribute,
        ast.List,
        ast.Tuple,
        ast.Dict,
        ast.UnaryOp,
        ast.BinOp,
        ast.operator,
        ast.unaryop,
        ast.expr_context,
    )
    texts = [node.value for node in nodes if isinstance(node, ast.Constant)]
    return (
        all(isinstance(node, plain) for node in nodes)
        and not any(isinstance(text, bytes) for text in texts)
        and all(_is_plain(text) for text in texts if isinstance(text, str) and text != value)
    )


def _package_options(package: types.ModuleType, folder: Path) -> Any:
    """Return the package's options of a model, from what `read_options` found.

    The package reads the file and evaluates every value twice; for this call it is handed the
    values, and its `eval` gives them back as they are.
    """
    from deepliif import options as theirs

    values = read_options(folder)
    names = vars(theirs)
    reader = names["read_model_params"]
    names.update(read_model_params=lambda path: dict(values), eval=lambda value: value)
    try:
        # What it keeps of earlier calls could be of another file of this name.
        made = package.get_opt.__wrapped__(str(folder))
    finally:
        names["read_model_params"] = reader
        del names["eval"]
    # Raw networks: the package assumes 64 whatever was trained.
    made.ngf = values.get("ngf", _WIDTH)
    return made


def _watched(folder: Path, name: str, network: Any) -> Any:
    """Return a network whose answer is held to an image of the size it was given, of numbers.

    Raises:
        EngineError: when the network has no weights.
    """
    import torch

    if next(network.parameters(), None) is None:
        raise _unloadable(folder, f"{name} has no weights")

    def check(module: Any, given: tuple[Any, ...], answer: Any) -> None:
        if not isinstance(answer, torch.Tensor) or answer.shape != given[0].shape:
            what = f"{name} does not answer with an image of the size it was given"
        elif not bool(torch.isfinite(answer).all()):
            what = f"{name} answers with values that are no numbers"
        else:
            return
        raise EngineError(f"{folder}: its networks cannot be run on a tile ({what}); {_REMEDY}")

    # TorchScript itself takes no hook.
    watched = torch.nn.Sequential(network)
    watched.register_forward_hook(check)
    return watched


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Have PyTorch read weights and run nothing, whatever the environment asks of it."""
    anything, weights = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name, None) for name in (anything, weights)}
    os.environ[weights] = "1"
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


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
            "set mask.engines [stain] and index.target stain"
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
