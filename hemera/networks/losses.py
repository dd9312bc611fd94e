"""The losses of both networks (HEMERA paper, 3.1, 3.2 and 4.1).

A weight map is (B, 1, H, W), see `hemera.networks.weight_map`; it multiplies output and target
before they are compared, as in the paper. Every loss computes in float32: sums over a tile overflow
float16, and bfloat16 has three digits.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hemera.imaging.color import RGB_FROM_HED

EPSILON = 1e-6

# One dimension of the 3x3 Gaussian of sigma 1: .27407 .45186 .27407.
_SIDE = math.exp(-0.5) / (1 + 2 * math.exp(-0.5))
_BLURS = 4

COARSE_PX = 8
"""Side of the blocks whose means `coarse_l1` compares: 64 x 64 blocks of a tile of 512 px."""
SHIFT_BLOCK_PX = 128
"""Least side of the blocks that are shifted by `best_shifts`."""
NCE_TEMPERATURE = 0.07
"""What similarities are divided by (Park et al. 2020)."""

# What red, green and blue add to the density of DAB.
_DAB: list[float] = torch.linalg.inv(torch.from_numpy(RGB_FROM_HED))[:, 2].tolist()


@contextlib.contextmanager
def single_precision() -> Iterator[None]:
    """Multiply matrices in single precision, where a session allows TF32 on a GPU."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


class _Product(torch.autograd.Function):
    """A product of matrices whose gradients are computed in single precision as well."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with single_precision():
            return a @ b

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (gradient,) = gradients
        a, b = ctx.saved_tensors
        with single_precision():
            return (
                gradient @ b.mT if ctx.needs_input_grad[0] else None,
                a.mT @ gradient if ctx.needs_input_grad[1] else None,
            )


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b; if one has fewer dimensions, it has no gradient."""
    product: Tensor = _Product.apply(a, b)  # type: ignore[no-untyped-call]
    return product


# A compiler would set the precision when it compiles, not when the product is computed.
_product: Callable[[Tensor, Tensor], Tensor] = torch.compiler.disable(_multiply)


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
            steps.append(_product(rows, _product(finer, columns.mT)))
    return steps


@functools.lru_cache(maxsize=32)
def _computed_coarsening(side: int, device: torch.device, dtype: torch.dtype) -> Tensor:
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


# A compiler would compute what is cached in every step.
_coarsening: Callable[[int, torch.device, torch.dtype], Tensor] = torch.compiler.disable(
    _computed_coarsening
)


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


def adversarial(
    logits: Tensor, real: bool, mode: str = "vanilla", *, generator: bool = False
) -> Tensor:
    """Return the loss of a discriminator's logits against "all real" or "all fake".

    Mode vanilla is cross-entropy, lsgan the mean squared difference from 1 or 0, hinge the mean of
    max(0, 1 - logit) or max(0, 1 + logit), and as loss of the `generator` that of minus the logit.
    """
    logits = logits.float()
    if mode == "hinge":
        sign = -1.0 if real else 1.0
        return (sign * logits if generator else functional.relu(1 + sign * logits)).mean()
    target = torch.full_like(logits, float(real))
    if mode == "lsgan":
        return functional.mse_loss(logits, target)
    return functional.binary_cross_entropy_with_logits(logits, target)


def gradient_penalty(discriminator: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
    """Return the R1 penalty of real input (B, C, H, W): the mean squared gradient.

    The gradient is that of the sum of all logits. Mescheder et al. 2018 (equation 9) sum the
    squares over an image and halve them; here they are averaged, as in the public code of
    UNIStainNet, so that the weight does not depend on the size of the images.
    """
    real = real.detach().float().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(real).sum(), real, create_graph=True)
    return gradient.square().mean()


