"""PSNR and SSIM of a batch on its own device, for validation during a training."""

from torch import Tensor
from torch.nn import functional

from hemera.imaging.ssim import WINDOW_PX, structural_similarity


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
