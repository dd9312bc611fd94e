"""SegmentationNet: HER2-positive pixels from H&E alone (HEMERA paper, 3.2).

A ResNet34 and a frozen GenerationNet encode the H&E image; their maps at 1/32 of the side, 512
channels each at the paper's sizes, are concatenated and go through a bottleneck and a U-Net
decoder. GenerationNet is never trained.

The paper does not state which map of GenerationNet is used. Branch ``skip16`` takes its encoder's
and decoder's maps at 16 x 16; ``attention_unet_32_bottleneck`` the innermost map of that generator,
512 channels at its width 64; ``virtual_rgb_encoder`` the virtual HER2 image, encoded to 512
channels by convolutions and pooling that train: the only reading that fits every generator.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Self

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
        """Go up from `fused`; `skips` are the maps at 1/2 to 1/16 of the side, finest first."""
        x = self.bottleneck(fused)
        for level, (up, merge) in enumerate(zip(self.up, self.merge, strict=True)):
            x = up(x)
            if level < 4:
                x = torch.cat((x, skips[3 - level]), 1)
            x = merge(x)
        logits: Tensor = self.head(x)
        return logits


class UNetPlusPlus(nn.Module):
    """U-Net++'s decoder of segmentation_models_pytorch, and a 1x1 convolution to a logit.

    Its deepest map is the fused volume, without a bottleneck; its widths at base width 64 are the
    library's own, 256 to 16. The library offers decoders only with its own encoders in its public
    interface, hence the imports of its modules here and below.
    """

    def __init__(self, fused: int, skips: tuple[int, ...], base_width: int) -> None:
        """Build the layers; see `Decoder`."""
        from segmentation_models_pytorch.base.initialization import initialize_decoder
        from segmentation_models_pytorch.decoders.unetplusplus.decoder import UnetPlusPlusDecoder

        super().__init__()
        widths = tuple(max(1, 4 * base_width // 2**level) for level in range(5))
        self.dense = UnetPlusPlusDecoder((3, *skips, fused), widths)
        initialize_decoder(self.dense)
        self.head = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, fused: Tensor, skips: list[Tensor]) -> Tensor:
        """Go up from `fused`; see `Decoder.forward`."""
        # The first entry is the place of the image, which the library does not read.
        logits: Tensor = self.head(self.dense([fused, *skips, fused]))
        return logits


class DeepLabV3Plus(nn.Module):
    """DeepLabV3+'s decoder of segmentation_models_pytorch, and a 1x1 convolution to a logit.

    It takes a map at 1/16 of the side: the fused volume at 1/32, enlarged twofold, beside the
    encoder's map at 1/16, so that the encoder stays undilated. The atrous rates are 6, 12 and 18,
    those of its paper at 1/16. The logits at 1/4 are enlarged bilinearly.
    """

    def __init__(self, fused: int, skips: tuple[int, ...], base_width: int) -> None:
        """Build the layers; see `Decoder`."""
        from segmentation_models_pytorch.base.initialization import initialize_decoder
        from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3PlusDecoder

        super().__init__()
        width = 4 * base_width
        self.atrous = DeepLabV3PlusDecoder(
            (3, *skips[:3], fused + skips[3]),
            encoder_depth=4,
            out_channels=width,
            atrous_rates=(6, 12, 18),
            output_stride=16,
            aspp_separable=True,
            aspp_dropout=0.5,
        )
        initialize_decoder(self.atrous)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, fused: Tensor, skips: list[Tensor]) -> Tensor:
        """Go up from `fused`; see `Decoder.forward`."""
        if self.training and fused.shape[0] == 1:
            raise TrainingError(
                "deeplabv3plus: a batch of one tile, which cannot be normalised after pooling the "
                "whole image; train on batches of at least 2 tiles, the last one included"
            )
        deepest = functional.interpolate(fused, scale_factor=2.0, mode="bilinear")
        deepest = torch.cat((deepest, skips[3]), 1)
        logits = self.head(self.atrous([fused, *skips[:3], deepest]))
        return functional.interpolate(logits, scale_factor=4.0, mode="bilinear")


DECODERS = {"unet": Decoder, "unetplusplus": UNetPlusPlus, "deeplabv3plus": DeepLabV3Plus}
"""The decoders by name; the paper's is unet."""


