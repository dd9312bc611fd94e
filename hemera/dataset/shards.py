"""Shards: tar files of tiles and masks, written once in order and read by byte range.

A shard is uncompressed ustar with mtime 0 and no owner, so that equal tiles give equal bytes;
``tar`` and every WebDataset reader read it.
"""

import collections
import hashlib
import io
import os
import tarfile
import threading
from pathlib import Path
from typing import Any, Self

from hemera.errors import ShardError
from hemera.files.faults import translated

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
        """Append one member; return offset and length of its bytes in the shard."""
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

    It may be passed to other processes by fork or by spawn, and used by several threads, which read
    one after the other.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._open: collections.OrderedDict[str, int] = collections.OrderedDict()
        self._lock = threading.Lock()

    def read(self, shard: str, offset: int, length: int, digest: bytes = b"") -> bytes:
        """Return the bytes of one member of a shard, which is relative to the folder.

        `digest` is the SHA-256 that they must have, or its first bytes; empty: not compared.
        """
        path = f"{self._folder}/{shard}"
        try:
            # The header before the bytes shows whether there is a member at the offset. A
            # descriptor shared by a fork is harmless: pread has a position of its own.
            with self._lock:
                data = os.pread(self._descriptor(shard, path), _BLOCK + length, offset - _BLOCK)
        except OSError as error:
            raise ShardError(f"{path}: {error.strerror}; run the stage that writes it") from error
        if len(data) < _BLOCK + length:
            raise ShardError(f"{path}: ends before byte {offset + length}; run its stage again")
        if data[257:262] != b"ustar" or data[124:136] != b"%011o\0" % length:
            raise ShardError(
                f"{path}: no member of {length} bytes at {offset}; table and shard are of "
                "different runs, run the stage again"
            )
        header, data = data[:_BLOCK], data[_BLOCK:]
        if digest and not hashlib.sha256(data).digest().startswith(digest):
            member = header[:100].rstrip(b"\0").decode(errors="replace")
            raise ShardError(
                f"{path}: {member} differs from its SHA-256 in the table; delete the shard and run "
                "its stage again"
            )
        return data

    def _descriptor(self, shard: str, path: str) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            self._open[shard] = os.open(path, os.O_RDONLY)
            if len(self._open) > _OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
        return self._open[shard]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the open files."""
        return type(self), (Path(self._folder),)

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_open", {}).values():
            os.close(descriptor)


def read_member(path: Path, offset: int, length: int, sha256: str = "") -> bytes:
    """Read one member of a shard, see `ShardReader.read`; the digest as hexadecimal digits."""
    return ShardReader(path.parent).read(path.name, offset, length, bytes.fromhex(sha256))


def member_offsets(path: Path) -> set[int]:
    """Return where the bytes of the members begin that ``tar`` finds by the headers of a shard.

    After a damaged header it finds no more. ShardError where it is the first one.
    """
    with (
        translated(ShardError, f"{path}: not a tar file ({{error}}); delete it and run again"),
        tarfile.open(path, "r:") as archive,
    ):
        return {member.offset_data for member in archive}
