"""Folds of the tissue, as steps from one layer to several.

Layers of one tissue add up: beyond the edge of a fold the density is a multiple, in every channel
alike, and so is that of the lightest places between nuclei and fibres. Nuclei that lie closer, or a
stain, change the colour or leave places between them that are light. An edge alone is a fold if it
is that of several layers, denser than the tissue of the slide; two edges that face each other are
one of any density, because tissue seldom has both.
"""

import math
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from hemera.imaging.morphology import COARSE_MPP, at_mpp, disc, odd_px

Float = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Byte = npt.NDArray[np.uint8]

# The lightest density is that in a window of this side, um.
_LIGHTEST_UM = 10.0
STEP_MPP = 4.0
"""The resolution of the comparison, um/px; on coarser images, no edge is searched for."""
# Length of an edge, at most this fraction of the shorter side of the image; pieces of it of which
# so many must show the step; depth of the strips at both sides, um; number of directions.
_LENGTH_UM = 96.0
_LENGTH_FRACTION = 0.6
_PIECE_UM = 8.0
_PIECES = 0.8
_DEPTH_UM = 12.0
_ANGLES = 12
RATIO = 2.0
"""The density in a fold over that beside it, in every channel."""
BAND_RATIO = 1.8
"""The same of a band between two edges."""
# The same of the lightest places along these edges: fibres and nuclei of the layers rarely meet, so
# that there the second layer adds less than on average.
_BAND_LIGHTEST_RATIO = 1.3
# Distance of these two edges, um, and how far they may be shifted along their direction, um.
_BAND_UM = (12.0, 120.0)
_BAND_SHIFT_UM = 16.0
# The length of a band about the middle of its edges, of theirs.
_BAND_REACH = 0.6
# What the lightest places have at least, or they are not tissue.
_NOISE = 0.005
_TISSUE_DENSITY = 0.03
# A fold with one edge over the denser quarter of the tissue of its slide.
_OVER_TYPICAL = 1.6
# Largest angle between the colours at both sides, in optical density, degrees: of the mean, and of
# the lightest places, which have little stain.
_HUE_DEG = 4.0
_LIGHTEST_HUE_DEG = 10.0
# What remains of a band has at least so much of its median density: the two edges can be those of
# a fold and of something beyond it.
_BAND_DENSITY = 0.7
# Smoothing of the density when the fold is outlined, and pale places in it that are filled, um.
_OUTLINE_UM = 20.0
_GAP_UM = 20.0


class Steps(NamedTuple):
    """Of horizontal edges with the fold at one side, (H, W) each.

    Attributes:
        density: mean density of the fold along the edge.
        ratio: least ratio of a channel to the other side, 0 where the colours differ.
        pieces: ratio of the lightest places of pieces of the edge, 0 where one is no tissue.
    """

    density: Float
    ratio: Float
    pieces: Float

    def middles(self, length: int, ratio: float, lightest: float) -> Mask:
        """Return the middles of edges of a length, px, with ratios of mean and lightest density."""
        enough = np.asarray(self.ratio > ratio)
        if not enough.any():
            return enough
        steps = (self.pieces > lightest).astype(np.float32)
        along = cv2.blur(steps, (length, 1), borderType=cv2.BORDER_CONSTANT)
        return np.asarray(enough & (along >= _PIECES))