class VirtualEncoder(nn.Module):
    """Virtual HER2 (B, 3, H, W) in [-1, 1] to 8 * base_width channels at 1/32 of the side.

    Five times a 3x3 convolution, batch norm, ReLU and a halving by maximum, as wide as the encoder
    beside it.
    """

    def __init__(self, base_width: int) -> None:
        """Build the layers."""
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
        """Return the map at 1/32."""
        volume: Tensor = self.model(virtual)
        return volume


class FrozenGenerationNet(nn.Module):
    """A generator as a source of features: no gradient, and never in training mode.

    Its batch norms use their running statistics, so its features do not depend on the batch.
    """

    def __init__(self, net: Generator, branch: str = "skip16") -> None:
        """Freeze `net` for good.

        Raises:
            TrainingError: when there is no such branch, or not of that generator.
        """
        super().__init__()
        if branch not in BRANCHES:
            raise TrainingError(f"branch: {branch!r} is unknown; choose from {', '.join(BRANCHES)}")
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
    """(B, 3, H, W) H&E in [0, 1] to (B, 1, H, W) logits of HER2-positive.

    Attributes:
        step: divisor of H and W: 32, or that of the generator.
    """

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
            generation_skips: give its encoder maps to the decoder too.
            base_width: filters of the encoder's first stage; 64 is ResNet34.
            branch: a name of `BRANCHES`: the features taken from `generation`, if there is one.
            decoder: a name of `DECODERS`.

        Raises:
            TrainingError: when generator, branch, skips and decoder do not fit each other.
        """
        super().__init__()
        if decoder not in DECODERS:
            raise TrainingError(
                f"decoder: {decoder!r} is unknown; choose from {', '.join(DECODERS)}"
            )
        if generation_skips and generation is None:
            raise TrainingError(
                "generation_skips: true without a GenerationNet; give one or set "
                "generation_skips: false"
            )
        if generation_skips and branch == "virtual_rgb_encoder":
            raise TrainingError(
                "generation_skips: branch virtual_rgb_encoder has no encoder maps; choose branch "
                "skip16 or set generation_skips: false"
            )
        frozen = None if generation is None else FrozenGenerationNet(generation, branch)
        self.generation_skips = generation_skips
        self.step = 32 if generation is None else max(32, generation.step)
        self.encoder = resnet34(base_width)
        *skips, fused = resnet34_widths(base_width)
        self.virtual_encoder: VirtualEncoder | None = None
        if isinstance(generation, GenerationNet | AttentionGenerationNet) and (
            branch != "virtual_rgb_encoder"
        ):
            fused += generation.feature_width
            if generation_skips:
                pairs = zip(skips, generation.widths[:FEATURE_LEVEL], strict=True)
                skips = [own + other for own, other in pairs]
        elif generation is not None:
            self.virtual_encoder = VirtualEncoder(base_width)
            fused += self.virtual_encoder.width
        self.decoder = DECODERS[decoder](fused, tuple(skips), base_width)
        self.generation = frozen
        shape = (1, 3, 1, 1)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(shape), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits."""
        for side, name in zip(image.shape[-2:], ("height", "width"), strict=True):
            if side % 32 or side == 0:
                raise TrainingError(
                    f"SegmentationNet: {name} {side} px is not a multiple of 32; give tiles or "
                    "crops of a multiple of 32 px"
                )
        if self.training and image[:, 0].numel() == 32 * 32:
            raise TrainingError(
                "SegmentationNet: one tile of 32 px cannot be normalised; train on larger tiles or "
                "crops, or on batches of at least 2 tiles"
            )
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
