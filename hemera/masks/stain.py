"""The membrane engine: nuclei from haematoxylin, membranes and their strength from DAB.

Colour is separated with the stain vectors and the glass of the pair at hand, estimated from a
sample of its tiles; vectors only from three tiles with tissue or more, else they are fixed. Every
threshold is an optical density (log10 of glass over pixel, along a stain vector of length one),
every length is in um.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from skimage.measure import label
from skimage.segmentation import watershed

from hemera.config import MaskOptions
from hemera.imaging import color
from hemera.masks import label_format

HAEMATOXYLIN = (0.650, 0.704, 0.286)
DAB = (0.268, 0.570, 0.776)
"""Ruifrok and Johnston's vectors (Anal Quant Cytol Histol 23, 2001), in optical density of
red, green and blue: what holds where a slide shows no second stain to measure."""

_flood: Callable[..., npt.NDArray[np.int32]] = watershed
_alike: Callable[..., npt.NDArray[np.int64]] = label

_WORKING_MPP = 0.5
"""A tile finer than three quarters of this is worked on at this: nuclei and membranes are resolved,
um/px."""

_SMOOTHING_UM = 0.6
_SLACK = 0.05
_PEAK_WINDOW_UM = 6.0
_PEAK_SHARE = 0.35
_GAP_UM2 = 8.0
_SEPARATION_UM = 5.0
_CORE_UM = 1.0
_STEPS = 64
_EDGE_UM = 2.0
_RIM_UM = 0.5
"""Of a nucleus: shapes, not thresholds of staining, which stand in the options."""

_INNER_UM = 1.0
_SECTORS = 24
_SECTOR_SHARE = 0.125
"""Of a membrane: how far inside the edge of the nucleus it may lie, and how it is sampled."""

_COARSE_MPP = 2.0
_SURROUNDINGS_UM = 22.0
_FRINGE = 0.19
_UNMEASURED = 1.5
"""Of faint brown: the window of its surroundings, and the share of a nucleus's haematoxylin that
chromatic aberration shows as brown at its edge; how much more of it counts where DAB's colour
could not be measured."""

_PEN_DENSITY = 0.25
_PEN_DEG = 13.0
_PEN_UM = 18.0
_PEN_DARK = 0.6
_PEN_DARK_UM = 28.0
_PEN_GAP_UM = 30.0
_FOLD_DENSITY = 0.4
_FOLD_UM = 8.0
_FOLD_LENGTH_UM = 60.0
_LINE_DENSITY = 0.15
_LINE_COLOUR = 0.2
_LINE_REST = (0.10, 0.3)
_ARTEFACT_EDGE_UM = 6.0
"""Of pen: saturation (density), angle to any mixture of both stains, width, or, where it has the
hue of haematoxylin, share of the pair's dark nuclei that it keeps over a width no nucleus has (on
28 real and drawn tiles tissue keeps 0.44 over 24 um at most), and gap; of a fold: density in every
channel, width, length; of a line: density in every channel, and the share of it by which channels
may differ (on 24 real and drawn tiles such pixels of tissue hang together over 38 um at most, those
of a coverslip's edge over 190 um), and both where the rest of it hangs on; of all: how wide their
edges are."""

_CONTROL_TISSUE = 0.08
_CONTROL_NUCLEAR = 0.3
_CONTROL_UM = 6.0
_CONTROL_SHARE = 0.05
"""Of the tissue away from nuclei: summed density of tissue, share of the dark nuclei's haematoxylin
from which a nucleus is near, how near, and the share of the tissue it must be."""

_STAINED = 0.30
_FAINT = 0.15
_PALE = 0.05
_PIXELS_MIN = 500
_TILES_MIN = 3
_TILE_PIXELS_MIN = 50
_ANGLE_MAX_DEG = 15.0
_IMPURITY = 0.1
_DARK_DEFAULT = 0.35
"""Of the estimate: summed density of a stained pixel, how many it takes (of every sixteenth), on
how many tiles, and how many for a tile to count; how far it may lead."""


@dataclasses.dataclass(frozen=True)
class Nuclei:
    """Nuclei of one tile, and to which of them every pixel is nearest: all (H, W).

    `labels` numbers the nuclei from 1, 0 is none; each is one piece. `owner` is the nucleus that
    a pixel belongs to or is nearest to, 0 where that was none; `depth_px` is the distance inside
    the edge of a nucleus, negative outside of it.
    """

    labels: npt.NDArray[np.int32]
    owner: npt.NDArray[np.int32]
    depth_px: npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Stains:
    """How one pair was stained and scanned.

    `background` is bare glass (r, g, b), 0 to 255; `haematoxylin` and `dab` are unit vectors of
    optical density; `dark` is the density of haematoxylin in the pair's dark nuclei (98th
    percentile of what is stained); `unspecific` is the DAB that tissue away from nuclei takes up
    (first quartile), 0 where there is too little of it to say; `estimated` names the vectors that
    were measured.
    """

    background: tuple[int, int, int]
    haematoxylin: tuple[float, float, float] = HAEMATOXYLIN
    dab: tuple[float, float, float] = DAB
    dark: float = _DARK_DEFAULT
    estimated: tuple[str, ...] = ()
    unspecific: float = 0.0


def estimate(tiles: Sequence[npt.NDArray[np.uint8]], mpp: float) -> Stains:
    """Estimate glass and stain vectors of a pair from some of its HER2 tiles.

    Macenko et al. (ISBI 2009): the extreme directions of stained pixels in the plane of their two
    largest variances. A direction further than 15 degrees from the fixed vector of its stain is
    noise or another dye, and the fixed vector is taken: so on a slide without DAB. So it is, too,
    where fewer than three tiles hold tissue (800 stained pixels), or all of them fewer than 8000
    stained pixels: what one tile shows can be one dye, or none.

    Glass is the 99th percentile of each channel: the palest there is, and on BCI's gray fields up
    to 0.02 of density above `color.background_color`, with which stage describe measures the
    commonest gray of the whole picture. Tiles may hold no glass at all, where the commonest gray is
    stroma: with it, 45 of the 699 cells of the BCI tile 00001_test_2+ are left, and none of its 2+.

    Args:
        tiles: (H, W, 3) uint8 RGB each, of any sizes; none: white glass, fixed vectors.
        mpp: their resolution, um/px.
    """
    if not tiles:
        return Stains(color.WHITE)
    # A blur before sampling: single pixels carry the noise of sensor and JPEG.
    samples = [
        np.asarray(cv2.blur(tile, (3, 3)), np.uint8)[::4, ::4].reshape(-1, 3) for tile in tiles
    ]
    sample = np.concatenate(samples)
    red, green, blue = np.rint(np.percentile(sample, 99, axis=0)).astype(int).tolist()
    glass = (red, green, blue)
    density = color.optical_density(sample[None], glass)[0].astype(np.float64)
    total = density.sum(axis=1)
    stained = density[total > _STAINED]
    vectors = np.array([_unit(HAEMATOXYLIN), _unit(DAB)])
    estimated: list[str] = []
    of_tile = np.repeat(np.arange(len(samples)), [len(own) for own in samples])[total > _STAINED]
    holding = np.count_nonzero(np.bincount(of_tile) >= _TILE_PIXELS_MIN)
    if len(stained) >= _PIXELS_MIN and holding >= _TILES_MIN:
        for row, (name, direction) in enumerate(
            zip(("haematoxylin", "dab"), _extremes(stained), strict=True)
        ):
            direction = _purified(direction, row)
            if direction @ vectors[row] > math.cos(math.radians(_ANGLE_MAX_DEG)):
                vectors[row] = direction
                estimated.append(name)
    haematoxylin = density[total > _FAINT] @ _unmixing(vectors)[:, 0]
    haematoxylin = haematoxylin[haematoxylin > _PALE]
    enough = len(haematoxylin) >= _PIXELS_MIN
    dark = float(np.percentile(haematoxylin, 98)) if enough else _DARK_DEFAULT
    stains = Stains(glass, _triple(vectors[0]), _triple(vectors[1]), dark, tuple(estimated))
    return dataclasses.replace(stains, unspecific=_unspecific(tiles, mpp, stains))


def _unspecific(tiles: Sequence[npt.NDArray[np.uint8]], mpp: float, stains: Stains) -> float:
    """Return the DAB that tissue away from nuclei takes up: the negative control of a slide.

    Looked for at 2 um/px. Stroma, fat and skin have no membranes of tumour cells; of a solid tumour
    there is nothing away from nuclei, and nothing is said.
    """
    count, found = 0, []
    for tile in tiles:
        size = _coarse(tile.shape[0], tile.shape[1], mpp)
        small = np.asarray(cv2.resize(tile, size, interpolation=cv2.INTER_AREA), np.uint8)
        tissue = color.optical_density(small, stains.background).sum(axis=2) > _CONTROL_TISSUE
        haematoxylin, dab, _ = cv2.split(separate(small, stains))
        nuclear = (haematoxylin > _CONTROL_NUCLEAR * stains.dark).view(np.uint8)
        near = cv2.dilate(nuclear, _disc(2 * _CONTROL_UM / _COARSE_MPP)) > 0
        found.append(dab[tissue & ~near])
        count += int(np.count_nonzero(tissue))
    control = np.concatenate(found)
    if len(control) < max(_PIXELS_MIN, _CONTROL_SHARE * count):
        return 0.0
    return max(float(np.percentile(control, 25)), 0.0)


def separate(rgb: npt.NDArray[np.uint8], stains: Stains) -> npt.NDArray[np.float32]:
    """Return the densities of haematoxylin, DAB and the rest, (H, W, 3) float32.

    Densities are log10 over the pair's glass; the rest is what neither vector explains.
    """
    density = color.optical_density(rgb, stains.background)
    vectors = np.array([stains.haematoxylin, stains.dab])
    return np.asarray(cv2.transform(density, _unmixing(vectors).T), np.float32)


def artefacts(
    rgb: npt.NDArray[np.uint8], mpp: float, stains: Stains
) -> npt.NDArray[np.bool_] | None:
    """Find what is neither tissue nor glass to this engine: pen, folds, dust.

    Looked for at 2 um/px. Pen is saturated colour over an even area, of a direction that no
    mixture of both stains has, or as dark as a nucleus over more than a nucleus. A fold, or a
    particle, lets no light through in any channel over more than a nucleus: wider than 8 um and
    longer than 60 um. A line, such as the edge of a coverslip, a scratch or a hair, is of any width
    and as long, and takes all colours alike.

    Args:
        rgb: (H, W, 3) uint8.
        mpp: its resolution, um/px.
        stains: of its pair.

    Returns:
        (H, W), or None where there is no such thing, as on nearly every tile.
    """
    height, width = rgb.shape[:2]
    size = _coarse(height, width, mpp)
    density = color.optical_density(
        np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), np.uint8), stains.background
    )
    red, green, blue = cv2.split(density)
    least, most = cv2.min(cv2.min(red, green), blue), cv2.max(cv2.max(red, green), blue)
    vectors = np.array([stains.haematoxylin, stains.dab])
    haematoxylin, dab, rest = cv2.split(cv2.transform(density, _unmixing(vectors).T))
    along = cv2.max(*cv2.split(cv2.transform(density, vectors)))
    square = red * red + green * green + blue * blue
    # Between both stains what is left is the rest; outside of them, what the nearer leaves.
    left = np.where((haematoxylin >= 0) & (dab >= 0), rest * rest, square - along * along)
    saturated = most - least > _PEN_DENSITY
    pen = saturated & (left > math.sin(math.radians(_PEN_DEG)) ** 2 * square)
    found = _opened(pen, _PEN_UM)
    found |= _opened(saturated & (haematoxylin > _PEN_DARK * stains.dark), _PEN_DARK_UM)
    found |= _long(_opened(least > _FOLD_DENSITY, _FOLD_UM))
    line = _long((least > _LINE_DENSITY) & (most - least < _LINE_COLOUR * least))
    if line.any():
        weakest, colour = _LINE_REST
        gray = line | ((least > weakest) & (most - least < colour * least))
        _, parts = cv2.connectedComponents(gray.view(np.uint8))
        found |= np.isin(parts, parts[line])
    if not found.any():
        return None
    # Ink over a nucleus has the direction of neither; their edges are paler than they are.
    whole = cv2.morphologyEx(
        found.view(np.uint8), cv2.MORPH_CLOSE, _disc(_PEN_GAP_UM / _COARSE_MPP)
    )
    whole = cv2.dilate(whole, _disc(_ARTEFACT_EDGE_UM / _COARSE_MPP))
    return np.asarray(cv2.resize(whole, (width, height), interpolation=cv2.INTER_NEAREST) > 0)


def membranes(
    separated: npt.NDArray[np.float32], mpp: float, stains: Stains, options: MaskOptions
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Return the DAB class 0 to 3 of every pixel, and the class of what can be a membrane.

    Faint brown over a wide area is what skin, stroma and a poorly rinsed section take up: it
    counts as weak only where it stands out of its surroundings. Beside a dark nucleus it must
    also exceed the coloured fringe that a lens leaves there. What is moderate or strong is
    neither. Weak takes `options.dab_control` times what the slide's tissue away from nuclei takes
    up, and half as much again where the colour of DAB could not be measured: a counterstain of
    another hue than the fixed vector's passes for faint brown.

    Args:
        separated: (H, W, 3) densities, see `separate`.
        mpp: their resolution, um/px.
        stains: they were separated with.
        options: classes.

    Returns:
        Two images (H, W) of 0 to 3.
    """
    haematoxylin, dab = (np.ascontiguousarray(separated[..., k]) for k in (0, 1))
    smooth = _smoothed(dab, mpp, _SMOOTHING_UM)
    weak = options.dab_weak
    if "dab" not in stains.estimated:
        weak *= _UNMEASURED
    weak = min(max(weak, options.dab_control * stains.unspecific), options.dab_moderate)
    classes = (smooth >= np.float32(weak)).view(np.uint8)
    for level in (options.dab_moderate, options.dab_strong):
        classes += (smooth >= np.float32(level)).view(np.uint8)
    height, width = dab.shape
    size = _coarse(height, width, mpp)
    around = cv2.resize(dab, size, interpolation=cv2.INTER_AREA)
    window = _odd(_SURROUNDINGS_UM / _COARSE_MPP)
    around = cv2.blur(around, (window, window), borderType=cv2.BORDER_REFLECT)
    least = np.asarray(
        cv2.resize(around, (width, height), interpolation=cv2.INTER_LINEAR), np.float32
    )
    least *= options.dab_contrast
    window = _odd(_PEAK_WINDOW_UM / mpp)
    dark = _smoothed(haematoxylin, mpp, _SMOOTHING_UM)
    fringe = cv2.dilate(dark, np.ones((window, window), np.uint8))
    np.maximum(least, np.multiply(fringe, _FRINGE, out=fringe), out=least)
    standing = classes.copy()
    standing[(classes == 1) & (smooth < least)] = 0
    return classes, standing