def find_folds(
    density: Float,
    mpp: float,
    tissue_density: float,
    ratio: float = RATIO,
    band_ratio: float = BAND_RATIO,
) -> Mask:
    """Return where tissue is folded, (H, W).

    Args:
        density: (H, W, 3) optical densities.
        mpp: its resolution, um/px; where it is coarser than `STEP_MPP`, nothing is found.
        tissue_density: `imaging.artefacts.typical_density` of the slide.
        ratio: smallest ratio of the densities at both sides of an edge.
        band_ratio: the same of bands between two edges.
    """
    none = np.zeros(density.shape[:2], np.bool_)
    if mpp > STEP_MPP or not math.isfinite(tissue_density):
        return none
    mean = at_mpp(density, mpp, STEP_MPP)
    side = odd_px(_LIGHTEST_UM, max(mpp, COARSE_MPP))
    lightest = np.asarray(cv2.erode(density, np.ones((side, side), np.uint8)), np.float32)
    limits = (_OVER_TYPICAL * tissue_density, ratio, band_ratio)
    edges, bands = _edges_and_bands(mean, at_mpp(lightest, mpp, STEP_MPP), limits)
    smooth = np.asarray(cv2.blur(mean.mean(axis=2), (odd_px(_OUTLINE_UM, STEP_MPP),) * 2))
    fold = (_without_pale(bands, smooth) | _beyond(edges, smooth > limits[0])).view(np.uint8)
    return np.asarray(cv2.resize(fold, none.shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT) > 0)


def _without_pale(bands: Mask, density: Float) -> Mask:
    """Return bands without what is much paler than most of the same band, (H, W)."""
    _, pieces = cv2.connectedComponents(bands.view(np.uint8))
    kept = np.zeros_like(bands)
    for label in range(1, int(pieces.max()) + 1):
        piece = pieces == label
        kept |= piece & (density > _BAND_DENSITY * np.median(density[piece]))
    return kept


def _beyond(edges: Mask, dense: Mask) -> Mask:
    """Return the dense areas that contain edges, (H, W), at `STEP_MPP`."""
    edges = np.asarray(edges & dense)
    if not edges.any():
        return edges
    whole = cv2.morphologyEx(dense.view(np.uint8), cv2.MORPH_CLOSE, disc(_GAP_UM, STEP_MPP))
    _, pieces = cv2.connectedComponents(whole)
    fold = np.isin(pieces, np.unique(pieces[edges])).view(np.uint8)
    # Of three layers and more, smoothing has moved the edge outwards.
    return np.asarray(cv2.erode(fold, np.ones((3, 3), np.uint8), borderValue=1) > 0)


def _edges_and_bands(
    mean: Float, lightest: Float, limits: tuple[float, float, float]
) -> tuple[Mask, Mask]:
    """Return the strips at the denser side of edges, and bands, (H, W) each, at `STEP_MPP`.

    Args:
        mean: (H, W, 3) densities.
        lightest: likewise, of the lightest places.
        limits: least density of a fold with one edge, its ratio, ratio of bands.
    """
    height, width = mean.shape[:2]
    length = round(min(_LENGTH_UM / STEP_MPP, _LENGTH_FRACTION * min(height, width)))
    found = np.zeros((2, height, width), np.bool_)
    both = np.concatenate([mean, lightest, np.ones((height, width, 1), np.float32)], axis=2)
    # Large enough for every rotation, and for the shifts of the strips.
    canvas = math.ceil(math.hypot(height, width)) + 2 * round(_DEPTH_UM / STEP_MPP)
    for k in range(_ANGLES):
        matrix = cv2.getRotationMatrix2D((width / 2 - 0.5, height / 2 - 0.5), 180 * k / _ANGLES, 1)
        matrix[:, 2] += (canvas - width) / 2, (canvas - height) / 2
        # OpenCV warps four channels at most.
        parts = (both[..., :4], both[..., 4:])
        turned = [cv2.warpAffine(part, matrix, (canvas, canvas)) for part in parts]
        sides = _steps(np.dstack(turned).astype(np.float32), length)
        for own, strips in zip(
            found, (_strips(sides, length, limits), _between(sides, length, limits[2])), strict=True
        ):
            if strips.any():
                back = cv2.warpAffine(
                    strips, matrix, (width, height), flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
                )
                own |= back > 0
    return found[0], found[1]


