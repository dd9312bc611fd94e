# ruff: noqa: D102 (documented in Reader)
"""Readers of slides and images: OpenSlide, TiffSlide and Pillow behind one interface."""

import abc
import contextlib
import io
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import openslide
import tiffslide
from PIL import Image, UnidentifiedImageError

from hemera.errors import InputFileError, SlideError
from hemera.files.faults import translated

RGB = npt.NDArray[np.uint8]

IMAGE_PIXELS_MAX = 100_000_000
"""An image without tiles is kept in memory: with its decoder, a gigabyte at this size."""

TILE_PX_MAX = 4096 * 4096
"""A stored tile is decoded as a whole, in several threads at once."""

IMAGE_COMPRESSIONS = frozenset({6, 7, 33003, 33004, 33005, 34712, 50001})
"""Of TIFF: JPEG, JPEG 2000 and WebP. Decoders of others receive the number of pixels."""


class Reader(abc.ABC):
    """An open file, with its levels from the finest to the coarsest."""

    name: str
    path: Path
    vendor: str
    level_sizes: tuple[tuple[int, int], ...]
    """(width, height) of each."""
    stated_mpp: tuple[float, float] | None
    """um per pixel along x and y, as the file states it under the name `stated_by`."""
    stated_by: str

    @abc.abstractmethod
    def read(self, level: int, x: int, y: int, width: int, height: int) -> RGB:
        """Read pixels of a level, all of them inside the level: (height, width, 3) RGB."""

    @abc.abstractmethod
    def close(self) -> None:
        """Close the file."""

    def check_complete(self) -> None:
        """Raise SlideError where the last pixel of a level cannot be read."""
        for level, (width, height) in enumerate(self.level_sizes):
            self.read(level, width - 1, height - 1, 1, 1)

    def stored_jpeg(self, level: int, x: int, y: int, width: int, height: int) -> bytes | None:
        """Return a region as a JPEG file, if it is one stored JPEG tile."""
        return None

    def reading(self, level: int, x: int, y: int) -> contextlib.AbstractContextManager[None]:
        """Translate errors of a library that reads pixels."""
        return fault_of(
            self.path, f"level {level} cannot be read at {x}, {y} ({{error}}); fetch the file again"
        )


@contextlib.contextmanager
def fault_of(path: Path, message: str) -> Iterator[None]:
    """Translate errors of a library into SlideError, or InputFileError where the file is away."""
    try:
        with translated(SlideError, f"{path.name}: {message}"):
            yield
    except SlideError as error:
        if path.exists():
            raise
        raise InputFileError(f"{path}: lost while it was read; run again") from error


def positive_pair(x: Any, y: Any) -> tuple[float, float] | None:
    """Return two resolutions as numbers, or None when they are not positive numbers."""
    try:
        pair = float(x), float(y)
    except (TypeError, ValueError):
        return None
    return pair if all(math.isfinite(value) and value > 0 for value in pair) else None


class _LibraryReader(Reader):
    """A reader by a library with the interface of OpenSlide."""

    def _describe(self, handle: Any) -> tuple[float, ...]:
        """Take the attributes from an open handle; return the downsamples it reads with."""
        properties = handle.properties
        self.vendor = str(properties.get(f"{self.name}.vendor") or "")
        self.level_sizes = tuple((int(w), int(h)) for w, h in handle.level_dimensions)
        self.stated_by = f"{self.name}.mpp-x"
        self.stated_mpp = positive_pair(*(properties.get(f"{self.name}.mpp-{a}") for a in "xy"))
        for level in range(len(self.level_sizes)):
            names = (f"{self.name}.level[{level}].tile-{side}" for side in ("width", "height"))
            sides = [int(float(properties.get(name) or 0)) for name in names]
            if math.prod(sides) > TILE_PX_MAX:
                raise ValueError(
                    f"stored tiles of {sides[0]} x {sides[1]} px on level {level}, more than "
                    f"{TILE_PX_MAX} px"
                )
        return tuple(float(downsample) for downsample in handle.level_downsamples)


class OpenSlideReader(_LibraryReader):
    """OpenSlide; every read has a handle of its own while it takes place.

    A handle that failed once fails for every later read, and must not be closed while another
    thread reads through it: libopenslide aborts the process.
    """

    name = "openslide"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._idle = [self._open()]
        try:
            with fault_of(path, "{error}; convert it to a TIFF of smaller tiles"):
                self._downsamples = self._describe(self._idle[0])
        except BaseException:
            self.close()
            raise

    def _open(self) -> openslide.OpenSlide:
        with fault_of(
            self.path,
            "OpenSlide cannot read it ({error}); fetch it again or convert it to a tiled pyramidal "
            "TIFF",
        ):
            return openslide.OpenSlide(self.path)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> RGB:
        downsample = self._downsamples[level]
        location = (round(x * downsample), round(y * downsample))
        try:
            handle = self._idle.pop()
        except IndexError:
            handle = self._open()
        try:
            with self.reading(level, x, y):
                rgba = np.asarray(handle.read_region(location, level, (width, height)))
        except BaseException:
            handle.close()
            raise
        self._idle.append(handle)
        return _on_white(rgba)

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()


