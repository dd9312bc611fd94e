# ruff: noqa: D102 (documented in Reader)
"""DICOM whole-slide images that OpenSlide does not read, such as those in JPEG-LS."""

import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hemera.errors import SlideError
from hemera.imaging.readers import Reader, fault_of, positive_pair

RGB = npt.NDArray[np.uint8]

PREAMBLE_BYTES, MAGIC = 128, b"DICM"


def is_dicom(path: Path) -> bool:
    """Return whether a file is DICOM by its first bytes."""
    with path.open("rb") as file:
        file.seek(PREAMBLE_BYTES)
        return file.read(len(MAGIC)) == MAGIC


class DicomReader(Reader):
    """wsidicom: the levels in the folder of a file that are of the same series.

    Files of labels and overviews are not opened, and no attribute of the patient is read.
    """

    name = "wsidicom"
    vendor = "dicom"
    stated_by = "dicom.PixelSpacing"

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            import wsidicom
        except ModuleNotFoundError as error:
            raise SlideError(
                f"{path.name}: DICOM that OpenSlide cannot read; install hemera[dicom], or convert "
                "it to a tiled pyramidal TIFF"
            ) from error
        # Its decoders keep state.
        self._lock = threading.Lock()
        with fault_of(
            path, "wsidicom cannot read it ({error}); convert it to a tiled pyramidal TIFF"
        ):
            self._slide = wsidicom.WsiDicom.open(_levels(path))
            self._numbers = [level.level for level in self._slide.levels]
            self.level_sizes = tuple(
                (level.size.width, level.size.height) for level in self._slide.levels
            )
            mpp = self._slide.levels[0].mpp
            self.stated_mpp = positive_pair(mpp.width, mpp.height)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> RGB:
        with self.reading(level, x, y), self._lock:
            pixels = self._slide.read_region(
                (x, y), self._numbers[level], (width, height), threads=1
            )
            return np.asarray(pixels.convert("RGB"))

    def close(self) -> None:
        self._slide.close()


def _levels(path: Path) -> list[Path]:
    """Return the files in the folder of `path` with levels of its series."""
    import pydicom

    def header(file: Path) -> tuple[str, str]:
        tags = ["SeriesInstanceUID", "ImageType"]
        read = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags)
        return str(read.SeriesInstanceUID), str(read.ImageType[2])

    series, kind = header(path)
    if kind != "VOLUME":
        raise ValueError(f"an image of kind {kind}, not a level of a slide")
    others = [file for file in sorted(path.parent.iterdir()) if file.is_file() and file != path]
    return [path, *(file for file in others if is_dicom(file) and header(file) == (series, kind))]
