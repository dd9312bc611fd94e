"""Every table: written as its schema says, read as its schema says, or an error in one line."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hemera import tables
from hemera.config import FilterOptions
from hemera.errors import TableError

SCHEMAS = {
    **{name: value for name, value in vars(tables).items() if isinstance(value, pa.Schema)},
    "filtered": tables.filtered(("stain", "deepliif")),
    "index": tables.index(("stain",)),
}
CELL = {
    "tile": "a_000000_000512",
    "engine": "stain",
    "cell": 7,
    "x_px": 1.5,
    "y_px": 2.5,
    "area_px": 31,
    "positive": True,
    "intensity": 2,
    "completeness": None,
    "membrane_od": None,
    "cytoplasm_od": None,
    "nucleus_od": None,
}


def example(schema: pa.Schema, number: int) -> dict[str, Any]:
    """A row of any schema, another one for each number."""
    row: dict[str, Any] = {}
    for place, field in enumerate(schema):
        kind = field.type
        if pa.types.is_boolean(kind):
            row[field.name] = bool((place + number) % 2)
        elif pa.types.is_integer(kind):
            row[field.name] = (place * 7 + number) % 100
        elif pa.types.is_floating(kind):
            row[field.name] = place + number / 4
        elif pa.types.is_list(kind):
            inner = pa.types.is_string(kind.value_type)
            row[field.name] = ["a", f"b-{number}"] if inner else [240, 241, number % 255]
        elif pa.types.is_binary(kind):
            row[field.name] = bytes([place, number % 256])
        else:
            row[field.name] = f"{field.name}-{number}"
    return row


@contextlib.contextmanager
def refused(*words: str) -> Iterator[None]:
    """Expect an error of one line."""
    with pytest.raises(TableError) as error:
        yield
    text = str(error.value)
    assert len(text.splitlines()) == 1, text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize("name", SCHEMAS)
def test_round_trip(tmp_path: Path, name: str) -> None:
    schema = SCHEMAS[name]
    rows = [example(schema, number) for number in (3, 1, 2)]
    tables.write(tmp_path / "t.parquet", rows, schema)
    back = tables.read(tmp_path / "t.parquet", schema)
    assert back.schema.equals(schema)
    assert back.to_pylist() == rows
    tables.write(tmp_path / "t.parquet", [], schema)
    back = tables.read(tmp_path / "t.parquet", schema)
    assert back.num_rows == 0
    assert back.schema.equals(schema)


def test_an_empty_value_is_only_where_the_schema_allows_it(tmp_path: Path) -> None:
    tables.write(tmp_path / "t.parquet", [{**CELL, "completeness": None}], tables.CELLS)
    with refused("t.parquet", "cell"):
        tables.write(tmp_path / "t.parquet", [{**CELL, "cell": None}], tables.CELLS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cell": "seven"}, ["seven"]),
        ({"cell": 2**40}, ["too large"]),
        ({"positive": "yes"}, ["yes"]),
        ({"x_px": "left"}, ["left"]),
        ({"cell": 1.5}, ["1.5"]),
        ({"cells": 8}, ["unknown columns cells"]),
    ],
)
def test_a_row_that_does_not_fit(tmp_path: Path, change: dict[str, Any], words: list[str]) -> None:
    with refused("t.parquet", *words):
        tables.write(tmp_path / "t.parquet", [CELL, {**CELL, **change}], tables.CELLS)
    assert not list(tmp_path.iterdir())


def test_a_table_that_does_not_fit(tmp_path: Path) -> None:
    good = pa.Table.from_pylist([CELL], schema=tables.CELLS)
    place = good.column_names.index("cell")
    wrong = good.set_column(place, "cell", pa.array(["x"]))
    for table in (wrong, good.drop_columns(["cell"])):
        with refused("t.parquet"):
            tables.write(tmp_path / "t.parquet", table, tables.CELLS)


def test_a_table_is_put_into_the_schemas_order(tmp_path: Path) -> None:
    good = pa.Table.from_pylist([CELL], schema=tables.CELLS)
    shuffled = good.select(sorted(good.column_names, reverse=True))
    tables.write(tmp_path / "t.parquet", shuffled, tables.CELLS)
    assert pq.read_schema(tmp_path / "t.parquet").names == tables.CELLS.names


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    with refused("no such table"):
        tables.read(path, tables.CELLS)
    with refused("no such table"):
        tables.read_metadata(path)
    tables.write(path, [CELL], tables.CELLS)
    whole = path.read_bytes()
    for junk in (b"", b"tile,engine\na,b\n", b"PAR1" * 9, whole[:-20], whole[: len(whole) // 2]):
        path.write_bytes(junk)
        with refused("not a Parquet file"):
            tables.read(path, tables.CELLS)
        with pytest.raises(TableError):
            tables.read_metadata(path)
    path.write_bytes(whole[:8] + b"\xff" * 60 + whole[68:])
    with refused("not a Parquet file"):
        tables.read(path, tables.CELLS)
    pq.write_table(pa.table({"z": [1]}), path)
    with refused("tile", "completeness"):
        tables.read(path, tables.CELLS)
    foreign = pa.Table.from_pylist([CELL]).set_column(2, "cell", pa.array(["x"]))
    pq.write_table(foreign, path)
    with refused("another version"):
        tables.read(path, tables.CELLS)
    pq.write_table(pa.Table.from_pylist([CELL, {**CELL, "tile": None}]), path)
    with refused("tile"):
        tables.read(path, tables.CELLS, ["tile"])


def test_same_rows_same_bytes(tmp_path: Path) -> None:
    rows = [example(tables.TILE, number) for number in range(500)]
    whole = pa.Table.from_pylist(rows, schema=tables.TILE)
    parts = pa.concat_tables([whole.slice(0, 7), whole.slice(7, 400), whole.slice(407)])
    given = (rows, whole, parts)
    for number, content in enumerate(given):
        tables.write(tmp_path / f"{number}.parquet", content, tables.TILE, {"b": "1", "a": "2"})
    first, *others = [(tmp_path / f"{number}.parquet").read_bytes() for number in range(len(given))]
    assert all(other == first for other in others)


def test_metadata_round_trip(tmp_path: Path) -> None:
    options = FilterOptions(he_sharpness_min=12.5, histogram_datasets=())
    tables.write(tmp_path / "t.parquet", [CELL], tables.CELLS, tables.provenance(options))
    kept = tables.read_metadata(tmp_path / "t.parquet")
    assert json.loads(kept["options"]) == {
        **options.model_dump(),
        "histogram_datasets": [],
        "version": FilterOptions.version,
    }
    tables.write(tmp_path / "t.parquet", [CELL], tables.CELLS)
    assert tables.read_metadata(tmp_path / "t.parquet") == {}


def test_a_flipped_bit_is_an_error_or_changes_no_value(tmp_path: Path) -> None:
    """Without checksums of pages, a tenth of the flips changed values."""
    path = tmp_path / "cells.parquet"
    rows = [
        {**CELL, "tile": f"t{k % 7}", "cell": k, "x_px": k / 3, "area_px": 31 + k * k}
        for k in range(400)
    ]
    tables.write(path, rows, tables.CELLS)
    stored, right = path.read_bytes(), tables.read(path, tables.CELLS)
    found = 0
    for place in range(4, len(stored), 23):
        path.write_bytes(stored[:place] + bytes([stored[place] ^ 0x10]) + stored[place + 1 :])
        try:
            assert tables.read(path, tables.CELLS).equals(right), place
        except TableError:
            found += 1
    assert found > 0.6 * len(range(4, len(stored), 23))


def test_a_table_in_parts_is_read_as_one_and_part_by_part(tmp_path: Path) -> None:
    rows = [{"pair": f"p{n}", "state": "tiled", "registration": "pass", "tiles_grid": n,
             "tiles_tissue": 0, "tiles_artefact": 0, "tiles_unreadable": 0, "tiles_written": 0}
            for n in range(7)]  # fmt: skip
    whole, parted = tmp_path / "whole.parquet", tmp_path / "parted.parquet"
    tables.write(whole, rows, tables.PAIRS, {"options": "{}"})
    table = tables.read(whole, tables.PAIRS)
    parts = (table.slice(first, 3) for first in (0, 3, 6))
    tables.write_parts(parted, parts, tables.PAIRS, {"options": "{}"})
    assert tables.read(parted, tables.PAIRS).equals(table)
    assert tables.read_metadata(parted) == tables.read_metadata(whole) == {"options": "{}"}
    found = list(tables.read_parts(parted, tables.PAIRS, ["pair"]))
    assert [part.column("pair").to_pylist() for part in found] == [
        ["p0", "p1", "p2"], ["p3", "p4", "p5"], ["p6"],
    ]  # fmt: skip
    tables.write_parts(whole, [table], tables.PAIRS, {"options": "{}"})
    first = whole.read_bytes()
    tables.write(whole, rows, tables.PAIRS, {"options": "{}"})
    assert whole.read_bytes() == first


def test_a_part_that_does_not_fit_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    with pytest.raises(TableError, match="do not fit the schema"):
        tables.write_parts(path, [pa.table({"pair": ["a"]})], tables.PAIRS)
    assert list(tmp_path.iterdir()) == []
