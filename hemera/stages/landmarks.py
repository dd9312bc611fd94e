"""Measure the registration error at an expert's landmarks: of one pair, or of the cohort."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hemera import tables
from hemera.config import LandmarksOptions
from hemera.errors import ConfigError, RegistrationError, SheetError, TableError
from hemera.files import layout
from hemera.files.atomic import write_text
from hemera.registration.canvas import size_um
from hemera.registration.displacement import Displacement, none, of_registered
from hemera.registration.displacement_files import read_displacement
from hemera.registration.landmark_errors import (
    cohort_figures,
    pair_figures,
    point_errors,
    predict,
)
from hemera.registration.landmarks import NONE, join_predictions, predictions_csv, read_landmarks
from hemera.sheet import Pair, read_sheet

log = logging.getLogger(__name__)


def run(
    *,
    sheet: Path,
    unit: str | None = None,
    images_table: Path | None = None,
    displacement: Path | None = None,
    results: Path = Path(layout.RESULTS),
    errors: Path,
    predictions: Path,
    options: LandmarksOptions,
) -> None:
    """Compute the registration error at landmarks of one pair, or the figures of the cohort.

    A landmark file that cannot be read does not fail the job: the table then has no rows, and the
    reason is in its metadata. A displacement is measured regardless of its certificate.

    Args:
        unit: name of the pair; without it, the tables of all pairs are summarised.
        displacement: without it, the pair is registered on input.
        predictions: written: CSV with the rows of an ACROBAT file, H&E coordinates predicted, in
            the unit of the file.
    """
    if unit is None:
        _run_cohort(sheet, results, errors, predictions, options)
    elif images_table is None:
        raise ConfigError("--images-table is missing; it is needed with --unit")
    else:
        _run_pair(sheet, unit, images_table, displacement, errors, predictions, options)


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
            raise TableError(f"{path}: no such file; run register, or name another in the sheet")
    images = tables.described(images_table)[unit]
    described = {stain: row for stain, row in images.items() if row["mpp"] is not None}
    he, her2 = (images[stain] for stain in tables.STAINS)
    sizes = [(row["width_px"], row["height_px"]) if row["width_px"] else None for row in (he, her2)]
    landmarks, d, reason = NONE, none(), None
    try:
        landmarks = read_landmarks(pair, he["mpp"], her2["mpp"], options.coordinates, *sizes)
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
    lost = int((np.isfinite(landmarks.her2) & np.isnan(predicted)).any(axis=1).sum())
    if lost and not d.empty:
        log.warning("pair %s: %d points of HER2 have no corresponding point on H&E", unit, lost)
    metadata = tables.provenance(options) | ({} if reason is None else {"reason": reason})
    write_text(predictions, predictions_csv(landmarks, predicted))
    tables.write(errors, rows, tables.LANDMARKS, metadata)


def _displacement(
    pair: Pair, described: Mapping[str, Mapping[str, Any]], path: Path | None
) -> Displacement:
    """Return the displacement to measure: that of a file, or of a pair registered on input."""
    if path is not None:
        d = read_displacement(path)
        if d.empty:
            raise RegistrationError("registration gave no map; see the pair's certificate")
        return d
    if len(described) < len(tables.STAINS):
        raise RegistrationError("an image without resolution; give he_mpp, her2_mpp in the sheet")
    he, her2 = (described[stain] for stain in tables.STAINS)
    sizes = [(row["width_px"], row["height_px"]) for row in (he, her2)]
    return of_registered(sizes[0], he["mpp"], sizes[1], her2["mpp"], mirror=pair.mirrored)


def _run_cohort(
    sheet: Path, results: Path, errors: Path, predictions: Path, options: LandmarksOptions
) -> None:
    pairs = [pair for pair in read_sheet(sheet).pairs if pair.has_landmarks]
    if not pairs:
        raise SheetError(
            f"{sheet.name}: no pair has landmarks; give he_landmarks and her2_landmarks"
        )
    pairs.sort(key=lambda pair: pair.pair)
    rows: list[dict[str, Any]] = []
    for pair in pairs:
        path = layout.path(layout.LANDMARK_ERRORS, results, unit=pair.pair)
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
    datasets = sorted({pair.dataset for pair in pairs})
    for dataset in datasets if len(datasets) > 1 else ():
        own = [row for row in rows if row["dataset"] == dataset]
        whole += [{**row, "dataset": dataset} for row in cohort_figures(own)]
    files = [layout.path(layout.LANDMARK_PREDICTIONS, results, unit=pair.pair) for pair in pairs]
    write_text(predictions, join_predictions(files))
    tables.write(errors, [*rows, *whole], tables.LANDMARKS_COHORT, tables.provenance(options))
