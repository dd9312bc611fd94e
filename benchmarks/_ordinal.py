"""Agreement of measured values with ordered scores, and scores read from values."""

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr


def kappa(true: npt.NDArray, read: npt.NDArray, classes: int = 4) -> float:
    """Return Cohen's kappa with quadratic weights."""
    seen = np.zeros((classes, classes))
    np.add.at(seen, (true.astype(int), read.astype(int)), 1)
    weights = np.subtract.outer(np.arange(classes), np.arange(classes)) ** 2
    expected = np.outer(seen.sum(axis=1), seen.sum(axis=0)) / seen.sum()
    return float(1 - (weights * seen).sum() / max((weights * expected).sum(), 1e-9))


def rho(true: npt.NDArray, values: npt.NDArray) -> float:
    """Return Spearman's correlation, 0 where one of the two is constant."""
    if len(set(true)) < 2 or len(set(values)) < 2:
        return 0.0
    return float(spearmanr(values, true)[0])


def fitted(values: npt.NDArray, true: npt.NDArray) -> npt.NDArray:
    """Return the three thresholds of values that agree best with the scores."""
    ordered = np.unique(values)
    cuts = np.r_[ordered[0] - 1, (ordered[1:] + ordered[:-1]) / 2, ordered[-1] + 1]
    found = max(
        itertools.combinations(cuts, 3), key=lambda c: kappa(true, np.searchsorted(c, values))
    )
    return np.array(found)


def read_from_others(values: npt.NDArray, true: npt.NDArray, source: Sequence[str]) -> npt.NDArray:
    """Return the scores read from values, with thresholds fitted to the other sources."""
    of = np.array(source)
    read = np.zeros(len(values), int)
    for name in set(source):
        own = of == name
        read[own] = np.searchsorted(fitted(values[~own], true[~own]), values[own])
    return read
