"""The certificate of a registration: what is measured on the final map, and the verdict.

Every quantity is computed from the two images and the map alone, so it owes nothing to what the
engine thinks of its own result. Thresholds come from outside; see `Limits`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Self

import cv2
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from hemera.imaging.color import haematoxylin, optical_density, tissue_threshold
from hemera.registration.displacement import (
    Displacement,
    fit_affine,
    folding_fraction,
    map_grid,
)

# All lengths as a share of the diagonal of the H&E image.
TILE = 0.08
TILE_SHIFTS = (0.02, 0.035)
SEARCH = 0.035
"""How far around its place the best match of a square is looked for."""
SEARCH_PRIOR = 0.2
"""What a match at the end of the search must have more in correlation than one in place.

Without it, squares of even tissue match best anywhere: on a real pair with landmarks the 90th
percentile of the estimate was then three times that of the true error; with it, estimates are
somewhat low, and rise with the true error.
"""
WINDOW = 0.025
MARGIN_SHIFTS = (0.03, 0.06, 0.12)
SMOOTHING = 2 / 1400
"""2 px where the image is about 1,000 px a side."""

TILE_TISSUE = 0.25
TISSUE_OTSU = 0.6
UNKNOWN = {
    "tile_ok": f"no square of {TILE:.0%} of the diagonal that tissue fills to {TILE_TISSUE:.0%}"
}
"""Why a quantity cannot be measured, where it is not simply for want of tissue."""
FLAT = 0.1
"""Share of the usual spread of haematoxylin in a square below which it is flat: bare glass has the
noise of its camera, and noise correlates with nothing."""
TISSUE_DENSITY_MIN = 0.04
"""Least optical density of tissue: Otsu's threshold of a blank slide is that of its noise."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Where pass, review and fail lie; the names are those of `RegisterOptions`."""

    tile_ok_pass: float
    tile_ok_fail: float
    lncc_pass: float
    lncc_fail: float
    ncc_margin_pass: float
    ncc_margin_fail: float
    match_fraction_pass: float
    match_fraction_fail: float
    log_scale_max: float
    anisotropy_max: float
    folding_pass: float
    folding_fail: float
    coverage_pass: float
    mirror_probe_pass: float
    mirror_probe_fail: float


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is thought of a map."""

    verdict: str
    """pass, review, fail."""
    reason: str | None
    """Why it is not better: each quantity with its value and its bound; None for pass."""
    mendable: bool
    """Another try of the engine might do better: False for a pass, and where HER2 does not cover
    the tissue or the sheet is contradicted."""

    @property
    def rank(self) -> int:
        """0 for pass, 1 for review, 2 for fail."""
        return ("pass", "review", "fail").index(self.verdict)


@dataclasses.dataclass(frozen=True, eq=False)
class LocalQuality:
    """The map of `tile_ok`: how well the stains match at each place, tissue only."""

    centres_um: npt.NDArray[np.float64]
    """(N, 2) as (x, y), um on H&E."""
    ncc: npt.NDArray[np.float64]
    """(N,), correlation of haematoxylin in place."""
    best_shifted: npt.NDArray[np.float64]
    """(N,), the best correlation of the 16 shifted versions."""
    residuals_um: npt.NDArray[np.float64]
    """(N, 2) as (dx, dy), um on H&E: how far beside its place the stains match best; as far as was
    looked where one of the two is flat."""
    side_um: float
    """Side of the squares it was measured on."""
    step_um: float
    """Distance of neighbouring squares."""

    @property
    def ok(self) -> npt.NDArray[np.bool_]:
        """(N,), where nothing shifted matches better."""
        return self.ncc > self.best_shifted

    @property
    def error_um(self) -> npt.NDArray[np.float64]:
        """(N,), length of the residuals: the estimated error of the registration."""
        lengths: npt.NDArray[np.float64] = np.hypot(*self.residuals_um.T)
        return lengths

    @classmethod
    def from_columns(cls, columns: Mapping[str, Sequence[float]]) -> Self:
        """Make it from the columns of the table `QUALITY` in `hemera.tables`."""

        def column(name: str) -> npt.NDArray[np.float64]:
            return np.asarray(columns[name], np.float64)

        sides, steps = column("side_um"), column("step_um")
        return cls(
            np.stack([column("x_um"), column("y_um")], axis=-1),
            column("ncc"),
            column("best_shifted_ncc"),
            np.stack([column("residual_x_um"), column("residual_y_um")], axis=-1),
            # The same in every row.
            float(sides[0]) if len(sides) else 1.0,
            float(steps[0]) if len(steps) else 1.0,
        )

    def at(self, points_um: npt.ArrayLike) -> dict[str, npt.NDArray[np.float64]]:
        """Interpolate the map at points of the H&E slide.

        Args:
            points_um: (N, 2) as (x, y), um on H&E.

        Returns:
            Of each point `error_um`, `ncc` and `margin` (`ncc` less the best shifted), bilinear
            between the squares around it; NaN where no square reaches.
        """
        points = np.asarray(points_um, np.float64).reshape(-1, 2)
        values = np.stack([self.error_um, self.ncc, self.ncc - self.best_shifted])
        found = np.full((3, len(points)), np.nan)
        for n, point in enumerate(points):
            near = (1 - np.abs(self.centres_um - point) / self.step_um).clip(0)
            weights = near[:, 0] * near[:, 1]
            if not weights.any():
                # At the rim of the tissue and of the slide a square may still hold the point.
                away = np.abs(self.centres_um - point).max(axis=1)
                weights = ((away <= self.side_um / 2) & (away == away.min(initial=np.inf))).astype(
                    np.float64
                )
            if weights.any():
                found[:, n] = values @ weights / weights.sum()
        return dict(zip(("error_um", "ncc", "margin"), found, strict=True))


@dataclasses.dataclass(frozen=True, eq=False)
class Signals:
    """What is measured on a map; None where there is no tissue to measure it on."""

    local: LocalQuality
    tile_ok: float | None = None
    """Share of tissue tiles in which no shifted version matches better; chance: 1/17."""
    lncc: float | None = None
    """Median local correlation of haematoxylin over tissue."""
    ncc: float | None = None
    """Correlation of haematoxylin over the image."""
    ncc_margin: float | None = None
    """The same less the best of 36 shifts."""
    rotation_deg: float | None = None
    scale: float | None = None
    anisotropy: float | None = None
    determinant: float | None = None
    """Of the affine part over tissue, on the slides in um; negative where it mirrors."""
    folding_fraction: float | None = None
    """Share of tissue over which the map folds."""
    coverage_fraction: float | None = None
    """Share of H&E tissue that lies on the HER2 image."""
    displacement_median_um: float | None = None
    """Median length of the displacement over tissue."""
    error_median_um: float | None = None
    """Median of the estimated local errors."""
    error_p90_um: float | None = None
    """Their 90th percentile."""


def smooth_haematoxylin(rgb: npt.NDArray[np.uint8], sigma_px: float) -> npt.NDArray[np.float32]:
    """Return the haematoxylin of an image as `hemera.pixels` separates it, smoothed: (H, W)."""
    return np.asarray(cv2.GaussianBlur(haematoxylin(rgb), (0, 0), sigma_px), np.float32)


def tissue(rgb: npt.NDArray[np.uint8], sigma_px: float) -> npt.NDArray[np.bool_]:
    """Outline the tissue by its optical density: (H, W).

    Otsu's threshold is taken times 0.6, so that pale tissue beside dark is kept.
    """
    blurred = cv2.GaussianBlur(optical_density(rgb).mean(axis=2), (0, 0), 2 * sigma_px)
    # Steps of 0.005 up to 1.275: finer than any noise, and deeper than blurred tissue.
    steps = np.clip(np.rint(blurred / 0.005), 0, 255).astype(np.uint8)
    threshold = max(TISSUE_OTSU * tissue_threshold(steps, 0, 255) * 0.005, TISSUE_DENSITY_MIN)
    return np.asarray(blurred > threshold, np.bool_)


def measure(
    fixed: npt.NDArray[np.uint8],
    moving: npt.NDArray[np.uint8],
    d: Displacement,
    *,
    fixed_mpp: float,
    moving_mpp: float,
    fixed_size_um: tuple[float, float],
    moving_size_um: tuple[float, float],
    mirrored: bool = False,
) -> Signals:
    """Measure a map on two images.

    Args:
        fixed: (H, W, 3) RGB of the H&E slide from its top-left corner, on white, about 1,000 px
            a side; it may be padded with white at the right and below.
        moving: (H, W, 3) RGB of the HER2 slide as it is stored.
        d: the map, not empty.
        fixed_mpp: um per pixel of `fixed`.
        moving_mpp: um per pixel of `moving`.
        fixed_size_um: (width, height) of the H&E slide.
        moving_size_um: (width, height) of the HER2 slide.
        mirrored: the map is meant to mirror.
    """
    height, width = fixed.shape[:2]
    diagonal_px = math.hypot(*fixed_size_um) / fixed_mpp
    sigma = max(SMOOTHING * diagonal_px, 0.5)
    here = smooth_haematoxylin(fixed, sigma)
    inside = tissue(fixed, sigma)
    moving_diagonal_px = diagonal_px * fixed_mpp / moving_mpp
    there = smooth_haematoxylin(moving, max(SMOOTHING * moving_diagonal_px, 0.5))
    # With room on every side, so that what is shifted has its neighbourhood.
    room = math.ceil(max(MARGIN_SHIFTS) * diagonal_px) + 1
    partner = map_grid(
        d,
        -room * fixed_mpp,
        -room * fixed_mpp,
        fixed_mpp,
        width + 2 * room,
        height + 2 * room,
    )
    index = (partner / moving_mpp - 0.5).astype(np.float32)
    warped = cv2.remap(
        there,
        index[..., 0],
        index[..., 1],
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=0,
    ).astype(np.float32, copy=False)

    def shifted(dx: float, dy: float) -> npt.NDArray[np.float32]:
        x, y = room + round(dx), room + round(dy)
        return warped[y : y + height, x : x + width]

    in_place = shifted(0, 0)
    # The stains are compared where there are two of them; how much that is, coverage says.
    centre = partner[room : room + height, room : room + width]
    within = (centre >= 0) & (centre <= np.asarray(moving_size_um))
    # Beyond its nodes a map is a guess: there it covers nothing, as in the tiles.
    spans = [
        (np.arange(length) + 0.5) * fixed_mpp <= (count + 1) * d.mpp
        for length, count in zip((height, width), d.vectors_um.shape[:2], strict=True)
    ]
    covered: npt.NDArray[np.bool_] = within[..., 0] & within[..., 1] & np.outer(*spans)
    shared = inside & covered
    local = _local_quality(here, shared, warped, room, diagonal_px, fixed_mpp)
    rows, columns = (np.arange(count) + 0.5 for count in d.vectors_um.shape[:2])
    at_tissue = inside[
        np.ix_(
            (rows * d.mpp / fixed_mpp).astype(np.int64).clip(max=height - 1),
            (columns * d.mpp / fixed_mpp).astype(np.int64).clip(max=width - 1),
        )
    ]
    folding = folding_fraction(d, at_tissue, mirrored=mirrored) if at_tissue.any() else None
    if not inside.any():
        return Signals(local, folding_fraction=folding)
    window = max(3, round(WINDOW * diagonal_px) | 1)
    lncc = ncc = margin = None
    if shared.any():
        lncc = float(np.median(_Window(here, window).correlation(in_place)[shared]))
        ncc = _correlation(here[covered], in_place[covered])
        margin = ncc - max(
            _correlation(here[covered], shifted(dx, dy)[covered])
            for dx, dy in _directions(MARGIN_SHIFTS, 12, diagonal_px)
        )
    # On the pixels of the image, not on the nodes: a coarse grid may miss a small piece of tissue.
    y, x = np.nonzero(inside)
    lengths = np.linalg.norm(centre[y, x] - (np.stack([x, y], axis=-1) + 0.5) * fixed_mpp, axis=1)
    affine = fit_affine(d, at_tissue if at_tissue.sum() >= 16 else None)
    return Signals(
        local,
        tile_ok=float(local.ok.mean()) if len(local.ncc) else None,
        lncc=lncc,
        ncc=ncc,
        ncc_margin=margin,
        rotation_deg=affine.rotation_deg,
        scale=affine.scale,
        anisotropy=affine.anisotropy,
        determinant=affine.determinant,
        folding_fraction=folding,
        coverage_fraction=float(covered[inside].mean()),
        displacement_median_um=float(np.median(lengths)),
        error_median_um=float(np.median(local.error_um)) if len(local.ncc) else None,
        error_p90_um=float(np.percentile(local.error_um, 90)) if len(local.ncc) else None,
    )


def prefer_rigid(nonrigid: Signals, rigid: Signals, tolerance: float) -> bool:
    """Tell whether the nonrigid stage made the map worse: the rigid one is then to be kept.

    Args:
        nonrigid: measured on the final map.
        rigid: measured on the map before the nonrigid stage.
        tolerance: by how much `tile_ok` may fall before it counts.
    """
    if nonrigid.tile_ok is None or rigid.tile_ok is None:
        return False
    return nonrigid.tile_ok < rigid.tile_ok - tolerance


def judge(
    signals: Signals,
    limits: Limits,
    *,
    match_count: int | None,
    match_fraction: float | None,
    mirror_probe: float | None = None,
    rigid_kept: bool = False,
    mirrored: bool = False,
    matched: bool = True,
    against_sheet: bool = False,
) -> Verdict:
    """Say what is thought of a map.

    Args:
        signals: measured on the map.
        limits: where pass, review and fail lie.
        match_count: matches behind the rigid map; 0: the engine went on with the identity.
        match_fraction: share of the matches that agree with the rigid map; None: no match.
        mirror_probe: matches of HER2 over those of its mirror image; None: not probed.
        rigid_kept: the map is the rigid one, because the nonrigid one was worse.
        mirrored: the map is meant to mirror.
        matched: the map comes from matches; False for one that was made elsewhere.
        against_sheet: the sheet says mirrored, and HER2 matched better as it is stored.
    """
    fails: list[str] = []
    reviews: list[str] = []
    if not matched:
        pass
    elif match_count == 0:
        fails.append("the engine found no match between the slides and returned the identity")
    elif match_count is None or match_fraction is None:
        fails.append("match_fraction unknown: no match could be made between the mapped slides")
    else:
        _at_least(
            "match_fraction",
            match_fraction,
            limits.match_fraction_pass,
            limits.match_fraction_fail,
            fails,
            reviews,
        )
    _at_least("tile_ok", signals.tile_ok, limits.tile_ok_pass, limits.tile_ok_fail, fails, reviews)
    _at_least("lncc", signals.lncc, limits.lncc_pass, limits.lncc_fail, fails, reviews)
    _at_least(
        "ncc_margin",
        signals.ncc_margin,
        limits.ncc_margin_pass,
        limits.ncc_margin_fail,
        fails,
        reviews,
    )
    if mirror_probe is not None:
        _at_least(
            "mirror_probe",
            mirror_probe,
            limits.mirror_probe_pass,
            limits.mirror_probe_fail,
            fails,
            reviews,
        )
    if signals.determinant is not None and (signals.determinant < 0) != mirrored:
        fails.append(
            "the map mirrors HER2, which is not mirrored"
            if signals.determinant < 0
            else "the map does not mirror HER2, which is mirrored"
        )
    if signals.scale is not None:
        size = abs(math.log(signals.scale)) if signals.scale > 0 else math.inf
        if not size <= limits.log_scale_max:
            fails.append(
                f"scale {signals.scale:.3f}, outside {math.exp(-limits.log_scale_max):.3f} to "
                f"{math.exp(limits.log_scale_max):.3f}"
            )
    if signals.anisotropy is not None and not signals.anisotropy <= limits.anisotropy_max:
        fails.append(f"anisotropy {signals.anisotropy:.3f}, above {limits.anisotropy_max:g}")
    if signals.folding_fraction is not None:
        folding = signals.folding_fraction
        if folding > limits.folding_fail:
            fails.append(f"folding_fraction {folding:.4f}, above {limits.folding_fail:g}")
        elif folding > limits.folding_pass:
            reviews.append(f"folding_fraction {folding:.4f}, above {limits.folding_pass:g}")
    if rigid_kept:
        reviews.append("the rigid map was kept, because the nonrigid one lowered tile_ok")
    mendable = bool(fails or reviews)
    if signals.coverage_fraction is not None and signals.coverage_fraction < limits.coverage_pass:
        reviews.append(
            f"coverage_fraction {signals.coverage_fraction:.3f}, below {limits.coverage_pass:g}"
        )
    if against_sheet:
        reviews.append("the sheet says mirrored, and HER2 matches better as it is stored")
    if fails:
        return Verdict("fail", "; ".join(fails), mendable)
    if reviews:
        return Verdict("review", "; ".join(reviews), mendable)
    return Verdict("pass", None, mendable)


def _at_least(
    name: str,
    value: float | None,
    enough: float,
    least: float,
    fails: list[str],
    reviews: list[str],
) -> None:
    if value is None or not math.isfinite(value):
        fails.append(f"{name} unknown: {UNKNOWN.get(name, 'no tissue to measure it on')}")
    elif value < least:
        fails.append(f"{name} {value:.3f}, below {least:g}")
    elif value < enough:
        reviews.append(f"{name} {value:.3f}, below {enough:g}")


def _directions(
    radii: tuple[float, ...], count: int, diagonal_px: float
) -> list[tuple[float, float]]:
    """Shifts in `count` directions by each radius, in pixels."""
    return [
        (
            radius * diagonal_px * math.cos(2 * math.pi * k / count),
            radius * diagonal_px * math.sin(2 * math.pi * k / count),
        )
        for radius in radii
        for k in range(count)
    ]


def _correlation(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    x = a.astype(np.float64) - a.mean(dtype=np.float64)
    y = b.astype(np.float64) - b.mean(dtype=np.float64)
    norm = math.sqrt(float((x * x).sum()) * float((y * y).sum()))
    return float((x * y).sum()) / norm if norm > 0 else 0.0


def _box(values: npt.NDArray[np.float64], side: int) -> npt.NDArray[np.float64]:
    """Mean over a square window, the edge mirrored."""
    mean: npt.NDArray[np.float64] = ndimage.uniform_filter(values, side, mode="reflect")
    return mean


class _Window:
    """Correlation over a square around each pixel, of one image with others."""

    def __init__(self, image: npt.NDArray[np.float32], side: int) -> None:
        self._side = side
        # Centred first: variances are differences of means.
        self._offset = float(image.mean(dtype=np.float64))
        self._image = image.astype(np.float64) - self._offset
        self._mean = _box(self._image, side)
        self._variance = _box(self._image**2, side) - self._mean**2

    def correlation(self, other: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Return (H, W); 0 where one of the two is flat."""
        values = other.astype(np.float64) - float(other.mean(dtype=np.float64))
        mean = _box(values, self._side)
        variance = _box(values**2, self._side) - mean**2
        covariance = _box(self._image * values, self._side) - self._mean * mean
        usable = (self._variance > 1e-10) & (variance > 1e-10)
        spread = np.sqrt(np.where(usable, self._variance * variance, 1.0))
        return np.where(usable, covariance / spread, 0.0)


