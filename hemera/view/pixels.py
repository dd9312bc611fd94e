"""Tiles of both stains of a pair on the grid of H&E, read when the browser asks for them."""

import collections
import contextlib
import dataclasses
import functools
import math
import threading
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from hemera.errors import RegistrationError, SlideError
from hemera.files import layout
from hemera.imaging.codecs import encode
from hemera.imaging.slide import Slide, open_slide
from hemera.registration.displacement import area_ratio
from hemera.registration.registered_pair import RegisteredPair, load_pair
from hemera.registration.warping import read_displaced
from hemera.sheet import Pair

RGB = npt.NDArray[np.uint8]

TILE_PX = 512
QUALITY = 88
AREA_RATIO_MIN = 0.05
"""Of areas on HER2 and H&E; where it is less, one line of HER2 would be drawn as long streaks."""
NODES_MAX = 1024
"""Along a side of the grid on which this is determined."""
OPEN_PAIRS = 2
"""Pairs kept open: a slide keeps up to 96 MiB of decoded tiles."""
CACHE_BYTES = 64 * 2**20
"""Of encoded tiles."""


@dataclasses.dataclass(eq=False)
class OpenPair:
    """A pair with its open slides.

    HER2 is background outside its slide, and where the map leads to one line of it.

    Level 0 of its pyramid is a single tile, and each further level has twice the resolution, up to
    that of H&E.
    """

    registered: RegisteredPair
    he: Slide
    her2: Slide
    note: str
    """Why the map is not that of the registration; empty where it is."""
    users: int = 0

    @property
    def level_max(self) -> int:
        """The level with the resolution of H&E."""
        return max(0, math.ceil(math.log2(max(self.he.size_px) / TILE_PX)))

    def tile(self, stain: str, level: int, column: int, row: int) -> RGB:
        """Read a tile (H, W, 3) of at most `TILE_PX`; HER2 is warped onto H&E.

        Raises:
            SlideError: when there is no such tile, or its pixels cannot be read.
        """
        if not 0 <= level <= self.level_max:
            raise SlideError(f"level {level}: it should be 0 to {self.level_max}")
        factor = 2 ** (self.level_max - level)
        left, top = column * TILE_PX, row * TILE_PX
        width, height = (math.ceil(side / factor) for side in self.he.size_px)
        if not (0 <= left < width and 0 <= top < height):
            raise SlideError(f"tile {column}, {row} of level {level}: outside the slide")
        mpp = self.he.mpp * factor
        shown = min(TILE_PX, width - left), min(TILE_PX, height - top)
        if stain == "he":
            return self.he.read(left * factor, top * factor, *shown, mpp)
        pixels, *_ = read_displaced(
            self.her2, self.registered.displacement, left * mpp, top * mpp,
            size_px=TILE_PX, mpp=mpp,
        )  # fmt: skip
        pixels = pixels[: shown[1], : shown[0]]
        collapsed, node_um = self._collapsed
        if collapsed.any():
            rows, columns = (
                np.clip((start + np.arange(count) + 0.5) * mpp // node_um, 0, nodes - 1).astype(int)
                for start, count, nodes in zip(
                    (top, left), pixels.shape[:2], collapsed.shape, strict=True
                )
            )
            pixels[collapsed[np.ix_(rows, columns)]] = self.her2.background
        return pixels

    @functools.cached_property
    def _collapsed(self) -> tuple[npt.NDArray[np.bool_], float]:
        """Where the map leads to a line of HER2, on a grid from the corner of H&E; its step, um."""
        field = self.registered.displacement
        step = max(1, math.ceil(max(field.vectors_um.shape[:2]) / NODES_MAX))
        moving = field.vectors_um[::step, ::step].astype(np.float64)
        node_um = step * field.mpp
        moving[..., 0] += np.arange(moving.shape[1]) * node_um
        moving[..., 1] += (np.arange(moving.shape[0]) * node_um)[:, None]
        found = np.abs(area_ratio(moving, node_um)) < AREA_RATIO_MIN
        # A line of such nodes borders each fold. At the border of a region, slopes are averaged.
        square = np.ones((3, 3), np.uint8)
        opened = cv2.morphologyEx(found.astype(np.uint8), cv2.MORPH_OPEN, square)
        return cv2.dilate(opened, square) > 0, node_um


class Pixels:
    """The pairs that are open, and the tiles that were shown last; used by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._opening: dict[str, threading.Lock] = collections.defaultdict(threading.Lock)
        self._open: collections.OrderedDict[str, OpenPair] = collections.OrderedDict()
        self._tiles: collections.OrderedDict[tuple[object, ...], bytes] = collections.OrderedDict()
        self._bytes = 0

    @contextlib.contextmanager
    def pair(self, row: Pair) -> Iterator[OpenPair]:
        """Open a pair, or take it from those that are open."""
        key = f"{row.pair} {version(row)}"
        with self._opening[row.pair]:
            with self._lock:
                found = self._open.get(key)
            if found is None:
                found = _open(row)
            with self._lock:
                self._open[key] = found
                self._open.move_to_end(key)
                found.users += 1
                self._close_old()
        try:
            yield found
        finally:
            with self._lock:
                found.users -= 1

    def _close_old(self) -> None:
        for key in list(self._open)[:-OPEN_PAIRS]:
            if not self._open[key].users:
                old = self._open.pop(key)
                old.he.close()
                old.her2.close()

    def jpeg(self, row: Pair, stain: str, level: int, column: int, top: int) -> bytes:
        """Return a tile of `OpenPair.tile` as JPEG."""
        key = row.pair, version(row), stain, level, column, top
        with self._lock:
            if key in self._tiles:
                self._tiles.move_to_end(key)
                return self._tiles[key]
        with self.pair(row) as opened:
            data = encode(opened.tile(stain, level, column, top), quality=QUALITY)
        with self._lock:
            if key not in self._tiles:
                self._tiles[key] = data
                self._bytes += len(data)
            while self._bytes > CACHE_BYTES:
                self._bytes -= len(self._tiles.popitem(last=False)[1])
        return data


def version(pair: Pair) -> str:
    """Return a text that changes with the images of a pair and with the map between them."""
    paths = (*pair.images, layout.path(layout.DISPLACEMENT, unit=pair.pair))
    times = [path.stat().st_mtime_ns if path.exists() else 0 for path in map(Path, paths)]
    return "-".join(f"{time:x}" for time in times)


def _open(pair: Pair) -> OpenPair:
    note = ""
    try:
        registered = load_pair(pair, Path(layout.RESULTS), allow_failed=True)
    except RegistrationError as error:
        # Without a map, both slides are shown from their corners.
        note = str(error)
        registered = load_pair(
            pair.model_copy(update={"registered": True}), Path(layout.RESULTS), allow_failed=True
        )
    he = open_slide(pair.he, mpp=registered.he.mpp)
    try:
        her2 = open_slide(pair.her2_image, mpp=registered.her2.mpp)
    except SlideError:
        he.close()
        raise
    return OpenPair(registered, he, her2, note)
