"""Label images: one channel of integers; TIFF may be larger than memory."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

from hemera.errors import SlideError
from hemera.files.atomic import replacing
from hemera.files.faults import translated
from hemera.imaging.pyramid import TILE_PX

Labels = npt.NDArray[np.integer[Any]]

TIFF_SUFFIXES = (".tif", ".tiff")

_PNG = b"\x89PNG\r\n\x1a\n"


def read_labels(path: Path, folder: Path) -> Labels:
    """Read a label image (H, W): TIFF of 8, 16 or 32 bits, or PNG of 8 or 16 bits or a palette.

    A temporary file with the pixels of a TIFF is created in `folder`.
    """
    if not path.is_file():
        raise SlideError(f"{path}: no such file; name a label image")
    with translated(SlideError, f"{path.name}: cannot be read ({{error}}); save it again as TIFF"):
        with path.open("rb") as file:
            head = file.read(26)
        labels = _read_png(path, head) if head.startswith(_PNG) else _read_tiff(path, folder)
    if labels.ndim != 2 or labels.dtype.kind not in "iu" or labels.dtype.itemsize > 4:
        raise SlideError(
            f"{path.name}: shape {labels.shape} of {labels.dtype}; a label image has one channel "
            "of integers of 8, 16 or 32 bits"
        )
    return labels


def _read_png(path: Path, head: bytes) -> Labels:
    # Pillow scales gray values of fewer than 8 bits, which the header shows.
    bits, is_palette = head[24], head[25] == 3
    if bits < 8 and not is_palette:
        raise SlideError(f"{path.name}: {bits} bits per pixel; save it with 8 or 16")
    with Image.open(path) as image:
        return np.asarray(image).astype(np.uint16 if bits == 16 else np.uint8, copy=False)


def _read_tiff(path: Path, folder: Path) -> Labels:
    with tifffile.TiffFile(path) as file:
        series = file.series[0]
        if len(series.shape) != 2:
            raise SlideError(f"{path.name}: shape {series.shape}; a label image has one channel")
        return np.asanyarray(series.levels[0].asarray(out=f"memmap:{folder}"))


def write_labels(
    path: Path,
    tiles: Iterable[Labels],
    *,
    size_px: tuple[int, int],
    dtype: np.dtype[Any],
    pixel_um: tuple[float, float],
) -> None:
    """Write a label image as a tiled TIFF, lossless, in one step.

    The tiles come row by row, each (`TILE_PX`, `TILE_PX`) also at the edges; `size_px` is (width,
    height), `pixel_um` the width and height of a pixel.
    """
    width, height = size_px
    with replacing(path) as temporary:
        tifffile.imwrite(
            temporary,
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
            maxworkers=1,
        )
