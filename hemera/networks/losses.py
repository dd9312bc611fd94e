"""The losses of both networks (HEMERA paper, 3.1, 3.2 and 4.1).

A weight map is (B, 1, H, W), see `hemera.networks.weight_map`; it multiplies output and target
before they are compared, as in the paper. Every loss computes in float32: sums over a tile overflow
float16, and bfloat16 has three digits.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional

from hemera.errors import TrainingError
from hemera.imaging.color import RGB_FROM_HED

EPSILON = 1e-6

# One dimension of the 3x3 Gaussian of sigma 1: .27407 .45186 .27407.
_SIDE = math.exp(-0.5) / (1 + 2 * math.exp(-0.5))
_BLURS = 4

# What red, green and blue add to the density of DAB.
_DAB: list[float] = torch.linalg.inv(torch.from_numpy(RGB_FROM_HED))[:, 2].tolist()


def pyramid(images: Tensor, levels: int) -> list[Tensor]:
    """Return `images` and `levels` - 1 coarser ones: four blurs, then every second pixel.

    A blur is by a 3x3 Gaussian of sigma 1; beyond the border the image is reflected without its
    edge.

    Args:
        images: (B, C, H, W), float32 or float64.
        levels: at least 1.

    Raises:
        TrainingError: when a side of 1 px is to be blurred, which cannot be reflected.
    """
    steps = [images]
    for _ in range(levels - 1):
        height, width = steps[-1].shape[-2:]
        if min(height, width) < 2:
            raise TrainingError(
                f"pyramid: level {len(steps)} of {levels} is {width} x {height} px and cannot be "
                "halved; give larger tiles or fewer levels"
            )
        steps.append(_coarser(steps[-1]))
    return steps


def _coarser(images: Tensor) -> Tensor:
    """Return the next level of the pyramid of (B, C, H, W)."""
    rows, columns = (_coarsening(side, images.device, images.dtype) for side in images.shape[-2:])
    # In the precision of the images, also under autocast.
    with torch.autocast(images.device.type, enabled=False):
        return rows @ (images @ columns.mT)


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
    """Return each image's mean absolute difference on each level of the pyramid, finest first.

    The pyramid is that of the weighted difference: blurring is linear, so this equals two pyramids
    compared level by level.

    Args:
        generated: (B, C, H, W).
        real: of the same shape.
        weight_map: (B, 1, H, W).
        levels: as of `pyramid`.

    Returns:
        One tensor (B,) a level.
    """
    difference = generated.float() - real.float()
    if weight_map is not None:
        difference = difference * weight_map.float()
    return [level.abs().mean((1, 2, 3)) for level in pyramid(difference, levels)]


def dab_density(images: Tensor) -> Tensor:
    """Return the DAB density of RGB in [0, 1]: (B, 3, H, W) to (B, 1, H, W).

    Fixed colour deconvolution, differentiable, in optical density (decimal logarithm): six times
    the third channel of scikit-image's rgb2hed, before that clips at 0. Intensities are clipped at
    1/255, the darkest stored pixel that is not black.
    """
    red, green, blue = (-torch.log10(images.float().clamp(min=1 / 255))).split(1, 1)
    stain: Tensor = red * _DAB[0] + green * _DAB[1] + blue * _DAB[2]
    return stain


def soft_dab(images: Tensor, slope: float, threshold: float) -> Tensor:
    """Return the soft DAB-positive mask, 0 to 1, of RGB in [0, 1]."""
    return torch.sigmoid(slope * (dab_density(images) - threshold))


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

    Args:
        generated: (B, C, H, W), B at least 2. On several devices each uses only its own batch.
        real: of the same shape.
        unbiased: divide by B - 1; False divides by B.

    Raises:
        TrainingError: when a batch is one image, which has no variance.
    """
    count = min(generated.shape[0], real.shape[0])
    if count < 2:
        raise TrainingError(
            f"variance penalty: a batch of {count} has no variance; give batches of at least 2 "
            "tiles on every device, or no variance penalty"
        )
    first, second = (
        images.float().var(0, correction=int(unbiased)) for images in (real, generated)
    )
    return (first - second).abs().mean()


def adversarial(logits: Tensor, real: bool, mode: str = "vanilla") -> Tensor:
    """Return the loss of a discriminator's logits against "all real" or "all fake".

    Args:
        logits: of any shape.
        real: what they are compared with.
        mode: vanilla, cross-entropy; lsgan, mean squared difference from 1 or 0.
    """
    logits = logits.float()
    target = torch.full_like(logits, float(real))
    if mode == "vanilla":
        return functional.binary_cross_entropy_with_logits(logits, target)
    if mode == "lsgan":
        return functional.mse_loss(logits, target)
    raise TrainingError(f"adversarial loss: {mode!r} is unknown; choose from vanilla, lsgan")


def tversky_loss(logits: Tensor, target: Tensor, beta: float = 0.5) -> Tensor:
    """Return 1 minus the soft Tversky index of a batch, its pixels pooled: 0 when both are empty.

    Args:
        logits: (B, 1, H, W).
        target: (B, 1, H, W), 0 or 1.
        beta: weight of false negatives; that of false positives is 1 - beta. 0.5 is Dice; more
            favours recall.
    """
    probability, target = torch.sigmoid(logits.float()), target.float()
    both = 2 * (probability * target).sum()
    # TP + beta FN + (1 - beta) FP, twice, with FN = target - TP and FP = probability - TP.
    size = 2 * ((1 - beta) * probability.sum() + beta * target.sum())
    return 1 - (both + EPSILON) / (size + EPSILON)


def focal_cross_entropy(logits: Tensor, target: Tensor, gamma: float = 0.0) -> Tensor:
    """Return the mean of (1 - p)^gamma times cross-entropy, p the probability of the truth.

    Lin et al. 2017, without their class weight.

    Args:
        logits: (B, 1, H, W).
        target: (B, 1, H, W), 0 or 1.
        gamma: how strongly easy pixels are down-weighted; 0 is cross-entropy.
    """
    logits, target = logits.float(), target.float()
    if gamma == 0:
        return functional.binary_cross_entropy_with_logits(logits, target)
    signed = (2 * target - 1) * logits
    # As a logarithm, because a power of 0 has no gradient below 1.
    weight = torch.exp(gamma * functional.logsigmoid(-signed))
    return -(weight * functional.logsigmoid(signed)).mean()


def segmentation_loss(
    logits: Tensor,
    target: Tensor,
    fraction: float,
    *,
    focal_gamma: float = 0.0,
    tversky_beta: float = 0.5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return fraction * cross-entropy + (1 - fraction) * (1 - Dice), and its two terms.

    Args:
        logits: (B, 1, H, W).
        target: (B, 1, H, W), 0 or 1.
        fraction: the paper's lambda; 1 is cross-entropy alone, as in its section 4.1.
        focal_gamma: of `focal_cross_entropy`; 0 in the paper.
        tversky_beta: of `tversky_loss`; 0.5 in the paper.
    """
    cross_entropy = focal_cross_entropy(logits, target, focal_gamma)
    overlap = tversky_loss(logits, target, tversky_beta)
    return fraction * cross_entropy + (1 - fraction) * overlap, cross_entropy, overlap
