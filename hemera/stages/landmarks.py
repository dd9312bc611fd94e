"""Measure the registration error at an expert's landmarks, and predict their H&E side."""

from __future__ import annotations

import csv
import dataclasses
import io
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hemera import tables
from hemera.config import LandmarksOptions
from hemera.errors import RegistrationError, SheetError, TableError
from hemera.io.atomic import write_text
from hemera.registration.displacement import (
    Displacement,
    inverse_points,
    map_points,
    none,
    of_registered,
)
from hemera.registration.displacement_files import read_displacement
from hemera.sheet import Pair, read_sheet

log = logging.getLogger(__name__)

ACROBAT_COLUMNS = (
    *("anon_id", "anon_filename_he", "anon_filename_ihc", "point_id", "ihc_x", "ihc_y"),
    *("mpp_ihc_10X", "mpp_he_10X", "ihc_antibody", "he_x", "he_y"),
)
"""As released. Where several annotators marked H&E: ``he_1_x``, ``he_1_y``, ``he_2_x`` ..."""

REQUIRED = ("anon_filename_he", "anon_filename_ihc", "point_id", "ihc_x", "ihc_y")
COORDINATE_MAX = 1e7
"""No slide is ten metres wide, nor ten million pixels."""
TOLERANCE_UM = 0.01
"""How exactly a prediction leads to its HER2 point."""

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Mark:
    """One row of a landmark file, in um; None stands for a side that is withheld."""

    point: str
    he: tuple[Point | None, ...]
    """One per annotator."""
    her2: Point | None
    cells: Mapping[str, str] | None = None
    """The row as it stands in an ACROBAT file; None: of another file."""
    he_scale: float = 1.0
    """Um per unit of its H&E coordinates."""


def run(
    *,
    sheet: Path,
    unit: str,
    images_table: Path,
    displacement: Path | None = None,
    errors: Path,
    predictions: Path,
    options: LandmarksOptions,
) -> None:
    """Compute the target registration error of one pair, and its error as ACROBAT counts it.

    The target registration error: the H&E side of each point is mapped to HER2; the error is the
    distance to the HER2 side there. The official one goes the other way (`official_error`). Where
    several annotators marked a point, their distances are averaged in both.

    A landmark file that cannot be read as one is no error of the job: the table has zero rows then.
    A pair without a map has rows without prediction and without target registration error. Why
    stands in the table's metadata, ``reason``. A map is measured whatever its certificate says.

    Args:
        sheet: the sheet of pairs.
        unit: the pair.
        images_table: table `tables.DESCRIBE` of the unit: sizes and resolutions.
        displacement: the map from H&E to HER2; None for a pair that comes registered.
        errors: table `tables.LANDMARKS`, one row per point.
        predictions: the pair's rows of an ACROBAT file with their H&E coordinates predicted, empty
            where there is no prediction, in the file's unit; the header alone for another file.
        options: settings.

    Raises:
        SheetError: when the sheet has no such pair, or no landmarks for it.
        TableError: when a landmark file or the displacement is not there.
    """
    pair = next((pair for pair in read_sheet(sheet).pairs if pair.pair == unit), None)
    if pair is None:
        raise SheetError(f"{sheet.name}: no pair {unit}; name one of its pairs")
    for path in (*pair.landmarks, *([] if displacement is None else [displacement])):
        if not path.is_file():
            raise TableError(f"{path}: no such file; run register, or name another in pairs.tsv")
    described = {
        row["stain"]: row
        for row in tables.read(images_table, tables.DESCRIBE).to_pylist()
        if row["pair"] == unit and row["mpp"] is not None
    }
    he_mpp, her2_mpp = (described.get(stain, {}).get("mpp") for stain in tables.STAINS)
    marks: list[Mark] = []
    d = none()
    reason = None
    try:
        marks = _read(pair, he_mpp, her2_mpp, options)
        d = _map(pair, described, displacement)
    except (TableError, RegistrationError) as error:
        # A reason goes into a table, which names no folder of this machine.
        reason = str(error)
        if displacement is not None:
            reason = reason.replace(str(displacement), displacement.name)
        log.warning("pair %s: %s", unit, reason)
    predicted = _predict(unit, d, marks)
    rows = _rows(unit, marks, predicted, d, _size_um(described.get("he")))
    found = [row["error_um"] for row in rows if row["error_um"] is not None]
    if found:
        log.info(
            "pair %s: %d points, median %.1f um, 90th percentile %.1f um",
            unit, len(found), np.median(found), np.percentile(found, 90),
        )  # fmt: skip
    lost = sum(
        mark.her2 is not None and place is None
        for mark, place in zip(marks, predicted, strict=True)
    )
    if lost and not d.empty:
        log.warning("pair %s: %d points of HER2 have no place on H&E in its map", unit, lost)
    metadata = tables.provenance(options) | ({} if reason is None else {"reason": reason})
    write_text(predictions, _submission(marks, predicted))
    tables.write(errors, rows, tables.LANDMARKS, metadata)


