"""Landmark files: ACROBAT's form and plain X, Y files; ACROBAT's rows with predictions."""

import dataclasses
import logging
import warnings
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.optimize
import scipy.spatial

from hemera.errors import SheetError, TableError
from hemera.files.faults import translated
from hemera.files.geojson import COORDINATE_MAX
from hemera.sheet import Pair

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]

ACROBAT_COLUMNS = (
    *("anon_id", "anon_filename_he", "anon_filename_ihc", "point_id", "ihc_x", "ihc_y"),
    *("mpp_ihc_10X", "mpp_he_10X", "ihc_antibody", "he_x", "he_y"),
)
"""As released. Where several annotators marked H&E: ``he_1_x``, ``he_1_y``, ``he_2_x`` ..."""

REQUIRED = ("anon_filename_he", "anon_filename_ihc", "point_id", "ihc_x", "ihc_y")
_ANNOTATOR = r"he_[0-9]+_[xy]"

ID_COLUMNS = ("point_id", "id", "point", "landmark", "name", "n", "unnamed: 0", "")
"""Columns of plain files that identify points, in lower case; a first column without a name is one,
as in files of BIRL and ImageJ."""
CHECKED_MIN = 8
"""Fewer landmarks do not show whether their order is right, nor that they are mirror images."""
MISPLACED_MAX = 0.1
"""Largest fraction of landmarks that fit the place of another one better."""
SHIFTED_MIN = 3
"""Smallest number of successive landmarks that a missing row moves."""
SCALE_MAX = 1.4
"""Largest factor between the scales of both slides' landmarks, um; levels differ by 2 and more."""
IDS = "a column id with names that are not the numbers of the rows, such as p1"
"""What pairs landmarks without a check of their order, for messages."""


@dataclasses.dataclass(frozen=True, eq=False)
class Landmarks:
    """The N landmarks of a pair, um; NaN: a side that is withheld."""

    points: Sequence[str]
    """Names; rows with the same name are annotations of one point."""
    he: Floats
    """(N, annotators, 2) as (x, y)."""
    her2: Floats
    """(N, 2)."""
    rows: pd.DataFrame | None = None
    """The rows of an ACROBAT file."""
    he_scale: Floats | float = 1.0
    """Um per unit of the H&E coordinates in `rows`."""


NONE = Landmarks((), np.zeros((0, 1, 2)), np.zeros((0, 2)))


def read_landmarks(
    pair: Pair,
    he_mpp: float | None,
    her2_mpp: float | None,
    coordinates: str,
    he_size_px: tuple[int, int] | None = None,
    her2_size_px: tuple[int, int] | None = None,
) -> Landmarks:
    """Read the landmarks of a pair: one ACROBAT file, or two files with the columns X and Y.

    `coordinates` is the unit of an ACROBAT file, um or px; plain files are in level-0 pixels. Their
    points correspond by id where both files have one, else by row; numbers of the rows are no ids.
    Points of plain files are compared with the sizes of the slides, (width, height), where given.

    Raises:
        TableError: a file that is none; the points of one slide twice; points outside the slide, or
            of another resolution; without ids, unequal counts; points that do not correspond.
    """
    if pair.he_landmarks is None or pair.her2_landmarks is None:
        raise SheetError(
            f"pair {pair.pair}: no landmarks; give he_landmarks and her2_landmarks in the sheet"
        )
    if pair.he_landmarks == pair.her2_landmarks:
        return _read_acrobat(pair, pair.he_landmarks, he_mpp, her2_mpp, coordinates)
    return _pair_plain(
        pair,
        (pair.he_landmarks, _read_plain(pair.he_landmarks, he_mpp, pair.he, he_size_px)),
        (
            pair.her2_landmarks,
            _read_plain(pair.her2_landmarks, her2_mpp, pair.her2_image, her2_size_px),
        ),
    )


def predictions_csv(landmarks: Landmarks, predicted: Floats) -> str:
    """Return the rows of an ACROBAT file with predicted H&E coordinates, for submission.

    They are in the file's unit, without the annotators' columns; for plain files the header alone.
    `predicted` is (N, 2) on H&E, um; NaN leaves the cells empty.
    """
    if landmarks.rows is None:
        return ",".join(ACROBAT_COLUMNS) + "\n"
    rows = landmarks.rows.loc[:, ~landmarks.rows.columns.str.fullmatch(_ANNOTATOR)].copy()
    for name, um in zip(("he_x", "he_y"), predicted.T, strict=True):
        places = um / landmarks.he_scale
        rows[name] = ["" if np.isnan(place) else f"{place:.4f}" for place in places]
    return str(rows.to_csv(index=False, lineterminator="\n"))


