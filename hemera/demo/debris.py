"""What is stained and is no nucleus: specks, smears, folds, macrophages, vacuoles."""

from collections.abc import Callable

import numpy as np

from hemera.demo.blocks import Block, Structures
from hemera.demo.cells import LYMPHOCYTE, SPINDLE
from hemera.demo.grid import Array
from hemera.demo.render import ramp
from hemera.demo.variants import Debris

Grain = Callable[[float], Array]
"""Noise of the size of the image, of mean 0 and variance 1, by the size of its detail in um."""


def add(
    rng: np.random.Generator,
    block: Block,
    seen: Structures,
    look: Debris,
    first: Array,
    second: Array,
    grain: Grain,
) -> tuple[Array, Array, Array]:
    """Add debris to the amounts of haematoxylin and DAB.

    Returns:
        Both amounts, and the weight of the truth: 0 in folds, where no nucleus can be read.
    """
    for _ in range(look.vacuoles):
        hole = 1 - _spot(rng, seen, rng.uniform(2, 10), 0.8)
        first, second = first * hole, second * hole
    for _ in range(look.specks):
        spot = _spot(rng, seen, rng.uniform(0.4, 1.5), 0.8) * np.float32(rng.uniform(0.3, 2))
        if rng.random() < 0.6:
            second = second + spot
        else:
            first = first + spot
    if look.macrophages:
        second = second + _macrophages(rng, block, seen, look.macrophages, grain)
    if look.smear:
        patches = ramp(grain(float(rng.choice([3.0, 6.0, 14.0]))) - rng.uniform(1.2, 2.2), 0.5)
        second = second + np.float32(look.smear) * patches * (seen.tissue > 0.5)
    if look.haze:
        patches = ramp(grain(float(rng.choice([3.0, 6.0]))) - np.float32(1.2), 2.0)
        first = first + np.float32(look.haze) * patches * seen.stroma
    if look.streaks:
        condensed = ramp(seen.fibres - np.float32(rng.uniform(0.75, 1.0)), 0.15) * seen.stroma
        first = first + np.float32(look.streaks) * condensed
    weight = np.ones_like(first)
    if look.fold_um:
        first, second, weight = _folded(rng, seen, look.fold_um, first, second)
    return np.asarray(first, np.float32), np.asarray(second, np.float32), weight


def _spot(rng: np.random.Generator, seen: Structures, radius: float, edge: float) -> Array:
    """Return a disc at a random place, 0 to 1."""
    half = float(np.abs(seen.x).max())
    x, y = rng.uniform(-half, half, 2)
    distance = np.hypot(seen.x - np.float32(x), seen.y - np.float32(y))
    return ramp(np.float32(radius) - distance, edge)


def _macrophages(
    rng: np.random.Generator, block: Block, seen: Structures, fraction: float, grain: Grain
) -> Array:
    """Return brown grains around the nuclei of some cells of the stroma."""
    cells = block.tissue.cells
    loose = (cells.kind == SPINDLE) | (cells.kind == LYMPHOCYTE)
    brown = loose & (rng.random(len(cells)) < fraction)
    radius = rng.uniform(6, 10, len(cells)).astype(np.float32)
    strength = np.where(brown, rng.uniform(0.4, 1.6, len(cells)), 0).astype(np.float32)
    distance = np.hypot(seen.dx, seen.dy) * (1 + np.float32(0.3) * grain(3))
    grains = np.clip(0.7 + np.float32(rng.uniform(0.2, 0.7)) * grain(0.9), 0, 2)
    body = ramp(radius[seen.cell] - distance, 1.5) * strength[seen.cell] * grains
    return np.asarray(body * (seen.tissue > 0.5), np.float32)


def _folded(
    rng: np.random.Generator, seen: Structures, width_um: float, first: Array, second: Array
) -> tuple[Array, Array, Array]:
    """Return both amounts with a band where the section is folded onto itself, and the weight."""
    turn, shift = rng.uniform(0, np.pi), rng.uniform(-30, 30)
    across = seen.x * np.float32(np.cos(turn)) + seen.y * np.float32(np.sin(turn))
    band = ramp(np.float32(width_um / 2) - np.abs(across - np.float32(shift)), 2.0)
    step = int(rng.integers(5, 25))
    doubled = [a + band * (np.roll(a, step, axis=1) + np.float32(0.2)) for a in (first, second)]
    return doubled[0], doubled[1], (band == 0).astype(np.float32)
