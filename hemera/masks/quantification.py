"""HER2 staining of a case from its cells: H-score, membrane density, probability of each score.

All figures have confidence intervals by a bootstrap over the tiles of the case. They describe the
tissue as the mask engine sees it and are a proxy, not a diagnosis.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
from scipy import stats

CLASSES = ("none", "faint", "weak", "moderate", "strong")
"""Classes of cells: faint is stained, but over too little of the membrane to be weak."""
SCORES = ("0", "ultralow", "1+", "2+", "3+")

TILES_MIN = 4
"""Fewer tiles than this do not support an interval: blocks of the tiles are resampled instead."""
# ASCO/CAP (Wolff et al., J Clin Oncol 36, 2018): a score needs more than 10 % of the cells.
_FRACTION = 0.10
# Smallest fraction of faint or weaker-than-score cells of ultralow; the guideline has any cell, of
# which a detector finds some in every unstained section.
_ULTRALOW_FRACTION = 0.01

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Interval:
    """A value with its confidence interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Quantification:
    """Staining of a case.

    `h_score` is 0 to 300; `membrane_od` is the mean optical density of DAB on the membranes of its
    cells; `probabilities` are the fractions of the resamples that have each of `SCORES`.
    """

    cells: int
    h_score: Interval
    membrane_od: Interval
    score: str
    probabilities: tuple[float, ...]


def h_scores(counts: Counts) -> Floats:
    """Return the H-score of each row of cell counts, 0 to 300; NaN without cells.

    1 x weak + 2 x moderate + 3 x strong, in percent of the cells (McCarty et al., Arch Pathol Lab
    Med 109, 1985); faint cells count as unstained.

    Args:
        counts: (N, 5), cells of each of `CLASSES`.
    """
    with np.errstate(invalid="ignore"):
        return np.asarray(100 * (counts @ (0, 0, 1, 2, 3)) / counts.sum(axis=1))


def scores(counts: Counts) -> npt.NDArray[np.int64]:
    """Return the place in `SCORES` of each row of cell counts (N, 5) that has cells.

    The strongest class that, with the classes above it, more than 10 % of the cells reach; below
    1+, ultralow where more than 1 % are faint or weak.
    """
    total = counts.sum(axis=1)
    # Of 3+, 2+, 1+: cells that reach the class.
    reached = np.cumsum(counts[:, :1:-1], axis=1) > _FRACTION * total[:, None]
    ultralow = counts[:, 1:].sum(axis=1) > _ULTRALOW_FRACTION * total
    place = np.where(reached.any(axis=1), 4 - reached.argmax(axis=1), ultralow)
    return np.asarray(place, np.int64)


def quantify(
    counts: Counts,
    od_sums: Floats,
    *,
    seed: int,
    samples: int = 1000,
    confidence: float = 0.90,
) -> Quantification | None:
    """Quantify a case from its tiles, or from the blocks of few tiles; None without cells.

    The interval is the expanded percentile interval of the bootstrap (Hesterberg, Am Stat 69,
    2015), because the plain one is too narrow for few tiles.

    Args:
        counts: (N, 5), cells of each of `CLASSES` per tile or block.
        od_sums: (N,), summed membrane density of the cells of each.
        seed: of the bootstrap.
        samples: number of resamples.
        confidence: of the intervals, 0 to 1.
    """
    count, cells = len(counts), int(counts.sum())
    if not cells:
        return None
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), samples)
    drawn = weights @ counts
    # A resample of tiles without cells is no section.
    kept = drawn.sum(axis=1) > 0
    drawn, drawn_od = drawn[kept], (weights @ od_sums)[kept]
    tail = (1 - confidence) / 2
    if count > 1:
        width = np.sqrt(count / (count - 1)) * stats.t.ppf(1 - tail, count - 1)
        tail = float(stats.norm.cdf(-width))

    def interval(value: float, resampled: Floats) -> Interval:
        low, high = np.quantile(resampled, [tail, 1 - tail])
        return Interval(float(value), float(low), float(high))

    whole = counts.sum(axis=0, keepdims=True)
    found = np.bincount(scores(drawn), minlength=len(SCORES)) / len(drawn)
    return Quantification(
        cells,
        interval(h_scores(whole)[0], h_scores(drawn)),
        interval(od_sums.sum() / cells, drawn_od / drawn.sum(axis=1)),
        SCORES[int(scores(whole)[0])],
        tuple(found.tolist()),
    )
