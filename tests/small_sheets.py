"""A sheet of pairs in a folder, and what describe and register write for one of its units."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hemera import tables
from hemera.config import DescribeOptions
from hemera.sheet import write_rows
from hemera.stages import describe


def write_sheet(folder: Path, rows: Iterable[Mapping[str, Any]], **common: Any) -> Path:
    """Write `pairs.tsv` of rows that name some columns; `common` is for all of them."""
    sheet = folder / "pairs.tsv"
    sheet.write_text(write_rows([{**common, **row} for row in rows]))
    return sheet


def describe_unit(
    folder: Path, unit: str, table: Path, options: DescribeOptions | None = None
) -> Path:
    """Describe the images of a unit of the folder's sheet; return the table."""
    sheet = folder / "pairs.tsv"
    options = options or DescribeOptions()
    describe.run(sheet=sheet, unit=unit, block_count=1, images_table=table, options=options)
    return table


def write_certificate(
    path: Path, pair: str, verdict: str, reason: str | None = None, engine: str = "test"
) -> None:
    row = dict.fromkeys(tables.CERTIFICATE.names)
    row |= {"pair": pair, "verdict": verdict, "reason": reason, "engine": engine}
    tables.write(path, [row], tables.CERTIFICATE)
