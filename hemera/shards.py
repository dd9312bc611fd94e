"""Shards: tar files of tiles and masks, written once in order and read by byte range.

A shard is uncompressed ustar with mtime 0 and no owner, so that equal tiles give equal bytes;
``tar`` and every WebDataset reader read it. Tables hold offset and length of each member, and a
reader fetches that range alone.
"""

from __future__ import annotations

import collections
import io
import os
import struct
import tarfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import cv2
import imagecodecs
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import simplejpeg

from hemera.errors import ShardError

RGB = npt.NDArray[np.uint8]

SUFFIXES = {"jpeg": "jpg", "png": "png", "webp": "webp", "jxl": "jxl"}
"""File name suffix of each codec; all but jpeg are lossless."""

_BLOCK = 512
_RECORD = 10_240
_OPEN_SHARDS = 64

_CODEC_FAULTS = (ValueError, RuntimeError, TypeError, struct.error, cv2.error)


class ShardWriter:
    """Writes a shard member by member, in the order given; a context manager."""

    def __init__(self, path: Path) -> None:
        """Create the file `path`; who must not leave half a shard gives a temporary name."""
        self._file: io.BufferedWriter = open(path, "wb")  # noqa: SIM115
        self._name = path.name
        self._names: set[str] = set()

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the archive; after an error, only close the file."""
        if kind is None:
            self.close()
        else:
            self._file.close()

    def add(self, name: str, data: bytes) -> tuple[int, int]:
        """Append one member.

        Args:
            name: its name in the archive.
            data: its bytes.

        Returns:
            Offset and length of the bytes in the shard.

        Raises:
            ShardError: when the shard holds that name already.
        """
        if name in self._names:
            raise ShardError(f"{self._name}: {name} stands in it already; tile ids must be unique")
        self._names.add(name)
        info = tarfile.TarInfo(name)
        info.size = len(data)
        info.mode = 0o644
        # Equal to ustar, but for names over 100 bytes, which ustar cannot hold.
        self._file.write(info.tobuf(tarfile.PAX_FORMAT))
        offset = self._file.tell()
        self._file.write(data)
        self._file.write(bytes(-len(data) % _BLOCK))
        return offset, len(data)

    def position(self) -> int:
        """Return where the next member begins, for `rewind`."""
        return self._file.tell()

    def rewind(self, position: int) -> None:
        """Drop every member behind a `position` returned before."""
        self._file.seek(position)
        self._file.truncate()

    def close(self) -> None:
        """End the archive as ``tar`` does."""
        if self._file.closed:
            return
        end = self._file.tell() + 2 * _BLOCK
        self._file.write(bytes(2 * _BLOCK + -end % _RECORD))
        self._file.close()


def read_member(path: Path, offset: int, length: int) -> bytes:
    """Read one member of a shard by its place.

    Raises:
        ShardError: when the shard is missing, truncated or not the one the place belongs to.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise _not_open(path, error) from error
    try:
        return _read(descriptor, path, offset, length)
    finally:
        os.close(descriptor)


def _not_open(path: Path, error: OSError) -> ShardError:
    return ShardError(f"{path}: {error.strerror}; run the stage that writes it")


def _read(descriptor: int, path: Path, offset: int, length: int) -> bytes:
    """Read a member with its header, which tells whether the place is one."""
    start = offset - _BLOCK
    wanted = length + _BLOCK
    parts = []
    try:
        while wanted and start >= 0:
            part = os.pread(descriptor, wanted, start)
            if not part:
                break
            parts.append(part)
            start += len(part)
            wanted -= len(part)
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror}; run its stage again") from error
    data = b"".join(parts)
    if wanted or len(data) < _BLOCK:
        raise ShardError(f"{path}: ends before byte {offset + length}; run its stage again")
    header = data[:_BLOCK]
    if header[257:262] != b"ustar" or header[124:136] != b"%011o\0" % length:
        raise ShardError(
            f"{path}: holds no member of {length} bytes at {offset}; table and shard are of "
            "different runs, run the stage again"
        )
    return data[_BLOCK:]


def encode(rgb: RGB, codec: str = "jpeg", quality: int = 95) -> bytes:
    """Encode a tile (H, W, 3); all codecs but jpeg (4:4:4) are lossless and ignore `quality`.

    Raises:
        ShardError: when there is no such codec.
    """
    pixels = np.ascontiguousarray(rgb)
    if codec == "jpeg":
        return bytes(
            simplejpeg.encode_jpeg(
                pixels, quality=quality, colorspace="RGB", colorsubsampling="444"
            )
        )
    if codec == "png":
        bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
        return cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()
    if codec == "webp":
        return bytes(imagecodecs.webp_encode(pixels, lossless=True, method=0))
    if codec == "jxl":
        return bytes(imagecodecs.jpegxl_encode(pixels, lossless=True, effort=1, numthreads=1))
    raise ShardError(f"tile.codec: no codec {codec!r}; choose from {', '.join(SUFFIXES)}")


def decode(data: bytes) -> RGB:
    """Decode a tile to (H, W, 3) RGB, whatever codec wrote it.

    Raises:
        ShardError: when the bytes are no image.
    """
    try:
        if data.startswith(b"\xff\xd8\xff"):
            pixels = simplejpeg.decode_jpeg(data, colorspace="RGB")
        elif data.startswith(b"\x89PNG"):
            found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
            if found is None:
                raise ValueError("broken PNG")
            pixels = cv2.cvtColor(found, cv2.COLOR_BGR2RGB)
        elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            pixels = imagecodecs.webp_decode(data, hasalpha=False)
        elif data.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
            pixels = imagecodecs.jpegxl_decode(data, numthreads=1)
        else:
            raise ValueError("neither JPEG, PNG, WebP nor JPEG XL")
    except _CODEC_FAULTS as error:
        raise ShardError(f"tile: cannot be decoded ({error}); run the stage again") from error
    array = np.asarray(pixels)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ShardError(f"tile: {array.dtype} of shape {array.shape}; it must be 8-bit RGB")
    return array


