"""The tables of a cohort, and what the page about the data shows of them."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from hemera import tables
from hemera.config import STAGES
from hemera.dataset import statistics
from hemera.dataset.statistics import GROUP, Frame
from hemera.masks.her2_score import CLASSES
from hemera.reports import charts
from hemera.sheet import SCORES

NETWORKS = {"generation": "GenerationNet", "segmentation": "SegmentationNet"}
ROWS_MAX = 500
"""Rows of a table on the page; pages of their own, or the tables on disk, contain all."""

STATES = ("tiled", "refused", "wrong_stain", "no_tissue", "unreadable")
"""States of a pair, the best first."""


@dataclasses.dataclass(frozen=True, eq=False)
class Cohort:
    """All tables of the page; a score that is not known is `unknown`."""

    sheet: str
    preset: str
    pairs: Frame
    """Of the sheet: pair, case, dataset, score, verdict, in_block."""
    outcomes: Frame
    """`tables.PAIRS` of all units."""
    images: Frame
    """`tables.DESCRIBE` of all units, without its pictures."""
    tiles: Frame
    """`tables.index`, without digests."""
    metadata: Mapping[str, str]
    """Of the index."""
    notes: Frame = dataclasses.field(default_factory=pd.DataFrame)
    """Note of every engine on every pair: pair, engine, note."""

    @property
    def engines(self) -> list[str]:
        """Mask engines."""
        return list(json.loads(self.metadata["mask_engines"]))

    @property
    def target(self) -> str:
        """Mask engine of the training."""
        return self.metadata.get("mask_target", "")

    @property
    def accepted(self) -> Frame:
        """The accepted tiles."""
        return self.tiles[self.tiles["accepted"]]

    def options(self, stage: str) -> dict[str, Any]:
        """Return the options a stage ran with; empty where the index does not contain them."""
        return dict(json.loads(self.metadata.get(f"options_{stage}", "{}")))


def content(
    cohort: Cohort, compared: Frame, staining: Frame, intense_fraction: float | None
) -> dict[str, Any]:
    """Return what the page shows of pairs, masks, splits and provenance.

    `compared` is of `statistics.agreement`, `staining` of `statistics.case_staining`;
    `intense_fraction` as for `her2_scores`.
    """
    pairs = _pairs(cohort)
    listed = pairs[~pairs["in_block"] | (pairs["state"] != "tiled")]
    accepted = cohort.accepted
    return {
        "cohort": cohort,
        "preset": cohort.preset,
        "states": cohort.outcomes["state"].value_counts().reindex(STATES, fill_value=0),
        "pairs": listed[:ROWS_MAX],
        "pairs_all": listed,
        "pairs_left": max(0, len(listed) - ROWS_MAX),
        "images": {(row.pair, row.stain): row for row in cohort.images.itertuples()},
        "blocks": _blocks(pairs[pairs["in_block"]]),
        "masks": {engine: _masks(cohort, engine) for engine in cohort.engines},
        "unmeasured": _unmeasured(cohort.notes),
        "agreements": _agreements(compared),
        "confusions": _confusions(cohort, intense_fraction),
        "intense_fraction": intense_fraction,
        "staining": {
            engine: staining[staining["engine"] == engine][:ROWS_MAX]
            for engine in cohort.engines
            if len(accepted)
        },
        "classes": CLASSES,
        "probabilities": tables.STAINING.names[-len(CLASSES) :],
        "splits": _splits(accepted),
        "networks": NETWORKS,
        "subsets": {
            network: statistics.split_counts(accepted, f"{network}_split") for network in NETWORKS
        },
        "stages": STAGES,
        "versions": json.loads(cohort.metadata.get("versions", "{}")),
        "licences": json.loads(cohort.metadata.get("licences", "[]")),
    }


def _unmeasured(notes: Frame) -> list[tuple[str, str, int]]:
    """Return engine, note and number of pairs of what masks could not measure on a slide.

    The colour of DAB is not among it: a slide without staining does not have it.
    """
    return [
        (engine, note, len(own))
        for (engine, note), own in (notes.groupby(["engine", "note"]) if len(notes) else ())
        if "haematoxylin" in note or "nuclei" in note
    ]


def _pairs(cohort: Cohort) -> Frame:
    """Return the outcomes of the pairs with their rows of the sheet, the worst first."""
    pairs = cohort.outcomes.merge(cohort.pairs, on="pair")
    accepted = pairs["pair"].map(cohort.accepted["pair"].value_counts())
    return pairs.assign(
        state=pd.Categorical(pairs["state"], STATES[::-1], ordered=True),
        reason=pairs["reason"].fillna(""),
        accepted=accepted.fillna(0).astype(int),
    ).sort_values(["state", "pair"])


def _blocks(pairs: Frame) -> Frame:
    """Return the number of image pairs in each state, and of their tiles, by data set."""
    found = pd.crosstab(pairs["dataset"], pairs["state"].astype(str))
    found = found.reindex(columns=STATES, fill_value=0)
    found.insert(0, "pairs", found.sum(axis=1))
    found[["tiles written", "accepted"]] = pairs.groupby("dataset")[
        ["tiles_written", "accepted"]
    ].sum()
    return found


def _masks(cohort: Cohort, engine: str) -> dict[str, Any]:
    tiles = cohort.accepted
    groups = tiles.groupby(GROUP)[f"{engine}_positive_fraction"]
    return {
        "table": statistics.mask_statistics(tiles, engine),
        "chart": charts.boxes(
            f"Positive fraction of the accepted tiles, masks of {engine}",
            [(", ".join(key), fractions.to_numpy()) for key, fractions in groups],
            unit="HER2-positive fraction of the tile",
        ),
    }


def _agreements(compared: Frame) -> list[tuple[str, str, str, dict[str, Any]]]:
    """Return engine, data set, score and summary, for each group and for all tiles of an engine."""
    found = []
    for engine, own in compared.groupby("engine", sort=False):
        for (dataset, score), group in own.groupby(GROUP):
            found.append((engine, dataset, score, statistics.agreement_summary(group)))
        found.append((engine, "all", "", statistics.agreement_summary(own)))
    return found


def _confusions(cohort: Cohort, intense_fraction: float | None) -> list[dict[str, Any]]:
    """Return per engine, by case and by tile, the score of its cells against that of the sheet."""
    made = []
    for engine in cohort.engines:
        for by in ("case", "tile"):
            table = statistics.score_confusion(cohort.accepted, engine, by, intense_fraction)
            known = table[list(SCORES)].reindex(list(SCORES), fill_value=0).to_numpy()
            total, right = known.sum(), np.trace(known)
            near = right + np.trace(known, 1) + np.trace(known, -1)
            made.append(
                {
                    "engine": engine,
                    "by": by,
                    "table": table,
                    "total": total,
                    "right": right / total if total else np.nan,
                    "near": near / total if total else np.nan,
                }
            )
    return [item for item in made if len(item["table"])]


def _splits(accepted: Frame) -> list[tuple[tuple[str, str], Frame]]:
    """Return tiles and cases of each split, by data set and score, and of all."""
    groups = [(key, statistics.split_counts(own)) for key, own in accepted.groupby(GROUP)]
    return [*groups, (("all", ""), statistics.split_counts(accepted))]
