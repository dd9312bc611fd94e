"""Pictures for the pages: JPEGs as data URLs, contours of masks, blends of two stains."""

import base64
from collections.abc import Mapping

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg

from hemera.masks import label_format

RGB = npt.NDArray[np.uint8]

POSITIVE_COLOUR = (214, 0, 122)
NEGATIVE_COLOUR = (0, 158, 115)
"""Contours: magenta and green differ for colour-blind readers, and from brown."""


class Album:
    """Makes the pictures of a page up to a limit of bytes, counted as data URLs."""

    def __init__(self, limit_bytes: int) -> None:
        self.left_bytes = limit_bytes

    def take(self, images: Mapping[str, RGB], side_px: int, quality: int = 82) -> dict[str, str]:
        """Return images as data URLs, shrunk to a longest side; empty if the page is full."""
        made = {}
        for name, rgb in images.items():
            pixels = np.ascontiguousarray(shrink(rgb, side_px))
            data = simplejpeg.encode_jpeg(
                pixels, quality=quality, colorspace="RGB", colorsubsampling="420"
            )
            made[name] = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
        size = sum(map(len, made.values()))
        if size > self.left_bytes:
            return {}
        self.left_bytes -= size
        return made


def shrink(rgb: RGB, side_px: int) -> RGB:
    """Return an image (H, W, 3) or (H, W) whose longest side is at most `side_px`."""
    height, width = rgb.shape[:2]
    factor = side_px / max(height, width)
    if factor >= 1:
        return rgb
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), np.uint8)


def outlined(rgb: RGB, mask: npt.NDArray[np.uint8]) -> RGB:
    """Draw the contours of a label image on its tile: positive cells magenta, negative green."""
    classes = label_format.classes(mask)
    positive = label_format.positive(mask)
    drawn = rgb.copy()
    _contours(drawn, (classes == label_format.NEGATIVE) & ~positive, NEGATIVE_COLOUR)
    _contours(drawn, positive, POSITIVE_COLOUR)
    return drawn


def _contours(rgb: RGB, inside: npt.NDArray[np.bool_], colour: tuple[int, int, int]) -> None:
    found, _ = cv2.findContours(inside.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    thick = max(1, round(min(rgb.shape[:2]) / 256))
    cv2.drawContours(rgb, found, -1, colour, thick, cv2.LINE_8)


def transparent(rgb: RGB) -> bytes:
    """Return an image as PNG in which black is transparent."""
    alpha = (rgb.max(axis=2) > 0).astype(np.uint8) * 255
    bgra = np.dstack([rgb[..., ::-1], alpha])
    return cv2.imencode(".png", bgra, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def labelled(mask: npt.NDArray[np.bool_]) -> RGB:
    """Return a positive mask (H, W) as a picture: black on white."""
    gray = np.where(mask, np.uint8(30), np.uint8(255))
    return np.repeat(gray[..., None], 3, axis=2)


def heat(probability: npt.NDArray[np.floating]) -> RGB:
    """Return probabilities (H, W), 0 to 1, as a picture of even brightness steps (cividis)."""
    scaled = np.clip(np.nan_to_num(probability) * 255, 0, 255).astype(np.uint8)
    bgr = cv2.applyColorMap(scaled, cv2.COLORMAP_CIVIDIS)
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)


def steps(count: int) -> list[str]:
    """Return colours from light to dark in even steps for everybody's eyes (viridis), as hex."""
    places = np.linspace(255, 0, count).round().astype(np.uint8)[None]
    bgr = cv2.applyColorMap(places, cv2.COLORMAP_VIRIDIS)[0]
    return [f"#{red:02x}{green:02x}{blue:02x}" for blue, green, red in bgr.tolist()]


def two_colours(fixed: RGB, moving: RGB) -> RGB:
    """Lay two stains over each other: H&E in magenta, HER2 in green, both together in gray.

    Each is stretched by its own darkness, because HER2 is often far paler.
    """
    first, second = (_darkness(rgb) for rgb in (fixed, moving))
    # What is dark on H&E takes green away and so turns magenta; HER2 takes red and blue away.
    red_blue, green = 255 - 215 * second, 255 - 215 * first
    return np.stack([red_blue, green, red_blue], axis=-1).astype(np.uint8)


def _darkness(rgb: RGB) -> npt.NDArray[np.float32]:
    gray = 255 - cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY).astype(np.float32)
    low, high = (float(value) for value in np.percentile(gray, (20, 99)))
    return np.asarray(np.clip((gray - low) / max(high - low, 8.0), 0, 1), np.float32)


def checkerboard(first: RGB, second: RGB, fields: int = 8) -> RGB:
    """Show two images of one size in alternate fields, so many along the longest side."""
    height, width = first.shape[:2]
    step = max(1, max(height, width) // fields)
    rows, columns = np.arange(height)[:, None] // step, np.arange(width) // step
    even = ((rows + columns) % 2 == 0)[..., None]
    return np.where(even, first, second)