def join_predictions(paths: Sequence[Path]) -> str:
    """Join files of `predictions_csv` below one header."""
    tables = [read_cells(path) for path in paths]
    given = [table for table in tables if len(table)]
    joined = pd.concat(given or tables[:1]).fillna("")
    return str(joined.to_csv(index=False, lineterminator="\n"))


def _read_acrobat(
    pair: Pair, path: Path, he_mpp: float | None, her2_mpp: float | None, coordinates: str
) -> Landmarks:
    """Read an ACROBAT file; its file names end in .ndpi, while the slides are .tif."""
    table = read_cells(path)
    he_columns = list(table.columns[table.columns.str.fullmatch(_ANNOTATOR)]) or ["he_x", "he_y"]
    lacking = [name for name in (*REQUIRED, *he_columns) if name not in table]
    if lacking:
        raise TableError(
            f"{path.name}: lacks the columns {', '.join(lacking)} of an ACROBAT landmark file; "
            "plain X,Y files are two, one per slide"
        )
    files = table[["anon_filename_he", "anon_filename_ihc"]].map(lambda name: Path(name).stem)
    table = table[(files == [pair.he.stem, pair.her2_image.stem]).all(axis=1)]
    if table.empty:
        raise TableError(
            f"{path.name}: no landmarks of {pair.he.name} and {pair.her2_image.name}; give the "
            "file that contains them in the sheet, or none"
        )
    he = _points(path, table, he_columns)
    her2 = _points(path, table, ["ihc_x", "ihc_y"])[:, 0]
    points = [name.strip() for name in table["point_id"]]
    if coordinates == "um":
        return Landmarks(points, he, her2, table)
    he_scale = _scale(path, table, "mpp_he_10X", he_mpp)
    her2_scale = _scale(path, table, "mpp_ihc_10X", her2_mpp)
    return Landmarks(
        points, he * he_scale[:, None, None], her2 * her2_scale[:, None], table, he_scale
    )


def _pair_plain(
    pair: Pair,
    he_file: tuple[Path, tuple[list[str] | None, Floats]],
    her2_file: tuple[Path, tuple[list[str] | None, Floats]],
) -> Landmarks:
    """Pair the points of two plain files by id where both have one, else by row.

    Numbers that run with the rows of both files are no ids: software writes them, and they change
    where a row is removed. The order of the rows is checked for these too.
    """
    (he_path, (he_ids, he)), (her2_path, (her2_ids, her2)) = he_file, her2_file
    same = len(he) >= CHECKED_MIN and he_path.read_bytes() == her2_path.read_bytes()
    if same and not pair.registered:
        raise TableError(
            f"{he_path.name}, {her2_path.name}: the same points; give those of each slide, or "
            "write true in column registered"
        )
    if he_ids is None or her2_ids is None:
        if len(he) != len(her2):
            raise TableError(
                f"{he_path.name}: {len(he)} landmarks, {len(her2)} in {her2_path.name}; without "
                "ids row n corresponds to row n: add the missing rows, or a column id to both files"
            )
        _check_order(he_path.name, he, her2)
        _check_map(pair, he, her2)
        return Landmarks([str(n + 1) for n in range(len(he))], he[:, None], her2)
    common = [name for name in he_ids if name in set(her2_ids)]
    if not common:
        raise TableError(
            f"{he_path.name}, {her2_path.name}: no id is in both; give corresponding points one id"
        )
    if _running(he_ids) and _running(her2_ids):
        if he_ids[0] != her2_ids[0]:
            raise TableError(
                f"{he_path.name}, {her2_path.name}: ids that count the rows from {he_ids[0]} and "
                f"from {her2_ids[0]}; count both from one number"
            )
        _check_order(he_path.name, he, her2)
    single = [name for name in (*he_ids, *her2_ids) if name not in set(common)]
    if single:
        words = "pair %s: landmarks without a point of the same id on the other slide: %s"
        log.warning(words, pair.pair, ", ".join(single))
    he, her2 = (
        points[[ids.index(name) for name in common]]
        for ids, points in ((he_ids, he), (her2_ids, her2))
    )
    _check_map(pair, he, her2)
    return Landmarks(common, he[:, None], her2)


