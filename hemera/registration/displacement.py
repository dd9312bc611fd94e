"""Displacement fields: mapping of points, inversion, resampling, folding.

Frame: micrometres, ``x_um = x_px * mpp`` with pixel edges at the integers, the origin at the
slide's top-left corner, x to the right, y down. A displacement maps a point of the fixed slide
(H&E) to the corresponding point on the moving slide (HER2) as that slide is stored.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from hemera.errors import RegistrationError
from hemera.imaging.geometry import same_mpp

Points = npt.NDArray[np.float64]
"""(N, 2) points as (x, y), um."""


@dataclasses.dataclass(frozen=True, eq=False)
class Affine:
    """The affine map closest to a displacement: ``moving = matrix @ fixed + offset_um``."""

    matrix: npt.NDArray[np.float64]
    """(2, 2), no unit."""
    offset_um: npt.NDArray[np.float64]
    """(2,), um."""

    @property
    def determinant(self) -> float:
        """Ratio of areas; negative where the map mirrors."""
        return float(np.linalg.det(self.matrix))

    @property
    def scale(self) -> float:
        """Mean ratio of lengths: the root of the determinant's magnitude."""
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
        first = self.matrix[:, 0].copy()
        second = self.matrix[:, 1].copy()
        if self.determinant < 0:
            first[0], second[0] = -first[0], -second[0]
        # The rotation nearest to the matrix, not the angle of one axis.
        return math.degrees(math.atan2(first[1] - second[0], first[0] + second[1]))


@dataclasses.dataclass(frozen=True, eq=False)
class Displacement:
    """The position on the HER2 slide of each point of the H&E slide.

    Node (row i, column j) is at ((j + 0.5) * mpp, (i + 0.5) * mpp) um on H&E, and
    ``moving_um = fixed_um + d(fixed_um)``. Between nodes d is bilinear. Beyond the outermost nodes
    it is extrapolated from the outermost cells up to the distance of one node, and from there with
    the slope of its affine part.

    An empty displacement has the shape (0, 0, 2).

    Raises:
        RegistrationError: when shape, type, values or mpp are impossible.
    """

    vectors_um: npt.NDArray[np.float32]
    """(H, W, 2) as (dx, dy), um."""
    mpp: float
    """Distance of neighbouring nodes, um."""

    def __post_init__(self) -> None:
        """Check shape, type and values."""
        shape = self.vectors_um.shape
        if len(shape) != 3 or shape[2] != 2 or (0 in shape and shape != (0, 0, 2)):
            raise RegistrationError(
                f"displacement: shape {shape}; it must be (rows, columns, 2), (0, 0, 2) for no map"
            )
        if self.vectors_um.dtype != np.float32:
            raise RegistrationError(
                f"displacement: values of type {self.vectors_um.dtype}; they must be float32"
            )
        if not (math.isfinite(self.mpp) and self.mpp > 0):
            raise RegistrationError(f"displacement: mpp {self.mpp}; it must be positive")
        if not np.isfinite(self.vectors_um).all():
            raise RegistrationError(
                "displacement: values that are not finite; replace them, or register the pair again"
            )

    @property
    def empty(self) -> bool:
        """Whether there is no displacement."""
        return self.vectors_um.size == 0

    @functools.cached_property
    def affine(self) -> Affine:
        """The affine map nearest to it over the whole grid, by least squares."""
        # A quarter of a million nodes are as good as all of a fine grid.
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
    return Displacement(np.zeros((*_grid_shape(width_um, height_um, mpp), 2), np.float32), mpp)


def of_registered(
    he_size_px: tuple[int, int],
    he_mpp: float,
    her2_size_px: tuple[int, int],
    her2_mpp: float,
    *,
    mirror: bool = False,
) -> Displacement:
    """Return the map of a pair that comes registered: equal positions in um.

    Where the resolutions are equal to the accuracy of scanners, equal positions in pixels.

    Args:
        he_size_px: (width, height) of the H&E slide.
        he_mpp: its um/px.
        her2_size_px: (width, height) of the HER2 slide.
        her2_mpp: its um/px.
        mirror: HER2 is stored as the left-right mirror image.
    """
    width_um, height_um = (side * he_mpp for side in he_size_px)
    d = identity(width_um, height_um, max(width_um, height_um) / 16)
    if same_mpp(he_mpp, her2_mpp):
        d = Displacement((node_points(d) * (her2_mpp / he_mpp - 1)).astype(np.float32), d.mpp)
    return mirrored(d, her2_size_px[0] * her2_mpp) if mirror else d


