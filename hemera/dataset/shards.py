"""Shards: tar files of tiles and masks, written once in order and read by byte range.

A shard is uncompressed ustar with mtime 0 and no owner, so that equal tiles give equal bytes;
``tar`` and every WebDataset reader read it. Tables store offset and length of each member, and a
reader fetches only that range.
"""

from __future__ import annotations

import collections
import io
import os
import tarfile
from pathlib import Path
from typing import Any, Self

from hemera.errors import ShardError

_BLOCK = 512
_RECORD = 10_240
_OPEN_SHARDS = 256


class ShardWriter:
    """Writes a shard member by member, in the order given; a context manager."""

    def __init__(self, path: Path) -> None:
        """Create the file `path`; for an atomic write, pass a temporary name."""
        self._file: io.BufferedWriter = path.open("wb")
        self._name = path.name
        self._names: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the archive as ``tar`` does; after an error, only close the file."""
        with self._file:
            if kind is None:
                end = self._file.tell() + 2 * _BLOCK
                self._file.write(bytes(2 * _BLOCK + -end % _RECORD))

    def add(self, name: str, data: bytes) -> tuple[int, int]:
        """Append one member.

        Args:
            name: its name in the archive.
            data: its bytes.

        Returns:
            Offset and length of the bytes in the shard.

        Raises:
            ShardError: when the shard has a member of that name.
        """
        if name in self._names:
            raise ShardError(f"{self._name}: {name} exists already; tile ids must be unique")
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
        """Remove every member that begins at `position` or later."""
        self._file.seek(position)
        self._file.truncate()
        self._names = {name: start for name, start in self._names.items() if start < position}


class ShardReader:
    """Reads members of the shards below a folder by offset; keeps up to 256 shards open.

    Files are opened in the process that reads, and pickling leaves them behind, so that a reader
    may be passed to other processes by fork or by spawn; it is not for several threads at once.
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
            ShardError: when the shard is missing, truncated or not the one the offset belongs to.
        """
        path = f"{self._folder}/{shard}"
        # A descriptor shared by a fork is harmless: pread has a position of its own.
        descriptor = self._open.get(shard)
        if descriptor is None:
            descriptor = self._open[shard] = _open(path)
            if len(self._open) > _OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
        else:
            self._open.move_to_end(shard)
        return _read(descriptor, path, offset, length)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the open files."""
        return {**self.__dict__, "_open": collections.OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_open", {}).values():
            os.close(descriptor)


def read_member(path: Path, offset: int, length: int) -> bytes:
    """Read one member of a shard by its offset.

    Raises:
        ShardError: when the shard is missing, truncated or not the one the offset belongs to.
    """
    descriptor = _open(path)
    try:
        return _read(descriptor, path, offset, length)
    finally:
        os.close(descriptor)


def _open(path: Path | str) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror}; run the stage that writes it") from error


def _read(descriptor: int, path: Path | str, offset: int, length: int) -> bytes:
    """Read a member after its header, which shows whether there is a member at the offset."""
    header = _read_range(descriptor, path, offset - _BLOCK, _BLOCK)
    if header[257:262] != b"ustar" or header[124:136] != b"%011o\0" % length:
        raise ShardError(
            f"{path}: no member of {length} bytes at {offset}; table and shard are of different "
            "runs, run the stage again"
        )
    return _read_range(descriptor, path, offset, length)


def _read_range(descriptor: int, path: Path | str, start: int, length: int) -> bytes:
    chunks = []
    try:
        while length and start >= 0:
            chunk = os.pread(descriptor, length, start)
            if not chunk:
                break
            chunks.append(chunk)
            start += len(chunk)
            length -= len(chunk)
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror}; run its stage again") from error
    if length:
        raise ShardError(f"{path}: ends before byte {start + length}; run its stage again")
    # For a single chunk, the usual case, join returns that chunk without a copy.
    return b"".join(chunks)
