"""Agreement of mask engines: matched cells, sign agreement, Dice of the positive masks."""

import dataclasses
import itertools
import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from scipy.spatial import KDTree

from hemera.masks.label_format import Cells, Labelled, positive

MATCH_UM = 4.0
"""Largest distance between the centroids that two engines find for one nucleus."""

SUITABLE_MIN = 0.7
DOUBTFUL_MIN = 0.4

Points = npt.NDArray[np.floating]


def matched(first: Points, second: Points, distance: float) -> npt.NDArray[np.int64]:
    """Return for each point (N, 2) the row of its match among others (M, 2), -1 without one.

    A match is nearest in both directions, and within `distance`.
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
    """Return the Dice coefficient of two masks, 0 to 1; of two empty masks 1."""
    total = int(np.count_nonzero(first)) + int(np.count_nonzero(second))
    return 2 * int(np.count_nonzero(first & second)) / total if total else 1.0


def sign_agreement(first: Cells, second: Cells, mpp: float) -> tuple[float | None, int]:
    """Return which fraction of matched cells has the same sign, None without any, and how many."""
    mine, other = (np.column_stack([cells.x_px, cells.y_px]) for cells in (first, second))
    at = matched(mine, other, MATCH_UM / mpp)
    both = at >= 0
    count = int(both.sum())
    if not count:
        return None, 0
    return float(np.mean(first.positive[both] == second.positive[at[both]])), count


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Agreement of two engines on a tile."""

    dice: float
    """Of their positive masks, 0 to 1."""
    sign: float | None
    """Fraction of matched cells with the same sign; None: none matched."""
    cells: int
    """Matched cells."""

    @property
    def lower(self) -> float:
        """The lower of Dice and sign; Dice where no cell matched."""
        return self.dice if self.sign is None else min(self.dice, self.sign)


def lowest_agreements(labelled: Mapping[str, Labelled], mpp: float) -> dict[str, Agreement]:
    """Return the agreement of each engine with the other engine with which it agrees least.

    `labelled` are the results on one tile of `mpp` um/px; a single engine has no agreement.
    """
    lowest: dict[str, Agreement] = {}
    for names in itertools.combinations(labelled, 2):
        first, second = (labelled[name] for name in names)
        sign, cells = sign_agreement(first.cells, second.cells, mpp)
        found = Agreement(dice(positive(first.mask), positive(second.mask)), sign, cells)
        for name in names:
            if name not in lowest or found.lower < lowest[name].lower:
                lowest[name] = found
    return lowest


def suitability(dice: float, sign: float | None) -> str:
    """Return whether labels are suitable, doubtful or unsuitable from an `Agreement`.

    `sign` may be None or NaN: no cell matched.
    """
    lower = dice if sign is None or math.isnan(sign) else min(dice, sign)
    if lower >= SUITABLE_MIN:
        return "suitable"
    return "doubtful" if lower >= DOUBTFUL_MIN else "unsuitable"
