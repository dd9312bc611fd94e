"""The network that finds nuclei in a section stained with haematoxylin and DAB.

A small U-Net (Ronneberger et al., MICCAI 2015) whose skip connections are added, not concatenated,
at half the resolution of its input. It has two maps: centres and insides of nuclei.
"""

from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear, max_pool2d, pixel_shuffle
from torch.nn.utils.fusion import fuse_conv_bn_eval

from hemera.imaging import color

MPP = 0.75
"""Resolution of the input, um/px."""
MULTIPLE = 16
"""Height and width of the input are multiples of this."""
WIDTHS = (16, 32, 64, 128)
"""Channels at a half, a quarter, an eighth and a sixteenth of the input's resolution."""

# Optical densities above this carry no information on where a nucleus is.
_DENSITY_MAX = 1.0
_SCALE = 2.5


def encode(rgb: npt.NDArray[np.uint8], background: color.Color) -> npt.NDArray[np.float32]:
    """Return the input of the network, (H, W, 3): bounded optical densities over the background."""
    density = color.optical_density(rgb, background)
    np.minimum(density, np.float32(_DENSITY_MAX), out=density)
    return np.multiply(density, np.float32(_SCALE), out=density)


def _convolution(inward: int, outward: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inward, outward, 3, padding=1, bias=False),
        nn.BatchNorm2d(outward),
        nn.ReLU(inplace=True),
    )


def _pair(inward: int, outward: int) -> nn.Sequential:
    return nn.Sequential(_convolution(inward, outward), _convolution(outward, outward))


class NucleusNet(nn.Module):
    """Logits (N, 2, H, W) of centre and inside of nuclei from densities (N, 3, H, W)."""

    def __init__(self, widths: tuple[int, int, int, int] = WIDTHS) -> None:
        """Make the layers.

        Args:
            widths: channels of the four levels.
        """
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 4, 2, 1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        )
        self.down = nn.ModuleList(
            _pair(widths[max(level - 1, 0)], widths[level]) for level in range(4)
        )
        self.narrow = nn.ModuleList(
            nn.Conv2d(widths[level + 1], widths[level], 1, bias=False) for level in range(3)
        )
        self.up = nn.ModuleList(_pair(widths[level], widths[level]) for level in range(3))
        # Four pixels of two maps for each position.
        self.head = nn.Conv2d(widths[0], 8, 3, padding=1)

    def forward(self, densities: Tensor) -> Tensor:
        """Return both logits at the resolution of the input."""
        return pixel_shuffle(self.quarters(densities), 2)

    def quarters(self, densities: Tensor) -> Tensor:
        """Return the logits (N, 8, H / 2, W / 2) of four pixels of both maps."""
        levels: list[Tensor] = []
        features = self.stem(densities)
        for level, block in enumerate(self.down):
            features = block(max_pool2d(features, 2) if level else features)
            levels.append(features)
        for level in (2, 1, 0):
            above = interpolate(self.narrow[level](features), scale_factor=2.0, mode="nearest")
            features = self.up[level](above + levels[level])
        return cast(Tensor, self.head(features))


class _Pointwise(nn.Module):
    """A convolution of 1 x 1 as a product: PyTorch's own is slow for one image on one thread."""

    def __init__(self, weight: Tensor) -> None:
        """Use the weight of a convolution without bias."""
        super().__init__()
        self.weight = nn.Parameter(weight.flatten(1))

    def forward(self, features: Tensor) -> Tensor:
        return linear(features.permute(0, 2, 3, 1), self.weight).permute(0, 3, 1, 2)


def fused(net: NucleusNet) -> NucleusNet:
    """Return a network in evaluation mode with its normalisation inside of the convolutions.

    Its weights are for inference only; it is changed in place.
    """
    net = net.eval()
    net.narrow = nn.ModuleList(_Pointwise(cast(Tensor, m.weight)) for m in net.narrow)
    for module in list(net.modules()):
        if isinstance(module, nn.Sequential) and isinstance(module[0], nn.Conv2d):
            module[0] = fuse_conv_bn_eval(module[0], cast(nn.BatchNorm2d, module[1]))
            module[1] = nn.Identity()
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net
