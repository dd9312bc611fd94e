"""Pyramidal TIFFs, written tile by tile in memory that does not grow with their height.

One file for all viewers. The levels are the pages of a BigTIFF, finest first, the coarser ones
marked as reduced: so OpenSlide and whoever follows the chain of pages finds them. The first page
also lists the others as its SubIFDs and carries OME-XML: so Bio-Formats, QuPath and tifffile find
them. Each level is half of the one before, and a last odd row or column is dropped from it.
"""

from __future__ import annotations

import struct
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO
from xml.sax.saxutils import quoteattr

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg

from hemera.io.atomic import replacing

Pixels = npt.NDArray[np.uint8]

TILE_PX = 512

CODECS = ("jpeg", "deflate")
"""Of tiles; deflate is lossless."""

_COMPRESSIONS = {"jpeg": 7, "deflate": 8}
_SHORT, _LONG, _RATIONAL, _ASCII, _LONG8, _IFD8 = 3, 4, 5, 2, 16, 18
_FORMATS = {_SHORT: "H", _LONG: "I", _RATIONAL: "II", _ASCII: "s", _LONG8: "Q", _IFD8: "Q"}

_Entry = tuple[int, int, tuple[int, ...] | bytes]
"""Tag, type, values; a rational number is two values."""


def tile_count(size_px: tuple[int, int]) -> tuple[int, int]:
    """Return how many tiles an image has along x and y."""
    return -(-size_px[0] // TILE_PX), -(-size_px[1] // TILE_PX)


def write_pyramid(
    path: Path,
    tiles: Iterable[Pixels],
    *,
    size_px: tuple[int, int],
    mpp: float,
    channels: int,
    codec: str,
    quality: int = 90,
    average: bool = True,
    name: str = "",
) -> None:
    """Write a pyramidal TIFF in one step.

    Args:
        path: where to.
        tiles: those of level 0 row by row, `tile_count` of them, each whole: (`TILE_PX`,
            `TILE_PX`, 3) or, with one channel, (`TILE_PX`, `TILE_PX`). What lies beyond the
            image's edge is stored and never shown. They are taken one at a time.
        size_px: (width, height) of level 0.
        mpp: its um per pixel.
        channels: 3 for RGB, 1 for gray.
        codec: one of `CODECS`; jpeg is for RGB, and keeps colour as fine as brightness (4:4:4).
        quality: of jpeg.
        average: a pixel of the next level is the mean of four; False: one of the four, for labels.
        name: of the image, for those who look at it.

    Raises:
        ValueError: when channels, codec, the number of tiles or their shape are not as above.
    """
    if (channels, codec) not in ((3, "jpeg"), (3, "deflate"), (1, "deflate")):
        raise ValueError(f"pyramid: {channels} channels in {codec}; choose 3, or 1 in deflate")
    with replacing(path) as temporary, open(temporary, "wb") as file:
        with tempfile.TemporaryFile(dir=path.parent) as spool:
            # Header: little-endian BigTIFF; the place of the first page is filled in at the end.
            file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))
            levels = _levels(size_px, channels, file, spool)
            _fill(levels, tiles, codec, quality, average)
            for level in levels[1:]:
                level.move(file)
        first = _write_pages(file, levels, mpp, channels, codec, name)
        file.seek(8)
        file.write(struct.pack("<Q", first))


class _Level:
    """One level while it is written: where its tiles lie, and a row of them in the making."""

    def __init__(self, size_px: tuple[int, int], channels: int, file: IO[bytes]) -> None:
        self.size_px = size_px
        self.across, self.down = tile_count(size_px)
        self.tile_shape = (TILE_PX, TILE_PX) if channels == 1 else (TILE_PX, TILE_PX, channels)
        self.offsets: list[int] = []
        self.lengths: list[int] = []
        self.row: Pixels = np.zeros((0, 0), np.uint8)
        self._file = file

    def add(self, data: bytes) -> None:
        """Store an encoded tile behind the last."""
        self.offsets.append(self._file.tell())
        self.lengths.append(len(data))
        self._file.write(data)

    def place(self, column: int, row: int, quarter: Pixels) -> None:
        """Put what a tile of the finer level has become into the row in the making."""
        side = TILE_PX // 2
        if not self.row.size:
            shape = TILE_PX, self.across * TILE_PX, *self.tile_shape[2:]
            self.row = np.zeros(shape, np.uint8)
        left, top = column * side, row % 2 * side
        # The finer level may have a last column that is one odd pixel wide.
        if left < self.row.shape[1]:
            self.row[top : top + side, left : left + side] = quarter

    def move(self, file: IO[bytes]) -> None:
        """Move the tiles to the end of another file."""
        for n, (offset, length) in enumerate(zip(self.offsets, self.lengths, strict=True)):
            self._file.seek(offset)
            self.offsets[n] = file.tell()
            file.write(self._file.read(length))


def _levels(
    size_px: tuple[int, int], channels: int, file: IO[bytes], spool: IO[bytes]
) -> list[_Level]:
    """Halve until a level is one tile; all but the first go to the spool for the time being."""
    levels = [_Level(size_px, channels, file)]
    width, height = size_px
    while max(width, height) > TILE_PX and min(width, height) > 1:
        width, height = width // 2, height // 2
        levels.append(_Level((width, height), channels, spool))
    return levels


