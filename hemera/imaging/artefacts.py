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
# Folds and particles: smallest density in every channel and smallest width, um.
_FOLD_DENSITY = 0.4
_FOLD_WIDTH_UM = 8.0
# Smallest length of a fold, a particle or a line, um.
_LENGTH_UM = 60.0
# Gray lines: smallest density in every channel, and by which fraction of it channels may differ. On
# 24 real and drawn tiles, such pixels of tissue are connected over 38 um at most, those of the
# edge of a coverslip over 190 um.
_LINE_DENSITY = 0.15
_LINE_COLOR = 0.2
# The same where a pixel is connected to such a line.
_LINE_END_DENSITY = 0.10
_LINE_END_COLOR = 0.3
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
    channel over more than a nucleus. A line, such as the edge of a coverslip, a scratch or a hair,
    has any width and absorbs all colours alike.

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
    found |= _long(_opened(low > _FOLD_DENSITY, _FOLD_WIDTH_UM))
    found |= _lines(low, spread)
    if not found.any():
        return None
    # Ink over a nucleus has the direction of neither; the edges of an artefact are paler.
    whole = cv2.morphologyEx(found.view(np.uint8), cv2.MORPH_CLOSE, disc(_GAP_UM, COARSE_MPP))
    whole = cv2.dilate(whole, disc(_EDGE_UM, COARSE_MPP))
    height, width = rgb.shape[:2]
    return np.asarray(cv2.resize(whole, (width, height), interpolation=cv2.INTER_NEAREST) > 0)


def _pen(
    density: npt.NDArray[np.float32],
    spread: npt.NDArray[np.float32],
    vectors: npt.NDArray[np.float64],
    nuclear_density: float,
) -> Mask:
    haematoxylin, dab, residual = cv2.split(
        cv2.transform(density, color.unmixing_matrix(vectors).T)
    )
    nearest = cv2.max(*cv2.split(cv2.transform(density, vectors)))
    red, green, blue = cv2.split(density)
    square = red * red + green * green + blue * blue
    # Squared distance from the mixtures of both stains; outside of them, from the nearer stain.
    distance = np.where(
        (haematoxylin >= 0) & (dab >= 0), residual * residual, square - nearest * nearest
    )
    saturated = spread > _PEN_SATURATION
    ink = saturated & (distance > math.sin(math.radians(_PEN_ANGLE_DEG)) ** 2 * square)
    dark = saturated & (haematoxylin > _PEN_NUCLEAR_FRACTION * nuclear_density)
    return _opened(ink, _PEN_WIDTH_UM) | _opened(dark, _PEN_NUCLEAR_WIDTH_UM)


def _lines(low: npt.NDArray[np.float32], spread: npt.NDArray[np.float32]) -> Mask:
    line = _long((low > _LINE_DENSITY) & (spread < _LINE_COLOR * low))
    if not line.any():
        return line
    gray = line | ((low > _LINE_END_DENSITY) & (spread < _LINE_END_COLOR * low))
    _, pieces = cv2.connectedComponents(gray.view(np.uint8))
    return np.isin(pieces, pieces[line])


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
