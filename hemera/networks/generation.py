"""GenerationNet and its rivals: from H&E to HER2 (HEMERA paper, 3.1).

GenerationNet is pix2pix's U-Net. One level down is [LeakyReLU 0.2], convolution 4x4 stride 2,
[norm]; one level up is ReLU, transposed convolution 4x4 stride 2, norm. The outermost level has no
activation and no norm on the way down and a tanh on the way up; the innermost has no norm on the
way down. The reference applies its LeakyReLU in place, so a skip carries the *activated* map: so it
does here. Convolutions before a norm have a bias only where that norm is instance norm, whose mean
takes it out again.

The rivals are those of the public code of Pyramid Pix2pix: residual blocks between two halvings,
and a U-Net whose skips pass attention gates. The reference builds all of them with batch norm.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from hemera.errors import TrainingError

DEPTHS = {"unet_512": 9, "unet_256": 8, "unet_128": 7, "unet_32": 5}
"""How many times each U-Net halves its input; the number in a name is its smallest side, but for
unet_32, which is named as in the public code."""

BLOCKS = {"resnet_9blocks": 9, "resnet_6blocks": 6}
"""How many residual blocks each residual generator has."""

GENERATORS = (*DEPTHS, *BLOCKS, "attention_unet_32")
"""Names that `build_generator` knows."""

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

    The convolutions and the norm of an attention gate are drawn alike. Uses torch's global random
    state.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(layer.weight, 0.0, 0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, 0.02)
            nn.init.zeros_(layer.bias)


class Generator(nn.Module):
    """What every generator is: (B, 3, H, W) H&E to virtual HER2 of the same shape, in [-1, 1].

    Attributes:
        generator: its name in `GENERATORS`.
        step: what H and W are multiples of.
        smallest: the least H and W.
    """

    def __init__(self, generator: str, step: int, smallest: int) -> None:
        """Keep name and sides."""
        super().__init__()
        self.generator = generator
        self.step = step
        self.smallest = smallest

    def check_sides(self, image: Tensor) -> None:
        """Raise TrainingError when the sides of (B, C, H, W) do not fit the generator."""
        for side, name in zip(image.shape[-2:], ("height", "width"), strict=True):
            if side % self.step:
                raise TrainingError(
                    f"{self.generator}: {name} {side} px is not a multiple of {self.step}; cut "
                    f"tiles or crops to a multiple of {self.step} px, or train a generator of less "
                    "depth"
                )
            if side < self.smallest:
                raise TrainingError(
                    f"{self.generator}: {name} {side} px is below {self.smallest} px, the least it "
                    "can work on; give larger tiles or crops"
                )


class _UNet(Generator):
    """The layers that both kinds of U-Net have: `down` and `up`, outermost level first."""

    def __init__(
        self, generator: str, depth: int, base_width: int, norm: str, dropout: bool
    ) -> None:
        """Build the levels."""
        super().__init__(generator, 2**depth, 2**depth)
        self.depth = depth
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
            # The levels between two of the full width, as the reference has it.
            if dropout and 4 <= level < self.depth - 1:
                up.append(nn.Dropout(0.5))
            self.down.append(nn.Sequential(*down))
            self.up.append(nn.Sequential(*up))


class GenerationNet(_UNet):
    """U-Net generator: (B, 3, H, W) H&E in [-1, 1] to (B, 3, H, W) virtual HER2 in [-1, 1].

    H and W are multiples of 2 to the depth.
    """

    def __init__(
        self,
        generator: str = "unet_512",
        base_width: int = 32,
        norm: str = "batch",
        dropout: bool = False,
    ) -> None:
        """Build the levels.

        Args:
            generator: a name of `DEPTHS`.
            base_width: filters of the first level; the widths are 1, 2, 4, 8, 8, ... times that.
            norm: batch or instance.
            dropout: half of what comes up between the inner levels is dropped while training;
                unet_32 has no such level.
        """
        if generator not in DEPTHS:
            raise TrainingError(
                f"generator: {generator!r} is no U-Net; choose from {', '.join(DEPTHS)}"
            )
        super().__init__(generator, DEPTHS[generator], base_width, norm, dropout)

    @property
    def feature_width(self) -> int:
        """Channels of the volume that `features` returns.

        Raises:
            TrainingError: when the network ends above or at that level.
        """
        if self.depth <= FEATURE_LEVEL + 1:
            raise TrainingError(
                f"{self.generator}: its {self.depth} levels end at 1/32 of the input's side, where "
                "branch skip16 of SegmentationNet takes encoder and decoder maps; train unet_128 "
                "or deeper, or set another train_segmentation.generation_branch"
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
        self.check_sides(image)
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
            # In place: nobody else holds the map, and at full size it is the largest there is.
            x = self.up[level](functional.relu(x, inplace=True))
        return x


class Gate(nn.Module):
    """Additive attention: how much of a skip passes, as the map that comes up says.

    Its norm is batch norm whatever the rest of the network has.
    """

    def __init__(self, skip: int, gating: int) -> None:
        """Build the layers for a skip of `skip` channels and a map below it of `gating`."""
        super().__init__()
        self.theta = nn.Conv2d(skip, skip, 2, 2, bias=False)
        self.phi = nn.Conv2d(gating, skip, 1)
        self.psi = nn.Conv2d(skip, 1, 1)
        self.out = nn.Sequential(nn.Conv2d(skip, skip, 1), nn.BatchNorm2d(skip))

    def forward(self, skip: Tensor, gating: Tensor) -> Tensor:
        """Return the gated skip; `gating` has half its side."""
        attention = torch.sigmoid(self.psi(functional.relu(self.theta(skip) + self.phi(gating))))
        attention = functional.interpolate(attention, scale_factor=2.0, mode="bilinear")
        gated: Tensor = self.out(attention * skip)
        return gated


class AttentionGenerationNet(_UNet):
    """U-Net of five levels whose three outer skips pass attention gates (attention_unet_32).

    A gate sees its skip raw and what comes up beside the next skip. The LeakyReLU after a gated
    skip is not in place, so that skip carries the map as it is; the innermost skip is activated, as
    in `GenerationNet`. The reference goes down twice at each gate, once for the gate and once for
    the network, with the same values; here that is done once. Batch norms below a gate therefore
    move their running statistics once a step and not up to eight times.
    """

    def __init__(
        self,
        generator: str = "attention_unet_32",
        base_width: int = 32,
        norm: str = "batch",
        dropout: bool = False,
    ) -> None:
        """Build the levels; see `GenerationNet`. Five levels have none for dropout."""
        super().__init__(generator, 5, base_width, norm, dropout)
        self.gates = nn.ModuleList(
            Gate(skip, 2 * below)
            for skip, below in zip(self.widths[:3], self.widths[1:4], strict=True)
        )

    @property
    def feature_width(self) -> int:
        """Channels of the volume that `features` returns."""
        return self.widths[-1]

    def forward(self, image: Tensor) -> Tensor:
        """Return the virtual HER2 image."""
        maps, x = self.features(image)
        innermost = self.depth - 1
        x = self.up[innermost](functional.relu(x, inplace=True))
        x = torch.cat((functional.leaky_relu(maps[-1], 0.2), x), 1)
        for level in reversed(range(1, innermost)):
            skip = self.gates[level - 1](maps[level - 1], x)
            x = torch.cat((skip, self.up[level](functional.relu(x))), 1)
        virtual: Tensor = self.up[0](functional.relu(x, inplace=True))
        return virtual

    def features(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return what SegmentationNet takes from a frozen one: the way down alone.

        Returns:
            The raw encoder maps at 1/2, 1/4, 1/8 and 1/16 of the side, and the raw innermost map
            at 1/32, `feature_width` channels: 512 x 16 x 16 at 512 px and base width 64.
        """
        self.check_sides(image)
        maps = [self.down[0](image)]
        for block in self.down[1:]:
            maps.append(block(functional.leaky_relu(maps[-1], 0.2)))
        return maps[:-1], maps[-1]