def _fill(
    levels: list[_Level], tiles: Iterable[Pixels], codec: str, quality: int, average: bool
) -> None:
    """Encode the tiles of all levels, each as soon as what it is made of is there."""

    def add(depth: int, column: int, row: int, tile: Pixels) -> None:
        level = levels[depth]
        level.add(_encode(tile, codec, quality))
        if depth + 1 == len(levels):
            return
        coarser = levels[depth + 1]
        if row // 2 >= coarser.down:
            return
        coarser.place(column, row, _halve(tile, average))
        if column + 1 == level.across and (row % 2 == 1 or row + 1 == level.down):
            for n in range(coarser.across):
                left = n * TILE_PX
                add(depth + 1, n, row // 2, coarser.row[:, left : left + TILE_PX])

    first = levels[0]
    count = first.across * first.down
    for number, tile in enumerate(tiles):
        if number == count or tile.shape != first.tile_shape:
            raise ValueError(
                f"pyramid: tile {number} of shape {tile.shape}; give {count} of {first.tile_shape}"
            )
        add(0, number % first.across, number // first.across, tile)
    if len(first.offsets) < count:
        raise ValueError(f"pyramid: {len(first.offsets)} tiles; give {count}")


def _halve(tile: Pixels, average: bool) -> Pixels:
    if not average:
        return tile[::2, ::2]
    size = TILE_PX // 2, TILE_PX // 2
    return np.asarray(cv2.resize(tile, size, interpolation=cv2.INTER_AREA), np.uint8)


def _encode(tile: Pixels, codec: str, quality: int) -> bytes:
    pixels = np.ascontiguousarray(tile)
    if codec == "deflate":
        return zlib.compress(pixels.tobytes())
    return bytes(
        simplejpeg.encode_jpeg(pixels, quality=quality, colorspace="RGB", colorsubsampling="444")
    )


def _write_pages(
    file: IO[bytes], levels: list[_Level], mpp: float, channels: int, codec: str, name: str
) -> int:
    """Write the pages of all levels, coarsest first, and return where the finest lies."""
    places: list[int] = []
    for depth in reversed(range(len(levels))):
        level = levels[depth]
        width, height = level.size_px
        resolution = _rational(1e4 / (mpp * 2**depth))
        ycbcr = codec == "jpeg"
        entries: list[_Entry] = [
            (254, _LONG, (int(depth > 0),)),  # NewSubfileType: reduced
            (256, _LONG, (width,)),
            (257, _LONG, (height,)),
            (258, _SHORT, (8,) * channels),  # BitsPerSample
            (259, _SHORT, (_COMPRESSIONS[codec],)),
            # PhotometricInterpretation: YCbCr, RGB or black is zero
            (262, _SHORT, (6 if ycbcr else 2 if channels == 3 else 1,)),
            (277, _SHORT, (channels,)),  # SamplesPerPixel
            (282, _RATIONAL, resolution),
            (283, _RATIONAL, resolution),
            (284, _SHORT, (1,)),  # PlanarConfiguration: interleaved
            (296, _SHORT, (3,)),  # ResolutionUnit: centimetre
            (305, _ASCII, b"HEMERA\0"),
            (322, _LONG, (TILE_PX,)),
            (323, _LONG, (TILE_PX,)),
            (324, _LONG8, tuple(level.offsets)),
            (325, _LONG8, tuple(level.lengths)),
        ]
        if depth == 0:
            entries.append((270, _ASCII, _ome_xml(level.size_px, channels, mpp, name)))
            if places:
                entries.append((330, _IFD8, tuple(places)))  # SubIFDs
        if ycbcr:
            entries.append((530, _SHORT, (1, 1)))  # YCbCrSubSampling: 4:4:4
        places.insert(0, _write_page(file, sorted(entries), places[0] if places else 0))
    return places[0]


def _write_page(file: IO[bytes], entries: list[_Entry], following: int) -> int:
    """Write one page behind what is there, and return where it lies."""
    file.write(bytes(-file.tell() % 8))
    place = file.tell()
    far = place + 8 + 20 * len(entries) + 8
    page, values = struct.pack("<Q", len(entries)), b""
    for tag, kind, given in entries:
        if isinstance(given, bytes):
            count, data = len(given), given
        else:
            count = len(given) // len(_FORMATS[kind])
            data = struct.pack(f"<{len(given)}{_FORMATS[kind][0]}", *given)
        page += struct.pack("<HHQ", tag, kind, count)
        if len(data) > 8:
            page += struct.pack("<Q", far + len(values))
            values += data + bytes(-len(data) % 8)
        else:
            page += data.ljust(8, b"\0")
    file.write(page + struct.pack("<Q", following) + values)
    return place


def _rational(value: float) -> tuple[int, int]:
    """Return the fraction of two 32-bit numbers that comes next."""
    denominator = 1
    while value * denominator * 2 < 2**32 and denominator < 2**31:
        denominator *= 2
    return round(value * denominator), denominator


def _ome_xml(size_px: tuple[int, int], channels: int, mpp: float, name: str) -> bytes:
    # um is what PhysicalSize is in when nothing is said, and its sign is none of ASCII's.
    text = (
        '<?xml version="1.0" encoding="UTF-8"?>'
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
        'xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" '
        'xsi:schemaLocation="http://www.openmicroscopy.org/Schemas/OME/2016-06 '
        'http://www.openmicroscopy.org/Schemas/OME/2016-06/ome.xsd" Creator="HEMERA">'
        f'<Image ID="Image:0" Name={quoteattr(name)}>'
        '<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" BigEndian="false" '
        f'SizeX="{size_px[0]}" SizeY="{size_px[1]}" SizeC="{channels}" SizeZ="1" SizeT="1" '
        f'PhysicalSizeX="{mpp!r}" PhysicalSizeY="{mpp!r}">'
        f'<Channel ID="Channel:0:0" SamplesPerPixel="{channels}"/>'
        '<TiffData IFD="0" PlaneCount="1"/></Pixels></Image></OME>'
    )
    return text.encode("ascii", "xmlcharrefreplace") + b"\0"
