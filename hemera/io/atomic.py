"""Writing files so that a reader never sees half of one, and the files of displacements."""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import secrets
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hemera.errors import RegistrationError
from hemera.registration.displacement import Displacement, map_points, node_points

log = logging.getLogger(__name__)

DISPLACEMENT_STEP = 1 / 256
"""Vectors are stored in steps of this share of the distance of two nodes: half the size."""

ITK_SUFFIXES = (".mha", ".mhd", ".nrrd", ".nii", ".nii.gz")


_NPZ_FAULTS = (
    OSError,
    ValueError,
    TypeError,
    EOFError,
    AttributeError,
    IndexError,
    SyntaxError,
    NotImplementedError,
    RuntimeError,
    MemoryError,
    OverflowError,
    UnicodeError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What numpy and zipfile raise over bytes that are damaged, wherever the damage is."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; it becomes `path` when the block succeeds.

    The temporary file keeps the suffix of `path`. When the block raises, it is removed and what
    stood at `path` before stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` in one step."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one step, as UTF-8."""
    write_bytes(path, text.encode())


def write_displacement(path: Path, d: Displacement) -> None:
    """Write a displacement as ``.npz`` with `vectors_um` and `mpp`, in one step.

    The vectors are rounded to 1/256 of the distance of two nodes or finer. The same displacement
    gives the same bytes.
    """
    # A power of two, so that rounded values have zeros at their end, which compress.
    step = 2.0 ** math.floor(math.log2(d.mpp * DISPLACEMENT_STEP))
    rounded = (np.rint(d.vectors_um / step) * step).astype(np.float32)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, vectors_um=rounded, mpp=np.float64(d.mpp))


def read_displacement(path: Path) -> Displacement:
    """Read a displacement: HEMERA's own ``.npz`` or a vector image as ITK writes it.

    In an ITK image (``.mha``, ``.nrrd``, ``.nii.gz``) spacing, origin and the two components (dx,
    dy) are um, (0, 0) is the top-left corner of the slide, the origin is where the first node
    lies, and a vector leads from H&E to HER2. Nodes of unequal spacing are resampled to the finer
    of the two.

    Raises:
        RegistrationError: when the file is none of these, or holds what cannot be.
    """
    path = Path(path)
    if not path.is_file():
        raise RegistrationError(f"{path}: no such file; run register, or name another in pairs.tsv")
    if path.name.lower().endswith(ITK_SUFFIXES):
        return _read_itk(path)
    try:
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("it is no .npz")
        with np.load(path, allow_pickle=False) as arrays:
            lacking = [name for name in ("vectors_um", "mpp") if name not in arrays]
            if lacking:
                raise RegistrationError(
                    f"{path.name}: lacks {' and '.join(lacking)}; it must hold vectors_um (rows, "
                    "columns, 2) and mpp, both in um"
                )
            vectors, mpp = arrays["vectors_um"], float(arrays["mpp"])
    except _NPZ_FAULTS as error:
        raise RegistrationError(
            f"{path.name}: cannot be read as a displacement ({_first_line(error)}); give .npz with "
            "vectors_um and mpp, or an ITK vector image"
        ) from error
    try:
        return Displacement(np.ascontiguousarray(vectors, np.float32), mpp)
    except RegistrationError as error:
        raise RegistrationError(f"{path.name}: {error}") from error


def _read_itk(path: Path) -> Displacement:
    # Half a second to import, and only who brings a field of their own needs it.
    sitk: Any = importlib.import_module("SimpleITK")
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise RegistrationError(
            f"{path.name}: cannot be read as an ITK image ({_last_line(error)}); write it again"
        ) from error
    size, components = image.GetSize(), image.GetNumberOfComponentsPerPixel()
    if len(size) == 3 and components == 1 and size[2] == 2:
        raise RegistrationError(
            f"{path.name}: a scalar image of {size[0]} x {size[1]} x 2, as DeeperHistReg writes "
            "its field: in pixels of a padded canvas, without resolutions; register the "
            "pair in HEMERA, or convert it to a vector image in um"
        )
    if len(size) != 2 or components != 2:
        raise RegistrationError(
            f"{path.name}: {len(size)} dimensions and {components} components; a displacement has "
            "two of each, (dx, dy) in um"
        )
    direction = np.asarray(image.GetDirection())
    if not np.allclose(direction, (1, 0, 0, 1)):
        raise RegistrationError(
            f"{path.name}: direction {direction.tolist()}; resample it to axes along the slide's"
        )
    vectors = sitk.GetArrayFromImage(image).astype(np.float32)
    try:
        return _on_own_grid(path.name, vectors, image.GetSpacing(), image.GetOrigin())
    except RegistrationError as error:
        raise RegistrationError(f"{path.name}: {error}") from error


def _on_own_grid(
    name: str,
    vectors: npt.NDArray[np.float32],
    spacing: tuple[float, float],
    origin: tuple[float, float],
) -> Displacement:
    """Move a field from an ITK image's nodes to those of a `Displacement`."""
    mpp = min(spacing)
    square = math.isclose(*spacing, rel_tol=1e-6)
    if origin == (0.0, 0.0):
        log.warning(
            "%s: origin (0, 0) puts the first node on the slide's corner; a field made on images "
            "whose first pixel is centred on (0, 0) needs half its spacing as origin",
            name,
        )
    if square and np.allclose(origin, np.asarray(spacing) / 2, atol=1e-3 * mpp):
        return Displacement(vectors, mpp)
    # In units of the image's own nodes, whose first lies at (0.5, 0.5) there.
    height, width = vectors.shape[:2]
    unit = Displacement(np.zeros((height, width, 2), np.float32), 1.0)
    nodes = node_points(unit)
    spread = np.asarray(spacing)
    shift = np.asarray(origin) - 0.5 * spread
    moving = nodes * spread + shift + vectors
    unit = Displacement((moving - nodes).astype(np.float32), 1.0)
    columns = max(1, math.ceil((shift[0] + width * spacing[0]) / mpp - 1e-6))
    rows = max(1, math.ceil((shift[1] + height * spacing[1]) / mpp - 1e-6))
    own = node_points(Displacement(np.zeros((rows, columns, 2), np.float32), mpp))
    at = ((own - shift) / spread).reshape(-1, 2)
    result = map_points(unit, at).reshape(own.shape) - own
    return Displacement(result.astype(np.float32), mpp)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