def nuclei(
    haematoxylin: npt.NDArray[np.float32],
    mpp: float,
    dark: float,
    options: MaskOptions,
    left_out: npt.NDArray[np.bool_] | None = None,
) -> Nuclei:
    """Find the nuclei of a density of haematoxylin (H, W), none of them where it is left out.

    A pixel of a nucleus is darker than `options.nucleus_density_min`, than a share of the pair's
    `dark` nuclei, than the mean of its surroundings, and not much paler than the darkest near it:
    so a nucleus in blue stroma is not lost in it. Touching nuclei are cut by watershed on the
    distance from their edge. A piece without an edge, no darker than what lies around it, is
    haze and no nucleus.
    """
    smooth = _smoothed(haematoxylin, mpp, _SMOOTHING_UM)
    # A little below the mean: in dense tissue the mean itself is that of nuclei.
    window = _odd(options.nucleus_window_um / mpp)
    least: npt.NDArray[np.float32] = np.asarray(
        cv2.boxFilter(smooth, -1, (window, window), borderType=cv2.BORDER_REFLECT), np.float32
    )
    least -= _SLACK * dark
    np.maximum(least, max(options.nucleus_density_min, options.nucleus_contrast * dark), out=least)
    window = _odd(_PEAK_WINDOW_UM / mpp)
    peak = cv2.dilate(smooth, np.ones((window, window), np.uint8))
    np.maximum(least, np.multiply(peak, _PEAK_SHARE, out=peak), out=least)
    inside = (smooth > least).view(np.uint8)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3))
    inside = np.asarray(cv2.morphologyEx(inside, cv2.MORPH_OPEN, disc), np.uint8)
    _fill_gaps(inside, _GAP_UM2 / mpp**2)
    if left_out is not None:
        inside[left_out] = 0

    # In whole steps: OpenCV's distances may differ in their last bit from call to call, which
    # would decide between equal peaks; its blur of integers is exact.
    distance = cv2.distanceTransform(inside, cv2.DIST_L2, 5)
    # Without any background there is nothing to measure to, and the distance has no bound.
    steps = np.rint(np.minimum(distance, 65535 / _STEPS) * _STEPS).astype(np.uint16)
    pieces = _cut(inside, steps, mpp)
    count = int(pieces.max()) + 1
    outside_px, owner = _nearest(pieces)
    at = np.flatnonzero(pieces != 0)
    of = pieces.ravel()[at]
    area = np.bincount(of, minlength=count)
    density = np.bincount(of, smooth.ravel()[at], count) / np.maximum(area, 1)
    ring = np.flatnonzero((outside_px <= _EDGE_UM / mpp) & (inside == 0))
    of = owner.ravel()[ring]
    ring_area = np.bincount(of, minlength=count)
    ring_density = np.bincount(of, smooth.ravel()[ring], count) / np.maximum(ring_area, 1)
    kept = (density - ring_density >= options.nucleus_edge * dark) | (ring_area == 0)
    kept &= area * mpp**2 >= options.nucleus_area_min_um2
    kept &= area * mpp**2 <= options.nucleus_area_max_um2
    kept[0] = False
    numbers = np.where(kept, np.cumsum(kept), 0).astype(np.int32)
    owner = np.take(numbers, owner, mode="clip")
    # Smoothing and opening took the rim.
    depth_px = np.where(pieces != 0, steps / np.float32(_STEPS), -outside_px)
    depth_px += np.float32(_RIM_UM / mpp)
    if left_out is not None:
        depth_px[left_out] = -np.inf
    labels = np.where(depth_px >= 0, owner, 0)
    stray = _stray(labels, int(kept.sum()))
    if stray is not None:
        labels[stray] = owner[stray] = 0
    return Nuclei(labels, owner, depth_px)


