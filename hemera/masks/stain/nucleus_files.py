"""The weights that option `nuclei` of the engine `stain` names, checked by their headers."""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import zipfile
from pathlib import Path

from hemera.errors import EngineError
from hemera.files.faults import translated

AUTO, CLASSICAL, NETWORK = "auto", "classical", "network"
"""Values of the option that are not the name of a file."""

SHIPPED = Path(__file__).with_name("nuclei.safetensors")
"""Weights of the network that come with the package."""


def is_instanseg(nuclei: str) -> bool:
    """Return whether a value of the option names a model of InstanSeg."""
    return nuclei not in (CLASSICAL, NETWORK) and Path(nuclei).suffix != ".safetensors"


def weights_file(nuclei: str) -> Path:
    """Return the file of the network or of InstanSeg."""
    return SHIPPED if nuclei == NETWORK else Path(nuclei)


def requirements(nuclei: str) -> list[str]:
    """Return what is missing to find nuclei so, each with its remedy."""
    if nuclei == CLASSICAL:
        return []
    subject = "mask.engines.stain.nuclei"
    missing = [
        f"{subject}: {nuclei} needs {package}, which is not installed; run "
        f"`pip install hemera[{extra}]`, or set {CLASSICAL}"
        for package, extra in _packages(nuclei)
        if importlib.util.find_spec(package) is None
    ]
    fault = "" if missing else _fault(weights_file(nuclei))
    if fault:
        missing.append(
            f"{subject}: {nuclei!r}: {fault}; give {AUTO}, {NETWORK}, {CLASSICAL}, weights of "
            "`hemera train-nuclei`, or a TorchScript model of InstanSeg"
        )
    return missing


def _fault(file: Path) -> str:
    """Return what is wrong with a file of weights, as far as its header shows."""
    if not file.is_file():
        return "a folder, not a file" if file.is_dir() else "no such file"
    if file.suffix == ".safetensors":
        return _network_fault(file)
    if not zipfile.is_zipfile(file):
        return "not a TorchScript model"
    with zipfile.ZipFile(file) as archive:
        # A file of plain tensors is such an archive too, without code.
        code = any("/code/" in name for name in archive.namelist())
    return "" if code else "not a TorchScript model"


def _network_fault(file: Path) -> str:
    from safetensors import SafetensorError, safe_open

    shapes = []
    for each in (SHIPPED, file):
        try:
            with safe_open(each, "numpy") as weights:
                # Not a dictionary: it is not iterable itself.
                names = sorted(weights.keys())
                shapes.append({name: weights.get_slice(name).get_shape() for name in names})
        except (OSError, SafetensorError) as error:
            return f"cannot be read ({' '.join(str(error).split())})"
    return "" if shapes[0] == shapes[1] else "weights of another network"


def _packages(nuclei: str) -> list[tuple[str, str]]:
    """Return the packages that are needed, each with the extra that installs it."""
    if is_instanseg(nuclei):
        return [("torch", "train"), ("instanseg", "instanseg")]
    return [("torch", "train"), ("safetensors", "train")]


def versions(nuclei: str) -> dict[str, str]:
    """Return the digest of the weights, and the version of InstanSeg; nothing without a network.

    Raises:
        EngineError: when they cannot be read.
    """
    if nuclei == CLASSICAL:
        return {}
    found = {"stain_nuclei_sha256": _digest(weights_file(nuclei))}
    if is_instanseg(nuclei):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found["instanseg"] = importlib.metadata.version("instanseg-torch")
    return found


@functools.cache
def _digest(path: Path) -> str:
    with translated(EngineError, f"{path}: cannot be read ({{error}})"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
