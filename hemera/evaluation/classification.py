"""Metrics of the predicted status and score of cases, with bootstrap intervals over cases.

Every metric is a function of weights of the cases (S, N), whole numbers, so that all bootstrap
samples are computed at once; weights of 1 give the metric itself. They equal scikit-learn's.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hemera.evaluation.metrics import ratio

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


class Interval(NamedTuple):
    """A value with its bootstrap interval; None: undefined."""

    value: float | None
    low: float | None = None
    high: float | None = None


def resample(labels: npt.NDArray[np.generic], samples: int, seed: int) -> Floats:
    """Return how often each case is in each bootstrap sample, (S, N), drawn within each label."""
    draws = np.random.default_rng(seed)
    weights = np.zeros((samples, len(labels)))
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        even = np.full(len(places), 1 / len(places))
        weights[:, places] = draws.multinomial(len(places), even, size=samples)
    return weights


def interval(value: Floats, sampled: Floats, confidence: float) -> Interval:
    """Return a value, (1,), and the percentile interval of its samples (S,) that are finite."""
    if not np.isfinite(value[0]):
        return Interval(None)
    finite = sampled[np.isfinite(sampled)]
    if not len(finite):
        return Interval(float(value[0]))
    low, high = np.quantile(finite, ((1 - confidence) / 2, (1 + confidence) / 2))
    return Interval(float(value[0]), float(low), float(high))


def auc(truth: Bools, score: Floats, weights: Floats) -> Floats:
    """Return the area under the ROC curve, ties 1/2, (S,); NaN where one class is missing."""
    of_pairs = np.sign(score[truth][:, None] - score[~truth][None]) / 2 + 0.5
    positive, negative = weights[:, truth], weights[:, ~truth]
    won = ((positive @ of_pairs) * negative).sum(1)
    return ratio(won, positive.sum(1) * negative.sum(1))


def auc_within_sites(
    truth: Bools, score: Floats, weights: Floats, site: npt.NDArray[np.str_]
) -> Floats:
    """Return the fraction of pairs of one site that are in order, (S,); NaN where no site has any.

    Unlike `auc`, it gains nothing from a site that is recognised, and loses nothing where models
    of several sites differ in their mean probability.
    """
    won, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    for each in np.unique(site):
        own = site == each
        positive, negative = (weights[:, own & kind].sum(1) for kind in (truth, ~truth))
        found = auc(truth[own], score[own], weights[:, own])
        won += np.nan_to_num(found) * positive * negative
        pairs += positive * negative
    return ratio(won, pairs)


def _ordered(truth: Bools, score: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Return true and false positives (S, T) from each distinct score on, highest first."""
    order = np.argsort(-score, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))
    sorted_weights, positive = weights[:, order], truth[order]
    return (
        np.cumsum(sorted_weights * positive, axis=1)[:, ends],
        np.cumsum(sorted_weights * ~positive, axis=1)[:, ends],
    )


def average_precision(truth: Bools, score: Floats, weights: Floats) -> Floats:
    """Return the mean precision over the steps of recall, (S,)."""
    hits, false = _ordered(truth, score, weights)
    precision = np.nan_to_num(ratio(hits, hits + false))
    gained = np.diff(hits, axis=1, prepend=0)
    return ratio((precision * gained).sum(1), hits[:, -1])


def specificity_at(truth: Bools, score: Floats, weights: Floats, sensitivity: float) -> Floats:
    """Return the specificity at the highest threshold with at least this sensitivity, (S,)."""
    hits, false = _ordered(truth, score, weights)
    enough = hits >= sensitivity * hits[:, -1:] - 1e-9
    first = np.argmax(enough, axis=1)[:, None]
    negative = false[:, -1]
    return ratio(negative - np.take_along_axis(false, first, 1)[:, 0], negative)


def decisions(truth: Bools, predicted: Bools, weights: Floats) -> dict[str, Floats]:
    """Return the metrics of hard decisions, (S,) each.

    `f1` is of the positive class; `f1_weighted`, `precision_weighted` and `recall_weighted` are
    means over both classes by their numbers of cases, as Oliveira et al. state them.
    """
    tp, fp = weights @ (truth & predicted), weights @ (~truth & predicted)
    fn, tn = weights @ (truth & ~predicted), weights @ (~truth & ~predicted)
    sensitivity, specificity = ratio(tp, tp + fn), ratio(tn, tn + fp)
    total = tp + fp + fn + tn
    found = {
        "accuracy": ratio(tp + tn, total),
        "balanced_accuracy": (sensitivity + specificity) / 2,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "f1": np.nan_to_num(ratio(2 * tp, 2 * tp + fp + fn)),
    }
    # A class that is never predicted has a precision of 0.
    for name, of_positive, of_negative in (
        ("precision", ratio(tp, tp + fp), ratio(tn, tn + fn)),
        ("recall", sensitivity, specificity),
        ("f1", ratio(2 * tp, 2 * tp + fp + fn), ratio(2 * tn, 2 * tn + fp + fn)),
    ):
        sums = np.nan_to_num(of_positive) * (tp + fn) + np.nan_to_num(of_negative) * (tn + fp)
        found[f"{name}_weighted"] = ratio(sums, total)
    return found


