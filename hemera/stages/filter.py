"""Accept or reject tiles, from tables only: reads no pixels, drops no rows."""

import collections
import functools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from hemera import tables
from hemera.config import FilterOptions
from hemera.dataset import criteria
from hemera.dataset.ordering import sorted_parts
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
    opened = read_sheet(sheet).with_her2
    by_name = {pair.pair: pair for pair in opened.pairs}
    names = list(units(opened, block_count))
    ids = []
    sources: dict[str, str] = {}
    for unit in names:
        tile_path = layout.path(layout.TILES, results, unit=unit)
        ids.append(tables.read(tile_path, tables.TILE, ["tile"]).column("tile"))
        # Units differ in their stages: a block is not registered.
        sources = tables.inherited("tile", tile_path) | sources
        mask_path = layout.path(layout.MASKS, results, unit=unit)
        sources = tables.inherited("mask", mask_path) | sources
    if not names:
        raise TableError(
            f"{sheet}: H&E alone in all rows, and the training set is of pairs; run `snakemake "
            "status`, or add HER2 images"
        )
    refused: collections.Counter[str] = collections.Counter()

    def decided() -> Iterator[pa.Table]:
        load = functools.partial(_unit, results=results, by_name=by_name, engines=engines)
        for table in sorted_parts(ids, lambda number: load(names[number])):
            reasons = criteria.refusals(table, options.model_dump(), engines)
            refused.update(reasons.tolist())
            table = table.append_column("accepted", pa.array(reasons == ""))
            none = reasons == ""
            yield table.append_column("reason", pa.array(reasons, pa.string(), mask=none))

    metadata = {**sources, **tables.provenance(options)}
    tables.write_parts(tiles, decided(), tables.filtered(engines), metadata)
    total, accepted = refused.total(), refused.pop("", 0)
    log.info("%d of %d tiles accepted", accepted, total)
    for name, tile_count in refused.items():
        log.info("%s: %d tiles refused", name, tile_count)
    if not accepted:
        log.warning("no tile is accepted; see the counts in the report")


def _unit(
    unit: str, *, results: Path, by_name: dict[str, Pair], engines: Sequence[str]
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
