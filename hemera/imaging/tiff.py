# ruff: noqa: D102 (documented in Reader)
"""Tiled TIFF files read directly, tile by tile."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
import tifffile

from hemera.errors import SlideError
from hemera.files.faults import translated
from hemera.imaging.codecs import jpeg_file
from hemera.imaging.readers import (
    IMAGE_COMPRESSIONS,
    TILE_PX_MAX,
    Reader,
    check_stated_size,
    fault_of,
    positive_pair,
)

RGB = npt.NDArray[np.uint8]

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

_CACHE_BYTES = 96 * 2**20
_REPEATED_MAX = 8
"""Pictures stored once for several tiles that are decoded, of a level."""
_ONE_COLOR = 16
"""Range of the values of a channel in a tile of one colour, whose compression is lossy."""
_ASSOCIATED = re.compile(r"^(label|macro)\b", re.IGNORECASE | re.MULTILINE)
"""Pictures that may show the name of a patient; they are not read."""
_DIRECT_COMPRESSIONS = frozenset({1, 5, 7, 8, 32946, 50000, 50001})
"""None, LZW, JPEG, Deflate (both), Zstandard, WebP."""


class DamagedTiffError(SlideError):
    """A file that no reader should read: contradictory tags, or tiles that are too large."""


def is_tiled(path: Path) -> bool:
    """Return whether a file is TIFF and its first page is stored in tiles.

    Raises:
        DamagedTiffError: when the tiles are larger than any reader should decode at once.
    """
    try:
        with translated(SlideError, "{error}"), tifffile.TiffFile(path) as file:
            page: Any = file.pages[0]
            tiled, sides = bool(page.is_tiled), (int(page.tilewidth), int(page.tilelength))
    except SlideError:
        return False
    if tiled and not 0 < sides[0] * sides[1] <= TILE_PX_MAX:
        raise DamagedTiffError(
            f"{path.name}: stored tiles of {sides[0]} x {sides[1]} px, not 1 to {TILE_PX_MAX} px; "
            "convert it to a TIFF of smaller tiles"
        )
    return tiled


class TiffReader(Reader):
    """Tiled TIFF, read tile by tile: exact at every level, for any sizes of the levels."""

    name = "tiff"

    def __init__(self, path: Path) -> None:
        self.path = path
        with (
            fault_of(path, "cannot be opened as tiled TIFF ({error}); fetch it again"),
            tifffile.TiffFile(path) as file,
        ):
            pages = _pyramid(file)
            self._levels = [_Level(page) for page in pages]
            if file.is_svs and any(0 in level.counts for level in self._levels[1:]):
                # OpenSlide fills it from the finer level.
                raise ValueError("a tile of a coarser level is missing")
            self.stated_mpp, self.stated_by = _tiff_mpp(file)
            self.vendor = "aperio" if file.is_svs else "generic-tiff"
            self.level_sizes = tuple(
                (int(page.imagewidth), int(page.imagelength)) for page in pages
            )
        self._file = os.open(path, os.O_RDONLY)
        tile_bytes = 3 * self._levels[0].width * self._levels[0].height
        self._cached_tile = functools.lru_cache(_CACHE_BYTES // tile_bytes)(self._tile)
        try:
            for number in range(len(self._levels)):
                self._check_places(number)
        except BaseException:
            self.close()
            raise

    def _check_places(self, number: int) -> None:
        """Raise DamagedTiffError where the tiles of a level cannot be where its tags place them.

        Empty tiles of one colour may be stored once for all.
        """
        grid, name = self._levels[number], f"{self.path.name}: level {number}"
        expected = grid.across * grid.down
        if (len(grid.offsets), len(grid.counts)) != (expected, expected):
            raise DamagedTiffError(
                f"{name} has positions of {len(grid.offsets)} tiles instead of {expected}; fetch "
                "the file again"
            )
        offsets = np.array(grid.offsets, np.uint64)[np.array(grid.counts) > 0]
        places, times = np.unique(offsets, return_counts=True)
        most = np.argsort(-times, kind="stable")[:_REPEATED_MAX]
        for offset in places[most[times[most] > 1]].tolist():
            index = grid.offsets.index(offset)
            try:
                with self.reading(number, *grid.corner(index)):
                    colors = self._tile(number, index).reshape(-1, 3)
            except SlideError:
                # Lost tiles are counted where they are needed.
                continue
            if np.ptp(colors.astype(np.int16), axis=0).max() > _ONE_COLOR:
                raise DamagedTiffError(
                    f"{name} has several tiles with the same stored picture; fetch the file again"
                )

    def check_complete(self) -> None:
        """Raise SlideError where tiles are beyond the end of the file, or unreadable."""
        size = os.fstat(self._file).st_size
        ends = [
            offset + count
            for level in self._levels
            for offset, count in zip(level.offsets, level.counts, strict=True)
        ]
        lost = sum(end > size for end in ends)
        if lost:
            raise SlideError(
                f"{self.path.name}: {lost} of {len(ends)} stored tiles are beyond its end; it was "
                "cut off, fetch it again"
            )
        super().check_complete()

    def read(self, level: int, x: int, y: int, width: int, height: int) -> RGB:
        grid = self._levels[level]
        with self.reading(level, x, y):
            if grid.is_tile(x, y, width, height):
                return self._tile(level, grid.index(x, y))
            result = np.empty((height, width, 3), np.uint8)
            for tile_y in range(y - y % grid.height, y + height, grid.height):
                for tile_x in range(x - x % grid.width, x + width, grid.width):
                    left, top = tile_x - x, tile_y - y
                    x0, y0 = max(left, 0), max(top, 0)
                    x1, y1 = min(left + grid.width, width), min(top + grid.height, height)
                    # A partially read tile is likely to be read again, a fully read one is not.
                    is_whole = (y1 - y0, x1 - x0) == (grid.height, grid.width)
                    decode = self._tile if is_whole else self._cached_tile
                    tile = decode(level, grid.index(tile_x, tile_y))
                    result[y0:y1, x0:x1] = tile[y0 - top : y1 - top, x0 - left : x1 - left]
        return result

    def stored_jpeg(self, level: int, x: int, y: int, width: int, height: int) -> bytes | None:
        grid = self._levels[level]
        if not grid.is_jpeg or not grid.is_tile(x, y, width, height):
            return None
        with self.reading(level, x, y):
            return grid.jpeg(self._stored(grid, grid.index(x, y)))

    def _stored(self, grid: _Level, index: int) -> bytes:
        count, left = grid.counts[index], os.fstat(self._file).st_size - grid.offsets[index]
        if count > left:
            raise ValueError(f"the file ends {count - max(left, 0)} bytes early")
        if count > grid.bytes_max:
            raise ValueError(f"{count} bytes for a tile, more than {grid.bytes_max}")
        data = os.pread(self._file, count, grid.offsets[index])
        if len(data) < count:
            raise ValueError(f"the file ends {count - len(data)} bytes early")
        return data

    def _tile(self, level: int, index: int) -> RGB:
        grid = self._levels[level]
        return grid.pixels(self._stored(grid, index), index)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._cached_tile.cache_clear()


class _Level:
    """Where the tiles of a TIFF page are stored, and how they are decoded."""

    def __init__(self, page: Any) -> None:
        self.width, self.height = int(page.tilewidth), int(page.tilelength)
        # More than any compression of RGB needs, with the tables of JPEG.
        self.bytes_max = 8 * self.width * self.height + 2**20
        self.across = -(-int(page.imagewidth) // self.width)
        self.down = -(-int(page.imagelength) // self.height)
        self.offsets: tuple[int, ...] = page.dataoffsets
        self.counts: tuple[int, ...] = page.databytecounts
        self.is_jpeg = page.compression == tifffile.COMPRESSION.JPEG
        self._is_image = page.compression in IMAGE_COMPRESSIONS
        self._is_rgb = page.photometric == tifffile.PHOTOMETRIC.RGB
        self._tables: bytes = page.jpegtables or b""
        self._decode = page.decode

    def corner(self, index: int) -> tuple[int, int]:
        return index % self.across * self.width, index // self.across * self.height

    def is_tile(self, x: int, y: int, width: int, height: int) -> bool:
        return (width, height) == (self.width, self.height) and not (x % width or y % height)

    def index(self, x: int, y: int) -> int:
        return y // self.height * self.across + x // self.width

    def jpeg(self, data: bytes) -> bytes | None:
        """Return the JPEG file of a stored tile, if it is one."""
        return jpeg_file(data, self._tables, rgb=self._is_rgb) if data and self.is_jpeg else None

    def pixels(self, data: bytes, index: int) -> RGB:
        shape = self.height, self.width, 3
        if not data:
            # A tile that was never written: background that the scanner skipped.
            return np.full(shape, 255, np.uint8)
        jpeg = self.jpeg(data)
        if jpeg is not None:
            # Faster than tifffile by a third, and the same pixels. A damaged header may state
            # 65,500 px, which are not decoded: they do not fit.
            buffer = np.empty(shape, np.uint8)
            tile = np.asarray(simplejpeg.decode_jpeg(jpeg, colorspace="RGB", buffer=buffer))
        else:
            if self._is_image:
                check_stated_size(data, self.width * self.height)
            tile = np.asarray(self._decode(data, index, jpegtables=self._tables or None)[0])[0]
        if tile.shape != shape or tile.dtype != np.uint8:
            raise ValueError(f"a tile of shape {tile.shape}, {tile.dtype}, instead of {shape}")
        return np.ascontiguousarray(tile)


def _pyramid(file: tifffile.TiffFile) -> list[Any]:
    """Return the pages of the levels, finest first; ValueError for pages that cannot be read."""
    first: Any = file.pages[0]
    fault = _not_direct(first)
    if fault:
        raise ValueError(fault)
    levels: list[Any] = [first]
    # Of OME-TIFF, the XML of the first page names them; of other files, their own description.
    named = {
        page.index
        for series in (file.series[1:] if file.is_ome else ())
        if _ASSOCIATED.search(series.name)
        for page in series.pages
        if page is not None
    }
    for entry in [*(first.pages or []), *file.pages[1:]]:
        page: Any = entry.aspage() if isinstance(entry, tifffile.TiffFrame) else entry
        # 4: a mask; 8: the macro image of Aperio.
        if _not_direct(page) or int(page.subfiletype) & 12:
            continue
        if page.index in named or _ASSOCIATED.search(page.description):
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
    """Read the resolution: as the scanner states it, else from the tags of TIFF."""
    page: Any = file.pages[0]
    if file.is_svs:
        found = re.search(r"\|\s*MPP\s*=\s*([0-9.]+)", page.description)
        if found:
            return positive_pair(found[1], found[1]), "aperio.MPP"
    if file.is_ome:
        pixels = re.search(r"<(?:\w+:)?Pixels\b[^>]*>", page.description)
        sizes = re.findall(r'PhysicalSize(X|Y|XUnit|YUnit)="([^"]*)"', pixels[0] if pixels else "")
        values = dict(sizes)
        units = {values.get("XUnit", "µm"), values.get("YUnit", "µm")}
        if "X" in values and units <= {"µm", "μm", "um"}:
            return positive_pair(values["X"], values.get("Y", values["X"])), "ome.PhysicalSizeX"
    um = {2: 25_400.0, 3: 10_000.0}.get(int(page.resolutionunit))
    ratios = (page.tags.valueof(name, default=(0, 0)) for name in ("XResolution", "YResolution"))
    if um is None:
        return None, ""
    try:
        x, y = (um / (numerator / denominator) for numerator, denominator in ratios)
    except ZeroDivisionError:
        return None, ""
    return (x, y), "tiff.XResolution"
