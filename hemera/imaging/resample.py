"""Resampling of images: exact area means, enlargement and sampling at given points."""

import functools
import math

import cv2
import numpy as np
import numpy.typing as npt
import scipy.sparse

RGB = npt.NDArray[np.uint8]
Float = npt.NDArray[np.float32]


def halved(rgb: RGB) -> RGB:
    """Return an image at half its resolution; an odd last row or column is dropped."""
    height, width = rgb.shape[0] // 2, rgb.shape[1] // 2
    whole = rgb[: 2 * height, : 2 * width]
    return np.asarray(cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


@functools.lru_cache(maxsize=64)
def _area_weights(length: int, origin: float, step: float, count: int) -> scipy.sparse.csr_array:
    """Return (count, length) weights that average over [origin + i step, origin + (i + 1) step)."""
    edges = np.clip(origin + step * np.arange(count + 1), 0, length)
    first = np.floor(edges[:-1]).astype(int)
    reach = math.ceil(step) + 1
    columns = first[:, None] + np.arange(reach)[None]
    low = np.maximum(edges[:-1, None], columns)
    high = np.minimum(edges[1:, None], columns + 1)
    weights = np.maximum(high - low, 0)
    total = weights.sum(axis=1, keepdims=True)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    rows = np.repeat(np.arange(count), reach)
    columns = np.minimum(columns, length - 1)
    return scipy.sparse.csr_array(
        (weights.ravel().astype(np.float32), (rows, columns.ravel())),
        shape=(count, length),
    )


def area_resample(
    rgb: RGB, corner: tuple[float, float], step: tuple[float, float], size: tuple[int, int]
) -> RGB:
    """Shrink a region by the exact mean over the area of each pixel of the result.

    `corner` is its left and top edge, `step` the pixels per pixel of the result along x and y, at
    least 1, both in source pixels and possibly fractions; `size` is (width, height) of the result.
    """
    (left, top), (step_x, step_y), (width, height) = corner, step, size
    edges = left, top, left + width * step_x, top + height * step_y
    x0, y0, x1, y1 = (round(edge) for edge in edges)
    whole = max(abs(edge - round(edge)) for edge in edges) < 1e-6
    if whole and min(x0, y0) >= 0 and x1 <= rgb.shape[1] and y1 <= rgb.shape[0]:
        region = rgb[y0:y1, x0:x1]
        if region.shape[:2] == (height, width):
            return region.copy()
        return np.asarray(cv2.resize(region, size, interpolation=cv2.INTER_AREA), np.uint8)
    rows = _area_weights(rgb.shape[0], top, step_y, height)
    columns = _area_weights(rgb.shape[1], left, step_x, width)
    source = rgb.astype(np.float32)
    tall = (rows @ source.reshape(rgb.shape[0], -1)).reshape(height, rgb.shape[1], 3)
    turned = np.ascontiguousarray(tall.transpose(1, 0, 2)).reshape(rgb.shape[1], -1)
    wide = (columns @ turned).reshape(width, height, 3).transpose(1, 0, 2)
    return np.ascontiguousarray(np.clip(np.rint(wide), 0, 255).astype(np.uint8))


def shift_resample(
    rgb: RGB, corner: tuple[float, float], step: tuple[float, float], size: tuple[int, int]
) -> RGB:
    """Enlarge a region bilinearly; the arguments are those of `area_resample`, steps below 1."""
    x, y = (
        (start + (np.arange(count, dtype=np.float32) + 0.5) * each - 0.5).astype(np.float32)
        for start, each, count in zip(corner, step, size, strict=True)
    )
    return remap(rgb, *np.meshgrid(x, y), cubic=False)


def remap(rgb: RGB, x: Float, y: Float, *, cubic: bool) -> RGB:
    """Sample an image at pixel indices (H, W), 0 the centre of pixel 0; its edge is repeated.

    Bicubic interpolation keeps three quarters of the sharpness, bilinear less than half of it, but
    bilinear never overshoots.
    """
    x, y = (np.ascontiguousarray(indices, np.float32) for indices in (x, y))
    method = cv2.INTER_CUBIC if cubic else cv2.INTER_LINEAR
    return np.asarray(cv2.remap(rgb, x, y, method, borderMode=cv2.BORDER_REPLICATE), np.uint8)
