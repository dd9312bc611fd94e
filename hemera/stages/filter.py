"""Accept or reject tiles, from tables only: reads no pixels, drops no rows."""

from __future__ import annotations

import collections
import logging
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from hemera import tables
from hemera.config import FilterOptions
from hemera.dataset import criteria
from hemera.errors import ConfigError, TableError
from hemera.sheet import Pair, read_sheet, units

log = logging.getLogger(__name__)


def run(
    *,
    sheet: Path,
    block_count: int,
    tile_folder: Path,
    mask_folder: Path,
    engines: tuple[str, ...],
    tiles: Path,
    funnel: Path,
    options: FilterOptions,
) -> None:
    """Join the tables of all units, accept or refuse every tile, count the refusals.

    Args:
        sheet: the sheet of pairs; gives data set and score.
        block_count: blocks that image pairs are cut into.
        tile_folder: folder of tile's tables ``{unit}.parquet`` and ``{unit}.pairs.parquet``.
        mask_folder: folder of mask's tables ``{unit}.parquet``.
        engines: mask engines whose statistics are included, in this order.
        tiles: table of all tiles, `tables.filtered`, sorted by tile.
        funnel: counts per data set, score and reason, `tables.FUNNEL`.
        options: thresholds.

    Raises:
        ConfigError: when agreement is required of a single engine.
        TableError: when a unit's tables of tile and mask do not list the same tiles.
    """
    if options.require_agreement is not None and len(engines) < 2:
        raise ConfigError(
            f"filter.require_agreement: {options.require_agreement} with only one engine; give two "
            "mask.engines or require_agreement: none"
        )
    pairs = read_sheet(sheet)
    by_name = {pair.pair: pair for pair in pairs.pairs}
    schema = tables.filtered(engines)
    parts = []
    sources: dict[str, str] = {}
    for unit in units(pairs, block_count):
        tile_table = tables.read(tile_folder / f"{unit}.parquet", tables.TILE)
        pair_table = tables.read(tile_folder / f"{unit}.pairs.parquet", tables.PAIRS)
        mask_table = tables.read(mask_folder / f"{unit}.parquet", tables.MASK)
        parts.append(_join(unit, tile_table, pair_table, mask_table, by_name, engines))
        for stage, folder in (("tile", tile_folder), ("mask", mask_folder)):
            # Units differ in their stages: a block is not registered.
            sources = tables.inherited(stage, folder / f"{unit}.parquet") | sources
    table = pa.concat_tables(parts).sort_by("tile")
    reasons = criteria.refusals(table, options.model_dump(), engines)
    table = table.append_column("accepted", pa.array(reasons == ""))
    table = table.append_column("reason", pa.array(reasons, pa.string(), mask=reasons == ""))
    tables.write(tiles, table, schema, {**sources, **tables.provenance(options)})
    tables.write(funnel, count(table), tables.FUNNEL)
    refused = collections.Counter(reasons.tolist())
    accepted = refused.pop("", 0)
    log.info("%d of %d tiles accepted", accepted, table.num_rows)
    for name, tile_count in refused.items():
        log.info("%s: %d tiles refused", name, tile_count)
    if not accepted:
        log.warning(
            "no tile is accepted; see the funnel in the report, and filter's thresholds in "
            "config.yaml"
        )


def count(table: pa.Table) -> pa.Table:
    """Return the rows of FUNNEL: tiles and pairs per data set, score and reason."""
    reason = pc.fill_null(table.column("reason"), criteria.ACCEPTED)
    grouped = (
        table.select(["dataset", "score", "pair"])
        .append_column("reason", reason)
        .group_by(["dataset", "score", "reason"])
        .aggregate([("pair", "count"), ("pair", "count_distinct")])
        .rename_columns({"pair_count": "tiles", "pair_count_distinct": "pairs"})
    )
    return grouped.sort_by([(name, "ascending") for name in ("dataset", "score", "reason")])


def _join(
    unit: str,
    tile_table: pa.Table,
    pair_table: pa.Table,
    mask_table: pa.Table,
    by_name: dict[str, Pair],
    engines: Sequence[str],
) -> pa.Table:
    """Add to each tile of a unit its pair's columns and its masks' statistics."""
    names = tile_table.column("pair").to_pylist()
    columns = (pair_table.column(name).to_pylist() for name in ("pair", "registration"))
    registration = dict(zip(*columns, strict=True))
    if unknown := sorted(set(names) - (by_name.keys() & registration.keys())):
        raise TableError(
            f"{unit}: its tiles name the pairs {', '.join(unknown[:5])}, which the sheet or the "
            "table of pairs lacks; run stage tile again"
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
        for name in (*tables.MASK_STATISTICS, "shard", "offset", "length", "sha256"):
            table = table.append_column(f"{engine}_{name}", own.column(name))
    return table
