"""Verify that results are what their stages wrote, from the slides to the weights."""

import functools
import itertools
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hemera.config import (
    CasesOptions,
    Config,
    DescribeOptions,
    EvaluateOptions,
    EvaluateStatusOptions,
    FilterOptions,
    IndexOptions,
    LandmarksOptions,
    MaskOptions,
    RegisterOptions,
    TileOptions,
    TrainSegmentationOptions,
    load_file,
)
from hemera.config.base import Options
from hemera.errors import ConfigError, HemeraError, ShardError, TableError
from hemera.files import layout
from hemera.sheet import Pair, read_sheet, units


def verify(
    results: Path = Path(layout.RESULTS),
    *,
    configfile: Path = Path("config.yaml"),
    only_tables: bool = False,
) -> int:
    """Compare results with what they were made from; return 1 if anything differs.

    Images are compared with their description, tiles and masks with their digests; positions of
    tiles with the displacement, the tables of masks and cells with those of tiles, filter's table
    with them and its decisions with its options, the index with filter's table and its splits with
    the sheet, the dataset card with the index; weights with their digests and the index; and the
    options that each result was made with, with the configuration. The first difference of each
    comparison is printed. What has not been made yet is left out.

    Args:
        results: the folder of results.
        configfile: the configuration, which names the sheet.
        only_tables: neither read the images of the sheet nor the shards: seconds, not minutes.
    """
    if not results.is_dir():
        raise ConfigError(
            f"{results}: no such folder; work in the folder of a study, or give its results"
        )
    checks = list(_checks(results, load_file(configfile), only_tables))
    count = 0
    # Rows of the index are computed again, and warnings about them are in the log of its stage.
    logging.disable(logging.WARNING)
    try:
        for check in tqdm(checks, "verify", unit="comparison", disable=None, leave=False):
            try:
                check()
            except (HemeraError, OSError) as error:
                count += 1
                sys.stdout.write(f"{error}\n")
    finally:
        logging.disable(logging.NOTSET)
    sys.stdout.write(f"{results}: {len(checks)} comparisons, {count or 'none'} differ\n")
    return int(count > 0)


def _checks(results: Path, config: Config, only_tables: bool) -> Iterator[Callable[[], object]]:
    """Yield a function for each file that exists, in the order of the graph."""
    from hemera.dataset import verification

    cohort = config.cohort
    sheet = read_sheet(Path(cohort.sheet))
    engines = tuple(config.options(MaskOptions).engines)
    for unit, pairs in units(sheet, cohort.block_count).items():
        yield from _unit(results, unit, pairs, config, only_tables)
    with_her2 = sheet.with_her2
    names = list(units(with_her2, cohort.block_count))
    by_name = {pair.pair: pair for pair in with_her2.pairs}
    filtered, index, card = (
        layout.path(pattern, results) for pattern in (layout.FILTERED, layout.INDEX, layout.CARD)
    )
    if filtered.exists():
        yield _options(filtered, "options", config.options(FilterOptions))
        yield functools.partial(
            verification.check_filtered, filtered, results, names, by_name, engines
        )
    if index.exists():
        yield _options(index, "options_index", config.options(IndexOptions))
        yield functools.partial(verification.check_index, index, results, by_name)
    if card.exists():
        yield functools.partial(_card, card, index)
    yield from _cohort(results, config)
    yield from _networks(results, index, config)
    yield from _status(results)


