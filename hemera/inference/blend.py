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
        window = np.ones(grid.tile_px)
        window[: len(ramp)] = ramp
        window[len(window) - len(ramp) :] = ramp[::-1]
        self._window: Float = window.astype(np.float32)
        self._sums: dict[int, Float] = {}
        # The weight is a product of one factor per row and one per column, so for each row of
        # tiles its sum over the tiles is kept for one line.
        self._weights: dict[int, Float] = {}
        self._lost: dict[int, Mask] = {}

    def add(self, x: int, y: int, probability: Float) -> None:
        """Add a tile (H, W) at (x, y) of the map; what reaches beyond the map is dropped."""
        width, height = self._size_px
        inside = probability[: height - y, : width - x]
        rows, columns = self._window[: len(inside)], self._window[: inside.shape[1]]
        weighted = inside * rows[:, None] * columns
        self._weights.setdefault(y, np.zeros(width, np.float32))[x : x + len(columns)] += columns
        for band in range(y // BAND_PX, -(-(y + len(inside)) // BAND_PX)):
            top = band * BAND_PX
            if band not in self._sums:
                self._sums[band] = np.zeros((min(BAND_PX, height - top), width), np.float32)
            begin, end = max(top, y), min(top + BAND_PX, y + len(inside))
            self._sums[band][begin - top : end - top, x : x + len(columns)] += weighted[
                begin - y : end - y
            ]

    def lose(self, x: int, y: int) -> None:
        """Note that the tile at (x, y) could not be read."""
        line = self._lost.setdefault(y, np.zeros(self._size_px[0], np.bool_))
        line[x : x + len(self._window)] = True

    def take(self, band: int) -> tuple[Float, Mask, Mask]:
        """Return a band (H, width) that no further tile reaches, and release it.

        Its probabilities, where tiles cover it, and where only tiles that could not be read do.
        """
        width, height = self._size_px
        top, side = band * BAND_PX, len(self._window)
        bottom = min(top + BAND_PX, height)
        result = self._sums.pop(band, None)
        weight = np.zeros((bottom - top, width), np.float32)
        lost = np.zeros(weight.shape, np.bool_)
        for y, line in self._weights.items():
            begin, end = max(top, y), min(bottom, y + side)
            if begin < end:
                weight[begin - top : end - top] += self._window[begin - y : end - y, None] * line
        for y, missing in self._lost.items():
            lost[max(top, y) - top : max(0, min(bottom, y + side) - top)] |= missing
        for lines in (self._weights, self._lost):
            for y in [y for y in lines if y + side <= bottom]:
                del lines[y]
        covered = weight > 0
        if result is None:
            return weight, covered, lost
        np.divide(result, weight, out=result, where=covered)
        return np.round(result, DECIMALS, out=result), covered, lost & ~covered