def node_points(d: Displacement) -> npt.NDArray[np.float64]:
    """Return the positions of the nodes on H&E: (H, W, 2) as (x, y), um."""
    height, width = d.vectors_um.shape[:2]
    points = np.empty((height, width, 2))
    points[..., 0] = (np.arange(width) + 0.5) * d.mpp
    points[..., 1] = ((np.arange(height) + 0.5) * d.mpp)[:, None]
    return points


def fit_affine(d: Displacement, mask: npt.NDArray[np.bool_] | None = None) -> Affine:
    """Fit an affine map to a displacement by least squares.

    Args:
        d: the displacement.
        mask: (H, W), the nodes that count; None for all.

    Raises:
        RegistrationError: when there is no map or no node in the mask.
    """
    _require_map(d)
    if mask is None:
        mask = np.ones(d.vectors_um.shape[:2], np.bool_)
    rows, columns = np.nonzero(mask)
    fixed = (np.stack([columns, rows], axis=-1) + 0.5) * d.mpp
    vectors = d.vectors_um[rows, columns].astype(np.float64)
    if not len(fixed):
        raise RegistrationError("displacement: no node in the mask; nothing to fit")
    centre, mean = fixed.mean(axis=0), vectors.mean(axis=0)
    # Centred, and for the displacement instead of the map: the least-norm solution along an axis
    # with one node is then a shift.
    slope, *_ = np.linalg.lstsq(fixed - centre, vectors - mean, rcond=None)
    matrix = np.eye(2) + slope.T
    return Affine(matrix, centre + mean - matrix @ centre)


def map_points(d: Displacement, points_um: npt.ArrayLike) -> Points:
    """Map points of the H&E slide to the HER2 slide.

    Args:
        d: the displacement.
        points_um: (N, 2) as (x, y), um on H&E.

    Returns:
        (N, 2), um on HER2.

    Raises:
        RegistrationError: when there is no map.
    """
    _require_map(d)
    points = np.asarray(points_um, np.float64).reshape(-1, 2)
    return points + _interpolate(d, points)[0]


def map_grid(
    d: Displacement, x_um: float, y_um: float, step_um: float, width: int, height: int
) -> npt.NDArray[np.float64]:
    """Map the pixel centres of a regular grid on H&E to HER2.

    Args:
        d: the displacement.
        x_um: left edge of the grid on H&E (the first pixel's edge, not its centre).
        y_um: its top edge.
        step_um: um per pixel of the grid.
        width: pixels along x.
        height: pixels along y.

    Returns:
        (height, width, 2) as (x, y), um on HER2.

    Raises:
        RegistrationError: when there is no map.
    """
    _require_map(d)
    x = x_um + (np.arange(width) + 0.5) * step_um
    result = np.empty((height, width, 2))
    rows = max(1, 1_000_000 // max(width, 1))
    for top in range(0, height, rows):
        y = y_um + (np.arange(top, min(top + rows, height)) + 0.5) * step_um
        band = result[top : top + rows]
        band[:] = _interpolate_grid(d, x, y, np.zeros(2), np.float64)
        band[..., 0] += x
        band[..., 1] += y[:, None]
    return result


def map_tile(
    d: Displacement, x_um: float, y_um: float, step_um: float, size: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float32]]:
    """Map the pixel centres of a square tile, as `map_grid` in a third of the time.

    Returns:
        A point near the tile on HER2, (2,) um; and offsets from there, (size, size, 2), for which
        single precision is enough.
    """
    half = size * step_um / 2
    centre = np.array([x_um + half, y_um + half], np.float64)
    origin: npt.NDArray[np.float64] = map_points(d, centre)[0]
    offsets = (np.arange(size) + 0.5) * step_um - half
    found = _interpolate_grid(
        d, offsets + float(centre[0]), offsets + float(centre[1]), origin - centre, np.float32
    )
    found[..., 0] += offsets.astype(np.float32)
    found[..., 1] += offsets.astype(np.float32)[:, None]
    return origin, found