def _stray(labels: npt.NDArray[np.int32], regions: int) -> npt.NDArray[np.bool_] | None:
    """Return what of numbered regions (H, W) is apart from their largest piece; None: nothing.

    A cut at half the resolution reaches over gaps of a pixel.
    """
    pieces = _alike(labels, background=0, connectivity=2)
    count = int(pieces.max(initial=0)) + 1
    if count - 1 == regions:
        return None
    area = np.bincount(pieces.ravel(), minlength=count)
    number = np.zeros(count, np.int64)
    number[pieces.ravel()] = labels.ravel()
    # By number, the largest last: what comes later overwrites.
    order = np.argsort(area, kind="stable")
    largest = np.zeros(int(number.max()) + 1, np.int64)
    largest[number[order]] = order
    return np.asarray(largest[labels] != pieces)


def _cut(
    inside: npt.NDArray[np.uint8], steps: npt.NDArray[np.uint16], mpp: float
) -> npt.NDArray[np.int32]:
    """Cut what is inside nuclei (H, W) into pieces, numbered from 1; one without a core is none.

    Args:
        inside: 1 in nuclei.
        steps: distance to their edge, in steps of 1/64 px.
        mpp: resolution, um/px.
    """
    blur_px = max(_SMOOTHING_UM / mpp, 0.5)
    ridge = np.asarray(cv2.GaussianBlur(steps, (0, 0), blur_px), np.uint16)
    reach = _odd(_SEPARATION_UM / mpp)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (reach, reach))
    peaks = (ridge >= cv2.dilate(ridge, disc)) & (steps > _STEPS * max(_CORE_UM / mpp, 1.0) + 0.5)
    found, markers = cv2.connectedComponents(peaks.view(np.uint8))
    pieces, components = cv2.connectedComponents(inside)
    whole = np.asarray(components, np.int32)
    at = np.flatnonzero(peaks)
    piece_of = np.zeros(found, np.int64)
    piece_of[markers.ravel()[at]] = whole.ravel()[at]
    cores = np.bincount(piece_of[1:], minlength=pieces)
    number = np.zeros(pieces, np.int32)
    number[piece_of[1:]] = np.arange(1, found)
    number[cores > 1] = 0
    result = number[whole]
    several = (cores > 1)[whole]
    if several.any():
        result += _flooded(ridge, np.where(several, markers, 0), several)
    return result


