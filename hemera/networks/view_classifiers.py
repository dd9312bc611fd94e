"""The three networks of Oyelade et al.: tumour on H&E, stain class and stain map on HER2.

Their names differ from the paper's: C is `tumour`, L is `stain`, M is `stain_map`.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hemera.config import STAIN_MAP
from hemera.errors import TrainingError
from hemera.files.faults import translated
from hemera.networks import encoders, storage
from hemera.networks.tile_encoders import find_weights
from hemera.sheet import SCORES

TUMOUR_CLASSES = 2
MAP_CLASSES = 1 + len(SCORES)
"""Of the stain map: 0 is background, 1 to 4 are cells of intensity 0 to 3."""


class ViewClassifier(nn.Module):
    """A vision transformer: RGB views (B, 3, H, W), 0 to 1, to logits (B, `classes`).

    Views of another side than `input_px` are resized; mean and deviation of each channel are
    taken as 0.5, as for the published weights. vit_small_patch16_224 with two classes has
    21,666,434 parameters.
    """

    def __init__(
        self, classes: int, architecture: str = "vit_small_patch16_224", input_px: int = 224
    ) -> None:
        super().__init__()
        self.resize_px = input_px
        self.backbone = encoders.timm_network(architecture, {"img_size": input_px})
        self.head = nn.Linear(int(self.backbone.num_features), classes)

    def forward(self, views: Tensor) -> Tensor:
        """Return the logits."""
        found: Tensor = self.head(self.backbone(2 * _resized(views, self.resize_px) - 1))
        return found


class StainMap(nn.Module):
    """SegFormer: RGB views (B, 3, H, W), 0 to 1, to logits (B, 5, H, W).

    Class 0 is background, 1 to 4 are cells of intensity 0 to 3. With `input_px`, views are resized
    to this side, and logits back to that of the view.
    """

    def __init__(self, encoder: str = "mit_b0", input_px: int | None = None) -> None:
        super().__init__()
        self.resize_px = input_px
        smp: Any = importlib.import_module("segmentation_models_pytorch")
        self.net: Any = smp.Segformer(encoder, encoder_weights=None, classes=MAP_CLASSES)

    def forward(self, views: Tensor) -> Tensor:
        """Return the logits, of the size of the views.

        Without `input_px` their side has to be a multiple of 32.
        """
        if self.resize_px is None:
            found: Tensor = self.net(2 * views - 1)
            return found
        found = self.net(2 * _resized(views, self.resize_px) - 1)
        return functional.interpolate(found, views.shape[-2:], mode="bilinear")


def area_fractions(logits: Tensor) -> Tensor:
    """Return the fractions of each view of intensity 0 to 3, (B, 4); the rest is background.

    Args:
        logits: of the stain map, (B, 5, H, W); a pixel is of the class with the greatest.
    """
    likeliest = logits.argmax(1)
    found = [(likeliest == 1 + place).float().mean((1, 2)) for place in range(len(SCORES))]
    return torch.stack(found, dim=1)


def build_classifier(network: str, model: Mapping[str, Any]) -> nn.Module:
    """Return an untrained network: tumour, stain or stain_map, with the arguments `model`."""
    return StainMap(**model) if network == STAIN_MAP else ViewClassifier(**model)


def load_pretrained(net: nn.Module, path: Path) -> str:
    """Load published weights, but for the classifier; return their SHA-256.

    TrainingError where they do not fit.

    Args:
        net: a ViewClassifier, with weights of timm; a StainMap, with those of its encoder.
        path: the file, or the folder of a published model.
    """
    weights = find_weights(path)
    state = storage.read_weights(
        weights, missing="correct train_encoder.weights", remedy="fetch it again"
    )
    if isinstance(net, ViewClassifier):
        storage.load_published(net.backbone, state, str(weights))
    elif isinstance(net, StainMap):
        own = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
        storage.load_into(net.net.encoder, own, str(weights))
    return storage.file_digest(weights)


class ViewEncoder(nn.Module):
    """A trained network as an encoder: RGB views (B, 3, H, W), 0 to 1, to features (B, `width`).

    Of a classifier the probabilities of the classes, of the stain map the fractions of the area of
    intensity 0 to 3.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        classes = net.head.out_features if isinstance(net, ViewClassifier) else len(SCORES)
        self.width = int(classes)

    @property
    def resize_px(self) -> int | None:
        """Side to which views are resized; None: they are not."""
        found: Any = self.net.resize_px
        return None if found is None else int(found)

    def forward(self, views: Tensor) -> Tensor:
        """Return the features."""
        logits = self.net(views)
        if isinstance(self.net, ViewClassifier):
            return torch.softmax(logits, dim=1)
        return area_fractions(logits)


def load_view_encoder(
    network: str, weights: Path, metadata: Path
) -> tuple[ViewEncoder, dict[str, Any]]:
    """Return a trained encoder in evaluation mode, and its metadata, or raise TrainingError."""
    described = storage.read_metadata(metadata, network)
    with translated(TrainingError, storage.UNBUILDABLE.format(metadata)):
        net = build_classifier(network, described["model"])
    storage.check_digest(weights, described)
    storage.load_into(net, storage.read_weights(weights), str(weights))
    return ViewEncoder(net).eval().requires_grad_(False), described


def _resized(views: Tensor, side: int) -> Tensor:
    if views.shape[-2:] == (side, side):
        return views
    found = functional.interpolate(views, (side, side), mode="bicubic", antialias=True)
    return found.clamp(0, 1)
