"""HER2 score and H-score of cells by staining intensity, with intervals over the tiles of a case.

All cells of an engine count, with the intensity that `completeness_min` of their membrane reaches;
the guideline counts tumour cells with complete membranes. A proxy, not a diagnosis.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

CLASSES = ("0", "ultralow", "1+", "2+", "3+")

FRACTION = 0.10
"""Of the cells that must be exceeded; exactly 10 % is not enough."""
ULTRALOW_FRACTION = 0.01
"""Of the cells that must be exceeded by stained ones for ultralow instead of 0. Any stained cell is
enough in the guideline; a detector finds some in every unstained section."""
TILES_MIN = 4
"""Fewer tiles support no interval."""

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Staining(NamedTuple):
    """H-score of a case with its interval, and the fraction of resamples of each of `CLASSES`."""

    h_score: float
    low: float
    high: float
    probabilities: tuple[float, ...]


def her2_scores(counts: Counts, intense_fraction: float | None = None) -> npt.NDArray[np.int64]:
    """Return the place in `CLASSES` of each row of counted cells; -1 without any cell.

    ASCO/CAP (Wolff et al., J Clin Oncol 36, 2018): 3+ when more than `FRACTION` are strong; else 2+
    when more are moderate or strong; else 1+ when more are stained at all. Ultralow is below 1+
    with more than `ULTRALOW_FRACTION` stained.

    Args:
        counts: (N, 4), cells of intensity 0 to 3.
        intense_fraction: 2+ also when more than this are strong, as in the guideline of 2018.
    """
    total = counts.sum(axis=1)
    stained, moderate, strong = (counts[:, least:].sum(axis=1) for least in (1, 2, 3))
    few_intense = intense_fraction is not None and strong > intense_fraction * total
    reached = [
        total == 0,
        strong > FRACTION * total,
        (moderate > FRACTION * total) | few_intense,
        stained > FRACTION * total,
        stained > ULTRALOW_FRACTION * total,
    ]
    return np.select(reached, [-1, 4, 3, 2, 1], 0)


def h_scores(counts: Counts) -> Floats:
    """Return the H-score, 0 to 300, of each row of counts (N, 4); NaN without cells.

    Percent of weak, twice that of moderate, three times that of strong cells (McCarty et al., Arch
    Pathol Lab Med 109, 1985).
    """
    with np.errstate(invalid="ignore"):
        return np.asarray(100 * (counts @ (0, 1, 2, 3)) / counts.sum(axis=1))


def staining(
    counts: Counts, *, seed: int, samples: int = 1000, confidence: float = 0.90
) -> Staining:
    """Return the staining of a case from the cells of its tiles; NaN where there is none.

    The interval is the expanded percentile interval of a bootstrap of the tiles (Hesterberg, Am
    Stat 69, 2015), because the plain one is too narrow for few tiles.

    Args:
        counts: (N, 4), cells of intensity 0 to 3 of each tile.
        seed: of the bootstrap.
        samples: number of resamples.
        confidence: of the interval.
    """
    count = len(counts)
    value = float(h_scores(counts.sum(axis=0, keepdims=True))[0])
    if count < TILES_MIN or np.isnan(value):
        return Staining(value, np.nan, np.nan, (np.nan,) * len(CLASSES))
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), samples)
    drawn = weights @ counts
    drawn = drawn[drawn.sum(axis=1) > 0]
    width = np.sqrt(count / (count - 1)) * stats.t.ppf((1 + confidence) / 2, count - 1)
    tail = stats.norm.cdf(-width)
    low, high = np.quantile(h_scores(drawn), [tail, 1 - tail])
    found = np.bincount(her2_scores(drawn), minlength=len(CLASSES)) / len(drawn)
    return Staining(value, float(low), float(high), tuple(found.tolist()))
