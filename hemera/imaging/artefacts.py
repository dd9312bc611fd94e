"""Artefacts of a slide or a tile: pen, folds, edges of bubbles and of the coverslip, dust.

All are searched for at `COARSE_MPP`, or at the resolution of a coarser image. A density is an
optical density: log10 of background over pixel.
"""

import math

import cv2
import numpy as np
import numpy.typing as npt

from hemera.imaging import color
from hemera.imaging.folds import STEP_MPP, find_folds
from hemera.imaging.morphology import COARSE_MPP, coarse, disc, odd_px

KINDS = ("pen", "fold", "edge", "dust", "other", "blur")
"""Kinds of artefacts; the first is number 1. `find_artefacts` distinguishes the first four, the
last two occur in files that the sheet names."""

Mask = npt.NDArray[np.bool_]
Float = npt.NDArray[np.float32]

# Smallest saturation of ink beside its direction: densest minus least dense channel, density.
_INK_SATURATION = 0.25
# Pen. It absorbs red light more than green by this factor and this density, which haematoxylin
# never does (0.9 to 1.25)...
_CYAN_RATIO = 1.5
_CYAN_DENSITY = 0.15
_CYAN_EDGE_DENSITY = 0.05
# ... or red light so much, over more than nuclei, without the blue absorption of DAB...
_DARK_RED = 0.6
_WIDE_RED = 0.4
_WIDE_UM = 28.0
_BROWN_RATIO = 1.4
# ... or green and blue, and hardly any red; eosin hardly absorbs blue, DAB absorbs red.
_RED_DENSITY = 0.3
_RED_TO_GREEN = 0.4
_BLUE_TO_GREEN = 0.65
# Smallest width and length of a stroke, um.
_PEN_WIDTH_UM = 6.0
_PEN_LENGTH_UM = 80.0
# Paler ink, also of the colour of nuclei, has no gaps in straight pieces, as rows of nuclei have:
# their length, um; the density at every place of ink as of nuclei and of red nearer to eosin, of
# crimson, and the excess of red over green of cyan; the ratios of the last and of red; the fraction
# of the density by which both sides are lighter, somewhere within this distance, um, because dense
# tissue is wider; number of directions; coarsest resolution, um/px.
_BAR_UM = 64.0
_BAR_DENSITY = 0.28
_BAR_CRIMSON = 0.08
_BAR_CYAN = 0.04
_BAR_CYAN_RATIO = 1.3
_BAR_RED_TO_GREEN = 0.45
_BAR_BLUE_TO_GREEN = 0.55
_BAR_STEP = 0.4
_BAR_BESIDE_UM = 40.0
_BAR_ANGLES = 24
_BAR_MPP = 3.0
# The shadow beside a black line, such as the edge of a coverslip: its width, um; smallest density;
# largest difference of the channels, a fraction of the densest.
_SHADOW_UM = 60.0
_SHADOW_DENSITY = 0.08
_SHADOW_GRAY = 0.2
# On an overview, a fold is denser than the denser quarter of the tissue of its slide by this
# factor, and has this density; several layers are dark in every channel. DAB is brown, ink and
# dust are colourless.
_FOLD_LAYERS = 1.7
_FOLD_DENSITY = 0.5
_FOLD_LOW = 0.35
_FOLD_COLOR = 1.1
_FOLD_WIDTH_UM = 8.0
_FOLD_LENGTH_UM = 60.0
# Colourless: the channels differ by at most this fraction of the densest.
_GRAY = 0.35
# The edge of a bubble, of the coverslip, a hair or a scratch is a line that is darker than both its
# sides by this density in every channel; its largest width and smallest length, um.
_EDGE_DENSITY = 0.12
_EDGE_GRAY = 0.27
_EDGE_END_DENSITY = 0.06
_EDGE_END_UM = 60.0
_EDGE_END_MPP = 3.0
_EDGE_BENDS = 3.0
_EDGE_WIDTH_UM = 16.0
_EDGE_LENGTH_UM = 80.0
# The same on a coarse image, where a duct or a tubule is a line too.
_EDGE_LENGTH_COARSE_UM = 300.0
# Dust is dark and colourless, and wider than a nucleus, um.
_DUST_DENSITY = 0.5
_DUST_WIDTH_UM = 16.0
# The rim of a bubble is an arc: largest radius, um; largest standard deviation of the distance from
# its centre, um and as a fraction of the radius; smallest part of the circle, counted in sectors.
_BUBBLE_UM = 300.0
_RIM_UM = 4.0
_RIM_FRACTION = 0.15
_ARC_FRACTION = 0.4
_SECTORS = 36
# A rim shorter or paler than an edge: smallest density; largest gaps and smallest diagonal of
# its bounding box, um; smallest part of the circle, because half of a duct with DAB can be grey.
_RIM_DENSITY = 0.08
_RIM_GAP_UM = 4.0
_RIM_LENGTH_UM = 40.0
_WHOLE_FRACTION = 0.75
# Density of tissue, mean of the channels.
_TISSUE_DENSITY = 0.05
# A small colourless particle without tissue around it is dust or a bubble: largest extent, um;
# smallest density of its darkest pixel; largest difference of its channels, a fraction of the
# densest; largest fraction of a window of this side, um, that has the density of tissue beside it.
_PARTICLE_UM = 40.0
_PARTICLE_DENSITY = 0.1
_PARTICLE_GRAY = 0.3
_EMPTY_FRACTION = 0.02
_EMPTY_UM = 100.0
# Smallest length of a stroke, a fold or a line on a coarse image, px.
_LENGTH_PX = 20
# Gaps in an artefact that are filled, and the width of its pale edge, um.
_GAP_UM = 20.0
_MARGIN_UM = 4.0


