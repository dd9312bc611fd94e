"""Trained networks on disk: weights as safetensors, and the JSON beside them on what they are.

Nothing that is read here can run code.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import pickle
import platform
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from hemera.errors import TrainingError
from hemera.io import atomic
from hemera.networks.generation import Generator, build_generator
from hemera.networks.segmentation import SegmentationNet


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        TrainingError: when it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise TrainingError(
            f"{path}: cannot be read ({error.strerror}); run the stage that makes it"
        ) from error


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write weights as safetensors, in one step."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with atomic.replacing(path) as temporary:
        safetensors.torch.save_file(state, temporary, metadata={"format": "pt"})


def read_weights(
    path: Path,
    *,
    missing: str = "run the stage that makes it",
    remedy: str = "delete it and make it again",
) -> dict[str, Any]:
    """Read a safetensors file, or a torch file from which nothing but tensors and numbers is read.

    Args:
        path: the file.
        missing: remedy where there is none.
        remedy: remedy where it is none of weights.

    Raises:
        TrainingError: when it cannot be read, is damaged, or would run code.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise TrainingError(f"{path}: no such file; {missing}") from None
    except pickle.UnpicklingError as error:
        raise TrainingError(
            f"{path}: damaged, or not plain weights: what holds more than numbers could run code "
            f"and is not read; {remedy}"
        ) from error
    # What torch makes of a file of something else depends on its first bytes.
    except (
        safetensors.SafetensorError, struct.error, RuntimeError, EOFError, OSError, ValueError,
        LookupError, TypeError, AttributeError, ArithmeticError, MemoryError,
    ) as error:  # fmt: skip
        raise TrainingError(
            f"{path}: damaged, or not plain weights ({brief(error)}); {remedy}"
        ) from error
    if not isinstance(state, dict):
        raise TrainingError(
            f"{path}: holds a {type(state).__name__}, not the weights of a network; {remedy}"
        )
    return state


def brief(error: BaseException) -> str:
    """Return the beginning of what an error says, on one line."""
    words = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):
        words = f"{words} is missing"
    return words if len(words) <= 200 else words[:197] + "..."


def load_into(module: nn.Module, weights: Mapping[str, Any], subject: str) -> None:
    """Load weights that must fit exactly.

    Raises:
        TrainingError: naming the layers that differ.
    """
    own = module.state_dict()
    faults = [f"{name} is missing" for name in own if name not in weights]
    faults += [f"{name} is not known" for name in weights if name not in own]
    for name in own:
        if name not in weights:
            continue
        found = weights[name]
        if not isinstance(found, Tensor):
            faults.append(f"{name} is a {type(found).__name__}, wanted numbers")
        elif found.shape != own[name].shape:
            faults.append(f"{name} is {tuple(found.shape)}, wanted {tuple(own[name].shape)}")
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise TrainingError(
            f"{subject}: does not fit the network: {', '.join(faults[:5])}{more}; "
            "use the options it was made with"
        )
    module.load_state_dict(dict(weights))


def versions() -> dict[str, str]:
    """Return the versions of what computed the weights."""
    packages = ("torch", "torchvision", "numpy", "safetensors")
    try:
        own = importlib.metadata.version("hemera")
    except importlib.metadata.PackageNotFoundError:
        own = "not installed"
    return {
        "hemera": own,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def check_index(network: str, described: Mapping[str, Any], fingerprint: str) -> None:
    """Hold that a network was trained on this index: another one may hold its test tiles.

    Raises:
        TrainingError: naming both indexes.
    """
    own = str(described.get("index_fingerprint"))
    if own != fingerprint:
        raise TrainingError(
            f"{network}: trained on the index {own[:12]}, and this one is {fingerprint[:12]}, so "
            "its test tiles may be training tiles; train on this index, or name the other one"
        )


def write_metadata(path: Path, metadata: Mapping[str, Any]) -> None:
    """Write the JSON beside the weights, in one step."""
    atomic.write_text(path, json.dumps(metadata, indent=2, sort_keys=True) + "\n")


def read_metadata(path: Path, network: str) -> dict[str, Any]:
    """Read the JSON beside the weights of `network`.

    Raises:
        TrainingError: when it is missing, damaged, or of another network.
    """
    try:
        metadata = json.loads(path.read_text())
    except FileNotFoundError:
        raise TrainingError(f"{path}: no such file; it lies beside the weights") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path}: not JSON ({error}); train again") from error
    if not isinstance(metadata, dict) or metadata.get("network") != network:
        raise TrainingError(f"{path}: does not describe a network for {network}; name its own file")
    return metadata


def load_generation(weights: Path, metadata: Path) -> tuple[Generator, dict[str, Any]]:
    """Return a trained generator in evaluation mode, and its metadata.

    Raises:
        TrainingError: when a file is missing or damaged, or they do not fit each other.
    """
    described = read_metadata(metadata, "generation")
    with _building(metadata):
        net = build_generator(**described["model"])
    load_into(net, read_weights(weights), str(weights))
    return net.eval(), described


def load_segmentation(weights: Path, metadata: Path) -> tuple[SegmentationNet, dict[str, Any]]:
    """Return a trained SegmentationNet, its frozen branch included, and its metadata.

    Raises:
        TrainingError: when a file is missing or damaged, or they do not fit each other.
    """
    described = read_metadata(metadata, "segmentation")
    with _building(metadata):
        model = dict(described["model"])
        branch = model.pop("generation")
        net = SegmentationNet(None if branch is None else build_generator(**branch), **model)
    load_into(net, read_weights(weights), str(weights))
    return net.eval(), described


@contextlib.contextmanager
def _building(metadata: Path) -> Iterator[None]:
    """Turn what a network's description from elsewhere may raise into an error that names it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise TrainingError(
            f"{metadata}: does not say how its network is built ({brief(error)}); name the file "
            "that was written beside the weights, or train again"
        ) from error
