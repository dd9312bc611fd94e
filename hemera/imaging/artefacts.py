"""Artefacts in tiles: pen, folds, dust, and gray lines such as the edge of a coverslip.

All are searched for at `COARSE_MPP`. A density is an optical density: log10 of background over
pixel.
"""

import math

import cv2
import numpy as np
import numpy.typing as npt

from hemera.imaging import color
from hemera.imaging.morphology import COARSE_MPP, coarse, disc

Mask = npt.NDArray[np.bool_]

# Smallest saturation of ink: densest minus least dense channel, density.
_PEN_SATURATION = 0.25
# Smallest angle between ink and any mixture of both stains, degrees.
_PEN_ANGLE_DEG = 13.0
# Smallest width of a stroke in a colour of its own, um.
_PEN_WIDTH_UM = 18.0
# Ink of the hue of haematoxylin: smallest fraction of the density of the slide's dark nuclei, over
# a width that no nucleus has, um. On 28 real and drawn tiles, tissue keeps 0.44 over 24 um at most.
_PEN_NUCLEAR_FRACTION = 0.6
_PEN_NUCLEAR_WIDTH_UM = 28.0
# The dark nuclei of a slide have at least this density: a pale slide does not turn tissue into ink.
_PEN_NUCLEAR_DENSITY_MIN = 0.5
# Folds and particles: smallest density in every channel, smallest width, um, and the largest
# difference between channels as a fraction of the density: strong DAB is dark and brown.
_FOLD_DENSITY = 0.4
_FOLD_WIDTH_UM = 8.0
_FOLD_COLOR = 0.8
# Smallest length of a fold, a particle or a line, um.
_LENGTH_UM = 60.0
# Gray lines: smallest density in every channel, and by which fraction of it channels may differ. On
# 24 real and drawn tiles, such pixels of tissue are connected over 38 um at most, those of the
# edge of a coverslip over 190 um.
_LINE_DENSITY = 0.15
_LINE_COLOR = 0.2
# A line is at most so wide, um, and at most so many times as long as its two ends are apart: a
# network of pale membranes is connected too, and much longer.
_LINE_WIDTH_UM = 12.0
_LINE_BENDS = 2.0
# The same where a pixel is connected to such a line; where both are no thin line together, at most
# this far from it, um.
_LINE_END_DENSITY = 0.10
_LINE_END_COLOR = 0.3
_LINE_END_UM = 60.0
# Gaps in an artefact that are filled, and the width of its pale edge, um.
_GAP_UM = 30.0
_EDGE_UM = 6.0


def ihc_artefacts(
    rgb: npt.NDArray[np.uint8],
    mpp: float,
    background: tuple[int, int, int],
    vectors: npt.NDArray[np.float64],
    nuclear_density: float,
) -> Mask | None:
    """Find what is neither tissue nor background in a tile stained with haematoxylin and DAB.

    Pen is saturated colour over an even area whose direction no mixture of both stains has, or
    which is as dark as a nucleus over more than a nucleus. A fold or a particle absorbs in every
    channel over more than a nucleus, without the colour of strong DAB. A line, such as the edge of
    a coverslip, a scratch or a hair, is long, thin, and absorbs all colours alike.

    Args:
        rgb: (H, W, 3) uint8.
        mpp: its resolution, um/px.
        background: its colour (r, g, b), 0 to 255.
        vectors: (2, 3) unit vectors of haematoxylin and DAB in optical density.
        nuclear_density: haematoxylin of the slide's dark nuclei, density.

    Returns:
        (H, W) bool, or None without artefacts, as on nearly every tile.
    """
    density = color.optical_density(coarse(rgb, mpp), background)
    red, green, blue = cv2.split(density)
    low = np.asarray(cv2.min(cv2.min(red, green), blue), np.float32)
    spread = np.asarray(cv2.max(cv2.max(red, green), blue) - low, np.float32)
    found = _pen(density, spread, vectors, nuclear_density)
    found |= _folds(low, spread)
    found |= _lines(low, spread)
    if not found.any():
        return None
    # Ink over a nucleus has the direction of neither; the edges of an artefact are paler.
    whole = cv2.morphologyEx(found.view(np.uint8), cv2.MORPH_CLOSE, disc(_GAP_UM, COARSE_MPP))
    whole = cv2.dilate(whole, disc(_EDGE_UM, COARSE_MPP))
    height, width = rgb.shape[:2]
    return np.asarray(cv2.resize(whole, (width, height), interpolation=cv2.INTER_NEAREST) > 0)


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
    return np.asarray(far & (spread > _PEN_SATURATION), np.bool_)