def official_error(
    predicted: Point | None,
    her2: Point,
    he: Sequence[Point],
    size_um: npt.NDArray[np.float64] | None,
) -> float:
    """Return how far a prediction is from H&E as ACROBAT's evaluation counts it, um.

    Without a prediction, the unregistered HER2 coordinates count as one. What lies outside of the
    H&E slide is moved to its edge. The distances to the annotators are averaged.

    Args:
        predicted: where the map puts the point on H&E, um; None: nowhere.
        her2: the point on HER2, um.
        he: the point on H&E, one per annotator, um.
        size_um: (width, height) of the H&E slide; None: not known, nothing is moved.
    """
    place = np.array(her2 if predicted is None else predicted)
    place = np.clip(place, 0.0, np.inf if size_um is None else size_um)
    return float(np.linalg.norm(np.array(he) - place, axis=1).mean())


def check_landmarks(pair: Pair) -> None:
    """Read the landmark files of a pair, whatever the resolutions.

    Raises:
        SheetError: when the sheet gives only one of the two.
        TableError: when a file cannot be read as one of landmarks, or has none for the pair.
    """
    _read(pair, 1.0, 1.0, LandmarksOptions())


def _map(
    pair: Pair, described: Mapping[str, Mapping[str, Any]], displacement: Path | None
) -> Displacement:
    """Return the map to be judged: that of a file, or the identity of a registered pair."""
    if displacement is not None:
        d = read_displacement(displacement)
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


def _size_um(described: Mapping[str, Any] | None) -> npt.NDArray[np.float64] | None:
    if described is None or described["width_px"] is None:
        return None
    mpp: float = described["mpp"]
    return np.array([described["width_px"] * mpp, described["height_px"] * mpp], np.float64)


def _predict(pair: str, d: Displacement, marks: Sequence[Mark]) -> list[Point | None]:
    """Return where the map puts the HER2 side of each row on H&E; None where it has no place."""
    given = [mark.her2 for mark in marks if mark.her2 is not None]
    if d.empty or not given:
        return [None] * len(marks)
    try:
        places = iter(inverse_points(d, given, tolerance_um=TOLERANCE_UM).tolist())
    except RegistrationError as error:
        log.warning("pair %s: %s", pair, error)
        return [None] * len(marks)
    found: list[Point | None] = []
    for mark in marks:
        x, y = next(places) if mark.her2 is not None else (math.nan, math.nan)
        found.append((x, y) if math.isfinite(x) and math.isfinite(y) else None)
    return found


