"""Stains and images a tissue: stain amounts per pixel, Beer-Lambert's law, optics, camera.

A slide is drawn in bands of rows, so that what is computed stays in the processor's cache and a
slide costs little more memory than its own pixels.
"""

from __future__ import annotations

import dataclasses
import math

import cv2
import numpy as np
import numpy.typing as npt
import scipy.fft

from hemera.demo.cells import EPITHELIUM, LYMPHOCYTE, SPINDLE, TUMOUR, Cells
from hemera.demo.grid import GRID_UM, Array
from hemera.demo.tissue import Tissue

Image = npt.NDArray[np.uint8]

# Natural-log optical density per unit of stain, RGB.
HAEMATOXYLIN = np.array([0.66, 0.68, 0.31], np.float32)
EOSIN = np.array([0.12, 0.80, 0.36], np.float32)
COUNTERSTAIN = np.array([0.72, 0.56, 0.33], np.float32)
DAB = np.array([0.31, 0.58, 0.78], np.float32)

BAND_ROWS = 64
TEXTURE_PX = 1024
FAT_STEPS = 30
DIRECTIONS = 24
CYTOPLASM_UM = 4.0


@dataclasses.dataclass(frozen=True)
class Appearance:
    """Appearance of one scan: background colour, strength of the stains, grain."""

    background: tuple[int, int, int]
    first: float = 1.0
    second: float = 1.0
    grain: float = 0.8
    blur_px: float = 0.45


@dataclasses.dataclass(frozen=True)
class Densities:
    """DAB of cells in decimal optical density along its unit vector; (N,), NaN without a pixel.

    `membrane` is the mean over `DIRECTIONS` around the cell of the largest DAB that the membrane
    adds there, 0 where there is none; `cytoplasm` the mean without membranes outside of the
    nucleus, up to `CYTOPLASM_UM` from it, within epithelium; `nucleus` that inside.
    """

    membrane: npt.NDArray[np.float64]
    cytoplasm: npt.NDArray[np.float64]
    nucleus: npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Raster:
    """Which cell a pixel is nearest to, and how far the border to the next cell is.

    `fat` is how far the wall of a fat cell is, in steps of 1 / FAT_STEPS um, up to 8 um.
    """

    mpp: float
    size_px: tuple[int, int]
    labels: npt.NDArray[np.int32]
    border_um: Array
    fat: npt.NDArray[np.uint8] | None


