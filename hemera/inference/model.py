"""A trained SegmentationNet, loaded to be applied to slides."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.utils import convert_conv2d_weight_memory_format

from hemera.config import has_demo_sizes
from hemera.errors import ConfigError, TrainingError
from hemera.networks import storage
from hemera.networks.outputs import copied
from hemera.networks.segmentation import SegmentationNet
from hemera.training.session import PRECISIONS, to_unit

RGB = npt.NDArray[np.uint8]
Float = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Model:
    """A network and the tiles it was trained on."""

    launch: Callable[[RGB], Callable[[], Float]]
    """Takes tiles (B, H, W, 3), returns what waits for the probability of HER2-positive (B, H, W),
    so that a GPU computes while the next tiles are read."""
    tile_px: int
    mpp: float
    """Median resolution of the tiles, um/px; `mpp_max` is that of the coarsest."""
    mpp_max: float
    normalise_background: bool = False
    """Whether tiles are divided by the background of their slide before."""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def demo_sizes(self) -> bool:
        """Whether the network is a toy of preset demo."""
        return bool(self.facts.get("demo_sizes"))


def load_model(folder: Path, device: torch.device, precision: str = "float32") -> Model:
    """Load a SegmentationNet from the output of train_segmentation.

    `precision` is one of `hemera.training.session.PRECISIONS`; ConfigError when the device does not
    have it.
    """
    if precision != "float32" and device.type != "cuda":
        raise ConfigError(f"--precision {precision}: needs a GPU; give float32 on a CPU")
    weights, metadata = folder / "segmenter.safetensors", folder / "metadata.json"
    if not weights.is_file():
        raise TrainingError(
            f"{weights}: no such file; name the output of train_segmentation, such as "
            "results/train_segmentation"
        )
    net, described = storage.load_segmentation(weights, metadata)
    net.requires_grad_(False).to(device)
    convert_conv2d_weight_memory_format(net, torch.channels_last)
    names = ("mpp", "index_fingerprint", "mask_engine", "versions", "options")
    return Model(
        _launch(net, device, PRECISIONS[precision]),
        described["tile_px"],
        described["mpp"],
        described["mpp_max"],
        storage.background_is_white(described),
        {
            "demo_sizes": has_demo_sizes("train_segmentation", described.get("options", {})),
            "weights_sha256": storage.file_digest(weights),
            **{name: described.get(name) for name in names},
        },
    )


def _launch(
    net: SegmentationNet, device: torch.device, precision: torch.dtype
) -> Callable[[RGB], Callable[[], Float]]:
    @torch.inference_mode()
    def launch(tiles: RGB) -> Callable[[], Float]:
        images = to_unit(torch.from_numpy(tiles).permute(0, 3, 1, 2), device)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits = net(images.contiguous(memory_format=torch.channels_last))
        wait = copied(torch.sigmoid(logits.float())[:, 0])
        return lambda: np.asarray(wait().numpy(), np.float32)

    return launch
