"""Accept or reject tiles, from tables only: reads no pixels, drops no rows."""

import collections
import logging
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from hemera import tables
from hemera.config import FilterOptions
from hemera.dataset.cohort_rows import filtered_rows, sources
from hemera.errors import TableError
from hemera.files import layout
from hemera.sheet import read_sheet, units

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
    if not names:
        raise TableError(
            f"{sheet}: H&E alone in all rows, and the training set is of pairs; run `snakemake "
            "status`, or add HER2 images"
        )
    refused: collections.Counter[str | None] = collections.Counter()

    def counted() -> Iterator[pa.Table]:
        for table in filtered_rows(names, results, by_name, engines, options):
            refused.update(table.column("reason").to_pylist())
            yield table

    metadata = {**sources(names, results), **tables.provenance(options)}
    tables.write_parts(tiles, counted(), tables.filtered(engines), metadata)
    total, accepted = refused.total(), refused.pop(None, 0)
    log.info("%d of %d tiles accepted", accepted, total)
    for name, tile_count in refused.items():
        log.info("%s: %d tiles refused", name, tile_count)
    if not accepted:
        log.warning("no tile is accepted; see the counts in the report")