class _Reflect(nn.Module):
    """Pad (B, C, H, W) on all sides by reflection, the edge not repeated.

    Torch's own layer does the same, but its gradient is not deterministic on a GPU.
    """

    def __init__(self, by: int) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        by = self.by
        x = torch.cat((x[..., 1 : by + 1, :].flip(-2), x, x[..., -by - 1 : -1, :].flip(-2)), -2)
        return torch.cat((x[..., 1 : by + 1].flip(-1), x, x[..., -by - 1 : -1].flip(-1)), -1)


class ResidualBlock(nn.Module):
    """Two reflected 3x3 convolutions with norm, ReLU between them, added to their input."""

    def __init__(self, width: int, norm: str, dropout: bool) -> None:
        """Build the layers; dropout follows the ReLU."""
        super().__init__()
        make_norm = norm_layer(norm)
        bias = norm == "instance"
        self.model = nn.Sequential(
            _Reflect(1),
            nn.Conv2d(width, width, 3, bias=bias),
            make_norm(width),
            nn.ReLU(True),
            *([nn.Dropout(0.5)] if dropout else []),
            _Reflect(1),
            nn.Conv2d(width, width, 3, bias=bias),
            make_norm(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` and what the block adds."""
        total: Tensor = x + self.model(x)
        return total


class ResidualGenerationNet(Generator):
    """Residual generator: 7x7, two halvings, residual blocks, two doublings, 7x7 and tanh.

    H and W are multiples of 4 and at least 8.
    """

    def __init__(
        self,
        generator: str = "resnet_9blocks",
        base_width: int = 32,
        norm: str = "batch",
        dropout: bool = False,
    ) -> None:
        """Build the layers.

        Args:
            generator: a name of `BLOCKS`.
            base_width: filters of the first layer; the blocks have four times that.
            norm: batch or instance.
            dropout: half of what is inside each block is dropped while training.
        """
        # A quarter of the side is what the blocks reflect by one.
        super().__init__(generator, 4, 8)
        make_norm = norm_layer(norm)
        bias = norm == "instance"

        def normed(convolution: nn.Module, width: int) -> list[nn.Module]:
            return [convolution, make_norm(width), nn.ReLU(True)]

        one, two, four = base_width, 2 * base_width, 4 * base_width
        self.model = nn.Sequential(
            _Reflect(3),
            *normed(nn.Conv2d(3, one, 7, bias=bias), one),
            *normed(nn.Conv2d(one, two, 3, 2, 1, bias=bias), two),
            *normed(nn.Conv2d(two, four, 3, 2, 1, bias=bias), four),
            *(ResidualBlock(four, norm, dropout) for _ in range(BLOCKS[generator])),
            *normed(nn.ConvTranspose2d(four, two, 3, 2, 1, 1, bias=bias), two),
            *normed(nn.ConvTranspose2d(two, one, 3, 2, 1, 1, bias=bias), one),
            _Reflect(3),
            nn.Conv2d(one, 3, 7),
            nn.Tanh(),
        )

    def forward(self, image: Tensor) -> Tensor:
        """Return the virtual HER2 image."""
        self.check_sides(image)
        virtual: Tensor = self.model(image)
        return virtual


def build_generator(
    generator: str, base_width: int = 32, norm: str = "batch", dropout: bool = False
) -> Generator:
    """Return the untrained generator of that name; `initialise` draws its weights as pix2pix does.

    Args:
        generator: a name of `GENERATORS`.
        base_width: filters of its first layer.
        norm: batch or instance.
        dropout: drop half of the inner maps while training, where the public code does.

    Raises:
        TrainingError: when there is no such generator or norm.
    """
    if generator in DEPTHS:
        return GenerationNet(generator, base_width, norm, dropout)
    if generator in BLOCKS:
        return ResidualGenerationNet(generator, base_width, norm, dropout)
    if generator == "attention_unet_32":
        return AttentionGenerationNet(generator, base_width, norm, dropout)
    raise TrainingError(
        f"generator: {generator!r} is not known; choose from {', '.join(GENERATORS)}"
    )
