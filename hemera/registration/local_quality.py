"""Local quality of a registration: how well the stains match in place, square by square."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Self

import cv2
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from hemera.registration.local_error import estimate_error

Floats = npt.NDArray[np.float64]

# Lengths as a fraction of the diagonal of the H&E image.
SIDE = 0.08
SHIFTS = (0.02, 0.035)
SEARCH = 0.035
"""Largest distance at which the best match of a square is searched."""

SEARCH_PRIOR = 0.2
"""Correlation by which a match at the end of the search must exceed one in place: squares of
uniform tissue match anywhere."""
TISSUE_MIN = 0.25
"""Least tissue fraction of a square."""
REGION_SIDE = 5
"""Squares along the side of the neighbourhood in which those that match in place are counted."""
REGION_OK_MIN = 0.35
"""A region is misaligned where a smaller fraction matches in place; by chance it is 1/17."""
REGION_SQUARES_MIN = 4
"""Least squares of such a region."""
SAMPLES = 80
"""Independent values in a square, for `expected_distance`."""
FLAT = 0.1
"""A square is flat when the standard deviation of its haematoxylin is below this fraction of the
median one: background contains camera noise, which does not correlate."""

VALUES = ("error_um", "error_low_um", "error_high_um", "ncc", "margin")
"""What is interpolated between squares."""


@dataclasses.dataclass(frozen=True, eq=False)
class LocalQuality:
    """Correlation of haematoxylin in N overlapping squares of tissue, in place and shifted.

    Places are (x, y) on H&E. The residual is the shift at which the stains match best; the largest
    where one of the two is flat.
    """

    centres_um: Floats
    ncc: Floats
    best_shifted: Floats
    """The best correlation of the 16 shifted versions."""
    residuals_um: Floats
    spread_um: Floats
    """Expected distance of the best match: see `expected_distance`."""
    side_um: float
    step_um: float
    """Distance of neighbouring squares."""

    @property
    def ok(self) -> npt.NDArray[np.bool_]:
        """Where no shifted version matches better."""
        return self.ncc > self.best_shifted

    @functools.cached_property
    def regions(self) -> npt.NDArray[np.int64]:
        """Number of the misaligned region that each square is in or near, 0 for none.

        A region is connected, and few of its squares match in place. Single squares fail on right
        maps too, where the stains have nothing in common; neighbours fail together where the map is
        wrong.
        """
        if not len(self.ncc):
            return np.zeros(0, np.int64)
        # The last square of an axis is at its end, less than a step from the one before.
        steps = np.ceil((self.centres_um - self.centres_um.min(axis=0)) / self.step_um - 1e-6)
        axes = list(steps.astype(np.int64).T[::-1])
        is_ok, known = np.zeros((2, *(axis.max() + 1 for axis in axes)))
        is_ok[*axes], known[*axes] = self.ok, 1
        ok_count, count = (
            ndimage.uniform_filter(grid, REGION_SIDE, mode="constant") for grid in (is_ok, known)
        )
        low = (known > 0) & (ok_count < REGION_OK_MIN * count)
        labels, _ = ndimage.label(low, np.ones((3, 3)))
        labels[np.bincount(labels.ravel())[labels] < REGION_SQUARES_MIN] = 0
        # A neighbourhood at the edge of a region contains squares that match.
        wide: npt.NDArray[np.int64] = ndimage.grey_dilation(labels, size=(3, 3))[*axes]
        return wide

    @functools.cached_property
    def errors_um(self) -> Floats:
        """Estimated error of the registration and the ends of its interval of 90 %, (3, N)."""
        residuals = np.hypot(*self.residuals_um.T) / self.side_um
        return self.side_um * estimate_error(residuals, self.spread_um / self.side_um)

    @property
    def error_um(self) -> Floats:
        """The first of `errors_um`."""
        estimates: Floats = self.errors_um[0]
        return estimates

    def to_columns(self, pair: str) -> dict[str, Any]:
        """Return the columns of `tables.QUALITY`."""
        count = len(self.ncc)
        return {
            "pair": [pair] * count,
            "x_um": self.centres_um[:, 0],
            "y_um": self.centres_um[:, 1],
            "side_um": np.full(count, self.side_um),
            "step_um": np.full(count, self.step_um),
            "ncc": self.ncc,
            "best_shifted_ncc": self.best_shifted,
            "residual_x_um": self.residuals_um[:, 0],
            "residual_y_um": self.residuals_um[:, 1],
            "spread_um": self.spread_um,
        }

    @classmethod
    def from_columns(cls, columns: Mapping[str, Sequence[float]]) -> Self:
        """Create it from the columns of `tables.QUALITY`."""
        names = (
            *("x_um", "y_um", "ncc", "best_shifted_ncc", "residual_x_um", "residual_y_um"),
            "spread_um",
        )
        x, y, ncc, best, dx, dy, spread = (np.asarray(columns[name], np.float64) for name in names)
        # Equal in every row.
        side, step = (columns[name][0] if len(ncc) else 1.0 for name in ("side_um", "step_um"))
        residuals = np.stack([dx, dy], axis=-1)
        return cls(np.stack([x, y], axis=-1), ncc, best, residuals, spread, side, step)

    def at(self, points_um: npt.ArrayLike) -> dict[str, Floats]:
        """Return `VALUES` at points (N, 2), um; margin is ncc minus the best shifted.

        NaN outside all squares. Where a square of a misaligned region contributes, the values are
        the worst of the region, and the interval contains those of all its squares: within it some
        squares match by chance.
        """
        (residuals, spreads, ncc, margins), regions = self.measured_at(points_um)
        errors = self.side_um * estimate_error(residuals / self.side_um, spreads / self.side_um)
        found = np.stack([*errors, ncc, margins])
        squares = np.stack([*self.errors_um, self.ncc, self.ncc - self.best_shifted])
        for region in np.unique(regions[regions > 0]):
            error, low, high, ncc, margins = squares[:, self.regions == region]
            worst = error.max(), low.min(), high.max(), ncc.min(), margins.min()
            found[:, regions == region] = np.array(worst)[:, None]
        return dict(zip(VALUES, found, strict=True))

    def measured_at(self, points_um: npt.ArrayLike) -> tuple[Floats, npt.NDArray[np.int64]]:
        """Interpolate length of the residual, spread, ncc and margin at points (N, 2), um.

        Returns:
            (4, N), NaN outside all squares; and the misaligned region of a square that contributes.
        """
        points = np.asarray(points_um, np.float64).reshape(-1, 2)
        lengths = np.hypot(*self.residuals_um.T)
        values = np.stack([lengths, self.spread_um, self.ncc, self.ncc - self.best_shifted])
        found = np.full((len(values), len(points)), np.nan)
        regions = np.zeros(len(points), np.int64)
        for n, point in enumerate(points):
            near = (1 - np.abs(self.centres_um - point) / self.step_um).clip(0)
            weights = near[:, 0] * near[:, 1]
            if not weights.any():
                # At the edge of the tissue or slide: the nearest square that contains the point.
                away = np.abs(self.centres_um - point).max(axis=1)
                nearest = (away <= self.side_um / 2) & (away == away.min(initial=np.inf))
                weights = nearest.astype(np.float64)
            if weights.any():
                found[:, n] = values @ weights / weights.sum()
                regions[n] = self.regions[weights > 0].max()
        return found, regions


def measure_local_quality(
    he: npt.NDArray[np.float32],
    tissue: npt.NDArray[np.bool_],
    warped: npt.NDArray[np.float32],
    margin_px: int,
    diagonal_px: float,
    mpp: float,
) -> LocalQuality:
    """Correlate square by square, in place and at every shift around it.

    Args:
        he: (H, W) haematoxylin of H&E.
        tissue: (H, W) tissue that both stains show.
        warped: haematoxylin of HER2 on the grid of `he`, `margin_px` larger on every side.
    """
    side = max(3, round(SIDE * diagonal_px) | 1)
    half, step = side // 2, max(1, side // 2)
    reach = max(1, round(SEARCH * diagonal_px))
    height, width = he.shape
    x, y = (_centres(length, half, step) for length in (width, height))
    fraction = ndimage.uniform_filter(tissue.astype(np.float64), side, mode="reflect")
    rows, columns = np.nonzero(fraction[np.ix_(y, x)] > TISSUE_MIN)
    offsets = np.arange(-reach, reach + 1) / reach
    prior = SEARCH_PRIOR * (offsets[:, None] ** 2 + offsets**2)
    shifts = directions(np.array(SHIFTS) * diagonal_px, 8)
    lengths = np.hypot(offsets[:, None], offsets) * reach
    # A square that is flat in one of the two has no match: the worst values possible.
    ncc, best, spread = np.zeros(len(rows)), np.ones(len(rows)), np.full(len(rows), lengths.mean())
    residuals = np.tile((float(reach), 0.0), (len(rows), 1))
    squares = [
        (slice(max(top, 0), min(top + side, height)), slice(max(left, 0), min(left + side, width)))
        for top, left in zip(y[rows] - half, x[columns] - half, strict=True)
    ]
    in_place = warped[margin_px:-margin_px, margin_px:-margin_px]
    deviations = np.array(
        [(he[square].std(), in_place[square].std()) for square in squares]
    ).reshape(-1, 2)
    usual = np.median(deviations, axis=0) if len(squares) else np.zeros(2)
    flat = (deviations <= np.maximum(FLAT * usual, 1e-5)).any(axis=1)
    for n in np.flatnonzero(~flat):
        square = he[squares[n]]
        top, left = (part.start + margin_px - reach for part in squares[n])
        bottom, right = (end + 2 * reach for end in (top + square.shape[0], left + square.shape[1]))
        found = cv2.matchTemplate(warped[top:bottom, left:right], square, cv2.TM_CCOEFF_NORMED)
        ncc[n] = found[reach, reach]
        best[n] = found[reach + shifts[:, 1], reach + shifts[:, 0]].max()
        residuals[n] = _peak(found - prior, reach)
        spread[n] = expected_distance(found.astype(np.float64), lengths)
    centres = np.stack([x[columns] + 0.5, y[rows] + 0.5], axis=-1) * mpp
    return LocalQuality(centres, ncc, best, residuals * mpp, spread * mpp, side * mpp, step * mpp)


def expected_distance(correlations: Floats, lengths: Floats) -> float:
    """Return the mean of the lengths of shifts, weighted by how probable each is the right one.

    Where two images of n independent values correlate by r at the right shift, the likelihood of a
    shift is proportional to (1 - r^2)^(-n/2). It is small where the match is in place and its peak
    sharp; uniform tissue and several equal peaks make it large. `correlations` and `lengths` have
    one shape.
    """
    logarithm = -SAMPLES / 2 * np.log1p(-(correlations.clip(0, 0.999) ** 2))
    weights = np.exp(logarithm - logarithm.max())
    return float((weights * lengths).sum() / weights.sum())


def directions(radii_px: Floats, count: int) -> npt.NDArray[np.int64]:
    """Return shifts in `count` directions by each radius: (N, 2) as (dx, dy), whole pixels."""
    angles = 2 * np.pi * np.arange(count) / count
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    return np.asarray(np.rint(radii_px[:, None, None] * circle).reshape(-1, 2), np.int64)


def _centres(length: int, half: int, step: int) -> npt.NDArray[np.int64]:
    """Place squares along an axis, the last one at its end; a short axis has one, in its middle."""
    last = length - 1 - half
    if last <= half:
        return np.array([min(half, length - 1)], np.int64)
    return np.unique(np.append(np.arange(half, last, step), last)).astype(np.int64)


def _peak(values: Floats, reach: int) -> tuple[float, float]:
    """Return (dx, dy) of the maximum from the centre, refined between pixels by a parabola."""
    i, j = np.unravel_index(int(values.argmax()), values.shape)
    offsets = []
    for line, at in ((values[i, :], int(j)), (values[:, j], int(i))):
        offset = 0.0
        if 0 < at < 2 * reach:
            low, middle, high = (float(value) for value in line[at - 1 : at + 2])
            bend = low - 2 * middle + high
            offset = 0.5 * (low - high) / bend if bend < 0 else 0.0
        offsets.append(at - reach + offset)
    return offsets[0], offsets[1]
