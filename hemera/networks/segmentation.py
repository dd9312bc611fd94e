"""SegmentationNet: HER2-positive pixels from H&E alone (HEMERA paper, 3.2).

A ResNet34 and a frozen GenerationNet encode the H&E image; their maps at 1/32 of the side, 512
channels each at the paper's sizes, are concatenated and decoded. The paper does not state which map
of GenerationNet is used. Branch ``skip16`` takes its encoder's and decoder's maps at 16 x 16;
``attention_unet_32_bottleneck`` the innermost map of that generator; ``virtual_rgb_encoder`` the
virtual HER2 image, encoded by layers that train: the only reading that fits every generator.

With its skips a U-Net can do without a map at 1/32. Two branches, which are not in the paper, are
fused above it: ``decoder_maps`` concatenates the generator's decoder maps at 1/2 to 1/8 to the
skips, ``virtual_rgb_input`` the virtual HER2 image to the H&E image, an input of six channels.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from hemera.config.training import BRANCHES
from hemera.errors import TrainingError
from hemera.networks.encoders import TimmEncoder, resnet34, resnet34_widths
from hemera.networks.generation import (
    FEATURE_LEVEL,
    AttentionGenerationNet,
    GenerationNet,
    Generator,
    check_sides,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INNER = 5
"""The level at 1/32 of the side."""
VIRTUAL_BRANCHES = ("virtual_rgb_encoder", "virtual_rgb_input")
"""Branches of the virtual HER2 image."""


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

    def __init__(self, net: Generator, branch: str, skips: bool = False) -> None:
        """Freeze a generator; `skips`: with its encoder maps, of branches of an inner map."""
        super().__init__()
        if net.generator not in BRANCHES[branch]:
            raise TrainingError(
                f"branch {branch}: needs {', '.join(BRANCHES[branch])}, and the generator is "
                f"{net.generator}; set train_segmentation.generation_branch: virtual_rgb_encoder, "
                "or train another generator"
            )
        self.branch = branch
        self.skips = skips
        self.net = net
        self.net.requires_grad_(False)
        self.train(False)

    @property
    def widths(self) -> dict[int, int]:
        """Channels of the maps, by level."""
        if self.branch in VIRTUAL_BRANCHES:
            return {0: 3}
        if self.branch == "decoder_maps":
            return dict(enumerate(self.net.decoder_widths, 1))
        assert isinstance(self.net, GenerationNet | AttentionGenerationNet)
        skips = self.net.widths[:FEATURE_LEVEL] if self.skips else ()
        return dict(enumerate(skips, 1)) | {INNER: self.net.feature_width}

    def train(self, mode: bool = True) -> Self:
        """Keep evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: Tensor) -> dict[int, Tensor]:
        """Return the maps of an image in [0, 1]; at level 0 the virtual HER2 image, in [-1, 1]."""
        image = image * 2 - 1
        if self.branch in VIRTUAL_BRANCHES:
            return {0: self.net(image)}
        if self.branch == "decoder_maps":
            return dict(enumerate(self.net.decoder_maps(image), 1))
        assert isinstance(self.net, GenerationNet | AttentionGenerationNet)
        skips, volume = self.net.features(image)
        return (dict(enumerate(skips, 1)) if self.skips else {}) | {INNER: volume}


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
        encoder: Mapping[str, Any] | None = None,
    ) -> None:
        """Build the network.

        Args:
            generation: a trained generator, frozen from here on; None for the ablation without.
            generation_skips: give its encoder maps to the decoder too; for branch skip16.
            base_width: filters of the encoder's first stage; 64 is ResNet34.
            branch: the features taken from `generation`; TrainingError if it has no such branch.
            decoder: architecture of the decoder.
            encoder: instead of ResNet34, what `encoders.describe_timm` returns; not with the branch
                virtual_rgb_input.
        """
        super().__init__()
        frozen = None
        if generation is not None:
            frozen = FrozenGenerationNet(generation, branch, generation_skips)
        self.step = 32 if generation is None else max(32, generation.step)
        added = {} if frozen is None else frozen.widths
        self.virtual_encoder: _VirtualEncoder | None = None
        mean, std = IMAGENET_MEAN, IMAGENET_STD
        if encoder is None:
            channels = 6 if branch == "virtual_rgb_input" and frozen else 3
            self.encoder = resnet34(base_width, channels)
        else:
            self.encoder = TimmEncoder(**encoder, base_width=base_width)
            mean, std = tuple(encoder["mean"]), tuple(encoder["std"])
        if frozen is not None and branch == "virtual_rgb_encoder":
            self.virtual_encoder = _VirtualEncoder(base_width)
            added = {INNER: self.virtual_encoder.width}
        *skips, fused = (
            own + added.get(level, 0) for level, own in enumerate(resnet34_widths(base_width), 1)
        )
        self.decoder: nn.Module
        if decoder == "unet":
            self.decoder = Decoder(fused, tuple(skips), base_width)
        else:
            self.decoder = LibraryDecoder(decoder, fused, tuple(skips), base_width)
        self.generation = frozen
        shape = (1, 3, 1, 1)
        self.register_buffer("mean", torch.tensor(mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(shape), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits."""
        check_sides(image, "SegmentationNet", 32)
        return self.fuse(image, self.branch(image))

    def branch(self, image: Tensor, her2: Tensor | None = None) -> dict[int, Tensor]:
        """Return the maps of the generation branch, as they are concatenated, by level.

        Level 0 is the input, level k has 1 / 2**k of its side. No maps without a branch.

        Args:
            image: (B, 3, H, W) H&E in [0, 1], from which the generator computes them.
            her2: of a branch of `VIRTUAL_BRANCHES`: the HER2 image in [0, 1] instead of the
                virtual one.
        """
        if self.generation is None:
            return {}
        maps = self.generation(image) if her2 is None else {0: her2 * 2 - 1}
        if self.virtual_encoder is not None:
            return {INNER: self.virtual_encoder(maps[0])}
        return {
            level: volume if level else self._normalised((volume + 1) / 2)
            for level, volume in maps.items()
        }

    def fuse(self, image: Tensor, maps: Mapping[int, Tensor]) -> Tensor:
        """Return the logits of an image with the maps of `branch`."""

        def joined(own: Tensor, level: int) -> Tensor:
            return torch.cat((own, maps[level]), 1) if level in maps else own

        own = self.encoder(joined(self._normalised(image), 0))
        *skips, fused = (joined(volume, level) for level, volume in enumerate(own, 1))
        logits: Tensor = self.decoder(fused, skips)
        return logits

    def _normalised(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std