def inverse_points(
    d: Displacement,
    points_um: npt.ArrayLike,
    *,
    tolerance_um: float | None = None,
    iterations: int = 100,
) -> Points:
    """Map points of the HER2 slide back to the H&E slide.

    Newton's method, damped where the field bends, started from the inverse of the affine part.

    Args:
        d: the displacement.
        points_um: (N, 2) as (x, y), um on HER2.
        tolerance_um: largest distance of the result, mapped to HER2, from the point; None: a
            thousandth of the distance of two nodes.
        iterations: steps after which a point counts as not found.

    Returns:
        (N, 2), um on H&E; NaN for a point that is not found, as within a fold.

    Raises:
        RegistrationError: when there is no map, or its affine part cannot be inverted.
    """
    _require_map(d)
    goal = np.asarray(points_um, np.float64).reshape(-1, 2)
    tolerance = d.mpp * 1e-3 if tolerance_um is None else tolerance_um
    if abs(d.affine.determinant) < 1e-6:
        raise RegistrationError("displacement: maps the slide to a line; it cannot be inverted")
    back: npt.NDArray[np.float64] = np.linalg.inv(d.affine.matrix).astype(np.float64)
    best = (goal - d.affine.offset_um) @ back.T
    vectors, jacobian = _interpolate(d, best)
    residual = best + vectors - goal
    error = np.linalg.norm(residual, axis=1)
    damping = np.ones(len(goal))
    for _ in range(iterations):
        open_ = np.flatnonzero(error > tolerance)
        if not len(open_):
            break
        # Where Newton's step was damped often, the slope of the affine part is more stable.
        local = damping[open_] > 1 / 64
        solved = np.where(local[:, None, None], _inverted(jacobian[open_], back), back[None, :, :])
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
    best[error > tolerance] = np.nan
    return best


def mirrored(d: Displacement, width_um: float) -> Displacement:
    """Return the displacement to the left-right mirror image of the moving slide.

    Args:
        d: a displacement.
        width_um: width of the moving slide.
    """
    if d.empty:
        return d
    vectors = d.vectors_um.astype(np.float64)
    x = node_points(d)[..., 0]
    vectors[..., 0] = width_um - 2 * x - vectors[..., 0]
    return Displacement(vectors.astype(np.float32), d.mpp)


def resample(d: Displacement, mpp: float, width: int, height: int) -> Displacement:
    """Sample a displacement on another grid, of `height` x `width` nodes `mpp` um apart."""
    if d.empty:
        return d
    grid = Displacement(np.zeros((height, width, 2), np.float32), mpp)
    fixed = node_points(grid)
    moving = map_grid(d, 0.0, 0.0, mpp, width, height)
    return Displacement((moving - fixed).astype(np.float32), mpp)