def _unit(
    results: Path, unit: str, pairs: tuple[Pair, ...], config: Config, only_tables: bool
) -> Iterator[Callable[[], object]]:
    """Yield a function for each file of a unit."""
    from hemera import tables
    from hemera.dataset import verification
    from hemera.registration.displacement_files import read_displacement

    at = functools.partial(layout.path, results=results, unit=unit)
    images, tiles, masks = at(layout.IMAGES_TABLE), at(layout.TILES), at(layout.MASKS)
    virtual, virtual_masks = at(layout.VIRTUAL_TILES), at(layout.VIRTUAL_MASKS)
    displacement, engines = at(layout.DISPLACEMENT), tuple(config.options(MaskOptions).engines)
    made_with: dict[Path, type[Options]] = {
        images: DescribeOptions,
        at(layout.CERTIFICATE): RegisterOptions,
        at(layout.QUALITY): RegisterOptions,
        tiles: TileOptions,
        at(layout.PAIRS): TileOptions,
        masks: MaskOptions,
        at(layout.LANDMARK_ERRORS): LandmarksOptions,
    }
    checks: list[tuple[Path, Callable[[Path], object]]] = [
        (images, functools.partial(_images, pairs, only_tables)),
        (displacement, read_displacement),
        (at(layout.CERTIFICATE), functools.partial(tables.read, schema=tables.CERTIFICATE)),
        (at(layout.QUALITY), functools.partial(tables.read, schema=tables.QUALITY)),
        (at(layout.PAIRS), lambda path: verification.check_pairs(path, pairs, tiles)),
        (tiles, functools.partial(_members, tables.TILE, ("he_", "her2_"), only_tables)),
        (masks, functools.partial(_members, tables.MASK, ("",), only_tables)),
        (masks, lambda path: verification.check_masks(path, tiles, engines)),
        (at(layout.CELLS), lambda path: verification.check_cells(path, masks)),
        (at(layout.LANDMARK_ERRORS), functools.partial(tables.read, schema=tables.LANDMARKS)),
        (virtual, functools.partial(_members, tables.TILE, ("he_", "her2_"), only_tables)),
        (virtual_masks, functools.partial(_members, tables.MASK, ("",), only_tables)),
        (virtual_masks, lambda path: verification.check_masks(path, virtual, engines)),
        (at(layout.VIRTUAL_CELLS), lambda path: verification.check_cells(path, virtual_masks)),
    ]
    if displacement.exists():
        checks.append((tiles, lambda path: verification.check_positions(path, displacement)))
    for path, check in checks:
        if path.exists():
            yield functools.partial(check, path)
    for path, cls in made_with.items():
        if path.exists():
            yield _options(path, "options", config.stages[cls.section])
    for path in (tiles, at(layout.PAIRS)):
        if path.exists():
            yield functools.partial(_inherited, path, images, at(layout.CERTIFICATE))


def _options(path: Path, key: str, options: Options) -> Callable[[], object]:
    """Return a function that compares the options in a table with the configuration."""
    from hemera import tables
    from hemera.dataset.verification import check_options

    return lambda: check_options(path, tables.read_metadata(path).get(key), options)


def _inherited(path: Path, images: Path, certificate: Path) -> None:
    """Compare the options of the stages before tile in its table with those in their tables."""
    from hemera import tables
    from hemera.dataset.verification import check_metadata

    metadata = tables.read_metadata(path)
    expected = tables.inherited("describe", images)
    if certificate.exists():
        expected |= tables.inherited("register", certificate)
    check_metadata(path, {key: metadata[key] for key in metadata if key != "options"}, expected)


def _card(card: Path, index: Path) -> None:
    """Compare the dataset card with the one that the index gives."""
    from hemera.interop.card import card_of_index

    expected, found = card_of_index(index).splitlines(), card.read_text().splitlines()
    for line, other in itertools.zip_longest(found, expected):
        if line != other:
            raise TableError(
                f"{card}: has {line or 'no line'!r}, and the index gives {other or 'no line'!r}; "
                "delete it and run the workflow again"
            )


def _cohort(results: Path, config: Config) -> Iterator[Callable[[], object]]:
    """Yield a function for each other table of the cohort."""
    from hemera import tables

    for pattern, schema, cls in (
        (layout.LANDMARK_COHORT, tables.LANDMARKS_COHORT, LandmarksOptions),
        (layout.CASES, tables.STAINING, None),
        (layout.SEGMENTATION_HISTORY, tables.HISTORY, None),
        (layout.EVALUATED_TILES, tables.EVALUATION_TILES, EvaluateOptions),
        (layout.METRICS, tables.METRICS, EvaluateOptions),
        (layout.STATUS_CASES, tables.STATUS_CASES, CasesOptions),
        (layout.STATUS_TILES, tables.STATUS_TILES, None),
        (layout.STATUS_METRICS, tables.STATUS_METRICS, EvaluateStatusOptions),
    ):
        path = layout.path(pattern, results)
        if path.exists():
            yield functools.partial(tables.read, path, schema)
            if cls is not None:
                yield _options(path, "options", config.stages[cls.section])


