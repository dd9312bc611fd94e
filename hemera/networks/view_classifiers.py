"""The three networks of Oyelade et al.: tumour on H&E, stain class and stain map on HER2.

Their names differ from the paper's: C is `tumour`, L is `stain`, M is `stain_map`.
"""

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hemera.networks import encoders
from hemera.sheet import SCORES

TUMOUR_CLASSES = 2
BACKGROUND = 0
"""Class of the stain map that is no cell; 1 to 4 are the intensities 0 to 3."""


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

    Class 0 is background, 1 to 4 are cells of intensity 0 to 3.
    """

    def __init__(self, encoder: str = "mit_b0") -> None:
        super().__init__()
        smp: Any = importlib.import_module("segmentation_models_pytorch")
        classes = 1 + len(SCORES)
        self.net: nn.Module = smp.Segformer(encoder, encoder_weights=None, classes=classes)

    def forward(self, views: Tensor) -> Tensor:
        """Return the logits, of the size of the views, whose side is a multiple of 32."""
        found: Tensor = self.net(2 * views - 1)
        return found


def area_fractions(logits: Tensor) -> Tensor:
    """Return the fractions of each view of intensity 0 to 3, (B, 4); the rest is background.

    Args:
        logits: of the stain map, (B, 5, H, W); a pixel is of the class with the greatest.
    """
    likeliest = logits.argmax(1)
    found = [(likeliest == 1 + place).float().mean((1, 2)) for place in range(len(SCORES))]
    return torch.stack(found, dim=1)


def _resized(views: Tensor, side: int) -> Tensor:
    if views.shape[-2:] == (side, side):
        return views
    found = functional.interpolate(views, (side, side), mode="bicubic", antialias=True)
    return found.clamp(0, 1)
