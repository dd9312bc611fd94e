"""Untrained networks on disk, as the training stages leave theirs, and histories of no epoch."""

import json
from pathlib import Path

import torch

from hemera import tables
from hemera.networks import storage
from hemera.networks.generation import build_generator, initialise
from hemera.networks.segmentation import SegmentationNet
from hemera.training import session

MODEL = {"generator": "unet_128", "base_width": 4}


def write_generator(
    folder: Path, fingerprint: str = "f" * 64, model: dict[str, object] = MODEL
) -> dict[str, Path]:
    """Write a generator; return the paths under the names that stages give them."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = build_generator(**model)
        initialise(net)
    paths = {
        "generator": folder / "generator.safetensors",
        "generator_metadata": folder / "generator.json",
    }
    described = {"network": "generation", "model": model, "index_fingerprint": fingerprint}
    storage.write_weights(paths["generator"], net.state_dict())
    storage.write_metadata(paths["generator_metadata"], described)
    return paths


def write_networks(folder: Path, fingerprint: str = "f" * 64) -> dict[str, Path]:
    """Write both networks and their histories."""
    paths = write_generator(folder, fingerprint)
    branch, _ = storage.load_generation(paths["generator"], paths["generator_metadata"])
    with torch.random.fork_rng():
        torch.manual_seed(2)
        net = SegmentationNet(branch, False, 8)
    model = {"generation": MODEL, "generation_skips": False, "base_width": 8}
    described = {"network": "segmentation", "model": model, "index_fingerprint": fingerprint}
    paths |= {
        "segmenter": folder / "segmenter.safetensors",
        "segmenter_metadata": folder / "segmenter.json",
        "generation_history": folder / "generation.parquet",
        "segmentation_history": folder / "segmentation.parquet",
    }
    storage.write_weights(paths["segmenter"], net.state_dict())
    storage.write_metadata(paths["segmenter_metadata"], described)
    for name in ("generation", "segmentation"):
        tables.write(paths[f"{name}_history"], [], tables.HISTORY)
    return paths


def write_segmenter_folder(folder: Path, **metadata: object) -> Path:
    """Write the output of train_segmentation: a network whose results vary; tiles of 256 px."""
    paths = write_networks(folder / "networks")
    # Untrained, it returns nearly the same for everything.
    weights = storage.read_weights(paths["segmenter"])
    weights["decoder.head.weight"] *= 3000
    storage.write_weights(folder / "segmenter.safetensors", weights)
    described = json.loads(paths["segmenter_metadata"].read_text())
    described |= {"mpp": 0.5, "tile_px": 256, **metadata}
    storage.write_metadata(
        folder / "metadata.json",
        {key: value for key, value in described.items() if value is not None},
    )
    return folder


def cpu_compute(precision: torch.dtype = torch.float32) -> session.Compute:
    """Return the compute of a single rank on the processor."""
    return session.Compute(torch.device("cpu"), precision=precision)
