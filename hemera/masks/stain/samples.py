"""Pixels of a pair that its stains are estimated from: tissue without artefacts and ink."""

import math
from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

from hemera.imaging import color
from hemera.imaging.artefacts import ink_pixels
from hemera.imaging.morphology import disc

RGB = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Float64 = npt.NDArray[np.float64]

# Everything is estimated per tile or, with fewer tiles than this, per block: a tile is then divided
# into four by four.
TILES_MIN = 3
_BLOCKS_PER_SIDE = 4
# Pixels that are sampled, unless every 16th of them is more.
_SAMPLES = 200_000
_STEP_MAX = 4
# Smallest angle between ink and any mixture of both fixed vectors, degrees.
_INK_ANGLE_DEG = 15.0
# Width of the pale edge of ink, um.
_INK_EDGE_UM = 4.0
# Ink of the colour of a stain is darker by this factor than this percentile of all tiles but this
# fraction, of those with this fraction of tissue; its smallest width, um.
_DARKEST = 1.2
_DARKEST_PERCENTILE = 99
_DARKEST_TILES = 0.1
_DARKEST_TISSUE = 0.05
_INK_WIDTH_UM = 6.0


def sample_blocks(
    tiles: Sequence[RGB],
    excluded: Sequence[Mask | None],
    mpp: float,
    background: color.Color,
    vectors: Float64,
    tissue_density: float,
) -> list[Float64]:
    """Return the densities (N, 3) of tissue of every tile or, with one or two tiles, every block.

    Args:
        tiles: (H, W, 3) uint8 RGB each.
        excluded: of each tile the pixels (H, W) that are not used, None where all are.
        mpp: their resolution, um/px.
        background: its colour (r, g, b), 0 to 255.
        vectors: (2, 3) unit vectors of stains that a pixel is a mixture of, or else ink.
        tissue_density: smallest summed density of tissue.
    """
    side = 1 if len(tiles) >= TILES_MIN else _BLOCKS_PER_SIDE
    pixels = sum(tile.shape[0] * tile.shape[1] for tile in tiles)
    step = min(max(1, round(math.sqrt(pixels / _SAMPLES))), _STEP_MAX)
    samples = []
    for tile, without in zip(tiles, excluded, strict=True):
        # A blur before sampling: single pixels contain noise of sensor and JPEG.
        sample = np.asarray(cv2.blur(tile, (3, 3)), np.uint8)[::step, ::step]
        density = color.optical_density(sample, background)
        used = density.sum(axis=2) > tissue_density
        ink = ink_pixels(density, vectors, _INK_ANGLE_DEG)
        # The pale edge of a stroke has its colour and little saturation.
        edge = disc(2 * _INK_EDGE_UM, step * mpp)
        used &= cv2.dilate(ink.view(np.uint8), edge) == 0
        if without is not None:
            used &= ~without[::step, ::step]
        samples.append((density, used))
    if len(tiles) >= TILES_MIN:
        _remove_darkest(samples, step * mpp)
    blocks = []
    for density, used in samples:
        for k in range(side):
            for m in range(side):
                part = np.s_[k * len(used) // side : (k + 1) * len(used) // side]
                columns = used.shape[1]
                across = np.s_[m * columns // side : (m + 1) * columns // side]
                blocks.append(density[part, across][used[part, across]].astype(np.float64))
    return blocks


def _remove_darkest(samples: Sequence[tuple[npt.NDArray[np.float32], Mask]], mpp: float) -> None:
    """Remove from the used pixels of tiles what is darker than all of nearly every other tile.

    Ink may have the colour of a stain. A tile that is the only one of its staining has no effect on
    a median over tiles, so nothing is lost.

    Args:
        samples: densities (H, W, 3) of every tile, and its used pixels (H, W), which are changed.
        mpp: resolution of both, um/px.
    """
    sums = [density.sum(axis=2) for density, _ in samples]
    darkest = sorted(
        float(np.percentile(total[used], _DARKEST_PERCENTILE))
        for total, (_, used) in zip(sums, samples, strict=True)
        if used.mean() > _DARKEST_TISSUE
    )
    if len(darkest) < TILES_MIN:
        return
    limit = _DARKEST * darkest[-1 - math.ceil(_DARKEST_TILES * len(darkest))]
    for total, (_, used) in zip(sums, samples, strict=True):
        dark = (total > limit).view(np.uint8)
        stroke = cv2.morphologyEx(dark, cv2.MORPH_OPEN, disc(_INK_WIDTH_UM, mpp))
        used &= cv2.dilate(stroke, disc(2 * _INK_EDGE_UM, mpp)) == 0
