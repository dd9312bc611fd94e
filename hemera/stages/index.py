"""Write the one index of all tiles: splits, subsets of both networks, audit, fingerprint, card."""

import collections
import importlib.metadata
import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hemera import tables
from hemera.config import IndexOptions
from hemera.dataset.fingerprint import FINGERPRINTED, fingerprint_of_parts
from hemera.dataset.splits import check_leakage, split_cases
from hemera.dataset.subsets import NETWORKS, check_subsets, draw_subset, mixed_resolutions
from hemera.errors import TableError
from hemera.files.atomic import write_text
from hemera.interop.card import dataset_card
from hemera.masks import ENGINES
from hemera.masks.engine import module
from hemera.registration.verdict import PASS, REVIEW
from hemera.sheet import Pair, read_sheet

log = logging.getLogger(__name__)

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

VERSIONED = (
    "hemera",
    "deeperhistreg",
    *(package for name in ENGINES for package in module(name).PACKAGES),
    "numpy",
    "opencv-python-headless",
    "torch",
)
"""Packages whose versions the index records: those that make pixels or decide about them."""


def run(
    *,
    sheet: Path,
    tiles: Path,
    engines: tuple[str, ...],
    index: Path,
    card: Path,
    options: IndexOptions,
) -> None:
    """Add case, split and subsets to the table of stage filter; write the dataset card.

    Raises:
        TableError: when the target is not among the engines.
    """
    if options.target not in engines:
        raise TableError(
            f"index.target: {options.target} is not among the engines {', '.join(engines)}; set it "
            "to one of them"
        )
    pairs = {pair.pair: pair for pair in read_sheet(sheet).with_her2.pairs}
    table = _divided(tables.read(tiles, tables.filtered(engines), READ), pairs, options)
    mixture = mixed_resolutions(table, options.mpp_tolerance)
    schema = tables.index(engines)
    of_mark = [*FINGERPRINTED, *(f"{engine}_sha256" for engine in engines)]
    mark = fingerprint_of_parts(_parts(tiles, tables.filtered(engines), table, of_mark), engines)
    metadata = {
        **{key: value for key, value in tables.read_metadata(tiles).items() if key != "options"},
        "options_filter": tables.read_metadata(tiles).get("options", "{}"),
        "options_index": tables.provenance(options)["options"],
        "fingerprint": mark,
        "mask_engines": json.dumps(list(engines)),
        "mask_target": options.target,
        "versions": json.dumps({name: _version(name) for name in VERSIONED}),
        "licences": json.dumps(_licences(table, engines)),
        "mixture": mixture,
    }
    parts = _parts(tiles, tables.filtered(engines), table, schema.names)
    tables.write_parts(index, parts, schema, metadata)
    name = f"{options.target}_excluded_fraction"
    excluded = tables.read(tiles, tables.filtered(engines), ["accepted", name])
    excluded = excluded.filter(excluded["accepted"])[name]
    write_text(card, dataset_card(table, excluded, metadata, options))
    log.info("fingerprint %s", mark)


def _divided(table: pa.Table, pairs: Mapping[str, Pair], options: IndexOptions) -> pa.Table:
    """Add case, split and the subsets of both networks."""
    splits = _splits(pairs.values(), options)
    cases = {name: pair.case for name, pair in pairs.items()}
    of_pairs = {name: splits[case] for name, case in cases.items()}
    names = table.column("pair")
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


def _parts(
    tiles: Path, schema: pa.Schema, table: pa.Table, columns: Sequence[str]
) -> Iterator[pa.Table]:
    """Yield these columns of stage filter's table, in parts, with those that `table` adds."""
    added = [name for name in table.column_names if name not in schema.names]
    first = 0
    for part in tables.read_parts(tiles, schema, [name for name in columns if name not in added]):
        own = table.slice(first, part.num_rows)
        for name in added:
            part = part.append_column(name, own.column(name))
        first += part.num_rows
        yield part


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


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
