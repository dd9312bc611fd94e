"""PSNR and SSIM of a batch on its own device, for validation during a training."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

WINDOW = 7
C1, C2 = 0.01**2, 0.03**2


def as_stored(images: Tensor) -> Tensor:
    """Return images of [-1, 1] as 8 bits would hold them, cut off as BCI is scored, in [0, 1]."""
    return ((images.float() + 1) * 127.5).clamp(0, 255).floor() / 255


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of each of (B, C, H, W) in [0, 1]: (B,)."""
    return -10 * torch.log10((images - truth).square().flatten(1).mean(1))


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Return the structural similarity of each of (B, C, H, W) in [0, 1]: (B,).

    A uniform window of 7 with sample covariance, as `hemera.metrics.ssim`, which evaluates; single
    precision and the device of the images, because validation sees thousands of tiles.
    """
    ratio = WINDOW**2 / (WINDOW**2 - 1)

    def mean(values: Tensor) -> Tensor:
        return functional.avg_pool2d(values, WINDOW, 1)

    # About a common middle, so that squares lose no digits.
    middle = truth.mean((2, 3), keepdim=True)
    x, y = images - middle, truth - middle
    mean_x, mean_y = mean(x), mean(y)
    variance_x = ratio * (mean(x * x) - mean_x * mean_x)
    variance_y = ratio * (mean(y * y) - mean_y * mean_y)
    covariance = ratio * (mean(x * y) - mean_x * mean_y)
    mean_x, mean_y = mean_x + middle, mean_y + middle
    similarity = ((2 * mean_x * mean_y + C1) * (2 * covariance + C2)) / (
        (mean_x.square() + mean_y.square() + C1) * (variance_x + variance_y + C2)
    )
    return similarity.flatten(1).mean(1)
