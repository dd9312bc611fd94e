"""Landmark files: ACROBAT's form and plain X, Y files; ACROBAT's rows with predictions."""

from __future__ import annotations

import collections
import csv
import dataclasses
import io
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from hemera.errors import SheetError, TableError
from hemera.files.faults import translated
from hemera.sheet import Pair

log = logging.getLogger(__name__)

ACROBAT_COLUMNS = (
    *("anon_id", "anon_filename_he", "anon_filename_ihc", "point_id", "ihc_x", "ihc_y"),
    *("mpp_ihc_10X", "mpp_he_10X", "ihc_antibody", "he_x", "he_y"),
)
"""As released. Where several annotators marked H&E: ``he_1_x``, ``he_1_y``, ``he_2_x`` ..."""

REQUIRED = ("anon_filename_he", "anon_filename_ihc", "point_id", "ihc_x", "ihc_y")
COORDINATE_MAX = 1e7
"""Larger coordinates are outside any slide, in um and in pixels."""

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Landmark:
    """One row of a landmark file, in um; None: a side that is withheld."""

    point: str
    he: tuple[Point | None, ...]
    """One per annotator."""
    her2: Point | None
    cells: Mapping[str, str] | None = None
    """The row of an ACROBAT file; None: of another file."""
    he_scale: float = 1.0
    """Um per unit of its H&E coordinates."""


@dataclasses.dataclass(frozen=True)
class _Row:
    """One row of a CSV file; its errors name the file and the line."""

    path: Path
    line: int
    cells: Mapping[str, str]

    def number(self, name: str) -> float | None:
        """Return a cell as a number; None where it is empty, NaN or missing."""
        text = self.cells.get(name, "").strip()
        try:
            value = float(text or "nan")
        except ValueError:
            raise self.error(name, f"{text[:40]!r} is not a number; correct or clear it") from None
        if abs(value) > COORDINATE_MAX:
            raise self.error(name, f"{text[:40]} is outside any slide; correct or clear it")
        return None if math.isnan(value) else value

    def point(self, prefix: str, scale: float) -> Point | None:
        """Return the cells `{prefix}x`, `{prefix}y` times `scale`; None where one is empty."""
        x, y = (self.number(f"{prefix}{axis}") for axis in "xy")
        return None if x is None or y is None else (x * scale, y * scale)

    def scale(self, name: str, mpp: float | None) -> float:
        """Return um per pixel: the cell, or `mpp` where it is empty."""
        scale = self.number(name) or mpp
        if scale is None or scale <= 0:
            raise self.error(
                name, "no resolution; give um per pixel there, or he_mpp and her2_mpp in pairs.tsv"
            )
        return scale

    def error(self, name: str, what: str) -> TableError:
        """Return an error about one cell."""
        return TableError(f"{self.path.name}: line {self.line}, {name}: {what}")


def read_landmarks(
    pair: Pair, he_mpp: float | None, her2_mpp: float | None, coordinates: str
) -> list[Landmark]:
    """Read the landmarks of a pair: one ACROBAT file, or two files with the columns X and Y.

    Args:
        pair: the pair.
        he_mpp: um per pixel of the H&E slide; None: unknown.
        her2_mpp: of the HER2 slide.
        coordinates: unit of an ACROBAT file, ``um`` or ``px``; plain files are in level-0 pixels.

    Raises:
        SheetError: when the sheet does not give two files.
        TableError: when a file cannot be read, or contains no landmarks of the pair.
    """
    if pair.he_landmarks is None or pair.her2_landmarks is None:
        raise SheetError(
            f"pair {pair.pair}: no landmarks; give he_landmarks and her2_landmarks in pairs.tsv"
        )
    if pair.he_landmarks == pair.her2_landmarks:
        return _read_acrobat(pair, pair.he_landmarks, he_mpp, her2_mpp, coordinates)
    he = _read_plain(pair.he_landmarks, he_mpp)
    her2 = _read_plain(pair.her2_landmarks, her2_mpp)
    count = min(len(he), len(her2))
    if len(he) != len(her2):
        log.warning(
            "pair %s: %d landmarks on H&E and %d on HER2; only the first %d of both are used",
            pair.pair, len(he), len(her2), count,
        )  # fmt: skip
    return [Landmark(str(n + 1), (he[n],), her2[n]) for n in range(count)]


def check_landmarks(pair: Pair) -> None:
    """Read the landmark files of a pair, without regard to resolutions.

    Raises:
        SheetError: when the sheet gives only one of the two.
        TableError: when a file cannot be read, or contains no landmarks of the pair.
    """
    read_landmarks(pair, 1.0, 1.0, "um")


