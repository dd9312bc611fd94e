"""The membrane engine: nuclei from haematoxylin, membranes and their strength from DAB.

Colour is separated with the stain vectors and the glass of the pair at hand, estimated from a
sample of its tiles and never from one tile alone. Every threshold is an optical density
(log10 of glass over pixel, along a stain vector of length one), every length is in um.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import numpy.typing as npt
from skimage.segmentation import watershed

from hemera import masks, pixels
from hemera.config import MaskOptions

HAEMATOXYLIN = (0.650, 0.704, 0.286)
DAB = (0.268, 0.570, 0.776)
"""Ruifrok and Johnston's vectors (Anal Quant Cytol Histol 23, 2001), in optical density of
red, green and blue: what holds where a slide shows no second stain to measure."""

_flood: Callable[..., npt.NDArray[np.int32]] = watershed

_WORKING_MPP = 0.5
"""No tile is worked on finer than this: nuclei and membranes are resolved, um/px."""

_SMOOTHING_UM = 0.6
_SLACK = 0.05
_PEAK_WINDOW_UM = 6.0
_PEAK_SHARE = 0.35
_GAP_UM2 = 8.0
_SEPARATION_UM = 4.0
_CORE_UM = 1.0
_STEPS = 64
_EDGE_UM = 2.0
_RIM_UM = 0.5
"""Of a nucleus: shapes, not thresholds of staining, which stand in the options."""

_INNER_UM = 1.0
_SECTORS = 12
_SECTOR_SHARE = 0.2
"""Of a membrane: how far inside the edge of the nucleus it may lie, and how it is sampled."""

_STAINED = 0.15
_PIXELS_MIN = 500
_ANGLE_MAX_DEG = 15.0
_DARK_DEFAULT = 0.35
"""Of the estimate: summed density of a stained pixel, how many it takes, how far it may lead."""


@dataclasses.dataclass(frozen=True)
class Stains:
    """How one pair was stained and scanned.

    `background` is bare glass (r, g, b), 0 to 255; `haematoxylin` and `dab` are unit vectors of
    optical density; `dark` is the density of haematoxylin in the pair's dark nuclei (98th
    percentile of what is stained); `estimated` says which vectors were measured.
    """

    background: tuple[int, int, int]
    haematoxylin: tuple[float, float, float] = HAEMATOXYLIN
    dab: tuple[float, float, float] = DAB
    dark: float = _DARK_DEFAULT
    estimated: tuple[str, ...] = ()


def estimate(tiles: Sequence[npt.NDArray[np.uint8]]) -> Stains:
    """Estimate glass and stain vectors of a pair from some of its HER2 tiles.

    Macenko et al. (ISBI 2009): the extreme directions of stained pixels in the plane of their two
    largest variances. A direction further than 15 degrees from the fixed vector of its stain is
    noise or another dye, and the fixed vector is taken: so on a slide without DAB.

    Args:
        tiles: (H, W, 3) uint8 RGB each, of any sizes; none: white glass, fixed vectors.
    """
    if not tiles:
        return Stains(pixels.WHITE)
    # A blur before sampling: single pixels carry the noise of sensor and JPEG.
    sample = np.concatenate([cv2.blur(tile, (3, 3))[::4, ::4].reshape(-1, 3) for tile in tiles])
    red, green, blue = np.rint(np.percentile(sample, 99, axis=0)).astype(int).tolist()
    glass = (red, green, blue)
    density = pixels.optical_density(sample[None], glass)[0].astype(np.float64)
    stained = density[density.sum(axis=1) > _STAINED]
    vectors = np.array([_unit(HAEMATOXYLIN), _unit(DAB)])
    estimated: list[str] = []
    if len(stained) >= _PIXELS_MIN:
        for row, (name, direction) in enumerate(
            zip(("haematoxylin", "dab"), _extremes(stained), strict=True)
        ):
            if direction @ vectors[row] > math.cos(math.radians(_ANGLE_MAX_DEG)):
                vectors[row] = direction
                estimated.append(name)
    haematoxylin = stained @ _unmixing(vectors)[:, 0]
    haematoxylin = haematoxylin[haematoxylin > _STAINED / 3]
    enough = len(haematoxylin) >= _PIXELS_MIN
    dark = float(np.percentile(haematoxylin, 98)) if enough else _DARK_DEFAULT
    return Stains(glass, _triple(vectors[0]), _triple(vectors[1]), dark, tuple(estimated))


def separate(rgb: npt.NDArray[np.uint8], stains: Stains) -> npt.NDArray[np.float32]:
    """Return the densities of haematoxylin, DAB and the rest, (H, W, 3) float32.

    Densities are log10 over the pair's glass; the rest is what neither vector explains.
    """
    density = pixels.optical_density(rgb, stains.background)
    vectors = np.array([stains.haematoxylin, stains.dab])
    return np.asarray(cv2.transform(density, _unmixing(vectors).T), np.float32)


def classify(
    dab: npt.NDArray[np.float32], mpp: float, options: MaskOptions
) -> npt.NDArray[np.uint8]:
    """Return the DAB class 0 to 3 of every pixel of a density image (H, W) at `mpp`."""
    smooth = _smoothed(dab, mpp, _SMOOTHING_UM / 2)
    levels = np.array([options.dab_weak, options.dab_moderate, options.dab_strong], np.float32)
    classes = np.zeros(smooth.shape, np.uint8)
    for level in levels:
        classes += smooth >= level
    return classes


def nuclei(
    haematoxylin: npt.NDArray[np.float32], mpp: float, dark: float, options: MaskOptions
) -> npt.NDArray[np.int32]:
    """Return the nuclei, (H, W) int32: 0 none, numbered from 1.

    A pixel of a nucleus is darker than `options.nucleus_density_min`, than a share of the pair's
    `dark` nuclei, than the mean of its surroundings, and not much paler than the darkest near it:
    so a nucleus in blue stroma is not lost in it. Touching nuclei are cut by watershed on the
    distance from their edge. A piece without an edge, no darker than what lies around it, is
    haze and no nucleus.
    """
    smooth = _smoothed(haematoxylin, mpp, _SMOOTHING_UM)
    inside = (smooth > max(options.nucleus_density_min, options.nucleus_contrast * dark)).astype(
        np.uint8
    )
    # A little below the mean: in dense tissue the mean itself is that of nuclei.
    window = _odd(options.nucleus_window_um / mpp)
    around = cv2.boxFilter(smooth, -1, (window, window), borderType=cv2.BORDER_REFLECT)
    inside &= smooth > around - _SLACK * dark
    window = _odd(_PEAK_WINDOW_UM / mpp)
    inside &= smooth > _PEAK_SHARE * cv2.dilate(smooth, np.ones((window, window), np.uint8))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3))
    inside = np.asarray(cv2.morphologyEx(inside, cv2.MORPH_OPEN, disc), np.uint8)
    _fill_gaps(inside, _GAP_UM2 / mpp**2)

    # In whole steps: OpenCV's distances may differ in their last bit from call to call, which
    # would decide between equal peaks; its blur of integers is exact.
    distance = cv2.distanceTransform(inside, cv2.DIST_L2, 5)
    # Without any background there is nothing to measure to, and the distance has no bound.
    steps = np.rint(np.minimum(distance, 65535 / _STEPS) * _STEPS).astype(np.uint16)
    ridge = cv2.GaussianBlur(steps, (0, 0), max(_SMOOTHING_UM / mpp, 0.5))
    reach = _odd(_SEPARATION_UM / mpp)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (reach, reach))
    peaks = (ridge >= cv2.dilate(ridge, disc)) & (steps > _STEPS * max(_CORE_UM / mpp, 1.0) + 0.5)
    if not peaks.any():
        return np.zeros(inside.shape, np.int32)
    _, markers = cv2.connectedComponents(peaks.astype(np.uint8))
    pieces = _flood(-ridge.astype(np.int32), markers, mask=inside.astype(bool))

    count = int(pieces.max()) + 1
    outside_px, owner = _nearest(pieces)
    area = np.bincount(pieces.ravel(), minlength=count)
    density = np.bincount(pieces.ravel(), smooth.ravel(), count) / np.maximum(area, 1)
    ring = (outside_px <= _EDGE_UM / mpp) & (inside == 0)
    ring_area = np.bincount(owner[ring], minlength=count)
    ring_density = np.bincount(owner[ring], smooth[ring], count) / np.maximum(ring_area, 1)
    kept = (density - ring_density >= options.nucleus_edge * dark) | (ring_area == 0)
    kept &= area * mpp**2 >= options.nucleus_area_min_um2
    kept &= area * mpp**2 <= options.nucleus_area_max_um2
    kept[0] = False
    numbers = np.where(kept, np.cumsum(kept), 0).astype(np.int32)
    # Smoothing and opening took the rim.
    labels: npt.NDArray[np.int32] = np.where(outside_px <= _RIM_UM / mpp, numbers[owner], 0)
    return labels


def expand(labels: npt.NDArray[np.int32], distance_px: float) -> npt.NDArray[np.int32]:
    """Grow labels (H, W) into the background up to a distance, each to where the next begins."""
    if not labels.any():
        return labels.copy()
    outside_px, owner = _nearest(labels)
    grown: npt.NDArray[np.int32] = np.where(outside_px <= distance_px, owner, 0)
    return grown


def measure(
    labels: npt.NDArray[np.int32],
    dab_classes: npt.NDArray[np.uint8],
    mpp: float,
    options: MaskOptions,
) -> tuple[npt.NDArray[np.int32], masks.Cells]:
    """Measure the membrane around every nucleus.

    The ring, from just inside the edge of a nucleus outwards, is cut into twelve sectors seen
    from its centroid. A sector is stained at a class when a fifth of its pixels reach it: a
    membrane is thin, and a single speck is none. `completeness` is the share of sectors stained
    at all; `intensity` is the
    strongest class that covers `options.completeness_min` of the ring; a cell is positive when
    that is at least `options.positive_intensity_min`. So pigment on one side makes no cell
    positive.

    Args:
        labels: (H, W), 0 background, nuclei from 1 without gaps.
        dab_classes: (H, W) of 0 to 3, see `classify`.
        mpp: resolution of both, um/px.
        options: ring, completeness and classes.

    Returns:
        The cells, (H, W): every nucleus with its ring, and their table.
    """
    count = int(labels.max(initial=0))
    grown = expand(labels, options.ring_um / mpp)
    if not count:
        return grown, masks.blank((0, 0)).cells
    y, x = np.nonzero(labels)
    of = labels[y, x]
    area = np.bincount(of, minlength=count + 1)
    held = np.maximum(area, 1)
    centre_x = np.bincount(of, x, count + 1) / held
    centre_y = np.bincount(of, y, count + 1) / held

    depth = cv2.distanceTransform((labels > 0).astype(np.uint8), cv2.DIST_L2, 5)
    shallow = np.rint(depth * _STEPS) <= _STEPS * _INNER_UM / mpp
    ring_y, ring_x = np.nonzero((grown > 0) & shallow)
    of = grown[ring_y, ring_x]
    angle = np.arctan2(ring_y - centre_y[of], ring_x - centre_x[of])
    sector = ((angle + np.pi) * (_SECTORS / (2 * np.pi))).astype(np.int64) % _SECTORS
    key = of * _SECTORS + sector
    shape = (count + 1, _SECTORS)
    total = np.bincount(key, minlength=shape[0] * shape[1]).reshape(shape)
    sectors = np.maximum((total > 0).sum(axis=1), 1)
    stain = dab_classes[ring_y, ring_x]
    intensity = np.zeros(count + 1, np.uint8)
    completeness = np.zeros(count + 1, np.float32)
    for level in (1, 2, 3):
        reached = np.bincount(key, stain >= level, total.size).reshape(shape)
        share = ((reached >= _SECTOR_SHARE * total) & (reached > 0)).sum(axis=1) / sectors
        intensity[share >= options.completeness_min] = level
        if level == 1:
            completeness[:] = share
    return grown, masks.Cells(
        (centre_x[1:] + 0.5).astype(np.float32),
        (centre_y[1:] + 0.5).astype(np.float32),
        area[1:].astype(np.int32),
        intensity[1:] >= options.positive_intensity_min,
        intensity[1:],
        completeness[1:],
    )


def segment(
    rgb: npt.NDArray[np.uint8], mpp: float, stains: Stains, options: MaskOptions
) -> masks.Labelled:
    """Label one HER2 tile.

    A tile finer than 0.5 um/px is worked on at 0.5 um/px, where nuclei and membranes are still
    resolved, and its labels are brought back to the tile's own grid.

    Args:
        rgb: (H, W, 3) uint8.
        mpp: its resolution, um/px.
        stains: of its pair, see `estimate`.
        options: thresholds.
    """
    height, width = rgb.shape[:2]
    work, work_mpp = rgb, mpp
    if mpp < 0.75 * _WORKING_MPP:
        size = (
            max(1, round(width * mpp / _WORKING_MPP)),
            max(1, round(height * mpp / _WORKING_MPP)),
        )
        work = np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), np.uint8)
        work_mpp = mpp * math.sqrt(width * height / (size[0] * size[1]))
    separated = separate(work, stains)
    labels = nuclei(np.ascontiguousarray(separated[..., 0]), work_mpp, stains.dark, options)
    dab = classify(np.ascontiguousarray(separated[..., 1]), work_mpp, options)
    grown, cells = measure(labels, dab, work_mpp, options)
    if work is not rgb:
        rows = np.minimum((np.arange(height) + 0.5) * (size[1] / height), size[1] - 1).astype(int)
        columns = np.minimum((np.arange(width) + 0.5) * (size[0] / width), size[0] - 1).astype(int)
        labels, dab, grown = (
            np.ascontiguousarray(image[rows][:, columns]) for image in (labels, dab, grown)
        )
        cells = dataclasses.replace(
            cells,
            x_px=cells.x_px * np.float32(width / size[0]),
            y_px=cells.y_px * np.float32(height / size[1]),
            area_px=np.bincount(labels.ravel(), minlength=len(cells) + 1)[1:].astype(np.int32),
        )
    return masks.Labelled(masks.pack(classes(grown, cells.positive), labels > 0, dab), cells)


def classes(cells: npt.NDArray[np.int32], positive: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """Return the class image (H, W) of numbered cells: sign inside, boundary around."""
    sign = np.concatenate([[masks.BACKGROUND], np.where(positive, masks.POSITIVE, masks.NEGATIVE)])
    image = sign.astype(np.uint8)[cells]
    image[masks.boundaries(cells)] = masks.BOUNDARY
    return image


def _extremes(
    stained: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the two extreme unit directions of densities (N, 3), the bluer dye first."""
    _, axes = np.linalg.eigh(np.cov(stained.T))
    axes = axes[:, [2, 1]]
    axes = axes * np.where(axes[0] < 0, -1.0, 1.0)
    angle = np.arctan2(stained @ axes[:, 1], stained @ axes[:, 0])
    first, last = (
        _unit(axes @ np.array([math.cos(end), math.sin(end)]))
        for end in np.percentile(angle, [1, 99])
    )
    # Haematoxylin takes red light, DAB takes blue.
    return (first, last) if first[0] - first[2] > last[0] - last[2] else (last, first)


