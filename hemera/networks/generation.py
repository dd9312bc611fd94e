"""GenerationNet and other generators: from H&E to virtual HER2 (HEMERA paper, 3.1).

GenerationNet is pix2pix's U-Net. One level down is [LeakyReLU 0.2], convolution 4x4 stride 2,
[norm]; one level up is ReLU, transposed convolution 4x4 stride 2, norm. The outermost level has no
activation and no norm on the way down and a tanh on the way up; the innermost has no norm on the
way down. A skip is the activated map, because the reference applies its LeakyReLU in place.
Convolutions before a norm have a bias only with instance norm. The other generators are those of
the public code of Pyramid Pix2pix.
"""

import abc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from hemera.config import GENERATORS
from hemera.errors import TrainingError

DEPTHS = {name: side.bit_length() - 1 for name, side in GENERATORS.items() if "unet_" in name}
"""How many times each U-Net halves its input."""
ENCODER_LAYERS = (0, 4, 7, 10, 14)
"""The layers of a residual generator whose output `encode` returns."""
BLOCKS = {"resnet_9blocks": 9, "resnet_6blocks": 6}
FEATURE_LEVEL = 4
"""The level, from 0, whose output has 1/32 of the input's side: 16 x 16 at 512."""
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "instance": nn.InstanceNorm2d,
}
"""The normalisations; instance has no affine part."""


def check_sides(image: Tensor, network: str, step: int) -> None:
    """Raise TrainingError when a side of (B, C, H, W) is not a multiple of `step`."""
    for side, name in zip(image.shape[-2:], ("height", "width"), strict=True):
        if side % step:
            raise TrainingError(
                f"{network}: {name} {side} px is not a multiple of {step}; give tiles or crops of "
                f"a multiple of {step} px"
            )


def initialise(module: nn.Module) -> None:
    """Draw weights as pix2pix does: convolutions N(0, 0.02), norms N(1, 0.02), biases 0.

    Linear layers are drawn as convolutions are.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            weight: Any = layer.weight
            if parametrize.is_parametrized(layer, "weight"):
                parametrized: Any = layer.parametrizations
                weight = parametrized.weight.original
            nn.init.normal_(weight, 0.0, 0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, 0.02)
            nn.init.zeros_(layer.bias)


class Generator(nn.Module, abc.ABC):
    """(B, 3, H, W) H&E to virtual HER2 of the same shape, in [-1, 1]; `step` divides H and W."""

    decoder_widths: tuple[int, ...]
    """Channels of `decoder_maps`."""

    def __init__(self, generator: str) -> None:
        super().__init__()
        self.generator = generator
        self.step = GENERATORS[generator]

    @abc.abstractmethod
    def decoder_maps(self, image: Tensor) -> list[Tensor]:
        """Return the decoder's maps at 1/2, 1/4 and 1/8 of the side, if it has one there."""


class _UNet(Generator):
    """The layers of both kinds of U-Net, `down` and `up`, outermost level first."""

    def __init__(
        self, generator: str, base_width: int = 32, norm: str = "batch", dropout: bool = False
    ) -> None:
        super().__init__(generator)
        self.depth = DEPTHS[generator]
        bias = norm == "instance"
        self.widths: tuple[int, ...] = tuple(
            base_width * min(2**level, 8) for level in range(self.depth)
        )
        self.decoder_widths = self.widths[:3]
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        for level, width in enumerate(self.widths):
            outermost, innermost = level == 0, level == self.depth - 1
            above = 3 if outermost else self.widths[level - 1]
            down: list[nn.Module] = [nn.Conv2d(above, width, 4, 2, 1, bias=bias)]
            if not (outermost or innermost):
                down.append(NORMS[norm](width))
            # The skip and the level below, except at the innermost level.
            below = width if innermost else 2 * width
            up: list[nn.Module] = [
                nn.ConvTranspose2d(below, above, 4, 2, 1, bias=bias or outermost),
                nn.Tanh() if outermost else NORMS[norm](above),
            ]
            # The levels between two of the full width, as in the reference.
            if dropout and 4 <= level < self.depth - 1:
                up.append(nn.Dropout(0.5))
            self.down.append(nn.Sequential(*down))
            self.up.append(nn.Sequential(*up))


