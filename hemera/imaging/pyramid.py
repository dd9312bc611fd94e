"""Pyramidal OME-TIFFs, written tile by tile.

Each level is half of the one before; a last odd row or column is dropped. The coarser levels are
SubIFDs of the first page, where Bio-Formats, QuPath, TiffSlide and tifffile expect them, and at
the same time the following pages of the file, where OpenSlide does.
"""

import contextlib
import itertools
import struct
import tempfile
import uuid
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
import numpy.typing as npt
import tifffile

from hemera.files.atomic import replacing

Pixels = npt.NDArray[np.uint8]

TILE_PX = 512


def tile_count(size_px: tuple[int, int]) -> tuple[int, int]:
    """Return how many tiles an image has along x and y."""
    return -(-size_px[0] // TILE_PX), -(-size_px[1] // TILE_PX)


def write_pyramid(
    path: Path,
    tiles: Iterable[Pixels],
    *,
    size_px: tuple[int, int],
    mpp: float,
    quality: int = 90,
    name: str = "",
) -> None:
    """Write a pyramidal TIFF in one step: RGB as JPEG (4:4:4), one channel lossless.

    The tiles of level 0 come row by row, each (`TILE_PX`, `TILE_PX`, 3) or, for a label image,
    (`TILE_PX`, `TILE_PX`); one row is in memory. `size_px` (width, height) and `mpp` are those of
    level 0, `name` is that in the OME-XML.
    """
    rest = iter(tiles)
    first = next(rest)
    level: Iterable[Pixels] = itertools.chain([first], rest)
    is_rgb = first.ndim == 3
    options: dict[str, Any] = {"photometric": "minisblack", "compression": "adobe_deflate"}
    if is_rgb:
        options = {
            "photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": quality},
            "subsampling": (1, 1),
        }  # fmt: skip
    sizes = [size_px]
    while max(sizes[-1]) > TILE_PX and min(sizes[-1]) > 1:
        sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
    metadata = {
        "axes": "YXS" if is_rgb else "YX",
        "Name": name,
        "Creator": "HEMERA",
        # Not a random one, so that the same pixels give the same bytes.
        "UUID": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{name} {size_px}")),
        **{f"PhysicalSize{axis}": mpp for axis in "XY"},
        **{f"PhysicalSize{axis}Unit": "µm" for axis in "XY"},
    }
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(replacing(path))
        with tifffile.TiffWriter(temporary, bigtiff=True, ome=True) as writer:
            for depth, (width, height) in enumerate(sizes):
                # The last level has no next one.
                spool = stack.enter_context(tempfile.TemporaryFile(dir=path.parent))
                writer.write(
                    _halving(level, (width, height), first.shape[2:], spool),
                    shape=(height, width, *first.shape[2:]),
                    dtype=np.uint8,
                    tile=(TILE_PX, TILE_PX),
                    resolution=(1e4 / mpp / 2**depth,) * 2,
                    resolutionunit="CENTIMETER",
                    subifds=len(sizes) - 1 if depth == 0 else 0,
                    subfiletype=int(depth > 0),
                    metadata=metadata if depth == 0 else None,
                    software="HEMERA",
                    maxworkers=1,
                    **options,
                )
                level = stored_tiles(spool, first.shape)
        # Ends the caller's generator, which frees its memory.
        if next(rest, None) is not None:
            raise ValueError(f"{path.name}: more tiles than {size_px[0]} x {size_px[1]} px need")
        _chain(temporary)


def _halving(
    tiles: Iterable[Pixels], size_px: tuple[int, int], channels: tuple[int, ...], spool: IO[bytes]
) -> Generator[Pixels, None, None]:
    """Yield the tiles of a level; write those of the next into a file, row by row."""
    across, down = tile_count(size_px)
    next_across, next_down = tile_count((size_px[0] // 2, size_px[1] // 2))
    half = TILE_PX // 2
    row = np.zeros((TILE_PX, (across + 1) // 2 * TILE_PX, *channels), np.uint8)
    places = itertools.product(range(down), range(across))
    for (y, x), tile in zip(places, tiles, strict=True):
        # One pixel of four in a label image, whose values have no mean.
        small = (
            cv2.resize(tile, (half, half), interpolation=cv2.INTER_AREA)
            if tile.ndim == 3
            else tile[::2, ::2]
        )
        top = y % 2 * half
        row[top : top + half, x * half : (x + 1) * half] = small
        if x + 1 == across and (top or y + 1 == down) and y // 2 < next_down:
            for n in range(next_across):
                spool.write(np.ascontiguousarray(row[:, n * TILE_PX : (n + 1) * TILE_PX]).data)
        yield tile


def stored_tiles(spool: IO[bytes], shape: tuple[int, ...]) -> Generator[Pixels, None, None]:
    """Yield the tiles of a shape that a file contains one after the other."""
    spool.seek(0)
    while len(data := spool.read(int(np.prod(shape)))):
        yield np.frombuffer(data, np.uint8).reshape(shape)


def _chain(path: Path) -> None:
    """Make each SubIFD the page that follows the level before, for OpenSlide."""
    with tifffile.TiffFile(path, mode="r+") as file:
        first: Any = file.pages[0]
        for page, following in itertools.pairwise([first, *(first.pages or ())]):
            # In BigTIFF: the number of tags, 20 bytes for each, the offset of the next page.
            file.filehandle.seek(page.offset + 8 + 20 * len(page.tags))
            file.filehandle.write(struct.pack("<Q", following.offset))
