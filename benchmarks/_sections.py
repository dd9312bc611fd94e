"""Two synthetic sections of one tissue with different cells, and the field between them.

The cohort of the demo shows the same cells on both stains. Real sections are some um apart: most
nuclei are on one of them only, and the borders of epithelium, lumens and fat differ.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from hemera.demo import tissue
from hemera.demo.cells import EXPRESSION, Cells, place_cells
from hemera.demo.field import Field
from hemera.demo.grid import GRID_UM, sample, smooth_noise
from hemera.demo.render import Appearance, Renderer, rasterise
from hemera.demo.scanner import photograph

RGB = npt.NDArray[np.uint8]
Points = npt.NDArray[np.float64]

DRAWN_MPP = 2.0


@dataclasses.dataclass(frozen=True)
class LocalField(Field):
    """A field with local stretches: vectors (N, 2) times Gaussians around centres (N, 2), um."""

    centres: Points
    vectors: Points
    radii: Points

    def elastic(self, points_um: Points) -> Points:
        """Return the deformation at points (..., 2) on H&E, um, before the rotation."""
        total = super().elastic(points_um)
        for centre, vector, radius in zip(self.centres, self.vectors, self.radii, strict=True):
            away = ((points_um - centre) ** 2).sum(-1, keepdims=True)
            total = total + np.exp(-0.5 * away / radius**2) * vector
        return total

    def to_fixed(self, points_um: Points, steps: int = 80) -> Points:
        """Map points (..., 2) on HER2 to H&E; local stretches need more steps."""
        return super().to_fixed(points_um, max(steps, 80))


@dataclasses.dataclass(frozen=True)
class Sections:
    """Both stains on white, (H, W, 3) at `mpp`, and the true map from H&E to HER2."""

    he: RGB
    her2: RGB
    mpp: float
    field: Field
    kept: float
    """Fraction of the tissue in which both show the same cells."""
    change_um: float
    """By how much borders of regions differ."""


def sections(seed: int) -> Sections:
    """Draw a pair: size, tissue, stains, scans, field and difference of the sections vary."""
    rng = np.random.default_rng([23, seed])
    width = np.exp(rng.uniform(np.log(2600), np.log(5200)))
    size_um = (width, width * rng.uniform(0.6, 0.85))
    score = str(rng.choice(["0", "1+", "2+", "3+"]))
    first = tissue.grow(rng, size_um, score, whole=True)
    columns, rows = (int(side / DRAWN_MPP) for side in size_um)
    kept = float(rng.choice([0, 0.2, 0.5, 0.8, 1], p=[0.4, 0.2, 0.2, 0.15, 0.05]))
    change_um = float(rng.choice([0, 6, 15, 25, 40], p=[0.05, 0.15, 0.25, 0.3, 0.25]))
    field = _field(rng, (columns * DRAWN_MPP, rows * DRAWN_MPP))
    he_look, her2_look = _look(rng, 228), _look(rng, 238)
    renderer = Renderer(first, rasterise(first, DRAWN_MPP, (columns, rows)), rng)
    he = photograph(renderer.draw("he", he_look), he_look, rng)
    second = _second(rng, first, kept, change_um)
    renderer = Renderer(second, rasterise(second, DRAWN_MPP, (columns, rows)), rng)
    drawn = renderer.draw("her2", her2_look)
    warped = field.warp(drawn, DRAWN_MPP, (columns, rows), DRAWN_MPP, her2_look.background)
    her2 = photograph(warped, her2_look, rng)
    mpp = columns * DRAWN_MPP / rng.uniform(560, 760)
    size = int(columns * DRAWN_MPP / mpp), int(rows * DRAWN_MPP / mpp)

    def canvas(rgb: RGB, look: Appearance) -> RGB:
        small = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
        white = np.rint(small * 255.0 / np.array(look.background))
        return np.clip(white, 0, 255).astype(np.uint8)

    return Sections(canvas(he, he_look), canvas(her2, her2_look), mpp, field, kept, change_um)


def _look(rng: np.random.Generator, darkest: int) -> Appearance:
    red, green, blue = rng.integers(darkest, 250, 3).tolist()
    first, second = rng.uniform(0.6, 1.2), rng.uniform(0.6, 1.2)
    return Appearance(
        (red, green, blue), first, second, rng.uniform(0.5, 1.2), rng.uniform(0.3, 1.2)
    )


def _field(rng: np.random.Generator, size_um: tuple[float, float]) -> LocalField:
    """Draw bends of the whole section, shorter ones, and up to six local stretches, no folds."""
    diagonal = math.hypot(*size_um)

    def between(low: float, high: float, count: int | None = None) -> Any:
        return np.exp(rng.uniform(np.log(low), np.log(high), count))

    def directions(count: int) -> Points:
        angles = rng.uniform(0, 2 * np.pi, count)
        return np.stack([np.cos(angles), np.sin(angles)], -1)

    def waves(low: float, high: float, count: int, rms_um: float) -> tuple[Points, Points]:
        lengths = max(size_um) * between(low, high, count)
        frequencies = directions(count)
        amplitudes = directions(count) * lengths[:, None]
        amplitudes *= rms_um / np.sqrt(0.5 * (amplitudes**2).sum())
        return amplitudes, 2 * np.pi / lengths[:, None] * frequencies

    long = waves(0.45, 1.1, 5, diagonal * between(0.004, 0.018))
    short = waves(0.10, 0.35, 6, diagonal * between(0.0004, 0.003))
    amplitudes, frequencies = (np.concatenate(both) for both in zip(long, short, strict=True))
    slope = (np.linalg.norm(amplitudes, axis=1) * np.linalg.norm(frequencies, axis=1)).sum()
    amplitudes *= min(1, 0.45 / slope)
    count = int(rng.integers(1, 7))
    radii = diagonal * between(0.025, 0.08, count)
    vectors = directions(count) * (radii * rng.uniform(0.15, 0.7, count))[:, None]
    centres = rng.uniform(0.15, 0.85, (count, 2)) * np.array(size_um)
    angle_deg, centre = float(rng.uniform(-1.5, 1.5)), np.array(size_um) / 2
    moved = centre + rng.normal(0, 0.002 * diagonal, 2)
    phases = rng.uniform(0, 2 * np.pi, len(amplitudes))
    return LocalField(
        angle_deg, centre, moved, amplitudes, frequencies, phases, centres, vectors, radii
    )


def _second(
    rng: np.random.Generator, first: tissue.Tissue, kept: float, change_um: float
) -> tissue.Tissue:
    """Return the next section: borders moved by `change_um`, more in some places, and other cells.

    In the fraction `kept` of the tissue, the cells are those of the first section.
    """

    def noise(wavelength_um: float) -> npt.NDArray[np.float32]:
        return smooth_noise(rng, first.outline.shape, wavelength_um / GRID_UM)

    where = np.clip(0.5 + noise(0.35 * first.size_um[0]), 0, 2.2)
    amounts = {"outline": 0.4, "epithelium": 1.0, "lumen": 0.7, "fat": 0.7}
    fields = {
        name: (
            getattr(first, name) + amount * change_um * where * (noise(220) + 0.6 * noise(90))
        ).astype(np.float32)
        for name, amount in amounts.items()
    }
    inside = fields["epithelium"] > 0
    latent = (0.85 * noise(300) + 0.45 * noise(95)).astype(np.float32)
    new = place_cells(
        rng, first.size_um, EXPRESSION[first.score], fields, inside,
        np.where(inside, 1.0, -1.0).astype(np.float32), latent, noise(210), first.waves,
        first.fibre_angles,
    )  # fmt: skip
    level = noise(0.25 * max(first.size_um))
    cut = np.quantile(level, kept) if 0 < kept < 1 else (math.inf if kept else -math.inf)
    names = [item.name for item in dataclasses.fields(Cells)]

    def chosen(cells: Cells, same: bool) -> dict[str, Any]:
        there = (sample(level, np.stack([cells.x, cells.y], -1)) < cut) == same
        return {name: getattr(cells, name)[there] for name in names}

    same, other = chosen(first.cells, True), chosen(new, False)
    cells = Cells(**{name: np.concatenate([same[name], other[name]]) for name in names})
    return dataclasses.replace(first, **fields, cells=cells)