class TiffSlideReader(_LibraryReader):
    """TiffSlide: for TIFF files that OpenSlide cannot read, or reads only some levels of."""

    name = "tiffslide"

    def __init__(self, path: Path) -> None:
        self.path = path
        # Its cache is not thread-safe.
        self._lock = threading.Lock()
        with fault_of(
            path,
            "cannot be opened as TIFF ({error}); convert it to 8-bit RGB or fetch it again",
        ):
            self._handle = tiffslide.TiffSlide(path)
            page: Any = self._handle.ts_tifffile.pages[0]
            self._downsamples = self._describe(self._handle)
            for level in self._handle.ts_tifffile.series[0].levels:
                # A strip, or the whole page, is decoded at once, as a tile is.
                chunk: Any = level.keyframe.chunks
                if level.keyframe.compression in IMAGE_COMPRESSIONS:
                    level.keyframe.decode = _checked(level.keyframe.decode, math.prod(chunk[:2]))
                if math.prod(chunk[:2]) > IMAGE_PIXELS_MAX:
                    raise ValueError(
                        f"stored pieces of {chunk[1]} x {chunk[0]} px, more than "
                        f"{IMAGE_PIXELS_MAX} px"
                    )
                if (most := max(level.keyframe.databytecounts, default=0)) > path.stat().st_size:
                    raise ValueError(f"a stored piece of {most} bytes, more than the file has")
            if page.bitspersample != 8 or page.samplesperpixel not in (3, 4):
                raise ValueError(
                    f"{page.samplesperpixel} channels of {page.bitspersample} bits, not 8-bit RGB"
                )

    def read(self, level: int, x: int, y: int, width: int, height: int) -> RGB:
        # It truncates location / downsample: give the first location that maps to (x, y).
        downsample = self._downsamples[level]
        location = (math.ceil(x * downsample), math.ceil(y * downsample))
        with self.reading(level, x, y), self._lock:
            rgb = self._handle.read_region(location, level, (width, height), as_array=True)
        return _on_white(np.asarray(rgb, np.uint8))

    def close(self) -> None:
        self._handle.close()


def check_stated_size(data: bytes, pixels_max: int) -> None:
    """Raise ValueError where the header of a stored image states more pixels."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "JPEG2000", "WEBP")) as image:
            width, height = image.size
    except UnidentifiedImageError:
        return
    if width * height > pixels_max:
        raise ValueError(f"an image of {width} x {height} px in a piece of {pixels_max} px")


def _checked(decode: Callable[..., Any], pixels_max: int) -> Callable[..., Any]:
    """Return the decoder of a page with `check_stated_size` before it."""

    def checked(data: Any, *words: Any, **named: Any) -> Any:
        if isinstance(data, bytes):
            check_stated_size(data, pixels_max)
        return decode(data, *words, **named)

    return checked


class ImageReader(Reader):
    """A plain image, decoded once and kept in memory."""

    name = "image"

    def __init__(self, path: Path) -> None:
        self.path = path
        with (
            fault_of(
                path,
                "cannot be read as a slide or an image ({error}); fetch it again, or convert it "
                "to 8-bit RGB, a large one to a tiled pyramidal TIFF",
            ),
            warnings.catch_warnings(),
        ):
            # Of a large or damaged image; the errors below name its fault.
            warnings.simplefilter("ignore")
            data = path.read_bytes()
            image = Image.open(io.BytesIO(data), formats=("BMP", "JPEG", "PNG", "TIFF", "WEBP"))
            width, height = image.size
            if not 0 < width * height <= IMAGE_PIXELS_MAX:
                raise ValueError(f"{width} x {height} px, not 1 to {IMAGE_PIXELS_MAX} px")
            if _bits(image, data) > 8:
                raise ValueError(f"more than 8 bits per channel, mode {image.mode}")
            self.vendor = str(image.format or "").lower()
            dpi = positive_pair(*image.info.get("dpi", (None, None)))
            self.stated_mpp = (25400 / dpi[0], 25400 / dpi[1]) if dpi else None
            self.stated_by = "dpi"
            if image.format == "PNG":
                # Pillow decodes without a look at the checksums.
                Image.open(io.BytesIO(data)).verify()
            self._pixels = _rgb(image)
        self.level_sizes = ((width, height),)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> RGB:
        return self._pixels[y : y + height, x : x + width].copy()

    def close(self) -> None:
        self._pixels = np.empty((0, 0, 3), np.uint8)


def _bits(image: Image.Image, data: bytes) -> int:
    """Return the bits per channel; Pillow cuts some deeper images to 8 without an error."""
    if image.mode.startswith(("I", "F")):
        return 32
    if image.format == "PNG":
        return data[24]
    bits = getattr(image, "tag_v2", {}).get(258, 8)
    return int(max(bits) if isinstance(bits, tuple) else bits)


def _rgb(image: Image.Image) -> RGB:
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or (
        image.mode == "P" and "transparency" in image.info
    ):
        return _on_white(np.asarray(image.convert("RGBA")))
    if image.mode not in ("RGB", "L", "P", "1"):
        raise ValueError(f"colour mode {image.mode}")
    return np.asarray(image.convert("RGB"))


def _on_white(pixels: npt.NDArray[Any]) -> RGB:
    """Blend RGBA with white; RGB is returned as it is."""
    if pixels.shape[2] == 3:
        return np.ascontiguousarray(pixels)
    alpha = pixels[..., 3]
    if alpha.min() == 255:
        rgb = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGBA2RGB)
        return np.asarray(rgb, np.uint8)
    opacity = alpha[..., None].astype(np.uint16)
    mixed = (pixels[..., :3] * opacity + 255 * (255 - opacity) + 127) // 255
    return mixed.astype(np.uint8)
