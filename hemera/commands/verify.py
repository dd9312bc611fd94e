"""Verify that results are what their stages wrote, from the slides to the weights."""

import collections
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hemera.config import load_file
from hemera.errors import ConfigError, HemeraError, ShardError, TableError
from hemera.files import layout
from hemera.sheet import Pair, read_sheet, units


def verify(
    results: Path = Path(layout.RESULTS),
    *,
    configfile: Path = Path("config.yaml"),
    only_tables: bool = False,
) -> int:
    """Compare results with the digests that their stages stored; return 1 if anything differs.

    Images are compared with their description, displacements and tables with their checksums, tiles
    and masks with their digests, the index with the tables of its tiles and with its fingerprint,
    and weights with their metadata. The first difference of each file is printed. What has not been
    made yet is left out.

    Args:
        results: the folder of results.
        configfile: the configuration, which names the sheet.
        only_tables: neither read the images of the sheet nor the shards: seconds, not minutes.
    """
    if not results.is_dir():
        raise ConfigError(f"{results}: no such folder; give the folder of results")
    cohort = load_file(configfile).cohort
    found = units(read_sheet(Path(cohort.sheet)), cohort.block_count)
    checks = list(_checks(results, found, only_tables))
    count = 0
    for check in tqdm(checks, "verify", unit="file", disable=None, leave=False):
        try:
            check()
        except (HemeraError, OSError) as error:
            count += 1
            sys.stdout.write(f"{error}\n")
    sys.stdout.write(f"{results}: {len(checks)} files compared, {count or 'none'} differ\n")
    return int(count > 0)


def _checks(
    results: Path, found: dict[str, tuple[Pair, ...]], only_tables: bool
) -> Iterator[Callable[[], object]]:
    """Yield a function for each file that exists, in the order of the graph."""
    from hemera import tables
    from hemera.networks.storage import load_generation, load_segmentation
    from hemera.registration.displacement_files import read_displacement

    for unit, pairs in found.items():
        at = functools.partial(layout.path, results=results, unit=unit)
        per_file: list[tuple[str, Callable[[Path], object]]] = [
            (layout.IMAGES_TABLE, functools.partial(_images, pairs=() if only_tables else pairs)),
            (layout.DISPLACEMENT, read_displacement),
            (layout.CERTIFICATE, functools.partial(tables.read, schema=tables.CERTIFICATE)),
            (layout.QUALITY, functools.partial(tables.read, schema=tables.QUALITY)),
            (layout.PAIRS, functools.partial(tables.read, schema=tables.PAIRS)),
            (layout.TILES, functools.partial(_members, tables.TILE, ("he_", "her2_"), only_tables)),
            (layout.MASKS, functools.partial(_members, tables.MASK, ("",), only_tables)),
            (layout.CELLS, functools.partial(tables.read, schema=tables.CELLS)),
            (layout.LANDMARK_ERRORS, functools.partial(tables.read, schema=tables.LANDMARKS)),
        ]
        for pattern, check in per_file:
            if at(pattern).exists():
                yield functools.partial(check, at(pattern))
    for pattern, schema in (
        (layout.LANDMARK_COHORT, tables.LANDMARKS_COHORT),
        (layout.CASES, tables.STAINING),
        (layout.SEGMENTATION_HISTORY, tables.HISTORY),
        (layout.EVALUATED_TILES, tables.EVALUATION_TILES),
        (layout.METRICS, tables.METRICS),
    ):
        path = layout.path(pattern, results)
        if path.exists():
            yield functools.partial(tables.read, path, schema)
    yield from _status(results)
    if layout.path(layout.INDEX, results).exists():
        yield functools.partial(_index, results, list(found))
    generators = str(layout.path(layout.GENERATOR, Path(), generator="*"))
    for weights in sorted(results.glob(generators)):
        yield functools.partial(load_generation, weights, weights.with_name("metadata.json"))
        history = weights.with_name(Path(layout.GENERATION_HISTORY).name)
        if history.exists():
            yield functools.partial(tables.read, history, tables.HISTORY)
    segmenter = layout.path(layout.SEGMENTER, results)
    if segmenter.exists():
        metadata = layout.path(layout.SEGMENTER_METADATA, results)
        yield functools.partial(load_segmentation, segmenter, metadata)


def _status(results: Path) -> Iterator[Callable[[], object]]:
    """Yield a function for each file of the stages of the HER2 status."""
    from hemera import tables
    from hemera.networks.storage import check_digest, read_metadata

    patterns = (
        (layout.STATUS_CASES, tables.STATUS_CASES),
        (layout.STATUS_TILES, tables.STATUS_TILES),
        (layout.ENCODER_HISTORY, tables.HISTORY),
        (layout.AGGREGATOR_HISTORY, tables.HISTORY),
        (layout.STATUS_PREDICTIONS, tables.STATUS_PREDICTIONS),
        (layout.CONTRIBUTIONS, tables.CONTRIBUTIONS),
        (layout.STATUS_METRICS, tables.STATUS_METRICS),
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


def _images(table: Path, pairs: tuple[Pair, ...]) -> None:
    """Compare the images of pairs with their description."""
    from hemera import tables
    from hemera.files.digests import check_content

    described = tables.described(table)
    for pair in pairs:
        for stain, path in zip(tables.STAINS, pair.images, strict=False):
            row = described[pair.pair].get(stain)
            if row is None:
                raise TableError(f"{table}: no row of {pair.pair}, {stain}; run the workflow again")
            if row["content_digest"] is not None:
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


def _index(results: Path, names: list[str]) -> None:
    """Compare the index with its fingerprint and with the tables of its tiles and masks."""
    from hemera import tables
    from hemera.dataset.fingerprint import fingerprint

    index = layout.path(layout.INDEX, results)
    metadata = tables.read_metadata(index)
    if lacking := {"mask_engines", "fingerprint"} - set(metadata):
        raise TableError(f"{index}: no metadata {', '.join(sorted(lacking))}; run index again")
    engines = json.loads(metadata["mask_engines"])
    table = tables.read(index, tables.index(engines))
    filtered = layout.path(layout.FILTERED, results)
    if filtered.exists():
        tables.read(filtered, tables.filtered(engines))
    if fingerprint(table, engines) != metadata["fingerprint"]:
        raise TableError(f"{index}: its rows differ from its fingerprint; delete it and run again")
    stored: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for unit in names:
        tiles, masks = (
            layout.path(pattern, results, unit=unit) for pattern in (layout.TILES, layout.MASKS)
        )
        columns = ["tile", "he_sha256", "her2_sha256"]
        for row in tables.read(tiles, tables.TILE, columns).to_pylist() if tiles.exists() else ():
            stored[row.pop("tile")] |= row
        columns = ["tile", "engine", "sha256"]
        for row in tables.read(masks, tables.MASK, columns).to_pylist() if masks.exists() else ():
            stored[row["tile"]][f"{row['engine']}_sha256"] = row["sha256"]
    digests = ["he_sha256", "her2_sha256", *(f"{engine}_sha256" for engine in engines)]
    for row in table.select(["tile", *digests]).to_pylist():
        name = row.pop("tile")
        for column, digest in row.items():
            if stored[name].get(column) != digest:
                raise TableError(
                    f"{index}: {column} of {name} is not that of its tile or mask; run index again"
                )
