"""Comparison of a table with rows that are computed again, in parts of other sizes."""

from pathlib import Path

import pyarrow as pa
import pytest

from hemera import tables
from hemera.dataset.verification import compare
from hemera.errors import TableError

SCHEMA = pa.schema([pa.field("tile", pa.string(), False), pa.field("value", pa.float64())])
ROWS = pa.table(
    {"tile": list("abcdefghi"), "value": [0.0, float("nan"), None, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]}
)


def parts(table: pa.Table, *sizes: int) -> list[pa.Table]:
    found, first = [], 0
    for size in sizes:
        found.append(table.slice(first, size))
        first += size
    assert first == table.num_rows
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tables.write_parts(tmp_path / "t.parquet", parts(ROWS, 3, 2, 4), SCHEMA)
    return tmp_path / "t.parquet"


@pytest.mark.parametrize("sizes", [(9,), (4, 5), (1, 0, 7, 1), (3, 2, 4), (2,) * 4 + (1,)])
def test_equal_rows_in_parts_of_any_size_are_equal(path: Path, sizes: tuple[int, ...]) -> None:
    compare(path, SCHEMA, parts(ROWS, *sizes))


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ("abcdefgh", "t.parquet: a row of i, unlike its sources"),
        ("bcdefghi", "t.parquet: a row of a, unlike its sources"),
        ("", "t.parquet: a row of a, unlike its sources"),
    ],
)
def test_an_added_row_is_named(path: Path, kept: str, words: str) -> None:
    expected = ROWS.filter(pa.compute.is_in(ROWS["tile"], pa.array(list(kept), pa.string())))
    with pytest.raises(TableError, match=words):
        compare(path, SCHEMA, [expected])


@pytest.mark.parametrize(("stored", "missing"), [("abcdefgh", "i"), ("abcefghi", "d"), ("", "a")])
def test_a_missing_row_is_named(tmp_path: Path, stored: str, missing: str) -> None:
    own = ROWS.filter(pa.compute.is_in(ROWS["tile"], pa.array(list(stored), pa.string())))
    tables.write(tmp_path / "t.parquet", own, SCHEMA)
    with pytest.raises(TableError, match=rf"t\.parquet: no row of {missing}, which its sources"):
        compare(tmp_path / "t.parquet", SCHEMA, parts(ROWS, 4, 5))


def test_the_first_value_that_differs_is_named(path: Path) -> None:
    values = ROWS["value"].to_pylist()
    expected = pa.table({"tile": ROWS["tile"], "value": [*values[:6], 6.5, 7.5, 8.0]})
    with pytest.raises(TableError, match=r"value of g is 6\.0, and its sources give 6\.5"):
        compare(path, SCHEMA, parts(expected, 5, 4))
