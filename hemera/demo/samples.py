"""Images of nuclei for training, with exact truth: any variant of any block of tissue."""

import dataclasses
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hemera.demo import debris
from hemera.demo.blocks import Block, Structures, look_at, noise
from hemera.demo.camera import photograph
from hemera.demo.cells import TUMOUR, Cells
from hemera.demo.grid import Array
from hemera.demo.render import ramp
from hemera.demo.variants import Counterstain, NucleusShape, Staining, Variant

# Weight of pale and defocused nuclei in the loss, and the value at their centres.
_PALE_WEIGHT = 0.5
_PALE_CENTRE = 0.6


@dataclasses.dataclass(frozen=True)
class Sample:
    """One image and its truth.

    `rgb` is (H, W, 3) uint8, `background` the colour that a user would have estimated, `centre`
    (H, W) is 1 at centres of nuclei, less where they are pale, and falls to 0 at their edges,
    `nucleus` (H, W) is 1 inside, `weight` (H, W) is below 1 where a reader would be in doubt and 0
    in folds.
    """

    rgb: npt.NDArray[np.uint8]
    background: tuple[int, int, int]
    centre: Array
    nucleus: Array
    weight: Array


@dataclasses.dataclass
class Nuclei:
    """Nuclei at the pixels of an image, all (side, side).

    `radius` is 1 at the edge of the nucleus of the pixel's cell, `short` its short radius in um,
    `presence` 0 to 1, `rim` 1 on the chromatin at the edge.
    """

    radius: Array
    short: Array
    presence: Array
    rim: Array
    doubtful: npt.NDArray[np.bool_]


class Scene(NamedTuple):
    """What one image is drawn from: its cells, and where they are on it."""

    rng: np.random.Generator
    cells: Cells
    seen: Structures
    nuclei: Nuclei
    grain: debris.Grain


def draw_sample(
    rng: np.random.Generator, block: Block, variant: Variant, side: int, mpp: float
) -> Sample:
    """Draw one image.

    Args:
        rng: draws the place and every cell.
        block: the tissue.
        variant: its look.
        side: of the image, px.
        mpp: its resolution, um/px.
    """
    seen = look_at(rng, block, variant.geometry, side, mpp)

    def grain(sigma_um: float) -> Array:
        return noise(rng, block, side, mpp, sigma_um)

    nuclei = _nuclei(rng, block, seen, variant.shape, variant.geometry.scale)
    scene = Scene(rng, block.tissue.cells, seen, nuclei, grain)
    first, extra = _haematoxylin(scene, variant)
    second, hidden = _dab(scene, variant.staining)
    first, second = first * (1 - hidden), second + extra.dab
    first, second, weight = debris.add(rng, block, seen, variant.debris, first, second, grain)
    camera = variant.camera
    rgb, background = photograph(rng, first, second, seen.tissue, camera, mpp, grain(30))
    inside = (nuclei.radius < 1) & (seen.tissue > 0.5)
    inside &= seen.border > 0.6 * variant.shape.gap_um
    nucleus = np.maximum(inside.astype(np.float32), extra.nucleus)
    centre = np.maximum(np.exp(-2.2 * np.square(nuclei.radius)) * inside, extra.centre)
    doubtful = (nuclei.doubtful & inside) | extra.doubtful
    # A lower target leaves pale nuclei to the threshold of centres.
    centre = np.where(doubtful, np.float32(_PALE_CENTRE) * centre, centre)
    weight = np.where(doubtful, np.float32(_PALE_WEIGHT), np.float32(1)) * weight
    return Sample(rgb, background, centre.astype(np.float32), nucleus, weight)


def _nuclei(
    rng: np.random.Generator, block: Block, seen: Structures, shape: NucleusShape, scale: float
) -> Nuclei:
    """Return the nuclei of the cells, each resized, bent, indented, or absent."""
    cells, cell = block.tissue.cells, seen.cell
    count = len(cells)
    size = shape.size * scale * np.exp(rng.normal(0, shape.size_spread, count))
    longer = np.exp(rng.normal(0, shape.elongation_spread, count))
    pyknotic = rng.random(count) < shape.pyknotic
    size = np.where(pyknotic, 0.65 * size, size)
    long = (cells.long_radius * size * np.sqrt(longer)).astype(np.float32)
    short = (cells.short_radius * size / np.sqrt(longer)).astype(np.float32)
    cosine, sine = np.cos(cells.angle)[cell], np.sin(cells.angle)[cell]
    u = (seen.dx * cosine + seen.dy * sine) / long[cell]
    v = (seen.dy * cosine - seen.dx * sine) / short[cell]
    radius = np.hypot(u, v)
    turn = np.arctan2(v, u)
    wave = np.zeros_like(radius)
    for order in (2, 3, 5):
        phase = rng.uniform(0, 2 * np.pi, count).astype(np.float32)
        wave += np.float32(shape.irregular / order**0.5) * np.sin(order * turn + phase[cell])
    indented = np.where(rng.random(count) < shape.indented, rng.uniform(0.2, 0.6, count), 0)
    facing = np.cos(turn - rng.uniform(0, 2 * np.pi, count).astype(np.float32)[cell])
    wave -= indented.astype(np.float32)[cell] * np.exp((facing - 1) * np.float32(4))
    radius = radius / np.maximum(1 + wave, np.float32(0.3))
    radius = np.where((rng.random(count) < shape.missing)[cell], np.float32(9), radius)
    wide = short[cell]
    presence = ramp((1 - radius) * wide, shape.edge_um) * (seen.tissue > 0.5)
    presence *= ramp(seen.border - np.float32(shape.gap_um), 0.5)
    rim_um = np.float32(rng.uniform(0.5, 1.0))
    rim = np.exp(-np.square((radius - np.float32(0.88)) * wide / rim_um))
    pale = (rng.random(count) < shape.pale) & ~pyknotic
    return Nuclei(radius, wide, presence.astype(np.float32), rim, pale[cell])


