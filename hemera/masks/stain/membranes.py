"""Membranes from DAB: which DAB can be a membrane, and how far it surrounds each nucleus."""

import dataclasses
import math

import cv2
import numpy as np
import numpy.typing as npt

from hemera.config import MaskOptions
from hemera.imaging.morphology import COARSE_MPP, coarse, disc, odd_px, smoothed
from hemera.masks import label_format
from hemera.masks.stain.nuclei import PEAK_WINDOW_UM, Nuclei
from hemera.masks.stain.stains import NUCLEAR_DENSITY, SMOOTHING_UM, Stains

Float = npt.NDArray[np.float32]

# Side of the window that faint DAB is compared with, um.
_SURROUNDINGS_UM = 22.0
# Fraction of the haematoxylin of a nucleus that chromatic aberration shows as DAB at its edge.
_FRINGE = 0.19
# Factor on the threshold of weak staining where the colour of DAB could not be measured.
_UNMEASURED = 1.5
# Largest width of the membranes of two touching cells, um; what is wider is diffuse staining. Its
# density is compared in steps, in which morphology of 8 bits is exact.
_MEMBRANE_UM = 6.0
_DIFFUSE_STEP = 0.005
# Smallest difference of a membrane from the diffuse staining beside it, as a fraction of its DAB;
# the same of strong staining, which is dark beside dark cytoplasm, too.
_RIDGE = 0.35
_STRONG_RIDGE = 0.2
# A strong membrane is as wide as the part of it above half of its maximum, which is searched for in
# a window of this side, um.
_HALF_MAXIMUM = 0.5
_LINE_WINDOW_UM = 5.0
# Largest contrast of a slide, as a factor on the thresholds.
_CONTRAST_MAX = 2.0
# How far inside the edge of its nucleus a membrane may be, um.
_INNER_UM = 1.0
# Sectors of the ring around a nucleus, and the smallest stained fraction of a stained sector: a
# membrane is half a um thick.
_SECTORS = 24
_SECTOR_FRACTION = 0.125
# How far beyond the border of its region the membrane of a cell may be, um: the line between two
# cells is on the border, which is as uncertain as the outlines of their nuclei.
_BORDER_UM = 0.5
# How far inside the edge of its nucleus the DAB of a nucleus is measured, um: the blur of the
# microscope mixes what is nearer with the membrane.
_NUCLEAR_UM = 1.5


@dataclasses.dataclass(frozen=True)
class Membranes:
    """DAB of one tile, all (H, W).

    `classes` is that of what can be a membrane: 0 none, 1 weak to 3 strong. `dab` is the density of
    DAB, `diffuse` the part of it that is wider than the membranes of two cells.
    """

    classes: npt.NDArray[np.uint8]
    dab: Float
    diffuse: Float


def find_membranes(separated: Float, mpp: float, stains: Stains, options: MaskOptions) -> Membranes:
    """Find the DAB that can be a membrane.

    A membrane is a thin line: its DAB exceeds that of the cytoplasm and the nuclei beside it, which
    is the morphological opening of the DAB with a disc wider than two membranes. Diffuse staining
    of any strength is not a membrane. The line is as wide as its full width at half maximum.

    Cameras and scanners differ in contrast, which multiplies the densities of both stains. The
    thresholds of moderate and strong staining are therefore in proportion to the haematoxylin of
    the dark nuclei of the slide; they are used as they are where that is `NUCLEAR_DENSITY`. The
    threshold of weak staining is not lowered: noise of the image and of the separation does not
    depend on the counterstain.

    Faint DAB over a wide area is background staining of skin, stroma or a poorly rinsed section:
    it counts as weak only where it exceeds its surroundings and, beside a dark nucleus, the
    chromatic aberration there. Weak staining must also reach `options.dab_control` times the
    background DAB of the slide, and half as much again where the colour of DAB could not be
    measured: a counterstain of another hue than the fixed vector is then separated into faint
    DAB. None of this applies to moderate and strong staining.

    Args:
        separated: (H, W, 3) densities, see `stains.separate`.
        mpp: their resolution, um/px.
        stains: that they were separated with.
        options: thresholds of the classes.
    """
    haematoxylin, dab = (np.asarray(cv2.extractChannel(separated, k), np.float32) for k in (0, 1))
    smooth = smoothed(dab, mpp, SMOOTHING_UM)
    diffuse = _diffuse(smooth, mpp)
    levels = _levels(stains, options)
    membrane = _classes(smooth, levels)
    # Beyond the steps, a dark particle would exceed its own opening.
    bounded = np.minimum(smooth, np.float32(255 * _DIFFUSE_STEP))
    excess = bounded - diffuse
    window = odd_px(_LINE_WINDOW_UM, mpp)
    half = cv2.dilate(bounded, np.ones((window, window), np.uint8)) - diffuse
    half *= np.float32(_HALF_MAXIMUM)
    line = (membrane == 3) & (excess >= np.maximum(half, np.float32(_STRONG_RIDGE) * bounded))
    np.minimum(membrane, 2, out=membrane)
    membrane *= excess >= _RIDGE * bounded
    np.putmask(membrane, line, 3)
    membrane *= (membrane > 1) | (smooth >= _lowest_weak(haematoxylin, dab, mpp, options))
    return Membranes(membrane, dab, diffuse)


