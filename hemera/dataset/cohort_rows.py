"""Rows of the tables of a cohort, filter and index: for these stages, and to verify them."""

import collections
import functools
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hemera import tables
from hemera.config import FilterOptions, IndexOptions
from hemera.dataset import criteria
from hemera.dataset.ordering import sorted_parts
from hemera.dataset.splits import check_leakage, split_cases
from hemera.dataset.subsets import NETWORKS, check_subsets, draw_subset, mixed_resolutions
from hemera.errors import TableError
from hemera.files import layout
from hemera.masks import ENGINES
from hemera.masks.engine import module
from hemera.registration.verdict import PASS, REVIEW
from hemera.sheet import Pair

LICENCES = {
    "bci": "BCI: non-commercial use, cite its paper",
    "acrobat": "ACROBAT: the terms of its release",
    "mist": "MIST: its release states no terms here; ask its authors",
    "deeperhistreg": "registration by DeeperHistReg: GPL-3.0 or CC BY-SA 4.0 by its own two "
    "statements; its SuperPoint and SuperGlue weights are for non-commercial research",
}
"""Terms of use of data sets and of registration; mask engines state their own."""

READ = ("tile", "pair", "dataset", "score", "registration", "accepted", "reason", "mpp")
"""Columns that are in memory for all tiles; the others are read and written in parts."""


def sources(names: Sequence[str], results: Path) -> dict[str, str]:
    """Return the options of the stages before filter, which the tables of the units name."""
    found: dict[str, str] = {}
    for unit in names:
        # Units differ in their stages: a block is not registered.
        found = tables.inherited("tile", layout.path(layout.TILES, results, unit=unit)) | found
        found = tables.inherited("mask", layout.path(layout.MASKS, results, unit=unit)) | found
    return found


def filtered_rows(
    names: Sequence[str],
    results: Path,
    pairs: Mapping[str, Pair],
    engines: Sequence[str],
    options: FilterOptions,
) -> Iterator[pa.Table]:
    """Yield the rows of filter's table in parts: those of the units with their decisions.

    Args:
        names: the units, of which there is at least one.
        results: folder of results, with the tables of the stages tile and mask.
        pairs: the pairs of the sheet by name.
        engines: mask engines whose statistics are included, in this order.
        options: limits of the decisions.

    Raises:
        TableError: when a unit's tables of tile and mask do not list the same tiles.
    """
    paths = [layout.path(layout.TILES, results, unit=unit) for unit in names]
    ids = [tables.read(path, tables.TILE, ["tile"]).column("tile") for path in paths]
    load = functools.partial(_unit, results=results, by_name=pairs, engines=engines)
    for table in sorted_parts(ids, lambda number: load(names[number])):
        reasons = criteria.refusals(table, options.model_dump(), engines)
        none = reasons == ""
        table = table.append_column("accepted", pa.array(none))
        yield table.append_column("reason", pa.array(reasons, pa.string(), mask=none))


def _unit(
    unit: str, *, results: Path, by_name: Mapping[str, Pair], engines: Sequence[str]
) -> pa.Table:
    """Read the tiles of a unit, with its pairs' columns and its masks' statistics."""
    tile_table, pair_table, mask_table = (
        tables.read(layout.path(pattern, results, unit=unit), schema)
        for pattern, schema in (
            (layout.TILES, tables.TILE),
            (layout.PAIRS, tables.PAIRS),
            (layout.MASKS, tables.MASK),
        )
    )
    names = tile_table.column("pair").to_pylist()
    columns = (pair_table.column(name).to_pylist() for name in ("pair", "registration"))
    registration = dict(zip(*columns, strict=True))
    if unknown := {*names} - ({*registration} & {*by_name}):
        raise TableError(
            f"{unit}: tiles of {min(unknown)}, which the sheet or its table of pairs lacks; run "
            "stage tile again"
        )
    table = tile_table
    for column, values in (
        ("dataset", [by_name[name].dataset for name in names]),
        ("score", [by_name[name].score for name in names]),
        ("registration", [registration[name] for name in names]),
    ):
        table = table.append_column(column, pa.array(values, pa.string()))
    for engine in engines:
        own = mask_table.filter(pc.equal(mask_table.column("engine"), engine))
        if own.column("tile") != tile_table.column("tile"):
            raise TableError(
                f"{unit}: {own.num_rows} masks of {engine} beside {tile_table.num_rows} tiles, or "
                "in another order; run stage mask again"
            )
        for name in tables.MASK_COLUMNS:
            table = table.append_column(f"{engine}_{name}", own.column(name))
    return table


