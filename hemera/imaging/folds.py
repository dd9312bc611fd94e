"""Folds of the tissue, as steps from one layer to several.

Layers of one tissue add up: beyond the edge of a fold the density is a multiple, in every channel
alike, and so is that of the lightest places between nuclei and fibres. Nuclei that lie closer, or a
stain, change the colour or leave places between them that are light.
"""

import math

import cv2
import numpy as np
import numpy.typing as npt

from hemera.imaging.morphology import COARSE_MPP, at_mpp, disc, odd_px

Float = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

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
# What the lightest places have at least, or they are not tissue.
_NOISE = 0.005
_TISSUE_DENSITY = 0.03
# A fold over the denser quarter of the tissue of its slide.
_OVER_TYPICAL = 1.6
# Largest angle between the colours at both sides, in optical density, degrees: of the mean, and of
# the lightest places, which have little stain.
_HUE_DEG = 4.0
_LIGHTEST_HUE_DEG = 10.0
# Smoothing of the density when the fold is outlined, and pale places in it that are filled, um.
_OUTLINE_UM = 20.0
_GAP_UM = 20.0


def find_folds(density: Float, mpp: float, tissue_density: float, ratio: float = RATIO) -> Mask:
    """Return where tissue is folded, (H, W).

    Args:
        density: (H, W, 3) optical densities.
        mpp: its resolution, um/px; where it is coarser than `STEP_MPP`, nothing is found.
        tissue_density: `imaging.artefacts.typical_density` of the slide.
        ratio: smallest ratio of the densities at both sides of the edge.
    """
    none = np.zeros(density.shape[:2], np.bool_)
    if mpp > STEP_MPP or not math.isfinite(tissue_density):
        return none
    mean = at_mpp(density, mpp, STEP_MPP)
    window = odd_px(_OUTLINE_UM, STEP_MPP)
    dense = cv2.blur(mean.mean(axis=2), (window, window)) > _OVER_TYPICAL * tissue_density
    # Without so dense an area as one strip, there is no edge.
    if dense.sum() * STEP_MPP**2 < _LENGTH_FRACTION * _LENGTH_UM * _DEPTH_UM:
        return none
    side = odd_px(_LIGHTEST_UM, max(mpp, COARSE_MPP))
    lightest = np.asarray(cv2.erode(density, np.ones((side, side), np.uint8)), np.float32)
    edges = _edges(mean, at_mpp(lightest, mpp, STEP_MPP), tissue_density, ratio) & dense
    if not edges.any():
        return none
    whole = cv2.morphologyEx(dense.view(np.uint8), cv2.MORPH_CLOSE, disc(_GAP_UM, STEP_MPP))
    _, pieces = cv2.connectedComponents(whole)
    fold = np.isin(pieces, np.unique(pieces[edges])).view(np.uint8)
    # Of three layers and more, smoothing has moved the edge outwards.
    inner = cv2.erode(fold, np.ones((3, 3), np.uint8), borderValue=1)
    return np.asarray(
        cv2.resize(inner, none.shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT) > 0
    )


def _edges(mean: Float, lightest: Float, tissue_density: float, ratio: float) -> Mask:
    """Return the strips at the denser side of edges of folds, (H, W), at `STEP_MPP`."""
    height, width = mean.shape[:2]
    length = min(_LENGTH_UM / STEP_MPP, _LENGTH_FRACTION * min(height, width))
    found = np.zeros((height, width), np.bool_)
    both = np.concatenate([mean, lightest, np.ones((height, width, 1), np.float32)], axis=2)
    # Large enough for every rotation, and for the shifts of the strips.
    canvas = math.ceil(math.hypot(height, width)) + 2 * round(_DEPTH_UM / STEP_MPP)
    for k in range(_ANGLES):
        matrix = cv2.getRotationMatrix2D((width / 2 - 0.5, height / 2 - 0.5), 180 * k / _ANGLES, 1)
        matrix[:, 2] += (canvas - width) / 2, (canvas - height) / 2
        # OpenCV warps four channels at most.
        parts = (both[..., :4], both[..., 4:])
        turned = [cv2.warpAffine(part, matrix, (canvas, canvas)) for part in parts]
        image = np.dstack(turned).astype(np.float32)
        strips = _horizontal_edges(image, round(length), tissue_density, ratio)
        if strips.any():
            back = cv2.warpAffine(
                strips.view(np.uint8),
                matrix,
                (width, height),
                flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP,
            )
            found |= back > 0
    return found


def _horizontal_edges(turned: Float, length: int, tissue_density: float, ratio: float) -> Mask:
    """Return the strips at the denser side of horizontal edges.

    Args:
        turned: (H, W, 7): mean density, lightest density, 1 where there is an image.
        length: of an edge, px.
    """
    piece, depth = round(_PIECE_UM / STEP_MPP), round(_DEPTH_UM / STEP_MPP)
    box = cv2.blur(turned, (piece, depth), borderType=cv2.BORDER_CONSTANT)
    inside = box[..., 6] > 0.8
    box = box[..., :6] / np.maximum(box[..., 6:], 1e-3)
    shift = (depth + 1) // 2
    above, below = (np.roll(box, by, 0) for by in (shift, -shift))
    inside = np.roll(inside, shift, 0) & np.roll(inside, -shift, 0)
    found = np.zeros(inside.shape, np.bool_)
    along = [
        np.asarray(
            cv2.blur(side * inside[..., None], (length, 1), borderType=cv2.BORDER_CONSTANT),
            np.float32,
        )
        for side in (above, below)
    ]
    for k, by in ((0, -shift), (1, shift)):
        fold, beside = along[k], along[1 - k]
        piece_fold, piece_beside = (above, below) if k == 0 else (below, above)
        whole = fold[..., :3].mean(axis=2) > _OVER_TYPICAL * tissue_density
        whole &= (fold[..., :3] > ratio * beside[..., :3]).all(axis=2)
        if not whole.any():
            continue
        whole &= _alike(fold[..., :3], beside[..., :3], _HUE_DEG)
        whole &= _alike(fold[..., 3:], beside[..., 3:], _LIGHTEST_HUE_DEG)
        steps = inside & (piece_beside[..., :3].mean(axis=2) > _TISSUE_DENSITY)
        steps &= piece_beside[..., 3:].mean(axis=2) > _NOISE
        # The mean of the channels: a single one has as much noise as density.
        light_fold, light_beside = (
            side[..., 3:].mean(axis=2) + _NOISE for side in (piece_fold, piece_beside)
        )
        steps &= light_fold > ratio * light_beside
        enough = cv2.blur(steps.astype(np.float32), (length, 1), borderType=cv2.BORDER_CONSTANT)
        middles = (whole & (enough >= _PIECES)).view(np.uint8)
        strip = cv2.dilate(middles, np.ones((depth, length), np.uint8))
        found |= np.roll(strip, by, 0) > 0
    return found


def _alike(first: Float, second: Float, angle_deg: float) -> Mask:
    """Return where the vectors (H, W, 3) of two images have the same direction, (H, W)."""
    product = (first * second).sum(axis=2)
    lengths = np.linalg.norm(first, axis=2) * np.linalg.norm(second, axis=2)
    return np.asarray(product >= math.cos(math.radians(angle_deg)) * lengths)