def _levels(stains: Stains, options: MaskOptions) -> tuple[float, float, float]:
    """Return the smallest DAB of weak, moderate and strong staining of a slide."""
    contrast = min(max(stains.nuclear_density / NUCLEAR_DENSITY, 1.0), _CONTRAST_MAX)
    moderate, strong = contrast * options.dab_moderate, contrast * options.dab_strong
    weak = options.dab_weak * (1 if "dab" in stains.estimated else _UNMEASURED)
    return min(max(weak, options.dab_control * stains.background_dab), moderate), moderate, strong


def _classes(density: Float, levels: tuple[float, ...]) -> npt.NDArray[np.uint8]:
    """Return how many of three ascending levels each density (H, W) reaches."""
    result = np.zeros(density.shape, np.uint8)
    for level in levels:
        result += (density >= np.float32(level)).view(np.uint8)
    return result


def _diffuse(smooth: Float, mpp: float) -> Float:
    """Return the part of a density (H, W) that is wider than the membranes of two cells."""
    steps = cv2.convertScaleAbs(np.maximum(smooth, 0), alpha=1 / _DIFFUSE_STEP)
    opened = cv2.morphologyEx(steps, cv2.MORPH_OPEN, disc(_MEMBRANE_UM, mpp))
    wide = opened.astype(np.float32) * np.float32(_DIFFUSE_STEP)
    return np.asarray(np.minimum(wide, smooth), np.float32)


def _lowest_weak(haematoxylin: Float, dab: Float, mpp: float, options: MaskOptions) -> Float:
    """Return the DAB (H, W) that is not background staining or the fringe of a nucleus."""
    window = odd_px(_SURROUNDINGS_UM, COARSE_MPP)
    around = cv2.blur(coarse(dab, mpp), (window, window), borderType=cv2.BORDER_REFLECT)
    height, width = dab.shape
    lowest = np.asarray(cv2.resize(around, (width, height)), np.float32)
    lowest *= options.dab_contrast
    window = odd_px(PEAK_WINDOW_UM, mpp)
    fringe = cv2.dilate(
        smoothed(haematoxylin, mpp, SMOOTHING_UM), np.ones((window, window), np.uint8)
    )
    return np.maximum(lowest, np.multiply(fringe, _FRINGE, out=fringe), out=lowest)


