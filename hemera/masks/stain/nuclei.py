"""Nuclei from haematoxylin: local maxima of density, separated where nuclei touch."""

import dataclasses
from typing import Self

import cv2
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from hemera.imaging.morphology import (
    DISTANCE_STEPS,
    detached_pixels,
    disc,
    distance_inside,
    fill_holes,
    merged,
    odd_px,
    smoothed,
    voronoi_regions,
    watershed,
)
from hemera.masks.stain import Options
from hemera.masks.stain.stains import SMOOTHING_UM, Stains

Float = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]

# Side of the window in which the darkest pixel is searched for, um.
PEAK_WINDOW_UM = 6.0
# Largest density that is distinguished, as a multiple of that of dark nuclei.
_DARKEST = 1.4
# Density of the edge of a nucleus between that of its surroundings, 0, and its own mean, 1. It is
# nearer to the surroundings because a nucleus is thinner towards its edge: at 0.3 of the greatest
# thickness, an ellipsoid has 0.95 of its radius.
_EDGE = 0.3
# Product of the difference in density between a nucleus and its surroundings and its diameter, um:
# what is below it, and below this fraction of the median of its tile, is out of focus or cut at its
# edge, and is not counted for a marker of nuclei. Chosen leaving one source of real images out at a
# time; see docs/how-to/masks.md.
_PALE_UM = 0.2
_PALE_FRACTION = 0.67
# On a pale slide, fibres of collagen are as dark as nuclei, but not as convex: smallest area of a
# nucleus as a fraction of that of its convex hull. It rises from 0 as the factor on the limits of
# density falls from 1 to the second value.
_SOLIDITY = 0.8
_SOLIDITY_PALENESS = 0.7
# Up to here it is not compared: nearly all pieces have more.
_SOLIDITY_LEAST = 0.5
# How far the outline may be from the edge of the pixels that a nucleus was found from, um.
_REACH_UM = 1.0


@dataclasses.dataclass(frozen=True)
class Tile:
    """What nuclei are found in: a tile, its stains and its nuclear stain.

    `rgb` is (H, W, 3) uint8, `mpp` its resolution in um/px, `stains` those of its pair,
    `nuclear_stain` (H, W) the density of haematoxylin, and of DAB where it stains nuclei,
    `excluded` (H, W) the pixels that belong to no nucleus, if any.
    """

    rgb: npt.NDArray[np.uint8]
    mpp: float
    stains: Stains
    nuclear_stain: Float
    excluded: Mask | None = None


@dataclasses.dataclass(frozen=True)
class Nuclei:
    """Nuclei of one tile with their Voronoi regions: all (H, W).

    `labels` numbers the nuclei from 1, 0 is background; each is one piece. `regions` is the nucleus
    that a pixel belongs to or is nearest to, 0 without one. `depth_px` is the distance inside the
    edge of a nucleus, negative outside.
    """

    labels: Labels
    regions: Labels
    depth_px: Float

    @classmethod
    def from_labels(cls, labels: Labels) -> Self:
        """Return nuclei (H, W) that are numbered from 1 without gaps."""
        outside_px, regions = voronoi_regions(labels)
        inside_px = distance_inside((labels > 0).view(np.uint8)) / np.float32(DISTANCE_STEPS)
        return cls(labels, regions, np.asarray(inside_px - outside_px, np.float32))


def find_nuclei(tile: Tile, options: Options) -> Nuclei:
    """Find nuclei in the density of the nuclear stain of a tile.

    A pixel of a nucleus is darker than `options.nucleus_density_min` (on a pale slide, in
    proportion to its dark nuclei), than a fraction of the dark nuclei of the pair, than the mean of
    its surroundings, and not much paler than the darkest pixel near it; so a nucleus in blue stroma
    is found. Touching nuclei are cut by watershed on the distance from their edge. A piece that is
    not darker than its surroundings is removed, and on a pale slide one that is not convex.
    """
    dark = dark_pixels(tile, options)
    pieces = split(dark, tile.mpp)
    limits = Limits(
        area_min_um2=options.nucleus_area_min_um2,
        area_max_um2=options.nucleus_area_max_um2,
        edge_min=options.nucleus_edge,
        evidence_min_um=0.5,
        core_um=_REACH_UM,
        grow_um=0.0,
        without_pale=options.compartment == "nucleus",
        solidity_min=_SOLIDITY * min((1 - tile.stains.paleness) / (1 - _SOLIDITY_PALENESS), 1.0),
    )
    return outlined(tile, dark, pieces, limits)


@dataclasses.dataclass(frozen=True)
class Dark:
    """Dark pixels of a tile, all (H, W).

    `smooth` is the blurred density of the nuclear stain, `inside` 1 where it is dark enough for a
    nucleus, `steps` the distance to the edge of these pixels in 1 / `DISTANCE_STEPS` px.
    """

    smooth: Float
    inside: npt.NDArray[np.uint8]
    steps: npt.NDArray[np.uint16]


