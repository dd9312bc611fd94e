"""Overlapping tiles of a map, blended into rows."""

import dataclasses

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

OVERLAP = 0.25
"""Fraction of a tile's side that overlaps the next. A network lacks context at the edges of a tile:
against a tile of 1024 px, the demo's is off by 0.07 in the outer 8 px, by 0.006 from 32 px on, by
0.001 from 64 px on, where neighbours of 512 px have equal weight."""

BAND_PX = 128
"""Rows that are blended at once; a multiple of it is a row of stored tiles."""

DECIMALS = 5
"""Of a probability; larger than the rounding error of the blend."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """The pixels of a map, from the slide's top-left corner."""

    mpp: float
    scale: float
    """Level-0 pixels of the slide per pixel of the map."""
    size_px: tuple[int, int]
    """(width, height)."""
    tile_px: int

    @property
    def overlap_px(self) -> int:
        """How far a tile reaches into the next."""
        return round(OVERLAP * self.tile_px)

    def starts(self, axis: int) -> list[int]:
        """Return where tiles begin along x (0) or y (1); the last ends at the map's edge."""
        last = max(0, self.size_px[axis] - self.tile_px)
        return [*range(0, last, self.tile_px - self.overlap_px), last]


class Blend:
    """Blends tiles, band by band; only the bands that tiles still reach are in memory.

    The weight of a tile is a raised cosine along both axes: 1 in its middle, almost 0 at its edges.
    The value of a pixel is the weighted mean of the tiles that cover it.
    """

    def __init__(self, grid: Grid) -> None:
        """Start without tiles."""
        self._size_px = grid.size_px
        ramp = (1 - np.cos(np.pi * (np.arange(grid.overlap_px) + 0.5) / grid.overlap_px)) / 2
        side = np.ones(grid.tile_px)
        side[: len(ramp)] = ramp
        side[len(side) - len(ramp) :] = ramp[::-1]
        self._window: Float = np.outer(side, side).astype(np.float32)
        # Of each band the weighted sum and the sum of weights, (2, H, width).
        self._bands: dict[int, Float] = {}

    def add(self, x: int, y: int, probability: Float) -> None:
        """Add a tile (H, W) at (x, y) of the map; what reaches beyond the map is dropped."""
        width, height = self._size_px
        window = self._window[: height - y, : width - x]
        rows, columns = window.shape
        tile = np.stack([probability[:rows, :columns] * window, window])
        for band in range(y // BAND_PX, -(-(y + rows) // BAND_PX)):
            top = band * BAND_PX
            if band not in self._bands:
                shape = (2, min(BAND_PX, height - top), width)
                self._bands[band] = np.zeros(shape, np.float32)
            begin, end = max(top, y), min(top + BAND_PX, y + rows)
            place = np.s_[:, begin - top : end - top, x : x + columns]
            self._bands[band][place] += tile[:, begin - y : end - y]

    def take(self, band: int) -> tuple[Float, Mask]:
        """Release a band that no further tile reaches: its probabilities, where tiles cover it."""
        width, height = self._size_px
        if band not in self._bands:
            shape = (min(BAND_PX, height - band * BAND_PX), width)
            return np.zeros(shape, np.float32), np.zeros(shape, np.bool_)
        result, weight = self._bands.pop(band)
        covered = weight > 0
        np.divide(result, weight, out=result, where=covered)
        return np.round(result, DECIMALS, out=result), covered
