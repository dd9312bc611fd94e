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

# Correlation of the quarters of a tile: 0 to 0.8 on ten real HER2 images, 0.4 on average.
_QUARTER_CORRELATION = 0.4
# Smallest correlation of the cells of a tile: it is 0 to 0.3 on the same images, 0.1 on average.
_CELL_CORRELATION = 0.05
# Membrane density of a weak cell: that of simulated ones; between the thresholds of weak and of
# moderate staining, over a ring that is stained in part.
_WEAK_OD = 0.07
# Cells that are added to the four intensities; and those for the probabilities of a case without a
# stained cell, where equal parts make ultralow most probable. Chosen on simulated cases.
_PRIOR = np.full(4, 0.25)
_UNSTAINED_PRIOR = np.array([0.75, 1 / 12, 1 / 12, 1 / 12])

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Estimate(NamedTuple):
    """A value of a case and its interval, NaN where there is none."""

    value: float
    low: float
    high: float


class Staining(NamedTuple):
    """H-score and mean membrane density of a case; probability of each of `CLASSES`."""

    h_score: Estimate
    membrane_od: Estimate
    probabilities: tuple[float, ...]


def her2_scores(
    counts: Counts | Floats, intense_fraction: float | None = None
) -> npt.NDArray[np.int64]:
    """Return the place in `CLASSES` of each row of counted cells; -1 without any cell.

    ASCO/CAP (Wolff et al., J Clin Oncol 36, 2018): 3+ when more than `FRACTION` are strong; else 2+
    when more are moderate or strong; else 1+ when more are stained at all. Ultralow is below 1+
    with more than `ULTRALOW_FRACTION` stained.

    Args:
        counts: (N, 4), cells of intensity 0 to 3, or their fractions.
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
    parts: int = 1,
    samples: int = 2000,
    confidence: float = 0.90,
) -> Staining:
    """Return the staining of a case from the cells of its blocks; NaN where there is none.

    A block is a tile, or a quarter of one where a case has fewer tiles than `BLOCKS_MIN`. The cells
    of a block are alike, so they are as informative as a smaller number of independent cells: that
    with the same variance of the H-score, times the square of the ratio of the normal to Student's
    quantile (Korn and Graubard, Surv Methodol 24, 1998), and at most the number that follows from
    the smallest correlation of the cells of a tile, which is not estimated from the case. The
    fractions of the intensities have a Dirichlet distribution of that many cells and Perks' prior,
    one cell in all; the interval of the H-score and the probabilities of the classes are from draws
    of it. Without a stained cell the interval begins at 0, and three quarters of the prior are
    unstained for the probabilities; where all are strong, the interval ends at 300 (Brown et al.,
    Stat Sci 16, 2001).
    The membrane density has a log-normal distribution, with Student's quantile; its interval is at
    least as wide in proportion as that of the H-score, and ends no earlier than where all stained
    cells of the upper end of the H-score are weak.

    Args:
        counts: (N, 4), cells of intensity 0 to 3 of each block.
        membrane_od: (N,), sum of the membrane densities of its cells.
        seed: of the draws.
        parts: blocks per tile, whose correlation makes the variance larger.
        samples: number of draws.
        confidence: of the intervals.
    """
    cells = counts.sum(axis=1)
    total = int(cells.sum())
    h_score = float(h_scores(counts.sum(axis=0, keepdims=True))[0])
    with np.errstate(invalid="ignore"):
        mean_od = float(membrane_od.sum() / np.float64(total))
    if len(counts) < BLOCKS_MIN or not total:
        nothing = np.nan, np.nan
        unknown = (np.nan,) * len(CLASSES)
        return Staining(Estimate(h_score, *nothing), Estimate(mean_od, *nothing), unknown)
    used = max(int(np.count_nonzero(cells)), 2)
    tail = (1 - confidence) / 2
    quantile = special.stdtrit(used - 1, 1 - tail)
    fractions = counts.sum(axis=0) / total
    intensities = np.arange(4)
    spread = float(fractions @ (intensities - fractions @ intensities) ** 2)
    variance = _variance(counts @ intensities, cells, used, parts)
    # A few blocks may be alike by chance, as those without a stained cell are.
    most = total / (1 + max(parts * total / used - 1, 0) * _CELL_CORRELATION)
    effective = most
    if variance:
        effective = min(spread / variance * (special.ndtri(1 - tail) / quantile) ** 2, most)
    rng = np.random.default_rng(seed)
    drawn = rng.dirichlet(effective * fractions + _PRIOR, samples)
    low, high = np.quantile(100 * drawn @ intensities, [tail, 1 - tail])
    low, high = min(low, h_score), max(high, h_score)
    if fractions[0] == 1:
        low = 0.0
        drawn = rng.dirichlet(effective * fractions + _UNSTAINED_PRIOR, samples)
    if fractions[3] == 1:
        high = 300.0
    found = np.bincount(her2_scores(drawn), minlength=len(CLASSES)) / samples
    relative = _variance(membrane_od, cells, used, parts) / mean_od**2 if mean_od else 0.0
    factor = float(np.exp(quantile * np.sqrt(np.log1p(relative))))
    # Stained cells have the density, so it is at least as uncertain as the H-score.
    below, above = (low / h_score, high / h_score) if h_score else (0.0, 1.0)
    most_od = max(mean_od * max(factor, above), high / 100 * _WEAK_OD)
    return Staining(
        Estimate(h_score, float(low), float(high)),
        Estimate(mean_od, mean_od * min(1 / factor, below), most_od),
        tuple(found.tolist()),
    )


def _variance(sums: npt.NDArray[np.generic], cells: Counts, used: int, parts: int) -> float:
    """Return the variance of a mean per cell from the sums and cells of blocks (N,).

    That of a ratio of means of `used` blocks, times the design effect of `parts` correlated blocks
    per tile (Kish, Survey Sampling, 1965) over what the blocks of a sample differ less for it.
    """
    total = cells.sum()
    residual = sums - cells * (sums.sum() / total)
    variance = used / (used - 1) * float(residual @ residual) / float(total) ** 2
    shared = (parts - 1) * _QUARTER_CORRELATION
    return variance * (1 + shared) / max(1 - shared / (used - 1), 0.1)