def divided(table: pa.Table, pairs: Mapping[str, Pair], options: IndexOptions) -> pa.Table:
    """Add case, split and the subsets of both networks to columns `READ` of filter's table."""
    splits = _splits(pairs.values(), options)
    cases = {name: pair.case for name, pair in pairs.items()}
    of_pairs = {name: splits[case] for name, case in cases.items()}
    names = table.column("pair")
    if unknown := {*names.unique().to_pylist()} - {*pairs}:
        raise TableError(f"tiles of {min(unknown)}, which the sheet lacks; run stage filter again")
    table = table.append_column("case", _translated(names, cases))
    table = table.append_column("split", _translated(names, of_pairs)).drop_columns("pair")
    for network in NETWORKS:
        subset = draw_subset(table, network, options)
        values = pa.array(subset, pa.string(), mask=subset == "")
        table = table.append_column(f"{network}_split", values)
    columns = ["case", *(f"{network}_split" for network in NETWORKS)]
    once = table.select(columns).group_by(columns).aggregate([])
    check_subsets(*(np.array(pc.fill_null(column, "").to_pylist(), str) for column in once))
    return table


def _translated(column: pa.ChunkedArray, values: Mapping[str, str]) -> pa.ChunkedArray:
    """Replace each text of a column that repeats few."""
    chunks = []
    for chunk in column.chunks:
        encoded = chunk.dictionary_encode()
        names = [values[name] for name in encoded.dictionary.to_pylist()]
        chunks.append(pa.array(names, pa.string()).take(encoded.indices))
    return pa.chunked_array(chunks, pa.string())


def index_rows(
    tiles: Path, engines: Sequence[str], table: pa.Table, columns: Sequence[str]
) -> Iterator[pa.Table]:
    """Yield columns of the index in parts: those of filter's table, and those `divided` added."""
    schema = tables.filtered(engines)
    added = [name for name in table.column_names if name not in schema.names]
    first = 0
    for part in tables.read_parts(tiles, schema, [name for name in columns if name not in added]):
        own = table.slice(first, part.num_rows)
        for name in added:
            part = part.append_column(name, own.column(name))
        first += part.num_rows
        yield part


def index_metadata(
    tiles: Path,
    engines: Sequence[str],
    table: pa.Table,
    options: IndexOptions,
    fingerprint: str,
    versions: str,
) -> dict[str, str]:
    """Return the metadata of the index, from those of filter's table and its divided rows."""
    inherited = tables.read_metadata(tiles)
    return {
        **{key: value for key, value in inherited.items() if key != "options"},
        "options_filter": inherited.get("options", "{}"),
        "options_index": tables.provenance(options)["options"],
        "fingerprint": fingerprint,
        "mask_engines": json.dumps(list(engines)),
        "mask_target": options.target,
        "versions": versions,
        "licences": json.dumps(_licences(table, engines)),
        "mixture": mixed_resolutions(table, options.mpp_tolerance),
    }


def _splits(pairs: Collection[Pair], options: IndexOptions) -> dict[str, str]:
    """Return the split of every case; raise LeakageError when one would be in two."""
    scores: dict[str, set[str]] = collections.defaultdict(set)
    for pair in pairs:
        scores[pair.case].add(pair.score)
    splits = split_cases(
        {
            pair.case: (pair.dataset, "/".join(sorted(scores[pair.case])), pair.split)
            for pair in pairs
        },
        seed=options.seed,
        val_fraction=options.val_fraction,
        test_fraction=options.test_fraction,
    )
    check_leakage(
        (pair.case, os.path.normpath(pair.he), os.path.normpath(pair.her2_image), splits[pair.case])
        for pair in pairs
    )
    return splits


def _licences(table: pa.Table, engines: Sequence[str]) -> list[str]:
    datasets = sorted(table.column("dataset").unique().to_pylist())
    terms = [LICENCES.get(name, "") for name in datasets]
    terms += [module(name).LICENCE for name in engines if name in ENGINES]
    if {PASS, REVIEW} & set(table.column("registration").unique().to_pylist()):
        terms.append(LICENCES["deeperhistreg"])
    return [line for line in terms if line]
