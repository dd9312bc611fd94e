"""Shards: tar files of tiles and masks, written once in order and read by byte range.

A shard is uncompressed ustar with mtime 0 and no owner, so that equal tiles give equal bytes;
``tar`` and every WebDataset reader read it. Tables hold offset and length of each member, and a
reader fetches that range alone.
"""

from __future__ import annotations

import collections
import functools
import io
import operator
import os
import re
import struct
import tarfile
import tokenize
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

from hemera.dataset.splits import PARTS
from hemera.errors import ConfigError, ShardError

RGB = npt.NDArray[np.uint8]

SUFFIXES = {"jpeg": "jpg", "png": "png", "webp": "webp", "jxl": "jxl"}
"""File name suffix of each codec; all but jpeg are lossless."""

_BLOCK = 512
_RECORD = 10_240
_OPEN_SHARDS = 256

_CODEC_FAULTS = (ValueError, RuntimeError, TypeError, struct.error, cv2.error)


class ShardWriter:
    """Writes a shard member by member, in the order given; a context manager."""

    def __init__(self, path: Path) -> None:
        """Create the file `path`; who must not leave half a shard gives a temporary name."""
        self._file: io.BufferedWriter = open(path, "wb")  # noqa: SIM115
        self._name = path.name
        self._names: dict[str, int] = {}

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
        self._names[name] = self._file.tell()
        info = tarfile.TarInfo(name)
        info.size = len(data)
        info.mode = 0o644
        # Names over 100 bytes do not fit into ustar; the others are the same in both, and faster.
        short = len(name.encode()) <= 100
        self._file.write(info.tobuf(tarfile.USTAR_FORMAT if short else tarfile.PAX_FORMAT))
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
        self._names = {name: at for name, at in self._names.items() if at < position}

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


def _not_open(path: Path | str, error: OSError) -> ShardError:
    return ShardError(f"{path}: {error.strerror}; run the stage that writes it")


def _read(descriptor: int, path: Path | str, offset: int, length: int) -> bytes:
    """Read a member, and its header, which tells whether the place is one."""
    header = _range(descriptor, path, offset - _BLOCK, _BLOCK)
    if header[257:262] != b"ustar" or header[124:136] != b"%011o\0" % length:
        raise ShardError(
            f"{path}: holds no member of {length} bytes at {offset}; table and shard are of "
            "different runs, run the stage again"
        )
    return _range(descriptor, path, offset, length)


def _range(descriptor: int, path: Path | str, start: int, length: int) -> bytes:
    parts = []
    try:
        while length and start >= 0:
            part = os.pread(descriptor, length, start)
            if not part:
                break
            parts.append(part)
            start += len(part)
            length -= len(part)
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror}; run its stage again") from error
    if length:
        raise ShardError(f"{path}: ends before byte {start + length}; run its stage again")
    # Of one part, which is the rule, it is that part and no copy.
    return b"".join(parts)


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


class ShardReader:
    """Reads members of the shards below a folder by their places; a shard stays open once read.

    Files are opened in the process that reads, and pickling leaves them behind, so that a reader
    may be handed to other processes by fork or by spawn; it is not for several threads at once.
    """

    def __init__(self, folder: Path) -> None:
        """Read below `folder`."""
        self._folder = str(folder)
        self._open: collections.OrderedDict[str, int] = collections.OrderedDict()

    def read(self, shard: str, offset: int, length: int) -> bytes:
        """Return one member.

        Args:
            shard: relative to the folder.
            offset: where its bytes begin.
            length: how many they are.

        Raises:
            ShardError: when the shard is missing, truncated or not the one the place belongs to.
        """
        path = f"{self._folder}/{shard}"
        # A descriptor that a fork shares is harmless: pread has a position of its own.
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

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files behind when pickled."""
        return {**self.__dict__, "_open": collections.OrderedDict()}

    def __del__(self) -> None:
        """Close what is open."""
        for descriptor in self.__dict__.get("_open", {}).values():
            os.close(descriptor)


def select(
    index: Path,
    columns: Sequence[str],
    *,
    where: str | pc.Expression | None = None,
    network: str | None = None,
    part: str | None = None,
    refused: bool = False,
) -> pa.Table:
    """Read columns of those rows of the index that all conditions let through, in its order.

    Args:
        index: the index.
        columns: the columns wanted.
        where: a condition on the columns of the index: a pandas query, such as
            ``"dataset == 'bci' and he_sharpness > 40"``, or a pyarrow expression.
        network: generation or segmentation: the tiles drawn for it.
        part: train, val or test, of the network or, without one, of the cohort.
        refused: take tiles too that filter refused.

    Raises:
        ShardError: when the file is no index, or lacks the columns.
        ConfigError: when `where` cannot be asked of it, or there is no such part.
    """
    try:
        held = pq.read_schema(index).names
    except (OSError, ValueError) as error:
        raise ShardError(f"{index}: not an index ({error}); run index again") from error
    if part is not None and part not in PARTS:
        raise ConfigError(f"part: {part!r} is none; choose from {', '.join(PARTS)}")
    split = "split" if network is None else f"{network}_split"
    wanted = [*columns]
    conditions = []
    if not refused:
        wanted.append("accepted")
        conditions.append(pc.field("accepted"))
    if network is not None or part is not None:
        wanted.append(split)
        conditions.append(pc.field(split).is_valid() if part is None else pc.field(split) == part)
    lacking = sorted({name for name in wanted if name not in held})
    if lacking:
        raise ShardError(
            f"{index}: no column {', '.join(lacking)}; name a network and a mask engine it has"
        )
    asked: list[str] = []
    if isinstance(where, str):
        words = set(re.findall(r"\w+", where))
        asked = [name for name in held if name in words]
    elif where is not None:
        conditions.append(where)
    try:
        table = pq.read_table(
            index,
            columns=list(dict.fromkeys([*columns, *asked])),
            filters=functools.reduce(operator.and_, conditions) if conditions else None,
            partitioning=None,
        )
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        if where is None or isinstance(where, str):
            raise ShardError(f"{index}: cannot be read ({reason}); run index again") from error
        raise ConfigError(
            f"where: {where} cannot be asked of {index} ({reason}); name its columns, and compare "
            "them with values of their own type"
        ) from error
    if isinstance(where, str):
        table = table.filter(pa.array(_answers(where, table.select(asked))))
    return table.select(list(columns))


_QUERY_FAULTS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    NameError,
    NotImplementedError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
    tokenize.TokenError,
)
"""What pandas raises over a query that it cannot parse, or whose columns are not of such a type."""


def _answers(where: str, table: pa.Table) -> npt.NDArray[np.bool_]:
    """Ask a pandas query of every row of the columns it names."""
    # A quarter of a second to import, and only who asks in words needs it.
    import pandas as pd

    # A query may name no column at all; the rows must be there all the same.
    frame = table.to_pandas() if table.num_columns else pd.DataFrame(index=range(table.num_rows))
    try:
        found = frame.eval(where, local_dict={}, global_dict={})
    except _QUERY_FAULTS as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(
            f"where: {where!r} is no query of the index ({reason}); it reads as in "
            "pandas.DataFrame.query, with the columns of the index"
        ) from error
    answers = np.asarray(found)
    if answers.dtype != bool or answers.shape != (table.num_rows,):
        raise ConfigError(
            f"where: {where!r} does not answer true or false for each tile; compare a column with "
            "a value"
        )
    return answers