def measure_cells(
    nuclei: Nuclei, membranes: Membranes, mpp: float, options: MaskOptions
) -> tuple[npt.NDArray[np.int32], label_format.Cells]:
    """Measure the membrane around every nucleus.

    The ring, from just inside the edge of a nucleus outwards, is cut into 24 sectors around its
    centroid. A sector is stained at a class when an eighth of its pixels reach it. `completeness`
    is the fraction of sectors that are stained; `intensity` is the strongest class that
    covers `options.completeness_min` of the ring, so pigment on one side is not enough. A
    cell with any intensity is positive.

    Densities of a cell: `cytoplasm_od` is the mean diffuse DAB of the ring, `membrane_od` the mean
    over the sectors of how much the largest DAB of the membrane exceeds it, 0 in sectors that are
    not stained; `nucleus_od` is the mean DAB of the inside of the nucleus.

    Args:
        nuclei: of a tile (H, W).
        membranes: of the same tile.
        mpp: resolution of both, um/px.
        options: width of the ring, completeness.

    Returns:
        The cells, (H, W): every nucleus with its ring, and their table.
    """
    labels, depth_px = nuclei.labels, nuclei.depth_px
    count = int(labels.max(initial=0))
    if not count:
        return labels, label_format.blank((0, 0)).cells
    width = labels.shape[1]
    grown: npt.NDArray[np.int32] = np.where(depth_px >= -options.ring_um / mpp, nuclei.regions, 0)
    at = np.flatnonzero(labels != 0)
    y, x = np.divmod(at, width)
    of = labels.ravel()[at]
    area = np.bincount(of, minlength=count + 1)
    centre_x = np.bincount(of, x, count + 1) / np.maximum(area, 1)
    centre_y = np.bincount(of, y, count + 1) / np.maximum(area, 1)
    deep = depth_px.ravel()[at] > _NUCLEAR_UM / mpp
    nucleus_od = _nucleus_od(membranes.dab.ravel()[at], deep, of, count)

    at = np.flatnonzero((grown > 0) & (depth_px <= _INNER_UM / mpp))
    of = grown.ravel()[at].astype(np.int64)
    y, x = np.divmod(at, width)
    east = (x - centre_x[of]).astype(np.float32)
    south = (y - centre_y[of]).astype(np.float32)
    # A tile that is one nucleus has no ring, and OpenCV rejects empty arrays.
    turn = cv2.phase(east, south).ravel() if len(at) else east
    sector = np.minimum((turn * np.float32(_SECTORS / (2 * np.pi))).astype(np.int64), _SECTORS - 1)
    sector += of * np.int64(_SECTORS)
    shape = (4, count + 1, _SECTORS)
    classes = membranes.classes.ravel()[at]
    place = sector + classes * np.int64((count + 1) * _SECTORS)
    reached = np.bincount(place, minlength=math.prod(shape)).reshape(shape)
    # What reaches a class reaches those below it.
    for c in (2, 1, 0):
        reached[c] += reached[c + 1]
    total = reached[0]
    stained = (reached[1:] >= _SECTOR_FRACTION * total) & (reached[1:] > 0)
    sectors = np.maximum(np.count_nonzero(total, axis=1), 1)
    fraction = np.count_nonzero(stained, axis=2) / sectors
    # What covers enough at a class does so at those below it: the number of classes is the class.
    intensity = (fraction >= options.completeness_min).sum(axis=0).astype(np.uint8)[1:]
    diffuse = np.bincount(of, membranes.diffuse.ravel()[at], count + 1)
    cytoplasm_od = diffuse / np.maximum(total.sum(axis=1), 1)
    beyond = cv2.dilate(membranes.dab, disc(2 * _BORDER_UM + mpp, mpp))
    peaks = np.zeros(shape[1:], np.float32)
    brown = np.flatnonzero(classes != 0)
    np.maximum.at(peaks.reshape(-1), sector[brown], beyond.ravel()[at[brown]])
    excess = np.maximum(peaks - cytoplasm_od[:, None], 0) * stained[0]
    return grown, label_format.Cells(
        x_px=(centre_x[1:] + 0.5).astype(np.float32),
        y_px=(centre_y[1:] + 0.5).astype(np.float32),
        area_px=area[1:].astype(np.int32),
        positive=intensity > 0,
        intensity=intensity,
        completeness=fraction[0, 1:].astype(np.float32),
        membrane_od=(excess.sum(axis=1) / sectors)[1:].astype(np.float32),
        cytoplasm_od=cytoplasm_od[1:].astype(np.float32),
        nucleus_od=nucleus_od[1:].astype(np.float32),
    )


def _nucleus_od(
    dab: Float, deep: npt.NDArray[np.bool_], of: npt.NDArray[np.integer], count: int
) -> npt.NDArray[np.float64]:
    """Return the mean DAB of the deep pixels of nuclei; of all of one that is too small for it.

    `dab`, `deep` and `of`, the number of the nucleus, are lists of pixels (N,).
    """
    small = np.bincount(of[deep], minlength=count + 1) == 0
    used = deep | small[of]
    pixels = np.bincount(of[used], minlength=count + 1)
    sums = np.bincount(of[used], dab[used], count + 1)
    return np.asarray(sums / np.maximum(pixels, 1), np.float64)
