"""A person's decisions, written into the sheet of pairs and into the configuration."""

import contextlib
import datetime
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from hemera.errors import SheetError
from hemera.files.atomic import replacing, write_bytes
from hemera.sheet import read_sheet

REASON_MAX = 500
"""Characters of a reason that are kept."""


class Backups:
    """Copies of a file before this program changes it, one for each state that others wrote."""

    def __init__(self) -> None:
        self._own: dict[Path, bytes] = {}

    def keep(self, path: Path, content: bytes) -> Path | None:
        """Write the content beside the file, unless this program wrote it; return the copy."""
        if self._own.get(path) == content:
            return None
        time = datetime.datetime.now().strftime("%Y-%m-%dT%H%M%S.%f")
        copy = path.with_name(f"{path.name}.{time}.bak")
        write_bytes(copy, content)
        return copy

    def wrote(self, path: Path, content: bytes) -> None:
        """Note what this program has written."""
        self._own[path] = content


def decide(sheet: Path, pair: str, verdict: str, reason: str, backups: Backups) -> Path | None:
    """Write the columns `verdict` and `verdict_reason` of a pair into the sheet in one step.

    The sheet is read again each time, so that changes by others are kept; all other cells remain
    as they are. Return the backup of the sheet, if one was made.

    Raises:
        SheetError: when the sheet has faults, or would have; it is unchanged then.
    """
    # The file itself, not a link to it.
    sheet = sheet.resolve()
    with locked(sheet.parent):
        read_sheet(sheet).pair(pair)
        before = sheet.read_bytes()
        words = " ".join(reason.split())[:REASON_MAX]
        text = changed_row(before.decode(), pair, {"verdict": verdict, "verdict_reason": words})
        copy = backups.keep(sheet, before)
        with replacing(sheet) as temporary:
            temporary.write_bytes(text.encode())
            shutil.copymode(sheet, temporary)
            read_sheet(temporary)
        backups.wrote(sheet, text.encode())
    return copy


def changed_row(text: str, pair: str, cells: Mapping[str, str]) -> str:
    """Return the text of a sheet with other cells in the row of a pair.

    A column that the sheet lacks is added to the header and to this row. SheetError without the
    row.
    """
    lines = text.split("\n")
    first = next(number for number, line in enumerate(lines) if line.strip("\ufeff \t\r"))
    header = [name.strip("\ufeff \t\r") for name in lines[first].split("\t")]
    added = [name for name in cells if name not in header]
    place = header.index("pair")
    header += added
    if added:
        lines[first] = _with_end(lines[first], "\t".join(["", *added]))
    for number, line in enumerate(lines[first + 1 :], first + 1):
        found = line.rstrip("\r").split("\t")
        if len(found) > place and found[place].strip() == pair:
            found += [""] * (len(header) - len(found))
            for name, cell in cells.items():
                found[header.index(name)] = cell
            lines[number] = "\t".join(found) + "\r" * line.endswith("\r")
            return "\n".join(lines)
    raise SheetError(f"no row of pair {pair}; the sheet has changed, load the page again")


def _with_end(line: str, end: str) -> str:
    return line.rstrip("\r") + end + "\r" * line.endswith("\r")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Exclude other threads and processes of this program from the files in a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
