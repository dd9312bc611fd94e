"""Slides and images behind one class.

Frame: a position is in level-0 pixels with edges at the integers, not shifted by the bounds that
some scanners store; see `hemera.imaging.geometry`. Resolution is given in um per pixel and is
exact: a read takes the next finer level and averages over the exact area of each pixel.
"""

import functools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Self

import cv2
import numpy as np
import numpy.typing as npt
import openslide

from hemera.errors import InputFileError, SlideError
from hemera.imaging import tiff
from hemera.imaging.background import (
    Background,
    constant_areas,
    fill_pixels,
    measure_background,
)
from hemera.imaging.color import Color
from hemera.imaging.dicom import DicomReader, is_dicom
from hemera.imaging.geometry import best_level, level_downsample
from hemera.imaging.readers import ImageReader, OpenSlideReader, Reader, TiffSlideReader
from hemera.imaging.resample import area_resample, shift_resample
from hemera.imaging.tolerant import LOST_MAX, Losses, read_region
from hemera.sheet import MPP_BOUNDS

log = logging.getLogger(__name__)

RGB = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

READERS: dict[str, Callable[[Path], Reader]] = {
    "tiff": tiff.TiffReader,
    "openslide": OpenSlideReader,
    "tiffslide": TiffSlideReader,
    "wsidicom": DicomReader,
    "image": ImageReader,
}

SIDE_MM_MAX = 160.0
"""Longest side of a slide; the largest for whole-mount sections are 100 x 150 mm."""
ANISOTROPY_MAX = 0.01
"""Largest relative difference of um per pixel along x and y."""
MISMATCH_MAX = 0.10
"""Relative difference of the sheet's and the file's resolution that is warned of."""

_SMALL_SIDE = 1024
_BAND_PX = 16_000_000
_PIECE_PX = 128
# Side of the square that is read to see whether a place of an overview is of one colour.
_CONSTANT_PX = 48


