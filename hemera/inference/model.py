"""A trained SegmentationNet, loaded to be applied to slides."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.utils import convert_conv2d_weight_memory_format

from hemera.errors import ConfigError, TrainingError
from hemera.networks import storage
from hemera.networks.segmentation import SegmentationNet
from hemera.training.session import PRECISIONS, to_unit

RGB = npt.NDArray[np.uint8]
Float = npt.NDArray[np.float32]

TILE_SIDE_PX = 512
"""Tile size of a model whose metadata does not state one: the paper's."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A network and the tiles it was trained on."""

    segment: Callable[[RGB], Float]
    """Takes tiles (B, H, W, 3), returns the probability of HER2-positive (B, H, W)."""
    tile_px: int
    """Side of its training tiles."""
    mpp: float
    """Resolution of its training tiles: the median."""
    mpp_max: float
    """Resolution of the coarsest of them."""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Its fingerprint, mask engine, versions and options, for the JSON of a prediction."""


def load_model(
    folder: Path, device: torch.device, precision: str = "float32", mpp: float | None = None
) -> Model:
    """Load a trained SegmentationNet.

    Args:
        folder: the output of train_segmentation, with segmenter.safetensors and metadata.json.
        device: where it computes.
        precision: one of `hemera.training.session.PRECISIONS`.
        mpp: resolution of its training tiles, where its metadata does not state it.

    Raises:
        TrainingError: when there is none, it is damaged, or its resolution is unknown.
        ConfigError: for a precision that the device does not have.
    """
    if precision != "float32" and device.type != "cuda":
        raise ConfigError(f"--precision {precision}: needs a GPU; give float32 on a CPU")
    if not folder.is_dir():
        raise TrainingError(f"{folder}: no such folder; name the output of train_segmentation")
    weights, metadata = folder / "segmenter.safetensors", folder / "metadata.json"
    net, described = storage.load_segmentation(weights, metadata)
    own: float | None = described.get("mpp")
    if own is None and mpp is None:
        raise TrainingError(
            f"{metadata}: no resolution of the training tiles; give --model-mpp, or train again"
        )
    if own is not None and mpp is not None:
        raise ConfigError(f"--model-mpp {mpp:g}: the model's metadata states {own:g}; leave it out")
    trained_mpp = own or mpp or math.nan
    net.requires_grad_(False).to(device)
    convert_conv2d_weight_memory_format(net, torch.channels_last)
    names = ("index_fingerprint", "mask_engine", "versions", "options")
    return Model(
        _segment(net, device, PRECISIONS[precision]),
        # Trained on whole tiles or on crops of them, it was validated on whole ones.
        described.get("tile_px") or TILE_SIDE_PX,
        trained_mpp,
        max(described.get("mpp_max") or 0.0, trained_mpp),
        {
            "weights_sha256": storage.file_digest(weights),
            "mpp": trained_mpp,
            **{name: described.get(name) for name in names},
        },
    )


def _segment(
    net: SegmentationNet, device: torch.device, precision: torch.dtype
) -> Callable[[RGB], Float]:
    @torch.inference_mode()
    def segment(tiles: RGB) -> Float:
        images = to_unit(torch.from_numpy(tiles).permute(0, 3, 1, 2), device)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits = net(images.contiguous(memory_format=torch.channels_last))
        return np.asarray(torch.sigmoid(logits.float())[:, 0].cpu().numpy(), np.float32)

    return segment