def dark_pixels(tile: Tile, options: Options) -> Dark:
    """Return the pixels of a tile that are dark enough for a nucleus, see `find_nuclei`."""
    # A nucleus that is much darker than others would hide those beside it.
    darkest = np.float32(_DARKEST * tile.stains.nuclear_density)
    bounded = np.asarray(np.minimum(tile.nuclear_stain, darkest), np.float32)
    smooth = smoothed(bounded, tile.mpp, SMOOTHING_UM)
    inside = _nuclear_pixels(smooth, tile.mpp, tile.stains, options)
    if tile.excluded is not None:
        inside[tile.excluded] = 0
    return Dark(smooth, inside, distance_inside(inside))


@dataclasses.dataclass(frozen=True)
class Limits:
    """What distinguishes a nucleus from other pieces of its tile.

    `edge_min` is the smallest difference in density between it and its surroundings, and
    `evidence_min_um` the smallest product of this difference and the diameter, both relative to
    the density of dark nuclei of the slide: a pale nucleus is larger than a fragment of stroma of
    the same difference. Dark pixels further than `core_um` from the edge of all dark pixels, and
    not further than `grow_um` from a piece, belong to it whatever their density. `without_pale`
    removes what is much paler than the nuclei of its tile. `solidity_min` is the smallest area as a
    fraction of that of the convex hull.
    """

    area_min_um2: float
    area_max_um2: float
    edge_min: float
    evidence_min_um: float
    core_um: float
    grow_um: float
    without_pale: bool
    solidity_min: float = 0.0


def outlined(tile: Tile, dark: Dark, pieces: Labels, limits: Limits) -> Nuclei:
    """Return the pieces (H, W) that are nuclei, with their outline at the edge of the stain.

    Args:
        tile: that they were found in.
        dark: its dark pixels.
        pieces: numbered, 0 outside.
        limits: of nuclei.
    """
    mpp, excluded = tile.mpp, tile.excluded
    outside_px, regions = voronoi_regions(pieces)
    kept, edge = _plausible(
        dark, pieces, outside_px, regions, mpp, tile.stains.nuclear_density, limits
    )  # fmt: skip
    numbers = np.where(kept, np.cumsum(kept), 0).astype(np.int32)
    whole = (dark.smooth > np.take(edge, regions, mode="clip")) & (outside_px <= _REACH_UM / mpp)
    core = dark.steps > DISTANCE_STEPS * limits.core_um / mpp
    whole |= core & (outside_px <= limits.grow_um / mpp)
    if excluded is not None:
        whole &= ~excluded
    regions = np.take(numbers, regions, mode="clip")
    labels = regions * whole
    # The watershed at half the resolution crosses gaps of one pixel.
    detached = detached_pixels(labels, int(kept.sum()))
    if detached is not None:
        labels[detached] = regions[detached] = 0
    background = (labels == 0).view(np.uint8)
    depth_px = distance_inside(1 - background).astype(np.float32)
    depth_px -= distance_inside(background)
    depth_px /= np.float32(DISTANCE_STEPS)
    if excluded is not None:
        depth_px[excluded] = -np.inf
    return Nuclei(labels, regions, depth_px)


def _nuclear_pixels(
    smooth: Float, mpp: float, stains: Stains, options: Options
) -> npt.NDArray[np.uint8]:
    """Return the pixels (H, W) that are dark enough for a nucleus, 1 or 0."""
    # How far below the mean of its surroundings a nucleus may be, as a fraction of the dark nuclei:
    # in dense tissue, the mean is that of nuclei.
    slack = 0.05
    # Smallest fraction of the darkest pixel near it.
    peak_fraction = 0.40
    # Largest hole that is filled: the pale middle of a vesicular nucleus, um^2.
    hole_um2 = 15.0
    window = odd_px(options.nucleus_window_um, mpp)
    lowest = np.asarray(
        cv2.boxFilter(smooth, -1, (window, window), borderType=cv2.BORDER_REFLECT), np.float32
    )
    lowest -= slack * stains.nuclear_density
    floor = stains.paleness * options.nucleus_density_min
    np.maximum(lowest, max(floor, options.nucleus_contrast * stains.nuclear_density), out=lowest)
    window = odd_px(PEAK_WINDOW_UM, mpp)
    peak = cv2.dilate(smooth, np.ones((window, window), np.uint8))
    np.maximum(lowest, np.multiply(peak, peak_fraction, out=peak), out=lowest)
    inside = (smooth > lowest).view(np.uint8)
    cross = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3))
    inside = np.asarray(cv2.morphologyEx(inside, cv2.MORPH_OPEN, cross), np.uint8)
    fill_holes(inside, hole_um2 / mpp**2)
    return inside


