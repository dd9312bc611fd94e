"""What cells and masks say together: matches, agreement of two engines, and the ASCO/CAP reading.

The reading is that of Wolff et al. (J Clin Oncol 36, 2018) as far as counts of cells can carry it:
a rule for tumour cells, applied to all cells that an engine finds; and where it asks for complete
membranes, a cell's intensity is what `mask.completeness_min` of its membrane reaches. A proxy, and
no diagnosis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.spatial import KDTree

from hemera.masks import label_format
from hemera.sheet import SCORES

APART_UM = 4.0
"""Two engines' centroids of one nucleus lie no further apart."""

SUITABLE_MIN = 0.7
DOUBTFUL_MIN = 0.4

Points = npt.NDArray[np.floating]


def matched(first: Points, second: Points, distance: float) -> npt.NDArray[np.int64]:
    """Match points that are nearest to each other and no further apart than `distance`.

    Args:
        first: (N, 2).
        second: (M, 2), in the same unit.
        distance: in that unit.

    Returns:
        (N,): for each point of `first` the row of its partner in `second`, -1 without one.
    """
    result = np.full(len(first), -1, np.int64)
    if not len(first) or not len(second):
        return result
    apart, there = KDTree(second).query(first)
    _, back = KDTree(first).query(second)
    mutual = (apart <= distance) & (back[there] == np.arange(len(first)))
    result[mutual] = there[mutual]
    return result


def dice(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> float:
    """Return the overlap of two masks, 0 to 1; two empty masks agree wholly."""
    total = int(np.count_nonzero(first)) + int(np.count_nonzero(second))
    return 2 * int(np.count_nonzero(first & second)) / total if total else 1.0


def sign_agreement(
    first: label_format.Cells, second: label_format.Cells, mpp: float
) -> tuple[float | None, int]:
    """Return the share of matched cells that two engines give the same sign, and how many match.

    Args:
        first: cells of one engine.
        second: of the other, on the same tile.
        mpp: its resolution, um/px.

    Returns:
        The share is None where no cell matches.
    """
    mine, theirs = (np.column_stack([cells.x_px, cells.y_px]) for cells in (first, second))
    at = matched(mine, theirs, APART_UM / mpp)
    both = at >= 0
    count = int(both.sum())
    if not count:
        return None, 0
    return float(np.mean(first.positive[both] == second.positive[at[both]])), count


def suitability(dice: float, sign: float | None) -> str:
    """Return what the agreement of two engines makes of a tile or a cohort's labels.

    Args:
        dice: of their positive masks, 0 to 1.
        sign: share of matched cells of the same sign; None or NaN: none matched.

    Returns:
        ``suitable`` when both are at least 0.7, ``unsuitable`` when one is below 0.4, else
        ``doubtful``.
    """
    least = dice if sign is None or math.isnan(sign) else min(dice, sign)
    if least >= SUITABLE_MIN:
        return "suitable"
    return "doubtful" if least >= DOUBTFUL_MIN else "unsuitable"


def reading(
    counts: Sequence[float], *, share: float = 0.10, intense_share: float | None = None
) -> str:
    """Read a HER2 score from cells by intensity; an empty text without any cell.

    3+ when more than `share` of the cells are strong; else 2+ when more than `share` are moderate
    or strong; else 1+ when more than `share` are stained at all; else 0. Exactly `share` is not
    more.

    Args:
        counts: cells of intensity 0, 1, 2 and 3.
        share: 10 % in ASCO/CAP's guideline, strict.
        intense_share: 2+ also when strong cells are more than this, be they fewer than `share`, as
            the guideline of 2018 reads; None: that clause is left out.
    """
    none, weak, moderate, strong = (float(count) for count in counts)
    total = none + weak + moderate + strong
    if not total > 0:
        return ""
    limit = share * total
    if strong > limit:
        return SCORES[3]
    few_intense = intense_share is not None and strong > intense_share * total
    if moderate + strong > limit or few_intense:
        return SCORES[2]
    return SCORES[1] if weak + moderate + strong > limit else SCORES[0]
