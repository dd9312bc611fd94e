"""Sections of the page about the data that need only tables."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from hemera.config import STAGES
from hemera.config import base as options_base
from hemera.dataset import statistics
from hemera.dataset.statistics import Bias, Frame, score_order
from hemera.registration.verdict import REVIEW
from hemera.reports import charts
from hemera.reports.html import count, number, percent, plural
from hemera.sheet import SCORES, SPLITS, Pair

NETWORKS = {"generation": "GenerationNet", "segmentation": "SegmentationNet"}
ROWS_MAX = 500
"""Rows of a table on the page; the tables on disk contain all."""
WORST_TILES = 6

STATES = {
    "tiled": "tiled",
    "refused": "refused",
    "no_tissue": "no tissue",
    "unreadable": "unreadable",
}
"""States of a pair, the order of the page's columns."""

REGISTRATIONS = {
    "registered": "registered on input",
    "accepted": "accepted manually",
    "refused": "refused manually",
}
"""Verdicts whose value in the table is not clear by itself."""


@dataclasses.dataclass(frozen=True, eq=False)
class Cohort:
    """All tables of the page, as data frames."""

    sheet: str
    preset: str
    pairs: tuple[Pair, ...]
    outcomes: Frame
    """`tables.PAIRS` of all units."""
    images: Frame
    """`tables.DESCRIBE` of all units, without its pictures."""
    funnel: Frame
    """`tables.FUNNEL`."""
    tiles: Frame
    """`tables.index`, without digests."""
    metadata: Mapping[str, str]
    """Of the index."""

    @property
    def engines(self) -> list[str]:
        """The mask engines."""
        return list(json.loads(self.metadata.get("mask_engines", "[]")))

    @property
    def accepted(self) -> Frame:
        """The accepted tiles."""
        return self.tiles[self.tiles["accepted"]]

    def options(self, stage: str) -> dict[str, Any]:
        """Return the options a stage ran with; empty where the index does not contain them."""
        return dict(json.loads(self.metadata.get(f"options_{stage}", "{}")))


def score_name(score: str) -> str:
    """Return a score as it is written on the page."""
    return score or "unknown"


def headline(cohort: Cohort) -> list[dict[str, str]]:
    """Return the main counts: value, of what, details."""
    accepted, total = cohort.accepted, len(cohort.tiles)
    states = cohort.outcomes["state"].value_counts()
    details = "no tile was written"
    if total:
        details = percent(len(accepted) / total)
    if len(accepted):
        low, high = accepted["mpp"].min(), accepted["mpp"].max()
        span = number(low) + (f" to {number(high)}" if high > low * 1.005 else "")
        details += f"; {span} µm/px, {number(accepted['size_px'].iloc[0])} px"
    datasets = len({pair.dataset for pair in cohort.pairs})
    lost = [f"{count(int(states[name]))} {STATES[name]}" for name in STATES if name in states]
    return [
        {
            "value": count(len(accepted)),
            "of": f"of {plural(total, 'tile')} accepted",
            "more": details,
        },
        {
            "value": count(accepted["case"].nunique()),
            "of": f"of {plural(len({pair.case for pair in cohort.pairs}), 'case')} with tiles",
            "more": plural(datasets, "data set"),
        },
        {
            "value": count(int(states.get("tiled", 0))),
            "of": f"of {plural(len(cohort.pairs), 'pair')} tiled",
            "more": ", ".join(lost),
        },
    ]


def warnings(
    cohort: Cohort, biases: Sequence[Bias], agreement: Mapping[str, Any]
) -> list[dict[str, str]]:
    """Return the issues of the data: level (stop, care), text, anchor on the page.

    Args:
        cohort: all tables.
        biases: of `statistics.selection_bias`.
        agreement: of `agreement`.
    """
    accepted = cohort.accepted
    states = cohort.outcomes["state"].value_counts()
    review = int((cohort.outcomes["registration"] == REVIEW).sum())
    broken = int(cohort.outcomes["tiles_unreadable"].sum())
    mixture = cohort.metadata.get("mixture", "")
    overall = agreement.get("all", {}).get("verdict")
    found: list[tuple[Any, str, str, str]] = [
        (
            not len(cohort.tiles),
            "stop",
            "No tile was written; see the reasons of the pairs.",
            "pairs",
        ),
        (
            len(cohort.tiles) and not len(accepted),
            "stop",
            "No tile was accepted; see the limits in section filter of config.yaml.",
            "funnel",
        ),
        *_empty_splits(accepted),
        (mixture, "care", f"{mixture[:1].upper()}{mixture[1:]}. Set tile.mpp.", "quality"),
        *(
            (
                states.get(name, 0),
                "care",
                f"{plural(states.get(name, 0), 'pair')}: {words}.",
                "pairs",
            )
            for name, words in STATES.items()
            if name != "tiled"
        ),
        (
            review and not cohort.options("filter").get("accept_review"),
            "care",
            f"{plural(review, 'registration')} under review, tiles rejected: inspect it and set "
            "verdict to accept or refuse in pairs.tsv.",
            "registration",
        ),
        (broken, "care", f"{plural(broken, 'tile')} could not be decoded.", "pairs"),
        *((True, "care", bias_words(bias), "funnel") for bias in biases),
        *(
            (
                len(accepted) and not accepted[f"{engine}_positive_fraction"].sum(),
                "care",
                f"No accepted tile has a positive pixel in the masks of {engine}.",
                "masks",
            )
            for engine in cohort.engines
        ),
        (
            overall in ("doubtful", "unsuitable"),
            "care",
            f"Low agreement of the mask engines: {overall} as labels overall.",
            "masks",
        ),
    ]
    return [
        {"level": level, "words": words, "link": link} for flag, level, words, link in found if flag
    ]