def brier(truth: Bools, probability: Floats, weights: Floats) -> Floats:
    """Return the mean squared difference of probability and truth, (S,)."""
    return ratio(weights @ np.square(probability - truth), weights.sum(1))


def calibration_bins(
    truth: Bools, probability: Floats, bins: int
) -> list[tuple[float, float, int]]:
    """Return mean probability, fraction positive and number of cases of equally large bins."""
    order = np.argsort(probability, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return [
        (float(probability[part].mean()), float(truth[part].mean()), len(part)) for part in parts
    ]


def calibration_error(truth: Bools, probability: Floats, bins: int) -> float:
    """Return the mean difference of probability and frequency over bins of equally many cases."""
    found = calibration_bins(truth, probability, bins)
    return sum(abs(mean - part) * count for mean, part, count in found) / max(1, len(truth))


def calibration_line(truth: Bools, logit: Floats) -> tuple[float | None, float | None]:
    """Return slope and intercept of a logistic regression of the truth on the logit.

    1 and 0 where calibrated; None where the classes are separated by the logit, or one is missing.
    """
    if truth.all() or not truth.any() or np.ptp(logit) < 1e-9:
        return None, None
    if logit[truth].min() > logit[~truth].max() or logit[truth].max() < logit[~truth].min():
        return None, None
    design = np.stack([logit, np.ones_like(logit)], axis=1)
    line = np.zeros(2)
    for _ in range(100):
        expected = 1 / (1 + np.exp(-np.clip(design @ line, -30, 30)))
        curvature = design.T @ (design * (expected * (1 - expected))[:, None])
        step = np.linalg.lstsq(curvature, design.T @ (truth - expected), rcond=None)[0]
        line = line + np.clip(step, -5, 5)
        if np.abs(step).max() < 1e-10:
            break
    return float(line[0]), float(line[1])


def net_benefit(truth: Bools, probability: Floats, threshold: float) -> float:
    """Return TP / n - FP / n * t / (1 - t) of treating from a probability on (Vickers 2006)."""
    treated = probability >= threshold
    hits, false = int((truth & treated).sum()), int((~truth & treated).sum())
    return (hits - false * threshold / (1 - threshold)) / len(truth)


def ordinal(truth: Ints, predicted: Ints, weights: Floats, classes: int = 4) -> dict[str, Floats]:
    """Return accuracy, quadratic kappa and mean absolute error of scores 0, 1, ..., (S,) each.

    Kappa is 0 where the prediction is constant and the truth is not, NaN where both are.
    """
    difference = predicted - truth
    total = weights.sum(1)
    squares = np.square(np.subtract.outer(np.arange(classes), np.arange(classes)))
    rows, columns = (
        weights @ (labels[:, None] == np.arange(classes)) for labels in (truth, predicted)
    )
    expected = ratio(np.einsum("sa,ab,sb->s", rows, squares, columns), total)
    return {
        "accuracy": ratio(weights @ (difference == 0), total),
        "qwk": 1 - ratio(weights @ np.square(difference), expected),
        "mean_absolute_error": ratio(weights @ np.abs(difference), total),
    }


def cramers_v(counts: npt.NDArray[np.generic]) -> float | None:
    """Return Cramer's V of a table of counts (A, B), 0 to 1; None with one row or column."""
    table = np.asarray(counts, np.float64)
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]
    if min(table.shape, default=0) < 2:
        return None
    expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
    statistic = (np.square(table - expected) / expected).sum()
    return float(np.sqrt(statistic / (table.sum() * (min(table.shape) - 1))))


def status_metrics(
    truth: Bools,
    predicted: Bools,
    values: Mapping[str, Floats],
    weights: Floats,
    sensitivity: float,
) -> dict[str, Floats]:
    """Return the metrics of status, (S,) each.

    `values` are probability and, of methods that have one, calibrated, (N,).
    """
    probability = values["probability"]
    return {
        "auc": auc(truth, probability, weights),
        "average_precision": average_precision(truth, probability, weights),
        **decisions(truth, predicted, weights),
        "specificity_at_sensitivity": specificity_at(truth, probability, weights, sensitivity),
        "brier": brier(truth, probability, weights),
        **(
            {"brier_calibrated": brier(truth, values["calibrated"], weights)}
            if "calibrated" in values
            else {}
        ),
    }
