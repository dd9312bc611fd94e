"""Signals of a registration certificate, measured on a displacement and both images."""

import math

import cv2
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from hemera.imaging.color import haematoxylin, optical_density
from hemera.imaging.tissue import tissue_threshold
from hemera.registration import displacement as fields
from hemera.registration.displacement import Displacement, map_grid, map_points
from hemera.registration.local_quality import LocalQuality, directions, measure_local_quality

RGB = npt.NDArray[np.uint8]
Gray = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

# Lengths as a fraction of the diagonal of the H&E image.
WINDOW = 0.025
MATCH_RADIUS = 0.02
"""A match agrees with a displacement within this distance."""
MARGIN_SHIFTS = (0.03, 0.06, 0.12)
SMOOTHING = 2 / 1400
"""2 px where the image is about 1,000 px a side."""

TISSUE_OTSU = 0.6
TISSUE_DENSITY_MIN = 0.04
"""Least optical density of tissue: Otsu's threshold of a blank slide is that of its noise."""


def measure(
    fixed: RGB,
    moving: RGB,
    d: Displacement,
    *,
    mpp: float,
    fixed_size_um: tuple[float, float],
    moving_size_um: tuple[float, float],
    mirrored: bool = False,
) -> tuple[dict[str, float | None], LocalQuality]:
    """Measure a displacement on two images.

    Args:
        fixed: H&E from its top-left corner, on white, about 1,000 px a side; it may be padded with
            white at the right and below.
        moving: HER2 as it is stored.
        mirrored: the displacement is meant to mirror.

    Returns:
        Columns of `tables.CERTIFICATE`, without those that cannot be measured for lack of tissue,
        and the local quality. `tile_ok` is the fraction of squares in which no shifted version
        matches better, by chance 1/17; `misaligned_fraction` that of squares in regions where few
        match in place; `lncc` the median local correlation of haematoxylin; `ncc`
        that over the image; `ncc_margin` the same minus the best of 36 shifts. Scale, rotation and
        determinant are of the affine part, on the slides in um; they and folding are over the
        tissue that HER2 covers.
    """
    height, width = fixed.shape[:2]
    diagonal_px = math.hypot(*fixed_size_um) / mpp
    sigma = max(SMOOTHING * diagonal_px, 0.5)
    he, inside = _smooth_haematoxylin(fixed, sigma), tissue(fixed, sigma)
    # A margin on each side, so that shifted versions are defined up to the edge.
    margin = math.ceil(max(MARGIN_SHIFTS) * diagonal_px) + 1
    corner_um = -margin * mpp
    partners = map_grid(d, corner_um, corner_um, mpp, width + 2 * margin, height + 2 * margin)
    # Pixel edges are integers here; in OpenCV, centres are.
    index = (partners / mpp - 0.5).astype(np.float32)
    her2 = _smooth_haematoxylin(moving, sigma)
    warped = np.asarray(cv2.remap(her2, index[..., 0], index[..., 1], cv2.INTER_LINEAR), np.float32)
    partners = partners[margin : margin + height, margin : margin + width]
    covered = _covered(d, partners, mpp, moving_size_um)
    local = measure_local_quality(he, inside & covered, warped, margin, diagonal_px, mpp)
    signals: dict[str, float | None] = {}
    if len(local.ncc):
        signals["tile_ok"] = float(local.ok.mean())
        signals["misaligned_fraction"] = float((local.regions > 0).mean())
        signals["error_median_um"] = float(np.median(local.error_um))
        signals["error_p90_um"] = float(np.percentile(local.error_um, 90))
    if (inside & covered).any():
        signals |= _correlations(he, warped, margin, inside, covered, diagonal_px)
    if inside.any():
        # What HER2 does not cover cannot be judged; where it covers nothing, all is described.
        judged = inside & covered if (inside & covered).any() else inside
        # On the pixels of the image, so that the distance of the map's nodes does not matter.
        y, x = np.nonzero(judged)
        here_um = (np.stack([x, y], axis=-1) + 0.5) * mpp
        affine = fields.nearest_affine(here_um, partners[judged])
        distances_um = np.linalg.norm(partners[judged] - here_um, axis=1)
        area = fields.area_ratio(partners, mpp)[judged]
        signals |= {
            "rotation_deg": affine.rotation_deg,
            "scale": affine.scale,
            "anisotropy": affine.anisotropy,
            "determinant": affine.determinant,
            "folding_fraction": float((area >= 0 if mirrored else area <= 0).mean()),
            "coverage_fraction": float(covered[inside].mean()),
            "displacement_median_um": float(np.median(distances_um)),
        }
    return signals, local


