"""Measure the registration error at an expert's landmarks: of one pair, or of the cohort."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hemera import tables
from hemera.config import LandmarksOptions
from hemera.errors import ConfigError, RegistrationError, SheetError, TableError
from hemera.files.atomic import write_text
from hemera.registration.canvas import size_um
from hemera.registration.displacement import Displacement, none, of_registered
from hemera.registration.displacement_files import read_displacement
from hemera.registration.landmark_errors import (
    FIGURES,
    cohort_figures,
    pair_figures,
    point_errors,
    predict,
)
from hemera.registration.landmarks import (
    NONE,
    join_predictions,
    predictions_csv,
    read_landmarks,
)
from hemera.sheet import Pair, read_sheet

log = logging.getLogger(__name__)


def run(
    *,
    sheet: Path,
    unit: str | None = None,
    images_table: Path | None = None,
    displacement: Path | None = None,
    folder: Path | None = None,
    errors: Path,
    predictions: Path,
    options: LandmarksOptions,
) -> None:
    """Compute the errors of one pair (`unit`, `images_table`), or of the cohort (`folder`).

    The target registration error of a point: its H&E side is mapped to HER2; the error is the
    distance to the HER2 side there. ACROBAT's goes the other way, see
    `hemera.registration.landmark_errors.official_error`. Where several annotators marked a point,
    their distances are averaged in both. A displacement is measured regardless of its certificate.

    A landmark file that cannot be read does not fail the job: the table then has zero rows. A pair
    without displacement has rows without prediction and without target registration error. The
    reason is in the table's metadata, ``reason``.

    In the cohort's table, ACROBAT's figures are the median (ranking of 2022), mean (2023) and
    standard deviation over pairs of the 90th percentile over points. A pair without displacement
    counts with its unregistered coordinates in these, and not in the other figures.

    Args:
        sheet: the sheet of pairs.
        unit: the pair; None: the cohort.
        images_table: table `tables.DESCRIBE` of the pair: sizes and resolutions.
        displacement: from H&E to HER2; None for a pair that comes registered.
        folder: of the cohort: with ``{pair}.parquet`` and ``{pair}.csv`` of all pairs.
        errors: table `tables.LANDMARKS`, one row per point; of the cohort
            `tables.LANDMARKS_COHORT`.
        predictions: the rows of an ACROBAT file with their H&E coordinates predicted, empty where
            there is no prediction, in the file's unit; the header alone for other files.
        options: settings.

    Raises:
        ConfigError: when neither a pair nor the cohort is given.
        SheetError: when the sheet has no such pair, or no landmarks for it.
        TableError: when a landmark file, the displacement or a pair's table is missing.
    """
    if unit is not None and images_table is not None:
        _run_pair(sheet, unit, images_table, displacement, errors, predictions, options)
    elif folder is not None:
        _run_cohort(sheet, folder, errors, predictions, options)
    else:
        raise ConfigError(
            "landmarks: neither a pair nor the cohort; give --unit and --images-table, or --folder"
        )


def _run_pair(
    sheet: Path,
    unit: str,
    images_table: Path,
    displacement: Path | None,
    errors: Path,
    predictions: Path,
    options: LandmarksOptions,
) -> None:
    pair = read_sheet(sheet).pair(unit)
    for path in (*pair.landmarks, *([] if displacement is None else [displacement])):
        if not path.is_file():
            raise TableError(f"{path}: no such file; run register, or name another in pairs.tsv")
    images = tables.described(images_table)[unit]
    described = {stain: row for stain, row in images.items() if row["mpp"] is not None}
    he_mpp, her2_mpp = (described.get(stain, {}).get("mpp") for stain in tables.STAINS)
    landmarks, d, reason = NONE, none(), None
    try:
        landmarks = read_landmarks(pair, he_mpp, her2_mpp, options.coordinates)
        d = _displacement(pair, described, displacement)
    except (TableError, RegistrationError) as error:
        # A reason is written to a table, which contains no absolute path.
        reason = str(error)
        if displacement is not None:
            reason = reason.replace(str(displacement), displacement.name)
        log.warning("pair %s: %s", unit, reason)
    try:
        predicted = predict(d, landmarks.her2)
    except RegistrationError as error:
        log.warning("pair %s: %s", unit, error)
        predicted = np.full_like(landmarks.her2, np.nan)
    he_um = size_um(described["he"]) if "he" in described else None
    rows = [{"pair": unit, **row} for row in point_errors(landmarks, predicted, d, he_um)]
    found = [row["error_um"] for row in rows if row["error_um"] is not None]
    if found:
        log.info(
            "pair %s: %d points, median %.1f um, 90th percentile %.1f um",
            unit, len(found), np.median(found), np.percentile(found, 90),
        )  # fmt: skip
    lost = int((np.isfinite(landmarks.her2) & np.isnan(predicted)).any(axis=1).sum())
    if lost and not d.empty:
        log.warning("pair %s: %d points of HER2 have no corresponding point on H&E", unit, lost)
    metadata = tables.provenance(options) | ({} if reason is None else {"reason": reason})
    write_text(predictions, predictions_csv(landmarks, predicted))
    tables.write(errors, rows, tables.LANDMARKS, metadata)


def _displacement(
    pair: Pair, described: Mapping[str, Mapping[str, Any]], path: Path | None
) -> Displacement:
    """Return the displacement to measure: that of a file, or of a pair that comes registered."""
    if path is not None:
        d = read_displacement(path)
        if d.empty:
            raise RegistrationError("registration gave no map; see the pair's certificate")
        return d
    if len(described) < len(tables.STAINS):
        raise RegistrationError("an image without resolution; give he_mpp, her2_mpp in pairs.tsv")
    he, her2 = described["he"], described["her2"]
    return of_registered(
        (he["width_px"], he["height_px"]),
        he["mpp"],
        (her2["width_px"], her2["height_px"]),
        her2["mpp"],
        mirror=pair.mirrored,
    )


def _run_cohort(
    sheet: Path, folder: Path, errors: Path, predictions: Path, options: LandmarksOptions
) -> None:
    pairs = [pair for pair in read_sheet(sheet).pairs if pair.landmarks and not pair.in_block]
    if not pairs:
        raise SheetError(
            f"{sheet.name}: no pair has landmarks; give he_landmarks and her2_landmarks"
        )
    pairs.sort(key=lambda pair: pair.pair)
    rows: list[dict[str, Any]] = []
    for pair in pairs:
        path = folder / f"{pair.pair}.parquet"
        table = tables.read(path, tables.LANDMARKS)
        figures = pair_figures(table.to_pydict())
        reason = tables.read_metadata(path).get("reason")
        if not figures["points"] and reason is None:
            reason = f"the H&E side of its {table.num_rows} landmarks is withheld"
        if reason is not None:
            log.warning("pair %s: %s", pair.pair, reason)
        named = {"aggregation": "pair", "pair": pair.pair, "dataset": pair.dataset}
        rows.append({**named, **figures, "reason": reason})
    whole = cohort_figures(rows)
    for row in whole:
        values = [f"{name} {row[name]:.4g}" for name in FIGURES if row[name] is not None]
        log.info(
            "%s over %d pairs, %d of them without displacement: %s",
            row["aggregation"], row["pairs"], row["unregistered"], ", ".join(values) or "none",
        )  # fmt: skip
    for dataset in sorted({pair.dataset for pair in pairs}):
        own = [row for row in rows if row["dataset"] == dataset]
        whole += [{**row, "dataset": dataset} for row in cohort_figures(own)]
    write_text(predictions, join_predictions([folder / f"{pair.pair}.csv" for pair in pairs]))
    metadata = tables.provenance(options)
    tables.write(errors, [*rows, *whole], tables.LANDMARKS_COHORT, metadata)
