"""Compare tables with those that they were made from; the first difference raises TableError."""

import collections
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from hemera import tables
from hemera.config import FilterOptions, IndexOptions
from hemera.config.base import Options
from hemera.dataset import cohort_rows
from hemera.dataset.fingerprint import FINGERPRINTED, fingerprint_of_parts
from hemera.errors import TableError
from hemera.files import json_text, layout
from hemera.files.faults import translated
from hemera.registration.displacement import map_points
from hemera.registration.displacement_files import read_displacement
from hemera.sheet import Pair

AGAIN = "delete it and run the workflow again"

OptionsT = TypeVar("OptionsT", bound=Options)

POSITION_MAX_PX = 0.01
"""Largest difference between two computations of a position: rounding, on another processor."""


def check_options(path: Path, found: str | None, options: Options) -> None:
    """Compare the options that a result was made with, JSON, with those of the configuration."""
    expected = json.loads(tables.provenance(options)["options"])
    difference = _first_key(stated_options(path, found), expected)
    if difference:
        key, own, other = difference
        source = "this version of HEMERA" if key == "version" else "the configuration"
        raise TableError(
            f"{path}: made with {options.section}: {key} {own}, and {source} has {other}; run the "
            "workflow again"
        )


def stated_options(path: Path, text: str | None) -> dict[str, Any]:
    """Return the options that a result was made with, with their version; `text` is JSON."""
    with translated(TableError, f"{path}: its options are not JSON ({{error}}); {AGAIN}"):
        values = json_text.loads(text or "{}")
    if not isinstance(values, dict):
        raise TableError(f"{path}: its options are {values!r}, not a mapping; {AGAIN}")
    return values


def _first_key(
    found: Mapping[str, Any], expected: Mapping[str, Any]
) -> tuple[str, Any, Any] | None:
    """Return name and values of the first entry in which two mappings differ."""
    for key in sorted({*found, *expected}):
        own, other = found.get(key, "missing"), expected.get(key, "missing")
        if own != other:
            return key, own, other
    return None


