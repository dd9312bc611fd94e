"""Registration errors at landmarks: target registration error and the figures of ACROBAT."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hemera.registration.displacement import Displacement, inverse_points, map_points
from hemera.registration.landmarks import Landmark, Point

Group = list[tuple[Landmark, Point | None]]
"""The rows of one point, with predictions."""

TOLERANCE_UM = 0.01
"""Largest distance on HER2 between a landmark and its mapped prediction."""

_median = functools.partial(np.percentile, q=50)
_p90 = functools.partial(np.percentile, q=90)

FIGURES: Mapping[str, tuple[str, Callable[..., Any]]] = {
    "error_median_um": ("error_um", _median),
    "error_p90_um": ("error_um", _p90),
    "error_median_diagonal_fraction": ("error_diagonal_fraction", _median),
    "error_p90_diagonal_fraction": ("error_diagonal_fraction", _p90),
    "initial_error_median_um": ("initial_error_um", _median),
    "initial_error_p90_um": ("initial_error_um", _p90),
    "official_error_p90_um": ("official_error_um", _p90),
    "official_error_mean_um": ("official_error_um", np.mean),
    "official_initial_error_p90_um": ("official_initial_error_um", _p90),
    "official_initial_error_mean_um": ("official_initial_error_um", np.mean),
}
"""Figures of a pair: each a statistic of a column of `tables.LANDMARKS` over its points."""

AGGREGATIONS: Mapping[str, Callable[..., Any]] = {
    "median": np.median,
    "mean": np.mean,
    "std": np.std,
}
"""Figures of a cohort: statistics of the figures of its pairs."""


def official_error(
    predicted: Point | None,
    her2: Point,
    he: Sequence[Point],
    size_um: npt.NDArray[np.float64] | None,
) -> float:
    """Return the distance of a prediction from H&E as in ACROBAT's evaluation, um.

    Without a prediction, the unregistered HER2 coordinates count as one. Points outside the H&E
    slide are moved to its edge. The distances to the annotators are averaged.

    Args:
        predicted: the HER2 landmark mapped to H&E, um; None: no prediction.
        her2: the landmark on HER2, um.
        he: the landmark on H&E, one per annotator, um.
        size_um: (width, height) of the H&E slide; None: unknown, no point is moved.
    """
    place = np.array(her2 if predicted is None else predicted)
    place = np.clip(place, 0.0, np.inf if size_um is None else size_um)
    return float(np.linalg.norm(np.array(he) - place, axis=1).mean())


def predict(d: Displacement, landmarks: Sequence[Landmark]) -> list[Point | None]:
    """Map the HER2 side of landmarks to H&E, um; None without HER2 side or corresponding point.

    Raises:
        RegistrationError: when the displacement cannot be inverted.
    """
    her2 = np.array([landmark.her2 or (math.nan, math.nan) for landmark in landmarks], np.float64)
    given = np.array([landmark.her2 is not None for landmark in landmarks], np.bool_)
    places = np.full((len(landmarks), 2), math.nan)
    if given.any() and not d.empty:
        places[given] = inverse_points(d, her2[given], tolerance_um=TOLERANCE_UM)
    return [(x, y) if math.isfinite(x) and math.isfinite(y) else None for x, y in places.tolist()]


def point_errors(
    landmarks: Sequence[Landmark],
    predicted: Sequence[Point | None],
    d: Displacement,
    size_um: npt.NDArray[np.float64] | None,
) -> list[dict[str, Any]]:
    """Return the rows of `tables.LANDMARKS`, one per point, without the pair's name.

    Rows of a file with the same point are annotations of one point.

    Args:
        landmarks: of a pair.
        predicted: see `predict`.
        d: from H&E to HER2; may be empty.
        size_um: (width, height) of the H&E slide; None: unknown.
    """
    by_point: dict[str, Group] = {}
    for landmark, place in zip(landmarks, predicted, strict=True):
        by_point.setdefault(landmark.point, []).append((landmark, place))
    diagonal_um = None if size_um is None else math.hypot(*size_um)
    rows = []
    for point, group in by_point.items():
        row: dict[str, Any] = {"point": point}
        for name, places in (
            ("he", [here for landmark, _ in group for here in landmark.he]),
            ("her2", [landmark.her2 for landmark, _ in group]),
            ("predicted", [place for _, place in group]),
        ):
            given = [place for place in places if place is not None]
            mean = np.mean(given, axis=0).tolist() if given else (None, None)
            row[f"{name}_x_um"], row[f"{name}_y_um"] = mean
        error, row["initial_error_um"] = _target_errors(d, group)
        row["error_um"] = error
        row["error_diagonal_fraction"] = (
            None if error is None or diagonal_um is None else error / diagonal_um
        )
        row["official_error_um"], row["official_initial_error_um"] = _official_errors(
            group, size_um
        )
        rows.append(row)
    return rows


def pair_figures(columns: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
    """Return the figures of a pair, see `FIGURES`, and how many points they are from.

    Args:
        columns: of `tables.LANDMARKS`.
    """
    points = sum(value is not None for value in columns["initial_error_um"])
    registered = any(value is not None for value in columns["error_um"])
    return {
        "pairs": int(points > 0),
        "unregistered": int(points > 0 and not registered),
        "points": points,
        **{
            name: _statistic(function, columns[column])
            for name, (column, function) in FIGURES.items()
        },
    }


def cohort_figures(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per aggregation over the figures of pairs."""
    counts = {name: sum(row[name] for row in rows) for name in ("pairs", "unregistered", "points")}
    return [
        {
            "aggregation": aggregation,
            **counts,
            **{name: _statistic(function, [row[name] for row in rows]) for name in FIGURES},
        }
        for aggregation, function in AGGREGATIONS.items()
    ]


def _statistic(function: Callable[..., Any], values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(function(known)) if known else None


def _target_errors(d: Displacement, group: Group) -> tuple[float | None, float | None]:
    """Return the distance on HER2, with the displacement and with the identity."""
    both = [
        (here, landmark.her2)
        for landmark, _ in group
        for here in landmark.he
        if here is not None and landmark.her2 is not None
    ]
    if not both:
        return None, None
    he, her2 = (np.array(side) for side in zip(*both, strict=True))
    initial = float(np.linalg.norm(he - her2, axis=1).mean())
    if d.empty:
        return None, initial
    return float(np.linalg.norm(map_points(d, he) - her2, axis=1).mean()), initial


def _official_errors(
    group: Group, size_um: npt.NDArray[np.float64] | None
) -> tuple[float, float] | tuple[None, None]:
    """Return the official error with and without displacement; None if an annotator has none."""
    found = []
    for landmark, place in group:
        he = [here for here in landmark.he if here is not None]
        if landmark.her2 is None or len(he) < len(landmark.he):
            return None, None
        found.append([official_error(p, landmark.her2, he, size_um) for p in (place, None)])
    with_map, without = zip(*found, strict=True)
    return float(np.mean(with_map)), float(np.mean(without))