def coarsen(
    d: Displacement, tolerance_um: float, *, node_count_max: int | None = None
) -> Displacement:
    """Return the displacement on the coarsest grid that still maps to the same points.

    Grids 32, 16, 8, 4, 2 times as coarse are tried, coarsest first.

    Args:
        d: the displacement.
        tolerance_um: largest change of a mapped point.
        node_count_max: no finer grid is returned, for any change.
    """
    if d.empty:
        return d
    height, width = d.vectors_um.shape[:2]
    rows, columns = (places.ravel() for places in np.indices((height, width)))
    # A few thousand nodes first: where these differ, the rest need not be compared.
    few = max(1, len(rows) // 5_000)
    for factor in (32, 16, 8, 4, 2):
        size = -(-width // factor), -(-height // factor)
        if min(size) < 2:
            continue
        coarse = resample(d, d.mpp * factor, *size)
        if node_count_max is not None and width * height * 4 > node_count_max * factor**2:
            # The next finer grid would be too large.
            return coarse
        if (
            _loss_um(coarse, d, rows[::few], columns[::few]) <= tolerance_um
            and _loss_um(coarse, d, rows, columns) <= tolerance_um
        ):
            return coarse
    return d


def _loss_um(
    coarse: Displacement,
    d: Displacement,
    rows: npt.NDArray[np.int64],
    columns: npt.NDArray[np.int64],
) -> float:
    """Return the largest distance between `coarse` and `d`, at some nodes of `d`."""
    loss = 0.0
    for start in range(0, len(rows), 1_000_000):
        i, j = rows[start : start + 1_000_000], columns[start : start + 1_000_000]
        fixed = (np.stack([j, i], axis=-1) + 0.5) * d.mpp
        beside = map_points(coarse, fixed) - fixed - d.vectors_um[i, j]
        loss = max(loss, float(np.hypot(beside[:, 0], beside[:, 1]).max()))
    return loss


def jacobian_determinant(d: Displacement) -> npt.NDArray[np.float64]:
    """Return the ratio of areas on HER2 and H&E at each node: (H, W).

    Negative in a fold, or everywhere where the map mirrors.
    """
    height, width = d.vectors_um.shape[:2]
    determinant = np.empty((height, width))
    # In bands with a row more on each side, because a fine grid has more than ten million nodes.
    rows = max(1, 1_000_000 // max(width, 1))
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        first = max(top - 1, 0)
        vectors = d.vectors_um[first : bottom + 1].astype(np.float64)
        flat = np.zeros_like(vectors)
        along_x = np.gradient(vectors, d.mpp, axis=1) if width > 1 else flat
        along_y = np.gradient(vectors, d.mpp, axis=0) if len(vectors) > 1 else flat
        area = (1 + along_x[..., 0]) * (1 + along_y[..., 1]) - along_x[..., 1] * along_y[..., 0]
        determinant[top:bottom] = area[top - first : bottom - first]
    return determinant


def folding_fraction(
    d: Displacement,
    mask: npt.NDArray[np.bool_] | None = None,
    *,
    box_um: tuple[float, float, float, float] | None = None,
    mirrored: bool = False,
) -> float:
    """Return the fraction of nodes at which the map folds.

    Args:
        d: the displacement.
        mask: (H, W), the nodes that count; None for all.
        box_um: (left, top, right, bottom) on H&E: only nodes inside and next to it count.
        mirrored: the map is meant to mirror; a fold is where it does not.

    Returns:
        0 to 1; 0 where no node counts.
    """
    if d.empty:
        return 0.0
    if box_um is not None:
        height, width = d.vectors_um.shape[:2]
        # One node more on each side than is kept, so that every slope is a central difference.
        left, right = _node_range(box_um[0], box_um[2], d.mpp, width)
        top, bottom = _node_range(box_um[1], box_um[3], d.mpp, height)
        outer = (slice(max(top - 1, 0), bottom + 1), slice(max(left - 1, 0), right + 1))
        part = Displacement(np.ascontiguousarray(d.vectors_um[outer]), d.mpp)
        inner = (
            slice(min(top, 1), min(top, 1) + bottom - top),
            slice(min(left, 1), min(left, 1) + right - left),
        )
        determinant = jacobian_determinant(part)[inner]
        mask = None if mask is None else mask[top:bottom, left:right]
    else:
        determinant = jacobian_determinant(d)
    folded = determinant >= 0 if mirrored else determinant <= 0
    counted = folded if mask is None else folded[mask]
    return float(counted.mean()) if counted.size else 0.0


def from_engine_field(
    field_px: npt.NDArray[np.floating],
    *,
    fixed_size: tuple[int, int],
    fixed_pad: tuple[int, int],
    moving_pad: tuple[int, int],
    fixed_mpp: float,
    moving_mpp: float,
) -> Displacement:
    """Turn the field of a registration engine into a displacement, exact to the half pixel.

    The engine pads both images to one canvas and returns, for each pixel of the canvas, the offset
    of its corresponding point on the same canvas: ``moving(p + u(p))`` matches ``fixed(p)``. In
    continuous pixels, whose edges are the integers, a fixed point X is at
    ``(X - fixed_pad) * fixed_mpp`` um, its corresponding point at
    ``(X + u(X) - moving_pad) * moving_mpp`` um.

    Args:
        field_px: (2, H, W), channel 0 = x, 1 = y, pixels of the canvas.
        fixed_size: (width, height) of the fixed image on the canvas, without its padding.
        fixed_pad: (left, top) padding of the fixed image, pixels of the canvas.
        moving_pad: (left, top) padding of the moving image.
        fixed_mpp: um of the fixed slide per pixel of the canvas: the exact ratio (slide's size
            over the image's size, times the slide's mpp), not the nominal one; it becomes the
            distance of the displacement's nodes.
        moving_mpp: the same of the moving slide.

    Raises:
        RegistrationError: when the field has another shape.
    """
    if field_px.ndim != 3 or field_px.shape[0] != 2:
        raise RegistrationError(
            f"engine's field: shape {field_px.shape}; it must be (2, rows, columns)"
        )
    (left, top), (width, height) = fixed_pad, fixed_size
    if left + width > field_px.shape[2] or top + height > field_px.shape[1]:
        raise RegistrationError(
            f"engine's field: {field_px.shape[2]} x {field_px.shape[1]} px does not contain an "
            f"image of {width} x {height} px at {left}, {top}"
        )
    field = field_px[:, top : top + height, left : left + width].astype(np.float64)
    column = np.arange(left, left + width) + 0.5
    row = np.arange(top, top + height)[:, None] + 0.5
    moving_x = (column + field[0] - moving_pad[0]) * moving_mpp
    moving_y = (row + field[1] - moving_pad[1]) * moving_mpp
    vectors = np.stack(
        [moving_x - (column - left) * fixed_mpp, moving_y - (row - top) * fixed_mpp], axis=-1
    )
    return Displacement(vectors.astype(np.float32), fixed_mpp)


def _require_map(d: Displacement) -> None:
    if d.empty:
        raise RegistrationError("displacement: there is no map; see the pair's certificate")


def _grid_shape(width_um: float, height_um: float, mpp: float) -> tuple[int, int]:
    """Rows and columns of the grid that covers a slide."""
    return (
        max(1, math.ceil(height_um / mpp - 1e-6)),
        max(1, math.ceil(width_um / mpp - 1e-6)),
    )


def _node_range(low_um: float, high_um: float, mpp: float, count: int) -> tuple[int, int]:
    """Return the first and one past the last node that define the map between two coordinates."""
    first = min(max(math.floor(low_um / mpp - 0.5), 0), count - 1)
    last = min(max(math.ceil(high_um / mpp - 0.5), 0), count - 1)
    return first, last + 1


def _inverted(
    matrices: npt.NDArray[np.float64], otherwise: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Invert (N, 2, 2) matrices; `otherwise` for singular ones."""
    a, b, c, e = (
        matrices[:, 0, 0],
        matrices[:, 0, 1],
        matrices[:, 1, 0],
        matrices[:, 1, 1],
    )
    determinant = a * e - b * c
    usable = np.abs(determinant) > 1e-3
    safe = np.where(usable, determinant, 1.0)
    inverse = np.stack([np.stack([e, -b], -1), np.stack([-c, a], -1)], -2) / safe[:, None, None]
    return np.where(usable[:, None, None], inverse, otherwise)


def _cells(
    at_um: npt.NDArray[np.floating[Any]], mpp: float, count: int
) -> tuple[
    npt.NDArray[np.int64],
    npt.NDArray[np.int64],
    npt.NDArray[np.float64],
    npt.NDArray[np.float64],
]:
    """Return, along one axis, the nodes on both sides, the weight of the second, and the excess.

    The outermost cells are extended by the distance of one node; the excess is what is beyond.
    """
    place: npt.NDArray[np.float64] = at_um.astype(np.float64) / mpp - 0.5
    inside = np.clip(place, -1.0, float(count)) if count > 1 else np.zeros_like(place)
    first: npt.NDArray[np.int64] = np.clip(np.floor(inside), 0, max(count - 2, 0)).astype(np.int64)
    second: npt.NDArray[np.int64] = np.minimum(first + 1, count - 1)
    return first, second, inside - first, place - inside


def _interpolate_grid(
    d: Displacement,
    x_um: npt.NDArray[np.floating[Any]],
    y_um: npt.NDArray[np.floating[Any]],
    less_um: npt.NDArray[np.float64],
    dtype: type[np.float32] | type[np.float64],
) -> npt.NDArray[Any]:
    """Return d minus a constant at every (x, y) of a grid, (rows, columns, 2), as `_interpolate`.

    Bilinear is linear along y, then along x, which saves most of the work.
    """
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


def _interpolate(
    d: Displacement, points: Points
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return d (N, 2) and the slopes (N, 2, 2) of the map fixed -> moving at points (N, 2)."""
    height, width = d.vectors_um.shape[:2]
    j, j1, tx, over_x = _cells(points[:, 0], d.mpp, width)
    i, i1, ty, over_y = _cells(points[:, 1], d.mpp, height)
    tx, ty = tx[:, None], ty[:, None]
    corners = d.vectors_um
    v00 = corners[i, j].astype(np.float64)
    v01 = corners[i, j1].astype(np.float64)
    v10 = corners[i1, j].astype(np.float64)
    v11 = corners[i1, j1].astype(np.float64)
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
        slopes[outside, :, 0] = np.where(
            (over_x[outside] != 0)[:, None], slope[:, 0], slopes[outside, :, 0]
        )
        slopes[outside, :, 1] = np.where(
            (over_y[outside] != 0)[:, None], slope[:, 1], slopes[outside, :, 1]
        )
    slopes[:, 0, 0] += 1
    slopes[:, 1, 1] += 1
    return vectors, slopes
