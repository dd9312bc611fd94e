"""Galleries of tiles: pictures and measurements of accepted, rejected and disputed tiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hemera.dataset import statistics
from hemera.dataset.criteria import CRITERIA, REASONS
from hemera.dataset.statistics import Frame, score_order
from hemera.reports import pictures
from hemera.reports.data import Cohort, score_name
from hemera.reports.filters import limit_words, reason_words
from hemera.reports.html import fixed, number, percent

GALLERY_BYTES = 8_000_000
DISPUTED_BYTES = 1_500_000
"""With the registrations and the tables, which have limits as well, a page is below 30 MB."""
SIDE_PX = 400
GALLERY_SEED = 20251


Read = Callable[[Mapping[str, Any], str], npt.NDArray[np.uint8]]
"""Returns an image of a tile (a row of the index): `he` or `her2`, or the mask of an engine."""


def accepted(cohort: Cohort, read: Read, count: int) -> dict[str, Any]:
    """Return cards of accepted tiles, data sets and scores in turn, and a note on their number."""
    tiles = cohort.accepted
    groups = [f"{row.dataset}/{score_order(row.score)}" for row in tiles.itertuples()]
    return _cards(cohort, tiles, groups, read, count)


def rejected(cohort: Cohort, read: Read, count: int) -> dict[str, Any]:
    """Return cards of rejected tiles by reason, reasons in turn, and a note on their number."""
    tiles = cohort.tiles[~cohort.tiles["accepted"]]
    found = _cards(cohort, tiles, tiles["reason"].tolist(), read, count)
    totals = tiles["reason"].value_counts()
    order = [name for name in REASONS if name in totals]
    return {
        "note": found["note"],
        "groups": [
            {
                "reason": reason,
                "words": reason_words(reason),
                "limit": limit_words(reason, cohort),
                "tiles": int(totals[reason]),
                "cards": [card for card in found["cards"] if card["reason"] == reason],
            }
            for reason in [*order, *sorted(set(totals.index) - set(order))]
        ],
    }


def _cards(
    cohort: Cohort, tiles: Frame, groups: Sequence[str], read: Read, count: int
) -> dict[str, Any]:
    chosen = statistics.sample(groups, tiles["tile"].tolist(), count, GALLERY_SEED)
    album = pictures.Album(GALLERY_BYTES)
    limits, target = cohort.options("filter"), cohort.metadata.get("mask_target", "")
    cards: list[dict[str, Any]] = []
    for row in tiles.iloc[chosen].to_dict("records"):
        images = {"H&E": read(row, "he"), "HER2": read(row, "her2")}
        if isinstance(row.get(f"{target}_shard"), str):
            images["HER2 with mask"] = pictures.outlined(images["HER2"], read(row, target))
        uris = album.take(images, SIDE_PX)
        if not uris:
            break
        cards.append(
            {
                **{name: row[name] for name in ("tile", "reason")},
                "about": f"{row['dataset']}, score {score_name(row['score'])}, {row['split']}",
                "label": "",
                "images": uris,
                "values": values(row, limits, target),
            }
        )
    note = ""
    if len(cards) < len(chosen):
        note = f"{len(cards)} of {len(chosen)} drawn tiles are shown; the page is limited to 30 MB."
    return {"cards": cards, "note": note}


def values(
    row: Mapping[str, Any], limits: Mapping[str, Any], target: str
) -> list[tuple[str, str, bool]]:
    """Return what was measured on a tile: name, value, whether the tile was rejected by it.

    Args:
        row: of the index.
        limits: options of filter.
        target: the mask engine whose cells are shown.
    """
    deciding = {
        criterion.column
        for criterion in CRITERIA
        if criterion.reason == row["reason"]
        and (value := row.get(criterion.column or "")) is not None
        and (limit := limits.get(criterion.option)) is not None
        and criterion.missed(np.array(value), limit)
    }
    shown = [
        ("tissue_fraction", "tissue", percent(row["tissue_fraction"], 0)),
        ("her2_coverage_fraction", "HER2 coverage", percent(row["her2_coverage_fraction"], 0)),
        ("he_sharpness", "sharpness H&E", number(row["he_sharpness"])),
        ("her2_sharpness", "sharpness HER2", number(row["her2_sharpness"])),
        ("histogram_similarity", "similarity", fixed(row["histogram_similarity"], 2)),
        (
            "registration_error_um",
            "registration error",
            f"{number(row['registration_error_um'])} µm",
        ),
        ("registration_margin", "registration margin", fixed(row["registration_margin"], 3)),
        ("folding_fraction", "folded", percent(row["folding_fraction"])),
    ]
    found = [
        (words, value, name in deciding)
        for name, words, value in shown
        if name in deciding or row[name] > 0 or (row[name] <= 0 and name != "folding_fraction")
    ]
    if not np.isnan(row.get(f"{target}_cells", np.nan)):
        cells = f"{row[f'{target}_positive_cells']:.0f} of {row[f'{target}_cells']:.0f}"
        positive = percent(row[f"{target}_positive_fraction"])
        found.append(("positive", positive, False))
        found.append(("positive cells", cells, False))
    return found


def disputed(agreement: Mapping[str, Any], read: Read) -> list[dict[str, Any]]:
    """Return the tiles with the least agreement of two engines, with the contours of both.

    Args:
        agreement: of `data.agreement`.
        read: reads a tile.
    """
    album = pictures.Album(DISPUTED_BYTES)
    cards: list[dict[str, Any]] = []
    for row in agreement.get("worst", []):
        her2 = read(row, "her2")
        images = {"HER2": her2}
        for engine in agreement["engines"]:
            images[engine] = pictures.outlined(her2, read(row, engine))
        uris = album.take(images, SIDE_PX)
        if not uris:
            break
        cards.append(
            {
                "tile": row["tile"],
                "about": f"{row['dataset']}, score {score_name(row['score'])}",
                "label": "",
                "images": uris,
                "values": [
                    ("Dice", fixed(row["dice"], 2), False),
                    ("same sign", percent(row["sign"]), False),
                    ("verdict", row["verdict"], False),
                ],
            }
        )
    return cards
