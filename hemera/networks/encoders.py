"""Encoders of the library timm."""

import importlib
from typing import Any

from torch import Tensor, nn

STEM_WIDTH = 64
"""Channels of ResNet34's first map, for any width of its stages."""


def resnet34(base_width: int = 64, channels: int = 3) -> nn.Module:
    """Return an untrained ResNet34 without its classifier.

    It maps (B, channels, H, W) to a list of five maps at 1/2, 1/4, 1/8, 1/16 and 1/32 of the side,
    with `resnet34_widths` channels. At base width 64 it is torchvision's, names of the weights
    included, and its weights are drawn as torchvision draws them.
    """
    # timm takes seconds to import, and most commands do not need it.
    timm: Any = importlib.import_module("timm")
    encoder: nn.Module = timm.create_model(
        "resnet34",
        pretrained=False,
        features_only=True,
        num_classes=0,
        zero_init_last=False,
        channels=resnet34_widths(base_width)[1:],
        in_chans=channels,
    )
    return encoder


def extend_input(weight: Tensor, channels: int) -> Tensor:
    """Return the weight of a first convolution on RGB, (N, 3, K, K), for `channels` channels.

    As timm does: repeated for further images, and scaled so that the sum of N stays.
    """
    models: Any = importlib.import_module("timm.models")
    extended: Tensor = models.adapt_input_conv(channels, weight)
    return extended


def resnet34_widths(base_width: int) -> tuple[int, ...]:
    """Return the channels of the five maps of `resnet34`, finest first."""
    return (STEM_WIDTH, *(base_width * factor for factor in (1, 2, 4, 8)))
