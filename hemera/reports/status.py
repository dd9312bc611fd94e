"""The page about the status and score of cases."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from hemera import tables
from hemera.config import CELLS, METHODS, OYELADE, EvaluateStatusOptions
from hemera.dataset.cases import OOF, SHUFFLED, SITE_OUT, TEST
from hemera.dataset.readings import refusals
from hemera.dataset.statistics import Frame
from hemera.evaluation import classification
from hemera.evaluation.status import CASES_MIN, COMMON, WITHIN_SITES, confounding
from hemera.reports import charts

PART_NAMES = {
    OOF: "cross-validation: each case by models that were trained on the other folds",
    TEST: "test split of the sheet: the mean of the models of all folds",
    SITE_OUT: "leave one site out: each site by models that were trained on the other sites",
}
STATUS_COLUMNS = {
    "auc": "AUC",
    WITHIN_SITES: "AUC within sites",
    "balanced_accuracy": "balanced accuracy",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "f1": "F1 of positive",
    "specificity_at_sensitivity": "specificity at the set sensitivity",
    "brier": "Brier",
    "brier_calibrated": "Brier, calibrated",
    "ece_calibrated": "calibration error",
}
SCORE_COLUMNS = {
    "accuracy": "accuracy, four scores",
    "qwk": "quadratic kappa",
    "mean_absolute_error": "mean absolute error",
}
PUBLISHED = (
    ("HEROHE, 1st by F1 (150 cases)", ".706", ".706", "",
     "the AUC is that of hard labels; constant positive is 10th of 21 by F1"),
    ("HEROHE, 3rd by F1", ".844", ".719", "", ""),
    ("HEROHE, constant positive", ".500", ".500", "", ""),
    ("Virchow2 + ABMIL on HEROHE", ".759", ".719", "", "one public repository, not reviewed"),
    ("ResNet50 of ImageNet + any aggregator", ".549 to .571", ".500", "", "the same"),
    ("Oliveira et al., HER2 tiles of 4 scores", "", "", "accuracy .768, kappa .888",
     "of the 12 cases that chose the epoch, 624 tiles a score; the kappa follows from its table"),
    ("Oliveira et al., 8 cases of HER2SC", "", ".833", "F1 .867, weighted by class",
     "the HER2 slides of these patients trained or selected the encoder; at 8 cases the standard "
     "error of an AUC of .8 is .17"),
    ("Oliveira et al., 54 cases of BRCA", "", ".538", "F1 .215, weighted by class",
     "the rows of its table have different numbers of positive cases; the published code assigns "
     "tiles to the labels of other slides"),
    ("Oyelade et al., tumour", "", "", "accuracy 1.0 of 126 patches",
     "13 cases of endometrial carcinoma; patches are not divided by patient"),
    ("Oyelade et al., stain, ViT-small; ViT-base", "", "",
     "accuracy .9148 (86 of 94 patches); .9400", "the same; no number of patches for ViT-base"),
    ("Oyelade et al., map of the stain", "", "", "mean IoU .6719",
     "of the validation; the .9 that is also stated is of the training"),
    ("Oyelade et al., regions of a slide", "", "", "",
     "of one case; predictions on tumour are compared with truth outside of it as well"),
)  # fmt: skip
"""Method, AUC, balanced accuracy, other figure and reservation of published results."""


def content(
    cases: Frame,
    predictions: Frame,
    metrics: Frame,
    described: Mapping[str, Mapping[str, Any]],
    options: EvaluateStatusOptions,
) -> dict[str, Any]:
    """Return what status.html shows.

    Args:
        cases: `tables.STATUS_CASES`.
        predictions: `tables.STATUS_PREDICTIONS` with dataset, site and score.
        metrics: `tables.STATUS_METRICS`.
        described: metadata of the methods.
    """
    metrics = metrics.reindex(columns=tables.STATUS_METRICS.names)
    found: dict[tuple[str, ...], Mapping[str, Any]] = {
        (row["target"], row["part"], row["group"], row["method"], row["metric"]): row
        for row in metrics.to_dict("records")
    }
    confounded = confounding(cases)
    parts = [part for part in PART_NAMES if (metrics["part"] == part).any()]
    return {
        "title": "HER2 status of the cases",
        "found": found,
        "methods": list(described),
        "described": described,
        "parts": {part: PART_NAMES[part] for part in parts},
        "groups": _groups(metrics),
        "common": COMMON,
        "routes": _routes(cases, predictions, described),
        "cells": CELLS,
        "oyelade": OYELADE,
        "columns": {"status": STATUS_COLUMNS, "score": SCORE_COLUMNS},
        "states": cases["state"].value_counts().sort_index().to_dict(),
        "labels": cases["status"].value_counts().to_dict(),
        "sources": cases["label_source"].value_counts().to_dict(),
        "verdicts": [_verdict(name, found, options) for name in described],
        "shuffled": {name: found.get(("status", SHUFFLED, "all", name, "auc")) for name in METHODS},
        "confounding": confounded,
        "confounding_max": options.confounding_max,
        "charts": _charts(predictions, list(described), options),
        "reasons": sorted(
            {run["reason"] for own in described.values() for run in own["runs"] if "reason" in run}
        ),
        "published": PUBLISHED,
        "cases_min": CASES_MIN,
        "sensitivity": options.sensitivity,
        "confidence": options.confidence,
    }


def _routes(
    cases: Frame, predictions: Frame, described: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """Return, by target, the number of cases that each method has predicted, and its refusals."""
    rows = cases.astype(object).where(cases.notna(), None).to_dict("records")
    found = predictions.to_dict("records")
    routes: dict[str, list[dict[str, Any]]] = {}
    for target in ("status", "score"):
        for name, own in described.items():
            done = [row for row in found if row["method"] == name]
            refused = refusals(rows, done, own, target)
            count = len({row["case"] for row in done
                         if row["target"] == target and row["part"] in (OOF, TEST)})  # fmt: skip
            routes.setdefault(target, []).append(
                {"method": name, "judged": count, "refused": sum(refused.values()),
                 "reasons": refused}
            )  # fmt: skip
    return routes


def _groups(metrics: Frame) -> list[tuple[str, str, str]]:
    """Return target, part and group of all groups but `all`, in order."""
    known = metrics[(metrics["group"] != "all") & (metrics["part"] != SHUFFLED)]
    return list(
        dict.fromkeys(known[["target", "part", "group"]].itertuples(index=False, name=None))
    )


def _verdict(
    method: str, found: Mapping[tuple[str, ...], Mapping[str, Any]], options: EvaluateStatusOptions
) -> dict[str, Any]:
    """Return whether a method found a signal, and what restricts the claim."""
    rows = {part: found.get(("status", part, "all", method, "auc")) for part in (TEST, OOF)}
    # A test split of few cases often has one class only, and no AUC.
    part = next((part for part, row in rows.items() if row and pd.notna(row["value"])), TEST)
    row = rows[part] or rows[OOF]
    base = {"method": method, "row": row, "part": PART_NAMES[part].split(":")[0]}
    if row is None:
        text = (
            "no case was predicted: one class is missing, too few cases have tiles, or its "
            "networks have seen every case"
        )
        return {**base, "level": "stop", "text": text}
    if pd.isna(row["value"]):
        text = "no AUC: one class is missing"
        return {**base, "row": None, "level": "stop", "text": text}
    few = min(row["positive"], row["cases"] - row["positive"]) < CASES_MIN
    restricted = (
        f"; fewer than {CASES_MIN} cases of one class, so no claim can be made" if few else ""
    )
    # AUC of sites together: models of several sites are compared, and the site alone may decide.
    outside = found.get(("status", SITE_OUT, "all", method, WITHIN_SITES))
    inside = outside or found.get(("status", part, "all", method, WITHIN_SITES))
    if pd.isna(row["low"]) or row["low"] <= 0.5:
        text = f"no signal found: the interval of the AUC contains 0.5{restricted}"
        return {**base, "level": "care", "text": text}
    if inside and not (pd.notna(inside["low"]) and inside["low"] > 0.5):
        where = "sites that were left out" if outside else "sites"
        text = f"no signal within {where}: the method may recognise the site{restricted}"
        if pd.isna(inside["value"]):
            text = f"no site has both classes: the method may recognise the site{restricted}"
        return {**base, "level": "stop", "text": text}
    level = "care" if few else "fine"
    return {**base, "level": level, "text": f"a signal was found{restricted}"}


def _charts(
    predictions: Frame, methods: list[str], options: EvaluateStatusOptions
) -> list[tuple[str, Markup]]:
    """Return ROC, decision curve and calibration of the headline part."""
    status = predictions[predictions["target"] == "status"]
    part = TEST if (status["part"] == TEST).any() else OOF
    status = status[status["part"] == part]
    tables_ = {name: status[status["method"] == name] for name in methods}
    tables_ = {name: own for name, own in tables_.items() if len(own)}
    if not tables_:
        return []
    roc, decision, calibration = [], [], []
    thresholds = np.linspace(0.01, options.net_benefit_max, 50)
    for name, own in tables_.items():
        truth = (own["truth"] == "positive").to_numpy()
        probability, calibrated = (
            own[column].to_numpy(float) for column in ("probability", "calibrated")
        )
        order = np.argsort(-probability, kind="stable")
        hits, false = np.cumsum(truth[order]), np.cumsum(~truth[order])
        roc.append((name, np.r_[0, false / max(1, false[-1])], np.r_[0, hits / max(1, hits[-1])]))
        if np.isnan(calibrated).any():
            continue
        decision.append(
            (
                name,
                thresholds,
                np.array([classification.net_benefit(truth, calibrated, t) for t in thresholds]),
            )
        )
        bins = classification.calibration_bins(truth, calibrated, options.calibration_bins)
        calibration.append(
            (name, np.array([bin[0] for bin in bins]), np.array([bin[1] for bin in bins]))
        )
    truth = (next(iter(tables_.values()))["truth"] == "positive").to_numpy()
    all_treated = np.array(
        [classification.net_benefit(truth, np.ones(len(truth)), t) for t in thresholds]
    )
    even = np.array([0.0, 1.0])
    shown = (
        ("ROC curve", [*roc, ("chance", even, even)], ("1 − specificity", "sensitivity")),
        ("Decision curve, calibrated", [*decision, ("treat all", thresholds, all_treated)],
         ("threshold of the probability", "net benefit")),
        ("Calibration, after temperature", [*calibration, ("even", even, even)],
         ("mean probability of a bin", "fraction positive")),
    )  # fmt: skip
    return [(title, charts.lines(title, series, labels=labels)) for title, series, labels in shown]
