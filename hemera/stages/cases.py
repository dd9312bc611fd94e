"""List the cases whose HER2 status is determined: labels, H&E tiles, folds; reads no pixel."""

import collections
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hemera import tables
from hemera.config import CasesOptions
from hemera.dataset import cases as labelled
from hemera.dataset import criteria
from hemera.files import layout
from hemera.sheet import read_sheet, units

log = logging.getLogger(__name__)


def run(
    *,
    sheet: Path,
    block_count: int,
    results: Path = Path(layout.RESULTS),
    cases: Path,
    case_tiles: Path,
    options: CasesOptions,
) -> None:
    """Write the cases with their labels, and their H&E tiles.

    Args:
        sheet: the sheet of pairs.
        block_count: number of blocks into which image pairs are divided.
        results: folder of results, with the tables of the stages describe and tile.
        cases: written: table with one row per case.
        case_tiles: written: table with one row per tile.

    Raises:
        LeakageError: when two cases have the same image.
        SheetError: when the rows of a case contradict each other.
    """
    opened = read_sheet(sheet)
    of_pair = {pair.pair: pair.case for pair in opened.pairs}
    rows: list[dict[str, Any]] = []
    digests: list[tuple[str, str, str]] = []
    for unit in units(opened, block_count):
        described = tables.described(layout.path(layout.IMAGES_TABLE, results, unit=unit))
        for pair, images in described.items():
            image = images["he"]
            if image["digest"] is not None:
                digests.append((image["digest"], of_pair[pair], image["file"]))
        tiles, found = _tiles(layout.path(layout.TILES, results, unit=unit), unit, of_pair, options)
        rows += tiles
        digests += found
    labelled.check_images(digests)
    accepted = collections.Counter(row["pair"] for row in rows if row["accepted"])
    listed = labelled.build(opened.pairs, accepted, options)
    metadata = tables.provenance(options) | {"fingerprint": labelled.fingerprint(listed)}
    tables.write(cases, listed, tables.STATUS_CASES, metadata)
    tables.write(case_tiles, sorted(rows, key=lambda row: row["tile"]), tables.STATUS_TILES)
    counts = collections.Counter(row["state"] for row in listed)
    log.info("cases: %s", json.dumps(dict(sorted(counts.items()))))


def _tiles(
    path: Path, unit: str, of_pair: Mapping[str, str], options: CasesOptions
) -> tuple[list[dict[str, Any]], list[tuple[str, str, str]]]:
    """Return the rows of `tables.STATUS_TILES` of a unit, and the digests of its accepted tiles."""
    table = tables.read(path, tables.TILE)
    reasons = criteria.stain_refusals(table, options.model_dump(), "he").tolist()
    columns = [table.column(name).to_pylist() for name in ("tile", "pair", "he_sha256")]
    rows, digests = [], []
    for tile, pair, sha256, reason in zip(*columns, reasons, strict=True):
        case = of_pair[pair]
        rows.append(
            {
                "tile": tile,
                "pair": pair,
                "case": case,
                "unit": unit,
                "he_sha256": sha256,
                "accepted": not reason,
                "reason": reason or None,
            }
        )
        if not reason:
            digests.append((sha256, case, tile))
    return rows, digests