def check_metadata(path: Path, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Compare metadata of a table with those that its sources give."""
    difference = _first_key(dict(found), dict(expected))
    if difference:
        key, own, other = difference
        raise TableError(f"{path}: {key} is {own}, and its sources give {other}; {AGAIN}")


def check_pairs(path: Path, pairs: Sequence[Pair], tiles: Path) -> None:
    """Compare a table `PAIRS` with the sheet and with the rows of its tiles."""
    rows = tables.read(path, tables.PAIRS).to_pylist()
    _check_names(path, [row["pair"] for row in rows], [pair.pair for pair in pairs], "the sheet")
    names = tables.read(tiles, tables.TILE, ["pair"]).column("pair").to_pylist()
    counted = collections.Counter(names)
    for row in rows:
        if counted.pop(row["pair"], 0) != row["tiles_written"]:
            raise TableError(
                f"{path}: {row['tiles_written']} tiles of {row['pair']}, and {tiles.name} has "
                f"{names.count(row['pair'])}; delete both and run the workflow again"
            )
    if counted:
        raise TableError(f"{tiles}: tiles of {min(counted)}, which {path.name} lacks; {AGAIN}")


def check_positions(tiles: Path, displacement: Path) -> None:
    """Compare the positions of tiles on HER2 with those that the displacement gives."""
    field = read_displacement(displacement)
    columns = ["tile", "x_px", "y_px", "he_mpp", "her2_x_px", "her2_y_px", "her2_mpp"]
    table = tables.read(tiles, tables.TILE, columns)
    if not table.num_rows:
        return
    if field.empty:
        raise TableError(f"{tiles}: tiles, and {displacement.name} has no map; {AGAIN}")
    values = {name: table.column(name).to_numpy() for name in columns[1:]}
    corners = np.stack([values["x_px"], values["y_px"]], axis=1) * values["he_mpp"][:, None]
    expected = map_points(field, corners) / values["her2_mpp"][:, None]
    found = np.stack([values["her2_x_px"], values["her2_y_px"]], axis=1)
    differ = np.flatnonzero(~(np.abs(found - expected) <= POSITION_MAX_PX).all(axis=1))
    if len(differ):
        first = int(differ[0])
        raise TableError(
            f"{tiles}: {table.column('tile')[first]} is at {_point(found[first])} px on HER2, and "
            f"{displacement.name} maps it to {_point(expected[first])}; {AGAIN}"
        )


def _point(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def check_masks(path: Path, tiles: Path, engines: Sequence[str]) -> None:
    """Compare the rows of a table `MASK` with those of its tiles: one per tile and engine."""
    expected = tables.read(tiles, tables.TILE, ["tile"]).column("tile").to_pylist()
    names: dict[str, list[str]] = {engine: [] for engine in engines}
    for row in tables.read(path, tables.MASK, ["tile", "engine"]).to_pylist():
        names.setdefault(row["engine"], []).append(row["tile"])
    for engine, own in names.items():
        if engine not in engines:
            raise TableError(f"{path}: masks of {engine}, which is not an engine here; {AGAIN}")
        _check_names(path, own, expected, tiles.name)


def check_cells(path: Path, masks: Path) -> None:
    """Compare the rows of a table `CELLS` with the numbers of cells in its table of masks."""
    keys = ["tile", "engine"]
    grouped = tables.read(path, tables.CELLS).select([*keys, "positive"]).group_by(keys)
    counted = {
        (row["tile"], row["engine"]): (row["positive_count"], row["positive_sum"])
        for row in grouped.aggregate([("positive", "count"), ("positive", "sum")]).to_pylist()
    }
    columns = [*keys, "cells", "positive_cells"]
    for row in tables.read(masks, tables.MASK, columns).to_pylist():
        found = counted.pop((row["tile"], row["engine"]), (0, 0))
        if found != (row["cells"], row["positive_cells"]):
            raise TableError(
                f"{path}: {found[0]} cells of {row['tile']}, {found[1]} of them positive, and "
                f"{masks.name} counts {row['cells']} and {row['positive_cells']}; {AGAIN}"
            )
    if counted:
        tile, engine = min(counted)
        raise TableError(f"{path}: cells of {tile} by {engine}, which has no mask; {AGAIN}")


def _check_names(path: Path, found: Sequence[str], expected: Sequence[str], source: str) -> None:
    """Compare the names of rows, in their order."""
    if found == expected:
        return
    own, other = collections.Counter(found), collections.Counter(expected)
    if lacking := other - own:
        raise TableError(f"{path}: no row of {next(iter(lacking))}, which {source} has; {AGAIN}")
    if added := own - other:
        raise TableError(f"{path}: a row of {next(iter(added))}, unlike {source}; {AGAIN}")
    first = next(name for name, wanted in zip(found, expected, strict=True) if name != wanted)
    raise TableError(f"{path}: {first} is in another place than in {source}; {AGAIN}")


def _restored(cls: type[OptionsT], path: Path, text: str | None) -> OptionsT:
    values = stated_options(path, text)
    return cls(**{name: value for name, value in values.items() if name != "version"})


def check_filtered(
    path: Path,
    results: Path,
    names: Sequence[str],
    pairs: Mapping[str, Pair],
    engines: Sequence[str],
) -> None:
    """Compare filter's table with the tables of tile and mask, and its decisions with its options.

    Args:
        path: filter's table.
        results: folder of results.
        names: the units.
        pairs: the pairs of the sheet by name.
        engines: the mask engines.
    """
    metadata = tables.read_metadata(path)
    inherited = {key: value for key, value in metadata.items() if key != "options"}
    check_metadata(path, inherited, cohort_rows.sources(names, results))
    options = _restored(FilterOptions, path, metadata.get("options"))
    rows = cohort_rows.filtered_rows(names, results, pairs, engines, options)
    schema = tables.filtered(engines)
    compare(path, schema, rows)


def check_index(path: Path, results: Path, pairs: Mapping[str, Pair]) -> None:
    """Compare the index with its fingerprint, with filter's table and with the splits of the sheet.

    Args:
        path: the index.
        results: folder of results.
        pairs: the pairs of the sheet by name.
    """
    metadata = tables.read_metadata(path)
    needed = {"mask_engines", "fingerprint", "versions", "options_index"}
    if lacking := needed - set(metadata):
        raise TableError(f"{path}: no metadata {', '.join(sorted(lacking))}; run index again")
    engines = tables.mask_engines(path)
    options = _restored(IndexOptions, path, metadata["options_index"])
    schema = tables.index(engines)
    filtered = layout.path(layout.FILTERED, results)
    read = tables.read(filtered, tables.filtered(engines), cohort_rows.READ)
    table = cohort_rows.divided(read, pairs, options)
    expected = cohort_rows.index_rows(filtered, engines, table, schema.names)
    compare(path, schema, expected)
    stored = metadata["fingerprint"], metadata["versions"]
    found = cohort_rows.index_metadata(filtered, engines, table, options, *stored)
    check_metadata(path, metadata, found)
    columns = [*FINGERPRINTED, *(f"{engine}_sha256" for engine in engines)]
    if fingerprint_of_parts(tables.read_parts(path, schema, columns), engines) != stored[0]:
        raise TableError(f"{path}: its rows differ from its fingerprint; delete it and run again")


def compare(path: Path, schema: pa.Schema, expected: Iterable[pa.Table]) -> None:
    """Compare the rows of a table with those that its sources give, both sorted by `tile`.

    Args:
        path: of the table.
        schema: its columns.
        expected: parts with these columns, of any number of rows.
    """
    expected = (part.select(schema.names).cast(schema) for part in expected)
    for own, other in _aligned(tables.read_parts(path, schema), expected):
        if own.equals(other):
            continue
        for name, wanted in itertools.zip_longest(
            own.column("tile").to_pylist(), other.column("tile").to_pylist()
        ):
            if name == wanted:
                continue
            if name is None or (wanted is not None and wanted < name):
                raise TableError(f"{path}: no row of {wanted}, which its sources have; {AGAIN}")
            raise TableError(f"{path}: a row of {name}, unlike its sources; {AGAIN}")
        for column in own.column_names:
            for name, value, wanted in zip(
                *(part.to_pylist() for part in (own["tile"], own[column], other[column])),
                strict=True,
            ):
                if value != wanted and (value == value or wanted == wanted):  # NaN equals NaN
                    raise TableError(
                        f"{path}: {column} of {name} is {value}, and its sources give {wanted}; "
                        f"{AGAIN}"
                    )


def _aligned(
    stored: Iterable[pa.Table], expected: Iterable[pa.Table]
) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Yield the rows of both, as many at once as a part of `expected` has; at last what remains."""
    parts = iter(stored)
    rest: pa.Table | None = None
    for other in expected:
        own = other.slice(0, 0) if rest is None else rest
        while own.num_rows < other.num_rows and (part := next(parts, None)) is not None:
            own = pa.concat_tables([own, part])
        yield own.slice(0, other.num_rows), other
        rest = own.slice(other.num_rows)
    for part in parts if rest is None else [rest, *parts]:
        yield part, part.slice(0, 0)
