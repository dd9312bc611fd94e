"""HER2 score, H-score and membrane density of cells, with intervals over the tiles of a case.

All cells of an engine count, with the intensity that `completeness_min` of their membrane reaches;
the guideline counts tumour cells with complete membranes. A proxy, not a diagnosis.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special

CLASSES = ("0", "ultralow", "1+", "2+", "3+")

FRACTION = 0.10
"""Of the cells that must be exceeded; exactly 10 % is not enough."""
ULTRALOW_FRACTION = 0.01
"""Of the cells that must be exceeded by stained ones for ultralow instead of 0. Any stained cell is
enough in the guideline; a detector finds some in every unstained section."""
BLOCKS_MIN = 4
"""Fewer blocks support no interval."""

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Estimate(NamedTuple):
    """A value of a case and its interval, NaN where there is none."""

    value: float
    low: float
    high: float


class Staining(NamedTuple):
    """H-score and mean membrane density of a case; fraction of resamples of each of `CLASSES`."""

    h_score: Estimate
    membrane_od: Estimate
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
    counts: Counts,
    membrane_od: Floats,
    *,
    seed: int,
    samples: int = 1000,
    confidence: float = 0.90,
) -> Staining:
    """Return the staining of a case from the cells of its blocks; NaN where there is none.

    A block is a tile, or a quarter of one where a case has fewer tiles than `BLOCKS_MIN`. The
    intervals are the expanded percentile intervals of a bootstrap of the blocks (Hesterberg, Am
    Stat 69, 2015), because the plain ones are too narrow for few blocks.

    Args:
        counts: (N, 4), cells of intensity 0 to 3 of each block.
        membrane_od: (N,), sum of the membrane densities of its cells.
        seed: of the bootstrap.
        samples: number of resamples.
        confidence: of the intervals.
    """
    count = len(counts)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), samples)
    drawn = weights @ counts
    used = drawn.sum(axis=1) > 0
    drawn, sums = drawn[used], (weights @ membrane_od)[used]
    h_score = float(h_scores(counts.sum(axis=0, keepdims=True))[0])
    with np.errstate(invalid="ignore"):
        mean_od = float(membrane_od.sum() / counts.sum())
    if count < BLOCKS_MIN or not len(drawn):
        nothing = np.nan, np.nan
        unknown = (np.nan,) * len(CLASSES)
        return Staining(Estimate(h_score, *nothing), Estimate(mean_od, *nothing), unknown)
    width = np.sqrt(count / (count - 1)) * special.stdtrit(count - 1, (1 + confidence) / 2)
    tail = special.ndtr(-width)

    def interval(values: Floats) -> tuple[float, float]:
        low, high = np.quantile(values, [tail, 1 - tail])
        return float(low), float(high)

    found = np.bincount(her2_scores(drawn), minlength=len(CLASSES)) / len(drawn)
    return Staining(
        Estimate(h_score, *interval(h_scores(drawn))),
        Estimate(mean_od, *interval(sums / drawn.sum(axis=1))),
        tuple(found.tolist()),
    )
