"""Label images: one channel of whole numbers, read and written without holding all of them."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

from hemera.errors import SlideError
from hemera.imaging.pyramid import TILE_PX, tile_count
from hemera.imaging.readers import IMAGE_PIXELS_MAX
from hemera.io.atomic import replacing

Labels = npt.NDArray[np.integer[Any]]

TIFF_SUFFIXES = (".tif", ".tiff")

_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_FAULTS = (
    tifffile.TiffFileError,
    Image.DecompressionBombError,
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    IndexError,
    TypeError,
    SyntaxError,
    EOFError,
    struct.error,
    zlib.error,
)


def read_labels(path: Path, room: Path) -> Labels:
    """Read a label image: PNG, or TIFF through a file of its raw values, of any size.

    Args:
        path: the image, one channel of 8, 16 or 32 bits.
        room: where that file may lie.

    Raises:
        SlideError: when it is none, or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(26)
    except FileNotFoundError:
        raise SlideError(f"{path}: no such file; name a label image") from None
    except OSError as error:
        raise SlideError(f"{path.name}: {error.strerror}; make it readable") from error
    if head.startswith(_PNG):
        return _read_png(path, head)
    if head[:4] in _TIFF_HEADS:
        return _read_tiff(path, room)
    raise SlideError(f"{path.name}: neither PNG nor TIFF; save the labels as one of these")


def _read_png(path: Path, head: bytes) -> Labels:
    # Read from the header, because Pillow makes 0 and 255 of bits, and scales what has four.
    depth, colour = (head[24], head[25]) if len(head) == 26 else (0, 0)
    palette = colour == 3
    if colour not in (0, 3) or (depth not in (8, 16) and not palette):
        raise SlideError(
            f"{path.name}: {depth} bits, colour type {colour}; a label image has one channel of 8 "
            "or 16 bits, save it so"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.width * image.height > IMAGE_PIXELS_MAX:
                    raise SlideError(
                        f"{path.name}: {image.width} x {image.height} px are too many for PNG, "
                        "which is read whole; save it as TIFF"
                    )
                values = np.asarray(image)
    except _FAULTS as error:
        raise SlideError(
            f"{path.name}: cannot be read ({_one_line(error)}); save it again"
        ) from error
    return values.astype(np.uint16 if depth == 16 else np.uint8, copy=False)


def _read_tiff(path: Path, room: Path) -> Labels:
    try:
        with tifffile.TiffFile(path) as file:
            page: Any = file.pages[0]
            dtype = page.dtype
            if dtype is None or dtype.kind not in "iu" or dtype.itemsize > 4:
                raise SlideError(
                    f"{path.name}: pixels of type {dtype}; a label image has whole numbers of 8, "
                    "16 or 32 bits, save it so"
                )
            if len(file.series[0].shape) != 2:
                raise SlideError(
                    f"{path.name}: shape {file.series[0].shape}; a label image has one channel"
                )
            values = page.asarray(out=str(room))
    except _FAULTS as error:
        raise SlideError(
            f"{path.name}: cannot be read ({_one_line(error)}); save it again"
        ) from error
    return np.asanyarray(values)


def write_labels(
    path: Path,
    tiles: Iterable[Labels],
    *,
    size_px: tuple[int, int],
    dtype: np.dtype[Any],
    pixel_um: tuple[float, float],
) -> None:
    """Write a label image in one step: PNG, or TIFF in tiles, by the suffix; both lossless.

    Args:
        path: where to.
        tiles: row by row, each (`TILE_PX`, `TILE_PX`) also at the edges; taken one at a time.
        size_px: (width, height).
        dtype: of the tiles.
        pixel_um: width and height of a pixel.

    Raises:
        SlideError: when a file of that suffix cannot hold them.
    """
    suffix = path.suffix.lower()
    if suffix not in (".png", *TIFF_SUFFIXES):
        raise SlideError(f"{path.name}: a label image is .png or .tif; name it so")
    if suffix == ".png" and dtype not in (np.uint8, np.uint16):
        raise SlideError(f"{path.name}: PNG holds no {dtype}; name it .tif")
    write = _write_png if suffix == ".png" else _write_tiff
    with replacing(path) as temporary:
        write(temporary, tiles, size_px, dtype, pixel_um)


def _write_tiff(
    path: Path,
    tiles: Iterable[Labels],
    size_px: tuple[int, int],
    dtype: np.dtype[Any],
    pixel_um: tuple[float, float],
) -> None:
    width, height = size_px
    tifffile.imwrite(
        path,
        iter(tiles),
        shape=(height, width),
        dtype=dtype,
        tile=(TILE_PX, TILE_PX),
        photometric="minisblack",
        compression="adobe_deflate",
        bigtiff=width * height * dtype.itemsize > 2**30,
        resolution=(1e4 / pixel_um[0], 1e4 / pixel_um[1]),
        resolutionunit="CENTIMETER",
        metadata=None,
    )


def _write_png(
    path: Path,
    tiles: Iterable[Labels],
    size_px: tuple[int, int],
    dtype: np.dtype[Any],
    pixel_um: tuple[float, float],
) -> None:
    """Write a gray PNG row of tiles by row of tiles; no library does it without all of it."""
    width, height = size_px
    across, _ = tile_count(size_px)
    per_metre = [min(round(1e6 / um), 2**31 - 1) for um in pixel_um]
    with open(path, "wb") as file:

        def chunk(kind: bytes, data: bytes) -> None:
            file.write(struct.pack(">I", len(data)) + kind + data)
            file.write(struct.pack(">I", zlib.crc32(kind + data)))

        file.write(_PNG)
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8 * dtype.itemsize, 0, 0, 0, 0))
        chunk(b"pHYs", struct.pack(">IIB", *per_metre, 1))
        packer = zlib.compressobj()
        row: list[Labels] = []
        top = 0
        for tile in tiles:
            row.append(tile)
            if len(row) < across:
                continue
            band = np.concatenate(row, axis=1)[: height - top, :width]
            raw = band.astype(dtype.newbyteorder(">")).view(np.uint8).reshape(len(band), -1)
            # Each line begins with its filter: none.
            chunk(b"IDAT", packer.compress(np.pad(raw, ((0, 0), (1, 0))).tobytes()))
            row, top = [], top + TILE_PX
        chunk(b"IDAT", packer.flush())
        chunk(b"IEND", b"")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