def predictions_csv(landmarks: Sequence[Landmark], predicted: Sequence[Point | None]) -> str:
    """Return the rows of an ACROBAT file with predicted H&E coordinates, for submission.

    Args:
        landmarks: of a pair; those of plain files are left out.
        predicted: on H&E, um; None: no prediction, which leaves the cells empty.

    Returns:
        CSV in the file's unit without the annotators' columns; the header alone for no rows.
    """
    rows: list[dict[str, str]] = []
    for landmark, place in zip(landmarks, predicted, strict=True):
        if landmark.cells is None:
            continue
        kept = {
            name: cell
            for name, cell in landmark.cells.items()
            if not re.fullmatch(r"he_[0-9]+_[xy]", name)
        }
        kept["he_x"], kept["he_y"] = (
            ("", "") if place is None else (f"{um / landmark.he_scale:.4f}" for um in place)
        )
        rows.append(kept)
    return _csv_text(list(rows[0]) if rows else ACROBAT_COLUMNS, rows)


def join_predictions(paths: Sequence[Path]) -> str:
    """Join the predictions of all pairs below one header; warn of what ACROBAT would drop.

    Args:
        paths: files of `predictions_csv`.

    Raises:
        TableError: when a file is missing.
    """
    columns: dict[str, None] = {}
    rows: list[Mapping[str, str]] = []
    for path in paths:
        if not path.is_file():
            raise TableError(f"{path}: no such file; run stage landmarks")
        own = _read_csv(path)
        # A file without rows has no columns of its own.
        columns |= dict.fromkeys(own[0].cells if own else ())
        rows += [row.cells for row in own]
    names = tuple(columns) or ACROBAT_COLUMNS
    blank = [
        name
        for name in names
        if name not in ("he_x", "he_y")
        and any(row.get(name, "").strip().lower() in ("", "nan") for row in rows)
    ]
    if blank:
        log.warning(
            "predictions: empty cells in %s; ACROBAT drops rows with empty cells", ", ".join(blank)
        )
    counts = collections.Counter(row["point_id"] for row in rows)
    repeated = sum(count > 1 for count in counts.values())
    if repeated:
        log.warning(
            "predictions: %d point_id occur in several rows; ACROBAT joins on point_id alone, so "
            "each must be unique in the file",
            repeated,
        )
    return _csv_text(names, rows)


def _read_acrobat(
    pair: Pair, path: Path, he_mpp: float | None, her2_mpp: float | None, coordinates: str
) -> list[Landmark]:
    """Read an ACROBAT file; its file names end in .ndpi, while the slides are .tif."""
    rows = _read_csv(path)
    header = list(rows[0].cells) if rows else []
    annotators = [
        name.removesuffix("_x") for name in header if re.fullmatch(r"he_[0-9]+_x", name)
    ] or ["he"]
    needed = [*REQUIRED, *(f"{name}_{axis}" for name in annotators for axis in "xy")]
    lacking = [name for name in needed if name not in header] if rows else []
    if lacking:
        raise TableError(
            f"{path.name}: lacks the columns {', '.join(lacking)} of an ACROBAT landmark file; "
            "plain X,Y files are two, one per slide"
        )
    names = [pair.he.stem, pair.her2.stem]
    found: list[Landmark] = []
    for row in rows:
        files = (row.cells["anon_filename_he"], row.cells["anon_filename_ihc"])
        if [Path(file).stem for file in files] != names:
            continue
        he_scale = her2_scale = 1.0
        if coordinates == "px":
            he_scale = row.scale("mpp_he_10X", he_mpp)
            her2_scale = row.scale("mpp_ihc_10X", her2_mpp)
        he = tuple(row.point(f"{name}_", he_scale) for name in annotators)
        her2 = row.point("ihc_", her2_scale)
        found.append(Landmark(row.cells["point_id"].strip(), he, her2, row.cells, he_scale))
    if not found:
        raise TableError(
            f"{path.name}: no landmarks of {pair.he.name} and {pair.her2.name}; give the file that "
            "contains them in pairs.tsv, or none"
        )
    return found


def _read_plain(path: Path, mpp: float | None) -> list[Point | None]:
    """Read a file with the columns X and Y, level-0 pixels; other columns are ignored."""
    rows = [
        dataclasses.replace(
            row, cells={name.strip().lower(): cell for name, cell in row.cells.items()}
        )
        for row in _read_csv(path)
    ]
    if not rows:
        raise TableError(f"{path.name}: no landmarks; give rows of X, Y, or name no file")
    if not {"x", "y"} <= rows[0].cells.keys():
        raise TableError(
            f"{path.name}: no columns X and Y; give level-0 pixels under these names, or one "
            "ACROBAT file in both he_landmarks and her2_landmarks"
        )
    if mpp is None:
        raise TableError(
            f"{path.name}: pixels of an image without resolution; give he_mpp, her2_mpp in "
            "pairs.tsv"
        )
    return [row.point("", mpp) for row in rows]


def _read_csv(path: Path) -> list[_Row]:
    message = f"{path.name}: cannot be read ({{error}}); save it as comma-separated UTF-8 text"
    with translated(TableError, message), path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        return [
            _Row(
                path,
                reader.line_num,
                # A row longer than the header has its rest under None.
                {name: cell or "" for name, cell in row.items() if isinstance(name, str)},
            )
            for row in reader
        ]


def _csv_text(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
