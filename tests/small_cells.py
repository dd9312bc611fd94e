"""Drawn HER2 tiles: cells of known place, staining and membrane; and real ones."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from hemera.config import MaskOptions
from hemera.imaging import color
from hemera.imaging.artefacts import artefact_pixels
from hemera.imaging.background import measure_background
from hemera.masks.label_format import Cells, Labelled, exclude
from hemera.masks.stain import Options, stains
from hemera.masks.stain.engine import StainEngine

RGB = npt.NDArray[np.uint8]

HAEMATOXYLIN = np.array(stains.HAEMATOXYLIN) / np.linalg.norm(stains.HAEMATOXYLIN)
DAB = np.array(stains.DAB) / np.linalg.norm(stains.DAB)
BACKGROUND = (250, 248, 246)
MEASURED = stains.Stains(BACKGROUND, estimated=("haematoxylin", "dab"))
"""Stains of a drawn tile, as if both vectors had been measured."""

SHARED = MaskOptions(engines={"stain": {}})

STRENGTHS = np.array(
    [[0.0, 0.15, 0.3, 0.6, 0.0], [0.6, 0.0, 0.0, 0.15, 0.3], [0.3, 0.6, 0.15, 0.0, 0.0]]
)


@dataclasses.dataclass
class Drawn:
    """A drawn tile, the centres of its cells and its nuclear pixels."""

    rgb: RGB
    x_px: npt.NDArray[np.float64]
    y_px: npt.NDArray[np.float64]
    nuclei: npt.NDArray[np.bool_]

    def matched(self, cells: Cells) -> npt.NDArray[np.int64]:
        """Return, for every drawn cell, the one found within 3 px, else -1."""
        apart = np.hypot(self.x_px[:, None] - cells.x_px, self.y_px[:, None] - cells.y_px)
        return np.where(apart.min(axis=1) < 3, apart.argmin(axis=1), -1)


def draw(
    strengths: npt.NDArray[np.float64],
    *,
    mpp: float = 0.5,
    arc: float = 1.0,
    background: tuple[int, int, int] = BACKGROUND,
    haematoxylin: npt.NDArray[np.float64] = HAEMATOXYLIN,
    dab: npt.NDArray[np.float64] = DAB,
    counterstain: float = 0.5,
) -> Drawn:
    """Draw rows x columns cells 22 um apart on a jittered grid.

    Nuclei have a radius of 4 um; membranes of the given strengths are 2 um further out, over `arc`
    of the circle.
    """
    rows, columns = strengths.shape
    pitch = 22.0
    height, width = (round(n * pitch / mpp) for n in (rows, columns))
    y, x = (np.mgrid[:height, :width] + 0.5) * mpp
    rng = np.random.default_rng(5)
    density_h, density_d = np.full((height, width), 0.03), np.full((height, width), 0.01)
    centres = []
    for i, j in np.ndindex(rows, columns):
        cy, cx = (np.array([i, j]) + 0.5) * pitch + rng.uniform(-1.5, 1.5, 2)
        radius = np.hypot(y - cy, x - cx)
        angle = (np.arctan2(y - cy, x - cx) + np.pi) / (2 * np.pi)
        density_h += counterstain * (radius < 4)
        density_d += strengths[i, j] * ((radius > 5) & (radius < 7) & (angle < arc))
        centres.append((cx / mpp, cy / mpp))
    blur = 0.3 / mpp
    density = (
        cv2.GaussianBlur(density_h, (0, 0), blur)[..., None] * haematoxylin
        + cv2.GaussianBlur(density_d, (0, 0), blur)[..., None] * dab
    )
    rgb = np.array(background) * 10**-density + rng.normal(0, 1.0, density.shape)
    places = np.array(centres)
    nuclei = density_h > counterstain / 2
    return Drawn(rgb.round().clip(0, 255).astype(np.uint8), places[:, 0], places[:, 1], nuclei)


def segment(
    rgb: RGB, mpp: float, of: stains.Stains, shared: MaskOptions = SHARED, **options: Any
) -> Labelled:
    """Label a tile by the engine `stain`, without its artefacts, as stage mask does."""
    artefacts = artefact_pixels(rgb, mpp, of.background)
    found = StainEngine(Options(**options), shared).segment(rgb, mpp, of, artefacts)
    return found if artefacts is None else exclude(found, artefacts)


def estimate(
    tiles: Sequence[RGB], mpp: float, background: color.Color | None = None
) -> stains.Stains:
    """Estimate the stains of tiles without their artefacts, as stage mask does."""
    background = background or measure_background(tiles, mpp).color
    return stains.estimate(
        tiles, mpp, background, [artefact_pixels(tile, mpp, background) for tile in tiles]
    )


def over(rgb: RGB, density: npt.ArrayLike) -> RGB:
    """Return a picture under something of a density that broadcasts to (H, W, 3)."""
    return (rgb * 10 ** -np.asarray(density)).round().clip(0, 255).astype(np.uint8)


def thirds(rgb: RGB) -> list[RGB]:
    """Cut a picture into three tiles."""
    return [np.ascontiguousarray(part) for part in np.array_split(rgb, 3, axis=1)]


def read(path: Path) -> RGB:
    """Read an image file."""
    found = cv2.imread(str(path))
    assert found is not None, path
    return np.ascontiguousarray(found[..., ::-1])
