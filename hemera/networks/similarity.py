"""Similarity of a batch to real images, on its own device: PSNR, SSIM, the stain."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from hemera.imaging.ssim import WINDOW_PX, structural_similarity
from hemera.networks import losses

Floats = npt.NDArray[np.float64]


def as_stored(images: Tensor) -> Tensor:
    """Return images of [-1, 1] truncated to 8 bits, as BCI is scored, in [0, 1]."""
    return ((images.float() + 1) * 127.5).clamp(0, 255).floor() / 255


def psnr(images: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of each of (B, C, H, W) in [0, 1]: (B,).

    Over the pixels of `valid` (B, 1, H, W).
    """
    error = ((images - truth).square() * valid).flatten(1).sum(1)
    return -10 * (error / (valid.flatten(1).sum(1) * images.shape[1])).log10()


def ssim(images: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Return the structural similarity of each of (B, C, H, W) in [0, 1]: (B,).

    Over the windows in which all pixels are `valid` (B, 1, H, W). A uniform window of 7 px with
    sample covariance, as in evaluation, but in single precision on the device of the images,
    because validation has thousands of tiles.
    """
    similarity: Tensor = structural_similarity(
        images,
        truth,
        lambda values: functional.avg_pool2d(values, WINDOW_PX, 1),
        ratio=WINDOW_PX**2 / (WINDOW_PX**2 - 1),
        span=1.0,
        origin=truth.mean((2, 3), keepdim=True),
    )
    whole = -functional.max_pool2d(-valid.float(), WINDOW_PX, 1)
    total = (similarity * whole).flatten(1).sum(1)
    return total / (whole.flatten(1).sum(1) * images.shape[1])


def brown_sums(images: Tensor, truth: Tensor, background: Tensor, valid: Tensor) -> Tensor:
    """Return `pair_sums` of the brown of `images` and `truth`, (B, 3, H, W) in [0, 1].

    It is `losses.dab_density`, clipped at 0, where red exceeds blue after division by the
    background, otherwise 0, because gray has a DAB density; of `valid` (B, 1, H, W) pixels.
    """
    x, y = (_brown(each, background) for each in (images, truth))
    return pair_sums(x, y, valid)


def _brown(images: Tensor, background: Tensor) -> Tensor:
    over_white = images / background
    redder = over_white[:, :1] > over_white[:, 2:]
    return losses.dab_density(images, background).clamp(min=0) * redder


def pair_sums(x: Tensor, y: Tensor, valid: Tensor) -> Tensor:
    """Return the sums of 1, x, y, x^2, y^2 and x y over the pixels of `valid`: (B, 6), doubles.

    All are (B, 1, H, W).
    """
    x, y = x.double(), y.double()
    terms = (torch.ones_like(x), x, y, x * x, y * y, x * y)
    return torch.stack([(term * valid).flatten(1).sum(1) for term in terms], 1)


def moments(sums: Floats) -> tuple[Floats, ...]:
    """Return means of x and y, their variances and covariance, from `pair_sums` (..., 6)."""
    count, *rest = np.moveaxis(np.asarray(sums, np.float64), -1, 0)
    x, y, xx, yy, xy = (each / np.maximum(count, 1) for each in rest)
    return x, y, np.maximum(xx - x * x, 0), np.maximum(yy - y * y, 0), xy - x * y


def concordance(sums: Floats) -> Floats:
    """Return Lin's concordance correlation coefficient (...) from `pair_sums` (..., 6).

    It is 2 cov / (var x + var y + (mean x - mean y)^2): at most 1, where both are equal; 0 for a
    uniform image. Unlike a correlation it falls if there is too little stain or too much.
    """
    x, y, var_x, var_y, covariance = moments(sums)
    return np.asarray(2 * covariance / np.maximum(var_x + var_y + (x - y) ** 2, 1e-12))
