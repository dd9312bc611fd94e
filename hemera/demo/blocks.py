"""Blocks of synthetic tissue from which images of nuclei for training are cut."""

import dataclasses

import cv2
import numpy as np
import numpy.typing as npt

from hemera.demo.grid import GRID_UM, Array
from hemera.demo.render import FAT_STEPS, TEXTURE_PX, Renderer, ramp, rasterise, texture
from hemera.demo.tissue import Tissue, grow
from hemera.demo.variants import Geometry
from hemera.sheet import SCORES

BLOCK_UM = 448.0
"""Side of a block."""
BLOCK_MPP = 0.5

_SIGMAS_UM = (0.5, 0.9, 1.6, 3.0, 6.0, 14.0, 30.0)


@dataclasses.dataclass(frozen=True)
class Block:
    """One piece of tissue; all arrays (H, W) at `BLOCK_MPP` but those of `tissue`."""

    tissue: Tissue
    cell: npt.NDArray[np.int32]
    maps: Array
    """(H, W, 4): distance to the border of a cell (um), fibres and matter of the stroma, walls of
    fat cells."""
    textures: tuple[Array, ...]
    """Periodic noise of mean 0 and variance 1, by ascending size."""


@dataclasses.dataclass(frozen=True)
class Structures:
    """Structures at the pixels of one image: all (side, side), lengths in um of the image."""

    cell: npt.NDArray[np.int32]
    dx: Array
    """From the centre of its cell, along the axes of the block."""
    dy: Array
    x: Array
    """From the centre of the image, bent like the tissue."""
    y: Array
    border: Array
    depth: Array
    epithelium: Array
    stroma: Array
    fibres: Array
    walls: Array
    tissue: Array


def grow_block(rng: np.random.Generator) -> Block:
    """Grow one block of a random HER2 score."""
    size_um = (BLOCK_UM, BLOCK_UM)
    side = round(BLOCK_UM / BLOCK_MPP)
    tissue = grow(rng, size_um, str(rng.choice(list(SCORES))), whole=False)
    raster = rasterise(tissue, BLOCK_MPP, (side, side))
    fibres, matter = Renderer(tissue, raster, rng).stroma(slice(0, side))
    walls = np.zeros_like(fibres)
    if raster.fat is not None:
        walls = ramp(np.float32(2.5) - raster.fat * np.float32(1 / FAT_STEPS), 1.2)
    maps = np.dstack([raster.border_um, fibres, matter, walls])
    textures = tuple(texture(rng, sigma / 0.5, sigma / 0.5) for sigma in _SIGMAS_UM)
    return Block(tissue, raster.labels, np.ascontiguousarray(maps, np.float32), textures)


def noise(rng: np.random.Generator, block: Block, side: int, mpp: float, sigma_um: float) -> Array:
    """Return noise (side, side) of mean 0 and variance 1 whose detail is about `sigma_um`."""
    # The textures have 0.5 um a pixel: another size of pixel scales them.
    sigmas = np.array(_SIGMAS_UM) * mpp / 0.5
    chosen = int(np.argmin(np.abs(np.log(sigmas / sigma_um))))
    row, column = rng.integers(0, TEXTURE_PX - side + 1, 2)
    part = block.textures[chosen][row : row + side, column : column + side]
    return part.T if rng.random() < 0.5 else part


def look_at(
    rng: np.random.Generator, block: Block, geometry: Geometry, side: int, mpp: float
) -> Structures:
    """Return the structures of a random part of a block.

    Args:
        rng: draws the place and the bends.
        block: the tissue.
        geometry: scale, rotation, deformation.
        side: of the image, px.
        mpp: of the image, um/px.
    """
    axis = (np.arange(side, dtype=np.float32) + np.float32(0.5 - side / 2)) * np.float32(mpp)
    x, y = (np.asarray(value, np.float32) for value in np.meshgrid(axis, axis))
    for wavelength, amplitude in geometry.bends_um:
        x = x + np.float32(amplitude) * noise(rng, block, side, mpp, wavelength)
        y = y + np.float32(amplitude) * noise(rng, block, side, mpp, wavelength)
    c, s = np.cos(geometry.angle), np.sin(geometry.angle)
    mirror = -1 if geometry.mirrored else 1
    wide, high = geometry.stretch**0.5 / geometry.scale, geometry.stretch**-0.5 / geometry.scale
    forward = np.array([[c * wide * mirror, -s * high], [s * wide * mirror, c * high]], np.float32)
    # Mostly the part with most epithelium of four, so that few images are empty.
    reach = side * mpp * 0.75 * max(wide, high)
    places = rng.uniform(reach, BLOCK_UM - reach, (4, 2))
    depths = [_at(block.tissue.epithelium, place) for place in places]
    x0, y0 = places[int(np.argmax(depths))] if rng.random() < 0.7 else places[0]
    bx = forward[0, 0] * x + forward[0, 1] * y + np.float32(x0)
    by = forward[1, 0] * x + forward[1, 1] * y + np.float32(y0)
    return _structures(block, geometry.scale, x, y, bx, by)


def _at(field: Array, place: npt.NDArray[np.float64]) -> float:
    j, i = (place / GRID_UM).astype(int)
    return float(field[min(i, field.shape[0] - 1), min(j, field.shape[1] - 1)])


def _structures(block: Block, scale: float, x: Array, y: Array, bx: Array, by: Array) -> Structures:
    """Return the structures at the points (bx, by) of a block, um."""
    tissue, cells = block.tissue, block.tissue.cells
    grow_by = np.float32(scale)
    map_x, map_y = (v * np.float32(1 / BLOCK_MPP) - np.float32(0.5) for v in (bx, by))
    side = len(block.cell)
    column, row = (np.clip(np.rint(v), 0, side - 1).astype(np.intp) for v in (map_x, map_y))
    cell = block.cell[row, column]
    border, fibres, matter, walls = _read(block.maps, map_x, map_y)
    regions = np.dstack([tissue.outline, tissue.epithelium, tissue.lumen, tissue.fat])
    outline, depth, lumen, fat = _read(
        np.ascontiguousarray(regions),
        bx * np.float32(1 / GRID_UM) - np.float32(0.5),
        by * np.float32(1 / GRID_UM) - np.float32(0.5),
    )
    present = ramp(outline, 2.5) * (1 - ramp(lumen, 1.8))
    epithelium = ramp(depth, 2.0) * present
    fatty = ramp(fat, 9.0)
    return Structures(
        cell,
        (bx - cells.x[cell]) * grow_by,
        (by - cells.y[cell]) * grow_by,
        x,
        y,
        border * grow_by,
        depth * grow_by,
        epithelium,
        present * (1 - epithelium) * (1 - fatty) * matter,
        fibres,
        walls * fatty * present * (1 - epithelium),
        present * (1 - fatty),
    )


def _read(maps: Array, map_x: Array, map_y: Array) -> tuple[Array, ...]:
    """Return maps (H, W, K) bilinearly at some pixels."""
    found = cv2.remap(maps, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return tuple(np.asarray(one, np.float32) for one in cv2.split(found))
