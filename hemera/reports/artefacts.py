"""Artefacts on a page: how many tiles they cost, their outlines on slides and on tiles."""

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd

from hemera.dataset import excluded
from hemera.dataset.criteria import CRITERIA
from hemera.dataset.statistics import GROUP, Frame
from hemera.imaging.artefacts import KINDS, resized
from hemera.imaging.blur import blurred_cells
from hemera.imaging.codecs import decode, decode_mask
from hemera.reports import pictures
from hemera.reports.data import Cohort

RGB = npt.NDArray[np.uint8]

COLORS = {
    "pen": (0, 90, 255),
    "fold": (0, 0, 0),
    "edge": (0, 158, 115),
    "dust": (230, 110, 0),
    "other": (120, 0, 160),
    "blur": (0, 190, 230),
}
"""Colour of the outline of each kind."""
WORDS = {
    "pen": "pen",
    "fold": "fold",
    "edge": "edge of a bubble or of the coverslip, hair",
    "dust": "dust",
    "other": "other, in a file of the sheet",
    "blur": "out of focus",
}
SLIDES_MAX = 12
SIDE_PX = 560


COLUMNS = {
    f"{stain}_{kind}_fraction": (kind, title)
    for stain, title in (("he", "H&E"), ("her2", "HER2"))
    for kind in KINDS
}
"""Kind of artefact and stain of the columns of tiles about artefacts."""
REASONS = {each.reason: COLUMNS[each.column][0] for each in CRITERIA if each.column in COLUMNS}
"""Kind of artefact of the reasons that are about one."""


def content(cohort: Cohort) -> dict[str, Any]:
    """Return counts by data set and score, the legend, and the slides with artefacts.

    `slides` are the pairs to show as `overview`, most of the tissue covered first.
    """
    positions = cohort.outcomes.merge(cohort.pairs, on="pair").groupby(GROUP)
    table = positions[["tiles_tissue", "tiles_artefact"]].sum()
    rejected = cohort.tiles[cohort.tiles["reason"].isin(list(REASONS))]
    counts = pd.crosstab([rejected[name] for name in GROUP], rejected["reason"])
    present = [name for name in REASONS if name in counts.columns]
    table = table.join(counts[present]).fillna(0).astype(int) if present else table
    images = cohort.images.pivot(index="pair", columns="stain", values="artefact_fraction")
    images = images.reindex(columns=["he", "her2"]).fillna(0.0)
    covered = images.max(axis=1)
    slides = cohort.pairs["pair"][~cohort.pairs["in_block"]]
    marked = covered[covered.index.isin(slides) & (covered > 0)].sort_values(ascending=False)
    return {
        "table": table[table["tiles_tissue"] > 0],
        "reasons": present,
        "legend": [(WORDS[kind], "#{:02x}{:02x}{:02x}".format(*COLORS[kind])) for kind in KINDS],
        "slides": [(name, *images.loc[name, ["he", "her2"]]) for name in marked.index[:SLIDES_MAX]],
        "slides_left": max(0, len(marked) - SLIDES_MAX),
    }


def overview(described: Mapping[str, Mapping[str, Any]], tiles: Frame) -> dict[str, RGB]:
    """Return both slides of a pair with outlines, and with the tiles rejected for artefacts on H&E.

    `described` are its rows of `tables.DESCRIBE` by stain, `tiles` its rows of the index.
    """
    made: dict[str, RGB] = {}
    for stain, name in (("he", "H&E"), ("her2", "HER2")):
        row = described[stain]
        if row["thumbnail"] is None:
            continue
        rgb = pictures.shrink(decode(row["thumbnail"]), SIDE_PX)
        if row["artefacts"] is not None:
            rgb = outlined(rgb, decode_mask(row["artefacts"]))
        made[name] = rgb
    if "H&E" in made:
        scale = made["H&E"].shape[1] / described["he"]["width_px"]
        for tile in tiles[tiles["reason"].isin(list(REASONS))].to_dict("records"):
            side = tile["size_px"] * tile["mpp"] / tile["he_mpp"]
            low, high = (
                tuple(round((tile[f"{axis}_px"] + more) * scale) for axis in "xy")
                for more in (0, side)
            )
            # White beside the colour, which tissue may have too.
            for color, width in (((255, 255, 255), 4), (COLORS[REASONS[tile["reason"]]], 2)):
                cv2.rectangle(made["H&E"], low, high, color, width)
    return made


def measures(row: Mapping[str, Any], limits: Mapping[str, Any]) -> list[tuple[str, float, bool]]:
    """Return name, fraction and whether it rejected the tile, of the artefacts of a tile."""
    return [
        (
            " on ".join(COLUMNS[each.column]),
            row[each.column],
            each.reason == row["reason"] and row[each.column] > limits[each.option],
        )
        for each in CRITERIA
        if each.column in COLUMNS and row[each.column] > 0
    ]


def marked_tile(rgb: RGB, row: Mapping[str, Any], stain: str) -> RGB:
    """Outline the artefacts of a tile of the index, and its blurred cells if it was rejected so."""
    found = excluded.unpack(row["artefacts"], rgb.shape[:2])
    kinds = np.zeros(rgb.shape[:2], np.uint8)
    if found is not None:
        kinds = found[("he", "her2").index(stain)].copy()
        kinds[kinds == excluded.UNCOVERED] = 0
    if REASONS.get(row["reason"]) == "blur":
        blurred = blurred_cells(rgb, row["mpp"], stain).astype(np.uint8)
        kinds[(resized(blurred, rgb.shape[:2]) > 0) & (kinds == 0)] = 1 + KINDS.index("blur")
    return outlined(rgb, kinds) if kinds.any() else rgb


def outlined(rgb: RGB, kinds: npt.NDArray[np.uint8]) -> RGB:
    """Draw the outline of each kind of artefact, numbers of `KINDS`, (h, w) from edge to edge."""
    kinds = resized(kinds, rgb.shape[:2])
    drawn = rgb.copy()
    thick = max(2, round(min(rgb.shape[:2]) / 200))
    for number, kind in enumerate(KINDS, 1):
        inside = (kinds == number).astype(np.uint8)
        found, _ = cv2.findContours(inside, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(drawn, found, -1, (255, 255, 255), thick + 2)
        cv2.drawContours(drawn, found, -1, COLORS[kind], thick)
    return drawn