def _rows(
    pair: str,
    marks: Sequence[Mark],
    predicted: Sequence[Point | None],
    d: Displacement,
    size_um: npt.NDArray[np.float64] | None,
) -> list[dict[str, Any]]:
    by_point: dict[str, list[tuple[Mark, Point | None]]] = {}
    for mark, place in zip(marks, predicted, strict=True):
        by_point.setdefault(mark.point, []).append((mark, place))
    rows = []
    diagonal_um = None if size_um is None else math.hypot(*size_um)
    for point, group in by_point.items():
        he = _mean(here for mark, _ in group for here in mark.he)
        her2 = _mean(mark.her2 for mark, _ in group)
        back = _mean(place for _, place in group)
        both = [
            (here, mark.her2)
            for mark, _ in group
            for here in mark.he
            if here is not None and mark.her2 is not None
        ]
        error = initial = None
        if both:
            here, there = (np.array(side) for side in zip(*both, strict=True))
            initial = float(np.linalg.norm(here - there, axis=1).mean())
            if not d.empty:
                error = float(np.linalg.norm(map_points(d, here) - there, axis=1).mean())
        official = _official(group, size_um)
        rows.append(
            {
                "pair": pair,
                "point": point,
                "he_x_um": he[0],
                "he_y_um": he[1],
                "her2_x_um": her2[0],
                "her2_y_um": her2[1],
                "predicted_x_um": back[0],
                "predicted_y_um": back[1],
                "error_um": error,
                "error_diagonal_fraction": (
                    None if error is None or diagonal_um is None else error / diagonal_um
                ),
                "initial_error_um": initial,
                "official_error_um": official[0],
                "official_initial_error_um": official[1],
            }
        )
    return rows


def _official(
    group: Sequence[tuple[Mark, Point | None]], size_um: npt.NDArray[np.float64] | None
) -> tuple[float, float] | tuple[None, None]:
    """Return the official error of a point, with the map and without.

    None for a point that is not marked by all: the official evaluation leaves it out.
    """
    found, initial = [], []
    for mark, place in group:
        he = [here for here in mark.he if here is not None]
        if mark.her2 is None or len(he) < len(mark.he):
            return None, None
        found.append(official_error(place, mark.her2, he, size_um))
        initial.append(official_error(None, mark.her2, he, size_um))
    return float(np.mean(found)), float(np.mean(initial))


def _mean(points: Iterable[Point | None]) -> tuple[float, float] | tuple[None, None]:
    given = [point for point in points if point is not None]
    if not given:
        return None, None
    x, y = np.mean(given, axis=0)
    return float(x), float(y)


def _submission(marks: Sequence[Mark], predicted: Sequence[Point | None]) -> str:
    """Return the rows of an ACROBAT file as the challenge takes them; the header alone for none."""
    rows: list[dict[str, str]] = []
    for mark, place in zip(marks, predicted, strict=True):
        if mark.cells is None:
            continue
        # Nothing of the truth goes out, neither one annotator's nor several ones'.
        kept = {
            name: cell
            for name, cell in mark.cells.items()
            if not re.fullmatch(r"he_[0-9]+_[xy]", name)
        }
        x, y = ("", "") if place is None else (f"{value / mark.he_scale:.4f}" for value in place)
        rows.append({**kept, "he_x": x, "he_y": y})
    buffer = io.StringIO()
    names = list(rows[0]) if rows else list(ACROBAT_COLUMNS)
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _read(
    pair: Pair, he_mpp: float | None, her2_mpp: float | None, options: LandmarksOptions
) -> list[Mark]:
    """Read the landmarks of a pair, whichever of the two forms they have."""
    if pair.he_landmarks is None or pair.her2_landmarks is None:
        raise SheetError(
            f"pair {pair.pair}: no landmarks; give he_landmarks and her2_landmarks in pairs.tsv"
        )
    if pair.he_landmarks == pair.her2_landmarks:
        return _read_acrobat(pair, pair.he_landmarks, he_mpp, her2_mpp, options)
    he = _read_plain(pair.he_landmarks, he_mpp)
    her2 = _read_plain(pair.her2_landmarks, her2_mpp)
    if len(he) != len(her2):
        log.warning(
            "pair %s: %d landmarks on H&E and %d on HER2; the first %d of both are taken",
            pair.pair, len(he), len(her2), min(len(he), len(her2)),
        )  # fmt: skip
    # Cut to the shorter of the two on purpose.
    return [
        Mark(str(number), (here,), there)
        for number, (here, there) in enumerate(zip(he, her2, strict=False), 1)
    ]