def find_artefacts(
    rgb: npt.NDArray[np.uint8],
    mpp: float,
    background: color.Color,
    tissue_density: float = math.inf,
) -> npt.NDArray[np.uint8] | None:
    """Return what is neither tissue nor background on an image stained with H&E or with H-DAB.

    Args:
        rgb: (H, W, 3) uint8.
        mpp: its resolution, um/px.
        background: its colour (r, g, b), 0 to 255.
        tissue_density: `typical_density` of the slide, to which folds are compared.

    Returns:
        (h, w) uint8 at `COARSE_MPP`, or at `mpp` if that is coarser: 0, or 1 and the place of the
        artefact in `KINDS`. None without artefacts, as for nearly every tile.
    """
    density = color.optical_density(coarse(rgb, mpp), background)
    at = max(mpp, COARSE_MPP)
    channels = cv2.split(density)
    red, green, blue = (np.asarray(channel, np.float32) for channel in channels)
    low = np.minimum(np.minimum(red, green), blue)
    high = np.maximum(np.maximum(red, green), blue)
    gray = high - low < _GRAY * high
    dark_gray = (low > _FOLD_LOW) & gray
    masks = [
        _pen(red, green, blue, dark_gray, at),
        find_folds(density, at, tissue_density)
        if at <= STEP_MPP
        else _dark_folds(red, green, blue, gray, tissue_density, at),
        _edges(density, at),
        _opened((low > _DUST_DENSITY) & gray, _DUST_WIDTH_UM, at),
    ]
    masks[-1] |= _particles(density, masks[0] | masks[2], at)
    # The dark core alone too: shadow and nuclei that touch the rim are not on the circle.
    rings = _rings((masks[0] | masks[2]) & gray, at) | _rings(dark_gray & masks[0], at)
    if rings.any():
        masks[0] &= ~_connected(masks[0], rings & masks[0])
        masks[1] &= ~_connected(masks[1], rings & masks[1])
        masks[2] |= rings
    if not any(mask.any() for mask in masks):
        return None
    kinds = np.zeros(low.shape, np.uint8)
    # The first of the kinds takes precedence.
    for number, mask in reversed(list(enumerate(masks, 1))):
        if mask.any():
            whole = cv2.morphologyEx(mask.view(np.uint8), cv2.MORPH_CLOSE, disc(_GAP_UM, at))
            kinds[cv2.dilate(whole, disc(2 * _MARGIN_UM, at)) > 0] = number
    return kinds


def ink_pixels(
    density: npt.NDArray[np.float32], vectors: npt.NDArray[np.float64], angle_deg: float
) -> Mask:
    """Return the pixels (H, W) of saturated colour that no mixture of two stains has.

    Args:
        density: (H, W, 3) optical densities.
        vectors: (2, 3) unit vectors of the stains.
        angle_deg: smallest angle between a colour and the mixtures, degrees.
    """
    first, second, residual = cv2.split(cv2.transform(density, color.unmixing_matrix(vectors).T))
    nearest = cv2.max(*cv2.split(cv2.transform(density, vectors)))
    red, green, blue = cv2.split(density)
    square = red * red + green * green + blue * blue
    # Squared distance from the mixtures of both stains; outside of them, from the nearer stain.
    distance = np.where((first >= 0) & (second >= 0), residual * residual, square - nearest**2)
    spread = cv2.max(cv2.max(red, green), blue) - cv2.min(cv2.min(red, green), blue)
    far = distance > math.sin(math.radians(angle_deg)) ** 2 * square
    return np.asarray(far & (spread > _INK_SATURATION), np.bool_)