def split(dark: Dark, mpp: float) -> Labels:
    """Divide dark pixels (H, W) into numbered pieces; components without a core have 0."""
    inside, steps = dark.inside, dark.steps
    # Smallest distance between the cores of two nuclei, and of a core from the edge, um.
    separation_um = 6.0
    core_um = 1.1
    # Two nuclei that touch have a neck between them: where the distance from the edge falls less
    # than to this fraction of the smaller of theirs, they are one.
    neck_max = 0.9
    # The blur of integers is exact.
    ridge = smoothed(steps, mpp, SMOOTHING_UM)
    peaks = ridge >= cv2.dilate(ridge, disc(separation_um, mpp))
    peaks &= steps > DISTANCE_STEPS * max(core_um / mpp, 1.0) + 0.5
    count, markers = cv2.connectedComponents(peaks.view(np.uint8))
    component_count, found = cv2.connectedComponents(inside)
    components = np.asarray(found, np.int32)
    component_of = np.zeros(count, np.int64)
    component_of[markers[peaks]] = components[peaks]
    cores = np.bincount(component_of[1:], minlength=component_count)
    number = np.zeros(component_count, np.int32)
    number[component_of[1:]] = np.arange(1, count)
    number[cores > 1] = 0
    result: Labels = np.take(number, components, mode="clip")
    several = np.take(cores > 1, components, mode="clip")
    if several.any():
        cut = watershed(ridge, np.where(several, markers, 0), several)
        peak = np.zeros(count, np.uint16)
        np.maximum.at(peak, np.asarray(markers, np.int32)[peaks], ridge[peaks])
        result += merged(cut, ridge, peak, neck_max)
    return result


def _plausible(
    dark: Dark,
    pieces: Labels,
    outside_px: Float,
    regions: Labels,
    mpp: float,
    nuclear_density: float,
    limits: Limits,
) -> tuple[Mask, Float]:
    """Return which pieces are nuclei by their area and contrast, and the density of their edge."""
    # Width of the ring around a nucleus that it is compared with, um.
    ring_um = 2.5
    count = int(pieces.max()) + 1
    area, density = areas_and_means(pieces, dark.smooth, pieces != 0, count)
    ring = (outside_px > 0) & (outside_px <= ring_um / mpp) & (dark.inside == 0)
    ring_area, ring_density = areas_and_means(regions, dark.smooth, ring, count)
    contrast = density - ring_density
    evidence_um = contrast * np.sqrt(area) * mpp
    sized: Mask = (area * mpp**2 >= limits.area_min_um2) & (area * mpp**2 <= limits.area_max_um2)
    sized[0] = False
    pale_um = 0.0
    if limits.without_pale and sized.any():
        pale_um = min(_PALE_UM, _PALE_FRACTION * float(np.median(evidence_um[sized])))
    kept: Mask = contrast >= limits.edge_min * nuclear_density
    kept &= evidence_um >= max(limits.evidence_min_um * nuclear_density, pale_um)
    # Without surroundings there is nothing to compare with.
    kept = (kept | (ring_area == 0)) & sized
    if limits.solidity_min > _SOLIDITY_LEAST:
        kept[kept] = _convex(pieces, area, kept, limits.solidity_min)
    edge = np.where(ring_area > 0, ring_density + _EDGE * contrast, 0)
    return kept, np.where(kept, edge, np.inf).astype(np.float32)


def _convex(
    pieces: Labels, area: npt.NDArray[np.int64], chosen: Mask, solidity_min: float
) -> list[bool]:
    """Return whether every chosen piece has this fraction of the area of its convex hull."""
    found = []
    boxes, most = ndimage.find_objects(pieces), (area / solidity_min).tolist()
    for k in np.flatnonzero(chosen).tolist():
        rows, columns = boxes[k - 1]
        # The hull is within the box, which is small enough around two pieces of three.
        in_box = (rows.stop - rows.start) * (columns.stop - columns.start)
        found.append(in_box <= most[k] or _hull_area(pieces[rows, columns] == k) <= most[k])
    return found


def _hull_area(piece: Mask) -> float:
    """Return the area of the convex hull of a piece (H, W), px."""
    contours, _ = cv2.findContours(piece.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    hull = cv2.convexHull(np.concatenate(contours))
    # The contour joins the centres of pixels: half a pixel is added all around.
    return cv2.contourArea(hull) + cv2.arcLength(hull, True) / 2 + 1


def areas_and_means(
    labels: Labels, values: Float, where: Mask, count: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return the area, px, and the mean value of each of `count` labels within a mask."""
    at = np.flatnonzero(where)
    of = labels.ravel()[at]
    area = np.bincount(of, minlength=count)
    return area, np.bincount(of, values.ravel()[at], count) / np.maximum(area, 1)
