"""A map of HER2-positive regions from an H&E slide alone.

The map has the resolution of the model's training tiles and begins at the slide's top-left corner.
Only tiles with tissue are read. They overlap, are blended and written row by row, so that memory
grows with the slide's width; only the mask is kept completely, reduced where it is large, to trace
its outlines.
"""

import collections
import contextlib
import itertools
import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
import numpy.typing as npt
import shapely
from tqdm import tqdm

from hemera.config import DescribeOptions
from hemera.errors import SlideError, TrainingError
from hemera.files.atomic import new_folder
from hemera.files.geojson import annotation
from hemera.imaging.codecs import encode
from hemera.imaging.color import normalise_background
from hemera.imaging.identity import check_he, identify
from hemera.imaging.outlines import reduction, trace
from hemera.imaging.pyramid import TILE_PX, stored_tiles, tile_count, write_pyramid
from hemera.imaging.slide import Slide, open_slide
from hemera.imaging.tissue import find_tissue
from hemera.imaging.tolerant import Losses, read_tiles
from hemera.inference import demo
from hemera.inference.blend import BAND_PX, Blend, Float, Grid, Mask
from hemera.inference.model import RGB, Model, load_model
from hemera.inference.options import DEFAULTS, PredictOptions
from hemera.networks import storage
from hemera.networks.outputs import one_ahead
from hemera.training.session import session

log = logging.getLogger(__name__)

MPP_TOLERANCE = 0.10
"""Resolutions that differ by no more are the same to the network."""

BAD_TILES_MAX = 0.10
"""A slide of which a larger fraction of the tiles cannot be read is refused."""

OVERVIEW_SIDE_PX = 2048
CLASS = "HER2 positive"
COLOR = (0, 190, 160)
"""Of positive regions: a hue that H&E does not have."""
TINT = 0.3


def predict(slide: Path, model: Path, out: Path, options: PredictOptions = DEFAULTS) -> Path:
    """Predict the HER2-positive regions of an H&E slide.

    Writes and returns the new folder ``out/NAME``, NAME being the slide's without suffix, in one
    step: NAME.mask.tif (255 where HER2-positive, else 0), NAME.positive.geojson (its regions in
    level-0 pixels, for QuPath), NAME.overlay.png and NAME.json (areas, fractions, model, versions).
    `model` is the output of train_segmentation.

    Raises:
        SlideError: when the slide cannot be opened, is IHC by its colours, too coarse, or too
            damaged.
        TrainingError: when the model cannot be loaded or returns values that are not finite.
        ConfigError: when the options do not fit, or the folder exists.
    """
    threads = len(os.sched_getaffinity(0))
    with (
        open_slide(slide, mpp=options.mpp, mpp_column="--mpp") as opened,
        session(seed=0, threads=threads, device=options.device) as device,
    ):
        loaded = load_model(model, device, options.precision)
        return predict_slide(opened, loaded, out, options)


