"""Trained networks on disk: safetensors and the JSON beside them; reading runs no code."""

import hashlib
import importlib.metadata
import json
import platform
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from hemera.errors import TrainingError
from hemera.files import atomic, json_text
from hemera.files.faults import translated
from hemera.networks.encoders import published_weights
from hemera.networks.generation import Generator, build_generator
from hemera.networks.segmentation import SegmentationNet

UNBUILDABLE = (
    "{}: does not describe how its network is built ({{error}}); name the file that was written "
    "beside the weights, or train again"
)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file; raise TrainingError when it cannot be read."""
    with (
        translated(
            TrainingError, f"{path}: cannot be read ({{error}}); run the stage that makes it"
        ),
        path.open("rb") as file,
    ):
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_weights(
    path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write weights as safetensors, atomically.

    Args:
        path: the file.
        weights: by name.
        metadata: of the file; more than one entry is written in any order.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with atomic.replacing(path) as temporary:
        # safetensors makes files that only their owner may read; others use networks too.
        temporary.touch()
        mode = temporary.stat().st_mode
        safetensors.torch.save_file(state, temporary, dict(metadata or {"format": "pt"}))
        temporary.chmod(mode)


def read_weights(
    path: Path,
    *,
    missing: str = "run the stage that makes it",
    remedy: str = "delete it and make it again",
) -> dict[str, Any]:
    """Read a safetensors file, or a torch file of which only tensors and plain values are read."""
    if not path.is_file():
        raise TrainingError(f"{path}: no such file; {missing}")
    with translated(
        TrainingError,
        f"{path}: damaged, or not plain weights, and only those are read ({{error}}); {remedy}",
    ):
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        if zipfile.is_zipfile(path):
            # PyTorch writes checksums into its archives, but does not compare them.
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"{damaged} has another checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise TrainingError(
            f"{path}: contains a {type(state).__name__}, not the weights of a network; {remedy}"
        )
    return state


def load_into(module: nn.Module, weights: Mapping[str, Any], subject: str) -> None:
    """Load weights that must fit exactly and be finite; raise TrainingError naming the layers."""
    for name, value in weights.items():
        if isinstance(value, Tensor) and not bool(value.isfinite().all()):
            raise TrainingError(
                f"{subject}: {name} contains values that are not finite; fetch it or train again"
            )
    with translated(
        TrainingError,
        f"{subject}: does not fit the network ({{error}}); use the options it was made with",
    ):
        module.load_state_dict(dict(weights))


def load_published(network: nn.Module, state: Mapping[str, Any], subject: str) -> None:
    """Load published weights, but for their classifier, into a network of timm without one.

    TrainingError where they are of another network.
    """
    with translated(
        TrainingError, f"{subject}: of another network ({{error}}); name the file of this one"
    ):
        own = published_weights(network, state)
    load_into(network, own, subject)


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
    """Raise TrainingError unless a network was trained on this index."""
    own = str(described.get("index_fingerprint"))
    if own != fingerprint:
        raise TrainingError(
            f"{network}: trained on the index {own[:12]}, and this one is {fingerprint[:12]}, so "
            "its test tiles may be training tiles; train on this index, or name its own"
        )


def write_metadata(path: Path, metadata: Mapping[str, Any], weights: Path | None = None) -> None:
    """Write the JSON beside the weights atomically; with their digest where they are given."""
    described = dict(metadata)
    if weights is not None:
        described["weights_sha256"] = file_digest(weights)
    atomic.write_text(path, json.dumps(described, indent=2, sort_keys=True) + "\n")


def read_metadata(path: Path, network: str) -> dict[str, Any]:
    """Read the JSON beside the weights of `network`; raise TrainingError when it is of another."""
    if not path.is_file():
        raise TrainingError(f"{path}: no such file; it is written beside the weights")
    with translated(TrainingError, f"{path}: not JSON ({{error}}); train again"):
        metadata = json_text.loads(path.read_text())
    if not isinstance(metadata, dict) or metadata.get("network") != network:
        raise TrainingError(f"{path}: does not describe a network for {network}; name its own file")
    return metadata


def read_encoder_config(weights: Path) -> dict[str, Any] | None:
    """Return the config.json beside an encoder's weights, None without one, or TrainingError."""
    path = weights.parent / "config.json"
    if not path.is_file():
        return None
    with translated(TrainingError, f"{path}: not JSON ({{error}}); correct or remove it"):
        config = json_text.loads(path.read_text())
    if not isinstance(config, dict):
        raise TrainingError(f"{path}: not a mapping of names; correct or remove it")
    return config


def background_is_white(described: Mapping[str, Any]) -> bool:
    """Return whether a network is for images over white, divided by their backgrounds."""
    return bool(described.get("options", {}).get("normalise_background", False))


def check_digest(weights: Path, described: Mapping[str, Any]) -> None:
    """Raise TrainingError where weights are not those that their metadata describe."""
    expected = described.get("weights_sha256")
    if expected is not None and weights.is_file() and file_digest(weights) != expected:
        raise TrainingError(
            f"{weights}: differs from its SHA-256 in the metadata beside it; delete both and train "
            "again, or fetch both again"
        )


def load_generation(weights: Path, metadata: Path) -> tuple[Generator, dict[str, Any]]:
    """Return a trained generator in evaluation mode, and its metadata, or raise TrainingError."""
    described = read_metadata(metadata, "generation")
    with translated(TrainingError, UNBUILDABLE.format(metadata)):
        net = build_generator(**described["model"])
    check_digest(weights, described)
    load_into(net, read_weights(weights), str(weights))
    return net.eval(), described


def load_segmentation(weights: Path, metadata: Path) -> tuple[SegmentationNet, dict[str, Any]]:
    """Return a trained SegmentationNet in evaluation mode, and its metadata, or TrainingError."""
    described = read_metadata(metadata, "segmentation")
    with translated(TrainingError, UNBUILDABLE.format(metadata)):
        model = dict(described["model"])
        branch = model.pop("generation")
        net = SegmentationNet(None if branch is None else build_generator(**branch), **model)
    check_digest(weights, described)
    load_into(net, read_weights(weights), str(weights))
    return net.eval(), described