def _running(ids: Sequence[str]) -> bool:
    """Return whether ids are the numbers of their rows, counted from 0 or 1."""
    return any(list(ids) == [str(n + first) for n in range(len(ids))] for first in (0, 1))


def _check_order(name: str, he: Floats, her2: Floats) -> None:
    """Raise an error where landmarks (N, 2) fit other points of HER2 (M, 2) better than their own.

    An affine map is fitted to the first rows of both by least median of squares, and its
    predictions are assigned to the points of HER2 by least total distance. The order of the rows is
    wrong where these assignments differ from the rows for more than `MISPLACED_MAX` of them, or by
    the same number in `SHIFTED_MIN` rows in succession, or where a row is assigned that one file
    has more at its end: a row is missing then. A section that bends by less than the distance of
    two landmarks does not change them. `name` is that of the H&E file.
    """
    common = min(len(he), len(her2))
    rows = np.flatnonzero(np.isfinite(he[:common, 0]) & np.isfinite(her2[:common, 0]))
    withheld = np.setdiff1d(np.arange(common), rows)
    # Rows that one file alone has are at its end, unless one is missing in the other.
    given_he, given_her2 = (
        np.setdiff1d(np.flatnonzero(np.isfinite(side[:, 0])), withheld) for side in (he, her2)
    )
    matrix = None
    if len(rows) >= CHECKED_MIN:
        matrix, _ = cv2.estimateAffine2D(he[rows], her2[rows], method=cv2.LMEDS)
    if matrix is None:
        if len(he) != len(her2):
            raise TableError(
                f"{name}: {len(he)} landmarks, {len(her2)} on HER2, too few to check their order; "
                f"add the missing rows, or give both files {IDS}"
            )
        words = "%s: too few landmarks (%d) to check that their order is right; give both files %s"
        log.warning(words, name, len(rows), IDS)
        return
    predicted = he[given_he] @ matrix[:, :2].T + matrix[:, 2]
    distances = np.linalg.norm(predicted[:, None] - her2[given_her2], axis=2)
    own, other = scipy.optimize.linear_sum_assignment(distances)
    shift = given_her2[other] - given_he[own]
    wrong = given_he[own][shift != 0]
    same = (shift[1:] == shift[:-1]) & (shift[1:] != 0)
    in_succession = 1 + max((len(list(run)) for equal, run in groupby(same) if equal), default=0)
    of_end = bool((given_he[own] >= common).any() or (given_her2[other] >= common).any())
    if len(wrong) > MISPLACED_MAX * len(rows) or in_succession >= SHIFTED_MIN or of_end:
        raise TableError(
            f"{name}: {len(wrong)} of {len(rows)} landmarks do not correspond to those of HER2 in "
            f"this order (first: row {wrong[0] + 1}); a row is missing or moved: correct the "
            f"order, or give both files {IDS}"
        )


def _check_map(pair: Pair, he: Floats, her2: Floats) -> None:
    """Raise an error where corresponding points (N, 2), um, differ in scale.

    Warn where they are mirror images and the sheet differs, and where a side is withheld.
    """
    known = np.isfinite(he[:, 0]) & np.isfinite(her2[:, 0])
    if not known.all():
        words = "pair %s: %d of %d landmarks have no coordinates on one of the slides"
        log.warning(words, pair.pair, (~known).sum(), len(known))
    if known.sum() < CHECKED_MIN:
        return
    near, far = (scipy.spatial.distance.pdist(side[known]) for side in (he, her2))
    scale = float(np.median(far / np.maximum(near, 1e-9)))
    if not 1 / SCALE_MAX <= scale <= SCALE_MAX:
        raise TableError(
            f"{pair.landmarks[0].name}, {pair.landmarks[1].name}: the points of HER2 are "
            f"{scale:.2f} times as far apart as those of H&E, in um; give level-0 pixels of both "
            "slides, or correct he_mpp, her2_mpp"
        )
    matrix, _ = cv2.estimateAffine2D(he[known], her2[known], method=cv2.LMEDS)
    if matrix is not None and (np.linalg.det(matrix[:, :2]) < 0) != pair.mirrored:
        found, remedy = (
            ("no mirror images of each other", "clear column mirrored")
            if pair.mirrored
            else ("mirror images of each other", "write true in column mirrored")
        )
        words = "pair %s: the landmarks of H&E and HER2 are %s; X and Y are exchanged, or %s"
        log.warning(words, pair.pair, found, remedy)


