"""The losses of both networks (HEMERA paper, 3.1, 3.2 and 4.1).

A weight map is (B, 1, H, W), as `hemera.weights.weight_map` makes it; it multiplies output and
target before they are compared, as the paper says.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

EPSILON = 1e-6

# One dimension of the 3x3 Gaussian of sigma 1: .27407 .45186 .27407.
_SIDE = math.exp(-0.5) / (1 + 2 * math.exp(-0.5))
_TAPS = (_SIDE, 1 - 2 * _SIDE, _SIDE)

# Haematoxylin, eosin and DAB as optical densities of red, green and blue (Ruifrok and Johnston
# 2001, the figures of scikit-image's rgb_from_hed).
HED = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))


def blur(images: Tensor) -> Tensor:
    """Blur (B, C, H, W) by a 3x3 Gaussian of sigma 1, reflected at the border without its edge."""
    # Sums of shifted views: faster than a grouped convolution on a CPU, and the gradient of torch's
    # own reflecting pad is not deterministic on a GPU.
    side, middle = _TAPS[:2]
    rows = torch.cat((images[..., 1:2, :], images, images[..., -2:-1, :]), -2)
    images = side * (rows[..., :-2, :] + rows[..., 2:, :]) + middle * images
    columns = torch.cat((images[..., 1:2], images, images[..., -2:-1]), -1)
    return side * (columns[..., :-2] + columns[..., 2:]) + middle * images


def pyramid(images: Tensor, levels: int) -> list[Tensor]:
    """Return `images` and `levels` - 1 coarser ones: four blurs, then every second pixel."""
    steps = [images]
    for _ in range(levels - 1):
        images = steps[-1]
        for _ in range(4):
            images = blur(images)
        steps.append(images[..., ::2, ::2])
    return steps


def pyramid_l1(
    generated: Tensor, real: Tensor, weight_map: Tensor | None = None, levels: int = 4
) -> list[Tensor]:
    """Return the mean absolute difference on each level of the pyramid, finest first.

    The difference is weighted at full resolution, then built into one pyramid: blurring is linear,
    so this equals two pyramids compared level by level, at half the cost.
    """
    difference = generated - real
    if weight_map is not None:
        difference = difference * weight_map
    return [level.abs().mean() for level in pyramid(difference, levels)]


def dab_density(images: Tensor) -> Tensor:
    """Return the DAB density of RGB in [0, 1]: (B, 3, H, W) to (B, 1, H, W).

    Fixed colour deconvolution, differentiable, in units of optical density (decimal logarithm):
    six times the third channel of scikit-image's rgb2hed, before that clips at 0. Intensities are
    held at 1/255 and above, the darkest that a stored pixel can be without being black.
    """
    stains = torch.tensor(HED, dtype=torch.float64)
    column = torch.linalg.inv(stains)[:, 2].to(images)
    density = -torch.log10(images.clamp(min=1 / 255))
    stain: Tensor = (density * column.view(1, 3, 1, 1)).sum(1, keepdim=True)
    return stain


def soft_dab(images: Tensor, slope: float, threshold: float) -> Tensor:
    """Return how far each pixel of RGB in [0, 1] counts as DAB-positive, 0 to 1."""
    return torch.sigmoid(slope * (dab_density(images) - threshold))


def balanced_dice(generated: Tensor, real: Tensor, weight_map: Tensor | None = None) -> Tensor:
    """Return 1 minus the mean of foreground and background Dice of two soft maps in [0, 1].

    Dice has squares in its denominator, so that equal soft maps have loss 0; it is taken per
    image and averaged. The weight multiplies the maps and their complements.
    """
    weight = torch.ones_like(real[:, :1]) if weight_map is None else weight_map

    def dice(a: Tensor, b: Tensor) -> Tensor:
        a, b = (a * weight).flatten(1), (b * weight).flatten(1)
        both = 2 * (a * b).sum(1)
        return (both + EPSILON) / ((a * a).sum(1) + (b * b).sum(1) + EPSILON)

    return 1 - 0.5 * (dice(generated, real) + dice(1 - generated, 1 - real)).mean()


def adversarial(logits: Tensor, real: bool) -> Tensor:
    """Return the cross-entropy of a discriminator's logits with "all real" or "all generated"."""
    target = torch.full_like(logits, float(real))
    return functional.binary_cross_entropy_with_logits(logits, target)


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return 1 minus the soft Dice of a batch, its pixels pooled: 0 when both are empty."""
    probability = torch.sigmoid(logits)
    both = 2 * (probability * target).sum()
    return 1 - (both + EPSILON) / (probability.sum() + target.sum() + EPSILON)


def segmentation_loss(
    logits: Tensor, target: Tensor, share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss share * BCE + (1 - share) * (1 - Dice), and its two parts.

    Args:
        logits: (B, 1, H, W).
        target: (B, 1, H, W), 0 or 1.
        share: the paper's lambda; 1 leaves cross-entropy alone, as its section 4.1 says.
    """
    cross_entropy = functional.binary_cross_entropy_with_logits(logits, target)
    dice = dice_loss(logits, target)
    return share * cross_entropy + (1 - share) * dice, cross_entropy, dice
