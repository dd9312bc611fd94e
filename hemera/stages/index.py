"""Write the one index of all tiles: splits, subsets of both networks, audit, fingerprint, card."""

from __future__ import annotations

import collections
import importlib.metadata
import json
import logging
import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hemera import tables
from hemera.config import IndexOptions
from hemera.dataset.card import NETWORKS, dataset_card
from hemera.dataset.fingerprint import fingerprint
from hemera.dataset.splits import check_leakage, draw, split_cases
from hemera.errors import ConfigError, LeakageError, TableError
from hemera.io.atomic import write_text
from hemera.masks import ENGINES
from hemera.masks.engine import module
from hemera.sheet import SPLITS, Pair, read_sheet

log = logging.getLogger(__name__)

LICENCES = {
    "bci": "BCI: non-commercial use, cite its paper",
    "acrobat": "ACROBAT: the terms of its release",
    "mist": "MIST: its release states no terms here; ask its authors",
    "deeperhistreg": "registration by DeeperHistReg: GPL-3.0 or CC BY-SA 4.0 by its own two "
    "statements; its SuperPoint and SuperGlue weights are for non-commercial research",
}
"""Terms of use of data sets and of registration; mask engines state their own."""

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
    """Add case, split and subsets to filter's table; never fails on zero accepted tiles.

    Args:
        sheet: the sheet of pairs; gives case and split.
        tiles: filter's table of all tiles.
        engines: mask engines in that table.
        index: the index, `tables.index`, with its metadata.
        card: the dataset card, Markdown.
        options: seeds and sizes.

    Raises:
        LeakageError: when a case or a source image would be in two splits, or a test source of
            SegmentationNet is a training source of GenerationNet.
        TableError: when resolutions are mixed and that is not allowed, or the table names pairs
            that the sheet lacks.
        ConfigError: when `options.target` is none of `engines`.
    """
    if options.target not in engines:
        raise ConfigError(
            f"index.target: {options.target} is not among the engines; choose from "
            f"{', '.join(engines)}"
        )
    pairs = {pair.pair: pair for pair in read_sheet(sheet).pairs}
    table = tables.read(tiles, tables.filtered(engines))
    splits = _splits(pairs.values(), options)
    unknown = sorted(set(table.column("pair").unique().to_pylist()) - set(pairs))
    if unknown:
        raise TableError(
            f"{tiles}: its tiles name the pairs {', '.join(unknown[:5])}, which the sheet lacks; "
            "run stage filter again"
        )
    cases = [pairs[name].case for name in table.column("pair").to_pylist()]
    table = table.append_column("case", pa.array(cases, pa.string()))
    split = np.array([splits[case] for case in cases], dtype="U5")
    table = table.append_column("split", pa.array(split, pa.string()))
    for network in NETWORKS:
        subset = _subset(table, split, network, options)
        table = table.append_column(
            f"{network}_split", pa.array(subset, pa.string(), mask=subset == "")
        )
    _check_networks(table)
    mixture = _mixture(table, options)
    mark = fingerprint(table, engines)
    metadata = {
        **{key: value for key, value in tables.read_metadata(tiles).items() if key != "options"},
        "options_filter": tables.read_metadata(tiles).get("options", "{}"),
        "options_index": tables.provenance(options)["options"],
        "fingerprint": mark,
        "mask_engines": json.dumps(list(engines)),
        "mask_target": options.target,
        "versions": json.dumps({name: _version(name) for name in VERSIONED}),
        "licences": json.dumps(_licences(table, engines)),
        "mixture": mixture or "",
    }
    tables.write(index, table, tables.index(engines), metadata)
    write_text(card, dataset_card(table, metadata, options))
    log.info("fingerprint %s", mark)


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
        (pair.case, os.path.normpath(pair.he), os.path.normpath(pair.her2), splits[pair.case])
        for pair in pairs
    )
    return splits


