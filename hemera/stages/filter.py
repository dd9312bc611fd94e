"""Accept or reject tiles, from tables only: reads no pixels, drops no rows."""

import collections
import logging
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from hemera import tables
from hemera.config import FilterOptions
from hemera.dataset import criteria
from hemera.errors import TableError
from hemera.files import layout
from hemera.sheet import Pair, read_sheet, units

log = logging.getLogger(__name__)


def run(
    *,
    sheet: Path,
    block_count: int,
    results: Path = Path(layout.RESULTS),
    engines: tuple[str, ...],
    tiles: Path,
    options: FilterOptions,
) -> None:
    """Accept or reject every tile.

    Args:
        sheet: the sheet of pairs.
        block_count: number of blocks into which image pairs are divided.
        results: folder of results, with the tables of the stages tile and mask.
        engines: mask engines whose statistics are included, in this order.
        tiles: written: table of all tiles, with the decision and its reason.

    Raises:
        TableError: when a unit's tables of tile and mask do not list the same tiles.
    """
    opened = read_sheet(sheet)
    by_name = {pair.pair: pair for pair in opened.pairs}
    parts = []
    sources: dict[str, str] = {}
    for unit in units(opened, block_count):
        tile_path, pair_path, mask_path = (
            layout.path(pattern, results, unit=unit)
            for pattern in (layout.TILES, layout.PAIRS, layout.MASKS)
        )
        tile_table = tables.read(tile_path, tables.TILE)
        pair_table = tables.read(pair_path, tables.PAIRS)
        mask_table = tables.read(mask_path, tables.MASK)
        parts.append(_join(unit, tile_table, pair_table, mask_table, by_name, engines))
        # Units differ in their stages: a block is not registered.
        sources = tables.inherited("tile", tile_path) | sources
        sources = tables.inherited("mask", mask_path) | sources
    table = pa.concat_tables(parts).sort_by("tile")
    reasons = criteria.refusals(table, options.model_dump(), engines)
    table = table.append_column("accepted", pa.array(reasons == ""))
    table = table.append_column("reason", pa.array(reasons, pa.string(), mask=reasons == ""))
    tables.write(tiles, table, tables.filtered(engines), {**sources, **tables.provenance(options)})
    refused = collections.Counter(reasons.tolist())
    accepted = refused.pop("", 0)
    log.info("%d of %d tiles accepted", accepted, table.num_rows)
    for name, tile_count in refused.items():
        log.info("%s: %d tiles refused", name, tile_count)
    if not accepted:
        log.warning("no tile is accepted; see the counts in the report")


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
