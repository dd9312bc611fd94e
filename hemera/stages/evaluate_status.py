"""Evaluate the methods that determine status and score; refuse what a network has seen."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from hemera import tables
from hemera.config import EvaluateStatusOptions
from hemera.dataset.splits import check_unseen
from hemera.dataset.statistics import Frame
from hemera.errors import TrainingError
from hemera.evaluation import status
from hemera.files import layout
from hemera.networks import storage
from hemera.reports.html import write_page
from hemera.reports.status import content

log = logging.getLogger(__name__)


def run(
    *,
    cases: Path,
    results: Path = Path(layout.RESULTS),
    preset: str,
    metrics: Path,
    page: Path,
    options: EvaluateStatusOptions,
) -> None:
    """Compare the predictions of all methods with the labels, in one table and on one page.

    Args:
        cases: table of stage cases.
        results: folder of results, with the predictions of stage aggregate.
        preset: preset of the cohort.
        metrics: written: table of metrics per method, part and group of cases.
        page: written: HTML.

    Raises:
        LeakageError: when a case was predicted by a network that has seen it.
        TrainingError: when predictions are of other cases or labels.
    """
    listed = tables.read(cases, tables.STATUS_CASES).to_pandas()
    fingerprint = tables.read_metadata(cases)["fingerprint"]
    found, described = [], {}
    for method in options.methods:
        path = layout.path(layout.AGGREGATOR_METADATA, results, method=method)
        own = storage.read_metadata(path, "aggregate")
        if own["cases"] != fingerprint:
            raise TrainingError(f"{path}: of other cases or labels; run the stage aggregate again")
        table = tables.read(
            layout.path(layout.STATUS_PREDICTIONS, results, method=method),
            tables.STATUS_PREDICTIONS,
        )
        rows = table.to_pylist()
        check_leakage(method, rows, own)
        described[method] = own
        found.append(table.to_pandas())
    predictions = _with_groups(pd.concat(found, ignore_index=True), listed)
    rows = status.metrics(predictions, options)
    tables.write(metrics, rows, tables.STATUS_METRICS, tables.provenance(options))
    write_page(
        page,
        "status.html",
        {"preset": preset, **content(listed, predictions, pd.DataFrame(rows), described, options)},
    )
    log.info("%s: %d methods", page.name, len(described))


def check_leakage(
    method: str, predictions: Sequence[Mapping[str, Any]], metadata: Mapping[str, Any]
) -> None:
    """Raise LeakageError where a prediction is of a case that a network behind it has seen.

    Args:
        predictions: rows of `tables.STATUS_PREDICTIONS`.
        metadata: of the method, with the cases that its models and its encoder have seen.
    """
    judged: dict[tuple[Any, ...], list[str]] = {}
    for row in predictions:
        key = row["part"], row["target"], row["fold"], row["left_out"], row["repeat"]
        judged.setdefault(key, []).append(row["case"])
    for key, cases in judged.items():
        part, target, *_ = key
        names = ("part", "target", "fold", "left_out", "repeat")
        runs = [
            run
            for run in metadata["runs"]
            if (
                (run["part"], run["target"]) == ("oof", target)
                if part == "test"
                else tuple(run[name] for name in names) == key
            )
        ]
        if not runs:
            raise TrainingError(f"{method}: no record of what predicted {part} of {target}; run "
                                "the stage aggregate again")  # fmt: skip
        seen = [case for run in runs for case in run["trained_on"]]
        check_unseen(
            cases, [*seen, *metadata["encoder_trained_on"]], f"{method}, {part} of {target}"
        )


def _with_groups(predictions: Frame, cases: Frame) -> Frame:
    """Add data set, site and score of the cases, texts."""
    known = cases[["case", "dataset", "site", "score"]]
    joined = predictions.merge(known, on="case", how="left", validate="many_to_one")
    return joined.assign(**{name: joined[name].fillna("unknown") for name in ("site", "score")})
