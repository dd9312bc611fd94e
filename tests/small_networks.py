"""Untrained networks on disk, as the training stages leave theirs, and histories of no epoch."""

import json
from pathlib import Path

import torch

from hemera import tables
from hemera.files import layout
from hemera.networks import storage
from hemera.networks.encoders import timm_network
from hemera.networks.generation import build_generator, initialise
from hemera.networks.segmentation import SegmentationNet
from hemera.training import session

MODEL = {"generator": "unet_128", "base_width": 4}


def write_generator(
    results: Path,
    fingerprint: str = "f" * 64,
    model: dict[str, object] = MODEL,
    name: str = "demo",
    normalise_background: bool = False,
) -> dict[str, Path]:
    """Write a generator; return the paths under the names that stages give them."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = build_generator(**model)
        initialise(net)
    paths = {
        "generator": layout.path(layout.GENERATOR, results, generator=name),
        "generator_metadata": layout.path(layout.GENERATOR_METADATA, results, generator=name),
    }
    described = {"network": "generation", "model": model, "index_fingerprint": fingerprint}
    described["options"] = {"normalise_background": normalise_background}
    storage.write_weights(paths["generator"], net.state_dict())
    storage.write_metadata(paths["generator_metadata"], described)
    history = layout.path(layout.GENERATION_HISTORY, results, generator=name)
    tables.write(history, [], tables.HISTORY)
    return paths


def write_networks(results: Path, fingerprint: str = "f" * 64) -> dict[str, Path]:
    """Write both networks and their histories."""
    paths = write_generator(results, fingerprint)
    branch, _ = storage.load_generation(paths["generator"], paths["generator_metadata"])
    with torch.random.fork_rng():
        torch.manual_seed(2)
        net = SegmentationNet(branch, False, 8)
    model = {"generation": MODEL, "generation_skips": False, "base_width": 8}
    described = {"network": "segmentation", "model": model, "index_fingerprint": fingerprint}
    paths |= {
        "segmenter": layout.path(layout.SEGMENTER, results),
        "segmenter_metadata": layout.path(layout.SEGMENTER_METADATA, results),
        "segmentation_history": layout.path(layout.SEGMENTATION_HISTORY, results),
    }
    storage.write_weights(paths["segmenter"], net.state_dict())
    storage.write_metadata(paths["segmenter_metadata"], described)
    tables.write(paths["segmentation_history"], [], tables.HISTORY)
    return paths


def write_segmenter_folder(results: Path, **metadata: object) -> Path:
    """Write the output of train_segmentation: a network whose results vary; tiles of 256 px."""
    paths = write_networks(results)
    # Untrained, it returns nearly the same for everything.
    weights = storage.read_weights(paths["segmenter"])
    weights["decoder.head.weight"] *= 3000
    storage.write_weights(paths["segmenter"], weights)
    described = json.loads(paths["segmenter_metadata"].read_text())
    described |= {"mpp": 0.5, "mpp_max": 0.5, "tile_px": 256, **metadata}
    storage.write_metadata(paths["segmenter_metadata"], described)
    return paths["segmenter"].parent


def cpu_compute(precision: torch.dtype = torch.float32, compile: bool = False) -> session.Compute:
    """Return the compute of a single rank on the processor."""
    return session.Compute(torch.device("cpu"), precision=precision, compile=compile)


def write_published(folder: Path) -> torch.nn.Module:
    """Write a folder as on the Hugging Face Hub; return its tiny network, of random weights."""
    torch.manual_seed(3)
    arguments = {"img_size": 64, "patch_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}
    net: torch.nn.Module = timm_network("vit_tiny_patch16_224", arguments)
    folder.mkdir()
    state = {**net.state_dict(), "head.weight": torch.zeros(3, 24), "head.bias": torch.zeros(3)}
    storage.write_weights(folder / "model.safetensors", state)
    used = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.25] * 3}
    config = {"architecture": "vit_tiny_patch16_224", "model_args": arguments}
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": used}))
    return net.eval()
