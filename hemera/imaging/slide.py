"""Slides and images behind one class: the only file that knows how they are read.

Frame: a position is in level-0 pixels with edges at the integers, unshifted by the bounds that
some scanners store; see `hemera.geometry`. Resolution is asked for in um per pixel and honoured
exactly: a read takes the next finer level and averages over the exact area of each pixel.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import logging
import math
import os
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import cv2
import numpy as np
import numpy.typing as npt
import openslide
import simplejpeg
import tifffile
import tiffslide
from PIL import Image

from hemera.errors import SlideError
from hemera.imaging.color import background_color
from hemera.imaging.geometry import best_level, level_downsample
from hemera.imaging.resample import area_resample, shift_resample

log = logging.getLogger(__name__)

RGB = npt.NDArray[np.uint8]

READERS = ("auto", "tiff", "openslide", "tiffslide", "image")
"""Names of the readers; auto takes the first that reads the whole file."""

ANISOTROPY_MAX = 0.01
MISMATCH_MAX = 0.10
LOST_MAX = 0.10
"""A slide of which more cannot be decoded is refused as a whole."""

_ADOBE = re.compile(rb"\xff\xee..Adobe.{6}(.)", re.DOTALL)
_ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
"""Adobe's marker with colour transform 0."""
_JPEG_HEAD = 2048
"""Where a stored tile's own word about its colours stands, if it has one."""
_SMALL_SIDE = 1024
_PIECE = 128
_CACHE_BYTES = 96 * 2**20
_DIRECT_COMPRESSIONS = frozenset({1, 5, 7, 8, 32946, 50000, 50001})
"""None, LZW, JPEG, Deflate (both), Zstandard, WebP."""
IMAGE_PIXELS_MAX = 178_956_970
"""An image without tiles is held in memory whole: half a gigabyte at this size."""

_PIL_FAULTS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_TIFF_FAULTS = (
    tifffile.TiffFileError,
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    struct.error,
    zlib.error,
    NotImplementedError,
)


class _Backend(Protocol):
    """What a reader must offer: whole pixels of one level, inside the level."""

    reader: str
    vendor: str
    level_sizes: tuple[tuple[int, int], ...]
    stated_mpp: tuple[float, float] | None
    stated_by: str

    def read(self, level: int, x: int, y: int, width: int, height: int) -> RGB: ...

    def close(self) -> None: ...


