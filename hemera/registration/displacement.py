"""Displacement fields: mapping of points, inversion, resampling, folding.

Frame: micrometres, ``x_um = x_px * mpp`` with pixel edges at the integers, the origin at the
slide's top-left corner, x to the right, y down. A displacement maps a point of the fixed slide
(H&E) to the corresponding point on the moving slide (HER2) as that slide is stored.
"""

import dataclasses
import functools
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from hemera.errors import RegistrationError
from hemera.imaging.geometry import same_mpp

Floats = npt.NDArray[np.float64]
Points = Floats
"""(N, 2) points as (x, y), um."""

REACH_MAX_UM = 1e6
"""Longest plausible vector of a displacement."""
_INVERSE_STEPS = 30
"""Of Newton's method, after which the cells around a point are searched."""
_SEARCHED_NODES = (3, 12, 48)
"""How far around the end of Newton's method the cells are searched, in nodes."""


@dataclasses.dataclass(frozen=True, eq=False)
class Affine:
    """The affine map closest to a displacement: ``moving = matrix @ fixed + offset_um``."""

    matrix: Floats
    offset_um: Floats

    @property
    def determinant(self) -> float:
        """Ratio of areas; negative where the map mirrors."""
        return float(np.linalg.det(self.matrix))

    @property
    def scale(self) -> float:
        """Mean ratio of lengths."""
        return math.sqrt(abs(self.determinant))

    @property
    def anisotropy(self) -> float:
        """Ratio of the larger to the smaller of its two scales, 1 for a similarity."""
        large, small = np.linalg.svd(self.matrix, compute_uv=False)
        return float(large / small) if small > 0 else math.inf

    @property
    def rotation_deg(self) -> float:
        """Angle from H&E to HER2, clockwise on the screen (y down), in (-180, 180].

        For a map that mirrors: the angle after HER2 is mirrored left-right.
        """
        (a, b), (c, d) = self.matrix * ((-1 if self.determinant < 0 else 1,), (1,))
        # The rotation nearest to the matrix, not the angle of one axis.
        return math.degrees(math.atan2(c - b, a + d))