class Slide:
    """One open slide or plain image; a context manager, one per process.

    `size_px` (width, height) and `mpp` are those of level 0; `mpp_source` is ``sheet``, or what in
    the file states it.
    """

    def __init__(
        self,
        reader: Reader,
        mpp: float,
        mpp_source: str,
        background: Background | None = None,
    ) -> None:
        """Wrap an open reader; use `open_slide`."""
        self.path = reader.path
        self.reader = reader.name
        self.vendor = reader.vendor
        self.level_sizes = reader.level_sizes
        self.size_px = self.level_sizes[0]
        self.mpp = mpp
        self.mpp_source = mpp_source
        self.level_downsamples = tuple(
            level_downsample(self.size_px, size) for size in self.level_sizes
        )
        self.level_mpps = tuple(mpp * math.sqrt(fx * fy) for fx, fy in self.level_downsamples)
        self._reader = reader
        if background is not None:
            self.measured_background = background

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._reader.close()

    def check_complete(self) -> None:
        """Raise SlideError where the file ends before its last stored pixels."""
        self._reader.check_complete()

    @property
    def background(self) -> Color:
        """The colour of the background, (r, g, b)."""
        return self.measured_background.color

    @functools.cached_property
    def measured_background(self) -> Background:
        """The background, as given to `open_slide`, or as measured on an overview."""
        width, height = self.size_px
        scale = max(width, height) / max(self._small.shape[:2])
        constant = constant_areas(self._small, self._is_constant if scale > 1 else None)
        return measure_background([self._small], self.mpp * scale, [constant])

    def _is_constant(self, x: float, y: float) -> bool:
        """Return whether there is one colour only around a place, in fractions of both sides."""
        side = min(_CONSTANT_PX, *self.size_px)
        left, top = (
            min(max(round(at * length - side / 2), 0), length - side)
            for at, length in zip((x, y), self.size_px, strict=True)
        )
        pixels = self._reader.read(0, left, top, side, side)
        return bool((pixels == pixels[0, 0]).all())

    def filled(self, shape: tuple[int, int]) -> Mask | None:
        """Return where the slide has no image, (H, W) of this shape from edge to edge.

        None where it has one everywhere.
        """
        found = fill_pixels(self._small, self.measured_background.fill)
        if found is None:
            return None
        parts = cv2.resize(found.astype(np.float32), shape[::-1], interpolation=cv2.INTER_AREA)
        return np.asarray(parts > 0)

    @functools.cached_property
    def _small(self) -> RGB:
        return self._shrunk(_SMALL_SIDE)

    def read(self, x_px: float, y_px: float, width: int, height: int, mpp: float) -> RGB:
        """Read a region at a resolution: (height, width, 3) uint8 RGB.

        Its left and top edge are in level-0 pixels, possibly fractions or outside, where the result
        has the colour of `background`; its size is in pixels of `mpp`. A resolution finer than the
        slide's own is interpolated bilinearly.

        Raises:
            SlideError: when the pixels cannot be decoded; the slide stays usable.
        """
        level, (left, top), step = self._locate(x_px, y_px, mpp)
        if _whole((left, top), step, (width, height)):
            return self.read_level(level, round(left), round(top), width, height)
        x0, y0 = math.floor(left) - 1, math.floor(top) - 1
        x1 = math.ceil(left + width * step[0]) + 1
        y1 = math.ceil(top + height * step[1]) + 1
        pixels = self.read_level(level, x0, y0, x1 - x0, y1 - y0)
        resample = area_resample if min(step) >= 1 else shift_resample
        return resample(pixels, (left - x0, top - y0), step, (width, height))

    def stored_jpeg(
        self, x_px: float, y_px: float, width: int, height: int, mpp: float
    ) -> bytes | None:
        """Return a region as a JPEG file without decoding it, if it is one stored JPEG tile.

        The arguments are those of `read`, which returns the pixels of that file.
        """
        level, corner, step = self._locate(x_px, y_px, mpp)
        x, y = round(corner[0]), round(corner[1])
        level_width, level_height = self.level_sizes[level]
        inside = 0 <= x <= level_width - width and 0 <= y <= level_height - height
        if not inside or not _whole(corner, step, (width, height)):
            return None
        return self._reader.stored_jpeg(level, x, y, width, height)

    def _locate(
        self, x_px: float, y_px: float, mpp: float
    ) -> tuple[int, tuple[float, float], tuple[float, float]]:
        """Return the level for a resolution, a position on it, and its pixels per one of `mpp`."""
        scale = mpp / self.mpp
        level = best_level(self.level_downsamples, scale)
        fx, fy = self.level_downsamples[level]
        return level, (x_px / fx, y_px / fy), (scale / fx, scale / fy)

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> RGB:
        """Read pixels of one level as they are stored; as `read`, in pixels of that level."""
        level_width, level_height = self.level_sizes[level]
        x0, y0 = max(x, 0), max(y, 0)
        x1, y1 = min(x + width, level_width), min(y + height, level_height)
        if (x0, y0, x1, y1) == (x, y, x + width, y + height):
            return self._reader.read(level, x, y, width, height)
        result = np.empty((height, width, 3), np.uint8)
        result[:] = self.background
        if x1 > x0 and y1 > y0:
            pixels = self._reader.read(level, x0, y0, x1 - x0, y1 - y0)
            result[y0 - y : y1 - y, x0 - x : x1 - x] = pixels
        return result

    def overview(
        self, *, side_px: int | None = None, mpp: float = math.nan
    ) -> tuple[RGB, tuple[float, float]]:
        """Read the whole slide at a resolution, or with its longest side at most `side_px`.

        A resolution finer than the slide's gives the slide's own. Stored tiles that cannot be
        decoded are white; SlideError when they are more than a tenth of the slide.

        Returns:
            (H, W, 3) uint8 RGB that covers the slide from edge to edge, and its effective um per
            pixel along x and y: sizes are integers, so they differ a little from the request.
        """
        width, height = self.size_px
        if side_px is None:
            side_px = math.ceil(max(width, height) * self.mpp / mpp)
        view = self._small.copy() if side_px == _SMALL_SIDE else self._shrunk(side_px)
        return view, (width * self.mpp / view.shape[1], height * self.mpp / view.shape[0])

    def _shrunk(self, side_px: int) -> RGB:
        width, height = self.size_px
        scale = max(1.0, max(width, height) / side_px)
        out_width, out_height = max(1, round(width / scale)), max(1, round(height / scale))
        level = best_level(self.level_downsamples, scale)
        level_width, level_height = self.level_sizes[level]
        fx, fy = self.level_downsamples[level]
        step_x, step_y = width / fx / out_width, height / fy / out_height
        # In bands of the result's rows, so that a slide without levels fits into memory.
        rows = max(1, int(_BAND_PX / (level_width * max(step_y, 1))))
        result = np.empty((out_height, out_width, 3), np.uint8)
        losses = Losses(self.path.name, level_width * level_height, LOST_MAX, "px")
        for row in range(0, out_height, rows):
            count = min(rows, out_height - row)
            top = row * step_y
            y0 = min(math.floor(top), level_height - 1)
            y1 = min(max(math.ceil(top + count * step_y), y0 + 1), level_height)
            band = read_region(
                functools.partial(self._read_below, level, y0), level_width, y1 - y0,
                piece_px=_PIECE_PX, fill=(255, 255, 255), losses=losses,
            )  # fmt: skip
            result[row : row + count] = area_resample(
                band, (0.0, top - y0), (step_x, step_y), (out_width, count)
            )
        if losses.lost:
            log.warning("%s; %d px are white in its overview", losses.first, losses.lost)
        return result

    def _read_below(self, level: int, top: int, x: int, y: int, width: int, height: int) -> RGB:
        return self._reader.read(level, x, top + y, width, height)


def _whole(corner: tuple[float, float], step: tuple[float, float], size: tuple[int, int]) -> bool:
    """Return whether a region is integer pixels of its level, to a hundredth of one."""
    return all(
        max(abs(each - 1) * count, abs(start - round(start))) < 0.01
        for start, each, count in zip(corner, step, size, strict=True)
    )