class Slide:
    """One scanned file or plain image, opened; a context manager, one per process.

    Attributes:
        path: the file.
        reader: tiff, openslide, tiffslide or image.
        vendor: what wrote it, as far as the reader knows.
        size_px: (width, height) of level 0.
        mpp: um per pixel of level 0.
        mpp_source: ``sheet``, or what in the file says so.
        level_downsamples: (x, y) of every level, exact.
        level_mpps: um per pixel of every level.
    """

    def __init__(
        self,
        path: Path,
        backend: _Backend,
        mpp: float,
        mpp_source: str,
        background: tuple[int, int, int] | None = None,
    ) -> None:
        """Wrap an opened reader; use `open_slide`."""
        self.path = path
        self.reader = backend.reader
        self.vendor = backend.vendor
        self.size_px = backend.level_sizes[0]
        self.mpp = mpp
        self.mpp_source = mpp_source
        self.level_sizes = backend.level_sizes
        self.level_downsamples = tuple(
            level_downsample(self.size_px, size) for size in backend.level_sizes
        )
        self.level_mpps = tuple(mpp * math.sqrt(fx * fy) for fx, fy in self.level_downsamples)
        self._backend = backend
        self._background = background
        self._small: RGB | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        """Return the slide."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the slide."""
        self.close()

    def __reduce__(self) -> Any:
        """Refuse to be pickled: a handle shared by processes reads wrong pixels."""
        raise TypeError(f"{self.path.name}: an open slide cannot be pickled; open it per process")

    def close(self) -> None:
        """Close the file."""
        self._backend.close()

    @property
    def background(self) -> tuple[int, int, int]:
        """The colour of bare glass, from the overview."""
        with self._lock:
            if self._background is None:
                self._background = background_color(self._overview(_SMALL_SIDE)[0])
            return self._background

    def read(self, x_px: float, y_px: float, width: int, height: int, mpp: float) -> RGB:
        """Read a region at a resolution.

        Args:
            x_px: left edge in level-0 pixels; may be a fraction or outside.
            y_px: top edge.
            width: width of the result in pixels of `mpp`.
            height: its height.
            mpp: um per pixel of the result. Finer than the slide's own: interpolated bilinearly;
                who does not want that compares with `Slide.mpp` first.

        Returns:
            (height, width, 3) uint8 RGB; outside the slide the colour of `background`.

        Raises:
            SlideError: when the pixels cannot be decoded; the slide stays usable.
        """
        level, left, top, step_x, step_y = self._place(x_px, y_px, mpp)
        if _whole(left, top, step_x, step_y, width, height):
            return self.read_level(level, round(left), round(top), width, height)
        x0, y0 = math.floor(left) - 1, math.floor(top) - 1
        x1 = math.ceil(left + width * step_x) + 1
        y1 = math.ceil(top + height * step_y) + 1
        pixels = self.read_level(level, x0, y0, x1 - x0, y1 - y0)
        resample = area_resample if min(step_x, step_y) >= 1 else shift_resample
        return resample(pixels, left - x0, top - y0, step_x, step_y, width, height)

    def stored_jpeg(
        self, x_px: float, y_px: float, width: int, height: int, mpp: float
    ) -> bytes | None:
        """Return a region as the JPEG file that it is stored as, where one stored tile is it.

        The arguments are those of `read`, which gives the pixels that this decodes to. None where
        the region is not one tile of a level as it is stored, or the slide is not JPEG.

        Raises:
            SlideError: when the file cannot be read.
        """
        level, left, top, step_x, step_y = self._place(x_px, y_px, mpp)
        x, y = round(left), round(top)
        level_width, level_height = self.level_sizes[level]
        if (
            not isinstance(self._backend, _Tiff)
            or not _whole(left, top, step_x, step_y, width, height)
            or min(x, y) < 0
            or x + width > level_width
            or y + height > level_height
        ):
            return None
        return self._backend.stored_jpeg(level, x, y, width, height)

    def _place(
        self, x_px: float, y_px: float, mpp: float
    ) -> tuple[int, float, float, float, float]:
        """Return the level for a resolution, a place on it, and its pixels per one of `mpp`."""
        scale = mpp / self.mpp
        level = best_level(self.level_downsamples, scale)
        fx, fy = self.level_downsamples[level]
        return level, x_px / fx, y_px / fy, scale / fx, scale / fy

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> RGB:
        """Read pixels of one level as they are stored.

        Args:
            level: 0 is the finest.
            x: left edge in pixels of that level; may be outside.
            y: top edge.
            width: in pixels of that level.
            height: in pixels of that level.

        Returns:
            (height, width, 3) uint8 RGB; what lies outside has the colour of `background`.

        Raises:
            SlideError: when the pixels cannot be decoded; the slide stays usable.
        """
        level_width, level_height = self.level_sizes[level]
        x0, y0 = max(x, 0), max(y, 0)
        x1, y1 = min(x + width, level_width), min(y + height, level_height)
        if (x0, y0, x1, y1) == (x, y, x + width, y + height):
            return self._backend.read(level, x, y, width, height)
        result = np.empty((height, width, 3), np.uint8)
        result[:] = self.background
        if x1 > x0 and y1 > y0:
            result[y0 - y : y1 - y, x0 - x : x1 - x] = self._backend.read(
                level, x0, y0, x1 - x0, y1 - y0
            )
        return result

    def overview(
        self, *, side_px: int | None = None, mpp: float | None = None
    ) -> tuple[RGB, tuple[float, float]]:
        """Read the whole slide, small.

        Args:
            side_px: longest side of the result at most; or
            mpp: resolution wanted.

        Returns:
            (H, W, 3) uint8 RGB that covers the slide from edge to edge, and the effective um per
            pixel along x and y: sizes are whole, so it differs a little from what was asked for.
            A resolution finer than the slide's gives the slide's own. Stored tiles that cannot be
            decoded are white.

        Raises:
            SlideError: when more than a tenth of the slide cannot be decoded.
        """
        width, height = self.size_px
        if mpp is not None:
            side_px = math.ceil(max(width, height) * self.mpp / mpp)
        if side_px is None:
            raise ValueError("overview: give side_px or mpp")
        return self._overview(side_px)

    def _overview(self, side_px: int) -> tuple[RGB, tuple[float, float]]:
        width, height = self.size_px
        if side_px == _SMALL_SIDE and self._small is not None:
            small = self._small
            return small.copy(), (
                width * self.mpp / small.shape[1],
                height * self.mpp / small.shape[0],
            )
        scale = max(1.0, max(width, height) / side_px)
        out_width = max(1, round(width / scale))
        out_height = max(1, round(height / scale))
        level = best_level(self.level_downsamples, scale)
        level_width, level_height = self.level_sizes[level]
        # In bands of the result's rows, so that a slide without levels fits into memory.
        fx, fy = self.level_downsamples[level]
        step_x = width / fx / out_width
        step_y = height / fy / out_height
        rows = max(1, int(16_000_000 / (level_width * max(step_y, 1))))
        result = np.empty((out_height, out_width, 3), np.uint8)
        faults: list[tuple[int, SlideError]] = []
        for row in range(0, out_height, rows):
            count = min(rows, out_height - row)
            top = row * step_y
            y0 = min(math.floor(top), level_height - 1)
            y1 = min(max(math.ceil(top + count * step_y), y0 + 1), level_height)
            band, lost = self._read_band(level, y0, y1)
            faults += lost
            if sum(area for area, _ in faults) > LOST_MAX * level_width * level_height:
                raise faults[0][1]
            result[row : row + count] = area_resample(
                band, 0.0, top - y0, step_x, step_y, out_width, count
            )
        for _, error in faults[:1]:
            log.warning("%s; %d such places are white in its overview", error, len(faults))
        if side_px == _SMALL_SIDE:
            self._small = result.copy()
        return result, (width * self.mpp / out_width, height * self.mpp / out_height)

    def _read_band(self, level: int, y0: int, y1: int) -> tuple[RGB, list[tuple[int, SlideError]]]:
        """Read whole rows of a level; return what could not be read as (area, error)."""
        width = self.level_sizes[level][0]
        try:
            return self._backend.read(level, 0, y0, width, y1 - y0), []
        except SlideError:
            pass
        # A broken tile must not cost the whole slide: piece by piece, what can be read.
        faults: list[tuple[int, SlideError]] = []
        band = np.full((y1 - y0, width, 3), 255, np.uint8)
        for top in range(y0, y1, _PIECE):
            for left in range(0, width, _PIECE):
                size = min(_PIECE, width - left), min(_PIECE, y1 - top)
                try:
                    part = self._backend.read(level, left, top, *size)
                except SlideError as error:
                    faults.append((size[0] * size[1], error))
                    continue
                band[top - y0 : top - y0 + size[1], left : left + size[0]] = part
        return band, faults