def _empty_splits(accepted: Frame) -> list[tuple[bool, str, str, str]]:
    found = []
    for split in SPLITS if len(accepted) else ():
        level = "stop" if split == "train" else "care"
        in_split = accepted[accepted["split"] == split]
        found.append(
            (not len(in_split), level, f"Split {split} is empty; add cases (pairs.tsv, split).",
             "splits")
        )  # fmt: skip
        for network, name in NETWORKS.items():
            empty = len(in_split) and not (accepted[f"{network}_split"] == split).any()
            words = f"{name} has no tile in {split}; see index.{network}_datasets."
            found.append((bool(empty), level, words, "splits"))
    return found


def bias_words(bias: Bias) -> str:
    """Return a selection bias in words."""
    return (
        f"Selection bias in {bias.dataset}: {percent(bias.fraction, 0)} of the tiles of score "
        f"{bias.score} are accepted, {percent(bias.other_fraction, 0)} of the others; mostly by "
        f"{bias.reason}."
    )


def pair_table(cohort: Cohort) -> dict[str, Any]:
    """Return the table of pairs: whole slides, and image pairs that are not tiled.

    Image pairs are counted per data set as well.
    """
    tiles = cohort.accepted["pair"].value_counts()
    images = {(row["pair"], row["stain"]): row for row in cohort.images.to_dict("records")}
    pairs = {pair.pair: pair for pair in cohort.pairs}
    rows = [
        {
            **row,
            "dataset": pairs[row["pair"]].dataset,
            "score": score_name(pairs[row["pair"]].score),
            "block": pairs[row["pair"]].in_block,
            "state_words": STATES[row["state"]],
            "registration_words": REGISTRATIONS.get(row["registration"], row["registration"]),
            "reason": row["reason"] if isinstance(row["reason"], str) else "",
            "sizes": [_size(images.get((row["pair"], stain))) for stain in ("he", "her2")],
            "accepted": int(tiles.get(row["pair"], 0)),
        }
        for row in cohort.outcomes.to_dict("records")
    ]
    order = list(reversed(STATES))
    shown = sorted(
        (row for row in rows if not row["block"] or row["state"] != "tiled"),
        key=lambda row: (order.index(row["state"]), row["pair"]),
    )
    blocks = pd.DataFrame([row for row in rows if row["block"]])
    counted = []
    for dataset, own in blocks.groupby("dataset") if len(blocks) else ():
        states = own["state"].value_counts()
        numbers = [len(own), *(states.get(name, 0) for name in STATES)]
        sums = [own["tiles_written"].sum(), own["accepted"].sum()]
        counted.append({"dataset": dataset, "counts": [int(n) for n in (*numbers, *sums)]})
    return {
        "rows": shown[:ROWS_MAX],
        "left_out": max(0, len(shown) - ROWS_MAX),
        "blocks": counted,
        "states": list(STATES.values()),
    }


def _size(image: Mapping[str, Any] | None) -> str:
    if image is None or np.isnan(image["width_px"]):
        return "not read"
    size = f"{count(int(image['width_px']))} × {count(int(image['height_px']))} px"
    return f"{size}, {number(image['mpp'])} µm/px ({image['mpp_source']})"


