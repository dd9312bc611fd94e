"""The table of stage evaluate_status: metrics of all methods, parts and groups; controls."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from hemera.config import CELLS, EvaluateStatusOptions
from hemera.dataset.cases import SHUFFLED, STATUSES
from hemera.dataset.statistics import Frame
from hemera.evaluation import classification
from hemera.evaluation.classification import Interval
from hemera.sheet import SCORES

Rows = list[dict[str, Any]]

CONSTANTS = ("majority", "all_positive", "all_negative")
"""Answers that are the same for every case; of score only the first."""

COMMON = "common"
"""The group of the cases that every method has predicted."""

WITHIN_SITES = "auc_within_sites"
"""The metric that a method which recognises the site alone does not pass."""

CASES_MIN = 20
"""Cases of a class from which a claim can be made."""


@dataclasses.dataclass(frozen=True)
class Confounding:
    """Numbers of cases by status and site, and their association."""

    table: Frame
    cramers_v: float | None


def metrics(predictions: Frame, options: EvaluateStatusOptions) -> Rows:
    """Return the rows of `tables.STATUS_METRICS`.

    Args:
        predictions: `tables.STATUS_PREDICTIONS` of all methods, with dataset, site and score of
            the case, texts.
    """
    rows: Rows = []
    for (target, part), own in predictions.groupby(["target", "part"], sort=False):
        for group, members in _groups(own, str(part)):
            first = next(iter(members.groupby("method", sort=False)))[1]
            rows += _constants(first, str(target), str(part), group)
            methods = dict(list(members.groupby("method", sort=False)))
            for method, table in methods.items():
                base = {"method": method, "target": target, "part": part, "group": group}
                if part == SHUFFLED:
                    rows += _shuffled(table, base)
                    continue
                rows += _measured(table, base, options)
                if method != "floor" and "floor" in methods and group == "all":
                    rows += _difference(table, methods["floor"], base, options)
                if method != CELLS and CELLS in methods and group == "all":
                    rows += _agreement(table, methods[CELLS], base, options)
    return rows


def confounding(cases: Frame) -> Confounding:
    """Return how status and site of the cases that are used go together."""
    known = cases[(cases["state"] == "used") & cases["site"].notna()]
    table = pd.crosstab(known["site"], known["status"])
    return Confounding(table, classification.cramers_v(table.to_numpy()))


def _groups(table: Frame, part: str) -> Iterator[tuple[str, Frame]]:
    yield "all", table
    if part in (SHUFFLED,):
        return
    judged = [set(own["case"]) for _, own in table.groupby("method")]
    common = set.intersection(*judged)
    if common and any(own != common for own in judged):
        yield COMMON, table[table["case"].isin(common)]
    for column in ("dataset", "site", "score"):
        if table[column].nunique() > 1:
            for value, members in table.groupby(column):
                yield f"{column}={value}", members


def _measured(table: Frame, base: Mapping[str, Any], options: EvaluateStatusOptions) -> Rows:
    """Return the metrics of a method on a group of cases."""
    if base["target"] == "score":
        return _scores(table, base, options)
    truth = (table["truth"] == "positive").to_numpy()
    predicted = (table["predicted"] == "positive").to_numpy()
    # A rule without training has no temperature.
    values = {
        name: table[name].to_numpy(float)
        for name in ("probability", "calibrated")
        if table[name].notna().all()
    }
    ones = np.ones((1, len(table)))
    sampled = classification.resample(truth, options.bootstrap_samples, options.seed)
    found, samples = (
        classification.status_metrics(truth, predicted, values, weights, options.sensitivity)
        for weights in (ones, sampled)
    )
    site = table["site"].to_numpy(str)
    if len(np.unique(site)) > 1:
        found[WITHIN_SITES], samples[WITHIN_SITES] = (
            classification.auc_within_sites(truth, values["probability"], weights, site)
            for weights in (ones, sampled)
        )
    rows = [
        _row(base, name, classification.interval(value, samples[name], options.confidence), truth)
        for name, value in found.items()
    ]
    slope, intercept = classification.calibration_line(truth, table["logit"].to_numpy(float))
    of_bins = {
        "calibration_slope": slope,
        "calibration_intercept": intercept,
        **{
            name: classification.calibration_error(truth, values[column], options.calibration_bins)
            for name, column in (("ece", "probability"), ("ece_calibrated", "calibrated"))
            if column in values
        },
    }
    return rows + [_row(base, name, Interval(value), truth) for name, value in of_bins.items()]


def _scores(table: Frame, base: Mapping[str, Any], options: EvaluateStatusOptions) -> Rows:
    truth, predicted = (
        np.array([SCORES.index(value) for value in table[name]]) for name in ("truth", "predicted")
    )
    ones = np.ones((1, len(table)))
    sampled = classification.resample(truth, options.bootstrap_samples, options.seed)
    found, samples = (classification.ordinal(truth, predicted, each) for each in (ones, sampled))
    return [
        _row(
            base, name, classification.interval(value, samples[name], options.confidence), truth > 1
        )
        for name, value in found.items()
    ]


def _shuffled(table: Frame, base: Mapping[str, Any]) -> Rows:
    """Return mean, least and greatest AUC and balanced accuracy over the repetitions."""
    rows: Rows = []
    found: dict[str, list[float]] = {"auc": [], "balanced_accuracy": []}
    for _, own in table.groupby("repeat"):
        truth = (own["truth"] == "positive").to_numpy()
        predicted = (own["predicted"] == "positive").to_numpy()
        ones = np.ones((1, len(own)))
        probability = own["probability"].to_numpy(float)
        found["auc"].append(float(classification.auc(truth, probability, ones)[0]))
        decided = classification.decisions(truth, predicted, ones)
        found["balanced_accuracy"].append(float(decided["balanced_accuracy"][0]))
    truth = (table["truth"] == "positive").to_numpy()
    for name, values in found.items():
        finite = [value for value in values if np.isfinite(value)]
        known = (
            Interval(float(np.mean(finite)), min(finite), max(finite)) if finite else Interval(None)
        )
        rows.append(_row(base, name, known, truth))
    return rows


def _difference(
    table: Frame, floor: Frame, base: Mapping[str, Any], options: EvaluateStatusOptions
) -> Rows:
    """Return the difference of a method to the floor on the same bootstrap samples of cases."""
    joined = table.merge(floor, on="case", suffixes=("", "_floor"))
    if base["target"] == "score":
        truth = np.array([SCORES.index(value) for value in joined["truth"]])
        name, both = "qwk_minus_floor", [
            np.array([SCORES.index(value) for value in joined[f"predicted{suffix}"]])
            for suffix in ("", "_floor")
        ]  # fmt: skip

        def measure(k: int, weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            return classification.ordinal(truth, both[k], weights)["qwk"]
    else:
        truth = (joined["truth"] == "positive").to_numpy().astype(int)
        name, scores = "auc_minus_floor", [
            joined[f"probability{suffix}"].to_numpy(float) for suffix in ("", "_floor")
        ]  # fmt: skip

        def measure(k: int, weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            return classification.auc(truth > 0, scores[k], weights)

    ones = np.ones((1, len(joined)))
    sampled = classification.resample(truth, options.bootstrap_samples, options.seed)
    value, samples = (measure(0, each) - measure(1, each) for each in (ones, sampled))
    known = classification.interval(value, samples, options.confidence)
    return [_row(base, name, known, truth > (0 if base["target"] == "status" else 1))]


def _agreement(
    table: Frame, cells: Frame, base: Mapping[str, Any], options: EvaluateStatusOptions
) -> Rows:
    """Return the kappa of a method's answers with those of method cells, on the cases of both.

    Quadratic for the score, Cohen's for the status. A silver label: it is no evidence of the truth.
    """
    joined = table.merge(cells, on="case", suffixes=("", "_cells"))
    names = SCORES if base["target"] == "score" else STATUSES
    own, read = (
        np.array([names.index(value) for value in joined[name]], np.int64)
        for name in ("predicted", "predicted_cells")
    )
    if not len(joined):
        return []
    ones = np.ones((1, len(joined)))
    sampled = classification.resample(read, options.bootstrap_samples, options.seed)
    value, samples = (classification.ordinal(read, own, each)["qwk"] for each in (ones, sampled))
    known = classification.interval(value, samples, options.confidence)
    return [_row(base, "kappa_with_cells", known, read > (0 if names is STATUSES else 1))]


def _constants(table: Frame, target: str, part: str, group: str) -> Rows:
    """Return the metrics of constant answers."""
    if part == SHUFFLED:
        return []
    rows: Rows = []
    ones = np.ones((1, len(table)))
    counts = table["truth"].value_counts()
    most = sorted(counts.index, key=lambda label: (-counts[label], label))[0]
    if target == "score":
        truth = np.array([SCORES.index(value) for value in table["truth"]])
        same = np.full(len(truth), SCORES.index(most))
        found = classification.ordinal(truth, same, ones)
        base = {"method": "majority", "target": target, "part": part, "group": group}
        return [
            _row(base, name, Interval(_finite(value)), truth > 1) for name, value in found.items()
        ]
    positive = (table["truth"] == "positive").to_numpy()
    answers = dict(zip(CONSTANTS, (most == "positive", True, False), strict=True))
    for method, answer in answers.items():
        base = {"method": method, "target": target, "part": part, "group": group}
        found = classification.decisions(positive, np.full(len(positive), answer), ones)
        found["auc"] = classification.auc(positive, np.zeros(len(positive)), ones)
        rows += [
            _row(base, name, Interval(_finite(value)), positive) for name, value in found.items()
        ]
    return rows


def _finite(value: npt.NDArray[np.float64]) -> float | None:
    return float(value[0]) if np.isfinite(value[0]) else None


def _row(
    base: Mapping[str, Any], metric: str, value: Interval, positive: Sequence[Any] | Any
) -> dict[str, Any]:
    return {
        **base,
        "metric": metric,
        **value._asdict(),
        "cases": len(positive),
        "positive": int(np.sum(positive)),
    }