def _networks(results: Path, index: Path, config: Config) -> Iterator[Callable[[], object]]:
    """Yield a function for each file of the networks of the two trainings."""
    from hemera import tables
    from hemera.networks.storage import load_generation, load_segmentation

    generators = str(layout.path(layout.GENERATOR, Path(), generator="*"))
    for weights in sorted(results.glob(generators)):
        metadata = weights.with_name("metadata.json")
        yield functools.partial(load_generation, weights, metadata)
        if weights.parent.name in config.generators:
            options = config.generator(weights.parent.name)
            yield functools.partial(_training, metadata, "generation", index, options)
        history = weights.with_name(Path(layout.GENERATION_HISTORY).name)
        if history.exists():
            yield functools.partial(tables.read, history, tables.HISTORY)
    segmenter = layout.path(layout.SEGMENTER, results)
    if segmenter.exists():
        metadata = layout.path(layout.SEGMENTER_METADATA, results)
        yield functools.partial(load_segmentation, segmenter, metadata)
        own = config.options(TrainSegmentationOptions)
        yield functools.partial(_training, metadata, "segmentation", index, own)


def _training(metadata: Path, network: str, index: Path, options: Options) -> None:
    """Compare what a network was trained on and with, with the index and the configuration."""
    from hemera.dataset.index import TileIndex
    from hemera.dataset.verification import check_options
    from hemera.networks.storage import check_index, read_metadata

    described = read_metadata(metadata, network)
    made_with = {**described.get("options", {}), "version": described.get("options_version")}
    check_options(metadata, json.dumps(made_with), options)
    check_index(str(metadata), described, TileIndex(index).fingerprint)


def _status(results: Path) -> Iterator[Callable[[], object]]:
    """Yield a function for each file of the stages of the HER2 status."""
    from hemera import tables
    from hemera.networks.storage import check_digest, read_metadata

    patterns = (
        (layout.ENCODER_HISTORY, tables.HISTORY),
        (layout.AGGREGATOR_HISTORY, tables.HISTORY),
        (layout.STATUS_PREDICTIONS, tables.STATUS_PREDICTIONS),
        (layout.CONTRIBUTIONS, tables.CONTRIBUTIONS),
    )
    for pattern, schema in patterns:
        for path in sorted(
            results.glob(str(layout.path(pattern, Path(), method="*", network="*")))
        ):
            yield functools.partial(tables.read, path, schema)
    features = sorted(
        results.glob(str(layout.path(layout.FEATURES, Path(), encoder="*", unit="*")))
    )
    if features:
        from hemera.dataset.features import check_features

        yield from (functools.partial(check_features, path) for path in features)

    def check_weights(weights: Path, network: str) -> None:
        described = read_metadata(weights.with_name("metadata.json"), network)
        check_digest(weights, described)

    for weights in sorted(results.glob(str(layout.path(layout.ENCODER, Path(), network="*")))):
        yield functools.partial(check_weights, weights, weights.parent.name)
    for weights in sorted(results.glob(str(layout.path(layout.AGGREGATOR, Path(), method="*")))):
        yield functools.partial(check_weights, weights, "aggregate")


def _images(pairs: tuple[Pair, ...], only_tables: bool, table: Path) -> None:
    """Compare the table of images with the pairs of the sheet, and the images with it."""
    from hemera import tables
    from hemera.files.digests import check_content

    described = tables.described(table)
    for pair in pairs:
        for stain, path in zip(tables.STAINS, pair.images, strict=False):
            row = described[pair.pair].get(stain)
            if row is None:
                raise TableError(f"{table}: no row of {pair.pair}, {stain}; run the workflow again")
            if row["content_digest"] is not None and not only_tables:
                check_content(path, row["content_digest"])


def _members(schema: Any, prefixes: tuple[str, ...], only_tables: bool, table: Path) -> None:
    """Compare the bytes that a table of tiles or masks locates with their digests."""
    from hemera import tables
    from hemera.dataset.shards import ShardReader, member_offsets

    parts = ("offset", "length", "sha256")
    rows = tables.read(table, schema).to_pylist()
    reader = ShardReader(table.parent.parent)
    headers: dict[str, set[int]] = {}
    for row in () if only_tables else rows:
        if row["shard"] not in headers:
            headers[row["shard"]] = member_offsets(table.parent.parent / row["shard"])
        for prefix in prefixes:
            offset, length, sha256 = (row[f"{prefix}{part}"] for part in parts)
            if offset is None:  # H&E alone
                continue
            if offset not in headers[row["shard"]]:
                raise ShardError(
                    f"{row['shard']}: no member begins at byte {offset}, its headers are damaged; "
                    "delete it and run again"
                )
            reader.read(row["shard"], offset, length, bytes.fromhex(sha256))