def _flooded(
    ridge: npt.NDArray[np.uint16], markers: npt.NDArray[np.int32], inside: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int32]:
    """Return the watershed of `ridge` from `markers` within `inside`, all (H, W).

    At half the resolution, which moves a cut by a pixel at most and takes a fourth of the time.
    """
    height, width = inside.shape
    found = _flood(-_halved(ridge).astype(np.int32), _halved(markers), mask=_halved(inside))
    whole = np.repeat(np.repeat(found, 2, axis=0), 2, axis=1)[:height, :width]
    return np.where(inside, whole, 0)


def _halved(image: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an image at half the resolution: of four pixels the largest, outside is 0."""
    height, width = image.shape
    if height % 2 or width % 2:
        image = np.pad(image, ((0, height % 2), (0, width % 2)))
    # Rows first: they lie side by side in memory.
    rows = np.maximum(image[::2], image[1::2])
    return np.asarray(np.maximum(rows[:, ::2], rows[:, 1::2]))


def territories(labels: npt.NDArray[np.int32]) -> Nuclei:
    """Return nuclei (H, W), numbered from 1 without gaps, with what lies nearest to each."""
    if not labels.any():
        return Nuclei(labels, labels, np.full(labels.shape, -np.inf, np.float32))
    outside_px, owner = _nearest(labels)
    inside = (labels > 0).view(np.uint8)
    distance = cv2.distanceTransform(inside, cv2.DIST_L2, 5)
    depth_px = np.rint(distance * _STEPS).astype(np.float32) / np.float32(_STEPS)
    return Nuclei(labels, owner, depth_px - outside_px)


def measure(
    nuclei: Nuclei,
    dab_classes: npt.NDArray[np.uint8],
    mpp: float,
    options: MaskOptions,
) -> tuple[npt.NDArray[np.int32], label_format.Cells]:
    """Measure the membrane around every nucleus.

    The ring, from just inside the edge of a nucleus outwards, is cut into 24 sectors seen
    from its centroid. A sector is stained at a class when an eighth of its pixels reach it: a
    membrane is half a um thick, and a single speck is none. `completeness` is the share of sectors
    stained at all; `intensity` is the strongest class that covers `options.completeness_min` of
    the ring; a cell is positive when that is at least `options.positive_intensity_min`. So pigment
    on one side makes no cell positive.

    Args:
        nuclei: see `nuclei` and `territories`.
        dab_classes: (H, W) of 0 to 3, see `membranes`.
        mpp: resolution of both, um/px.
        options: ring, completeness and classes.

    Returns:
        The cells, (H, W): every nucleus with its ring, and their table.
    """
    labels, owner, depth_px = nuclei.labels, nuclei.owner, nuclei.depth_px
    count = int(labels.max(initial=0))
    if not count:
        return labels, label_format.blank((0, 0)).cells
    width = labels.shape[1]
    grown: npt.NDArray[np.int32] = np.where(depth_px >= -options.ring_um / mpp, owner, 0)
    at = np.flatnonzero(labels != 0)
    y, x = np.divmod(at, width)
    of = labels.ravel()[at]
    area = np.bincount(of, minlength=count + 1)
    held = np.maximum(area, 1)
    centre_x = np.bincount(of, x, count + 1) / held
    centre_y = np.bincount(of, y, count + 1) / held

    at = np.flatnonzero((grown > 0) & (depth_px <= _INNER_UM / mpp))
    of = grown.ravel()[at]
    y, x = np.divmod(at, width)
    east = (x - centre_x[of]).astype(np.float32)
    south = (y - centre_y[of]).astype(np.float32)
    # A tile that is one nucleus has no ring, and OpenCV no answer to nothing.
    turn = cv2.phase(east, south).ravel() if len(at) else east
    sector = np.minimum((turn * np.float32(_SECTORS / (2 * np.pi))).astype(np.int64), _SECTORS - 1)
    key = (of * np.int64(_SECTORS) + sector) * 4 + dab_classes.ravel()[at]
    shape = (count + 1, _SECTORS, 4)
    pixels_of = np.bincount(key, minlength=math.prod(shape)).reshape(shape)
    # From the strongest class down: what reaches a class reaches those below it.
    reached = np.cumsum(pixels_of[..., ::-1], axis=-1)[..., ::-1]
    total = reached[..., :1]
    stained = (reached[..., 1:] >= _SECTOR_SHARE * total) & (reached[..., 1:] > 0)
    share = stained.sum(axis=1) / np.maximum((total > 0).sum(axis=1), 1)
    # A cell whose every class is reached has all three: the classes are counted.
    intensity = (share >= options.completeness_min).sum(axis=1).astype(np.uint8)
    return grown, label_format.Cells(
        (centre_x[1:] + 0.5).astype(np.float32),
        (centre_y[1:] + 0.5).astype(np.float32),
        area[1:].astype(np.int32),
        intensity[1:] >= options.positive_intensity_min,
        intensity[1:],
        share[1:, 0].astype(np.float32),
    )


def segment(
    rgb: npt.NDArray[np.uint8], mpp: float, stains: Stains, options: MaskOptions
) -> label_format.Labelled:
    """Label one HER2 tile.

    A tile finer than 0.375 um/px is worked on at 0.5 um/px, where nuclei and membranes are still
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
    left_out = artefacts(work, work_mpp, stains)
    if left_out is not None:
        separated[left_out] = 0
    haematoxylin = np.ascontiguousarray(separated[..., 0])
    found = nuclei(haematoxylin, work_mpp, stains.dark, options, left_out)
    dab, membrane = membranes(separated, work_mpp, stains, options)
    grown, cells = measure(found, membrane, work_mpp, options)
    labels = found.labels
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
    return label_format.Labelled(
        label_format.pack(classes(grown, cells.positive), labels > 0, dab),
        cells,
        excluded_fraction=0.0 if left_out is None else float(left_out.mean()),
    )


def classes(cells: npt.NDArray[np.int32], positive: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """Return the class image (H, W) of numbered cells: sign inside, boundary around."""
    sign = np.concatenate(
        [
            [label_format.BACKGROUND],
            np.where(positive, label_format.POSITIVE, label_format.NEGATIVE),
        ]
    )
    image = sign.astype(np.uint8)[cells]
    image[label_format.boundaries(cells)] = label_format.BOUNDARY
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


def _purified(direction: npt.NDArray[np.float64], row: int) -> npt.NDArray[np.float64]:
    """Take from a direction what it has of the other stain: between both, it is a mixture.

    Args:
        direction: unit vector.
        row: 0 when it is to be haematoxylin, 1 for DAB.
    """
    fixed = np.array([_unit(HAEMATOXYLIN), _unit(DAB)])
    shares = direction @ _unmixing(fixed)
    return _unit(direction - max(shares[1 - row] - _IMPURITY, 0.0) * fixed[1 - row])


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


def _coarse(height: int, width: int, mpp: float) -> tuple[int, int]:
    """Return (columns, rows) of an image at `_COARSE_MPP`; a coarser one stays as it is."""
    scale = min(mpp / _COARSE_MPP, 1.0)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _opened(mask: npt.NDArray[np.bool_], width_um: float) -> npt.NDArray[np.bool_]:
    """Return what of a mask at `_COARSE_MPP` is at least so wide."""
    if not mask.any():
        return mask
    disc = _disc(width_um / _COARSE_MPP)
    return np.asarray(cv2.morphologyEx(mask.view(np.uint8), cv2.MORPH_OPEN, disc) > 0)


def _long(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return the pieces of a mask at `_COARSE_MPP` that are as long as a fold."""
    if not mask.any():
        return mask
    _, pieces, boxes, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8))
    length = np.hypot(boxes[:, cv2.CC_STAT_WIDTH], boxes[:, cv2.CC_STAT_HEIGHT])
    kept = length * _COARSE_MPP > _FOLD_LENGTH_UM
    kept[0] = False
    return np.asarray(kept[pieces])


def _disc(diameter_px: float) -> npt.NDArray[np.uint8]:
    side = _odd(diameter_px)
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)), np.uint8)


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
    if not place.any():
        return np.full(labels.shape, np.inf, np.float32), labels
    at = np.flatnonzero(labels != 0)
    owner = np.zeros(int(place.max()) + 1, np.int32)
    owner[place.ravel()[at]] = labels.ravel()[at]
    steps = np.rint(np.multiply(distance, _STEPS, out=distance))
    nearest = np.take(owner, np.asarray(place), mode="clip")
    return np.asarray(steps / np.float32(_STEPS), np.float32), nearest


def _fill_gaps(inside: npt.NDArray[np.uint8], area_px: float) -> None:
    """Fill holes up to an area, in place: the pale middle of a vesicular nucleus."""
    _, gaps = cv2.connectedComponents(1 - inside, connectivity=4)
    small = np.bincount(gaps.ravel()) <= area_px
    small[0] = False
    np.bitwise_or(inside, np.take(small.view(np.uint8), np.asarray(gaps), mode="clip"), out=inside)