def open_slide(
    path: Path,
    *,
    mpp: float | None = None,
    reader: str = "auto",
    mpp_column: str = "he_mpp",
    background: Background | None = None,
) -> Slide:
    """Open a slide or an image, by its content, not by its name.

    `mpp` overrides the resolution that the file states; `mpp_column` is what error messages name as
    the remedy. `reader` is a key of `READERS`, or auto: the first that reads the file completely.
    Without a background, it is measured when needed.
    """
    path = Path(path)
    opened = _open_reader(path, reader)
    try:
        resolved, source = _resolution(opened, mpp, mpp_column)
        _check_extent(path.name, opened.level_sizes[0], resolved, mpp_column)
    except SlideError:
        opened.close()
        raise
    return Slide(opened, resolved, source, background)


def read_header(path: Path) -> tuple[tuple[int, int], float | None]:
    """Return size, px, and resolution, um/px; None where a file states none that is possible.

    Raises:
        SlideError: when the file cannot be opened.
    """
    opened = _open_reader(path, "auto")
    try:
        return opened.level_sizes[0], _resolution(opened, None, "mpp")[0]
    except SlideError:
        return opened.level_sizes[0], None
    finally:
        opened.close()


def _check_extent(name: str, size_px: tuple[int, int], mpp: float, column: str) -> None:
    """Raise SlideError for an extent that no slide has, before an overview needs its memory."""
    width_mm, height_mm = (side * mpp / 1000 for side in size_px)
    if min(size_px) < 1 or max(width_mm, height_mm) > SIDE_MM_MAX:
        raise SlideError(
            f"{name}: {size_px[0]} x {size_px[1]} px at {mpp:.4g} um/px are {width_mm:.4g} x "
            f"{height_mm:.4g} mm, more than {SIDE_MM_MAX:g}; fetch the file again, or correct "
            f"{column}"
        )


def _open_reader(path: Path, reader: str) -> Reader:
    name = path.name
    if not path.exists():
        raise InputFileError(f"{path}: no such file; correct the path")
    if not path.is_file():
        raise SlideError(f"{name}: a folder, pipe or device, not a file; correct the path")
    with path.open("rb") as file:
        head = file.read(4)
    if not head:
        raise SlideError(f"{name}: the file is empty; fetch it again")
    if reader != "auto":
        return READERS[reader](path)
    vendor = openslide.OpenSlide.detect_format(path)
    if not head.startswith(tiff.MAGIC):
        if is_dicom(path):
            return _open_dicom(path)
        return OpenSlideReader(path) if vendor else ImageReader(path)
    return _open_tiff(path, vendor)


def _open_dicom(path: Path) -> Reader:
    """Open DICOM with OpenSlide if it can read it, else with wsidicom."""
    try:
        return OpenSlideReader(path)
    except InputFileError:
        raise
    except SlideError:
        return DicomReader(path)


def _open_tiff(path: Path, vendor: str | None) -> Reader:
    """Open a TIFF directly if possible, else with the reader that finds most levels."""
    if not tiff.is_tiled(path) and vendor is None:
        return ImageReader(path)
    errors: list[SlideError] = []
    # For other vendors OpenSlide reads what the tags do not state: overlaps, gaps, several scans.
    if vendor in (None, "generic-tiff", "aperio"):
        try:
            return tiff.TiffReader(path)
        except tiff.DamagedTiffError:
            raise
        except SlideError as error:
            errors.append(error)
    found: list[Reader] = []
    for name in ("openslide", "tiffslide"):
        try:
            found.append(READERS[name](path))
        except SlideError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    best, *others = sorted(found, key=lambda opened: -len(opened.level_sizes))
    for other in others:
        other.close()
    return best


def _resolution(reader: Reader, given: float | None, column: str) -> tuple[float, str]:
    """Return the resolution of a file and where it comes from: the sheet, or the file itself."""
    name, stated_by = reader.path.name, reader.stated_by
    remedy = f"give {column}" + ("" if column.startswith("--") else " in the sheet")
    low, high = MPP_BOUNDS
    x, y = reader.stated_mpp or (math.nan, math.nan)
    stated = math.sqrt(x * y)
    plausible = low <= stated <= high
    if given is not None:
        if plausible and abs(stated / given - 1) > MISMATCH_MAX:
            log.warning(
                "%s: %.4g um/px in the file (%s), %.4g in the sheet; the sheet's is used",
                name, stated, stated_by, given,
            )  # fmt: skip
        return given, "sheet"
    if reader.stated_mpp is None:
        raise SlideError(f"{name}: no resolution in the file; {remedy}")
    if abs(x - y) > ANISOTROPY_MAX * max(x, y):
        raise SlideError(
            f"{name}: {x:.4g} um/px along x but {y:.4g} along y ({stated_by}); resample it to "
            f"square pixels, or {remedy} if the file is wrong"
        )
    if not plausible:
        raise SlideError(
            f"{name}: {stated:.4g} um/px ({stated_by}) is outside {low:g} to {high:g}; {remedy}"
        )
    return stated, stated_by
