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
from hemera.imaging.background import measure_background
from hemera.imaging.morphology import COARSE_MPP, coarse, disc, odd_px, smoothed
from hemera.masks.stain.samples import RGB, TILES_MIN, Float64, Mask, sample_blocks

HAEMATOXYLIN = (0.650, 0.704, 0.286)
DAB = (0.268, 0.570, 0.776)
"""Vectors of Ruifrok and Johnston (Anal Quant Cytol Histol 23, 2001), density of red, green, blue:
for a slide that has too little of a stain to measure it."""
NUCLEAR_DENSITY = 0.35
"""Density of haematoxylin in dark nuclei, likewise."""

Vector = tuple[float, float, float]

# Summed density of a pixel of tissue from which vectors are estimated, and from which the density
# of nuclei is.
_STAINED_DENSITY = 0.30
_TISSUE_DENSITY = 0.15
# On a pale slide, densities of this module are lower by a factor: the largest, in steps, at which
# this fraction of the tissue is stained, or dark nuclei have this density; and the smallest.
_STAINED_FRACTION = 0.05
_PALE = 0.20
_PALE_STEP = 0.9
_PALEST = 0.3
# Smallest number of samples of a block from which something is estimated.
_SAMPLES_MIN = 100
# Largest angle between an estimated and the fixed vector, degrees.
_ANGLE_MAX_DEG = 15.0
# Fraction of the other stain that an estimated vector may contain.
_IMPURITY = 0.1
# Haematoxylin of nuclei is measured where at most these fractions of it are DAB and residual, from
# this density up; percentile of such pixels that is a dark nucleus.
_HAEMATOXYLIN_MIN = 0.05
_PURE_DAB = 0.5
_PURE_RESIDUAL = 0.35
_DARK_PERCENTILE = 98
# A darker channel has too few gray values left for a colour.
_SATURATED_DENSITY = 1.2
# DAB is measured where it exceeds this density and haematoxylin.
_DAB_MIN = 0.25
# Bounds of the density of haematoxylin in dark nuclei; the lower one is that of no counterstain.
_NUCLEAR_DENSITY_MIN = _PALEST * _PALE
_NUCLEAR_DENSITY_MAX = 1.0
# The scale of a pale slide is at least this multiple of its noise, so that a nucleus differs from
# its surroundings by twice the noise.
_NOISE = 20.0
# Noise is the standard deviation of haematoxylin in the quietest windows of a tile: their side, um,
# and percentile; the standard deviation, um, of the blur of nuclei.
_NOISE_WINDOW_UM = 8.0
_NOISE_PERCENTILE = 10
SMOOTHING_UM = 0.6
# Negative control: smallest summed density of tissue; haematoxylin of a nucleus as a fraction of
# that of dark nuclei; distance from nuclei, um.
_CONTROL_TISSUE_DENSITY = 0.08
_CONTROL_NUCLEAR_FRACTION = 0.3
_CONTROL_DISTANCE_UM = 6.0
# Stroma has some nuclei and few: fraction of such pixels within a window, um. Without any, it may
# be tumour whose nuclei are too pale to be seen, unless the whole pair has less than this fraction.
_CONTROL_NUCLEAR_AREA = (0.001, 0.10)
_CONTROL_CELLULAR = 0.005
_CONTROL_WINDOW_UM = 80.0
# Less stroma than this fraction of the tissue counts in proportion: a little of it may be the pale
# edge of tumour, and a limit would make the score depend on a few pixels.
_CONTROL_FRACTION = 0.1
_CONTROL_SAMPLES_MIN = 500


@dataclasses.dataclass(frozen=True)
class Stains:
    """How one pair was stained and scanned.

    `background` is its colour (r, g, b), 0 to 255; `haematoxylin` and `dab` are unit vectors of
    density; `nuclear_density` is the haematoxylin of the pair's dark nuclei (98th percentile of
    pixels of little DAB); `dark_dab` is the DAB of its most stained places (98th percentile of
    pixels where it prevails), 0 where there is too little; `estimated` names the vectors that were
    measured; `background_dab` is the DAB of stroma away from nuclei (first quartile), less where
    there is little such tissue and 0 where there is none; `nuclei_measured`: `nuclear_density` is
    measured, not the default; `warning`: why it is not, or is at a bound, empty: neither.
    """

    background: tuple[int, int, int]
    haematoxylin: Vector = HAEMATOXYLIN
    dab: Vector = DAB
    nuclear_density: float = NUCLEAR_DENSITY
    dark_dab: float = 0.0
    estimated: tuple[str, ...] = ()
    background_dab: float = 0.0
    nuclei_measured: bool = False
    warning: str = ""

    @property
    def paleness(self) -> float:
        """Factor on limits of density on a pale slide; 1 for nuclei of 0.20 or more."""
        return min(self.nuclear_density / _PALE, 1.0)

    @property
    def note(self) -> str | None:
        """What could not be measured, in words; None: nothing."""
        fixed = [
            f"colour of {name}"
            for key, name in (("haematoxylin", "haematoxylin"), ("dab", "DAB"))
            if key not in self.estimated
        ]
        fixed += [] if self.nuclei_measured else ["density of nuclei"]
        return f"not measured: {', '.join(fixed)}" if fixed else None

    @property
    def vectors(self) -> Float64:
        """Haematoxylin and DAB, (2, 3)."""
        return np.array([self.haematoxylin, self.dab])


