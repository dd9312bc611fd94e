"""Stain vectors of a pair, colour separation, and reference densities of the slide.

A density is an optical density: log10 of background over pixel, along a stain vector of length one.
"""

import dataclasses
import math
from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

from hemera.imaging import color
from hemera.imaging.morphology import COARSE_MPP, coarse, disc

HAEMATOXYLIN = (0.650, 0.704, 0.286)
DAB = (0.268, 0.570, 0.776)
"""Vectors of Ruifrok and Johnston (Anal Quant Cytol Histol 23, 2001), density of red, green, blue:
for a slide that has too little of a stain to measure it."""

Vector = tuple[float, float, float]

# Summed density of a pixel of tissue from which vectors are estimated, and from which the density
# of nuclei is.
_STAINED_DENSITY = 0.30
_TISSUE_DENSITY = 0.15
# Smallest haematoxylin that counts towards the density of nuclei, density.
_HAEMATOXYLIN_MIN = 0.05
# Every 16th pixel is sampled: smallest number of stained samples of a pair and of a tile, and of
# tiles that have so many.
_PIXELS_MIN = 500
_TILE_PIXELS_MIN = 50
_TILES_MIN = 3
# Largest angle between an estimated and the fixed vector, degrees.
_ANGLE_MAX_DEG = 15.0
# Fraction of the other stain that an estimated vector may contain.
_IMPURITY = 0.1
# Density of haematoxylin in dark nuclei where too little is stained to measure it.
_NUCLEAR_DENSITY = 0.35
# Negative control: smallest summed density of tissue; haematoxylin of a nucleus as a fraction of
# that of dark nuclei; distance from nuclei, um; smallest fraction of the tissue so far away.
_CONTROL_TISSUE_DENSITY = 0.08
_CONTROL_NUCLEAR_FRACTION = 0.3
_CONTROL_DISTANCE_UM = 6.0
_CONTROL_FRACTION_MIN = 0.05


@dataclasses.dataclass(frozen=True)
class Stains:
    """How one pair was stained and scanned.

    `background` is its colour (r, g, b), 0 to 255; `haematoxylin` and `dab` are unit vectors of
    density; `nuclear_density` is the haematoxylin of the pair's dark nuclei (98th percentile of
    stained pixels); `estimated` names the vectors that were measured; `background_dab` is the DAB
    of tissue away from nuclei (first quartile), 0 where there is too little such tissue.
    """

    background: tuple[int, int, int]
    haematoxylin: Vector = HAEMATOXYLIN
    dab: Vector = DAB
    nuclear_density: float = _NUCLEAR_DENSITY
    estimated: tuple[str, ...] = ()
    background_dab: float = 0.0

    @property
    def vectors(self) -> npt.NDArray[np.float64]:
        """Haematoxylin and DAB, (2, 3)."""
        return np.array([self.haematoxylin, self.dab])


def estimate(tiles: Sequence[npt.NDArray[np.uint8]], mpp: float) -> Stains:
    """Estimate background and stain vectors of a pair from some of its HER2 tiles.

    Macenko et al. (ISBI 2009): the extreme directions of stained pixels in the plane of their two
    largest variances. A direction further than 15 degrees from the fixed vector of its stain is
    noise or another dye, and the fixed vector is used; also where fewer than three tiles have
    tissue (800 stained pixels), or all of them have fewer than 8000 stained pixels.

    The background is the 99th percentile of each channel. `color.background_color` takes the
    most frequent gray of an image, which in tiles without background is stroma: with it, 45 of the
    699 cells of the BCI tile 00001_test_2+ remain, and none of its 2+. On BCI's gray fields, the
    percentile is up to 0.02 of density above it.

    Args:
        tiles: (H, W, 3) uint8 RGB each, of any sizes; none: white background, fixed vectors.
        mpp: their resolution, um/px.
    """
    if not tiles:
        return Stains(color.WHITE)
    # A blur before sampling: single pixels contain noise of sensor and JPEG.
    samples = [
        np.asarray(cv2.blur(tile, (3, 3)), np.uint8)[::4, ::4].reshape(-1, 3) for tile in tiles
    ]
    sample = np.concatenate(samples)
    red, green, blue = np.rint(np.percentile(sample, 99, axis=0)).astype(int).tolist()
    background = (red, green, blue)
    density = color.optical_density(sample[None], background)[0].astype(np.float64)
    total = density.sum(axis=1)
    tile_of = np.repeat(np.arange(len(samples)), [len(own) for own in samples])
    vectors, estimated = _vectors(
        density[total > _STAINED_DENSITY], tile_of[total > _STAINED_DENSITY]
    )
    haematoxylin = density[total > _TISSUE_DENSITY] @ color.unmixing_matrix(vectors)[:, 0]
    haematoxylin = haematoxylin[haematoxylin > _HAEMATOXYLIN_MIN]
    enough = len(haematoxylin) >= _PIXELS_MIN
    stains = Stains(
        background,
        _triple(vectors[0]),
        _triple(vectors[1]),
        float(np.percentile(haematoxylin, 98)) if enough else _NUCLEAR_DENSITY,
        estimated,
    )
    return dataclasses.replace(stains, background_dab=_background_dab(tiles, mpp, stains))


