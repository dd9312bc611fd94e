"""The losses of both networks (HEMERA paper, 3.1, 3.2 and 4.1).

A weight map is (B, 1, H, W), see `hemera.networks.weight_map`; it multiplies output and target
before they are compared, as in the paper. Every loss computes in float32: sums over a tile overflow
float16, and bfloat16 has three digits.
"""

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional

from hemera.imaging.color import RGB_FROM_HED

EPSILON = 1e-6

# One dimension of the 3x3 Gaussian of sigma 1: .27407 .45186 .27407.
_SIDE = math.exp(-0.5) / (1 + 2 * math.exp(-0.5))
_BLURS = 4

# What red, green and blue add to the density of DAB.
_DAB: list[float] = torch.linalg.inv(torch.from_numpy(RGB_FROM_HED))[:, 2].tolist()


def pyramid(images: Tensor, levels: int) -> list[Tensor]:
    """Return `images` (B, C, H, W) and `levels` - 1 coarser ones.

    A coarser one is blurred four times and has every second pixel. A blur is by a 3x3 Gaussian of
    sigma 1; beyond the border the image is reflected without its edge.
    """
    steps = [images]
    for _ in range(levels - 1):
        finer = steps[-1]
        rows, columns = (_coarsening(side, finer.device, finer.dtype) for side in finer.shape[-2:])
        # In the precision of the images, also under autocast.
        with torch.autocast(images.device.type, enabled=False):
            steps.append(rows @ (finer @ columns.mT))
    return steps


@functools.lru_cache(maxsize=32)
def _coarsening(side: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return four blurs and the choice of every second pixel along an axis as one matrix."""
    # A tensor made in inference mode could not be used in training later.
    with torch.inference_mode(False), torch.no_grad():
        blur = torch.zeros(side, side, dtype=torch.float64, device="cpu")
        blur.diagonal().fill_(1 - 2 * _SIDE)
        blur.diagonal(1).fill_(_SIDE)
        blur.diagonal(-1).fill_(_SIDE)
        # Beyond the first pixel is the second again.
        blur[0, 1] = blur[-1, -2] = 2 * _SIDE
        matrix: Tensor = torch.linalg.matrix_power(blur, _BLURS)[::2]
        return matrix.to(dtype).to(device)


def pyramid_l1(
    generated: Tensor, real: Tensor, weight_map: Tensor | None = None, levels: int = 4
) -> list[Tensor]:
    """Return each image's mean absolute difference (B,) on each level of the pyramid, finest first.

    The pyramid is that of the weighted difference: blurring is linear, so this equals two pyramids
    compared level by level.
    """
    difference = generated.float() - real.float()
    if weight_map is not None:
        difference = difference * weight_map.float()
    return [level.abs().mean((1, 2, 3)) for level in pyramid(difference, levels)]


def dab_density(images: Tensor, background: Tensor) -> Tensor:
    """Return the DAB density of RGB in [0, 1]: (B, 3, H, W) to (B, 1, H, W).

    Fixed colour deconvolution, differentiable, in optical density (decimal logarithm): six times
    the third channel of scikit-image's rgb2hed, before that clips at 0. Intensities are clipped at
    1/255, the darkest stored pixel that is not black.

    Args:
        background: its colour in [0, 1], (B, 3, 1, 1), which has density 0.
    """
    density = background.float().log10() - images.float().clamp(min=1 / 255).log10()
    red, green, blue = density.split(1, 1)
    stain: Tensor = red * _DAB[0] + green * _DAB[1] + blue * _DAB[2]
    return stain


def soft_dab(images: Tensor, background: Tensor, slope: float, threshold: float) -> Tensor:
    """Return the soft DAB-positive mask, 0 to 1, of RGB in [0, 1]; see `dab_density`."""
    return torch.sigmoid(slope * (dab_density(images, background) - threshold))


def balanced_dice(generated: Tensor, real: Tensor, weight_map: Tensor | None = None) -> Tensor:
    """Return 1 minus the mean of foreground and background Dice of two soft maps in [0, 1].

    Dice has squares in its denominator, so that equal soft maps have loss 0; it is taken per
    image and averaged. The weight multiplies the maps and their complements.
    """
    generated, real = generated.float(), real.float()
    weight = torch.ones_like(real[:, :1]) if weight_map is None else weight_map.float()

    def dice(a: Tensor, b: Tensor) -> Tensor:
        a, b = (a * weight).flatten(1), (b * weight).flatten(1)
        both = 2 * (a * b).sum(1)
        return (both + EPSILON) / ((a * a).sum(1) + (b * b).sum(1) + EPSILON)

    return 1 - 0.5 * (dice(generated, real) + dice(1 - generated, 1 - real)).mean()


def variance_penalty(generated: Tensor, real: Tensor, unbiased: bool = True) -> Tensor:
    """Return the mean absolute difference of the variances over the batch (Rehmat et al. 2025).

    The batch has at least two images; its variance is divided by B - 1, or if not unbiased by B.
    """
    first, second = (
        images.float().var(0, correction=int(unbiased)) for images in (real, generated)
    )
    return (first - second).abs().mean()


def adversarial(logits: Tensor, real: bool, mode: str = "vanilla") -> Tensor:
    """Return the loss of a discriminator's logits against "all real" or "all fake".

    Mode vanilla is cross-entropy, lsgan the mean squared difference from 1 or 0.
    """
    logits = logits.float()
    target = torch.full_like(logits, float(real))
    if mode == "lsgan":
        return functional.mse_loss(logits, target)
    return functional.binary_cross_entropy_with_logits(logits, target)


def segmentation_loss(
    logits: Tensor, target: Tensor, valid: Tensor, fraction: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return fraction * cross-entropy + (1 - fraction) * (1 - Dice), and its two terms.

    Dice is that of the probabilities, the valid pixels of the batch pooled; its loss is 0 when
    prediction and target are empty. The fraction is the paper's lambda; 1 is cross-entropy alone,
    as in its section 4.1.
    """
    logits, valid = logits.float(), valid.float()
    target = target.float() * valid
    of_pixels = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    cross_entropy = (of_pixels * valid).sum() / valid.sum().clamp(min=1)
    probability = torch.sigmoid(logits) * valid
    both = 2 * (probability * target).sum()
    overlap = 1 - (both + EPSILON) / (probability.sum() + target.sum() + EPSILON)
    return fraction * cross_entropy + (1 - fraction) * overlap, cross_entropy, overlap