@dataclasses.dataclass
class Extra:
    """Nuclei drawn over those of the cells: their truth."""

    centre: Array
    nucleus: Array
    doubtful: npt.NDArray[np.bool_]
    dab: Array


def _haematoxylin(scene: Scene, variant: Variant) -> tuple[Array, Extra]:
    """Return the amount of haematoxylin, and the truth of the additional nuclei."""
    rng, cells, seen, nuclei, grain = scene
    look, shape, cell = variant.counterstain, variant.shape, seen.cell
    count = len(cells)
    of_kind = np.array([1.0, 1.25, 1.0, 0.85, 0.9]) ** look.kinds
    amount = of_kind[cells.kind] * np.exp(rng.normal(0, look.spread, count))
    pyknotic = rng.random(count) < 0.5 * shape.pyknotic
    amount = np.where(pyknotic, 2 * amount, amount).astype(np.float32)
    faint = np.where(nuclei.doubtful, np.float32(rng.uniform(0.25, 0.6)), np.float32(1))
    vesicular = np.clip(look.vesicular + rng.normal(0, 0.25, count), 0, 0.9).astype(np.float32)
    body = 1 - vesicular[cell] * (np.float32(0.75) - np.float32(0.8) * nuclei.rim)
    fine, coarse = look.grain
    chromatin = np.clip(1 + fine * grain(0.5) + coarse * grain(1.2), 0.2, 2.2)
    first = nuclei.presence * amount[cell] * faint * body * chromatin
    between = _between(rng, seen, look, grain)
    if look.clefts:
        between *= 1 - 0.9 * np.exp(-np.square((nuclei.radius - 1.25) / 0.18))
    first += between * (1 - 0.5 * nuclei.presence)
    extra = Extra(
        np.zeros_like(first),
        np.zeros_like(first),
        np.zeros(first.shape, bool),
        np.zeros_like(first),
    )
    level = float(np.median(amount))
    for focus, number in ((True, shape.overlapping), (False, shape.defocused)):
        for _ in range(number):
            first += _additional(rng, seen, extra, variant, level, focus) * chromatin
    return first.astype(np.float32), extra


def _between(
    rng: np.random.Generator, seen: Structures, look: Counterstain, grain: debris.Grain
) -> Array:
    """Return haematoxylin outside of nuclei: cytoplasm, stroma, and an uneven veil."""
    epithelium = look.epithelium * seen.epithelium
    epithelium = epithelium * np.clip(1 + 0.4 * grain(2) + 0.25 * grain(1), 0, 3)
    stroma = look.stroma * (seen.stroma * seen.fibres + 0.75 * seen.walls)
    stroma = stroma * np.clip(1 + 0.3 * grain(1), 0, 2)
    veil = look.veil * (seen.tissue > 0.5) * np.clip(1 + 0.6 * grain(14), 0, 3)
    return np.asarray(epithelium + stroma + veil, np.float32)


def _additional(
    rng: np.random.Generator,
    seen: Structures,
    extra: Extra,
    variant: Variant,
    level: float,
    focus: bool,
) -> Array:
    """Return the amount of one more nucleus at a random place of the tissue; note its truth."""
    side = len(seen.x)
    i, j = rng.integers(0, side, 2)
    short = rng.uniform(2.2, 4.2) * variant.geometry.scale * variant.shape.size
    long = short * rng.uniform(1, 1.8)
    angle = rng.uniform(0, np.pi)
    strength = level * (rng.uniform(0.5, 1.2) if focus else rng.uniform(0.2, 0.5))
    if seen.tissue[i, j] < 0.5:
        return np.zeros_like(seen.x)
    dx, dy = seen.x - seen.x[i, j], seen.y - seen.y[i, j]
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    radius = np.hypot((dx * c + dy * s) / np.float32(long), (dy * c - dx * s) / np.float32(short))
    edge = variant.shape.edge_um if focus else variant.shape.edge_um + 2.5
    inside = radius < 1
    extra.nucleus[inside] = 1
    extra.centre[:] = np.maximum(extra.centre, np.exp(-2.2 * np.square(radius)) * inside)
    if not focus:
        extra.doubtful |= inside
    presence = ramp((1 - radius) * np.float32(short), edge)
    look = variant.staining
    if look.pattern in ("nuclear", "mixed") and rng.random() < look.positive:
        brown = look.nuclear * rng.uniform(0.3, 1.2) if focus else rng.uniform(0.2, 0.7)
        extra.dab += np.float32(brown) * presence
        strength *= rng.uniform(0.1, 1)
    return np.float32(strength) * presence