def _whole(left: float, top: float, step_x: float, step_y: float, width: int, height: int) -> bool:
    """Tell whether a region is whole pixels of its level, to a hundredth of one."""
    drift = max(abs(step_x - 1) * width, abs(step_y - 1) * height)
    return max(drift, abs(left - round(left)), abs(top - round(top))) < 0.01


def open_slide(
    path: Path,
    *,
    mpp: float | None = None,
    reader: str = "auto",
    mpp_min: float = 0.05,
    mpp_max: float = 20.0,
    mpp_column: str = "he_mpp",
    background: tuple[int, int, int] | None = None,
) -> Slide:
    """Open a slide or an image, by what it is, not by its name.

    Args:
        path: the file.
        mpp: its resolution from the sheet, which beats what the file says.
        reader: one of `READERS`.
        mpp_min: finest resolution taken for real.
        mpp_max: coarsest resolution taken for real.
        mpp_column: the column that error messages name as the remedy.
        background: colour of bare glass where it is known; None: found when first asked for.

    Raises:
        SlideError: in one line, when there is no such file, no reader for it, or no resolution.
    """
    path = Path(path)
    if reader not in READERS:
        raise SlideError(f"{path.name}: no reader {reader!r}; name one of {', '.join(READERS)}")
    backend = _open_backend(path, reader)
    try:
        resolved, source = _resolution(path.name, backend, mpp, mpp_min, mpp_max, mpp_column)
    except SlideError:
        backend.close()
        raise
    return Slide(path, backend, resolved, source, background)