def _read_acrobat(
    pair: Pair,
    path: Path,
    he_mpp: float | None,
    her2_mpp: float | None,
    options: LandmarksOptions,
) -> list[Mark]:
    """Read a file of the challenge: its names end in .ndpi, though the slides are .tif."""
    lines = _read_csv(path)
    header = list(lines[0][1]) if lines else []
    annotators = [
        name.removesuffix("_x") for name in header if re.fullmatch(r"he_[0-9]+_x", name)
    ] or ["he"]
    needed = [*REQUIRED, *(f"{name}_{axis}" for name in annotators for axis in "xy")]
    lacking = [name for name in needed if name not in header] if lines else []
    if lacking:
        raise TableError(
            f"{path.name}: lacks the columns {', '.join(lacking)} of an ACROBAT landmark file; "
            "plain X,Y files are two, one per slide"
        )
    names = pair.he.stem, pair.her2.stem
    marks: list[Mark] = []
    for number, cells in lines:
        if (Path(cells["anon_filename_he"]).stem, Path(cells["anon_filename_ihc"]).stem) != names:
            continue
        he_scale = her2_scale = 1.0
        if options.coordinates == "px":
            he_scale = _scale(path, number, cells, "mpp_he_10X", he_mpp)
            her2_scale = _scale(path, number, cells, "mpp_ihc_10X", her2_mpp)
        marks.append(
            Mark(
                point=cells["point_id"].strip(),
                he=tuple(_point(path, number, cells, f"{name}_", he_scale) for name in annotators),
                her2=_point(path, number, cells, "ihc_", her2_scale),
                cells=cells,
                he_scale=he_scale,
            )
        )
    if not marks:
        raise TableError(
            f"{path.name}: no landmarks of {pair.he.name} and {pair.her2.name}; name the file that "
            "has them in pairs.tsv, or none"
        )
    return marks


def _read_plain(path: Path, mpp: float | None) -> list[Point | None]:
    """Read a file with the columns X and Y, level-0 pixels, and whatever else."""
    lines = [
        (number, {key.strip().lower(): cell for key, cell in cells.items()})
        for number, cells in _read_csv(path)
    ]
    if not lines:
        raise TableError(f"{path.name}: no landmarks; give rows of X, Y, or name no file")
    if not {"x", "y"} <= lines[0][1].keys():
        raise TableError(
            f"{path.name}: no columns X and Y; give level-0 pixels under these names, or one "
            "ACROBAT file in both he_landmarks and her2_landmarks"
        )
    if mpp is None:
        raise TableError(
            f"{path.name}: pixels of an image without resolution; give he_mpp, her2_mpp in "
            "pairs.tsv"
        )
    return [_point(path, number, cells, "", mpp) for number, cells in lines]


def _read_csv(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Return the rows of a file by column, each with its line."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            return [
                (
                    reader.line_num,
                    {key: cell or "" for key, cell in row.items() if isinstance(key, str)},
                )
                for row in reader
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise TableError(
            f"{path.name}: cannot be read ({said}); save it as comma-separated UTF-8 text"
        ) from error


def _scale(path: Path, line: int, cells: Mapping[str, str], name: str, mpp: float | None) -> float:
    """Return um per pixel: what the row says, or that of the slide."""
    scale = _number(path, line, cells, name) or mpp
    if scale is None or scale <= 0:
        raise TableError(
            f"{path.name}: line {line}, {name}: no resolution; give um per pixel there, or he_mpp "
            "and her2_mpp in pairs.tsv"
        )
    return scale


def _number(path: Path, line: int, cells: Mapping[str, str], name: str) -> float | None:
    """Return a cell as a number; None where it is empty, NaN or not there."""
    text = cells.get(name, "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise TableError(
            f"{path.name}: line {line}, {name}: {text[:40]!r} is no number; mend it or leave it "
            "empty"
        ) from None
    if abs(value) > COORDINATE_MAX:
        raise TableError(
            f"{path.name}: line {line}, {name}: {text[:40]} lies on no slide; mend it or leave it "
            "empty"
        )
    return None if math.isnan(value) else value


def _point(
    path: Path, line: int, cells: Mapping[str, str], prefix: str, scale: float
) -> Point | None:
    x, y = (_number(path, line, cells, f"{prefix}{axis}") for axis in "xy")
    return None if x is None or y is None else (x * scale, y * scale)