def estimate(
    tiles: Sequence[RGB],
    mpp: float,
    background: color.Color | None = None,
    excluded: Sequence[Mask | None] = (),
) -> Stains:
    """Estimate background and stain vectors of a pair from some of its HER2 tiles.

    Macenko et al. (ISBI 2009): the extreme directions of stained pixels in the plane of their two
    largest variances. They are estimated on every tile, or on sixteen blocks of each where there
    are one or two, and the median is taken, so that ink on one tile does not change the others. A
    direction further than 15 degrees from the fixed vector of its stain is noise or another dye:
    such a tile does not count, unless most are; such a block counts with the fixed vector.

    The haematoxylin of dark nuclei is the median likewise, of pixels with little DAB and little
    residual: brown nuclei, ink and dust are dark too. On a pale slide, the limits of density of the
    pixels used are in proportion, so that a slide of half the densities has half of both scales.

    Args:
        tiles: (H, W, 3) uint8 RGB each, of any sizes; none: white background, fixed vectors.
        mpp: their resolution, um/px.
        background: its colour; None: `measure_background` of the tiles.
        excluded: of each tile the pixels (H, W) that are not used, None where all are; none given:
            all pixels of all tiles are used.
    """
    if background is None:
        background = measure_background(tiles, mpp).color
    stains = Stains(background)
    if not tiles:
        return stains
    blocks = sample_blocks(
        tiles,
        excluded or [None] * len(tiles),
        mpp,
        background,
        stains.vectors,
        _PALEST * _TISSUE_DENSITY,
    )
    vectors, estimated = _vectors(blocks, len(tiles) >= TILES_MIN)
    nuclear_density, warning = _nuclear_density(blocks, vectors)
    stains = dataclasses.replace(
        stains,
        haematoxylin=_triple(vectors[0]),
        dab=_triple(vectors[1]),
        nuclear_density=nuclear_density or _most_haematoxylin(blocks, vectors),
        nuclei_measured=nuclear_density is not None,
        dark_dab=_dark_dab(blocks, vectors),
        estimated=estimated,
        warning=warning,
    )
    if stains.paleness < 1:
        stains = _above_noise(stains, blocks, tiles, mpp)
    return dataclasses.replace(stains, background_dab=_background_dab(tiles, mpp, stains))


def separate(rgb: RGB, stains: Stains) -> npt.NDArray[np.float32]:
    """Return the densities of haematoxylin, DAB and the residual, (H, W, 3) float32."""
    density = color.optical_density(rgb, stains.background)
    return np.asarray(cv2.transform(density, color.unmixing_matrix(stains.vectors).T), np.float32)


def _vectors(blocks: Sequence[Float64], whole: bool) -> tuple[Float64, tuple[str, ...]]:
    """Return the stain vectors (2, 3) of the densities of blocks, and which were estimated.

    A block is a tile if `whole`, else a part of one, whose directions are less certain.
    """
    vectors = np.array([_unit(HAEMATOXYLIN), _unit(DAB)])
    least = _stained_density(blocks)
    stained = [block[block.sum(axis=1) > least] for block in blocks]
    extremes = [_extremes(block) for block in stained if len(block) >= _SAMPLES_MIN]
    if len(extremes) < TILES_MIN:
        return vectors, ()
    estimated: list[str] = []
    for row, name in enumerate(("haematoxylin", "dab")):
        found = np.array([_purified(pair[row], row) for pair in extremes])
        far = found @ vectors[row] <= math.cos(math.radians(_ANGLE_MAX_DEG))
        few = far.mean() <= 0.5
        if whole and few:
            found = found[~far]
        else:
            found[far] = vectors[row]
        vectors[row] = _unit(np.median(found, axis=0))
        if few:
            estimated.append(name)
    return vectors, tuple(estimated)