def masks(cohort: Cohort) -> list[dict[str, Any]]:
    """Return per engine the statistics of the masks of the accepted tiles."""
    made = []
    for engine in cohort.engines:
        found = statistics.mask_statistics(cohort.accepted, engine)
        chart = charts.boxes(
            f"Positive fraction of the accepted tiles, masks of {engine}",
            [
                (f"{own['dataset']}, {score_name(own['score'])}", own["positive_fractions"])
                for own in found
            ],
            unit="HER2-positive fraction of the tile",
        )
        rows = [
            {
                **own,
                "score": score_name(own["score"]),
                "tiles": len(own["positive_fractions"]),
                "median": float(np.median(own["positive_fractions"])),
                "empty": float(np.mean(own["positive_fractions"] == 0)),
            }
            for own in found
        ]
        target = engine == cohort.metadata.get("mask_target")
        made.append({"engine": engine, "target": target, "rows": rows, "chart": chart})
    return made


def agreement(compared: Frame, engines: Sequence[str]) -> dict[str, Any]:
    """Return the agreement of two engines per group and overall; empty where none was measured.

    Args:
        compared: of `statistics.agreement`.
        engines: the mask engines.
    """
    if not len(compared):
        return {}
    rows = [
        {"dataset": dataset, "score": score_name(score), **statistics.agreement_summary(own)}
        for (dataset, score), own in statistics.groups(compared)
    ]
    return {
        "engines": engines[:2],
        "rows": rows,
        "all": {"dataset": "all", "score": "", **statistics.agreement_summary(compared)},
        "worst": compared.head(WORST_TILES).to_dict("records"),
    }


def confusions(cohort: Cohort, intense_fraction: float | None) -> list[dict[str, Any]]:
    """Return per engine, by case and by tile, the score of its cells against that of the sheet."""
    made = []
    for engine in cohort.engines:
        for by in ("case", "tile"):
            table = statistics.score_confusion(cohort.accepted, engine, by, intense_fraction)
            known = table[list(SCORES)].to_numpy()
            total = int(known.sum())
            if not len(table):
                continue
            places = np.array([score_order(score) for score in table.index])
            distance = np.abs(places[:, None] - np.arange(len(SCORES)))
            right, near = (
                float(known[distance <= most].sum() / total) if total else None for most in (0, 1)
            )
            made.append(
                {
                    "engine": engine,
                    "by": by,
                    "rows": list(zip(table.index, table.to_numpy().tolist(), strict=True)),
                    "total": total,
                    "right": right,
                    "near": near,
                }
            )
    return made


def splits(cohort: Cohort) -> dict[str, Any]:
    """Return tiles and cases per split, and those that each network uses."""
    accepted, options = cohort.accepted, cohort.options("index")
    rows = [
        {
            "dataset": dataset,
            "score": score_name(score),
            "counts": statistics.split_counts(own).to_numpy().ravel().tolist(),
        }
        for (dataset, score), own in statistics.groups(accepted)
    ]
    total = statistics.split_counts(accepted).to_numpy().ravel().tolist()
    networks = []
    for network, name in NETWORKS.items():
        used = statistics.split_counts(accepted, f"{network}_split")
        for split, (tiles, cases) in zip(SPLITS, used.to_numpy().tolist(), strict=True):
            wanted = options.get(f"{network}_{split}")
            own = accepted[accepted[f"{network}_split"] == split]
            datasets = own["dataset"].value_counts().sort_index()
            networks.append(
                {
                    "network": name,
                    "split": split,
                    "requested": "all" if wanted is None else count(wanted),
                    "fewer": wanted is not None and tiles < wanted,
                    "tiles": tiles,
                    "cases": cases,
                    "datasets": ", ".join(f"{key} {count(int(n))}" for key, n in datasets.items()),
                }
            )
    return {"splits": SPLITS, "rows": rows, "total": total, "networks": networks}


def provenance(cohort: Cohort) -> dict[str, Any]:
    """Return fingerprint, versions, licences, and the options of every stage."""
    return {
        "fingerprint": cohort.metadata.get("fingerprint", ""),
        "versions": json.loads(cohort.metadata.get("versions", "{}")),
        "licences": json.loads(cohort.metadata.get("licences", "[]")),
        "stages": [
            {"stage": stage, "rows": option_rows(stage, values)}
            for stage in STAGES
            if (values := cohort.options(stage))
        ],
    }


def option_rows(stage: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the options of a stage: name, value, default (None where it is the value), help."""
    declared = options_base.keys(STAGES[stage])
    rows = []
    for name, value in values.items():
        if name not in declared:
            continue
        key = declared[name]
        shown, default = json.dumps(value), json.dumps(key.default)
        rows.append(
            {
                "name": name,
                "value": shown,
                "default": None if shown == default else default,
                "help": key.help,
                "paper": key.paper,
            }
        )
    return rows
