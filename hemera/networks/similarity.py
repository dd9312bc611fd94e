"""PSNR and SSIM of a batch on its own device, for validation during a training."""

from torch import Tensor
from torch.nn import functional

from hemera.imaging.ssim import WINDOW_PX, structural_similarity


def as_stored(images: Tensor) -> Tensor:
    """Return images of [-1, 1] truncated to 8 bits, as BCI is scored, in [0, 1]."""
    return ((images.float() + 1) * 127.5).clamp(0, 255).floor() / 255


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of each of (B, C, H, W) in [0, 1]: (B,)."""
    return -10 * (images - truth).square().flatten(1).mean(1).log10()


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Return the structural similarity of each of (B, C, H, W) in [0, 1]: (B,).

    A uniform window of 7 px with sample covariance, as in evaluation, but in single precision on
    the device of the images, because validation has thousands of tiles.
    """
    similarity: Tensor = structural_similarity(
        images,
        truth,
        lambda values: functional.avg_pool2d(values, WINDOW_PX, 1),
        ratio=WINDOW_PX**2 / (WINDOW_PX**2 - 1),
        span=1.0,
        origin=truth.mean((2, 3), keepdim=True),
    )
    return similarity.flatten(1).mean(1)