def _unmixing(vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the (3, 3) matrix that takes densities as a row to stains: both, and the rest."""
    rest = _unit(np.cross(vectors[0], vectors[1]))
    return np.asarray(np.linalg.inv(np.vstack([vectors, rest])), np.float64)


def _unit(vector: npt.ArrayLike) -> npt.NDArray[np.float64]:
    values = np.asarray(vector, dtype=np.float64)
    return np.asarray(values / np.linalg.norm(values), np.float64)


def _triple(vector: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    return float(vector[0]), float(vector[1]), float(vector[2])


def _smoothed(
    image: npt.NDArray[np.float32], mpp: float, sigma_um: float
) -> npt.NDArray[np.float32]:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), max(sigma_um / mpp, 0.5)), np.float32)


def _odd(length: float) -> int:
    """Return the odd number of pixels nearest below a length, for windows with a middle."""
    return 2 * int(length / 2) + 1


def _nearest(
    labels: npt.NDArray[np.int32],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """Return the distance to the nearest label, px (H, W), and which it is; one there must be.

    Distances come in steps of 1/64 px, for the reason given in `nuclei`.
    """
    ground = labels == 0
    distance, place = cv2.distanceTransformWithLabels(
        ground.astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    owner = np.zeros(int(place.max()) + 1, np.int32)
    owner[place[~ground]] = labels[~ground]
    return np.rint(distance * _STEPS).astype(np.float32) / np.float32(_STEPS), owner[place]


def _fill_gaps(inside: npt.NDArray[np.uint8], area_px: float) -> None:
    """Fill holes up to an area, in place: the pale middle of a vesicular nucleus."""
    _, gaps, numbers, _ = cv2.connectedComponentsWithStats(1 - inside, connectivity=4)
    small = numbers[:, cv2.CC_STAT_AREA] <= area_px
    small[0] = False
    inside[small[gaps]] = 1
