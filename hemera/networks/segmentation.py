"""SegmentationNet: HER2-positive pixels from H&E alone (HEMERA paper, 3.2).

A ResNet34 and a frozen GenerationNet encode the H&E image; their maps at 1/32 of the side, 512
channels each at the paper's sizes, are concatenated and decoded. The paper does not state which map
of GenerationNet is used. Branch ``skip16`` takes its encoder's and decoder's maps at 16 x 16;
``attention_unet_32_bottleneck`` the innermost map of that generator; ``virtual_rgb_encoder`` the
virtual HER2 image, encoded by layers that train: the only reading that fits every generator.
"""

from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from hemera.config.training import BRANCHES
from hemera.errors import TrainingError
from hemera.networks.encoders import resnet34, resnet34_widths
from hemera.networks.generation import (
    FEATURE_LEVEL,
    AttentionGenerationNet,
    GenerationNet,
    Generator,
    check_sides,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
        """Go up from `fused`; `skips` are the maps at 1/2 to 1/16 of the side, finest first."""
        x = self.bottleneck(fused)
        for level, (up, merge) in enumerate(zip(self.up, self.merge, strict=True)):
            x = up(x)
            if level < 4:
                x = torch.cat((x, skips[3 - level]), 1)
            x = merge(x)
        logits: Tensor = self.head(x)
        return logits


class LibraryDecoder(nn.Module):
    """Decoder and head of a network of segmentation_models_pytorch on a ResNet34.

    Maps to which the generator's are concatenated are reduced to the encoder's widths by 1x1
    convolutions, because the library builds a decoder for its encoder only. DeepLabV3+ takes the
    maps at 1/4 and at 1/16 of the side: here the fused volume at 1/32, enlarged twofold, so that
    the encoder stays undilated.
    """

    def __init__(self, name: str, fused: int, skips: tuple[int, ...], base_width: int) -> None:
        import segmentation_models_pytorch as smp

        super().__init__()
        widths = resnet34_widths(base_width)
        channels: Any = 4 * base_width
        if name == "unetplusplus":
            channels = [max(1, 4 * base_width // 2**level) for level in range(5)]
        model = smp.create_model(
            name, "tu-resnet34", None, channels=widths[1:], decoder_channels=channels
        )
        self.decoder, self.head = model.decoder, model.segmentation_head
        self.enlarge = 2 if name == "deeplabv3plus" else 1
        used = (1, 4) if name == "deeplabv3plus" else range(5)
        given = (*skips, fused)
        self.reduce = nn.ModuleDict(
            {
                str(level): nn.Conv2d(given[level], widths[level], 1)
                for level in used
                if given[level] != widths[level]
            }
        )

    def forward(self, fused: Tensor, skips: list[Tensor]) -> Tensor:
        """Go up from `fused`; see `Decoder.forward`."""
        maps = [*skips, fused]
        for level, convolution in self.reduce.items():
            maps[int(level)] = convolution(maps[int(level)])
        if self.enlarge > 1:
            maps[4] = functional.interpolate(maps[4], scale_factor=2.0, mode="bilinear")
        # The first entry is the place of the image, which the library does not read.
        logits: Tensor = self.head(self.decoder([fused, *maps]))
        return logits


class _VirtualEncoder(nn.Module):
    """Virtual HER2 (B, 3, H, W) in [-1, 1] to 8 * base_width channels at 1/32 of the side."""

    def __init__(self, base_width: int) -> None:
        super().__init__()
        self.width = 8 * base_width
        layers: list[nn.Module] = []
        for above, width in pairwise((3, *(base_width * factor for factor in (1, 1, 2, 4, 8)))):
            layers += [
                nn.Conv2d(above, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2),
            ]
        self.model = nn.Sequential(*layers)

    def forward(self, virtual: Tensor) -> Tensor:
        volume: Tensor = self.model(virtual)
        return volume


class FrozenGenerationNet(nn.Module):
    """A generator as a source of features: no gradient, and never in training mode."""

    def __init__(self, net: Generator, branch: str) -> None:
        super().__init__()
        if net.generator not in BRANCHES[branch]:
            raise TrainingError(
                f"branch {branch}: needs {', '.join(BRANCHES[branch])}, and the generator is "
                f"{net.generator}; set train_segmentation.generation_branch: virtual_rgb_encoder, "
                "or train another generator"
            )
        self.branch = branch
        self.net = net
        self.net.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Keep evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the features of an image in [0, 1], or no maps and the virtual HER2 image."""
        image = image * 2 - 1
        if self.branch == "virtual_rgb_encoder":
            return [], self.net(image)
        assert isinstance(self.net, GenerationNet | AttentionGenerationNet)
        return self.net.features(image)


class SegmentationNet(nn.Module):
    """(B, 3, H, W) H&E in [0, 1] to (B, 1, H, W) logits of HER2-positive; H and W fit `step`."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        generation: Generator | None,
        generation_skips: bool = False,
        base_width: int = 64,
        branch: str = "skip16",
        decoder: str = "unet",
    ) -> None:
        """Build the network.

        Args:
            generation: a trained generator, frozen from here on; None for the ablation without.
            generation_skips: give its encoder maps to the decoder too; for branch skip16.
            base_width: filters of the encoder's first stage; 64 is ResNet34.
            branch: the features taken from `generation`; TrainingError if it has no such branch.
        """
        super().__init__()
        frozen = None if generation is None else FrozenGenerationNet(generation, branch)
        self.generation_skips = generation_skips
        self.step = 32 if generation is None else max(32, generation.step)
        self.encoder = resnet34(base_width)
        *skips, fused = resnet34_widths(base_width)
        self.virtual_encoder: _VirtualEncoder | None = None
        if generation is not None and branch == "virtual_rgb_encoder":
            self.virtual_encoder = _VirtualEncoder(base_width)
            fused += self.virtual_encoder.width
        elif isinstance(generation, GenerationNet | AttentionGenerationNet):
            fused += generation.feature_width
            if generation_skips:
                pairs = zip(skips, generation.widths[:FEATURE_LEVEL], strict=True)
                skips = [own + other for own, other in pairs]
        self.decoder: nn.Module
        if decoder == "unet":
            self.decoder = Decoder(fused, tuple(skips), base_width)
        else:
            self.decoder = LibraryDecoder(decoder, fused, tuple(skips), base_width)
        self.generation = frozen
        shape = (1, 3, 1, 1)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(shape), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits."""
        check_sides(image, "SegmentationNet", 32)
        *skips, fused = self.encoder((image - self.mean) / self.std)
        if self.generation is not None:
            maps, volume = self.generation(image)
            if self.virtual_encoder is not None:
                volume = self.virtual_encoder(volume)
            fused = torch.cat((fused, volume), 1)
            if self.generation_skips:
                skips = [torch.cat(pair, 1) for pair in zip(skips, maps, strict=True)]
        logits: Tensor = self.decoder(fused, skips)
        return logits