def _voronoi(
    x_um: Array, y_um: Array, mpp: float, size_px: tuple[int, int]
) -> tuple[npt.NDArray[np.int32], Array]:
    """Return the index of the nearest seed (H, W) and the distance to the nearest border, um."""
    width, height = size_px
    seeds = np.full((height, width), 255, np.uint8)
    j = np.clip((x_um / mpp).astype(np.int64), 0, width - 1)
    i = np.clip((y_um / mpp).astype(np.int64), 0, height - 1)
    seeds[i, j] = 0
    _, labels = cv2.distanceTransformWithLabels(
        seeds, cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    lookup = np.zeros(int(labels.max()) + 1, np.int32)
    lookup[labels[i, j]] = np.arange(len(x_um), dtype=np.int32)
    nearest = lookup[labels]
    inner = np.full((height, width), 255, np.uint8)
    across = nearest[:, 1:] != nearest[:, :-1]
    down = nearest[1:] != nearest[:-1]
    inner[:, 1:][across] = 0
    inner[:, :-1][across] = 0
    inner[1:][down] = 0
    inner[:-1][down] = 0
    distance = cv2.distanceTransform(inner, cv2.DIST_L2, cv2.DIST_MASK_5)
    return nearest, np.asarray((distance + np.float32(0.5)) * np.float32(mpp), dtype=np.float32)


def rasterise(tissue: Tissue, mpp: float, size_px: tuple[int, int]) -> Raster:
    """Divide the H&E frame among the cells of a tissue, at `mpp`, once for both stains."""
    cells = tissue.cells
    labels, border = _voronoi(cells.x, cells.y, mpp, size_px)
    fat = None
    if (tissue.fat > 0).any():
        _, distance = _voronoi(tissue.fat_seeds[:, 0], tissue.fat_seeds[:, 1], mpp, size_px)
        # Blurred distances round the corners of the polygons: fat cells are round. In bytes,
        # because only there OpenCV's blur is exact.
        near = np.rint(np.clip(distance, 0, 8) * FAT_STEPS).astype(np.uint8)
        fat = np.asarray(cv2.GaussianBlur(near, (0, 0), 2.6 / mpp), dtype=np.uint8)
    return Raster(mpp, size_px, labels, border, fat)


def texture(rng: np.random.Generator, sigma_x: float, sigma_y: float) -> Array:
    """Return a periodic texture (1024, 1024) of mean 0 and variance 1."""
    noise = rng.standard_normal((TEXTURE_PX, TEXTURE_PX), dtype=np.float32)
    x = scipy.fft.rfftfreq(TEXTURE_PX).astype(np.float32) * np.float32(sigma_x)
    y = scipy.fft.fftfreq(TEXTURE_PX).astype(np.float32) * np.float32(sigma_y)
    response = np.exp(np.float32(-2 * np.pi**2) * (x * x + (y * y)[:, None]))
    part = scipy.fft.irfft2(scipy.fft.rfft2(noise) * response, s=noise.shape)
    return np.asarray((part - part.mean()) / part.std(), dtype=np.float32)


def ramp(x: Array, width: float) -> Array:
    """Return 0 below -width/2, 1 above width/2, a straight line between."""
    ramp: Array = np.clip(x * np.float32(1 / width) + np.float32(0.5), 0, 1)
    return ramp


def _bump(x: Array, width: float) -> Array:
    """Return a bell of x."""
    bell: Array = np.exp(-np.square(x * np.float32(1 / width)))
    return bell


class Renderer:
    """Draws one tissue at one resolution, in either stain, in the H&E frame."""

    def __init__(self, tissue: Tissue, raster: Raster, rng: np.random.Generator) -> None:
        """Draw from `rng` the textures common to both sections and those of each."""
        self.tissue = tissue
        self.raster = raster
        mpp = raster.mpp
        fine, coarse = 0.55 / mpp, 1.5 / mpp
        # Shared by both sections: what spans them. The rest is drawn per section.
        self._fibres = (
            texture(rng, 7.5 / 0.5, 0.8 / 0.5),
            texture(rng, 5 / 0.5, 1.2 / 0.5),
        )
        self._clumps = texture(rng, 3.2 / mpp, 3.2 / mpp)
        self._bend = (texture(rng, 2.6 / mpp, 2.6 / mpp), texture(rng, 2.6 / mpp, 2.6 / mpp))
        self._sections = {
            stain: (texture(rng, fine, fine), texture(rng, coarse, coarse), rng.integers(2**31))
            for stain in ("he", "her2")
        }
        stack = np.stack([tissue.outline, tissue.epithelium, tissue.lumen, tissue.fat], axis=-1)
        self._regions = np.ascontiguousarray(stack)
        self._moods = np.dstack([tissue.loose, tissue.cleft, tissue.waves[..., 2]])
        self._bends = np.ascontiguousarray(tissue.waves[..., :2])

    def _jitter(self, stain: str) -> _Jitter:
        return _jitter(self.tissue, np.random.default_rng(self._sections[stain][2]))

    def draw(self, stain: str, look: Appearance) -> Image:
        """Return the image of the section, (H, W, 3) uint8, without grain."""
        width, height = self.raster.size_px
        image = np.empty((height, width, 3), np.uint8)
        jitter = self._jitter(stain)
        if stain == "he":
            vectors = np.stack([HAEMATOXYLIN * look.first, EOSIN * look.second])
        else:
            vectors = np.stack([COUNTERSTAIN * look.first, DAB * look.second])
        background = np.array(look.background, np.float32)
        for top in range(0, height, BAND_ROWS):
            rows = slice(top, min(top + BAND_ROWS, height))
            first, second, _ = self._stains(stain, rows, self._scene(rows, jitter), jitter)
            for channel in range(3):
                density = first * vectors[0, channel] + second * vectors[1, channel]
                image[rows, :, channel] = np.exp(-density) * background[channel] + np.float32(0.5)
        if look.blur_px:
            image = np.asarray(cv2.GaussianBlur(image, (0, 0), look.blur_px), dtype=np.uint8)
        return image

    def labels(self) -> npt.NDArray[np.uint8]:
        """Return the true label image on the H&E grid, in the format of HEMERA's masks.

        Bits 0-1: 0 background, 1 negative cell, 2 positive cell; bit 2: nucleus; bits 3-4: DAB
        intensity. A cell of epithelium is all that is nearest to it, any other its nucleus.
        """
        width, height = self.raster.size_px
        image = np.zeros((height, width), np.uint8)
        cells = self.tissue.cells
        body = np.isin(cells.kind, (EPITHELIUM, TUMOUR))
        still = _Jitter(np.zeros((len(cells), 2), np.float32), np.ones((len(cells), 2), np.float32))
        for top in range(0, height, BAND_ROWS):
            rows = slice(top, min(top + BAND_ROWS, height))
            scene = self._scene(rows, still)
            nucleus = scene.radius < 1
            within = body[scene.cell] & (scene.epithelium > 0.5) & (scene.lumen < 0.5)
            intensity = cells.intensity[scene.cell]
            value = np.where(intensity > 0, 2, 1) + (intensity << 3)
            value = np.where(nucleus | within, value, 0) + np.where(nucleus, 4, 0)
            image[rows] = np.where(scene.tissue > 0.5, value, 0)
        return image

    def densities(self, look: Appearance) -> Densities:
        """Return the DAB that each cell of the HER2 section was drawn with."""
        count = len(self.tissue.cells)
        peaks = np.zeros(count * DIRECTIONS, np.float32)
        sums, pixels = np.zeros((2, 2, count))
        jitter = self._jitter("her2")
        for top in range(0, self.raster.size_px[1], BAND_ROWS):
            rows = slice(top, min(top + BAND_ROWS, self.raster.size_px[1]))
            scene = self._scene(rows, jitter)
            _, dab, membrane = self._stains("her2", rows, scene, jitter)
            turn = np.arctan2(scene.dy, scene.dx) / (2 * np.pi) % 1
            direction = np.minimum(turn * DIRECTIONS, DIRECTIONS - 1).astype(np.intp)
            np.maximum.at(peaks, scene.cell * DIRECTIONS + direction, membrane)
            nucleus = scene.radius < 1
            around = (scene.radius - 1) * scene.short <= CYTOPLASM_UM
            for k, where in enumerate((~nucleus & around & (scene.epithelium > 0.5), nucleus)):
                of = scene.cell[where]
                sums[k] += np.bincount(of, (dab - membrane)[where], count)
                pixels[k] += np.bincount(of, minlength=count)
        scale = look.second * float(np.linalg.norm(DAB)) / math.log(10)
        membranes = peaks.reshape(count, DIRECTIONS).mean(axis=1, dtype=np.float64)
        with np.errstate(invalid="ignore"):
            return Densities(membranes * scale, *(sums / pixels * scale))

    def _coarse(self, field: Array, rows: slice) -> Array:
        """Read fields of the coarse grid at the pixels of a band, bilinearly."""
        mpp = self.raster.mpp
        x = (np.arange(self.raster.size_px[0], dtype=np.float32) + 0.5) * mpp / GRID_UM - 0.5
        y = (np.arange(rows.start, rows.stop, dtype=np.float32) + 0.5) * mpp / GRID_UM - 0.5
        map_x, map_y = np.meshgrid(x, y)
        values = cv2.remap(field, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        return np.asarray(values, dtype=np.float32)

    def _tiled(self, texture: Array, rows: slice, shift: int = 0) -> Array:
        """Return a band of a periodic texture."""
        i = (np.arange(rows.start, rows.stop) + 7 * shift) % TEXTURE_PX
        j = (np.arange(self.raster.size_px[0]) + 13 * shift) % TEXTURE_PX
        band: Array = texture[np.ix_(i, j)]
        return band

    def _scene(self, rows: slice, jitter: _Jitter) -> _Scene:
        """Return the structures at the pixels of a band, before any stain."""
        raster, cells = self.raster, self.tissue.cells
        width, height = raster.size_px
        mpp = np.float32(raster.mpp)
        regions = self._coarse(self._regions, rows)
        bend_x = self._tiled(self._bend[0], rows) * np.float32(0.42)
        bend_y = self._tiled(self._bend[1], rows) * np.float32(0.42)
        j = np.arange(width, dtype=np.float32)[None, :]
        i = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None]
        map_x, map_y = j + bend_x / mpp, i + bend_y / mpp
        column = np.clip(np.rint(map_x), 0, width - 1).astype(np.intp)
        row = np.clip(np.rint(map_y), 0, height - 1).astype(np.intp)
        cell = raster.labels[row, column]
        border = cv2.remap(
            raster.border_um, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        dx = (map_x + np.float32(0.5)) * mpp - (cells.x + jitter.offset[:, 0])[cell]
        dy = (map_y + np.float32(0.5)) * mpp - (cells.y + jitter.offset[:, 1])[cell]
        cosine, sine = np.cos(cells.angle)[cell], np.sin(cells.angle)[cell]
        short = (cells.short_radius * jitter.size[:, 0])[cell]
        long = (cells.long_radius * jitter.size[:, 0])[cell]
        radius = np.hypot((dx * cosine + dy * sine) / long, (dy * cosine - dx * sine) / short)
        tissue = ramp(regions[..., 0], 2.5)
        lumen = ramp(regions[..., 2], 1.8)
        return _Scene(
            cell,
            dx,
            dy,
            radius,
            short,
            np.asarray(border, dtype=np.float32),
            tissue,
            regions[..., 1],
            ramp(regions[..., 1], 2.0) * (1 - lumen) * tissue,
            lumen * tissue,
            ramp(regions[..., 3], 9.0),
        )

    def stroma(self, rows: slice) -> tuple[Array, Array]:
        """Return fibres (about 0 to 1) and the fraction of matter (gaps are 0) of the stroma."""
        mpp = self.raster.mpp
        bends = self._coarse(self._bends, rows)
        moods = self._coarse(self._moods, rows)
        x = (np.arange(self.raster.size_px[0], dtype=np.float32) + 0.5) * mpp + bends[..., 0]
        y = ((np.arange(rows.start, rows.stop, dtype=np.float32) + 0.5) * mpp)[:, None]
        y = y + bends[..., 1]
        upper = ramp(moods[..., 2], 0.8)
        fibres = np.zeros_like(upper)
        for angle, fibre, weight in zip(
            self.tissue.fibre_angles, self._fibres, (upper, 1 - upper), strict=True
        ):
            c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
            # The textures have 0.5 um a pixel; 512 um later they repeat, bent otherwise.
            u, v = (x * c + y * s) * 2, (y * c - x * s) * 2
            fibres += weight * cv2.remap(
                fibre,
                u % TEXTURE_PX,
                v % TEXTURE_PX,
                cv2.INTER_LINEAR,
                borderMode=cv2.BORDER_WRAP,
            )
        matter = ramp(fibres + np.float32(1.35) - np.float32(0.95) * moods[..., 0], 0.9)
        return np.clip(np.float32(0.5) + np.float32(0.27) * fibres, 0, 1.4), matter

    def _stains(
        self, stain: str, rows: slice, scene: _Scene, jitter: _Jitter
    ) -> tuple[Array, Array, Array]:
        """Return the amounts of both stains in a band of rows, and of DAB that of membranes."""
        cells = self.tissue.cells
        fine_texture, coarse_texture, _ = self._sections[stain]
        fine, grains = self._tiled(fine_texture, rows), self._tiled(coarse_texture, rows)
        clumps = self._tiled(self._clumps, rows)
        fibres, matter = self.stroma(rows)
        fibres = fibres * (1 + np.float32(0.10) * grains)
        cleft = self._coarse(self._moods, rows)[..., 1]
        gap = _bump(scene.depth + np.float32(2.6), 1.7) * ramp(cleft, 0.5)
        gap *= 1 - scene.epithelium
        stroma = scene.tissue * (1 - scene.epithelium) * (1 - scene.lumen) * (1 - gap)
        wall: Array = np.zeros_like(stroma)
        if self.raster.fat is not None:
            fat = self.raster.fat[rows] * np.float32(1 / FAT_STEPS)
            wall = scene.fat * scene.tissue * ramp(np.float32(2.5) - fat, 1.2)
        stroma = stroma * (1 - scene.fat) * matter + wall * np.float32(0.75)

        cell = scene.cell
        kind = cells.kind[cell]
        nucleus, chromatin, spot = _nuclei(cells, scene, jitter, fine, grains)
        tumour = kind == TUMOUR
        owned = tumour | (kind == EPITHELIUM)
        cytoplasm = np.where(owned, cells.cytoplasm[cell], np.float32(0.3))
        cytoplasm = cytoplasm * scene.epithelium * (1 - np.float32(0.55) * nucleus)
        cytoplasm *= np.clip(1 + np.float32(0.20) * grains + np.float32(0.16) * clumps, 0.3, 2)
        border = np.minimum(scene.border, np.abs(scene.depth) + np.float32(0.3))
        if stain == "he":
            line = _bump(border, 0.8) * scene.epithelium
            base = np.where(tumour, np.float32(0.26), np.float32(0.20))
            first = nucleus * chromatin + spot * np.float32(0.55)
            first += base * (1 - nucleus) * scene.epithelium * (1 + np.float32(0.2) * clumps)
            first += np.float32(0.045) * stroma
            second = np.float32(0.66) * stroma * fibres + cytoplasm * np.float32(1.0)
            second += np.float32(0.12) * line + np.float32(0.34) * spot + np.float32(0.10) * nucleus
            # A veil of secretion in some lumens.
            second += scene.lumen * ramp(clumps + cleft - 1, 1.5) * np.float32(0.22)
            red = (kind == SPINDLE) | (kind == LYMPHOCYTE)
            second += np.float32(0.12) * _bump(scene.radius - np.float32(1.25), 0.3) * red * stroma
            return np.maximum(first, 0), np.maximum(second, 0), np.zeros_like(first)

        first = nucleus * (np.float32(0.12) + np.float32(0.50) * chromatin)
        first += np.float32(0.075) * scene.epithelium * (1 + np.float32(0.3) * clumps)
        first += stroma * (np.float32(0.09) + np.float32(0.15) * fibres)
        intensity = cells.intensity[cell]
        strength = np.array([0.0, 0.27, 0.62, 1.30], np.float32)[intensity]
        blush = np.array([0.035, 0.085, 0.15, 0.30], np.float32)[intensity]
        width = np.array([0.8, 0.8, 1.0, 1.3], np.float32)[intensity]
        # Faint rings have holes, strong ones none: clumps of a few um open them.
        hole = np.array([0.0, 0.25, 1.15, 3.0], np.float32)[intensity]
        ring = np.exp(-np.square(np.maximum(border - np.float32(0.3), 0) / width))
        ring *= ramp(clumps + hole + np.float32(0.15) * grains, 0.7)
        ring *= np.clip(1 + np.float32(0.16) * grains, 0.4, 1.6)
        near = np.float32(8.5) + np.float32(0.35) * intensity
        reach = ramp(near - np.hypot(scene.dx, scene.dy), 2.0)
        membrane = np.where(tumour, strength * ring * reach, np.float32(0.0))
        body = membrane + np.where(owned, blush, np.float32(0.02)) * (1 - np.float32(0.6) * nucleus)
        second = body * scene.epithelium + np.float32(0.06) * stroma * fibres
        second += np.float32(0.015) * nucleus
        return np.maximum(first, 0), np.maximum(second, 0), membrane * scene.epithelium


@dataclasses.dataclass(frozen=True)
class _Jitter:
    """What differs from section to section: offsets (N, 2) in um; size and presence (N, 2)."""

    offset: Array
    size: Array


@dataclasses.dataclass(frozen=True)
class _Scene:
    """Structures at the pixels of a band of rows: all (rows, width), lengths in um."""

    cell: npt.NDArray[np.int32]
    dx: Array
    dy: Array
    radius: Array
    short: Array
    border: Array
    tissue: Array
    depth: Array
    epithelium: Array
    lumen: Array
    fat: Array


def _nuclei(
    cells: Cells, scene: _Scene, jitter: _Jitter, fine: Array, grains: Array
) -> tuple[Array, Array, Array]:
    """Return presence of a nucleus, its chromatin and its nucleolus in a band of rows."""
    cell = scene.cell
    nucleus = ramp((1 - scene.radius) * scene.short, 0.9) * scene.tissue
    nucleus *= jitter.size[:, 1][cell]
    vesicular = cells.vesicular[cell]
    rim = _bump((scene.radius - np.float32(0.86)) * scene.short, 0.75)
    inside = 1 - np.float32(0.50) * vesicular + np.float32(0.62) * vesicular * rim
    chromatin = cells.chromatin[cell] * inside
    chromatin *= np.clip(1 + np.float32(0.20) * fine + np.float32(0.20) * grains, 0.3, 1.9)
    # Each nucleolus is off the centre, in a direction that depends on the cell's angle.
    x0 = np.float32(1.3) * np.cos(7 * cells.angle)
    y0 = np.float32(1.3) * np.sin(11 * cells.angle)
    spot = _bump(np.hypot(scene.dx - x0[cell], scene.dy - y0[cell]), 0.95)
    spot *= np.clip(cells.nucleolus[cell], 0, 1.2) * nucleus
    return nucleus, chromatin, spot


def _jitter(tissue: Tissue, rng: np.random.Generator) -> _Jitter:
    """Move, resize, fade and lose nuclei independently of the other section."""
    count = len(tissue.cells)
    offset = np.clip(rng.normal(0, 0.45, (count, 2)), -1.2, 1.2)
    size = np.stack([np.exp(rng.normal(0, 0.06, count)), np.exp(rng.normal(0, 0.10, count))], -1)
    size[rng.random(count) < 0.05, 1] = 0
    return _Jitter(offset.astype(np.float32), size.astype(np.float32))