def feature_matching(generated: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Return the mean over a discriminator's maps of their mean absolute difference.

    Real maps have no gradient (Wang et al. 2018, equation 4, each layer with the same weight).
    """
    return torch.stack(
        [
            functional.l1_loss(own.float(), other.detach().float())
            for own, other in zip(generated, real, strict=True)
        ]
    ).mean()


def reduced(images: Tensor, factor: int) -> Tensor:
    """Return the means of blocks of `factor` x `factor` px of (B, C, H, W)."""
    return functional.avg_pool2d(images.float(), factor)


@torch.no_grad()
def best_shifts(generated: Tensor, real: Tensor, reach_px: int) -> Tensor:
    """Return the shifts (B, 2, R, C), as (y, x), at which `real` is most like `generated`.

    The images (B, C, H, W) are divided into R x C blocks of at least `SHIFT_BLOCK_PX`. The shift of
    a block has the least mean absolute difference of gray, on every second row, and is at most
    `reach_px` along each axis; of equal ones it is the shortest.
    """
    rows, columns = (max(1, side // SHIFT_BLOCK_PX) for side in real.shape[-2:])
    own, other = (images.float().mean(1, keepdim=True) for images in (generated, real))
    other = functional.pad(other, (reach_px,) * 4, mode="replicate")
    height, width = own.shape[-2:]
    differences = []
    for y, x in _shifts(reach_px):
        y, x = y + reach_px, x + reach_px
        difference = (other[..., y : y + height : 2, x : x + width] - own[..., ::2, :]).abs()
        differences.append(functional.adaptive_avg_pool2d(difference, (rows, columns)))
    best = torch.cat(differences, 1).argmin(1)
    return _shift_table(reach_px, real.device)[best].permute(0, 3, 1, 2)


def _shifts(reach_px: int) -> list[tuple[int, int]]:
    """Return all shifts (y, x), the shortest first."""
    axis = range(-reach_px, reach_px + 1)
    return sorted(itertools.product(axis, axis), key=lambda shift: shift[0] ** 2 + shift[1] ** 2)


@functools.lru_cache(maxsize=8)
def _shift_table(reach_px: int, device: torch.device) -> Tensor:
    """Return `_shifts` as (N, 2), copied to the device once."""
    with torch.inference_mode(False):
        return torch.tensor(_shifts(reach_px), device=device)


def shifted(images: Tensor, shifts: Tensor) -> Tensor:
    """Return images (B, C, H, W) at the places of `best_shifts`; their edges are repeated."""
    height, width = images.shape[-2:]
    y, x = functional.interpolate(shifts.float(), (height, width)).long().unbind(1)
    rows, columns = (torch.arange(side, device=images.device) for side in (height, width))
    y = (y + rows[:, None]).clamp(0, height - 1)
    x = (x + columns).clamp(0, width - 1)
    of_batch = torch.arange(len(images), device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[of_batch, y, x].permute(0, 3, 1, 2)


def coarse_l1(generated: Tensor, real: Tensor) -> Tensor:
    """Return the mean absolute difference of the means of blocks of `COARSE_PX`.

    A misalignment that is small compared with the blocks costs little. The public code of
    UNIStainNet interpolates to 64 px instead, which uses four pixels of each block only.
    """
    return functional.l1_loss(reduced(generated, COARSE_PX), reduced(real, COARSE_PX))


def dab_percentile(generated: Tensor, real: Tensor, background: Tensor) -> Tensor:
    """Return the mean absolute difference of the strongest staining of images in [0, 1].

    It is the mean `dab_density` of the pixels from the 90th percentile of an image on, each
    clipped at the 99th: where they are does not matter (UNIStainNet; its public code uses another
    matrix and a softplus).
    """
    pair = [_strongest(dab_density(images, background)) for images in (generated, real)]
    return functional.l1_loss(pair[0], pair[1])


def stain_color(generated: Tensor, real: Tensor, background: Tensor) -> Tensor:
    """Return the mean absolute difference of the strongest staining's colour, images in [0, 1].

    It is the mean optical density of red, green and blue of the tenth of an image's pixels with the
    highest `dab_density`: where they are does not matter.
    """
    pair = [_color_of_strongest(images.float(), background.float()) for images in (generated, real)]
    return functional.l1_loss(pair[0], pair[1])


def _color_of_strongest(images: Tensor, background: Tensor) -> Tensor:
    """Return the mean densities (B, 3) of the tenth of the pixels with the highest DAB density."""
    stain = dab_density(images, background).flatten(1)
    places = stain.topk(max(1, stain.shape[1] // 10), dim=1, sorted=False).indices
    densities = background.log10() - images.clamp(min=1 / 255).log10()
    return densities.flatten(2).gather(2, places[:, None].expand(-1, 3, -1)).mean(2)


def _strongest(density: Tensor) -> Tensor:
    """Return the mean (B,) of the highest tenth of (B, 1, H, W), clipped at percentile 99."""
    values = density.flatten(1)
    last = values.shape[1] - 1
    highest = values.topk(last + 1 - math.ceil(0.9 * last), dim=1).values
    # The percentile is between two values, counted from the highest one.
    place = 0.01 * last
    below = int(place)
    following = highest[:, min(below + 1, highest.shape[1] - 1)]
    limit = torch.lerp(highest[:, below], following, place - below)
    return torch.minimum(highest, limit[:, None]).mean(1)


def patch_nce(query: Tensor, key: Tensor, supervision: float | None = None) -> Tensor:
    """Return the contrastive loss of features at N places of images (PatchNCE).

    The key at the place of a query is its positive, those at the other places of its image are the
    negatives: cross-entropy of their similarities over `NCE_TEMPERATURE` (Park et al. 2020,
    equation 3). Keys have no gradient.

    Args:
        query: unit vectors (B, N, C) of generated images.
        key: those of the images that they are compared with, at the same places.
        supervision: weigh the places of inconsistent pairs less (Li et al. 2023, ASP): a place has
            the weight g + (1 - g) max(0, s), of mean 1, where s is the similarity of query and key
            and g this argument, see `supervision_weight`; None: all alike.
    """
    query, key = query.float(), key.detach().float()
    similarity = _product(query, key.mT)
    places = torch.arange(query.shape[1], device=query.device).expand(query.shape[:2])
    loss = functional.cross_entropy(
        similarity.flatten(0, 1) / NCE_TEMPERATURE, places.flatten(), reduction="none"
    )
    if supervision is None:
        return loss.mean()
    own = similarity.detach().diagonal(dim1=1, dim2=2).flatten()
    weight = supervision + (1 - supervision) * own.clamp(min=0)
    return (loss * weight).sum() / weight.sum()


def supervision_weight(epoch: int, epochs: int, decay_from_epoch: int) -> float:
    """Return g of `patch_nce` in an epoch, from 1: 1, then linearly towards 0 (ASP, lambda).

    With t = (epoch - 1) / epochs and k = decay_from_epoch / epochs it is (1 - t) / (1 - k) from
    t = k on.
    """
    done = epoch - 1
    return 1.0 if done < decay_from_epoch else (epochs - done) / (epochs - decay_from_epoch)


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
