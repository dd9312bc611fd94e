"""SegmentationNet: HER2-positive pixels from H&E alone (HEMERA paper, 3.2).

A ResNet34 sees the H&E image, and a frozen GenerationNet sees it too; their maps at 1/32 of the
side, 512 channels each at the paper's sizes, are set side by side and go through a bottleneck and
a U-Net decoder. Encoder and decoder train, GenerationNet never does.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from hemera.errors import TrainingError
from hemera.models.generation import FEATURE_LEVEL, GenerationNet

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ResNet34(nn.Module):
    """ResNet34 without its head, of any base width; at 64 it is torchvision's, names included.

    (B, 3, H, W) to five maps: base_width * (1, 1, 2, 4, 8) channels at 1/2, 1/4, 1/8, 1/16 and
    1/32 of the side.
    """

    def __init__(self, base_width: int = 64) -> None:
        """Build the layers; convolutions are drawn as torchvision draws them."""
        super().__init__()
        self.widths = tuple(base_width * factor for factor in (1, 1, 2, 4, 8))
        self.conv1 = nn.Conv2d(3, base_width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(base_width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = self._layer(base_width, self.widths[1], 3, 1)
        self.layer2 = self._layer(self.widths[1], self.widths[2], 4, 2)
        self.layer3 = self._layer(self.widths[2], self.widths[3], 6, 2)
        self.layer4 = self._layer(self.widths[3], self.widths[4], 3, 2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _layer(above: int, width: int, blocks: int, stride: int) -> nn.Sequential:
        shortcut = None
        if stride != 1 or above != width:
            shortcut = nn.Sequential(
                nn.Conv2d(above, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )
        first = BasicBlock(above, width, stride, shortcut)
        return nn.Sequential(first, *(BasicBlock(width, width) for _ in range(blocks - 1)))

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return the five maps, finest first."""
        maps = [torch.relu(self.bn1(self.conv1(image)))]
        x = self.maxpool(maps[0])
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps


def _twice(above: int, width: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with batch norm and ReLU."""
    layers: list[nn.Module] = []
    for channels in (above, width):
        layers += [
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class Decoder(nn.Module):
    """Bottleneck, five steps up with skips at all but the last, 1x1 convolution to a logit."""

    def __init__(self, fused: int, skips: tuple[int, ...], base_width: int) -> None:
        """Build the layers for `fused` channels below and `skips` beside, finest first."""
        super().__init__()
        widths = tuple(base_width * factor // 2 for factor in (16, 8, 4, 2, 2, 1))
        self.bottleneck = _twice(fused, widths[0])
        self.up = nn.ModuleList()
        self.merge = nn.ModuleList()
        for level in range(5):
            width = widths[level + 1]
            skip = skips[3 - level] if level < 4 else 0
            self.up.append(nn.ConvTranspose2d(widths[level], width, 2, 2))
            self.merge.append(_twice(width + skip, width))
        self.head = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, fused: Tensor, skips: list[Tensor]) -> Tensor:
        """Go up from `fused`; `skips` holds the maps at 1/2 to 1/16 of the side, finest first."""
        x = self.bottleneck(fused)
        for level, (up, merge) in enumerate(zip(self.up, self.merge, strict=True)):
            x = up(x)
            if level < 4:
                x = torch.cat((x, skips[3 - level]), 1)
            x = merge(x)
        logits: Tensor = self.head(x)
        return logits


class FrozenGenerationNet(nn.Module):
    """GenerationNet as a source of features: no gradient, and never in training mode.

    Its batch norms use their running statistics, so its features do not depend on the batch.
    """

    def __init__(self, net: GenerationNet) -> None:
        """Freeze `net` for good."""
        super().__init__()
        self.net = net
        self.net.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the features of an image in [0, 1]; see `GenerationNet.features`."""
        return self.net.features(image * 2 - 1)


class SegmentationNet(nn.Module):
    """(B, 3, H, W) H&E in [0, 1] to (B, 1, H, W) logits of HER2-positive.

    H and W are multiples of 32, and of 2 to the depth of the generator where there is one.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        generation: GenerationNet | None,
        generation_skips: bool = False,
        base_width: int = 64,
    ) -> None:
        """Put the branches together.

        Args:
            generation: a trained GenerationNet, frozen from here on; None for the ablation without.
            generation_skips: hand its encoder maps to the decoder too.
            base_width: filters of the encoder's first layer; 64 is ResNet34.
        """
        super().__init__()
        if generation_skips and generation is None:
            raise TrainingError(
                "generation_skips: there is no GenerationNet to take skips from; give one or set "
                "generation_skips: false"
            )
        self.generation_skips = generation_skips
        self.encoder = ResNet34(base_width)
        fused = self.encoder.widths[-1]
        skips = self.encoder.widths[:4]
        if generation is not None:
            fused += generation.feature_width
            if generation_skips:
                pairs = zip(skips, generation.widths[:FEATURE_LEVEL], strict=True)
                skips = tuple(own + other for own, other in pairs)
        self.decoder = Decoder(fused, skips, base_width)
        self.generation = None if generation is None else FrozenGenerationNet(generation)
        shape = (1, 3, 1, 1)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(shape), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits."""
        for side, name in zip(image.shape[-2:], ("height", "width"), strict=True):
            if side % 32 or side == 0:
                raise TrainingError(
                    f"SegmentationNet: {name} {side} px is not a multiple of 32, by which its "
                    "encoder divides; cut tiles or crops to a multiple of 32 px"
                )
        if self.training and image[:, 0].numel() == 32 * 32:
            raise TrainingError(
                "SegmentationNet: one tile of 32 px leaves one value to normalise; train on larger "
                "tiles or crops, or on batches of which none is a single tile"
            )
        *skips, fused = self.encoder((image - self.mean) / self.std)
        if self.generation is not None:
            maps, volume = self.generation(image)
            fused = torch.cat((fused, volume), 1)
            if self.generation_skips:
                skips = [torch.cat(pair, 1) for pair in zip(skips, maps, strict=True)]
        logits: Tensor = self.decoder(fused, skips)
        return logits
