"""Galleries of tiles: pictures and measurements of accepted, rejected and disputed tiles."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hemera.dataset import statistics
from hemera.dataset.criteria import CRITERIA, MEASURES, REASONS
from hemera.dataset.statistics import Frame
from hemera.reports import artefacts, pictures
from hemera.reports.data import Cohort

GALLERY_BYTES = 8_000_000
DISPUTED_BYTES = 1_500_000
"""With the registrations and the tables, which have limits as well, a page is below 30 MB."""
DISPUTED_TILES = 6
SIDE_PX = 400
GALLERY_SEED = 20251
MASK_MEASURES = ("cells", "positive_cells", "positive_fraction")

Read = Callable[[Mapping[str, Any], str], npt.NDArray[np.uint8]]
"""Returns an image of a tile (a row of the index): `he` or `her2`, or the mask of an engine."""


def accepted(cohort: Cohort, read: Read, count: int) -> dict[str, Any]:
    """Return cards of accepted tiles, data sets and scores in turn."""
    tiles = cohort.accepted
    return _cards(cohort, tiles, tiles["dataset"] + "/" + tiles["score"], read, count)


def rejected(cohort: Cohort, read: Read, count: int) -> dict[str, Any]:
    """Return cards of rejected tiles, reasons in turn, with the number of tiles by reason."""
    tiles = cohort.tiles[~cohort.tiles["accepted"]]
    totals = tiles["reason"].value_counts()
    found = _cards(cohort, tiles, tiles["reason"], read, count)
    return {**found, "totals": {name: totals[name] for name in REASONS if name in totals}}


def _cards(cohort: Cohort, tiles: Frame, groups: Frame, read: Read, count: int) -> dict[str, Any]:
    """Return `drawn`, the number of tiles drawn, and `cards` of those that fit on the page."""
    chosen = statistics.sample(groups.tolist(), tiles["tile"].tolist(), count, GALLERY_SEED)
    album = pictures.Album(GALLERY_BYTES)
    limits, target = cohort.options("filter"), cohort.target
    cards: list[dict[str, Any]] = []
    for row in tiles.iloc[chosen].to_dict("records"):
        he, her2 = read(row, "he"), read(row, "her2")
        images = {
            "H&E": artefacts.marked_tile(he, row, "he"),
            "HER2": artefacts.marked_tile(her2, row, "her2"),
        }
        if isinstance(row[f"{target}_shard"], str):
            images["HER2 with mask"] = pictures.outlined(her2, read(row, target))
        uris = album.take(images, SIDE_PX)
        if not uris:
            break
        mask = {name: row[f"{target}_{name}"] for name in MASK_MEASURES}
        found = {"deciding": deciding(row, limits), "measures": artefacts.measures(row, limits)}
        cards.append({**row, "images": uris, "mask": mask, **found})
    return {"cards": cards, "drawn": len(chosen)}


def deciding(row: Mapping[str, Any], limits: Mapping[str, Any]) -> set[str]:
    """Return the measures that rejected a tile of the index: two can have the same reason."""
    return {
        criterion.column
        for criterion in CRITERIA
        if criterion.reason == row["reason"]
        and criterion.column in MEASURES
        and limits[criterion.option] is not None
        and criterion.missed(np.array(row[criterion.column]), limits[criterion.option])
    }


def disputed(compared: Frame, engines: Sequence[str], read: Read) -> list[dict[str, Any]]:
    """Return cards of the tiles with the least agreement, with the contours of all engines."""
    album = pictures.Album(DISPUTED_BYTES)
    cards: list[dict[str, Any]] = []
    worst = compared.drop_duplicates("tile").head(DISPUTED_TILES)
    for row in worst.to_dict("records"):
        her2 = read(row, "her2")
        masks = {engine: pictures.outlined(her2, read(row, engine)) for engine in engines}
        uris = album.take({"HER2": her2, **masks}, SIDE_PX)
        if uris:
            cards.append({**row, "images": uris})
    return cards
