"""Both slides of a pair at one resolution, for the registration engine and the certificate."""

import dataclasses
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import cv2
import numpy as np
import numpy.typing as npt

from hemera.config import RegisterOptions
from hemera.imaging.color import STAIN_UNIT, haematoxylin, normalise_background
from hemera.imaging.slide import Slide, open_slide
from hemera.imaging.tolerant import LOST_MAX, Losses, read_region
from hemera.sheet import Pair

log = logging.getLogger(__name__)

RGB = npt.NDArray[np.uint8]
Described = Mapping[str, Mapping[str, Any]]
"""Rows of `tables.DESCRIBE` by stain."""

TISSUE_MARGIN = 0.02
"""Background kept around the tissue, as a fraction of the longest side."""
PIECE_PX = 64
"""Side of the pieces that are read where a band cannot be decoded."""
BAND_PX = 1_000_000
"""Pixels that are read at once: the next finer level may have sixteen times as many."""


@dataclasses.dataclass(frozen=True, eq=False)
class Canvas:
    """Both slides as stored, (H, W, 3) each from its top-left corner, their background white."""

    he: RGB
    her2: RGB
    mpp: float
    """Um per pixel of both."""

    @property
    def size_px(self) -> int:
        """Shortest side of the smallest canvas that contains both."""
        return int(np.maximum(self.he.shape[:2], self.her2.shape[:2]).min())

    def reduced(self, factor: int) -> Self:
        """Return the mean of squares of `factor` pixels, padded with white at right and bottom."""
        if factor == 1:
            return self
        return type(self)(_reduce(self.he, factor), _reduce(self.her2, factor), self.mpp * factor)

    def tissue_only(self, described: Described) -> Self:
        """Return it with everything white outside the tissue outlines and a margin."""
        he = _tissue_only(self.he, described["he"], self.mpp)
        her2 = _tissue_only(self.her2, described["her2"], self.mpp)
        return type(self)(he, her2, self.mpp)

    def haematoxylin(self) -> Self:
        """Return the light that the haematoxylin of both slides alone would transmit, as grey."""
        he, her2 = (
            np.rint(255 * 10 ** -(STAIN_UNIT * haematoxylin(rgb))).astype(np.uint8)
            for rgb in (self.he, self.her2)
        )
        return type(self)(cv2.merge([he] * 3), cv2.merge([her2] * 3), self.mpp)


def size_um(described: Mapping[str, Any]) -> tuple[float, float]:
    """Return (width, height) of a slide."""
    return described["width_px"] * described["mpp"], described["height_px"] * described["mpp"]


def read_canvas(pair: Pair, described: Described, options: RegisterOptions) -> Canvas:
    """Read both slides at the resolution of registration."""
    he, her2 = described["he"], described["her2"]
    mpp = options.canvas_mpp((size_um(he), size_um(her2)), (he["mpp"], her2["mpp"]))
    return Canvas(_read(pair.he, he, mpp), _read(pair.her2_image, her2, mpp), mpp)


def _read(path: Path, described: Mapping[str, Any], mpp: float) -> RGB:
    """Read a whole slide; pieces that cannot be decoded are background."""
    with open_slide(path, mpp=described["mpp"], reader=described["reader"]) as slide:
        width, height = (max(1, math.ceil(n * slide.mpp / mpp - 1e-6)) for n in slide.size_px)
        # The engine pads with white; background of another colour would end in an edge, and edges
        # are what it matches.
        background = tuple(described["background"])
        result = np.empty((height, width, 3), np.uint8)
        losses = Losses(path.name, width * height, LOST_MAX, "px")
        rows = max(16, BAND_PX // width)
        for top in range(0, height, rows):
            band = _read_band(slide, top, width, min(rows, height - top), mpp, losses)
            result[top : top + rows] = normalise_background(band, background)
    if losses.lost:
        log.warning("%s; %d px are treated as background", losses.first, losses.lost)
    return result


def _read_band(slide: Slide, top: int, width: int, height: int, mpp: float, losses: Losses) -> RGB:
    def read(left: int, upper: int, width: int, height: int) -> RGB:
        scale = mpp / slide.mpp
        return slide.read(left * scale, (top + upper) * scale, width, height, mpp)

    return read_region(read, width, height, piece_px=PIECE_PX, fill=slide.background, losses=losses)


def _reduce(rgb: RGB, factor: int) -> RGB:
    height, width = rgb.shape[:2]
    padded = np.pad(rgb, ((0, -height % factor), (0, -width % factor), (0, 0)), constant_values=255)
    squares = padded.reshape(padded.shape[0] // factor, factor, -1, factor, 3)
    return np.asarray(np.rint(squares.mean(axis=(1, 3))), np.uint8)


def _tissue_only(rgb: RGB, described: Mapping[str, Any], mpp: float) -> RGB:
    png = np.frombuffer(described["tissue"], np.uint8)
    outline = np.asarray(cv2.imdecode(png, cv2.IMREAD_GRAYSCALE))
    side = 2 * round(TISSUE_MARGIN * max(outline.shape)) + 1
    wide = cv2.dilate(outline, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)))
    # The outline covers the slide from edge to edge, the canvas up to its last complete pixel.
    width, height = (max(1, round(side_um / mpp)) for side_um in size_um(described))
    inside = cv2.resize(wide, (width, height), interpolation=cv2.INTER_NEAREST) > 0
    inside = inside[: rgb.shape[0], : rgb.shape[1]]
    result = np.full_like(rgb, 255)
    rows, columns = inside.shape
    result[:rows, :columns][inside] = rgb[:rows, :columns][inside]
    return result
