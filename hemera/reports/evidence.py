"""Sections of the page about wrong pairs: what shows that two images belong together."""

import itertools
from typing import Any

import numpy as np

from hemera.dataset import statistics
from hemera.dataset.statistics import GROUP, Frame
from hemera.imaging.quality import haematoxylin_histogram, histogram_correlation
from hemera.imaging.resample import halved
from hemera.registration.alignment import DIRECTIONS, OTHERS_MIN, SHIFTS
from hemera.reports.data import ROWS_MAX, Cohort
from hemera.reports.tiles import Read

CHANCE = 1 / (1 + DIRECTIONS * len(SHIFTS))
"""The fraction of wrong pairs that match best in place."""
OTHERS_MAX = 0.05
SAMPLE_TILES = 48
SEED = 20251


def evidence(cohort: Cohort, read: Read) -> dict[str, Any]:
    """Return the evidence of alignment, of equal images, and what the histograms separate."""
    pairs = cohort.images[cohort.images["alignment_margin"].notna()]
    pairs = pairs.merge(cohort.pairs, on="pair")
    pairs = pairs.assign(measurable=pairs["alignment_margin"] > 0)
    unmeasurable = pairs[~pairs["measurable"]].sort_values("alignment_margin")
    return {
        "pairs": len(pairs),
        "measurable": int(pairs["measurable"].sum()),
        "groups": [(" ".join(key), _summary(own, cohort)) for key, own in pairs.groupby(GROUP)],
        "all": _summary(pairs, cohort),
        "unmeasurable": unmeasurable[:ROWS_MAX],
        "chance": CHANCE,
        "others_min": OTHERS_MIN,
        "others_max": OTHERS_MAX,
        "equal": _equal_images(cohort),
        "separation": [
            (dataset, found)
            for dataset, own in cohort.tiles.groupby("dataset")
            if (found := _separation(own, read)) is not None
        ],
    }


def _summary(pairs: Frame, cohort: Cohort) -> dict[str, Any]:
    """Summarise the alignment of pairs and of their tiles; NaN where nothing was measured."""
    tiles = cohort.tiles[cohort.tiles["pair"].isin(pairs["pair"])]["alignment_margin"].dropna()
    others = pairs["alignment_others"].dropna()
    return {
        "pairs": len(pairs),
        "measurable": int(pairs["measurable"].sum()),
        "ncc": pairs["alignment_ncc"].median(),
        "compared": len(others),
        "above_others": int((others <= OTHERS_MAX).sum()),
        "tiles": len(tiles),
        "tiles_measurable": int((tiles > 0).sum()),
    }


def _equal_images(cohort: Cohort) -> list[str]:
    """Return the images that occur in several cases, under any name, a text for each."""
    images = cohort.images[cohort.images["digest"].notna()].merge(cohort.pairs, on="pair")
    found = images.groupby("digest").filter(lambda own: own["case"].nunique() > 1)
    return [", ".join(own["pair"] + " " + own["stain"]) for _, own in found.groupby("digest")]


def _separation(tiles: Frame, read: Read) -> dict[str, Any] | None:
    """Return how well the similarity of histograms separates true from shuffled pairs of tiles.

    Of `SAMPLE_TILES` tiles, true pairs are compared with the H&E tile of each and the HER2 tile of
    every other pair. `auc` is the probability that a true pair is more similar than a wrong one.
    None where there are not two pairs.
    """
    drawn = statistics.sample(tiles["pair"].tolist(), tiles["tile"].tolist(), SAMPLE_TILES, SEED)
    rows = tiles.iloc[drawn].to_dict("records")
    he, her2 = (
        [
            haematoxylin_histogram(halved(read(row, stain)), tuple(row[f"{stain}_background"]))
            for row in rows
        ]
        for stain in ("he", "her2")
    )
    true: list[float] = []
    wrong: list[float] = []
    for i, j in itertools.product(range(len(rows)), repeat=2):
        if i != j and rows[i]["pair"] == rows[j]["pair"]:
            continue
        value = histogram_correlation(he[i], her2[j])
        if value is not None:
            (true if i == j else wrong).append(value)
    if not true or not wrong:
        return None
    above = np.subtract.outer(true, wrong)
    return {
        "tiles": len(true),
        "auc": float((above > 0).mean() + (above == 0).mean() / 2),
        "true": float(np.median(true)),
        "wrong": float(np.median(wrong)),
    }
