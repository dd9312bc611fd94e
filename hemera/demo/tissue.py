"""Generates tissue: outline, epithelium, ducts and fat on a coarse grid; then its cells.

Everything is in um of the H&E frame, so that the same tissue is drawn at any resolution.
"""

import dataclasses
from collections.abc import Callable

import cv2
import numpy as np
import numpy.typing as npt

from hemera.demo.cells import EXPRESSION, Cells, place_cells
from hemera.demo.grid import GRID_UM, Array, hexagons, sample, signed_distance, smooth_noise


@dataclasses.dataclass(frozen=True)
class Tissue:
    """A piece of tissue: outlines as signed distances (um, positive inside) on the coarse grid."""

    size_um: tuple[float, float]
    score: str
    outline: Array
    epithelium: Array
    lumen: Array
    fat: Array
    loose: Array
    cleft: Array
    waves: Array
    fibre_angles: tuple[float, float]
    fat_seeds: Array
    cells: Cells
    tumour: npt.NDArray[np.bool_]
    """Malignant epithelium, on the coarse grid."""


def _without_crumbs(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Remove components of less than a fiftieth of the largest one."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    areas = stats[:, cv2.CC_STAT_AREA].copy()
    areas[0] = 0
    return np.asarray((areas > areas.max() / 50)[labels], dtype=bool)


def _glands(
    rng: np.random.Generator,
    shape: tuple[int, int],
    where: Array,
    size_um: tuple[float, float],
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Paint ducts with a lumen where `where` is positive; return their outer and lumen masks."""
    outer = np.zeros(shape, bool)
    lumen = np.zeros(shape, bool)
    ripple = smooth_noise(rng, shape, 36 / GRID_UM)
    centres = hexagons(rng, size_um, 125.0, 0.16)
    for (x, y), value in zip(centres, sample(where, centres), strict=True):
        radius = rng.uniform(26, 60)
        stretch = rng.uniform(0.7, 1.4)
        angle = rng.uniform(0, np.pi)
        wall = rng.uniform(11, 19)
        if value <= 0:
            continue
        reach = radius * 1.6
        j0, j1 = (int(np.clip((x + d) / GRID_UM, 0, shape[1])) for d in (-reach, reach))
        i0, i1 = (int(np.clip((y + d) / GRID_UM, 0, shape[0])) for d in (-reach, reach))
        i, j = np.mgrid[i0:i1, j0:j1]
        dx, dy = (j + 0.5) * GRID_UM - x, (i + 0.5) * GRID_UM - y
        u = (dx * np.cos(angle) + dy * np.sin(angle)) / stretch
        v = (-dx * np.sin(angle) + dy * np.cos(angle)) * stretch
        inside = radius - np.hypot(u, v) + 4.5 * ripple[i0:i1, j0:j1]
        outer[i0:i1, j0:j1] |= inside > 0
        lumen[i0:i1, j0:j1] &= inside < -4
        lumen[i0:i1, j0:j1] |= inside > wall + 2 * ripple[i0:i1, j0:j1]
    return outer, lumen


def grow(
    rng: np.random.Generator,
    size_um: tuple[float, float],
    score: str,
    *,
    whole: bool,
    empty: bool = False,
    expression: npt.ArrayLike | None = None,
    visibility: float = 1.0,
) -> Tissue:
    """Grow one tissue.

    Args:
        rng: every choice is drawn from it.
        size_um: width and height of the H&E image.
        score: HER2 score of the slide, or ultralow.
        whole: a whole section with background around it; else tissue from edge to edge.
        empty: almost only background.
        expression: fractions of tumour cells of intensity 0, 1, 2, 3; None: those of the score.
        visibility: how far the look of tumour cells in H&E depends on their HER2, 0 to 1.
    """
    shape = (int(np.ceil(size_um[1] / GRID_UM)), int(np.ceil(size_um[0] / GRID_UM)))
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float32)
    x = (x + 0.5) * GRID_UM - size_um[0] / 2
    y = (y + 0.5) * GRID_UM - size_um[1] / 2

    def noise(wavelength_um: float) -> Array:
        return smooth_noise(rng, shape, wavelength_um / GRID_UM)

    outline = _outline(rng, noise, x, y, size_um, whole=whole, empty=empty)
    fields, nests, bed = _regions(rng, noise, outline, size_um, whole=whole)
    loose = (0.8 * noise(300) + 0.5 * noise(90)).astype(np.float32)
    cleft = (0.9 * noise(130) + 0.4 * noise(40) - 0.35).astype(np.float32)
    angles = (rng.uniform(0, np.pi), rng.uniform(0.9, 1.9))
    fibre_angles = (angles[0], angles[0] + angles[1])
    # Displacements (x, y) that bend the fibres, and which of two families is on top.
    waves = np.stack(
        [
            26 * noise(330) + 7 * noise(95) + 2.2 * noise(34),
            26 * noise(330) + 7 * noise(95) + 2.2 * noise(34),
            1.6 * noise(200),
        ],
        axis=-1,
    ).astype(np.float32)
    # Ducts inside the bed are malignant; elsewhere they are normal glands.
    malignant = np.where(nests, 1.0, bed + 0.15).astype(np.float32)
    latent = (0.85 * noise(300) + 0.45 * noise(95)).astype(np.float32)
    fractions = EXPRESSION[score] if expression is None else expression
    cells = place_cells(
        rng, size_um, fractions, fields, nests, malignant, latent, noise(210), waves, fibre_angles,
        visibility,
    )  # fmt: skip
    fat_seeds = hexagons(rng, size_um, 58.0, 0.17).astype(np.float32)
    return Tissue(
        size_um,
        score,
        **fields,
        loose=loose,
        cleft=cleft,
        waves=waves,
        fibre_angles=fibre_angles,
        fat_seeds=fat_seeds,
        cells=cells,
        tumour=(fields["epithelium"] > 0) & (malignant > 0),
    )


def _outline(
    rng: np.random.Generator,
    noise: Callable[[float], Array],
    x: Array,
    y: Array,
    size_um: tuple[float, float],
    *,
    whole: bool,
    empty: bool,
) -> npt.NDArray[np.bool_]:
    """Return where there is tissue on the coarse grid; `x`, `y` are um from the centre."""
    rough = 0.075 * noise(900) + 0.03 * noise(240) + 0.010 * noise(60) + 0.006 * noise(20)
    if empty:
        return np.asarray((x / size_um[0] - 0.8 * y / size_um[1] - 0.62 + 0.5 * rough) > 0)
    if not whole:
        return np.asarray((noise(260) + 0.5 * noise(70)) > -2.9)
    u, v = np.abs(x / (0.465 * size_um[0])), np.abs(y / (0.455 * size_um[1]))
    radius = u * u * np.sqrt(u) + v * v * np.sqrt(v)
    edge = np.minimum(size_um[0] / 2 - np.abs(x), size_um[1] / 2 - np.abs(y))
    # A notch and a tear, so that no section equals its own mirror image.
    turn = rng.uniform(0, 2 * np.pi)
    nx, ny = 0.42 * size_um[0] * np.cos(turn), 0.42 * size_um[1] * np.sin(turn)
    notch = 1 / (1 + ((x - nx) / 380) ** 2 + ((y - ny) / 300) ** 2) ** 2
    level = 0.97 - np.sqrt(radius) + rough - 0.35 * notch
    outline = (level > 0) & (edge > 45)
    tear = np.abs(noise(420) - 0.25) - 0.02
    return _without_crumbs(outline & ((tear > 0) | (noise(700) < 0.9)))


def _regions(
    rng: np.random.Generator,
    noise: Callable[[float], Array],
    outline: npt.NDArray[np.bool_],
    size_um: tuple[float, float],
    *,
    whole: bool,
) -> tuple[dict[str, Array], npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """Return signed distances of the regions, the nests of tumour, and the tumour bed's level."""
    bed = noise(760 if whole else 420) + 0.35 * noise(220) + (0.35 if whole else 0.55)
    fat_level = noise(620 if whole else 330) + 0.3 * noise(120) - (1.35 if whole else 1.6) - bed
    fat = (fat_level > 0) & outline
    nest_level = (
        noise(150)
        + 0.55 * noise(62)
        + 0.22 * noise(26)
        + 0.6 * (bed - 0.3) / (1 + np.abs(bed - 0.3))
        - 0.25
    )
    nests = (nest_level > 0) & (bed > 0) & (fat_level < -0.15)
    ducts, lumens = _glands(
        rng, outline.shape, np.where(fat_level < -0.3, noise(340) - 0.45, -1), size_um
    )
    nests &= cv2.dilate(ducts.astype(np.uint8), np.ones((5, 5), np.uint8)) == 0
    epithelium = (nests | ducts) & outline
    lumen = lumens & outline
    fields = {
        "outline": signed_distance(outline),
        "epithelium": signed_distance(epithelium),
        "lumen": signed_distance(lumen),
        "fat": signed_distance(fat & ~epithelium),
    }
    return fields, nests, bed