def _stained_density(blocks: Sequence[Float64]) -> float:
    """Return the summed density from which a pixel is stained: less on a pale slide."""
    sums = np.concatenate([block.sum(axis=1) for block in blocks])
    factor = 1.0
    while factor > _PALEST:
        tissue = np.count_nonzero(sums > factor * _TISSUE_DENSITY)
        stained = np.count_nonzero(sums > factor * _STAINED_DENSITY)
        if stained > max(_STAINED_FRACTION * tissue, _SAMPLES_MIN):
            return factor * _STAINED_DENSITY
        factor *= _PALE_STEP
    return _STAINED_DENSITY


def _pure_haematoxylin(density: Float64, matrix: Float64, factor: float) -> Float64:
    """Return the haematoxylin of the pixels of a block (N, 3) that have little of anything else.

    `factor`: on the smallest densities, below 1 on a pale slide.
    """
    density = density[density.sum(axis=1) > factor * _TISSUE_DENSITY]
    haematoxylin, dab, residual = (density @ matrix).T
    pure = (haematoxylin > factor * _HAEMATOXYLIN_MIN) & (dab < _PURE_DAB * haematoxylin)
    pure &= np.abs(residual) < _PURE_RESIDUAL * haematoxylin
    return np.asarray(haematoxylin[pure & (density.max(axis=1) < _SATURATED_DENSITY)], np.float64)


def _nuclear_density(blocks: Sequence[Float64], vectors: Float64) -> tuple[float | None, str]:
    """Return the haematoxylin of dark nuclei, None where there is too little, and a warning."""
    matrix = color.unmixing_matrix(vectors)
    factor, density = 1.0, None
    while factor > _PALEST and (density is None or density < factor * _PALE):
        density, count = _dark_haematoxylin(blocks, matrix, factor)
        factor *= _PALE_STEP
    if density is None:
        return None, (
            f"haematoxylin of nuclei not measured: {count} pixels with little DAB, at least "
            f"{_SAMPLES_MIN} are needed. Raise mask.stain_tiles, and look at the masks"
        )
    remedy = "Look at the masks, and at the background and the stain of the slide"
    found = f"haematoxylin of nuclei is {density:.2f}"
    if density < _NUCLEAR_DENSITY_MIN:
        return None, (
            f"{found}, less than {_NUCLEAR_DENSITY_MIN:.2f}, as without a counterstain; a default "
            f"is used. {remedy}"
        )
    if density > _NUCLEAR_DENSITY_MAX:
        return _NUCLEAR_DENSITY_MAX, (
            f"{found}, more than plausible; {_NUCLEAR_DENSITY_MAX:.2f} is used. {remedy}"
        )
    return density, ""


def _most_haematoxylin(blocks: Sequence[Float64], vectors: Float64) -> float:
    """Return the scale where nuclei cannot be measured: the default, or all there is if it is less.

    Haematoxylin next to DAB is known less well, but no nucleus is darker than all of it. Where all
    of it is less than a counterstain, the default finds no nuclei in the noise of empty tiles.
    """
    density = np.concatenate(blocks)
    if len(density) < _SAMPLES_MIN:
        return NUCLEAR_DENSITY
    haematoxylin = density @ color.unmixing_matrix(vectors)[:, 0]
    most = float(np.percentile(haematoxylin, _DARK_PERCENTILE))
    return min(most, NUCLEAR_DENSITY) if most >= _NUCLEAR_DENSITY_MIN else NUCLEAR_DENSITY


def _dark_haematoxylin(
    blocks: Sequence[Float64], matrix: Float64, factor: float
) -> tuple[float | None, int]:
    """Return the haematoxylin of dark nuclei, None for too few pixels, and the number of pixels.

    `factor`: see `_pure_haematoxylin`.
    """
    pure = [_pure_haematoxylin(block, matrix, factor) for block in blocks]
    count = sum(map(len, pure))
    enough = [values for values in pure if len(values) >= _SAMPLES_MIN] or [np.concatenate(pure)]
    if len(enough[0]) < _SAMPLES_MIN:
        return None, count
    return float(np.median([np.percentile(own, _DARK_PERCENTILE) for own in enough])), count