def _local_quality(
    here: npt.NDArray[np.float32],
    inside: npt.NDArray[np.bool_],
    warped: npt.NDArray[np.float32],
    room: int,
    diagonal_px: float,
    mpp: float,
) -> LocalQuality:
    """Correlate square by square, in place and at every shift around it.

    Args:
        here: (H, W) haematoxylin of H&E.
        inside: (H, W) tissue that both stains show.
        warped: haematoxylin of HER2 on the grid of `here`, with `room` more on every side.
        room: pixels.
        diagonal_px: of the H&E slide.
        mpp: um per pixel.
    """
    side = max(3, round(TILE * diagonal_px) | 1)
    half, step = side // 2, max(1, side // 2)
    reach = max(1, round(SEARCH * diagonal_px))
    height, width = here.shape
    x, y = (_centres(length, half, step) for length in (width, height))
    share = _box(inside.astype(np.float64), side)[np.ix_(y, x)]
    rows, columns = np.nonzero(share > TILE_TISSUE)
    offsets = np.arange(-reach, reach + 1) / reach
    prior = SEARCH_PRIOR * (offsets[:, None] ** 2 + offsets**2)
    shifts = np.array(_directions(TILE_SHIFTS, 8, diagonal_px)).round().astype(np.int64)
    # What is flat on one of the two matches nowhere: as bad as can be told.
    ncc, best = np.zeros(len(rows)), np.ones(len(rows))
    residuals = np.tile((float(reach), 0.0), (len(rows), 1))
    places = [
        (slice(max(top, 0), min(top + side, height)), slice(max(left, 0), min(left + side, width)))
        for top, left in zip(y[rows] - half, x[columns] - half, strict=True)
    ]
    spreads = np.array(
        [(here[place].std(), warped[room:-room, room:-room][place].std()) for place in places]
    ).reshape(-1, 2)
    usual = np.median(spreads, axis=0) if len(places) else np.zeros(2)
    flat = (spreads <= np.maximum(FLAT * usual, 1e-5)).any(axis=1)
    for n in np.flatnonzero(~flat):
        square = here[places[n]]
        first_y, first_x = (part.start + room - reach for part in places[n])
        around = warped[
            first_y : first_y + square.shape[0] + 2 * reach,
            first_x : first_x + square.shape[1] + 2 * reach,
        ]
        found = cv2.matchTemplate(around, square, cv2.TM_CCOEFF_NORMED)
        ncc[n] = found[reach, reach]
        best[n] = found[reach + shifts[:, 1], reach + shifts[:, 0]].max()
        residuals[n] = _peak(found - prior, reach)
    centres = np.stack([x[columns] + 0.5, y[rows] + 0.5], axis=-1) * mpp
    return LocalQuality(centres, ncc, best, residuals * mpp, side * mpp, step * mpp)


def _centres(length: int, half: int, step: int) -> npt.NDArray[np.int64]:
    """Place whole squares along an axis, the last one at its end.

    A slide smaller than a square has one, in its middle.
    """
    last = length - 1 - half
    if last <= half:
        return np.array([min(half, length - 1)], np.int64)
    return np.unique(np.append(np.arange(half, last, step), last)).astype(np.int64)


def _peak(values: npt.NDArray[np.float64], reach: int) -> tuple[float, float]:
    """Return (dx, dy) of the highest value from the middle, between pixels by a parabola."""
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