def _dab(scene: Scene, look: Staining) -> tuple[Array, Array]:
    """Return the amount of DAB, and which fraction of the haematoxylin it hides."""
    rng, cells, seen, nuclei, grain = scene
    clumps = grain(2.5)
    second = look.unspecific * (
        seen.epithelium * np.clip(1 + 0.4 * clumps, 0, 3) * (1 - 0.3 * nuclei.presence)
        + seen.stroma * seen.fibres
    )
    hidden = np.zeros_like(second)
    if look.pattern in ("nuclear", "mixed"):
        amount, hidden = _nuclear_dab(scene, look)
        second = second + amount
    if look.pattern in ("membrane", "mixed"):
        second = second + _membranes(scene, look)
    if look.pattern in ("cytoplasm", "mixed"):
        count = len(cells)
        some = rng.random(count) < rng.uniform(0.1, 1)
        amount = np.where(some, np.exp(rng.normal(-0.9, 0.6, count)), 0).astype(np.float32)
        texture = np.clip(1 + 0.4 * clumps + 0.3 * grain(1), 0, 3)
        outside = 1 - np.float32(rng.uniform(0.2, 1)) * nuclei.presence
        second = second + amount[seen.cell] * seen.epithelium * outside * texture
    return np.asarray(second, np.float32), hidden


def _nuclear_dab(scene: Scene, look: Staining) -> tuple[Array, Array]:
    """Return DAB of a nuclear marker, and which fraction of the haematoxylin it hides."""
    rng, cells, seen, nuclei, grain = scene
    count = len(cells)
    elsewhere = 1.0 if rng.random() < 0.4 else rng.uniform(0, 0.8)
    positive = rng.random(count) < look.positive * np.where(cells.kind == TUMOUR, 1, elsewhere)
    strong = look.nuclear * np.exp(rng.normal(0, look.nuclear_spread, count))
    weak = rng.uniform(0, 0.12) * rng.random(count)
    amount = np.where(positive, strong, weak).astype(np.float32)[seen.cell]
    fine, coarse = look.nuclear_grain
    texture = np.clip(1 + fine * grain(0.5) + coarse * grain(1.2), 0.1, 2.5)
    found = nuclei.presence * amount * texture
    if look.leak:
        # Brown around strong nuclei, as far as the nucleus is wide.
        halo = np.exp(-np.square(np.maximum(nuclei.radius - 1, 0) / 0.35)) * seen.tissue
        found = found + look.leak * amount * halo
    hidden = np.float32(rng.uniform(0, 1)) * positive[seen.cell] * nuclei.presence
    return np.asarray(found, np.float32), np.asarray(hidden, np.float32)


def _membranes(scene: Scene, look: Staining) -> Array:
    """Return DAB of membranes and of the cytoplasm inside of them."""
    rng, cells, seen, nuclei, grain = scene
    count = len(cells)
    drawn = {
        "score": cells.intensity,
        "any": rng.integers(0, 4, count),
        "strong": rng.integers(2, 4, count),
    }
    intensity = np.asarray(drawn[look.intensities], np.uint8)
    strength = np.array([0, 0.3, 0.7, 1.4], np.float32)[intensity] * np.float32(look.membrane)
    # One line on the border of two cells, or one inside of each.
    away = np.abs(seen.border - np.float32(look.doubled_um or 0.3))
    if not look.doubled_um:
        away = np.maximum(seen.border - np.float32(0.3), 0)
    line = np.exp(-np.square(away / np.float32(look.width_um)))
    line *= ramp(grain(2.5) + np.float32(look.holes), 0.8)
    if look.one_sided:
        bare = rng.random(count) < look.one_sided
        turn = np.arctan2(seen.dy, seen.dx) - rng.uniform(0, 2 * np.pi, count)[seen.cell]
        line *= np.where(bare[seen.cell], ramp(np.cos(turn).astype(np.float32) + 0.2, 0.6), 1)
    line *= np.clip(1 + 0.25 * grain(1.2), 0.2, 2)
    clear = rng.random(count) < look.clear_cytoplasm
    inside = np.where(clear, 0, look.cytoplasm).astype(np.float32)[seen.cell]
    covered = np.where(rng.random(count) < look.tangential, 0.5, 0).astype(np.float32)
    line = np.maximum(line, covered[seen.cell])
    body = line + inside * (1 - 0.5 * nuclei.presence) * np.clip(1 + 0.3 * grain(2.5), 0, 2)
    return np.asarray(strength[seen.cell] * body * seen.epithelium, np.float32)
