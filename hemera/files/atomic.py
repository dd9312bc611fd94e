"""Atomic writing: a reader sees either the old or the complete new file."""

import contextlib
import functools
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from hemera.errors import ConfigError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; it becomes `path` when the block succeeds.

    The temporary file keeps the suffix of `path`. When the block raises, it is removed and
    `path` is unchanged. Those that killed processes left of `path` are removed at the beginning.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in _leftovers(path.parent).get((path.stem, path.suffix), ()):
        leftover.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@functools.cache
def _leftovers(folder: Path) -> dict[tuple[str, str], list[Path]]:
    """Return the temporary files in a folder when it is first written to, by stem and suffix."""
    found: dict[tuple[str, str], list[Path]] = {}
    for path in folder.iterdir():
        match = re.fullmatch(r"\.(.+)\.[0-9a-f]{8}(\.\w+)?", path.name)
        if match:
            found.setdefault((match[1], match[2] or ""), []).append(path)
    return found


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; it becomes `folder` when the block succeeds.

    ConfigError when `folder` is a file, or a folder that is not empty.
    """
    folder = Path(folder).absolute().resolve()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file; name a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder}: is not empty; name a new folder")
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` in one step."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one step, as UTF-8."""
    write_bytes(path, text.encode())
