"""GenerationNet: pix2pix's U-Net, from H&E to HER2 (HEMERA paper, 3.1).

One level down is [LeakyReLU 0.2], convolution 4x4 stride 2, [norm]; one level up is ReLU,
transposed convolution 4x4 stride 2, norm. The outermost level has no activation and no norm on the
way down and a tanh on the way up; the innermost has no norm on the way down. The reference applies
its LeakyReLU in place, so a skip carries the *activated* map: so it does here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from hemera.errors import TrainingError

DEPTHS = {"unet_512": 9, "unet_256": 8, "unet_128": 7, "unet_32": 5}
"""How many times each generator halves its input; the number in a name is its smallest side, but
for unet_32, which is named as in the public code."""

FEATURE_LEVEL = 4
"""The level, from 0, whose output has 1/32 of the input's side: 16 x 16 at 512."""


def norm_layer(norm: str) -> Callable[[int], nn.Module]:
    """Return the maker of the normalisation named `norm`; instance has no affine part."""
    makers: dict[str, Callable[[int], nn.Module]] = {
        "batch": nn.BatchNorm2d,
        "instance": nn.InstanceNorm2d,
    }
    if norm not in makers:
        raise TrainingError(f"norm: {norm!r} is not known; choose from {', '.join(makers)}")
    return makers[norm]


def initialise(module: nn.Module) -> None:
    """Draw weights as pix2pix does: convolutions N(0, 0.02), norms N(1, 0.02), biases 0.

    Uses torch's global random state.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(layer.weight, 0.0, 0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, 0.02)
            nn.init.zeros_(layer.bias)


class GenerationNet(nn.Module):
    """U-Net generator: (B, 3, H, W) H&E in [-1, 1] to (B, 3, H, W) virtual HER2 in [-1, 1].

    H and W are multiples of 2 to the depth.
    """

    def __init__(
        self, generator: str = "unet_512", base_width: int = 32, norm: str = "batch"
    ) -> None:
        """Build the levels.

        Args:
            generator: a name of `DEPTHS`.
            base_width: filters of the first level; the widths are 1, 2, 4, 8, 8, ... times that.
            norm: batch or instance.
        """
        super().__init__()
        if generator not in DEPTHS:
            raise TrainingError(
                f"generator: {generator!r} is not known; choose from {', '.join(DEPTHS)}"
            )
        self.generator = generator
        self.depth = DEPTHS[generator]
        make_norm = norm_layer(norm)
        bias = norm == "instance"
        self.widths: tuple[int, ...] = tuple(
            base_width * min(2**level, 8) for level in range(self.depth)
        )
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        for level, width in enumerate(self.widths):
            outermost, innermost = level == 0, level == self.depth - 1
            above = 3 if outermost else self.widths[level - 1]
            down: list[nn.Module] = [nn.Conv2d(above, width, 4, 2, 1, bias=bias)]
            if not (outermost or innermost):
                down.append(make_norm(width))
            # What comes up holds the skip and the level below, but for the innermost.
            below = width if innermost else 2 * width
            up: list[nn.Module] = [
                nn.ConvTranspose2d(below, above, 4, 2, 1, bias=bias or outermost),
                nn.Tanh() if outermost else make_norm(above),
            ]
            self.down.append(nn.Sequential(*down))
            self.up.append(nn.Sequential(*up))

    @property
    def feature_width(self) -> int:
        """Channels of the volume that `features` returns.

        Raises:
            TrainingError: when the network ends above or at that level.
        """
        if self.depth <= FEATURE_LEVEL + 1:
            raise TrainingError(
                f"{self.generator}: its {self.depth} levels end at 1/32 of the input's side, where "
                "SegmentationNet would take encoder and decoder maps; train unet_128 or deeper, or "
                "set train_segmentation.generation_branch: none"
            )
        return 2 * self.widths[FEATURE_LEVEL]

    def forward(self, image: Tensor) -> Tensor:
        """Return the virtual HER2 image."""
        skips, x = self._encode(image)
        return self._decode(skips, x, 0)

    def features(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return what SegmentationNet takes from a frozen GenerationNet.

        Returns:
            The activated encoder maps at 1/2, 1/4, 1/8 and 1/16 of the side, and the volume at
            1/32: the activated encoder map beside the normalised decoder map, `feature_width`
            channels. At 512 px and base width 32 that is 512 x 16 x 16.
        """
        _ = self.feature_width
        skips, x = self._encode(image)
        x = self._decode(skips, x, FEATURE_LEVEL + 1)
        return skips[:FEATURE_LEVEL], torch.cat((skips[FEATURE_LEVEL], x), 1)

    def _encode(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the activated map of every level but the innermost, and the raw innermost."""
        step = 2**self.depth
        for side, name in zip(image.shape[-2:], ("height", "width"), strict=True):
            if side % step or side == 0:
                raise TrainingError(
                    f"{self.generator}: {name} {side} px is not a multiple of {step}; cut tiles or "
                    f"crops to a multiple of {step} px, or train a generator of less depth"
                )
        skips = []
        x = self.down[0](image)
        for block in self.down[1:]:
            x = functional.leaky_relu(x, 0.2, inplace=True)
            skips.append(x)
            x = block(x)
        return skips, x

    def _decode(self, skips: list[Tensor], x: Tensor, last: int) -> Tensor:
        """Go up from the innermost map to the output of level `last`."""
        for level in reversed(range(last, self.depth)):
            if level < self.depth - 1:
                x = torch.cat((skips[level], x), 1)
            x = self.up[level](functional.relu(x))
        return x