def separate(rgb: npt.NDArray[np.uint8], stains: Stains) -> npt.NDArray[np.float32]:
    """Return the densities of haematoxylin, DAB and the residual, (H, W, 3) float32."""
    density = color.optical_density(rgb, stains.background)
    return np.asarray(cv2.transform(density, color.unmixing_matrix(stains.vectors).T), np.float32)


def _vectors(
    stained: npt.NDArray[np.float64], tile_of: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], tuple[str, ...]]:
    """Return the stain vectors (2, 3) of stained densities (N, 3), and which were estimated."""
    vectors = np.array([_unit(HAEMATOXYLIN), _unit(DAB)])
    estimated: list[str] = []
    tiles = np.count_nonzero(np.bincount(tile_of) >= _TILE_PIXELS_MIN)
    if len(stained) < _PIXELS_MIN or tiles < _TILES_MIN:
        return vectors, ()
    for row, name in enumerate(("haematoxylin", "dab")):
        direction = _purified(_extremes(stained)[row], row)
        if direction @ vectors[row] > math.cos(math.radians(_ANGLE_MAX_DEG)):
            vectors[row] = direction
            estimated.append(name)
    return vectors, tuple(estimated)


def _extremes(
    stained: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the two extreme unit directions of densities (N, 3), haematoxylin first."""
    _, axes = np.linalg.eigh(np.cov(stained.T))
    axes = axes[:, [2, 1]]
    axes = axes * np.where(axes[0] < 0, -1.0, 1.0)
    angle = np.arctan2(stained @ axes[:, 1], stained @ axes[:, 0])
    first, last = (
        _unit(axes @ np.array([math.cos(end), math.sin(end)]))
        for end in np.percentile(angle, [1, 99])
    )
    # Haematoxylin absorbs red light, DAB blue.
    return (first, last) if first[0] - first[2] > last[0] - last[2] else (last, first)


def _purified(direction: npt.NDArray[np.float64], row: int) -> npt.NDArray[np.float64]:
    """Return a direction without its part of the other stain; `row`: 0 haematoxylin, 1 DAB."""
    fixed = np.array([_unit(HAEMATOXYLIN), _unit(DAB)])
    fractions = direction @ color.unmixing_matrix(fixed)
    return _unit(direction - max(fractions[1 - row] - _IMPURITY, 0.0) * fixed[1 - row])


def _background_dab(tiles: Sequence[npt.NDArray[np.uint8]], mpp: float, stains: Stains) -> float:
    """Return the DAB of tissue away from nuclei, the negative control; 0 without such tissue."""
    count, found = 0, []
    for tile in tiles:
        small = coarse(tile, mpp)
        tissue = (
            color.optical_density(small, stains.background).sum(axis=2) > _CONTROL_TISSUE_DENSITY
        )
        haematoxylin, dab, _ = cv2.split(separate(small, stains))
        nuclear = haematoxylin > _CONTROL_NUCLEAR_FRACTION * stains.nuclear_density
        near = cv2.dilate(nuclear.view(np.uint8), disc(2 * _CONTROL_DISTANCE_UM, COARSE_MPP)) > 0
        found.append(dab[tissue & ~near])
        count += int(np.count_nonzero(tissue))
    control = np.concatenate(found)
    if len(control) < max(_PIXELS_MIN, _CONTROL_FRACTION_MIN * count):
        return 0.0
    return max(float(np.percentile(control, 25)), 0.0)


def _unit(vector: npt.ArrayLike) -> npt.NDArray[np.float64]:
    values = np.asarray(vector, dtype=np.float64)
    return np.asarray(values / np.linalg.norm(values), np.float64)


def _triple(vector: npt.NDArray[np.float64]) -> Vector:
    return float(vector[0]), float(vector[1]), float(vector[2])