def _read_plain(
    path: Path, mpp: float | None, image: Path, size_px: tuple[int, int] | None
) -> tuple[list[str] | None, Floats]:
    """Read a file with the columns X and Y, level-0 pixels: ids, if any, and (N, 2) um."""
    table = read_cells(path).rename(columns=lambda name: name.strip().lower())
    table = table[(table != "").any(axis=1)]
    names = list(table.columns)
    if repeated := [name for name in ("x", "y", *ID_COLUMNS) if names.count(name) > 1]:
        raise TableError(f"{path.name}: several columns {repeated[0]}; keep one of them")
    if not {"x", "y"} <= set(table.columns):
        raise TableError(
            f"{path.name}: no columns X and Y; give level-0 pixels under these names, or one "
            "ACROBAT file in both he_landmarks and her2_landmarks"
        )
    if table.empty:
        raise TableError(f"{path.name}: no landmarks; give rows of X, Y, or name no file")
    if mpp is None:
        raise TableError(
            f"{path.name}: pixels of an image without resolution; give he_mpp, her2_mpp in "
            "the sheet"
        )
    pixels = _points(path, table, ["x", "y"])[:, 0]
    if size_px is not None:
        outside = np.flatnonzero(((pixels < 0) | (pixels > size_px)).any(axis=1))
        if len(outside):
            raise TableError(
                f"{path.name}: {len(outside)} of {len(pixels)} landmarks are outside {image.name}, "
                f"{size_px[0]} x {size_px[1]} px (first: line {table.index[outside[0]] + 2}); give "
                "level-0 pixels of this file"
            )
    points = pixels * mpp
    column = next((name for name in ID_COLUMNS if name in table), None)
    if column is None:
        return None, points
    ids = [name.strip() for name in table[column]]
    shared = [name for name in ids if ids.count(name) > 1 or not name]
    if shared:
        raise TableError(
            f"{path.name}: id {shared[0]!r} is not of one point alone; give every point its own"
        )
    return ids, points


def _points(path: Path, table: pd.DataFrame, columns: list[str]) -> Floats:
    """Return points (N, columns / 2, 2); NaN in both coordinates where one is empty."""
    points = coordinates_of(path, table, columns).reshape(len(table), -1, 2)
    return np.where(np.isnan(points).any(axis=2, keepdims=True), np.nan, points)


def _scale(path: Path, table: pd.DataFrame, column: str, mpp: float | None) -> Floats:
    """Return um per pixel of each row: the cell, or `mpp` where it is empty."""
    cells = coordinates_of(path, table.reindex(columns=[column], fill_value=""), [column])[:, 0]
    scale = np.where(np.isnan(cells), np.nan if mpp is None else mpp, cells)
    wrong = np.flatnonzero(~(scale > 0))
    if len(wrong):
        raise TableError(
            f"{path.name}: line {table.index[wrong[0]] + 2}, {column}: no resolution; give um per "
            "pixel there, or he_mpp and her2_mpp in the sheet"
        )
    return scale


def coordinates_of(path: Path, table: pd.DataFrame, columns: list[str]) -> Floats:
    """Return cells as numbers (N, columns); NaN where a cell is empty or NaN."""
    texts = table[columns].map(str.strip)
    values = texts.apply(pd.to_numeric, errors="coerce")
    empty = texts.map(str.lower).isin(["", "nan"])
    wrong = (values.isna() & ~empty) | (values.abs() > COORDINATE_MAX)
    if wrong.to_numpy().any():
        n, column = np.argwhere(wrong)[0]
        raise TableError(
            f"{path.name}: line {table.index[n] + 2}, {columns[column]}: "
            f"{texts.iloc[n, column][:40]!r} is no coordinate on a slide; correct or clear it"
        )
    numbers: Floats = values.to_numpy(np.float64)
    return numbers


def read_cells(path: Path) -> pd.DataFrame:
    """Read all cells of a CSV file as text; a row's label is its line minus 2."""
    message = f"{path.name}: cannot be read ({{error}}); save it as comma-separated UTF-8 text, "
    message += "with a decimal point and no more cells in a line than in the first"
    with translated(TableError, message), warnings.catch_warnings():
        # Cells beyond those of the header would be dropped: of 0,1,5,2,5 x is 1 and y is 5.
        warnings.simplefilter("error", pd.errors.ParserWarning)
        table = pd.read_csv(
            path, dtype=str, keep_default_na=False, skip_blank_lines=False, index_col=False,
            encoding="utf-8-sig",
        )  # fmt: skip
    return table.dropna(how="all").fillna("")
