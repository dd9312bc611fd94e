"""The network of Oliveira et al. (2020) for the HER2 score of tiles of HER2-stained slides.

Oliveira et al., "Weakly-supervised classification of HER2 expression in breast cancer haematoxylin
and eosin stained slides", Appl. Sci. 10, 4728. It is trained on HER2 and applied to H&E: its input
is the lightness alone, which both stains have.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hemera.config import HER2_CNN
from hemera.errors import TrainingError
from hemera.files.faults import translated
from hemera.networks import storage
from hemera.sheet import SCORES

INPUT_PX = 256
_MAP_PX = 14
"""Side of the last map: four convolutions without padding, each followed by a pooling by 2."""


def lightness(rgb: Tensor) -> Tensor:
    """Return the lightness of HSL, the mean of greatest and least channel.

    Args:
        rgb: (..., 3, H, W), 0 to 1.

    Returns:
        (..., 1, H, W), 0 to 1.
    """
    least, greatest = rgb.aminmax(dim=-3, keepdim=True)
    return (least + greatest) / 2


class Her2Cnn(nn.Module):
    """Lightness (B, 1, 256, 256), 0 to 1, to the logits of the scores 0 to 3+, (B, 4).

    Args:
        base_width: channels of the first convolution; the others have 2, 4 and 8 times as many.
        hidden: width of the first dense layer; the second has a quarter of it.

    With 16 and 1024, as in the paper, it has 26,051,972 parameters. `fit_scale` gives lightness of
    another mean and deviation than 0 and 1 these.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, base_width: int = 16, hidden: int = 1024) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        channels = [1, *(base_width * factor for factor in (1, 2, 4, 8))]
        layers: list[nn.Module] = []
        for before, after, side in zip(channels[:-1], channels[1:], (5, 3, 3, 3), strict=True):
            layers += [nn.Conv2d(before, after, side), nn.ReLU(), nn.MaxPool2d(2)]
        self.maps = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.Linear(channels[-1] * _MAP_PX**2, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden // 4),
            nn.ReLU(),
            nn.Linear(hidden // 4, len(SCORES)),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the scores."""
        found: Tensor = self.head(self.maps((images - self.shift) * self.scale).flatten(1))
        return found

    def fit_scale(self, mean: float, deviation: float) -> None:
        """Give lightness of this mean and deviation mean 0 and deviation 1."""
        self.shift.fill_(mean)
        self.scale.fill_(1 / max(deviation, 1e-6))


class ScoreEncoder(nn.Module):
    """A trained `Her2Cnn` as an encoder: RGB views (B, 3, H, W), 0 to 1, to probabilities (B, 4).

    Views of another side than 256 px are resized.
    """

    resize_px = INPUT_PX
    width = len(SCORES)

    def __init__(self, net: Her2Cnn) -> None:
        super().__init__()
        self.net = net

    def forward(self, views: Tensor) -> Tensor:
        """Return the probabilities of the scores 0 to 3+."""
        return torch.softmax(self.net(network_input(views)), dim=1)


def network_input(views: Tensor) -> Tensor:
    """Return the lightness of RGB views (B, 3, H, W) at 256 px, (B, 1, 256, 256)."""
    found = lightness(views)
    if found.shape[-2:] == (INPUT_PX, INPUT_PX):
        return found
    side = (INPUT_PX, INPUT_PX)
    return functional.interpolate(found, side, mode="bilinear", antialias=True)


def load_score_encoder(weights: Path, metadata: Path) -> tuple[ScoreEncoder, dict[str, Any]]:
    """Return a trained encoder in evaluation mode, and its metadata, or raise TrainingError."""
    described = storage.read_metadata(metadata, HER2_CNN)
    with translated(TrainingError, storage.UNBUILDABLE.format(metadata)):
        net = Her2Cnn(**described["model"])
    storage.check_digest(weights, described)
    storage.load_into(net, storage.read_weights(weights), str(weights))
    return ScoreEncoder(net).eval().requires_grad_(False), described