def match_keypoints(d: Displacement, pairs_um: Floats, diagonal_um: float) -> dict[str, float]:
    """Measure a displacement at matched keypoints (N, 2, 2), (x, y) on H&E and on HER2, N > 0.

    The nonrigid stage optimises the local correlation of grey values and does not use them: their
    distances are errors of the map and of matching, not of the optimised quantity.
    `keypoint_fraction` agree within 2 % of the diagonal; `keypoint_error_um` is the median
    distance, and 90 % of them are from `keypoint_error_low_um` to `keypoint_error_high_um`.
    """
    distances = np.linalg.norm(map_points(d, pairs_um[:, 0]) - pairs_um[:, 1], axis=1)
    low, median, high = np.percentile(distances, (5, 50, 95)).tolist()
    return {
        "keypoint_fraction": float((distances <= MATCH_RADIUS * diagonal_um).mean()),
        "keypoint_error_um": median,
        "keypoint_error_low_um": low,
        "keypoint_error_high_um": high,
    }


def _smooth_haematoxylin(rgb: RGB, sigma_px: float) -> Gray:
    return np.asarray(cv2.GaussianBlur(haematoxylin(rgb), (0, 0), sigma_px), np.float32)


def tissue(rgb: RGB, sigma_px: float) -> Mask:
    """Outline the tissue by its optical density; a low threshold keeps pale tissue beside dark."""
    blurred = cv2.GaussianBlur(optical_density(rgb).mean(axis=2), (0, 0), 2 * sigma_px)
    # Steps of 0.005 up to 1.275: finer than any noise, and deeper than blurred tissue.
    steps = np.clip(np.rint(blurred / 0.005), 0, 255).astype(np.uint8)
    threshold = max(TISSUE_OTSU * tissue_threshold(steps, 0, 255) * 0.005, TISSUE_DENSITY_MIN)
    return np.asarray(blurred > threshold, np.bool_)


def _covered(
    d: Displacement, partners_um: Floats, mpp: float, moving_size_um: tuple[float, float]
) -> Mask:
    """Return where H&E maps onto the HER2 image, within one node of the displacement's grid."""
    within = (partners_um >= 0) & (partners_um <= np.asarray(moving_size_um))
    # Beyond its nodes a displacement is extrapolated: as in the tiles, coverage is 0 there.
    rows, columns = (
        (np.arange(length) + 0.5) * mpp <= (count + 1) * d.mpp
        for length, count in zip(partners_um.shape[:2], d.vectors_um.shape[:2], strict=True)
    )
    return np.asarray(within.all(axis=-1) & np.outer(rows, columns))


def _correlations(
    he: Gray, warped: Gray, margin: int, inside: Mask, covered: Mask, diagonal_px: float
) -> dict[str, float]:
    height, width = he.shape

    def shifted(dx: int, dy: int) -> Gray:
        x, y = margin + dx, margin + dy
        return warped[y : y + height, x : x + width]

    window = max(3, round(WINDOW * diagonal_px) | 1)
    lncc = float(np.median(_local_correlation(he, shifted(0, 0), window)[inside & covered]))
    ncc = _correlation(he[covered], shifted(0, 0)[covered])
    best = max(
        _correlation(he[covered], shifted(dx, dy)[covered])
        for dx, dy in directions(np.array(MARGIN_SHIFTS) * diagonal_px, 12)
    )
    return {"lncc": lncc, "ncc": ncc, "ncc_margin": ncc - best}


def _correlation(a: Gray, b: Gray) -> float:
    is_flat = np.ptp(a) == 0 or np.ptp(b) == 0
    return 0.0 if is_flat else float(np.corrcoef(a, b)[0, 1])


def _local_correlation(a: Gray, b: Gray, side_px: int) -> Floats:
    """Correlate two images over a square around each pixel: (H, W); 0 where one is flat."""

    def mean(values: Floats) -> Floats:
        return np.asarray(ndimage.uniform_filter(values, side_px, mode="reflect"))

    # Centred first: variances are differences of means.
    x, y = (image.astype(np.float64) - float(image.mean(dtype=np.float64)) for image in (a, b))
    x_mean, y_mean = mean(x), mean(y)
    x_variance, y_variance = mean(x**2) - x_mean**2, mean(y**2) - y_mean**2
    covariance = mean(x * y) - x_mean * y_mean
    usable = (x_variance > 1e-10) & (y_variance > 1e-10)
    spread = np.sqrt(np.where(usable, x_variance * y_variance, 1.0))
    return np.where(usable, covariance / spread, 0.0)
