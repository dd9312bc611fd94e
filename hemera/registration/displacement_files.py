"""Displacements on disk: ``.npz`` files with `vectors_um` and `mpp`."""

import math
import zipfile
from pathlib import Path

import numpy as np

from hemera.errors import RegistrationError
from hemera.files.atomic import replacing
from hemera.files.faults import translated
from hemera.registration.displacement import Displacement

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
        with np.load(path, allow_pickle=False) as arrays:
            vectors = np.ascontiguousarray(arrays["vectors_um"], np.float32)
            mpp = float(arrays["mpp"])
    try:
        return Displacement(vectors, mpp)
    except RegistrationError as error:
        raise RegistrationError(f"{path.name}: {error}") from error
