"""PatchGAN, the discriminator of patches of image pairs (HEMERA paper, 3.1 and 4.1)."""

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from hemera.networks.generation import NORMS


class PatchGAN(nn.Module):
    """Conditional discriminator: (B, in_channels, H, W) in [-1, 1] to logits (B, 1, h, w).

    Convolutions are 4x4 with padding 1: `layers` of stride 2, then two of stride 1. At 512 px and
    three layers h = w = 62. Filters are 1, 2, 4, 8, 8, ... times `width`; 6 input channels are H&E
    beside HER2. A logit above 0 means real. With `spectral`, the spectral norm of each convolution
    is 1 (Miyato et al. 2018).
    """

    def __init__(
        self,
        in_channels: int = 6,
        width: int = 64,
        layers: int = 3,
        norm: str = "batch",
        spectral: bool = False,
    ) -> None:
        super().__init__()
        bias = norm == "instance"
        parts: list[nn.Module] = [
            nn.Conv2d(in_channels, width, 4, 2, 1),
            nn.LeakyReLU(0.2, True),
        ]
        channels = width
        for layer in range(1, layers + 1):
            above, channels = channels, width * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            parts += [
                nn.Conv2d(above, channels, 4, stride, 1, bias=bias),
                NORMS[norm](channels),
                nn.LeakyReLU(0.2, True),
            ]
        parts.append(nn.Conv2d(channels, 1, 4, 1, 1))
        if spectral:
            parts = [spectral_norm(each) if isinstance(each, nn.Conv2d) else each for each in parts]
        self.model = nn.Sequential(*parts)

    def forward(self, pair: Tensor) -> Tensor:
        """Return one logit per patch."""
        logits: Tensor = self.model(pair)
        return logits

    def features(self, pair: Tensor) -> list[Tensor]:
        """Return the activated map of each convolution, the logits as the last."""
        maps = []
        x = pair
        for layer in self.model:
            x = layer(x)
            if isinstance(layer, nn.LeakyReLU):
                maps.append(x)
        return [*maps, x]