def artefact_pixels(
    rgb: npt.NDArray[np.uint8],
    mpp: float,
    background: color.Color,
    tissue_density: float = math.inf,
) -> Mask | None:
    """Return where `find_artefacts` finds any on an image, (H, W), None where nowhere."""
    kinds = find_artefacts(rgb, mpp, background, tissue_density)
    return None if kinds is None else resized(kinds, rgb.shape[:2]) > 0


def resized(kinds: npt.NDArray[np.uint8], shape: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Return an image of `find_artefacts` at the size (H, W) of its tile."""
    return np.asarray(
        cv2.resize(kinds, shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT), np.uint8
    )


def fractions(kinds: npt.NDArray[np.uint8] | None) -> dict[str, float]:
    """Return the fraction of an image that each of `KINDS` covers."""
    if kinds is None:
        return dict.fromkeys(KINDS, 0.0)
    counts = np.bincount(kinds.ravel(), minlength=len(KINDS) + 1)[1:] / kinds.size
    return dict(zip(KINDS, counts.tolist(), strict=True))


def _pen(red: Float, green: Float, blue: Float, dark_gray: Mask, mpp: float) -> Mask:
    """Return strokes of ink: colours that neither stain has, over a long connected region."""
    cyan = red > _CYAN_RATIO * green
    pale, cyan = (cyan & (red - green > limit) for limit in (_CYAN_EDGE_DENSITY, _CYAN_DENSITY))
    blue_black = np.maximum(green, blue) < _BROWN_RATIO * red
    dark = (red > _DARK_RED) & blue_black
    reddish = (red < _RED_TO_GREEN * green) & (blue > _BLUE_TO_GREEN * green)
    pinkish = (red < _BAR_RED_TO_GREEN * green) & (blue > _BAR_BLUE_TO_GREEN * green)
    crimson = reddish & (np.minimum(green, blue) > _RED_DENSITY)
    found = _opened((red > _WIDE_RED) & blue_black, _WIDE_UM, mpp)
    for ink in (cyan, dark, crimson, dark_gray):
        found |= _long(_opened(ink, _PEN_WIDTH_UM, mpp), _PEN_LENGTH_UM, mpp)
    found |= _connected(pale, found)
    for density, least in (
        (np.where(blue_black, red, 0), _BAR_DENSITY),
        (np.where(reddish, np.minimum(green, blue), 0), _BAR_CRIMSON),
        (np.where(pinkish, np.minimum(green, blue), 0), _BAR_DENSITY),
        (np.where(red > _BAR_CYAN_RATIO * green, red - green, 0), _BAR_CYAN),
    ):
        found |= _bars(density, least, mpp)
    shadow = _long(_opened(dark_gray, _PEN_WIDTH_UM, mpp), _PEN_LENGTH_UM, mpp)
    if not shadow.any():
        return found
    low, high = np.minimum(np.minimum(red, green), blue), np.maximum(np.maximum(red, green), blue)
    near = cv2.dilate(shadow.view(np.uint8), disc(2 * _SHADOW_UM, mpp)) > 0
    around = (low > _SHADOW_DENSITY) & (high - low < _SHADOW_GRAY * high) & near
    return found | _connected(around, shadow & around)


def _bars(density: Float, least: float, mpp: float) -> Mask:
    """Return straight pieces of a stroke with a density at every place, (H, W), lighter beside.

    They are `_PEN_WIDTH_UM` wide and `_BAR_UM` long. None where the resolution is coarser than
    `_BAR_MPP`, at which the gaps between nuclei disappear.
    """
    found = np.zeros(density.shape, np.bool_)
    wide = _opened(density > least, _PEN_WIDTH_UM, mpp)
    # In front of the search, for speed: few tiles have such regions.
    if mpp > _BAR_MPP or not _long(wide, _BAR_UM, mpp).any():
        return found
    height, width = density.shape
    centre = width / 2 - 0.5, height / 2 - 0.5
    beside = round(_BAR_BESIDE_UM / mpp)
    canvas = math.ceil(math.hypot(height, width)) + 2 * beside
    long, thick = odd_px(_BAR_UM, mpp), odd_px(_PEN_WIDTH_UM, mpp)
    bar, strip = np.ones((thick, long), np.uint8), np.ones((beside, 1), np.uint8)
    for k in range(_BAR_ANGLES):
        matrix = cv2.getRotationMatrix2D(centre, 180 * k / _BAR_ANGLES, 1)
        matrix[:, 2] += (canvas - width) / 2, (canvas - height) / 2
        turned = cv2.warpAffine(density, matrix, (canvas, canvas), borderValue=-1)
        thinnest = cv2.erode(turned, bar)
        if thinnest.max() <= least:
            continue
        # What is not on the image is not lighter.
        along = cv2.blur(np.where(turned < 0, 1, turned), (long, 1))
        above, below = (cv2.erode(along, strip, anchor=(0, end)) for end in (0, beside - 1))
        lighter = np.maximum(above, below) < thinnest - _BAR_STEP * least
        bars = cv2.dilate(((thinnest > least) & lighter).astype(np.uint8), bar)
        back = cv2.WARP_INVERSE_MAP | cv2.INTER_NEAREST
        found |= cv2.warpAffine(bars, matrix, (width, height), flags=back) > 0
    return _long(found, _PEN_LENGTH_UM, mpp)


def _dark_folds(
    red: Float, green: Float, blue: Float, gray: Mask, tissue_density: float, mpp: float
) -> Mask:
    """Return the folds of an overview: long regions much denser than its tissue, or very dark."""
    low, high = np.minimum(np.minimum(red, green), blue), np.maximum(np.maximum(red, green), blue)
    layers = cv2.blur((red + green + blue) / 3, (3, 3)) > max(
        _FOLD_DENSITY, _FOLD_LAYERS * tissue_density
    )
    layers &= blue < _BROWN_RATIO * red
    layers |= (low > _FOLD_LOW) & (high - low < _FOLD_COLOR * low)
    return _long(_opened(layers & ~gray, _FOLD_WIDTH_UM, mpp), _FOLD_LENGTH_UM, mpp)


def _edges(density: Float, mpp: float) -> Mask:
    """Return thin, long lines that are darker than both of their sides in every channel alike."""
    wide = disc(max(_EDGE_WIDTH_UM, 4 * mpp), mpp)
    excess = np.asarray(cv2.morphologyEx(density, cv2.MORPH_TOPHAT, wide), np.float32)
    low, high = excess.min(axis=2), excess.max(axis=2)
    gray = high - low < _EDGE_GRAY * high
    dark = (low > _EDGE_DENSITY) & gray
    if mpp > _EDGE_END_MPP:
        # Pale tissue would be connected to it.
        return _thin(_long(dark, _EDGE_LENGTH_COARSE_UM, mpp))
    rings = _rims((low > _RIM_DENSITY) & gray, mpp)
    line = _thin(_long(dark, _EDGE_LENGTH_UM, mpp)) | rings
    if not line.any():
        return line
    near = cv2.dilate(line.view(np.uint8), disc(_EDGE_END_UM, mpp)) > 0
    return _connected((low > _EDGE_END_DENSITY) & gray & near, line)


def _rims(mask: Mask, mpp: float) -> Mask:
    """Return the pieces of a mask, across small gaps, that are the rims of bubbles."""
    whole = cv2.morphologyEx(mask.view(np.uint8), cv2.MORPH_CLOSE, disc(_RIM_GAP_UM, mpp)) > 0
    return _rings(_long(whole, _RIM_LENGTH_UM, mpp), mpp, _WHOLE_FRACTION)


def _rings(mask: Mask, mpp: float, arc_fraction: float = _ARC_FRACTION) -> Mask:
    """Return the pieces of a mask that are arcs of a circle, as the rim of a bubble is."""
    found = np.zeros(mask.shape, np.bool_)
    if not mask.any():
        return found
    count, pieces = cv2.connectedComponents(mask.view(np.uint8))
    for k in range(1, count):
        y, x = (part.astype(float) for part in np.nonzero(pieces == k))
        # The circle of least squares (Kasa 1976).
        given = np.column_stack([x, y, np.ones(len(x))])
        (a, b, _), _, rank, _ = np.linalg.lstsq(given, x * x + y * y, rcond=None)
        if rank < 3:
            continue
        down, right = y - b / 2, x - a / 2
        distance = np.hypot(down, right)
        radius = distance.mean()
        turn = np.arctan2(down, right)
        covered = np.bincount(((turn / (2 * np.pi) + 0.5) * _SECTORS).astype(int) % _SECTORS) > 0
        if (
            radius * mpp <= _BUBBLE_UM
            and distance.std() <= min(_RIM_FRACTION * radius, _RIM_UM / mpp)
            and covered.sum() >= arc_fraction * _SECTORS
        ):
            found |= pieces == k
    return found


def _particles(density: Float, artefacts: Mask, mpp: float) -> Mask:
    """Return small colourless objects on empty background, where no nucleus can be."""
    mean = density.mean(axis=2)
    dense = (mean > _TISSUE_DENSITY) & ~artefacts
    side = odd_px(_EMPTY_UM, mpp)
    around = cv2.blur(dense.astype(np.float32), (side, side), borderType=cv2.BORDER_REFLECT)
    found = np.zeros(dense.shape, np.bool_)
    # In front of the search for pieces, for speed: nearly all tiles are full of tissue.
    alone = _EMPTY_FRACTION + (_PARTICLE_UM / _EMPTY_UM) ** 2
    if not (dense & (mean > _PARTICLE_DENSITY) & (around < alone)).any():
        return found
    _, pieces, boxes, _ = cv2.connectedComponentsWithStats(dense.view(np.uint8))
    extent = np.hypot(boxes[:, cv2.CC_STAT_WIDTH], boxes[:, cv2.CC_STAT_HEIGHT]) * mpp
    for k in np.flatnonzero(extent[1:] <= _PARTICLE_UM) + 1:
        left, top, width, height, area = boxes[k]
        box = np.s_[top : top + height, left : left + width]
        inside = pieces[box] == k
        darkest = mean[box][inside].max()
        color_of = density[box][inside & (mean[box] > darkest / 2)].mean(axis=0)
        beside = around[box][inside].mean() - area / side**2
        found[box] |= (
            inside
            & (darkest > _PARTICLE_DENSITY)
            & (color_of.max() - color_of.min() < _PARTICLE_GRAY * color_of.max())
            & (beside < _EMPTY_FRACTION)
        )
    return found


def _thin(mask: Mask) -> Mask:
    """Return the pieces of a mask that are single lines or rings, not a network of lines.

    The mean distance from the edge is a quarter of the width of a line; its length is its area over
    its width, and not many times its extent.
    """
    if not mask.any():
        return mask
    count, pieces, boxes, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8))
    # Pixels at the edge are half a pixel inside.
    distance = cv2.distanceTransform(mask.view(np.uint8), cv2.DIST_L2, 5) - 0.5
    area = boxes[:, cv2.CC_STAT_AREA]
    width = np.maximum(4 * np.bincount(pieces.ravel(), distance.ravel(), count) / area, 1)
    extent = np.hypot(boxes[:, cv2.CC_STAT_WIDTH], boxes[:, cv2.CC_STAT_HEIGHT])
    kept = area <= _EDGE_BENDS * extent * width
    kept[0] = False
    return np.asarray(kept[pieces])


def _connected(mask: Mask, to: Mask) -> Mask:
    """Return the pieces of a mask that contain a pixel of another."""
    if not to.any():
        return to
    _, pieces = cv2.connectedComponents(mask.view(np.uint8))
    kept = np.zeros(int(pieces.max()) + 1, np.bool_)
    kept[pieces[to]] = True
    kept[0] = False
    return np.asarray(kept[pieces])


def typical_density(rgb: npt.NDArray[np.uint8], background: color.Color) -> float:
    """Return the 75th percentile of the density of the tissue of an image, the mean of channels.

    Infinite without tissue.
    """
    density = color.optical_density(rgb, background).mean(axis=2)
    tissue = density[density > _TISSUE_DENSITY]
    return float(np.percentile(tissue, 75)) if len(tissue) else math.inf


def _opened(mask: Mask, width_um: float, mpp: float) -> Mask:
    """Return the regions of a mask that are at least this wide."""
    if not mask.any():
        return mask
    return np.asarray(
        cv2.morphologyEx(mask.view(np.uint8), cv2.MORPH_OPEN, disc(width_um, mpp)) > 0
    )


def _long(mask: Mask, length_um: float, mpp: float) -> Mask:
    """Return the pieces of a mask whose bounding box has at least this diagonal."""
    if not mask.any():
        return mask
    _, pieces, boxes, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8))
    extent = np.hypot(boxes[:, cv2.CC_STAT_WIDTH], boxes[:, cv2.CC_STAT_HEIGHT])
    kept = extent >= max(length_um / mpp, _LENGTH_PX)
    kept[0] = False
    return np.asarray(kept[pieces])
