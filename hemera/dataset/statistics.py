"""Statistics of a dataset: rejections, selection bias, masks, agreement of engines, splits.

Functions take the index, or stage filter's counts, as data frames with the columns of
`hemera.tables`, and return data frames or records. A group is a data set with a HER2 score.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from hemera.dataset.criteria import ACCEPTED, REASONS
from hemera.masks.agreement import suitability
from hemera.masks.her2_score import asco_cap_score
from hemera.sheet import SCORES, SPLITS

Frame = Any
"""A pandas data frame, whose columns the stubs of pandas give no types."""

GROUP = ["dataset", "score"]
INTENSITIES = ("weak", "moderate", "strong")
BIAS_MIN = 0.10
BIAS_TILES_MIN = 20
"""A score is named when the fraction of its tiles that is accepted differs that much from the
fraction of the other scores of its data set, and it has that many tiles."""
SUITABILITIES = ("suitable", "doubtful", "unsuitable")


def score_order(score: str) -> int:
    """Return the position of a score among the others; an unknown one is last."""
    return SCORES.index(score) if score in SCORES else len(SCORES)


def groups(tiles: Frame) -> Iterator[tuple[tuple[str, str], Frame]]:
    """Yield (data set, score) and its rows, by data set and then by score."""
    found = dict(list(tiles.groupby(GROUP)))
    for key in sorted(found, key=lambda key: (key[0], score_order(key[1]))):
        yield key, found[key]


def rejections(counts: Frame) -> Frame:
    """Return the number of tiles per group (rows) and reason (columns).

    Args:
        counts: `tables.FUNNEL`.

    Returns:
        The first column is `accepted`; reasons follow in the order in which they are applied.
    """
    table = counts.pivot_table("tiles", GROUP, "reason", "sum", fill_value=0)
    known = [name for name in REASONS if name in table]
    others = sorted(set(table.columns) - {ACCEPTED, *known})
    table = table.reindex(columns=[ACCEPTED, *known, *others], fill_value=0)
    order = sorted(table.index, key=lambda key: (key[0], score_order(key[1])))
    return table.reindex(pd.MultiIndex.from_tuples(order, names=GROUP) if order else table.index)


@dataclasses.dataclass(frozen=True)
class Bias:
    """A score whose tiles are accepted more or less often than the others of its data set."""

    dataset: str
    score: str
    fraction: float
    """Of its tiles that is accepted."""
    other_fraction: float
    """Of the tiles of the other scores."""
    reason: str
    """The reason with the largest contribution to the difference."""


def selection_bias(table: Frame) -> list[Bias]:
    """Return the scores that the filters select against, or for.

    Of each data set, the score with the largest difference from the others is named and then left
    out, so that a score is not named because of another one.

    Args:
        table: of `rejections`.
    """
    found = []
    for dataset, rows in table.groupby(level="dataset"):
        own = rows.droplevel("dataset")
        own = own[(own.sum(axis=1) >= BIAS_TILES_MIN) & (own.index != "")].iloc[::-1]
        while len(own) > 1:
            rest = own.sum() - own
            fractions, others = (part.div(part.sum(axis=1), axis=0) for part in (own, rest))
            difference = fractions - others
            score = difference[ACCEPTED].abs().idxmax()
            gap = difference.loc[score]
            if abs(gap[ACCEPTED]) < BIAS_MIN:
                break
            reason = (-np.sign(gap[ACCEPTED]) * gap.drop(ACCEPTED)).idxmax()
            found.append(
                Bias(
                    dataset, score, fractions.loc[score, ACCEPTED], others.loc[score, ACCEPTED],
                    reason,
                )
            )  # fmt: skip
            own = own.drop(score)
    return found


def mask_statistics(tiles: Frame, engine: str) -> list[dict[str, Any]]:
    """Return what the masks of an engine contain, per group of tiles.

    Returns:
        `dataset`, `score`; `positive_fractions` of each tile; `cells_per_mm2`; `positive_cells`
        and `intensities`: fractions of the cells, None without a cell; `excluded_fraction`: mean
        over the tiles.
    """
    found = []
    for (dataset, score), own in groups(tiles[tiles[f"{engine}_positive_fraction"].notna()]):
        cells = float(own[f"{engine}_cells"].sum())
        area_mm2 = float(((own["size_px"] * own["mpp"] / 1000) ** 2).sum())
        positive, *intensities = (
            float(own[f"{engine}_{name}_cells"].sum()) / cells if cells else None
            for name in ("positive", *INTENSITIES)
        )
        found.append(
            {
                "dataset": dataset,
                "score": score,
                "positive_fractions": own[f"{engine}_positive_fraction"].to_numpy(np.float64),
                "cells_per_mm2": cells / area_mm2,
                "positive_cells": positive,
                "intensities": intensities,
                "excluded_fraction": float(own[f"{engine}_excluded_fraction"].mean()),
            }
        )
    return found


def agreement(tiles: Frame, engines: Sequence[str]) -> Frame:
    """Compare the masks of two engines tile by tile.

    Returns:
        The tiles that were compared, least agreement first, with the columns of `tiles` and:
        `dice`, `sign` (fraction of matched cells of the same sign), `empty` (neither engine found
        a positive pixel), `first` and `second` (positive fraction), `verdict`.
    """
    if len(engines) < 2:
        return tiles.iloc[:0]
    first, second = engines[:2]
    found = tiles.assign(
        dice=tiles[f"{first}_agreement_dice"],
        sign=tiles[f"{first}_agreement_sign"],
        first=tiles[f"{first}_positive_fraction"],
        second=tiles[f"{second}_positive_fraction"],
    )
    found = found[found["dice"].notna()]
    found = found.assign(
        empty=(found["first"] == 0) & (found["second"] == 0),
        least=found[["dice", "sign"]].min(axis=1),
        verdict=[
            suitability(dice, sign) for dice, sign in zip(found["dice"], found["sign"], strict=True)
        ],
    )
    return found.sort_values(["least", "tile"])


def agreement_summary(compared: Frame) -> dict[str, object]:
    """Summarise rows of `agreement`.

    Dice and sign are means over the tiles in which an engine found something: two empty masks
    agree, but are little evidence.
    """
    means = compared.loc[~compared["empty"].astype(bool), ["dice", "sign"]].mean()
    dice, sign = (None if np.isnan(value) else float(value) for value in means)
    counts = compared["verdict"].value_counts()
    return {
        "tiles": len(compared),
        "empty": int(compared["empty"].sum()),
        "dice": dice,
        "sign": sign,
        "verdict": None if dice is None else suitability(dice, sign),
        **{name: int(counts.get(name, 0)) for name in SUITABILITIES},
    }


def score_confusion(
    tiles: Frame, engine: str, by: str, intense_fraction: float | None = None
) -> Frame:
    """Compare the score of the sheet with the ASCO/CAP score of an engine's cells.

    Args:
        tiles: the tiles counted; those without a score are left out.
        engine: a mask engine.
        by: `tile`, or `case`: the cells of all its tiles are added first.
        intense_fraction: as for `asco_cap_score`.

    Returns:
        Counts: rows are scores of the sheet that occur, columns the computed ones; the column with
        the empty name counts those without cells.
    """
    names = [f"{engine}_{name}_cells" for name in INTENSITIES]
    known = tiles[tiles["score"].isin(SCORES)]
    cells = known.groupby([by, "score"])[[f"{engine}_cells", *names]].sum()
    cells[f"{engine}_cells"] -= cells[names].sum(axis=1)
    computed = [asco_cap_score(row, intense_fraction) for row in cells.to_numpy().tolist()]
    table = pd.crosstab(cells.index.get_level_values("score"), np.array(computed, dtype=object))
    rows = [score for score in SCORES if score in table.index]
    return table.reindex(index=rows, columns=[*SCORES, ""], fill_value=0)


def split_counts(tiles: Frame, column: str = "split") -> Frame:
    """Return the tiles and cases per split, (train, val, test) by (`tiles`, `cases`).

    Args:
        tiles: the tiles counted.
        column: with the split: `split`, or ``{network}_split``.
    """
    found = tiles.groupby(column).agg(tiles=("tile", "size"), cases=("case", "nunique"))
    return found.reindex(list(SPLITS), fill_value=0)


def sample(groups: Sequence[str], names: Sequence[str], count: int, seed: int) -> list[int]:
    """Draw places by a hash of seed and name, one of each group in turn.

    The draw depends on names alone, so that few change when others are added.

    Args:
        groups: group of each place.
        names: name of each place.
        count: how many at most.
        seed: of the draw.

    Returns:
        Places, ordered by group and then by name.
    """

    def rank(place: int) -> tuple[bytes, str]:
        name = names[place]
        return hashlib.sha256(f"{seed}/report/{name}".encode()).digest(), name

    turns: collections.Counter[str] = collections.Counter()
    drawn = []
    for place in sorted(range(len(names)), key=rank):
        group = groups[place]
        drawn.append((turns[group], group, place))
        turns[group] += 1
    taken = [place for _, _, place in sorted(drawn)[:count]]
    return sorted(taken, key=lambda place: (groups[place], names[place]))