def predict_slide(slide: Slide, model: Model, out: Path, options: PredictOptions) -> Path:
    """Predict on an open slide with a loaded model; see `predict`."""
    if not options.any_stain:
        check_he(identify(slide))
    grid = grid_of(slide, model, upsample=options.upsample)
    name = re.sub(r"(?<=.)\.ome$", "", slide.path.stem, flags=re.IGNORECASE)
    with (
        new_folder(out / name) as folder,
        tempfile.TemporaryFile(dir=folder) as spool,
        contextlib.ExitStack() as stack,
    ):
        drawing = _Drawing(slide, model, grid, options)
        bands = stack.enter_context(contextlib.closing(drawing.bands()))
        tiles = _tiles(bands, grid, spool if options.probability else None)
        _write_map(folder / f"{name}.mask.tif", tiles, slide, grid, CLASS)
        if options.probability:
            spool.seek(0)
            stored = stored_tiles(spool, (TILE_PX, TILE_PX))
            path = folder / f"{name}.probability.tif"
            _write_map(path, stored, slide, grid, f"probability of {CLASS}")
        regions = trace(drawing.mask)
        pixel_um2 = grid.mpp**2 * drawing.reduction**2
        kept = [region for region in regions if region.area * pixel_um2 >= options.min_area_um2]
        features = (json.dumps(_feature(region, drawing, slide)) for region in kept)
        text = '{"type": "FeatureCollection", "features": [\n' + ",\n".join(features) + "\n]}\n"
        (folder / f"{name}.positive.geojson").write_text(text)
        overlay = _overlay(slide, drawing.mask, grid)
        overlay = demo.labelled(overlay) if model.demo_sizes else overlay
        (folder / f"{name}.overlay.png").write_bytes(encode(overlay, "png", 0))
        facts = drawing.facts() | {
            "regions": {
                "count": len(kept),
                "area_um2": sum(region.area for region in kept) * pixel_um2,
                "min_area_um2": float(options.min_area_um2),
                "left_out": len(regions) - len(kept),
                "pixel_mpp": grid.mpp * drawing.reduction,
            },
            "model": model.facts,
            "versions": storage.versions(),
        }
        (folder / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n")
    losses, area = drawing.losses, facts["area"]
    if model.demo_sizes:
        log.warning("%s: %s", out / name, demo.WORDS)
    if losses.lost:
        log.warning(
            "%s: %d of %d tiles cannot be read and are holes in the map; the first: %s",
            slide.path.name, losses.lost, losses.total, losses.first,
        )  # fmt: skip
    log.info(
        "%s: %.2f%% of %.4g mm2 of tissue is HER2-positive, %d regions",
        out / name, 100 * (area["positive_fraction"] or 0), area["tissue_um2"] / 1e6, len(kept),
    )  # fmt: skip
    return out / name


def grid_of(slide: Slide, model: Model, *, upsample: bool) -> Grid:
    """Choose the resolution of a slide's map: the model's, or that of a level close to it.

    A slide coarser than the median of the training tiles is read as it is when some of them were
    as coarse; SlideError when none was, unless `upsample` allows it.
    """
    wanted = max(model.mpp, min(slide.mpp, model.mpp_max))
    nearest = min(slide.level_mpps, key=lambda mpp: abs(math.log(mpp / wanted)))
    if abs(nearest / wanted - 1) <= MPP_TOLERANCE:
        mpp = nearest
    elif slide.mpp < wanted or upsample:
        mpp = wanted
    else:
        raise SlideError(
            f"{slide.path.name}: {slide.mpp:.4g} um/px is coarser than the {wanted:.4g} that the "
            "model was trained at; use a finer scan, or give --upsample to enlarge it"
        )
    width, height = (max(1, math.ceil(side * slide.mpp / mpp - 1e-6)) for side in slide.size_px)
    return Grid(mpp, mpp / slide.mpp, (width, height), model.tile_px)


class _Tissue:
    """The tissue of a slide, outlined as `describe` does, on the pixels of a map."""

    def __init__(self, slide: Slide, grid: Grid) -> None:
        options = DescribeOptions()
        view, (mpp_x, mpp_y) = slide.overview(mpp=options.tissue_mpp)
        mpp = math.sqrt(mpp_x * mpp_y)
        self._outline, _ = find_tissue(view, "he", slide.background, mpp, options)
        self._columns, self._rows = (
            np.minimum((np.arange(count) + 0.5) * grid.mpp / step, length - 1).astype(np.int64)
            for count, step, length in zip(
                grid.size_px, (mpp_x, mpp_y), self._outline.shape[::-1], strict=True
            )
        )

    def rows(self, top: int, count: int) -> Mask:
        """Return where tissue is in rows of the map, (count, width)."""
        inside: Mask = self._outline[self._rows[top : top + count]]
        return inside[:, self._columns]

    def in_tile(self, x: int, y: int, side: int) -> bool:
        """Return whether a square of the map contains any."""
        rows, columns = self._rows[y : y + side], self._columns[x : x + side]
        box = self._outline[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        return bool(box.any())


class _Drawing:
    """A map, drawn from top to bottom, and what is counted meanwhile."""

    def __init__(self, slide: Slide, model: Model, grid: Grid, options: PredictOptions) -> None:
        self.grid = grid
        self._slide, self._model = slide, model
        self._options = options
        self._tissue = _Tissue(slide, grid)
        self._places = [
            (x, y)
            for y in grid.starts(1)
            for x in grid.starts(0)
            if self._tissue.in_tile(x, y, grid.tile_px)
        ]
        if not self._places:
            log.warning("%s: no tissue found; the map is empty", slide.path.name)
        self.losses = Losses(slide.path.name, len(self._places), BAD_TILES_MAX)
        self._pixels: collections.Counter[str] = collections.Counter()
        self.reduction = reduction(grid.size_px)
        width, height = (-(-side // self.reduction) for side in grid.size_px)
        self.mask = np.zeros((height, width), np.bool_)
        """The positive pixels, reduced: those of which at least half is positive."""

    def bands(self) -> Generator[tuple[Mask, npt.NDArray[np.uint8]], None, None]:
        """Yield bands of `BAND_PX` rows: what is positive, and the probability from 0 to 255."""
        blend = Blend(self.grid)
        band, count = 0, -(-self.grid.size_px[1] // BAND_PX)
        with contextlib.closing(self._results()) as results:
            for (x, y), result in results:
                while (band + 1) * BAND_PX <= y:
                    yield self._finish(band, blend)
                    band += 1
                if result is not None:
                    blend.add(x, y, result)
        for rest in range(band, count):
            yield self._finish(rest, blend)

    def _finish(self, band: int, blend: Blend) -> tuple[Mask, npt.NDArray[np.uint8]]:
        top = band * BAND_PX
        probability, covered = blend.take(band)
        tissue = self._tissue.rows(top, len(probability))
        # Outside the tissue, the output would depend on the extent of the tiles.
        probability[~tissue] = 0
        positive = (probability >= np.float32(self._options.threshold)) & tissue
        counted = {"tissue": tissue, "positive": positive, "read": tissue & covered}
        for name, pixels in counted.items():
            self._pixels[name] += int(np.count_nonzero(pixels))
        factor = self.reduction
        rows = slice(top // factor, -(-(top + len(positive)) // factor))
        margins = [(0, -side % factor) for side in positive.shape]
        whole = np.pad(positive.view(np.uint8) * np.uint8(255), margins)
        size = whole.shape[1] // factor, whole.shape[0] // factor
        self.mask[rows] = cv2.resize(whole, size, interpolation=cv2.INTER_AREA) >= 127.5
        return positive, np.rint(probability * 255).astype(np.uint8)

    def _results(self) -> Generator[tuple[tuple[int, int], Float | None], None, None]:
        """Yield the probabilities of each tile; None for one that cannot be read."""
        with (
            contextlib.closing(
                read_tiles(self._read, self._places, self._options.workers, self.losses)
            ) as tiles,
            tqdm(total=len(self._places), unit="tile", disable=None, leave=False) as shown,
        ):
            for batch, wait in one_ahead(self._launched(zip(self._places, tiles, strict=True))):
                results = collections.deque(self._finite(wait()) if wait else ())
                for place, tile in batch:
                    yield place, None if tile is None else results.popleft()
                shown.update(len(batch))

    def _launched(
        self, ready: Iterator[tuple[tuple[int, int], RGB | None]]
    ) -> Iterator[tuple[list[tuple[tuple[int, int], RGB | None]], Callable[[], Float] | None]]:
        """Yield batches, each with what waits for its probabilities if a tile of it was read."""
        while batch := list(itertools.islice(ready, self._options.batch_size)):
            read = [tile for _, tile in batch if tile is not None]
            yield batch, self._model.launch(np.stack(read)) if read else None

    def _finite(self, result: Float) -> Float:
        if not np.isfinite(result).all():
            raise TrainingError(
                f"{self._slide.path.name}: the model returns values that are not finite; give "
                "--precision float32, or train again"
            )
        return result

    def _read(self, place: tuple[int, int]) -> RGB:
        """Read a tile; a slide smaller than a tile is continued by its mirror image."""
        (x, y), grid = place, self.grid
        width, height = (
            min(grid.tile_px, length - start)
            for length, start in zip(grid.size_px, place, strict=True)
        )
        tile = self._slide.read(x * grid.scale, y * grid.scale, width, height, grid.mpp)
        if self._model.normalise_background:
            tile = normalise_background(tile, self._slide.background)
        margins = ((0, grid.tile_px - height), (0, grid.tile_px - width), (0, 0))
        return np.pad(tile, margins, mode="symmetric")

    def facts(self) -> dict[str, Any]:
        """Return what the JSON contains about slide, map, areas and tiles."""
        slide, grid, pixels = self._slide, self.grid, self._pixels
        pixel_um2, read = grid.mpp**2, pixels["read"]
        return {
            "slide": {
                "file": slide.path.name,
                "width_px": slide.size_px[0],
                "height_px": slide.size_px[1],
                "mpp": slide.mpp,
                "mpp_source": "--mpp" if slide.mpp_source == "sheet" else slide.mpp_source,
            },
            "map": {
                "width_px": grid.size_px[0],
                "height_px": grid.size_px[1],
                "mpp": grid.mpp,
                "threshold": float(self._options.threshold),
                "tile_px": grid.tile_px,
                "overlap_px": grid.overlap_px,
            },
            "area": {
                "tissue_um2": pixels["tissue"] * pixel_um2,
                "positive_um2": pixels["positive"] * pixel_um2,
                "positive_fraction": pixels["positive"] / read if read else None,
            },
            "tiles": {
                "grid": len(grid.starts(0)) * len(grid.starts(1)),
                "tissue": len(self._places),
                "unreadable": self.losses.lost,
            },
        }


def _tiles(
    bands: Iterator[tuple[Mask, npt.NDArray[np.uint8]]], grid: Grid, spool: IO[bytes] | None
) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield the mask as tiles of a pyramid; write those of the probability into a file."""
    across, down = tile_count(grid.size_px)
    for _ in range(down):
        mask, values = np.zeros((2, TILE_PX, across * TILE_PX), np.uint8)
        for n, (positive, probability) in enumerate(itertools.islice(bands, TILE_PX // BAND_PX)):
            place = np.s_[n * BAND_PX : n * BAND_PX + len(positive), : grid.size_px[0]]
            mask[place], values[place] = positive * np.uint8(255), probability
        for left in range(0, across * TILE_PX, TILE_PX):
            if spool is not None:
                spool.write(np.ascontiguousarray(values[:, left : left + TILE_PX]).data)
            yield mask[:, left : left + TILE_PX]


def _write_map(
    path: Path, tiles: Iterator[npt.NDArray[np.uint8]], slide: Slide, grid: Grid, what: str
) -> None:
    # File names may contain characters that XML does not allow.
    shown = re.sub(r"[^\w .()+-]", "_", slide.path.name)
    write_pyramid(path, tiles, size_px=grid.size_px, mpp=grid.mpp, name=f"{shown}: {what}")


def _feature(region: shapely.Polygon, drawing: _Drawing, slide: Slide) -> dict[str, Any]:
    """Return a region of the reduced mask as an annotation in level-0 pixels."""
    scale = drawing.reduction * drawing.grid.scale

    # The last pixels of the map may reach over the slide's edge.
    def place(points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        placed: npt.NDArray[np.float64] = np.minimum(points * scale, slide.size_px).round(3)
        return placed

    return annotation(shapely.transform(region, place), CLASS, COLOR)


def _overlay(slide: Slide, mask: Mask, grid: Grid) -> RGB:
    """Return an overview of the slide with its positive regions tinted and outlined."""
    view, _ = slide.overview(side_px=min(OVERVIEW_SIDE_PX, max(grid.size_px)))
    height, width = view.shape[:2]
    fraction = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    color = np.full_like(view, COLOR)
    tinted: Any = cv2.blendLinear(view, color, 1 - TINT * fraction, TINT * fraction)
    inside = (fraction >= 0.5).astype(np.uint8)
    found, _ = cv2.findContours(inside, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(tinted, found, -1, COLOR, 1 + (max(tinted.shape) > 1024))
    return np.asarray(tinted, np.uint8)
