"""Files that are not what they were: inputs that have changed, results that were cut off."""

import hashlib
import os
from pathlib import Path

from hemera.errors import InputFileError

_BLOCK = 64 * 1024
_BLOCKS = 64


def content_digest(path: Path, whole: bool = False) -> str:
    """Return ``whole:`` or ``sampled:`` and the SHA-256 of a file's size and bytes.

    Of files above 4 MiB, unless `whole`, 64 evenly spaced blocks of 64 KiB are read, among them the
    first and the last, which have the directories of a TIFF file.
    """
    size = path.stat().st_size
    state = hashlib.sha256(size.to_bytes(8))
    with path.open("rb") as file:
        if whole or size <= _BLOCK * _BLOCKS:
            while block := file.read(_BLOCK):
                state.update(block)
        else:
            for number in range(_BLOCKS):
                file.seek((size - _BLOCK) * number // (_BLOCKS - 1))
                state.update(file.read(_BLOCK))
    return f"{'whole' if whole else 'sampled'}:{state.hexdigest()}"


def check_content(path: Path, digest: str) -> None:
    """Raise InputFileError where a file is missing, or differs from its `content_digest`."""
    if not path.is_file():
        # Reading a pipe would not end.
        found = "a folder, pipe or device, not a file" if path.exists() else "no such file"
        raise InputFileError(f"{path}: {found}; correct the path")
    if content_digest(path, digest.startswith("whole:")) != digest:
        raise InputFileError(
            f"{path}: has changed since stage describe read it; restore it, or run `touch {path}` "
            "and the workflow again, which repeats all stages of its unit"
        )


_ENDINGS = {".tar": bytes(1024), ".parquet": b"PAR1"}
"""Last bytes of a complete file."""


def is_cut_off(path: Path) -> bool:
    """Return whether a shard, a table or a file of features exists and is not complete.

    A file of HDF5 states where it ends, at byte 40, or at 28 from version 2 on of its first block.
    """
    ending = _ENDINGS.get(path.suffix)
    if ending is None and path.suffix != ".h5":
        return False
    try:
        with path.open("rb") as file:
            if ending is None:
                head = file.read(48)
                at = 40 if head[8:9] < b"\2" else 28
                stated = int.from_bytes(head[at : at + 8], "little")
                return len(head) < 48 or stated > path.stat().st_size
            file.seek(-min(len(ending), path.stat().st_size), os.SEEK_END)
            return file.read() != ending
    except FileNotFoundError:
        return False