def _pen(
    density: npt.NDArray[np.float32],
    spread: npt.NDArray[np.float32],
    vectors: npt.NDArray[np.float64],
    nuclear_density: float,
) -> Mask:
    ink = ink_pixels(density, vectors, _PEN_ANGLE_DEG)
    lowest = _PEN_NUCLEAR_FRACTION * max(nuclear_density, _PEN_NUCLEAR_DENSITY_MIN)
    haematoxylin = cv2.transform(density, color.unmixing_matrix(vectors)[:, :1].T)
    dark = (spread > _PEN_SATURATION) & (haematoxylin > lowest)
    return _opened(ink, _PEN_WIDTH_UM) | _opened(dark, _PEN_NUCLEAR_WIDTH_UM)


def _folds(low: npt.NDArray[np.float32], spread: npt.NDArray[np.float32]) -> Mask:
    dark = (low > _FOLD_DENSITY) & (spread < _FOLD_COLOR * low)
    return _long(_opened(dark, _FOLD_WIDTH_UM))


def _lines(low: npt.NDArray[np.float32], spread: npt.NDArray[np.float32]) -> Mask:
    line = _thin(_long((low > _LINE_DENSITY) & (spread < _LINE_COLOR * low)))
    if not line.any():
        return line
    gray = line | ((low > _LINE_END_DENSITY) & (spread < _LINE_END_COLOR * low))
    near = cv2.dilate(line.view(np.uint8), disc(2 * _LINE_END_UM, COARSE_MPP)) > 0
    return _thin(_connected(gray, line)) | _connected(gray & near, line)


def _connected(mask: Mask, to: Mask) -> Mask:
    """Return the pieces of a mask that contain a pixel of another."""
    _, pieces = cv2.connectedComponents(mask.view(np.uint8))
    return np.isin(pieces, pieces[to])


def _thin(mask: Mask) -> Mask:
    """Return the pieces of a mask at `COARSE_MPP` that are single thin lines.

    The mean distance from the edge is a quarter of the width of a line; its length is its area over
    its width, and hardly more than its extent.
    """
    if not mask.any():
        return mask
    count, pieces, boxes, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8))
    # Pixels at the edge are half a pixel inside.
    distance = cv2.distanceTransform(mask.view(np.uint8), cv2.DIST_L2, 5) - 0.5
    area = boxes[:, cv2.CC_STAT_AREA]
    width = np.maximum(4 * np.bincount(pieces.ravel(), distance.ravel(), count) / area, 1)
    extent = np.hypot(boxes[:, cv2.CC_STAT_WIDTH], boxes[:, cv2.CC_STAT_HEIGHT])
    kept = (width * COARSE_MPP <= _LINE_WIDTH_UM) & (area <= _LINE_BENDS * extent * width)
    kept[0] = False
    return np.asarray(kept[pieces])


def _opened(mask: Mask, width_um: float) -> Mask:
    """Return the regions of a mask at `COARSE_MPP` that are at least this wide."""
    if not mask.any():
        return mask
    kernel = disc(width_um, COARSE_MPP)
    return np.asarray(cv2.morphologyEx(mask.view(np.uint8), cv2.MORPH_OPEN, kernel) > 0)


def _long(mask: Mask) -> Mask:
    """Return the pieces of a mask at `COARSE_MPP` that are at least as long as a fold."""
    if not mask.any():
        return mask
    _, pieces, boxes, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8))
    length = np.hypot(boxes[:, cv2.CC_STAT_WIDTH], boxes[:, cv2.CC_STAT_HEIGHT])
    kept = length * COARSE_MPP > _LENGTH_UM
    kept[0] = False
    return np.asarray(kept[pieces])
