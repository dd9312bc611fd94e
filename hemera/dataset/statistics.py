"""Statistics of a dataset, from data frames with the columns of the index.

A group is a data set with a HER2 score.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from hemera import tables
from hemera.dataset.criteria import ACCEPTED, REASONS
from hemera.masks.agreement import suitability
from hemera.masks.her2_score import BLOCKS_MIN, her2_scores, staining
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


def rejections(tiles: Frame) -> Frame:
    """Return the number of tiles per group (rows), accepted and by reason (columns, in order)."""
    reason = tiles["reason"].fillna(ACCEPTED)
    counts = tiles.groupby([*GROUP, reason]).size().rename("tiles").reset_index()
    table = counts.pivot_table("tiles", GROUP, "reason", "sum", fill_value=0)
    return table.reindex(
        columns=[ACCEPTED, *(name for name in REASONS if name in table)], fill_value=0
    )


@dataclasses.dataclass(frozen=True)
class Bias:
    """A score whose tiles are accepted more or less often than the others of its data set.

    `reason` has the largest contribution to the difference.
    """

    dataset: str
    score: str
    fraction: float
    other_fraction: float
    reason: str


def comparable(table: Frame) -> Frame:
    """Return the rows of `rejections` that `selection_bias` compares: two scores or more each."""
    known = table.index.get_level_values("score").isin(SCORES)
    rows = table[known & (table.sum(axis=1) >= BIAS_TILES_MIN)]
    return rows.groupby(level="dataset").filter(lambda own: len(own) > 1)


def selection_bias(table: Frame) -> list[Bias]:
    """Return the scores that the filters select against, or for, from `rejections`.

    The score with the largest difference is left out before the others are compared.
    """
    found = []
    for dataset, rows in comparable(table).groupby(level="dataset"):
        own = rows.droplevel("dataset").iloc[::-1]
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


def mask_statistics(tiles: Frame, engine: str) -> Frame:
    """Return what the masks of an engine contain, a row per group of tiles.

    Returns:
        `tiles`; `median` of the positive fraction, and `empty`, the fraction of tiles without a
        positive pixel; `cells_per_mm2`; `positive`, `weak`, `moderate` and `strong` fractions of
        the cells, NaN without a cell; `excluded`, the mean fraction of a tile.
    """
    tiles = tiles[tiles[f"{engine}_positive_fraction"].notna()]
    tiles = tiles.assign(
        area_mm2=(tiles["size_px"] * tiles["mpp"] / 1000) ** 2,
        is_empty=tiles[f"{engine}_positive_fraction"] == 0,
    )
    groups = tiles.groupby(GROUP)
    found = groups.agg(
        tiles=("tile", "size"),
        median=(f"{engine}_positive_fraction", "median"),
        empty=("is_empty", "mean"),
        excluded=(f"{engine}_excluded_fraction", "mean"),
    )
    cells = groups[f"{engine}_cells"].sum()
    found["cells_per_mm2"] = cells / groups["area_mm2"].sum()
    for name in ("positive", *INTENSITIES):
        found[name] = groups[f"{engine}_{name}_cells"].sum() / cells
    return found


def agreement(tiles: Frame, engines: Sequence[str]) -> Frame:
    """Return the agreement of each mask engine with the one with which it agrees least.

    Two engines have the same agreement: it is listed for the first.

    Returns:
        A row per tile and engine, least agreement first: the columns of `tiles`, `engine`, `dice`,
        `sign` of matched cells, `empty` (no engine found a positive pixel), `verdict`.
    """
    fractions = tiles[[f"{engine}_positive_fraction" for engine in engines]]
    found = pd.concat(
        tiles.assign(
            engine=engine,
            dice=tiles[f"{engine}_agreement_dice"].astype(float),
            sign=tiles[f"{engine}_agreement_sign"].astype(float),
            empty=(fractions == 0).all(axis=1),
        )
        for engine in (engines[:1] if len(engines) == 2 else engines)
    )
    found = found[found["dice"].notna()]
    found["least"] = found[["dice", "sign"]].min(axis=1)
    found["verdict"] = [suitability(row.dice, row.sign) for row in found.itertuples()]
    return found.sort_values(["least", "tile", "engine"])


def agreement_summary(compared: Frame) -> dict[str, Any]:
    """Summarise rows of `agreement` of one engine; dice and sign without the empty tiles."""
    dice, sign = compared.loc[~compared["empty"], ["dice", "sign"]].mean()
    counts = compared["verdict"].value_counts().reindex(SUITABILITIES, fill_value=0)
    return {
        "tiles": len(compared),
        "empty": compared["empty"].sum(),
        "dice": dice,
        "sign": sign,
        "verdict": "" if np.isnan(dice) else suitability(dice, sign),
        **counts,
    }


def score_confusion(
    tiles: Frame, engine: str, by: str, intense_fraction: float | None = None
) -> Frame:
    """Compare the score of the sheet with the ASCO/CAP score of an engine's cells.

    Args:
        by: `tile`, or `case`: the cells of all its tiles are added first.
        intense_fraction: as for `her2_scores`; ultralow counts as 0.

    Returns:
        Counts: rows are scores of the sheet that occur, columns the computed ones; the column with
        the empty name counts those without cells.
    """
    known = tiles[tiles["score"].isin(SCORES)]
    cells = _intensities(known, engine).groupby([known[by], known["score"]]).sum()
    names = np.array([SCORES[0], *SCORES, ""], dtype=object)
    computed = names[her2_scores(cells.to_numpy(np.int64), intense_fraction)]
    table = pd.crosstab(cells.index.get_level_values("score"), computed)
    rows = [score for score in SCORES if score in table.index]
    return table.reindex(index=rows, columns=[*SCORES, ""], fill_value=0)


def with_few_tiles(tiles: Frame) -> Frame:
    """Return the tiles of cases with fewer than `BLOCKS_MIN` tiles."""
    return tiles[tiles.groupby("case")["tile"].transform("size") < BLOCKS_MIN]


def case_staining(tiles: Frame, engine: str, cells: Frame) -> Frame:
    """Return the staining of each case: a frame with the columns of `tables.STAINING`.

    Intervals are from the tiles, or from the quarters of the tiles of a case with few.

    Args:
        tiles: with the columns of the index.
        engine: whose masks are read.
        cells: rows of `tables.CELLS` of the tiles `with_few_tiles`.
    """
    counts = _intensities(tiles, engine)
    total = counts.sum(axis=1)
    means = tiles[[f"{engine}_membrane_od", f"{engine}_cytoplasm_od"]].astype(float)
    # A tile without cells adds nothing; other engines than `stain` may not measure densities.
    sums = means.mul(total, axis=0).mask(total == 0, 0.0)
    quarters = _quarters(cells[cells["engine"] == engine], with_few_tiles(tiles))
    rows = []
    for case, own in tiles.groupby("case"):
        values = counts.loc[own.index].to_numpy(np.int64)
        membrane_od, cytoplasm = sums.loc[own.index].to_numpy().T
        cell_count = int(values.sum())
        cytoplasm_od = cytoplasm.sum() / cell_count if cell_count else np.nan
        blocks, parts = "tiles", 1
        if len(own) < BLOCKS_MIN:
            few = quarters.loc[own["tile"]]
            values = few[[*range(4)]].to_numpy(np.int64)
            membrane_od = few["membrane_od"].to_numpy(float)
            blocks, parts = "quarters", 4
        found = staining(values, membrane_od, seed=0, parts=parts)
        if np.isnan(found.h_score.low):
            blocks = ""
        dataset, score = own[GROUP].iloc[0]
        named = [engine, case, dataset, score, len(own), cell_count, blocks]
        densities = *found.membrane_od, cytoplasm_od
        rows.append([*named, *found.h_score, *densities, *found.probabilities])
    return pd.DataFrame(rows, columns=tables.STAINING.names).sort_values([*GROUP, "h_score"])


def case_counts(tiles: Frame, engine: str) -> Frame:
    """Return the cells of intensity 0 to 3 of each case, over all its tiles."""
    return _intensities(tiles, engine).groupby(tiles["case"]).sum()


def _quarters(cells: Frame, tiles: Frame) -> Frame:
    """Return the cells of intensity 0 to 3 and the sum of their densities, four rows per tile."""
    sizes = tiles.set_index("tile")["size_px"]
    cells = cells[cells["tile"].isin(sizes.index)]
    half = cells["tile"].map(sizes).astype(float) / 2
    number = 2 * (cells["y_px"] >= half) + (cells["x_px"] >= half)
    places = pd.MultiIndex.from_product([sizes.index, range(4)], names=["tile", "quarter"])
    groups = cells.assign(quarter=number).groupby(["tile", "quarter"])
    counts = groups["intensity"].value_counts().unstack(fill_value=0)
    counts = counts.reindex(index=places, columns=range(4), fill_value=0)
    sums = groups["membrane_od"].sum(min_count=1).reindex(places)
    return counts.assign(membrane_od=sums.mask(counts.sum(axis=1) == 0, 0.0)).droplevel("quarter")


def _intensities(tiles: Frame, engine: str) -> Frame:
    """Return the cells of intensity 0 to 3 of each tile."""
    stained = tiles[[f"{engine}_{name}_cells" for name in INTENSITIES]].fillna(0)
    stained.insert(0, "none", tiles[f"{engine}_cells"].fillna(0) - stained.sum(axis=1))
    return stained


def split_counts(tiles: Frame, column: str = "split") -> Frame:
    """Return the number of `tiles` and `cases` per split."""
    found = tiles.groupby(column).agg(tiles=("tile", "size"), cases=("case", "nunique"))
    return found.reindex(list(SPLITS), fill_value=0)


def sample(groups: Sequence[str], names: Sequence[str], count: int, seed: int) -> list[int]:
    """Draw at most `count` places by a hash of seed and name, one of each group in turn.

    Few of the drawn change when others are added. They are ordered by group and name.
    """
    keys = [hashlib.sha256(f"{seed}/report/{name}".encode()).digest() for name in names]
    places = pd.DataFrame({"group": groups, "name": names, "key": keys}).sort_values("key")
    places["turn"] = places.groupby("group").cumcount()
    drawn = places.sort_values(["turn", "group"])[:count]
    return drawn.sort_values(["group", "name"]).index.tolist()
