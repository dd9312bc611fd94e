"""What happens after staining: camera, defocus, pen marks."""

import cv2
import numpy as np
import numpy.typing as npt

from hemera.demo.render import BAND_ROWS, TEXTURE_PX, Appearance, Image, ramp


def photograph(image: Image, look: Appearance, rng: np.random.Generator) -> Image:
    """Add what the camera adds: uneven light and grain, (H, W, 3) uint8."""
    height, width = image.shape[:2]
    turn = rng.uniform(0, 2 * np.pi)
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    # 1,024 px of grain, repeated: no filter is that wide.
    grain = rng.standard_normal((TEXTURE_PX, TEXTURE_PX, 3), dtype=np.float32)
    grain *= np.float32(look.grain)
    result = np.empty_like(image)
    j = np.arange(width) % TEXTURE_PX
    for top in range(0, height, BAND_ROWS):
        rows = slice(top, min(top + BAND_ROWS, height))
        light = 1 + np.float32(0.012) * (
            x * np.float32(np.cos(turn)) + y[rows] * np.float32(np.sin(turn)) - x * x - y[rows] ** 2
        )
        i = np.arange(rows.start, rows.stop) % TEXTURE_PX
        band = image[rows] * light[..., None] + grain[np.ix_(i, j)]
        result[rows] = np.clip(band + np.float32(0.5), 0, 255)
    return result


def defocus(image: Image, centre: tuple[float, float], radii: tuple[float, float]) -> Image:
    """Blur an ellipse of the slide, centre and radii in px, with a soft edge."""
    height, width = image.shape[:2]
    x0, x1 = (int(np.clip(centre[0] + s * radii[0], 0, width)) for s in (-1.3, 1.3))
    y0, y1 = (int(np.clip(centre[1] + s * radii[1], 0, height)) for s in (-1.3, 1.3))
    region = image[y0:y1, x0:x1]
    blurred = cv2.GaussianBlur(region, (0, 0), 5.0)
    y, x = np.mgrid[y0:y1, x0:x1].astype(np.float32)
    distance = np.hypot((x - centre[0]) / radii[0], (y - centre[1]) / radii[1])
    weight = ramp(1 - distance, 0.25)[..., None]
    result = image.copy()
    result[y0:y1, x0:x1] = region * (1 - weight) + blurred * weight + np.float32(0.5)
    return result


def pen_mark(
    image: Image, points_px: npt.NDArray[np.float64], width_px: float, rng: np.random.Generator
) -> Image:
    """Draw a felt pen's stroke through points (N, 2): translucent blue ink, denser at the edges."""
    height, width = image.shape[:2]
    stroke = np.zeros((height, width), np.uint8)
    line = np.rint(points_px).astype(np.int32)
    cv2.polylines(stroke, [line], False, 255, int(width_px), cv2.LINE_AA)
    top, bottom = line[:, 1].min() - width_px, line[:, 1].max() + width_px
    rows = slice(int(np.clip(top, 0, height)), int(np.clip(bottom, 0, height)))
    soft = cv2.GaussianBlur(stroke[rows], (0, 0), 2.5)
    inner = cv2.GaussianBlur(soft, (0, 0), 14).astype(np.float32) / 255
    amount = soft.astype(np.float32) / 255
    patches = cv2.resize(
        rng.standard_normal((24, 24)).astype(np.float32),
        (width, amount.shape[0]),
        interpolation=cv2.INTER_CUBIC,
    )
    ink = amount * (np.float32(1.45) - np.float32(0.5) * inner + np.float32(0.12) * patches)
    colour = np.array([1.35, 0.75, 0.22], np.float32)
    result = image.copy()
    result[rows] = image[rows] * np.exp(-ink[..., None] * colour) + np.float32(0.5)
    return result
