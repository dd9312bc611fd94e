"""Score the registrations of the cohort at its landmarks, as the ACROBAT challenge does."""

from __future__ import annotations

import collections
import csv
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hemera import tables
from hemera.config import ScoreOptions
from hemera.errors import SheetError, TableError
from hemera.io.atomic import write_text
from hemera.sheet import read_sheet

log = logging.getLogger(__name__)

FIGURES = tuple(name for name in tables.SCORE.names if name.endswith(("_um", "_fraction")))
"""The columns of SCORE that are aggregated over pairs."""

AGGREGATIONS: Mapping[str, Callable[[list[float]], Any]] = {
    "median": np.median,
    "mean": np.mean,
    "std": np.std,
}


def run(
    *,
    sheet: Path,
    landmarks_folder: Path,
    score: Path,
    predictions: Path,
    options: ScoreOptions,
) -> None:
    """Aggregate the landmark errors of all pairs and join their predictions.

    Per pair, the 90th percentile over its points; over the pairs, median (by which ACROBAT ranked
    in 2022), mean (2023) and standard deviation of these. A pair without a map counts with its
    unregistered coordinates in the official figures, and not at all in the others.

    Args:
        sheet: the sheet of pairs.
        landmarks_folder: folder of landmarks' outputs, ``{pair}.parquet`` and ``{pair}.csv``.
        score: table `tables.SCORE`.
        predictions: the rows of all ACROBAT files with their H&E coordinates predicted, as the
            challenge takes them; the header alone where no pair came from one.
        options: settings.

    Raises:
        SheetError: when no pair of the sheet has landmarks.
        TableError: when an output of landmarks is missing or of another version.
    """
    pairs = [pair for pair in read_sheet(sheet).pairs if pair.landmarks and not pair.in_block]
    if not pairs:
        raise SheetError(
            f"{sheet.name}: no pair has landmarks; give he_landmarks and her2_landmarks"
        )
    pairs.sort(key=lambda pair: pair.pair)
    rows = []
    sources: dict[str, str] = {}
    for pair in pairs:
        path = landmarks_folder / f"{pair.pair}.parquet"
        table = tables.read(path, tables.LANDMARKS)
        reason = tables.read_metadata(path).get("reason")
        rows.append(_pair_row(pair.pair, pair.dataset, table, reason))
        sources = tables.inherited("landmarks", path) | sources
    names = sorted({pair.dataset for pair in pairs})
    cohort = [row for dataset in (None, *names) for row in _cohort_rows(dataset, rows)]
    _tell(rows, cohort)
    text = _joined([landmarks_folder / f"{pair.pair}.csv" for pair in pairs])
    write_text(predictions, text)
    tables.write(score, [*rows, *cohort], tables.SCORE, {**sources, **tables.provenance(options)})


def _pair_row(pair: str, dataset: str, table: pa.Table, reason: str | None) -> dict[str, Any]:
    def known(name: str) -> npt.NDArray[np.float64]:
        values: npt.NDArray[np.float64] = table.column(name).drop_null().to_numpy()
        return values

    points = len(known("initial_error_um"))
    if not points and reason is None:
        reason = f"the H&E side of its {table.num_rows} landmarks is withheld"
    official, official_initial = known("official_error_um"), known("official_initial_error_um")
    error, initial = known("error_um"), known("initial_error_um")
    share = known("error_diagonal_fraction")
    return {
        "aggregation": "pair",
        "pair": pair,
        "dataset": dataset,
        "pairs": int(points > 0),
        "unregistered": int(points > 0 and not len(error)),
        "points": points,
        "error_median_um": _percentile(error, 50),
        "error_p90_um": _percentile(error, 90),
        "error_median_diagonal_fraction": _percentile(share, 50),
        "error_p90_diagonal_fraction": _percentile(share, 90),
        "initial_error_median_um": _percentile(initial, 50),
        "initial_error_p90_um": _percentile(initial, 90),
        "official_error_p90_um": _percentile(official, 90),
        "official_error_mean_um": float(official.mean()) if len(official) else None,
        "official_initial_error_p90_um": _percentile(official_initial, 90),
        "official_initial_error_mean_um": (
            float(official_initial.mean()) if len(official_initial) else None
        ),
        "reason": reason,
    }


