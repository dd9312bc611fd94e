"""Write the one index of all tiles: splits, subsets of both networks, audit, fingerprint, card."""

import importlib.metadata
import json
import logging
from pathlib import Path

from hemera import tables
from hemera.config import IndexOptions
from hemera.dataset.cohort_rows import READ, divided, index_metadata, index_rows
from hemera.dataset.fingerprint import FINGERPRINTED, fingerprint_of_parts
from hemera.errors import TableError
from hemera.files.atomic import write_text
from hemera.interop.card import card_of_index
from hemera.masks import ENGINES
from hemera.masks.engine import module
from hemera.sheet import read_sheet

log = logging.getLogger(__name__)

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
    table = divided(tables.read(tiles, tables.filtered(engines), READ), pairs, options)
    of_mark = [*FINGERPRINTED, *(f"{engine}_sha256" for engine in engines)]
    mark = fingerprint_of_parts(index_rows(tiles, engines, table, of_mark), engines)
    versions = json.dumps({name: _version(name) for name in VERSIONED})
    metadata = index_metadata(tiles, engines, table, options, mark, versions)
    schema = tables.index(engines)
    parts = index_rows(tiles, engines, table, schema.names)
    tables.write_parts(index, parts, schema, metadata)
    write_text(card, card_of_index(index))
    log.info("fingerprint %s", mark)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