def encode_mask(mask: npt.NDArray[np.uint8]) -> bytes:
    """Encode a label image (H, W) as gray PNG."""
    # Labels are runs of few values: filtering lines only hides them.
    parameters = [cv2.IMWRITE_PNG_COMPRESSION, 6, cv2.IMWRITE_PNG_STRATEGY, 3]
    return cv2.imencode(".png", np.ascontiguousarray(mask), parameters)[1].tobytes()


def decode_mask(data: bytes) -> npt.NDArray[np.uint8]:
    """Decode a label image to (H, W) uint8.

    Raises:
        ShardError: when the bytes are no gray 8-bit image.
    """
    try:
        mask = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise ShardError(f"mask: cannot be decoded ({error.err}); run mask again") from error
    if mask is None or mask.dtype != np.uint8 or mask.ndim != 2:
        raise ShardError("mask: not a gray 8-bit PNG; run mask again")
    return np.asarray(mask, np.uint8)


class TileDataset:
    """The tiles of one network's part of the index, as arrays; a map-style dataset.

    Item i is a dict of ``tile`` (its id), ``he`` and ``her2`` (H, W, 3) and ``mask`` (H, W), all
    uint8 as they are stored, and ``registration_error_um``, NaN where it is not known. Shards are
    opened when first read, in the process that reads, so it may be handed to workers by fork or by
    spawn.
    """

    def __init__(self, index: Path, *, network: str, part: str, engine: str) -> None:
        """Select the rows.

        Args:
            index: the index; shards are found from the folder above the index's own.
            network: generation or segmentation.
            part: train, val or test.
            engine: whose masks.

        Raises:
            ShardError: when the index lacks the columns, or a selected tile its mask.
        """
        index = Path(index)
        self._results = index.parent.parent
        split = f"{network}_split"
        mask = [f"{engine}_{name}" for name in ("shard", "offset", "length")]
        own = ["tile", "shard", "he_offset", "he_length", "her2_offset", "her2_length"]
        quality = "registration_error_um"
        try:
            held = pq.read_schema(index).names
        except (OSError, ValueError) as error:
            raise ShardError(f"{index}: not an index ({error}); run index again") from error
        lacking = [name for name in [*own, quality, split, *mask] if name not in held]
        if lacking:
            raise ShardError(
                f"{index}: no column {', '.join(lacking)}; name a network and a mask engine it has"
            )
        table = pq.read_table(
            index,
            columns=[*own, quality, *mask],
            filters=pc.field(split) == part,
            partitioning=None,
        )
        for name in mask:
            if table.column(name).null_count:
                raise ShardError(
                    f"{index}: {table.column(name).null_count} tiles without a mask of {engine}; "
                    "run mask and index again"
                )
        self.tiles: Sequence[str] = table.column("tile").to_pylist()
        self._shards, self._shard_of = _codes(table.column("shard").to_pylist())
        self._mask_shards, self._mask_shard_of = _codes(table.column(mask[0]).to_pylist())
        self._places = np.stack(
            [
                table.column(name).to_numpy().astype(np.int64)
                for name in ("he_offset", "he_length", "her2_offset", "her2_length", *mask[1:])
            ],
            axis=1,
        )
        self._errors_um = table.column(quality).cast(pa.float64()).to_numpy().astype(np.float64)
        self._open: collections.OrderedDict[str, int] = collections.OrderedDict()

    def __len__(self) -> int:
        """Return the number of tiles."""
        return len(self.tiles)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Read and decode tile `i`.

        Raises:
            IndexError: past the end.
            ShardError: when a shard does not hold what the index says.
        """
        if not -len(self) <= i < len(self):
            raise IndexError(f"tile {i} of {len(self)}")
        shard = self._shards[self._shard_of[i]]
        mask_shard = self._mask_shards[self._mask_shard_of[i]]
        he, he_length, her2, her2_length, mask, mask_length = (int(n) for n in self._places[i])
        return {
            "tile": self.tiles[i],
            "he": decode(self._member(shard, he, he_length)),
            "her2": decode(self._member(shard, her2, her2_length)),
            "mask": decode_mask(self._member(mask_shard, mask, mask_length)),
            "registration_error_um": float(self._errors_um[i]),
        }

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files behind when pickled."""
        return {**self.__dict__, "_open": collections.OrderedDict()}

    def __del__(self) -> None:
        """Close what is open."""
        for descriptor in self.__dict__.get("_open", {}).values():
            os.close(descriptor)

    def _member(self, shard: str, offset: int, length: int) -> bytes:
        # A descriptor that a fork shares is harmless: pread has a position of its own.
        path = self._results / shard
        descriptor = self._open.get(shard)
        if descriptor is None:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise _not_open(path, error) from error
            self._open[shard] = descriptor
            if len(self._open) > _OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
        else:
            self._open.move_to_end(shard)
        return _read(descriptor, path, offset, length)


def _codes(names: list[str]) -> tuple[list[str], npt.NDArray[np.int32]]:
    """Keep each shard's name once: a long index names few shards many times."""
    known = sorted(set(names))
    place = {name: number for number, name in enumerate(known)}
    return known, np.array([place[name] for name in names], np.int32)
