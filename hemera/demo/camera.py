"""The camera of images for training: stains to colours, optics, noise and file."""

import cv2
import numpy as np
import numpy.typing as npt

from hemera.demo.grid import Array
from hemera.demo.variants import Camera

Image = npt.NDArray[np.uint8]
Color = tuple[int, int, int]


def photograph(
    rng: np.random.Generator,
    first: Array,
    second: Array,
    tissue: Array,
    look: Camera,
    mpp: float,
    unevenness: Array,
) -> tuple[Image, Color]:
    """Return the image (H, W, 3) uint8 of two stains, and the estimated colour of its background.

    Args:
        rng: draws the noise.
        first: amount of haematoxylin, (H, W).
        second: that of DAB.
        tissue: fraction of tissue, which has the tint.
        look: vectors, optics, file.
        mpp: resolution, um/px.
        unevenness: (H, W), of mean 0 and variance 1: how unevenly the section is stained.
    """
    first = first * (1 + np.float32(0.15) * np.clip(unevenness, -2, 2))
    density = first[..., None] * look.haematoxylin + second[..., None] * look.dab
    density += (tissue > 0.5)[..., None] * look.tint
    light = np.exp(-density) * np.float32(1 - look.glare) + np.float32(look.glare)
    # Only OpenCV's blur of integers gives the same bytes every time.
    image = np.rint(light * look.background * np.float32(256)).astype(np.uint16)
    image = _blurred(image, look.blur_um / mpp)
    picture = image.astype(np.float32) * np.float32(1 / 256)
    if look.sharpened:
        soft = _blurred(image, float(rng.uniform(0.4, 1.0)) / mpp).astype(np.float32) * np.float32(
            1 / 256
        )
        picture += np.float32(look.sharpened) * (picture - soft)
    background = look.background.astype(np.float64)
    if look.gamma != 1:
        bounded = np.clip(picture, 1, 255) * np.float32(1 / 255)
        picture = np.float32(255) * bounded ** np.float32(look.gamma)
        background = 255 * (background / 255) ** np.float32(look.gamma)
    picture += _noise(rng, picture.shape, look)
    rgb = np.clip(np.rint(picture), 0, 255).astype(np.uint8)
    if look.jpeg_quality:
        words = [cv2.IMWRITE_JPEG_QUALITY, look.jpeg_quality]
        data = cv2.imencode(".jpg", np.ascontiguousarray(rgb[..., ::-1]), words)[1]
        decoded = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)
        rgb = np.ascontiguousarray(decoded[..., ::-1])
    estimate = np.minimum(background * look.background_error, 255)
    if look.background_is_measured:
        estimate = np.maximum(np.percentile(rgb.reshape(-1, 3), 99, axis=0), 60)
    red, green, blue = np.rint(estimate).astype(int).tolist()
    return rgb, (red, green, blue)


def _blurred(image: npt.NDArray[np.uint16], sigma_px: float) -> npt.NDArray[np.uint16]:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), max(sigma_px, 0.2)), np.uint16)


def _noise(rng: np.random.Generator, shape: tuple[int, ...], look: Camera) -> Array:
    grain = rng.standard_normal(shape, dtype=np.float32) * np.float32(look.noise)
    if look.noise_is_smooth:
        grain = (grain + np.roll(grain, 1, 0) + np.roll(grain, 1, 1)) * np.float32(0.7)
    return grain