def _subset(
    table: pa.Table, split: npt.NDArray[np.str_], network: str, options: IndexOptions
) -> npt.NDArray[np.str_]:
    """Draw a network's tiles of each split; an empty text for a tile it does not use."""
    accepted = table.column("accepted").to_numpy(zero_copy_only=False)
    names = np.array(table.column("tile").to_pylist(), dtype=object)
    datasets = np.array(table.column("dataset").to_pylist(), dtype=str)
    result = np.full(table.num_rows, "", dtype="U5")
    train_on: tuple[str, ...] = getattr(options, f"{network}_datasets")
    shares_given: tuple[float, ...] = getattr(options, f"{network}_shares")
    for wanted_split in SPLITS:
        wanted = train_on
        shares = dict(zip(train_on, shares_given, strict=True)) if shares_given else None
        if network == "generation" and wanted_split == "test":
            wanted, shares = options.generation_test_datasets, None
        pool = accepted & (split == wanted_split)
        if wanted:
            pool &= np.isin(datasets, wanted)
            absent = sorted(set(wanted) - set(datasets))
            if absent:
                key = "test_datasets" if wanted is not train_on else "datasets"
                log.warning(
                    "%s %s: no tile is of %s; index.%s_%s names it",
                    network,
                    wanted_split,
                    ", ".join(absent),
                    network,
                    key,
                )
        places = np.flatnonzero(pool)
        count: int | None = getattr(options, f"{network}_{wanted_split}")
        chosen = draw(
            names[places].tolist(),
            datasets[places].tolist(),
            count,
            seed=options.seed,
            purpose=f"{network}/{wanted_split}",
            shares=shares,
        )
        result[places[chosen]] = wanted_split
        drawn = int(np.count_nonzero(chosen))
        if count is not None and drawn < count:
            log.warning(
                "%s %s: %d of %d requested tiles; the accepted tiles allow no more",
                network,
                wanted_split,
                drawn,
                count,
            )
    return result


def _check_networks(table: pa.Table) -> None:
    """Check that no test source of SegmentationNet was seen by GenerationNet."""
    seen = table.filter(
        pc.is_in(table.column("generation_split"), value_set=pa.array(["train", "val"]))
    )
    tested = table.filter(pc.equal(table.column("segmentation_split"), "test"))
    both = set(seen.column("case").to_pylist()) & set(tested.column("case").to_pylist())
    if both:
        raise LeakageError(
            f"case {min(both)}: GenerationNet saw it and SegmentationNet is tested on it; this is "
            "a fault of the draw, report it"
        )


def _mixture(table: pa.Table, options: IndexOptions) -> str | None:
    """Return a warning when accepted tiles differ in resolution."""
    accepted = table.select(["dataset", "mpp"]).filter(table.column("accepted"))
    if not accepted.num_rows:
        return None
    spans = {
        dataset: pc.min_max(
            accepted.filter(pc.equal(accepted.column("dataset"), dataset)).column("mpp")
        )
        for dataset in sorted(set(accepted.column("dataset").to_pylist()))
    }
    low = min(span["min"].as_py() for span in spans.values())
    high = max(span["max"].as_py() for span in spans.values())
    if high <= low * (1 + options.mpp_tolerance):
        return None
    ends = {
        dataset: dict.fromkeys(f"{span[end].as_py():.3g}" for end in ("min", "max"))
        for dataset, span in spans.items()
    }
    words = ", ".join(f"{dataset} {' to '.join(mpp)}" for dataset, mpp in ends.items())
    fact = f"tiles of different resolution are mixed ({words} um/px): a network sees two scales"
    if not options.allow_mixed_mpp:
        raise TableError(
            f"index.allow_mixed_mpp: {fact}, and mixing is not allowed; set tile.mpp to "
            f"{math.ceil(high * 1000) / 1000:g} or coarser, or allow_mixed_mpp: true"
        )
    log.warning("%s; tile.mpp sets one for all", fact)
    return fact


def _licences(table: pa.Table, engines: Sequence[str]) -> list[str]:
    terms = [LICENCES.get(name, "") for name in sorted(set(table.column("dataset").to_pylist()))]
    terms += [module(name).LICENCE for name in engines if name in ENGINES]
    if pc.any(
        pc.is_in(table.column("registration"), value_set=pa.array(["pass", "review"]))
    ).as_py():
        terms.append(LICENCES["deeperhistreg"])
    return [line for line in terms if line]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