def _resolution(
    name: str,
    backend: _Backend,
    given: float | None,
    mpp_min: float,
    mpp_max: float,
    column: str,
) -> tuple[float, str]:
    """Decide on one resolution and say where it comes from."""
    remedy = f"give {column} in pairs.tsv"
    stated, stated_by = backend.stated_mpp, backend.stated_by
    if given is not None:
        if not mpp_min <= given <= mpp_max:
            raise SlideError(
                f"{name}: {column} {given:g} is outside {mpp_min:g} to {mpp_max:g} um/px; "
                "correct it"
            )
        if stated is not None:
            mean = math.sqrt(stated[0] * stated[1])
            if mpp_min <= mean <= mpp_max and abs(mean / given - 1) > MISMATCH_MAX:
                log.warning(
                    "%s: %s says %.4g um/px, the sheet %.4g; the sheet's is used",
                    name,
                    stated_by,
                    mean,
                    given,
                )
        return given, "sheet"
    if stated is None:
        raise SlideError(f"{name}: no resolution in the file; {remedy}")
    x, y = stated
    if abs(x - y) > ANISOTROPY_MAX * max(x, y):
        raise SlideError(
            f"{name}: {x:.4g} um/px along x but {y:.4g} along y ({stated_by}); resample it to "
            f"square pixels, or {remedy} if the file is wrong"
        )
    mean = math.sqrt(x * y)
    if not mpp_min <= mean <= mpp_max:
        raise SlideError(
            f"{name}: {mean:.4g} um/px ({stated_by}) is outside {mpp_min:g} to {mpp_max:g} um/px; "
            f"{remedy}"
        )
    return mean, stated_by


def _open_backend(path: Path, reader: str) -> _Backend:
    name = path.name
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except FileNotFoundError:
        raise SlideError(f"{name}: no such file {path}; correct the sheet") from None
    except OSError as error:
        raise SlideError(f"{name}: {error.strerror}; make it readable") from error
    if not head:
        raise SlideError(f"{name}: the file is empty; fetch it again")
    if reader == "tiff":
        return _Tiff(path)
    if reader == "openslide":
        return _OpenSlide(path)
    if reader == "tiffslide":
        return _TiffSlide(path)
    if reader == "image":
        return _Image(path)
    if not _is_tiff(head) and _is_plain_image(head):
        return _Image(path)
    if _is_tiff(head):
        return _open_tiff(path)
    return _OpenSlide(path)


def _open_tiff(path: Path) -> _Backend:
    """Open a TIFF directly where its tiles are the picture, else by the reader that sees most."""
    vendor = openslide.OpenSlide.detect_format(path)
    if vendor is None and not _tiled(path):
        return _Image(path)
    faults: list[SlideError] = []
    # Of other vendors OpenSlide knows what the tags do not say: overlaps, gaps, several scans.
    if vendor in (None, "generic-tiff", "aperio"):
        try:
            return _Tiff(path)
        except SlideError as error:
            faults.append(error)
    found: list[_Backend] = []
    makers: tuple[Callable[[Path], _Backend], ...] = (_OpenSlide, _TiffSlide)
    for make in makers:
        try:
            found.append(make(path))
        except SlideError as error:
            faults.append(error)
    if not found:
        raise faults[0]
    best = max(found, key=lambda backend: len(backend.level_sizes))
    for backend in found:
        if backend is not best:
            backend.close()
    return best


def _tiled(path: Path) -> bool:
    try:
        with tifffile.TiffFile(path) as file:
            page: Any = file.pages[0]
            return bool(page.is_tiled)
    except _TIFF_FAULTS:
        return False


def _is_tiff(head: bytes) -> bool:
    return head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def _is_plain_image(head: bytes) -> bool:
    return head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM")) or (
        head.startswith(b"RIFF") and head[8:12] == b"WEBP"
    )


def _one_line(error: BaseException) -> str:
    # An address in memory differs from run to run, and reasons stand in tables.
    text = re.sub(r"\s*<[^<>]* object at 0x[0-9a-f]+>", "", str(error))
    return " ".join(text.split()) or type(error).__name__


def _positive(x: Any, y: Any) -> tuple[float, float] | None:
    """Read two resolutions as numbers, or say that there are none."""
    try:
        pair = float(x), float(y)
    except (TypeError, ValueError):
        return None
    return pair if all(math.isfinite(value) and value > 0 for value in pair) else None


