"""Measure the registration error at an expert's landmarks."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hemera import tables
from hemera.config import LandmarksOptions
from hemera.displacement import Displacement, identity, map_points, mirrored
from hemera.errors import SheetError, TableError
from hemera.files import read_displacement
from hemera.sheet import Pair, read_sheet

log = logging.getLogger(__name__)

ACROBAT_COLUMNS = (
    "anon_filename_he",
    "anon_filename_ihc",
    "point_id",
    "he_x",
    "he_y",
    "ihc_x",
    "ihc_y",
)

Marks = list[tuple[str, tuple[float, float] | None, tuple[float, float] | None]]
"""Point, H&E side and HER2 side in um; one per annotator. None: that side is withheld."""


def run(
    *,
    sheet: Path,
    unit: str,
    images_table: Path,
    displacement: Path | None = None,
    errors: Path,
    options: LandmarksOptions,
) -> None:
    """Compute the target registration error of one pair.

    The H&E side of each point is mapped to HER2; the error is the distance to the HER2 side there.
    Where several annotators marked a point, their distances are averaged, as ACROBAT does.

    Args:
        sheet: the sheet of pairs.
        unit: the pair.
        images_table: table `tables.DESCRIBE` of the unit: sizes and resolutions.
        displacement: the map from H&E to HER2; None for a pair that comes registered.
        errors: table `tables.LANDMARKS`, one row per point; zero rows where there is no map.
        options: settings.

    Raises:
        SheetError: when the sheet has no such pair, or no landmarks for it.
        TableError: when a landmark file cannot be read as one.
        RegistrationError: when the displacement cannot be read.
    """
    pair = next((pair for pair in read_sheet(sheet).pairs if pair.pair == unit), None)
    if pair is None:
        raise SheetError(f"{sheet.name}: no pair {unit}; name one of its pairs")
    described = {
        row["stain"]: row
        for row in tables.read(images_table, tables.DESCRIBE).to_pylist()
        if row["pair"] == unit and row["mpp"] is not None
    }
    rows: list[dict[str, Any]] = []
    if len(described) < 2:
        log.warning("pair %s: an image without resolution; no error to measure", unit)
    elif (d := _map(pair, described, displacement)).empty:
        log.warning("pair %s: no map; no error to measure", unit)
    else:
        he, her2 = described["he"], described["her2"]
        marks = _read(pair, he["mpp"], her2["mpp"], options)
        diagonal_um = he["mpp"] * math.hypot(he["width_px"], he["height_px"])
        rows = _rows(unit, marks, d, diagonal_um)
        found = [row["error_um"] for row in rows if row["error_um"] is not None]
        if found:
            log.info(
                "pair %s: %d points, median %.1f um, 90th percentile %.1f um",
                unit, len(found), np.median(found), np.percentile(found, 90),
            )  # fmt: skip
    tables.write(errors, rows, tables.LANDMARKS, tables.provenance(options))


def _map(
    pair: Pair, described: Mapping[str, Mapping[str, Any]], displacement: Path | None
) -> Displacement:
    """Return the map to be judged: that of a file, or the identity of a registered pair."""
    if displacement is not None:
        return read_displacement(displacement)
    he, her2 = described["he"], described["her2"]
    width_um, height_um = (he[f"{side}_px"] * he["mpp"] for side in ("width", "height"))
    d = identity(width_um, height_um, max(width_um, height_um) / 16)
    return mirrored(d, her2["width_px"] * her2["mpp"]) if pair.mirrored else d


def _rows(pair: str, marks: Marks, d: Displacement, diagonal_um: float) -> list[dict[str, Any]]:
    by_point: dict[str, Marks] = {}
    for mark in marks:
        by_point.setdefault(mark[0], []).append(mark)
    rows = []
    for point, group in by_point.items():
        he, her2 = _mean(mark[1] for mark in group), _mean(mark[2] for mark in group)
        both = [(here, there) for _, here, there in group if here and there]
        error = initial = None
        if both:
            here, there = (np.array(side) for side in zip(*both, strict=True))
            error = float(np.linalg.norm(map_points(d, here) - there, axis=1).mean())
            initial = float(np.linalg.norm(here - there, axis=1).mean())
        rows.append(
            {
                "pair": pair,
                "point": point,
                "he_x_um": he[0],
                "he_y_um": he[1],
                "her2_x_um": her2[0],
                "her2_y_um": her2[1],
                "error_um": error,
                "error_diagonal_fraction": None if error is None else error / diagonal_um,
                "initial_error_um": initial,
            }
        )
    return rows


def _mean(
    points: Iterable[tuple[float, float] | None],
) -> tuple[float, float] | tuple[None, None]:
    given = [point for point in points if point is not None]
    if not given:
        return None, None
    x, y = np.mean(given, axis=0)
    return float(x), float(y)


def check_landmarks(pair: Pair) -> None:
    """Read the landmark files of a pair, whatever the resolutions.

    Raises:
        SheetError: when the sheet gives only one of the two.
        TableError: when a file cannot be read as one of landmarks.
    """
    _read(pair, 1.0, 1.0, LandmarksOptions())


def _read(pair: Pair, he_mpp: float, her2_mpp: float, options: LandmarksOptions) -> Marks:
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
        (str(number), here, there)
        for number, (here, there) in enumerate(zip(he, her2, strict=False), 1)
    ]


def _read_acrobat(
    pair: Pair, path: Path, he_mpp: float, her2_mpp: float, options: LandmarksOptions
) -> Marks:
    """Read a file of the challenge: its names end in .ndpi, though the slides are .tif."""
    lines = _read_csv(path)
    lacking = [name for name in ACROBAT_COLUMNS if name not in lines[0]] if lines else []
    if lacking:
        raise TableError(
            f"{path.name}: lacks the columns {', '.join(lacking)} of an ACROBAT landmark file; "
            "plain X,Y files are two, one per slide"
        )
    marks: Marks = []
    for number, line in enumerate(lines, 2):
        if (Path(line["anon_filename_he"]).stem, Path(line["anon_filename_ihc"]).stem) != (
            pair.he.stem,
            pair.her2.stem,
        ):
            continue
        scales = (1.0, 1.0)
        if options.coordinates == "px":
            scales = (
                _number(path, number, line, "mpp_he_10X") or he_mpp,
                _number(path, number, line, "mpp_ihc_10X") or her2_mpp,
            )
        sides = [
            _point(
                _number(path, number, line, f"{side}_x"),
                _number(path, number, line, f"{side}_y"),
                scale,
            )
            for side, scale in zip(("he", "ihc"), scales, strict=True)
        ]
        marks.append((line["point_id"], sides[0], sides[1]))
    if not marks:
        log.warning(
            "%s: no landmarks of %s and %s; no error to measure",
            path.name, pair.he.name, pair.her2.name,
        )  # fmt: skip
    return marks


def _read_plain(path: Path, mpp: float) -> list[tuple[float, float] | None]:
    """Read a file with the columns X and Y, level-0 pixels, and whatever else."""
    lines = [
        {key.strip().lower(): value for key, value in line.items()} for line in _read_csv(path)
    ]
    if lines and not {"x", "y"} <= lines[0].keys():
        raise TableError(
            f"{path.name}: no columns X and Y; give level-0 pixels under these names, or one "
            "ACROBAT file in both he_landmarks and her2_landmarks"
        )
    return [
        _point(_number(path, number, line, "x"), _number(path, number, line, "y"), mpp)
        for number, line in enumerate(lines, 2)
    ]


def _read_csv(path: Path) -> list[dict[str, str]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return [
                {key or "": value or "" for key, value in line.items() if isinstance(key, str)}
                for line in csv.DictReader(file)
            ]
    except FileNotFoundError:
        raise TableError(f"{path}: no such landmark file; name another in pairs.tsv") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TableError(
            f"{path.name}: cannot be read ({error}); save it as comma-separated UTF-8 text"
        ) from error


def _number(path: Path, line: int, row: Mapping[str, str], name: str) -> float | None:
    """Return a cell as a number; None where it is empty, NaN or not there."""
    text = row.get(name, "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise TableError(
            f"{path.name}: line {line}, {name}: {text!r} is no number; mend it or leave it empty"
        ) from None
    return value if math.isfinite(value) else None


def _point(x: float | None, y: float | None, scale: float) -> tuple[float, float] | None:
    return None if x is None or y is None else (x * scale, y * scale)
