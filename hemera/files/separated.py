"""Tables as text, with cells separated by tabs, semicolons or commas."""

import csv
import io
from pathlib import Path

from hemera.errors import SheetError

SEPARATORS = "\t;,"


def read_cells(path: Path) -> list[list[str]]:
    """Return the cells of each row, divided by the most frequent of `SEPARATORS` in the first.

    Raises:
        SheetError: the file cannot be read, or is no text in UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        separator = max(SEPARATORS, key=text.partition("\n")[0].count)
        return list(csv.reader(io.StringIO(text, newline=""), delimiter=separator))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SheetError(f"{path}: cannot be read ({error}); save it as UTF-8 text") from error