class _Tiff:
    """Tiled TIFF, read tile by tile: exact at every level, whatever the sizes of the levels."""

    reader = "tiff"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._tiles: collections.OrderedDict[tuple[int, int], RGB] = collections.OrderedDict()
        self._tile_bytes = 0
        try:
            with tifffile.TiffFile(path) as file:
                self._pages = _pyramid(file)
                # These read from the file when first asked for.
                self._decoders = [page.decode for page in self._pages]
                self._tables = [page.jpegtables for page in self._pages]
                self._headers = [page.jpegheader for page in self._pages]
                self._places = [(page.dataoffsets, page.databytecounts) for page in self._pages]
                self._heads = [_JpegHead.of(page) for page in self._pages]
                if file.is_svs and any(0 in counts for _, counts in self._places[1:]):
                    # OpenSlide fills it from the finer level.
                    raise ValueError("a tile of a coarser level is missing")
                self.stated_mpp, self.stated_by = _tiff_mpp(file)
                self.vendor = "aperio" if file.is_svs else "generic-tiff"
        except _TIFF_FAULTS as error:
            raise SlideError(
                f"{path.name}: cannot be opened as tiled TIFF ({_one_line(error)}); fetch it again"
            ) from error
        self.level_sizes = tuple(
            (int(page.imagewidth), int(page.imagelength)) for page in self._pages
        )
        self._grids = [
            (int(page.tilewidth), int(page.tilelength), -(-size[0] // int(page.tilewidth)))
            for page, size in zip(self._pages, self.level_sizes, strict=True)
        ]
        self._file = os.open(path, os.O_RDONLY)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> RGB:
        tile_width, tile_height, across = self._grids[level]
        if (width, height) == (tile_width, tile_height) and not (x % width or y % height):
            tile = self._tile(level, y // height * across + x // width, x, y, keep=False)
            return tile if tile.flags.writeable else tile.copy()
        result = np.empty((height, width, 3), np.uint8)
        for row in range(y // tile_height, -(-(y + height) // tile_height)):
            for column in range(x // tile_width, -(-(x + width) // tile_width)):
                left, top = column * tile_width - x, row * tile_height - y
                x0, y0 = max(left, 0), max(top, 0)
                x1, y1 = min(left + tile_width, width), min(top + tile_height, height)
                # What is used in part will be wanted again. What is used up, as a rule, will not:
                # kept, it would take memory that the next tile could have.
                part = (x1 - x0) * (y1 - y0) < tile_width * tile_height
                tile = self._tile(level, row * across + column, x, y, keep=part)
                result[y0:y1, x0:x1] = tile[y0 - top : y1 - top, x0 - left : x1 - left]
        return result

    def stored_jpeg(self, level: int, x: int, y: int, width: int, height: int) -> bytes | None:
        """Return one stored tile as a JPEG file; None where the region is none, or not JPEG."""
        tile_width, tile_height, across = self._grids[level]
        head = self._heads[level]
        if (width, height) != (tile_width, tile_height) or x % width or y % height or head is None:
            return None
        data = self._stored(level, y // height * across + x // width, x, y)
        return head.whole(data) if data else None

    def _stored(self, level: int, index: int, x: int, y: int) -> bytes:
        """Return the bytes of one stored tile."""
        offsets, counts = self._places[level]
        try:
            offset, count = offsets[index], counts[index]
            data = os.pread(self._file, count, offset)
            if len(data) < count:
                raise ValueError(f"the file ends {count - len(data)} bytes early")
        except _TIFF_FAULTS as error:
            raise self._unreadable(level, x, y, error) from error
        return data

    def _unreadable(self, level: int, x: int, y: int, error: BaseException) -> SlideError:
        return SlideError(
            f"{self._path.name}: level {level} cannot be read at {x}, {y} ({_one_line(error)}); "
            "fetch the file again"
        )

    def _tile(self, level: int, index: int, x: int, y: int, *, keep: bool = True) -> RGB:
        """Decode one stored tile, or take it from those decoded last."""
        key = level, index
        with self._lock:
            found = self._tiles.get(key)
            if found is not None:
                self._tiles.move_to_end(key)
                return found
        data = self._stored(level, index, x, y)
        try:
            tile = self._decode(level, index, data)
        except _TIFF_FAULTS as error:
            raise self._unreadable(level, x, y, error) from error
        if not keep:
            return tile
        # Handed out to several readers.
        tile.flags.writeable = False
        with self._lock:
            if key not in self._tiles:
                self._tiles[key] = tile
                self._tile_bytes += tile.nbytes
                while self._tile_bytes > _CACHE_BYTES and len(self._tiles) > 1:
                    self._tile_bytes -= self._tiles.popitem(last=False)[1].nbytes
        return tile

    def _decode(self, level: int, index: int, data: bytes) -> RGB:
        width, height, _ = self._grids[level]
        shape = height, width, 3
        if not data:
            # A tile that was never written: glass that the scanner did not look at.
            return np.full(shape, 255, np.uint8)
        head = self._heads[level]
        jpeg = None if head is None else head.whole(data)
        if jpeg is not None:
            # Faster by a third than by way of tifffile, and to the bit the same.
            pixels = simplejpeg.decode_jpeg(jpeg, colorspace="RGB")
            if pixels.shape != shape:
                raise ValueError(f"a tile of shape {pixels.shape} instead of {shape}")
            return np.asarray(pixels, np.uint8)
        decoded = self._decoders[level](
            data,
            index,
            jpegtables=self._tables[level],
            jpegheader=self._headers[level],
            _fullsize=True,
        )[0]
        if decoded is None:
            return np.full(shape, 255, np.uint8)
        tile = np.asarray(decoded)[0]
        if tile.shape != shape or tile.dtype != np.uint8:
            raise ValueError(f"a tile of shape {tile.shape}, {tile.dtype}, instead of {shape}")
        return np.ascontiguousarray(tile)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._tiles.clear()


@dataclasses.dataclass(frozen=True)
class _JpegHead:
    """What a stored tile lacks to be a JPEG file of its own."""

    tables: bytes
    """Which the page keeps once for all tiles, without their first and last marker."""
    rgb: bool
    """The channels are RGB, which the tile may not say."""

    @classmethod
    def of(cls, page: Any) -> Self | None:
        """Return that of a page; None for one that is not JPEG."""
        if page.compression != tifffile.COMPRESSION.JPEG:
            return None
        tables: bytes = page.jpegtables or b""
        # Up to the last marker: some bytes may follow it.
        return cls(
            tables[2 : max(2, tables.rfind(b"\xff\xd9"))],
            page.photometric == tifffile.PHOTOMETRIC.RGB,
        )

    def whole(self, data: bytes) -> bytes | None:
        """Return a stored tile as a file; None where it contradicts its page about its colours."""
        said = _ADOBE.search(data, 0, _JPEG_HEAD)
        if said and (said[1] == b"\0") != self.rgb:
            return None
        marker = _ADOBE_RGB if self.rgb and not said else b""
        return b"\xff\xd8" + marker + self.tables + data[2:]


def _pyramid(file: tifffile.TiffFile) -> list[Any]:
    """Return the pages that are the levels, finest first.

    Raises:
        ValueError: when the first page is not tiled 8-bit RGB in a known compression.
    """
    first: Any = file.pages[0]
    fault = _not_direct(first)
    if fault:
        raise ValueError(fault)
    levels: list[Any] = [first]
    others: list[Any] = [*(first.pages or []), *file.pages[1:]]
    for page in others:
        if isinstance(page, tifffile.TiffFrame):
            page = page.aspage()
        if _not_direct(page) or int(page.subfiletype) & 4:
            continue
        x, y = first.imagewidth / page.imagewidth, first.imagelength / page.imagelength
        # The same picture, smaller; a label or a macro image has other proportions.
        slack = max(x, y) * (1 / page.imagewidth + 1 / page.imagelength)
        if page.imagewidth < levels[-1].imagewidth and abs(x - y) <= slack:
            levels.append(page)
    return levels


def _not_direct(page: Any) -> str | None:
    """Return why a page cannot be read tile by tile, or None."""
    if not page.is_tiled:
        return "it has no tiles"
    if page.bitspersample != 8 or page.samplesperpixel != 3 or page.planarconfig != 1:
        return (
            f"{page.samplesperpixel} channels of {page.bitspersample} bits instead of interleaved "
            "8-bit RGB"
        )
    if page.photometric not in (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR):
        return f"photometric interpretation {page.photometric}"
    if page.compression not in _DIRECT_COMPRESSIONS:
        return f"compression {page.compression}"
    return None


def _tiff_mpp(file: tifffile.TiffFile) -> tuple[tuple[float, float] | None, str]:
    """Read the resolution: the scanner's own word first, then the tags of TIFF."""
    page: Any = file.pages[0]
    if file.is_svs:
        found = re.search(r"\|\s*MPP\s*=\s*([0-9.]+)", page.description)
        if found:
            return _positive(found[1], found[1]), "aperio.MPP"
    if file.is_ome:
        sizes = re.search(r"<(?:\w+:)?Pixels\b[^>]*>", page.description)
        values = (
            dict(re.findall(r'PhysicalSize(X|Y|XUnit|YUnit)="([^"]*)"', sizes[0])) if sizes else {}
        )
        units = {values.get("XUnit", "µm"), values.get("YUnit", "µm")}
        if "X" in values and units <= {"µm", "μm", "um"}:
            return _positive(values["X"], values.get("Y", values["X"])), "ome.PhysicalSizeX"
    um = {2: 25_400.0, 3: 10_000.0}.get(int(page.resolutionunit))
    if um is None or 282 not in page.tags or 283 not in page.tags:
        return None, ""
    per_unit = _positive(*(_quotient(page.tags[code].value) for code in (282, 283)))
    # Below 1000 dots to the inch, a screen's or a printer's resolution was left in.
    if per_unit is None or max(um / value for value in per_unit) > 25.4 * 20:
        return None, ""
    return (um / per_unit[0], um / per_unit[1]), "tiff.XResolution"


def _quotient(value: Any) -> float:
    """Return a rational number of TIFF; NaN where it has no denominator: tifffile says 1."""
    numerator, denominator = value
    return numerator / denominator if denominator else math.nan


class _OpenSlide:
    """OpenSlide: every read has a handle to itself, for as long as it takes.

    A handle that failed once fails ever after, for every thread that uses it, and must not be
    closed while another thread reads through it: libopenslide aborts the process.
    """

    reader = "openslide"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._closed = False
        handle = self._open()
        self._idle = [handle]
        properties = handle.properties
        self.vendor = str(properties.get("openslide.vendor", ""))
        self.level_sizes = tuple(
            (int(width), int(height)) for width, height in handle.level_dimensions
        )
        self.stated_mpp = _positive(
            properties.get("openslide.mpp-x"), properties.get("openslide.mpp-y")
        )
        self.stated_by = "openslide.mpp-x"
        self._downsamples = tuple(float(value) for value in handle.level_downsamples)

    def _open(self) -> openslide.OpenSlide:
        try:
            return openslide.OpenSlide(self._path)
        except openslide.OpenSlideUnsupportedFormatError as error:
            raise SlideError(
                f"{self._path.name}: neither an image nor a slide that OpenSlide reads; convert it "
                "to a tiled pyramidal TIFF"
            ) from error
        except (openslide.OpenSlideError, OSError) as error:
            raise SlideError(
                f"{self._path.name}: cannot be opened ({_one_line(error)}); fetch it again"
            ) from error

    def read(self, level: int, x: int, y: int, width: int, height: int) -> RGB:
        downsample = self._downsamples[level]
        location = (round(x * downsample), round(y * downsample))
        with self._lock:
            handle = self._idle.pop() if self._idle else None
        if handle is None:
            handle = self._open()
        healthy = False
        try:
            rgba = np.asarray(handle.read_region(location, level, (width, height)))
            healthy = True
        except (openslide.OpenSlideError, OSError) as error:
            raise SlideError(
                f"{self._path.name}: level {level} cannot be read at {x}, {y} "
                f"({_one_line(error)}); fetch the file again"
            ) from error
        finally:
            with self._lock:
                kept = healthy and not self._closed
                if kept:
                    self._idle.append(handle)
            if not kept:
                handle.close()
        return _on_white(rgba)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            handles, self._idle = self._idle, []
        for handle in handles:
            handle.close()


class _TiffSlide:
    """TiffSlide: for TIFF files that OpenSlide refuses or sees only in part."""

    reader = "tiffslide"

    def __init__(self, path: Path) -> None:
        self._path = path
        # Its cache is not made for threads.
        self._lock = threading.Lock()
        try:
            self._handle = tiffslide.TiffSlide(path)
            page: Any = self._handle.ts_tifffile.pages[0]
            # Properties divide by it, and do not ask.
            for code in (282, 283):
                if code in page.tags and math.isnan(_quotient(page.tags[code].value)):
                    del page.tags[code]
            properties = self._handle.properties
            self.vendor = str(properties.get("tiffslide.vendor") or "")
            self.level_sizes = tuple(
                (int(width), int(height)) for width, height in self._handle.level_dimensions
            )
            if page.bitspersample != 8 or page.samplesperpixel not in (3, 4):
                raise ValueError(
                    f"{page.samplesperpixel} channels of {page.bitspersample} bits, not 8-bit RGB"
                )
        except _TIFF_FAULTS as error:
            raise SlideError(
                f"{path.name}: cannot be opened as TIFF ({_one_line(error)}); convert "
                "it to 8-bit RGB or fetch it again"
            ) from error
        self.stated_mpp = _positive(
            properties.get("tiffslide.mpp-x"), properties.get("tiffslide.mpp-y")
        )
        self.stated_by = "tiffslide.mpp-x"

    def read(self, level: int, x: int, y: int, width: int, height: int) -> RGB:
        # It maps a place to the level by cutting place / downsample: the first that lands on it.
        downsample = float(self._handle.level_downsamples[level])
        location = (math.ceil(x * downsample), math.ceil(y * downsample))
        try:
            with self._lock:
                rgb = self._handle.read_region(location, level, (width, height), as_array=True)
        except _TIFF_FAULTS as error:
            raise SlideError(
                f"{self._path.name}: level {level} cannot be read at {x}, {y} "
                f"({_one_line(error)}); fetch the file again"
            ) from error
        array = np.asarray(rgb)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (3, 4):
            raise SlideError(
                f"{self._path.name}: {array.dtype} of shape {array.shape} is not 8-bit RGB; "
                "convert it"
            )
        return _on_white(array)

    def close(self) -> None:
        self._handle.close()


class _Image:
    """A plain image, decoded once and held whole."""

    reader = "image"

    def __init__(self, path: Path) -> None:
        name = path.name
        try:
            data = path.read_bytes()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = Image.open(io.BytesIO(data))
                width, height = image.size
                if width * height > IMAGE_PIXELS_MAX:
                    raise Image.DecompressionBombError(f"{width} x {height} px")
                _require_8_bit(name, image, data)
                self.vendor = str(image.format or "").lower()
                self.stated_mpp, self.stated_by = _image_mpp(image)
                self._pixels = _to_rgb(name, image)
        except Image.DecompressionBombError as error:
            raise SlideError(
                f"{name}: too large for an image without tiles ({_one_line(error)}; at most "
                f"{IMAGE_PIXELS_MAX} px); convert it to a tiled pyramidal TIFF"
            ) from error
        except _PIL_FAULTS as error:
            raise SlideError(
                f"{name}: cannot be read as an image ({_one_line(error)}); fetch it again"
            ) from error
        if 0 in self._pixels.shape:
            raise SlideError(f"{name}: {width} x {height} px; an image needs at least one pixel")
        self.level_sizes: tuple[tuple[int, int], ...] = (
            (int(self._pixels.shape[1]), int(self._pixels.shape[0])),
        )

    def read(self, level: int, x: int, y: int, width: int, height: int) -> RGB:
        return self._pixels[y : y + height, x : x + width].copy()

    def close(self) -> None:
        self._pixels = np.empty((0, 0, 3), np.uint8)


def _require_8_bit(name: str, image: Image.Image, data: bytes) -> None:
    """Refuse what Pillow would cut to 8 bits without a word."""
    depth = 8
    if image.format == "PNG":
        depth = data[24]
    elif image.format == "TIFF":
        bits = getattr(image, "tag_v2", {}).get(258, (8,))
        depth = max(bits) if isinstance(bits, tuple) else int(bits)
    if depth > 8 or image.mode.startswith(("I", "F")):
        raise SlideError(
            f"{name}: more than 8 bits per channel (mode {image.mode}); convert it to 8-bit RGB"
        )


def _to_rgb(name: str, image: Image.Image) -> RGB:
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or (
        image.mode == "P" and "transparency" in image.info
    ):
        return _on_white(np.asarray(image.convert("RGBA")))
    if image.mode not in ("RGB", "L", "P", "1"):
        raise SlideError(f"{name}: colour mode {image.mode}; convert it to 8-bit RGB")
    return np.asarray(image.convert("RGB"))


def _image_mpp(image: Image.Image) -> tuple[tuple[float, float] | None, str]:
    """Read a resolution that means something; 72 and 96 dpi mean that nobody measured."""
    dpi = image.info.get("dpi")
    if not isinstance(dpi, tuple) or len(dpi) != 2:
        return None, ""
    pair = _positive(*dpi)
    if pair is None or max(pair) < 1000:
        return None, ""
    return (25400 / pair[0], 25400 / pair[1]), "dpi"


def _on_white(pixels: npt.NDArray[Any]) -> RGB:
    """Lay RGBA on white; RGB passes."""
    if pixels.shape[2] == 3:
        return np.ascontiguousarray(pixels)
    alpha = pixels[..., 3]
    if alpha.min() == 255:
        return cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGBA2RGB).astype(
            np.uint8, copy=False
        )
    share = alpha[..., None].astype(np.uint16)
    mixed = (pixels[..., :3] * share + 255 * (255 - share) + 127) // 255
    return mixed.astype(np.uint8)