@dataclasses.dataclass(frozen=True, eq=False)
class Displacement:
    """The position on HER2 of each point of H&E: (H, W, 2) vectors as (dx, dy) and their distance.

    Node (row i, column j) is at ((j + 0.5) * mpp, (i + 0.5) * mpp) um on H&E, and
    ``moving_um = fixed_um + d(fixed_um)``. Between nodes d is bilinear. Beyond the outermost nodes
    it is extrapolated from the outermost cells up to the distance of one node, and from there with
    the slope of its affine part. An empty displacement has the shape (0, 0, 2).
    """

    vectors_um: npt.NDArray[np.float32]
    mpp: float

    def __post_init__(self) -> None:
        shape = self.vectors_um.shape
        if len(shape) != 3 or shape[2] != 2 or (0 in shape and shape != (0, 0, 2)):
            raise RegistrationError(
                f"displacement: shape {shape}; it must be (rows, columns, 2), (0, 0, 2) for no map"
            )
        if not (math.isfinite(self.mpp) and self.mpp > 0):
            raise RegistrationError(f"displacement: mpp {self.mpp}; it must be positive")
        if not np.isfinite(self.vectors_um).all():
            raise RegistrationError("displacement: values that are not finite; replace them")
        reach_um = float(np.abs(self.vectors_um).max(initial=0))
        if reach_um > REACH_MAX_UM:
            raise RegistrationError(
                f"displacement: values up to {reach_um:g} um, beyond any slide (at most "
                f"{REACH_MAX_UM:g}); give them in um"
            )

    @property
    def empty(self) -> bool:
        """Whether there is no map."""
        return self.vectors_um.size == 0

    @functools.cached_property
    def affine(self) -> Affine:
        """The affine map nearest to it over the whole grid, by least squares."""
        # A quarter of a million nodes are enough.
        height, width = self.vectors_um.shape[:2]
        step = math.ceil(math.sqrt(height * width / 250_000))
        mask = np.zeros((height, width), np.bool_)
        mask[(height - 1) % step // 2 :: step, (width - 1) % step // 2 :: step] = True
        return fit_affine(self, mask)


def none() -> Displacement:
    """Return an empty displacement."""
    return Displacement(np.zeros((0, 0, 2), np.float32), 1.0)


def identity(width_um: float, height_um: float, mpp: float) -> Displacement:
    """Return the map of every point to itself, on a grid that covers a slide."""
    height, width = (max(1, math.ceil(side / mpp - 1e-6)) for side in (height_um, width_um))
    return Displacement(np.zeros((height, width, 2), np.float32), mpp)


def of_registered(
    he_size_px: tuple[int, int],
    he_mpp: float,
    her2_size_px: tuple[int, int],
    her2_mpp: float,
    *,
    mirror: bool = False,
) -> Displacement:
    """Return the map of a pair that comes registered: equal positions in um.

    Where the resolutions are equal to the accuracy of scanners, equal positions in pixels. Sizes
    are (width, height).
    """
    width_um, height_um = (side * he_mpp for side in he_size_px)
    d = identity(width_um, height_um, max(width_um, height_um) / 16)
    if same_mpp(he_mpp, her2_mpp):
        d = Displacement((node_points(d) * (her2_mpp / he_mpp - 1)).astype(np.float32), d.mpp)
    return mirrored(d, her2_size_px[0] * her2_mpp) if mirror else d


def node_points(d: Displacement) -> Floats:
    """Return the positions of the nodes on H&E: (H, W, 2) as (x, y), um."""
    height, width = d.vectors_um.shape[:2]
    points = np.empty((height, width, 2))
    points[..., 0] = (np.arange(width) + 0.5) * d.mpp
    points[..., 1] = ((np.arange(height) + 0.5) * d.mpp)[:, None]
    return points


def fit_affine(d: Displacement, mask: npt.NDArray[np.bool_]) -> Affine:
    """Fit an affine map to a displacement by least squares, over the nodes of a mask (H, W)."""
    rows, columns = np.nonzero(mask)
    fixed = (np.stack([columns, rows], axis=-1) + 0.5) * d.mpp
    return nearest_affine(fixed, fixed + d.vectors_um[rows, columns])


def nearest_affine(fixed_um: npt.ArrayLike, moving_um: npt.ArrayLike) -> Affine:
    """Fit an affine map to corresponding points (N, 2) by least squares."""
    fixed_um = np.asarray(fixed_um, np.float64)
    vectors = np.asarray(moving_um, np.float64) - fixed_um
    centre, mean = fixed_um.mean(axis=0), vectors.mean(axis=0)
    # Centred, and for the displacement instead of the map: the least-norm solution along an axis
    # with one point is then a shift.
    slope, *_ = np.linalg.lstsq(fixed_um - centre, vectors - mean, rcond=None)
    matrix = np.eye(2) + slope.T
    return Affine(matrix, centre + mean - matrix @ centre)


def map_points(d: Displacement, points_um: npt.ArrayLike) -> Points:
    """Map points (N, 2) of the H&E slide to the HER2 slide, um; d must not be empty."""
    points = np.asarray(points_um, np.float64).reshape(-1, 2)
    return points + _interpolate(d, points)[0]


def map_grid(
    d: Displacement, x_um: float, y_um: float, step_um: float, width: int, height: int
) -> Floats:
    """Map the pixel centres of a grid on H&E to HER2: (height, width, 2) as (x, y), um.

    The grid's left and top edges are at `x_um`, `y_um`, and its pixels `step_um` wide.
    """
    x = x_um + (np.arange(width) + 0.5) * step_um
    y = y_um + (np.arange(height) + 0.5) * step_um
    found: Floats = _interpolate_grid(d, x, y, np.zeros(2), np.float64)
    found[..., 0] += x
    found[..., 1] += y[:, None]
    return found


def map_tile(
    d: Displacement, x_um: float, y_um: float, step_um: float, size: int
) -> tuple[Floats, npt.NDArray[np.float32]]:
    """Map the pixel centres of a square tile, as `map_grid` in a third of the time.

    Returns a point near the tile on HER2, (2,) um, and offsets from there, (size, size, 2), for
    which single precision is enough.
    """
    half = size * step_um / 2
    centre = np.array([x_um + half, y_um + half], np.float64)
    origin: Floats = map_points(d, centre)[0]
    offsets = (np.arange(size) + 0.5) * step_um - half
    found = _interpolate_grid(
        d, offsets + float(centre[0]), offsets + float(centre[1]), origin - centre, np.float32
    )
    found[..., 0] += offsets.astype(np.float32)
    found[..., 1] += offsets.astype(np.float32)[:, None]
    return origin, found


def inverse_points(d: Displacement, points_um: npt.ArrayLike, *, tolerance_um: float) -> Points:
    """Map points (N, 2) of the HER2 slide back to the H&E slide, um.

    Newton's method, damped where the field bends, started from the inverse of the affine part.
    Where it ends in a fold, the cells of the grid nearby are solved exactly. The result, mapped to
    HER2, is within `tolerance_um` of the point; of several, as in a fold, one of them; NaN where
    there is none.
    """
    goal = np.asarray(points_um, np.float64).reshape(-1, 2)
    if abs(d.affine.determinant) < 1e-6:
        raise RegistrationError("displacement: maps the slide to a line; it cannot be inverted")
    back: Floats = np.linalg.inv(d.affine.matrix).astype(np.float64)
    best = (goal - d.affine.offset_um) @ back.T
    vectors, jacobian = _interpolate(d, best)
    residual = best + vectors - goal
    error = np.linalg.norm(residual, axis=1)
    damping = np.ones(len(goal))
    for _ in range(_INVERSE_STEPS):
        open_ = np.flatnonzero(error > tolerance_um)
        if not len(open_):
            break
        # Where Newton's step was damped often, the slope of the affine part is more stable.
        slopes = jacobian[open_]
        local = (damping[open_] > 1 / 64) & (np.abs(np.linalg.det(slopes)) > 1e-3)
        is_local = local[:, None, None]
        solved = np.where(is_local, np.linalg.inv(np.where(is_local, slopes, np.eye(2))), back)
        step = np.einsum("nij,nj->ni", solved, residual[open_]) * damping[open_, None]
        trial = best[open_] - step
        vectors, slopes = _interpolate(d, trial)
        trial_residual = trial + vectors - goal[open_]
        trial_error = np.linalg.norm(trial_residual, axis=1)
        better = trial_error < error[open_]
        moved = open_[better]
        best[moved], residual[moved] = trial[better], trial_residual[better]
        error[moved], jacobian[moved] = trial_error[better], slopes[better]
        damping[moved] = np.minimum(1.0, damping[moved] * 2)
        damping[open_[~better]] /= 2
    for n in np.flatnonzero(error > tolerance_um):
        best[n] = _search_cells(d, best[n], goal[n], tolerance_um)
    return best


def _search_cells(d: Displacement, start: Floats, goal: Floats, tolerance_um: float) -> Floats:
    """Return the point (2,) nearest to `start` that maps to `goal`, NaN if there is none nearby.

    Within a cell of the grid the map is bilinear, ``a + u b + v c + u v e`` with u and v from 0 to
    1. Without v, a goal g gives ``(a - g + u b) x (c + u e) = 0``, which is quadratic in u.
    """
    node = np.floor(start / d.mpp - 0.5)
    for reach in _SEARCHED_NODES:
        corner_um, side = (node - reach) * d.mpp, 2 * reach + 2
        at = map_grid(d, corner_um[0], corner_um[1], d.mpp, side, side) - goal
        corners = np.stack([at[:-1, :-1], at[:-1, 1:], at[1:, :-1], at[1:, 1:]])
        around = ((corners.min(axis=0) <= 0) & (corners.max(axis=0) >= 0)).all(axis=-1)
        rows, columns = np.nonzero(around)
        a, right, below, far = corners[:, rows, columns]
        b, c, e = right - a, below - a, a - right - below + far
        square, linear, constant = _cross(b, e), _cross(a, e) + _cross(b, c), _cross(a, c)
        root = np.sqrt(np.maximum(linear**2 - 4 * square * constant, 0))
        # Of the two forms of a root, the one that does not subtract nearly equal numbers.
        half = -0.5 * (linear + np.where(linear < 0, -root, root))
        with np.errstate(divide="ignore", invalid="ignore"):
            u = np.stack([half / square, constant / half])
            along = c + u[..., None] * e
            v = -((a + u[..., None] * b) * along).sum(axis=-1) / (along**2).sum(axis=-1)
        x, y = columns + 0.5 + u, rows + 0.5 + v
        places = corner_um + np.stack([x, y], axis=-1) * d.mpp
        found = places[(np.abs(u - 0.5) < 0.501) & (np.abs(v - 0.5) < 0.501)]
        error = np.linalg.norm(map_points(d, found) - goal, axis=1)
        found = found[error <= tolerance_um]
        if len(found):
            nearest: Floats = found[np.linalg.norm(found - start, axis=1).argmin()]
            return nearest
    return np.full(2, np.nan)


def _cross(a: Floats, b: Floats) -> Floats:
    product: Floats = a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
    return product


def mirrored(d: Displacement, width_um: float) -> Displacement:
    """Return the displacement to the left-right mirror image of a moving slide of this width."""
    vectors = d.vectors_um.astype(np.float64)
    x = node_points(d)[..., 0]
    vectors[..., 0] = width_um - 2 * x - vectors[..., 0]
    return Displacement(vectors.astype(np.float32), d.mpp)


def coarsen(d: Displacement, tolerance_um: float) -> Displacement:
    """Return the displacement on the coarsest grid that changes no mapped node by more."""
    height, width = d.vectors_um.shape[:2]
    for factor in (32, 16, 8, 4, 2):
        rows, columns = -(-height // factor), -(-width // factor)
        if min(rows, columns) < 2:
            continue
        grid = Displacement(np.zeros((rows, columns, 2), np.float32), d.mpp * factor)
        moving = map_grid(d, 0.0, 0.0, grid.mpp, columns, rows)
        coarse = Displacement((moving - node_points(grid)).astype(np.float32), grid.mpp)
        if _max_distance(coarse, d) <= tolerance_um:
            return coarse
    return d


def _max_distance(coarse: Displacement, d: Displacement) -> float:
    """Return the largest distance between two displacements at the nodes of the second."""
    height, width = d.vectors_um.shape[:2]
    x = (np.arange(width) + 0.5) * d.mpp
    largest = 0.0
    # In bands, because a fine grid has up to a hundred million nodes.
    rows = max(1, 1_000_000 // width)
    for top in range(0, height, rows):
        band = d.vectors_um[top : top + rows]
        y = (np.arange(top, top + len(band)) + 0.5) * d.mpp
        beside = _interpolate_grid(coarse, x, y, np.zeros(2), np.float64) - band
        largest = max(largest, float(np.hypot(beside[..., 0], beside[..., 1]).max()))
    return largest


def jacobian_determinant(d: Displacement) -> Floats:
    """Return the ratio of areas on HER2 and H&E at each node, (H, W); negative in a fold."""
    return area_ratio(node_points(d) + d.vectors_um, d.mpp)


def area_ratio(moving_um: Floats, step_um: float) -> Floats:
    """Return the same for a grid of points (H, W, 2) that were `step_um` apart on H&E."""
    along_y, along_x = (
        np.gradient(moving_um, step_um, axis=axis)
        if moving_um.shape[axis] > 1
        else np.broadcast_to(np.eye(2)[1 - axis], moving_um.shape)
        for axis in (0, 1)
    )
    determinant: Floats = along_x[..., 0] * along_y[..., 1] - along_x[..., 1] * along_y[..., 0]
    return determinant


def folding_fraction(
    d: Displacement, mask: npt.NDArray[np.bool_] | None = None, *, mirrored: bool = False
) -> float:
    """Return the fraction of nodes, inside a mask (H, W) if given, at which the map folds."""
    determinant = jacobian_determinant(d)
    folded = determinant >= 0 if mirrored else determinant <= 0
    return float(folded.mean() if mask is None else folded[mask].mean())


def folding_fraction_in(
    d: Displacement, box_um: tuple[float, float, float, float], *, mirrored: bool = False
) -> float:
    """Return the same for the nodes inside and next to (left, top, right, bottom) on H&E, um."""
    height, width = d.vectors_um.shape[:2]
    left, right = _node_range(box_um[0], box_um[2], d.mpp, width)
    top, bottom = _node_range(box_um[1], box_um[3], d.mpp, height)
    # One node more on each side than counts, so that every slope is a central difference.
    first_row, first_column = max(top - 1, 0), max(left - 1, 0)
    part = Displacement(d.vectors_um[first_row : bottom + 1, first_column : right + 1], d.mpp)
    mask = np.zeros(part.vectors_um.shape[:2], np.bool_)
    mask[top - first_row : bottom - first_row, left - first_column : right - first_column] = True
    return folding_fraction(part, mask, mirrored=mirrored)


def from_engine_field(
    field_px: npt.NDArray[np.floating[Any]],
    *,
    fixed_size: tuple[int, int],
    fixed_pad: tuple[int, int],
    moving_pad: tuple[int, int],
    mpp: float,
) -> Displacement:
    """Turn the field of a registration engine into a displacement, exact to the half pixel.

    The engine pads both images to one canvas and returns, for each pixel of the canvas, the offset
    of its corresponding point on the same canvas: ``moving(p + u(p))`` matches ``fixed(p)``. In
    continuous pixels, whose edges are the integers, a fixed point X is at
    ``(X - fixed_pad) * mpp`` um, its corresponding point at ``(X + u(X) - moving_pad) * mpp`` um.

    Args:
        field_px: (2, H, W) as (x, y), pixels of the canvas.
        fixed_size: (width, height) without padding.
        fixed_pad: (left, top), as `moving_pad`.
        mpp: um per pixel of the canvas; becomes the distance of the nodes.
    """
    (left, top), (width, height) = fixed_pad, fixed_size
    field = field_px[:, top : top + height, left : left + width].astype(np.float64)
    column = np.arange(left, left + width) + 0.5
    row = np.arange(top, top + height)[:, None] + 0.5
    moving_x = (column + field[0] - moving_pad[0]) * mpp
    moving_y = (row + field[1] - moving_pad[1]) * mpp
    vectors = np.stack([moving_x - (column - left) * mpp, moving_y - (row - top) * mpp], axis=-1)
    return Displacement(vectors.astype(np.float32), mpp)


def _node_range(low_um: float, high_um: float, mpp: float, count: int) -> tuple[int, int]:
    """Return the first and one past the last node that define the map between two coordinates."""
    first = min(max(math.floor(low_um / mpp - 0.5), 0), count - 1)
    last = min(max(math.ceil(high_um / mpp - 0.5), 0), count - 1)
    return first, last + 1


def _cells(
    at_um: npt.NDArray[np.floating[Any]], mpp: float, count: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Floats, Floats]:
    """Return, along one axis, the nodes on both sides, the weight of the second, and the excess.

    The outermost cells are extended by the distance of one node; the excess is what is beyond.
    """
    place: Floats = at_um.astype(np.float64) / mpp - 0.5
    inside = np.clip(place, -1.0, float(count)) if count > 1 else np.zeros_like(place)
    first = np.clip(np.floor(inside), 0, max(count - 2, 0)).astype(np.int64)
    return first, np.minimum(first + 1, count - 1), inside - first, place - inside


def _interpolate_grid(
    d: Displacement,
    x_um: npt.NDArray[np.floating[Any]],
    y_um: npt.NDArray[np.floating[Any]],
    less_um: Floats,
    dtype: type[np.float32] | type[np.float64],
) -> npt.NDArray[Any]:
    """Return d minus a constant at every (x, y) of a grid, faster than `_interpolate`."""
    height, width = d.vectors_um.shape[:2]
    j, j1, tx, over_x = _cells(x_um, d.mpp, width)
    i, i1, ty, over_y = _cells(y_um, d.mpp, height)
    low, high = int(j.min()), int(j1.max()) + 1
    part = d.vectors_um[:, low:high]
    upper = part[i].astype(np.float64)
    upper += (part[i1] - upper) * ty[:, None, None]
    upper -= less_um
    # One plane for each of dx and dy, as the callers need them.
    along = np.ascontiguousarray(np.moveaxis(upper, -1, 0).astype(dtype))
    planes = np.take(along, j - low, axis=2)
    beside = np.take(along, j1 - low, axis=2)
    beside -= planes
    beside *= tx.astype(dtype)
    planes += beside
    found: npt.NDArray[Any] = np.moveaxis(planes, 0, -1)
    if over_x.any() or over_y.any():
        slope = (d.affine.matrix - np.eye(2)) * d.mpp
        found += (over_x[:, None] * slope[:, 0]).astype(dtype)
        found += (over_y[:, None, None] * slope[:, 1]).astype(dtype)
    return found


def _interpolate(d: Displacement, points: Points) -> tuple[Floats, Floats]:
    """Return d (N, 2) and the slopes (N, 2, 2) of the map fixed -> moving at points (N, 2)."""
    height, width = d.vectors_um.shape[:2]
    j, j1, tx, over_x = _cells(points[:, 0], d.mpp, width)
    i, i1, ty, over_y = _cells(points[:, 1], d.mpp, height)
    tx, ty = tx[:, None], ty[:, None]
    v00, v01, v10, v11 = (
        d.vectors_um[row, column].astype(np.float64) for row in (i, i1) for column in (j, j1)
    )
    upper, lower = v00 + (v01 - v00) * tx, v10 + (v11 - v10) * tx
    vectors = upper + (lower - upper) * ty
    slopes = np.empty((len(points), 2, 2))
    slopes[:, :, 0] = ((v01 - v00) * (1 - ty) + (v11 - v10) * ty) / d.mpp
    slopes[:, :, 1] = (lower - upper) / d.mpp
    outside = (over_x != 0) | (over_y != 0)
    if outside.any():
        slope = d.affine.matrix - np.eye(2)
        over = np.stack([over_x[outside], over_y[outside]], axis=-1) * d.mpp
        vectors[outside] += over @ slope.T
        slopes[over_x != 0, :, 0] = slope[:, 0]
        slopes[over_y != 0, :, 1] = slope[:, 1]
    slopes[:, 0, 0] += 1
    slopes[:, 1, 1] += 1
    return vectors, slopes