def _above_noise(
    stains: Stains, blocks: Sequence[Float64], tiles: Sequence[RGB], mpp: float
) -> Stains:
    """Return stains whose scale is not below a multiple of the noise.

    Nor is it above what the limits of darker slides measure: nearly unstained tissue is textured.
    """
    fixed, _ = _dark_haematoxylin(blocks, color.unmixing_matrix(stains.vectors), 1.0)
    least = min(_NOISE * _noise(tiles, mpp, stains), _PALE if fixed is None else fixed)
    return dataclasses.replace(stains, nuclear_density=max(stains.nuclear_density, least))


def _noise(tiles: Sequence[RGB], mpp: float, stains: Stains) -> float:
    """Return the standard deviation of blurred haematoxylin in the flattest places of tiles."""
    window = odd_px(_NOISE_WINDOW_UM, mpp)
    found = []
    for tile in tiles:
        smooth = smoothed(np.ascontiguousarray(separate(tile, stains)[..., 0]), mpp, SMOOTHING_UM)
        mean, square = (cv2.blur(image, (window, window)) for image in (smooth, smooth * smooth))
        # A background of one colour is brighter than the camera can measure: it has no noise.
        spread = np.sqrt(np.maximum(square - mean * mean, 0))[::4, ::4]
        seen = spread[spread > 0]
        if len(seen):
            found.append(np.percentile(seen, _NOISE_PERCENTILE))
    return float(np.median(found)) if found else 0.0


def _dark_dab(blocks: Sequence[Float64], vectors: Float64) -> float:
    """Return the DAB of the most stained places, 0 where there is too little."""
    found = []
    for block in blocks:
        haematoxylin, dab, _ = (block @ color.unmixing_matrix(vectors)).T
        dab = dab[(dab > _DAB_MIN) & (dab > haematoxylin)]
        if len(dab) >= _SAMPLES_MIN:
            found.append(np.percentile(dab, _DARK_PERCENTILE))
    return float(np.median(found)) if found else 0.0


def _extremes(
    stained: Float64,
) -> tuple[Float64, Float64]:
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


def _purified(direction: Float64, row: int) -> Float64:
    """Return a direction without its part of the other stain; `row`: 0 haematoxylin, 1 DAB."""
    fixed = np.array([_unit(HAEMATOXYLIN), _unit(DAB)])
    fractions = direction @ color.unmixing_matrix(fixed)
    return _unit(direction - max(fractions[1 - row] - _IMPURITY, 0.0) * fixed[1 - row])


def _background_dab(tiles: Sequence[RGB], mpp: float, stains: Stains) -> float:
    """Return the DAB of stroma away from its nuclei, the negative control; 0 without stroma.

    Less where stroma is less than `_CONTROL_FRACTION` of the tissue.
    """
    found, areas = [], []
    count = nuclear_count = 0
    window = odd_px(_CONTROL_WINDOW_UM, COARSE_MPP)
    for tile in tiles:
        small = coarse(tile, mpp)
        density = color.optical_density(small, stains.background)
        tissue = density.sum(axis=2) > stains.paleness * _CONTROL_TISSUE_DENSITY
        haematoxylin, dab, _ = cv2.split(separate(small, stains))
        nuclear = haematoxylin > _CONTROL_NUCLEAR_FRACTION * stains.nuclear_density
        near = cv2.dilate(nuclear.view(np.uint8), disc(2 * _CONTROL_DISTANCE_UM, COARSE_MPP)) > 0
        area = cv2.blur(nuclear.astype(np.float32), (window, window), borderType=cv2.BORDER_REFLECT)
        found.append(dab[tissue & ~near])
        areas.append(area[tissue & ~near])
        count += int(np.count_nonzero(tissue))
        nuclear_count += int(np.count_nonzero(nuclear & tissue))
    control, area = np.concatenate(found), np.concatenate(areas)
    stroma = area <= _CONTROL_NUCLEAR_AREA[1]
    if nuclear_count > _CONTROL_CELLULAR * count:
        stroma &= area >= _CONTROL_NUCLEAR_AREA[0]
    control = control[stroma]
    if len(control) < _CONTROL_SAMPLES_MIN:
        return 0.0
    weight = min(len(control) / (_CONTROL_FRACTION * count), 1.0)
    return weight * max(float(np.percentile(control, 25)), 0.0)


def _unit(vector: npt.ArrayLike) -> Float64:
    values = np.asarray(vector, dtype=np.float64)
    return np.asarray(values / np.linalg.norm(values), np.float64)


def _triple(vector: Float64) -> Vector:
    return float(vector[0]), float(vector[1]), float(vector[2])