def _steps(turned: Float, length: int) -> tuple[Steps, Steps]:
    """Return the steps at horizontal edges with the fold above, and with the fold below.

    Args:
        turned: (H, W, 7): mean density, lightest density, 1 where there is an image.
        length: of an edge, px.
    """
    piece, depth = round(_PIECE_UM / STEP_MPP), round(_DEPTH_UM / STEP_MPP)
    box = cv2.blur(turned, (piece, depth), borderType=cv2.BORDER_CONSTANT)
    inside = box[..., 6] > 0.8
    box = box[..., :6] / np.maximum(box[..., 6:], 1e-3)
    shift = (depth + 1) // 2
    sides = [np.roll(box, by, 0) for by in (shift, -shift)]
    inside = np.roll(inside, shift, 0) & np.roll(inside, -shift, 0)
    along = [
        np.asarray(
            cv2.blur(side * inside[..., None], (length, 1), borderType=cv2.BORDER_CONSTANT),
            np.float32,
        )
        for side in sides
    ]
    # The mean of the channels: a single one has as much noise as density.
    light = [side[..., 3:].mean(axis=2) for side in sides]
    alike = _alike(along[0][..., :3], along[1][..., :3], _HUE_DEG)
    alike &= _alike(along[0][..., 3:], along[1][..., 3:], _LIGHTEST_HUE_DEG)
    found = []
    for fold, beside in ((0, 1), (1, 0)):
        tissue = inside & (sides[beside][..., :3].mean(axis=2) > _TISSUE_DENSITY)
        tissue &= light[beside] > _NOISE
        ratio = (along[fold][..., :3] / np.maximum(along[beside][..., :3], 1e-4)).min(axis=2)
        pieces = (light[fold] + _NOISE) / (light[beside] + _NOISE)
        found.append(Steps(along[fold][..., :3].mean(axis=2), ratio * alike, pieces * tissue))
    return found[0], found[1]


def _strips(sides: tuple[Steps, Steps], length: int, limits: tuple[float, float, float]) -> Byte:
    """Return the strips at the denser side of horizontal edges, (H, W)."""
    depth = round(_DEPTH_UM / STEP_MPP)
    found = np.zeros(sides[0].ratio.shape, np.uint8)
    for side, by in zip(sides, (-((depth + 1) // 2), (depth + 1) // 2), strict=True):
        dense = side.density > limits[0]
        if not dense.any():
            continue
        middles = (side.middles(length, limits[1], limits[1]) & dense).view(np.uint8)
        strips = cv2.dilate(middles, np.ones((depth, length), np.uint8))
        found |= np.roll(np.asarray(strips, np.uint8), by, 0)
    return found


def _between(sides: tuple[Steps, Steps], length: int, ratio: float) -> Byte:
    """Return the bands between a horizontal edge and another below it, (H, W)."""
    found = np.zeros(sides[0].ratio.shape, np.uint8)
    shift = np.ones((1, 2 * round(_BAND_SHIFT_UM / STEP_MPP) + 1), np.uint8)
    middles = (side.middles(length, ratio, _BAND_LIGHTEST_RATIO) for side in sides)
    lower, upper = (
        np.asarray(cv2.dilate(each.view(np.uint8), shift), np.uint8) for each in middles
    )
    if not lower.any() or not upper.any():
        return found
    narrowest, widest = (round(width / STEP_MPP) for width in _BAND_UM)
    reach = round(_BAND_REACH * length)
    for width in range(narrowest, min(widest, len(found) - 1) + 1):
        both = upper[:-width] & lower[width:]
        if both.any():
            # Downwards from the upper edge to the lower one, without the rows of both; edges are
            # found up to a row beside them, and up to a step of the directions beside theirs.
            rows = cv2.copyMakeBorder(both, 1, width - 1, 0, 0, cv2.BORDER_CONSTANT)
            kernel = np.ones((width - 1, reach), np.uint8)
            band = cv2.dilate(rows, kernel, anchor=(reach // 2, width - 2))
            found |= np.asarray(band, np.uint8)
    return found


def _alike(first: Float, second: Float, angle_deg: float) -> Mask:
    """Return where the vectors (H, W, 3) of two images have the same direction, (H, W)."""
    product = (first * second).sum(axis=2)
    lengths = np.linalg.norm(first, axis=2) * np.linalg.norm(second, axis=2)
    return np.asarray(product >= math.cos(math.radians(angle_deg)) * lengths)