class GenerationNet(_UNet):
    """U-Net generator; H and W are multiples of 2 to the depth."""

    @property
    def feature_width(self) -> int:
        """Channels of the volume of `features`."""
        return 2 * self.widths[FEATURE_LEVEL]

    def forward(self, image: Tensor) -> Tensor:
        """Return the virtual HER2 image."""
        skips, x = self._encode(image)
        return self._decode(skips, x, self.depth, 0)

    def features(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the activated encoder maps at 1/2 to 1/16 of the side, and the volume at 1/32.

        The volume is the activated encoder map beside the normalised decoder map: 512 x 16 x 16 at
        512 px and base width 32.
        """
        skips, x = self._encode(image)
        x = self._decode(skips, x, self.depth, FEATURE_LEVEL + 1)
        return skips[:FEATURE_LEVEL], torch.cat((skips[FEATURE_LEVEL], x), 1)

    def decoder_maps(self, image: Tensor) -> list[Tensor]:
        """Return the normalised decoder maps at 1/2, 1/4 and 1/8 of the side."""
        skips, x = self._encode(image)
        eighth = self._decode(skips, x, self.depth, 3)
        quarter = self._decode(skips, eighth, 3, 2)
        return [self._decode(skips, quarter, 2, 1), quarter, eighth]

    def _encode(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the activated map of every level but the innermost, and the raw innermost."""
        check_sides(image, self.generator, self.step)
        skips = []
        x = self.down[0](image)
        for block in self.down[1:]:
            x = functional.leaky_relu(x, 0.2, inplace=True)
            skips.append(x)
            x = block(x)
        return skips, x

    def _decode(self, skips: list[Tensor], x: Tensor, above: int, last: int) -> Tensor:
        """Go up from the output of level `above`, or the innermost map, to that of level `last`."""
        for level in reversed(range(last, above)):
            if level < self.depth - 1:
                x = torch.cat((skips[level], x), 1)
            # In place: the map is used nowhere else, and at full size it is the largest.
            x = self.up[level](functional.relu(x, inplace=True))
        return x


class _Gate(nn.Module):
    """Additive attention: weighs a skip by itself and the map below it. Always with batch norm."""

    def __init__(self, skip: int, gating: int) -> None:
        super().__init__()
        self.theta = nn.Conv2d(skip, skip, 2, 2, bias=False)
        self.phi = nn.Conv2d(gating, skip, 1)
        self.psi = nn.Conv2d(skip, 1, 1)
        self.out = nn.Sequential(nn.Conv2d(skip, skip, 1), nn.BatchNorm2d(skip))

    def forward(self, skip: Tensor, gating: Tensor) -> Tensor:
        attention = torch.sigmoid(self.psi(functional.relu(self.theta(skip) + self.phi(gating))))
        attention = functional.interpolate(attention, scale_factor=2.0, mode="bilinear")
        gated: Tensor = self.out(attention * skip)
        return gated


class AttentionGenerationNet(_UNet):
    """U-Net of five levels whose three outer skips pass attention gates (attention_unet_32).

    Gated skips are not activated; the innermost skip is, as in `GenerationNet`. The reference
    computes the levels below a gate twice, with the same values; here once, so that the running
    statistics there are updated once a step.
    """

    def __init__(self, generator: str, *arguments: Any, **options: Any) -> None:
        super().__init__(generator, *arguments, **options)
        self.gates = nn.ModuleList(
            _Gate(skip, 2 * below)
            for skip, below in zip(self.widths[:3], self.widths[1:4], strict=True)
        )

    @property
    def feature_width(self) -> int:
        """Channels of the volume of `features`."""
        return self.widths[-1]

    def forward(self, image: Tensor) -> Tensor:
        """Return the virtual HER2 image."""
        x, _ = self._decode(image)
        virtual: Tensor = self.up[0](functional.relu(x, inplace=True))
        return virtual

    def decoder_maps(self, image: Tensor) -> list[Tensor]:
        """Return the normalised decoder maps at 1/2, 1/4 and 1/8 of the side."""
        return self._decode(image)[1]

    def _decode(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return what the outermost level of the decoder takes, and `decoder_maps`."""
        maps, x = self.features(image)
        innermost = self.depth - 1
        x = self.up[innermost](functional.relu(x, inplace=True))
        x = torch.cat((functional.leaky_relu(maps[-1], 0.2), x), 1)
        found: list[Tensor] = []
        for level in reversed(range(1, innermost)):
            skip = self.gates[level - 1](maps[level - 1], x)
            found.insert(0, self.up[level](functional.relu(x)))
            x = torch.cat((skip, found[0]), 1)
        return x, found

    def features(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the raw encoder maps at 1/2 to 1/16 of the side, and the innermost at 1/32."""
        check_sides(image, self.generator, self.step)
        maps = [self.down[0](image)]
        for block in self.down[1:]:
            maps.append(block(functional.leaky_relu(maps[-1], 0.2)))
        return maps[:-1], maps[-1]


class _Reflect(nn.Module):
    """Reflection padding of (B, C, H, W), with a deterministic gradient on a GPU."""

    def __init__(self, by: int) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        by = self.by
        x = torch.cat((x[..., 1 : by + 1, :].flip(-2), x, x[..., -by - 1 : -1, :].flip(-2)), -2)
        return torch.cat((x[..., 1 : by + 1].flip(-1), x, x[..., -by - 1 : -1].flip(-1)), -1)


class _ResidualBlock(nn.Module):
    """Two reflected 3x3 convolutions with norm, ReLU between them, added to their input."""

    def __init__(self, width: int, norm: str, dropout: bool) -> None:
        super().__init__()
        bias = norm == "instance"
        self.model = nn.Sequential(
            _Reflect(1),
            nn.Conv2d(width, width, 3, bias=bias),
            NORMS[norm](width),
            nn.ReLU(True),
            *([nn.Dropout(0.5)] if dropout else []),
            _Reflect(1),
            nn.Conv2d(width, width, 3, bias=bias),
            NORMS[norm](width),
        )

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = x + self.model(x)
        return total


class ResidualGenerationNet(Generator):
    """Residual generator: 7x7, two halvings, residual blocks, two doublings, 7x7 and tanh."""

    def __init__(
        self, generator: str, base_width: int = 32, norm: str = "batch", dropout: bool = False
    ) -> None:
        super().__init__(generator)
        bias = norm == "instance"

        def normed(convolution: nn.Module, width: int) -> list[nn.Module]:
            return [convolution, NORMS[norm](width), nn.ReLU(True)]

        one, two, four = base_width, 2 * base_width, 4 * base_width
        self.decoder_widths = (two, four)
        self.model = nn.Sequential(
            _Reflect(3),
            *normed(nn.Conv2d(3, one, 7, bias=bias), one),
            *normed(nn.Conv2d(one, two, 3, 2, 1, bias=bias), two),
            *normed(nn.Conv2d(two, four, 3, 2, 1, bias=bias), four),
            *(_ResidualBlock(four, norm, dropout) for _ in range(BLOCKS[generator])),
            *normed(nn.ConvTranspose2d(four, two, 3, 2, 1, 1, bias=bias), two),
            *normed(nn.ConvTranspose2d(two, one, 3, 2, 1, 1, bias=bias), one),
            _Reflect(3),
            nn.Conv2d(one, 3, 7),
            nn.Tanh(),
        )

        self.encoder_widths = (3, two, four, four, four)

    def forward(self, image: Tensor) -> Tensor:
        """Return the virtual HER2 image."""
        check_sides(image, self.generator, self.step)
        virtual: Tensor = self.model(image)
        return virtual

    def decoder_maps(self, image: Tensor) -> list[Tensor]:
        """Return the map after the first doubling, at 1/2 of the side, and that before it."""
        check_sides(image, self.generator, self.step)
        doubling = 10 + BLOCKS[self.generator]
        quarter = self.model[:doubling](image)
        return [self.model[doubling : doubling + 3](quarter), quarter]

    def encode(self, image: Tensor) -> list[Tensor]:
        """Return the maps that contrastive losses compare, with `encoder_widths` channels.

        They are those of the public code of CUT: the padded image, both halving convolutions
        before their norm, the first and the fifth residual block.
        """
        check_sides(image, self.generator, self.step)
        maps = []
        for number, layer in enumerate(self.model):
            image = layer(image)
            if number in ENCODER_LAYERS:
                maps.append(image)
            if number == ENCODER_LAYERS[-1]:
                break
        return maps


class PatchProjection(nn.Module):
    """Maps features at some places of several maps to unit vectors, by two layers for each map."""

    def __init__(self, widths: Sequence[int], size: int = 256) -> None:
        """Build it for maps of so many channels; vectors have `size` numbers."""
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(width, size), nn.ReLU(True), nn.Linear(size, size))
            for width in widths
        )

    def forward(self, maps: Sequence[Tensor], places: Sequence[Tensor]) -> list[Tensor]:
        """Return the vectors (B, N, size) of each map (B, C, H, W) at its flat places (N,)."""
        return [
            functional.normalize(head(each.flatten(2)[..., at].mT).float(), dim=-1)
            for head, each, at in zip(self.heads, maps, places, strict=True)
        ]


def draw_places(maps: Sequence[Tensor], count: int = 256) -> list[Tensor]:
    """Return `count` random flat places of each map, or all; the same ones in all its images."""
    found = []
    for each in maps:
        drawn = torch.randperm(each.shape[-2] * each.shape[-1])[:count]
        found.append(drawn.to(each.device))
    return found


def build_generator(
    generator: str, base_width: int = 32, norm: str = "batch", dropout: bool = False
) -> Generator:
    """Return the untrained generator of a name in `GENERATORS`, its first layer `base_width` wide.

    Dropout, of half of the inner maps, is where the public code has it: in U-Nets between their
    inner levels, in residual generators in each block.
    """
    if generator in BLOCKS:
        return ResidualGenerationNet(generator, base_width, norm, dropout)
    if generator == "attention_unet_32":
        return AttentionGenerationNet(generator, base_width, norm, dropout)
    return GenerationNet(generator, base_width, norm, dropout)
