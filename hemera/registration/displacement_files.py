"""Displacements on disk: ``.npz`` files with `vectors_um` and `mpp`."""

import math
import zipfile
from pathlib import Path

import numpy as np

from hemera.errors import RegistrationError
from hemera.files.atomic import replacing
from hemera.files.faults import translated
from hemera.registration.displacement import Displacement

BYTES_MAX = 512 * 2**20
"""Of the arrays of a file; a displacement of 4,096 x 4,096 nodes has a quarter of it."""
STEP = 1 / 256
"""Vectors are rounded to this fraction of the node distance, which halves the file."""


def write_displacement(path: Path, d: Displacement) -> None:
    """Write a displacement, its vectors rounded; equal displacements give equal bytes."""
    # A power of two: the rounded values end in zero bits, which compress.
    step = 2.0 ** math.floor(math.log2(d.mpp * STEP))
    rounded = (np.rint(d.vectors_um / step) * step).astype(np.float32)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, vectors_um=rounded, mpp=np.float64(d.mpp))


def read_displacement(path: Path) -> Displacement:
    """Read a displacement; RegistrationError where the file is not one."""
    if not path.is_file():
        raise RegistrationError(f"{path}: no such file; run register, or name another in the sheet")
    content = "an .npz file with vectors_um (rows, columns, 2: dx, dy) and mpp, both in um"
    message = f"{path.name}: cannot be read as a displacement ({{error}}); give {content}"
    with translated(RegistrationError, message):
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("not an .npz file")
        _check_sizes(path)
        with np.load(path, allow_pickle=False) as arrays:
            found = arrays["vectors_um"]
            if found.dtype.kind not in "fiu":
                raise TypeError(f"vectors_um has the type {found.dtype}, not of real numbers")
            vectors = np.ascontiguousarray(found, np.float32)
            mpp = float(arrays["mpp"])
    try:
        return Displacement(vectors, mpp)
    except RegistrationError as error:
        raise RegistrationError(f"{path.name}: {error}") from error


def _check_sizes(path: Path) -> None:
    """Raise ValueError where arrays are too large, or are not as large as their headers state."""
    with zipfile.ZipFile(path) as archive:
        members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
        total = sum(info.file_size for info in members)
        if total > BYTES_MAX:
            raise ValueError(f"arrays of {total} bytes, more than {BYTES_MAX}")
        for info in members:
            with archive.open(info) as file:
                version = np.lib.format.read_magic(file)
                readers = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }
                shape, _, dtype = readers[version](file)
                if math.prod(shape) * dtype.itemsize != info.file_size - file.tell():
                    raise ValueError(f"{info.filename} is not of the shape {shape} in its header")
