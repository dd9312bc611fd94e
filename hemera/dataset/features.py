"""Features of the tiles of a unit in HDF5, in TRIDENT's layout; the only module that imports h5py.

Datasets `features` (N, D) float16, contiguous, and `coords` (N, 2) int64, the top-left corners of
the views in level-0 pixels, are read by TRIDENT, CLAM, STAMP and torchmil as they are; `tile` and
`pair` (N) name the tile and the pair of each view, and `size_px` (N) is its side. Attributes named
after them contain their SHA-256. Equal input gives equal bytes.
"""

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from hemera.errors import TableError
from hemera.files.atomic import replacing
from hemera.files.faults import translated

Features = npt.NDArray[np.float16]

_ROWS = 8192
"""Rows that are copied at once."""

DATASETS = ("features", "coords", "size_px", "tile", "pair")


@dataclasses.dataclass(frozen=True)
class Views:
    """The views of a unit: corners (N, 2) and side, level-0 pixels; names of tile and pair (N)."""

    coords: npt.NDArray[np.int64]
    size_px: npt.NDArray[np.float64]
    tiles: Sequence[str]
    pairs: Sequence[str]


def write_features(
    path: Path,
    batches: Iterable[npt.NDArray[np.floating[Any]]],
    width: int,
    views: "ViewList",
    metadata: Mapping[str, Any],
    coords_metadata: Mapping[str, Any],
) -> int:
    """Write features atomically as they come; return the number of views.

    Args:
        batches: features (n, `width`), in the order of the views.
        width: features of a view.
        views: to which those of a batch may be added as it comes.
        metadata: attributes of the file; other values than numbers and texts become JSON.
        coords_metadata: attributes of `coords`.

    Raises:
        TableError: when a feature is not finite as float16.
    """
    with tempfile.TemporaryFile(dir=_folder(path)) as buffer:
        count = 0
        for batch in batches:
            with np.errstate(over="ignore"):
                rows = np.ascontiguousarray(batch, np.float16)
            if not np.isfinite(rows).all():
                raise TableError(
                    f"{path.name}: features that are not finite in 16 bits; check the weights of "
                    "the encoder, or set embed.precision: float32"
                )
            buffer.write(rows.tobytes())
            count += len(rows)
        buffer.seek(0)
        found = views.views()
        with (
            replacing(path) as temporary,
            h5py.File(temporary, "w", libver=("v110", "v110")) as file,
        ):
            features = _dataset(file, "features", (count, width), np.float16)
            for start in range(0, count, _ROWS):
                rows = np.frombuffer(buffer.read(2 * width * _ROWS), np.float16)
                features[start : start + _ROWS] = rows.reshape(-1, width)
            coords = _dataset(file, "coords", (count, 2), np.int64, found.coords)
            _dataset(file, "size_px", (count,), np.float64, found.size_px)
            for name, texts in (("tile", found.tiles), ("pair", found.pairs)):
                data = np.array([text.encode() for text in texts] or [b""], dtype="S")[:count]
                _dataset(file, name, (count,), data.dtype, data)
            for owner, values in ((file, metadata), (coords, coords_metadata)):
                for name, value in values.items():
                    owner.attrs[name] = _stored(value)
            for name, digest in _digests(file).items():
                file.attrs[_attribute(name)] = _stored(digest)
    return count


class ViewList:
    """Views that are collected while their features are computed."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, float, str, str]] = []

    def add(self, x_px: int, y_px: int, size_px: float, tile: str, pair: str) -> None:
        """Add a view."""
        self._rows.append((x_px, y_px, size_px, tile, pair))

    def views(self) -> Views:
        """Return the views added so far."""
        columns = list(zip(*self._rows, strict=True)) or [(), (), (), (), ()]
        coords = np.array(columns[:2], np.int64).T.reshape(-1, 2)
        return Views(coords, np.array(columns[2], np.float64), list(columns[3]), list(columns[4]))


class FeatureFile:
    """A file of features, opened for reading; a context manager."""

    def __init__(self, path: Path) -> None:
        """Open it; TableError when it is missing or not such a file."""
        self.path = path
        if not path.exists():
            raise TableError(f"{path}: no such file; run the stage embed")
        with translated(TableError, f"{path}: not a file of features ({{error}}); run embed again"):
            self._file = h5py.File(path, "r", locking=False)
            self.width = int(self._file["features"].shape[1])
            self.attributes = {name: _plain(value) for name, value in self._file.attrs.items()}

    def __len__(self) -> int:
        return int(self._file["features"].shape[0])

    def __enter__(self) -> "FeatureFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def check(self) -> None:
        """Raise TableError where a dataset or the attributes differ from their SHA-256."""
        with translated(TableError, f"{self.path}: damaged ({{error}}); delete it and run embed"):
            found = _digests(self._file)
        for name, digest in found.items():
            if self.attributes.get(_attribute(name)) != digest:
                raise TableError(
                    f"{self.path}: {name}: differs from its SHA-256 in the file; delete the file "
                    "and run embed again"
                )

    def views(self) -> Views:
        """Return the views of all rows."""
        tiles, pairs = (
            [text.decode() for text in self._file[name][:].tolist()] for name in ("tile", "pair")
        )
        return Views(self._file["coords"][:], self._file["size_px"][:], tiles, pairs)

    def read(self, rows: slice | npt.NDArray[np.int64]) -> Features:
        """Return the features (n, D) of rows, a slice or ascending numbers."""
        if isinstance(rows, slice):
            return np.asarray(self._file["features"][rows])
        if not len(rows):
            return np.zeros((0, self.width), np.float16)
        first = int(rows[0])
        block = self._file["features"][first : int(rows[-1]) + 1]
        return np.asarray(block if len(block) == len(rows) else block[rows - first])


def _attribute(name: str) -> str:
    """Return the name of the attribute with the SHA-256 of a dataset or of the attributes."""
    return f"{name}_sha256"


def _digests(file: Any) -> dict[str, str]:
    """Return the SHA-256 of each dataset of an open file, and of all other attributes."""
    found = {}
    for name in DATASETS:
        digest = hashlib.sha256()
        for start in range(0, len(file[name]), _ROWS):
            digest.update(np.ascontiguousarray(file[name][start : start + _ROWS]).tobytes())
        found[name] = digest.hexdigest()
    own = {_attribute(name) for name in (*DATASETS, "attributes")}
    described = [
        sorted((name, _plain(value)) for name, value in owner.attrs.items() if name not in own)
        for owner in (file, file["coords"])
    ]
    return {**found, "attributes": hashlib.sha256(json.dumps(described).encode()).hexdigest()}


def check_features(path: Path) -> None:
    """Raise TableError where datasets or attributes of a file differ from their SHA-256."""
    with FeatureFile(path) as file:
        file.check()


def _dataset(file: Any, name: str, shape: tuple[int, ...], dtype: Any, data: Any = None) -> Any:
    """Make a contiguous dataset without times, so that equal data are equal bytes."""
    return file.create_dataset(name, shape=shape, dtype=dtype, data=data, track_times=False)


def _folder(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent


def _stored(value: Any) -> Any:
    """Return an attribute as stored: texts of fixed length, because others have no checksum."""
    if isinstance(value, int | float):
        return value
    return np.bytes_((value if isinstance(value, str) else json.dumps(value)).encode())


def _plain(value: Any) -> Any:
    """Return an attribute as it was given."""
    if isinstance(value, bytes):
        return value.decode()
    return value.item() if isinstance(value, np.generic) else value