def _percentile(values: npt.NDArray[np.float64], share: float) -> float | None:
    return float(np.percentile(values, share)) if len(values) else None


def _cohort_rows(dataset: str | None, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per aggregation over the pairs of a data set; None: of all."""
    own = [row for row in rows if dataset in (None, row["dataset"])]
    found = []
    for name, aggregate in AGGREGATIONS.items():
        row: dict[str, Any] = {"aggregation": name, "dataset": dataset}
        row |= {key: sum(one[key] for one in own) for key in ("pairs", "unregistered", "points")}
        for figure in FIGURES:
            values = [one[figure] for one in own if one[figure] is not None]
            row[figure] = float(aggregate(values)) if values else None
        found.append(row)
    return found


def _tell(rows: Sequence[Mapping[str, Any]], cohort: Sequence[Mapping[str, Any]]) -> None:
    """Say the figures of the whole cohort, and what they leave out."""
    for row in rows:
        if row["reason"] is not None:
            log.warning("pair %s: %s", row["pair"], row["reason"])
    median, mean, std = cohort[:3]
    if not median["pairs"]:
        log.warning("no pair has landmarks with both sides; there is nothing to score")
        return
    if median["error_p90_um"] is not None:
        log.info(
            "%d landmarks in %d pair%s: the middle pair has a median error of %.1f um and a 90th "
            "percentile of %.1f um; unregistered %.1f and %.1f um",
            median["points"], median["pairs"], "" if median["pairs"] == 1 else "s",
            median["error_median_um"], median["error_p90_um"],
            median["initial_error_median_um"], median["initial_error_p90_um"],
        )  # fmt: skip
    if median["official_error_p90_um"] is not None:
        log.info(
            "as ACROBAT scores: the 90th percentiles of the pairs have median %.1f um (ranking of "
            "2022), mean %.1f um (2023), deviation %.1f um; mean of means %.1f um; unregistered "
            "median %.1f um, mean %.1f um",
            median["official_error_p90_um"], mean["official_error_p90_um"],
            std["official_error_p90_um"], mean["official_error_mean_um"],
            median["official_initial_error_p90_um"], mean["official_initial_error_p90_um"],
        )  # fmt: skip
    if median["unregistered"]:
        log.warning(
            "pairs without a map: %d of %d; in ACROBAT's figures they count unregistered, in the "
            "others not at all",
            median["unregistered"], median["pairs"],
        )  # fmt: skip


def _joined(paths: Sequence[Path]) -> str:
    """Join the predictions of all pairs below one header, and say what the challenge would drop."""
    names: dict[str, None] = {}
    header: Sequence[str] = ()
    rows: list[dict[str, str]] = []
    for path in paths:
        try:
            with open(path, encoding="utf-8", newline="") as file:
                reader = csv.DictReader(file)
                own = list(reader)
        except FileNotFoundError:
            raise TableError(f"{path}: no such file; run stage landmarks") from None
        header = reader.fieldnames or ()
        if own:
            # The columns of a file without rows are those of no one's file.
            names |= dict.fromkeys(header)
        rows += own
    columns = list(names or header)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    if rows:
        _tell_predictions(rows, columns)
    return buffer.getvalue()


def _tell_predictions(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> None:
    lacking = sum(not row["he_x"] for row in rows)
    log.info(
        "predictions.csv: %d points%s", len(rows),
        f", {lacking} of them without a prediction" if lacking else "",
    )  # fmt: skip
    blank = [
        name
        for name in columns
        if name not in ("he_x", "he_y")
        and any(row.get(name, "").strip().lower() in ("", "nan") for row in rows)
    ]
    if blank:
        log.warning(
            "predictions.csv: empty cells in %s; the challenge drops a row with any empty cell",
            ", ".join(name or "a column without a name" for name in blank),
        )
    counts = collections.Counter(row["point_id"] for row in rows)
    twice = sum(count > 1 for count in counts.values())
    if twice:
        log.warning(
            "predictions.csv: %d point_id stand in several rows; the challenge joins on point_id "
            "alone, so each must stand once in all of the file",
            twice,
        )
