"""Registration errors at landmarks: target registration error and the figures of ACROBAT."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from hemera.registration.displacement import Displacement, inverse_points, map_points
from hemera.registration.landmarks import Landmarks

Floats = npt.NDArray[np.float64]

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

AGGREGATIONS: Mapping[str, Any] = {"median": np.median, "mean": np.mean, "std": np.std}
"""Figures of a cohort: statistics of the figures of its pairs."""


def official_error(
    predicted: Floats, her2: Floats, he: Floats, size_um: tuple[float, float] | None
) -> Floats:
    """Return the distances of predictions from H&E as in ACROBAT's evaluation: (N,) um.

    Without a prediction, NaN, the unregistered HER2 coordinates count as one. Points outside the
    H&E slide of `size_um`, where it is known, are moved to its edge. `he` is (N, annotators, 2),
    the others (N, 2); the distances to the annotators are averaged.
    """
    places = np.where(np.isnan(predicted), her2, predicted)
    places = np.clip(places, 0.0, np.inf if size_um is None else size_um)
    distances: Floats = np.linalg.norm(he - places[:, None], axis=2).mean(axis=1)
    return distances


def predict(d: Displacement, her2: Floats) -> Floats:
    """Map landmarks (N, 2) on HER2 to H&E, um; NaN where there is no corresponding point."""
    places = np.full_like(her2, np.nan)
    given = np.isfinite(her2[:, 0])
    if not d.empty:
        places[given] = inverse_points(d, her2[given], tolerance_um=TOLERANCE_UM)
    return places


def point_errors(
    landmarks: Landmarks, predicted: Floats, d: Displacement, size_um: tuple[float, float] | None
) -> list[dict[str, Any]]:
    """Return the rows of `tables.LANDMARKS`, one per point, without the pair's name.

    Landmarks of one name are averaged. `predicted`: see `predict`; `d`: may be empty.
    """
    he, her2 = landmarks.he, landmarks.her2
    mapped = np.full_like(he, np.nan)
    if not d.empty:
        given = np.isfinite(he[..., 0])
        mapped[given] = map_points(d, he[given])
    nowhere = np.full_like(her2, np.nan)
    official = {
        "official_error_um": official_error(predicted, her2, he, size_um),
        "official_initial_error_um": official_error(nowhere, her2, he, size_um),
    }
    # One row per landmark and annotator.
    count = he.shape[1]
    marks = pd.DataFrame({"point": np.repeat(list(landmarks.points), count)})
    for name, places in (
        ("he", he.reshape(-1, 2)),
        ("her2", her2.repeat(count, axis=0)),
        ("predicted", predicted.repeat(count, axis=0)),
    ):
        marks[f"{name}_x_um"], marks[f"{name}_y_um"] = places.T
    marks["error_um"] = np.linalg.norm(mapped - her2[:, None], axis=2).ravel()
    marks["initial_error_um"] = np.linalg.norm(he - her2[:, None], axis=2).ravel()
    for name, errors in official.items():
        marks[name] = errors.repeat(count)
    points = marks.groupby("point", sort=False)
    means = points.mean()
    # The official evaluation leaves out a point that one annotator lacks.
    means.loc[points["official_error_um"].count() < points.size(), list(official)] = np.nan
    diagonal_um = np.nan if size_um is None else math.hypot(*size_um)
    means["error_diagonal_fraction"] = means["error_um"] / diagonal_um
    rows = means.astype(object).where(means.notna(), None).reset_index()
    return [{str(name): value for name, value in row.items()} for row in rows.to_dict("records")]


def pair_figures(columns: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
    """Return `FIGURES` of a pair, and of how many points, from columns of `tables.LANDMARKS`."""
    points = sum(value is not None for value in columns["initial_error_um"])
    registered = any(value is not None for value in columns["error_um"])
    counts = {"pairs": int(points > 0), "unregistered": int(points > 0 and not registered)}
    figures = {
        name: _statistic(function, columns[column]) for name, (column, function) in FIGURES.items()
    }
    return {**counts, "points": points, **figures}


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
