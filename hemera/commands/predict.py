"""Draw a HER2 map from an H&E slide alone: a mask, its regions for QuPath, shares of the tissue.

The map's pixels have the model's resolution and begin at the slide's top-left corner. The tissue
is outlined first, and only tiles that hold some of it are read. They overlap and fade into each
other, and go through row by row: what is held grows with the slide's width, never its height.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch.nn.utils import convert_conv2d_weight_memory_format
from tqdm import tqdm

from hemera.commands import flags
from hemera.config import DescribeOptions
from hemera.errors import ConfigError, SlideError, TrainingError
from hemera.imaging.codecs import encode
from hemera.imaging.pyramid import TILE_PX, tile_count, write_pyramid
from hemera.imaging.resample import remap
from hemera.imaging.slide import Slide, open_slide
from hemera.imaging.tissue import find_tissue
from hemera.interop.outlines import Outlines, Region
from hemera.io.atomic import write_bytes, write_text
from hemera.io.threads import in_order
from hemera.networks import storage
from hemera.networks.segmentation import SegmentationNet
from hemera.training import session

log = logging.getLogger(__name__)

RGB = npt.NDArray[np.uint8]
Float = npt.NDArray[np.float32]

Ask = Callable[[RGB], Float]
"""Takes tiles (B, H, W, 3) to the probability of HER2-positive (B, H, W)."""

TILE_SIDE_PX = 512
"""Of a model that does not say on what it was trained: the paper's."""

OVERLAP = 0.25
"""Share of a tile's side that it shares with the next. At its edges a network lacks what lies
around: against a tile of 1024 px, the demo's is off by 0.07 in the outer 8 px, by 0.006 from 32 px
on, by 0.001 from 64 px on, where neighbours of 512 px weigh the same."""

MPP_TOLERANCE = 0.10
"""Resolutions that differ by no more are one to the network, as `index.mpp_tolerance` has it."""

BAD_TILES_MAX = 0.10
"""A slide of which a larger share of the tiles cannot be read is refused."""

BAND_PX = 128
"""Rows that are finished at once; a row of stored tiles is a whole number of them."""

DECIMALS = 5
"""Of a probability: what is lost to rounding in the blend comes back, and nothing else is."""

OVERVIEW_SIDE_PX = 2048
CLASS = "HER2 positive"
COLOUR = (0, 190, 160)
"""Of positive regions: what H&E has none of."""
TINT = 0.3

FILES = {
    "mask": ".mask.tif",
    "probability": ".probability.tif",
    "regions": ".positive.geojson",
    "overlay": ".overlay.png",
    "facts": ".json",
}
"""What is written, by what stands behind the slide's name; the last comes last."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.description = (
        "Draw a HER2 map from an H&E slide alone. Writes NAME.mask.tif (255 where HER2-positive, "
        "else 0), NAME.positive.geojson (its regions, for QuPath), NAME.overlay.png and NAME.json "
        "(areas, shares, what made them); what of these is there already is replaced."
    )
    parser.add_argument("slide", type=Path, metavar="SLIDE", help="an H&E slide or image")
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help="where train_segmentation has written (results/train_segmentation)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results/predict"),
        metavar="DIR",
        help="where to write (default results/predict)",
    )
    parser.add_argument(
        "--mpp", type=flags.positive, help="um/px of the slide, where its file does not say"
    )
    parser.add_argument(
        "--model-mpp",
        type=flags.positive,
        metavar="MPP",
        help="um/px of the tiles the model was trained on, where the model does not say",
    )
    parser.add_argument(
        "--upsample",
        action="store_true",
        help="enlarge a slide that is coarser than the model's tiles, rather than refuse it",
    )
    parser.add_argument(
        "--threshold",
        type=_share,
        default=0.5,
        metavar="P",
        help="probability from which a pixel is positive (default 0.5)",
    )
    parser.add_argument(
        "--min-area-um2",
        type=_area,
        default=25.0,
        metavar="AREA",
        help="smaller regions are left out of the GeoJSON, not of mask and areas (default 25, "
        "half a nucleus)",
    )
    parser.add_argument(
        "--probability",
        action="store_true",
        help="also write NAME.probability.tif, the probability from 0 to 255",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default auto"
    )
    parser.add_argument(
        "--precision",
        choices=tuple(session.PRECISIONS),
        default="float32",
        help="numbers the network computes in; bf16 and fp16 need a GPU (default float32)",
    )
    parser.add_argument(
        "--batch-size", type=flags.workers, default=8, metavar="N", help="tiles (default 8)"
    )
    parser.add_argument(
        "--torch-threads", type=flags.workers, metavar="N", help="default: all processors"
    )
    parser.add_argument(
        "--workers", type=flags.workers, default=2, metavar="N", help="readers (default 2)"
    )


def main(namespace: argparse.Namespace) -> int:
    """Predict."""
    outputs = _outputs(namespace.slide, namespace.out)
    with session.session(
        seed=0,
        threads=namespace.torch_threads or len(os.sched_getaffinity(0)),
        device=namespace.device,
    ) as device:
        model = load_model(namespace.model, device, namespace.precision, namespace.model_mpp)
        with _open(namespace.slide, namespace.mpp) as slide:
            predict(
                slide,
                outputs,
                model,
                upsample=namespace.upsample,
                threshold=namespace.threshold,
                min_area_um2=namespace.min_area_um2,
                probability=namespace.probability,
                batch_size=namespace.batch_size,
                workers=namespace.workers,
            )
    return 0


# The model


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained network as far as a slide needs to know it."""

    ask: Ask
    tile_px: int
    """Side of the tiles it is asked for: that of its training, which it is sure to take."""
    mpp: float
    """Of its training tiles: the median."""
    mpp_max: float
    """The coarsest of them."""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the JSON says about it."""


def load_model(folder: Path, device: torch.device, precision: str, mpp: float | None) -> Model:
    """Load a trained SegmentationNet from the folder of its training.

    Args:
        folder: holds segmenter.safetensors and metadata.json.
        device: where it computes.
        precision: a name of `training.PRECISIONS`.
        mpp: that of its training tiles, where its metadata does not say.

    Raises:
        TrainingError: when there is none, it is damaged, or its resolution is not known.
        ConfigError: for a precision the device has not.
    """
    if precision != "float32" and device.type != "cuda":
        raise ConfigError(f"--precision {precision}: for a GPU; give float32 on the processor")
    weights, metadata = folder / "segmenter.safetensors", folder / "metadata.json"
    if not folder.is_dir():
        raise TrainingError(f"{folder}: no such folder; name where train_segmentation has written")
    net, described = storage.load_segmentation(weights, metadata)
    own = _number(described, "mpp", metadata)
    if own is None and mpp is None:
        raise TrainingError(
            f"{metadata}: does not say at what um/px it was trained; give --model-mpp, or train "
            "again"
        )
    if own is not None and mpp is not None:
        raise ConfigError(f"--model-mpp {mpp:g}: the model says {own:g} itself; leave it out")
    trained_mpp = own or mpp or 0.0
    # Trained on whole tiles, or on crops of them: either way it was validated on whole ones.
    side = _number(described, "tile_px", metadata) or TILE_SIDE_PX
    facts = {
        "weights_sha256": storage.file_digest(weights),
        "mpp": trained_mpp,
        **{
            name: described.get(name)
            for name in ("index_fingerprint", "mask_engine", "versions", "options")
        },
    }
    net.requires_grad_(False).to(device)
    convert_conv2d_weight_memory_format(net, torch.channels_last)
    return Model(
        _ask(net, device, session.PRECISIONS[precision]),
        int(side),
        trained_mpp,
        max(_number(described, "mpp_max", metadata) or 0.0, trained_mpp),
        facts,
    )


def _number(described: Mapping[str, Any], key: str, path: Path) -> float | None:
    """Return a positive number of the metadata; None where it does not stand there."""
    value = described.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise TrainingError(f"{path}: {key} is {value!r}, no positive number; train again")
    return float(value)


def _ask(net: SegmentationNet, device: torch.device, precision: torch.dtype) -> Ask:
    @torch.inference_mode()
    def ask(tiles: RGB) -> Float:
        images = session.to_unit(torch.from_numpy(tiles).permute(0, 3, 1, 2), device)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits = net(images.contiguous(memory_format=torch.channels_last))
        return np.asarray(torch.sigmoid(logits.float())[:, 0].cpu().numpy(), np.float32)

    return ask


# The map


@dataclasses.dataclass(frozen=True)
class Grid:
    """The pixels of a map, from the slide's top-left corner."""

    mpp: float
    scale: float
    """Pixels of level 0 to one of the map."""
    size_px: tuple[int, int]
    tile_px: int

    @property
    def overlap_px(self) -> int:
        """How far a tile reaches into the next."""
        return round(OVERLAP * self.tile_px)

    def starts(self, axis: int) -> list[int]:
        """Return where tiles begin along x (0) or y (1); the last ends at the map's edge."""
        last = max(0, self.size_px[axis] - self.tile_px)
        return [*range(0, last, self.tile_px - self.overlap_px), last]


def grid_of(slide: Slide, model: Model, *, upsample: bool) -> Grid:
    """Choose the resolution of a slide's map: the model's, or that of a level that is near it.

    A slide coarser than the median of the training tiles is taken as it is, as long as some of
    them were as coarse.

    Raises:
        SlideError: when the slide is coarser than all of them, unless `upsample` allows it.
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
            "model was trained at; take a finer scan, or give --upsample to enlarge it"
        )
    width, height = (max(1, math.ceil(side * slide.mpp / mpp - 1e-6)) for side in slide.size_px)
    return Grid(mpp, mpp / slide.mpp, (width, height), model.tile_px)


class Tissue:
    """The tissue of a slide, outlined as `describe` does, on the pixels of a map."""

    def __init__(self, slide: Slide, grid: Grid) -> None:
        """Find it."""
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

    def rows(self, top: int, count: int) -> npt.NDArray[np.bool_]:
        """Return where tissue is in rows of the map, (count, width)."""
        inside: npt.NDArray[np.bool_] = self._outline[self._rows[top : top + count]]
        return inside[:, self._columns]

    def in_tile(self, x: int, y: int, side: int) -> bool:
        """Tell whether a square of the map holds any."""
        rows, columns = self._rows[y : y + side], self._columns[x : x + side]
        box = self._outline[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        return bool(box.any())


class Blend:
    """Tiles that fade into each other, in bands of rows; only the bands in the making are held.

    A tile weighs as a raised cosine along both axes: 1 in its middle, next to nothing at its
    edges. A pixel is the weighted mean over the tiles it lies in, so what they agree on stays.
    """

    def __init__(self, grid: Grid) -> None:
        """Begin above the first row."""
        self._size_px = grid.size_px
        ramp = (1 - np.cos(np.pi * (np.arange(grid.overlap_px) + 0.5) / grid.overlap_px)) / 2
        window = np.ones(grid.tile_px)
        window[: len(ramp)] = ramp
        window[len(window) - len(ramp) :] = ramp[::-1]
        self._window: Float = window.astype(np.float32)
        self._sums: dict[int, Float] = {}
        # A pixel's weight is a product summed over the rows of tiles: one line for each will do.
        self._lines: dict[int, Float] = {}
        self._lost: dict[int, npt.NDArray[np.bool_]] = {}

    def add(self, x: int, y: int, probability: Float) -> None:
        """Lay a tile (H, W) at a place of the map; what reaches beyond the map is dropped."""
        width, height = self._size_px
        part = probability[: height - y, : width - x]
        rows, columns = self._window[: len(part)], self._window[: part.shape[1]]
        weighed = part * rows[:, None] * columns
        line = self._lines.setdefault(y, np.zeros(width, np.float32))
        line[x : x + len(columns)] += columns
        for band in range(y // BAND_PX, -(-(y + len(part)) // BAND_PX)):
            top = band * BAND_PX
            if band not in self._sums:
                self._sums[band] = np.zeros((min(BAND_PX, height - top), width), np.float32)
            begin, end = max(top, y), min(top + BAND_PX, y + len(part))
            own = self._sums[band][begin - top : end - top, x : x + len(columns)]
            own += weighed[begin - y : end - y]

    def lose(self, x: int, y: int) -> None:
        """Note that the tile of a place is missing."""
        line = self._lost.setdefault(y, np.zeros(self._size_px[0], np.bool_))
        line[x : x + len(self._window)] = True

    def take(self, band: int) -> tuple[Float, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Return a band's probabilities, where there are any, and where tiles alone were lost."""
        width, height = self._size_px
        top, side = band * BAND_PX, len(self._window)
        bottom = min(top + BAND_PX, height)
        weight = np.zeros((bottom - top, width), np.float32)
        lost = np.zeros(weight.shape, np.bool_)
        result = self._sums.pop(band, weight)
        for y, line in self._lines.items():
            begin, end = max(top, y), min(bottom, y + side)
            if begin < end:
                weight[begin - top : end - top] += self._window[begin - y : end - y, None] * line
        for y, missing in self._lost.items():
            lost[max(top, y) - top : max(0, min(bottom, y + side) - top)] |= missing
        for lines in (self._lines, self._lost):
            for y in [y for y in lines if y + side <= bottom]:
                del lines[y]
        covered = weight > 0
        np.divide(result, weight, out=result, where=covered)
        return np.round(result, DECIMALS, out=result), covered, lost & ~covered


@dataclasses.dataclass
class Counts:
    """What is counted while a map is drawn, in its pixels, tiles and regions."""

    tissue_px: int = 0
    positive_px: int = 0
    seen_px: int = 0
    """Tissue in tiles that could be read."""
    lost_px: int = 0
    """Tissue or not, in no such tile, and in one that could not: what cannot be read is white."""
    tiles: int = 0
    """With tissue."""
    faults: list[SlideError] = dataclasses.field(default_factory=list)
    regions: int = 0
    regions_px: int = 0
    specks: int = 0
    """Regions that are left out of the GeoJSON."""


def predict(
    slide: Slide,
    outputs: Mapping[str, Path],
    model: Model,
    *,
    upsample: bool = False,
    threshold: float = 0.5,
    min_area_um2: float = 25.0,
    probability: bool = False,
    batch_size: int = 8,
    workers: int = 2,
) -> None:
    """Draw the map of one slide and write what follows from it, all at the end.

    Args:
        slide: an H&E slide.
        outputs: of each of `FILES` where it goes, all in one folder.
        model: what is asked.
        upsample: enlarge a slide that is coarser than the model's tiles.
        threshold: probability from which a pixel is positive.
        min_area_um2: smaller regions are left out of the GeoJSON.
        probability: write the probabilities too.
        batch_size: tiles the model gets at once.
        workers: threads that read.

    Raises:
        SlideError: when the slide is too coarse, or too much of it cannot be read.
        TrainingError: when the model answers with what is no number.
    """
    grid = grid_of(slide, model, upsample=upsample)
    folder = outputs["facts"].parent
    folder.mkdir(parents=True, exist_ok=True)
    # Hidden until all of it is there: a map without its facts, or of two runs, would mislead.
    with tempfile.TemporaryDirectory(prefix=".predict-", dir=folder) as name:
        room = Path(name)
        made = {kind: room / f"made{suffix}" for kind, suffix in FILES.items()}
        for output in outputs.values():
            # Fails now, not in an hour, where a name is too long for the disk.
            (room / output.name).touch()
        tissue = Tissue(slide, grid)
        counts = Counts()
        drawing = _Drawing(slide, grid, model, tissue, counts, threshold)
        with open(made["regions"], "w") as file, tempfile.TemporaryFile(dir=room) as aside:
            regions = _Regions(file, slide, grid, min_area_um2, counts)
            spool = _Spool(aside) if probability else None
            with contextlib.closing(drawing.bands(batch_size, workers, regions)) as bands:
                _write_map(made["mask"], _tiles(bands, grid, spool), slide, grid, CLASS)
            regions.end()
            if spool is not None:
                title = f"probability of {CLASS}"
                _write_map(made["probability"], spool.tiles(), slide, grid, title)
        write_bytes(made["overlay"], encode(drawing.overlay(), "png", 0))
        facts = _facts(slide, grid, model, counts, threshold, min_area_um2)
        write_text(made["facts"], json.dumps(facts, indent=2) + "\n")
        for kind in ("facts", "probability"):
            outputs[kind].unlink(missing_ok=True)
        for kind, path in made.items():
            if path.exists():
                os.replace(path, outputs[kind])
    _tell(outputs, slide, counts, facts)


class _Drawing:
    """A map while it is drawn, from its top to its bottom."""

    def __init__(
        self,
        slide: Slide,
        grid: Grid,
        model: Model,
        tissue: Tissue,
        counts: Counts,
        threshold: float,
    ) -> None:
        self._slide = slide
        self._grid = grid
        self._model = model
        self._tissue = tissue
        self._counts = counts
        self._threshold = np.float32(threshold)
        self._step = max(1, math.ceil(max(grid.size_px) / OVERVIEW_SIDE_PX))
        small = [-(-side // self._step) for side in reversed(grid.size_px)]
        self._small = np.zeros(small, np.int64)

    def bands(
        self, batch_size: int, workers: int, regions: _Regions
    ) -> Generator[tuple[RGB, RGB], None, None]:
        """Yield mask and probability of every band, 0 to 255, and count what is in them."""
        grid = self._grid
        places = [
            (x, y)
            for y in grid.starts(1)
            for x in grid.starts(0)
            if self._tissue.in_tile(x, y, grid.tile_px)
        ]
        self._counts.tiles = len(places)
        if not places:
            log.warning("%s: no tissue found on it; its map is empty", self._slide.path.name)
        blend = Blend(grid)
        outlines = Outlines(grid.size_px[0])
        band, count = 0, -(-grid.size_px[1] // BAND_PX)
        with contextlib.closing(self._answers(places, batch_size, workers)) as answers:
            for (x, y), answer in answers:
                while (band + 1) * BAND_PX <= y:
                    yield self._finish(band, blend, outlines, regions)
                    band += 1
                if answer is None:
                    blend.lose(x, y)
                else:
                    blend.add(x, y, answer)
        while band < count:
            yield self._finish(band, blend, outlines, regions)
            band += 1

    def _finish(
        self, band: int, blend: Blend, outlines: Outlines, regions: _Regions
    ) -> tuple[RGB, RGB]:
        top = band * BAND_PX
        width, height = self._grid.size_px
        tissue = self._tissue.rows(top, min(BAND_PX, height - top))
        self._counts.tissue_px += int(np.count_nonzero(tissue))
        probability, covered, lost = blend.take(band)
        self._counts.lost_px += int(np.count_nonzero(lost))
        self._counts.seen_px += int(np.count_nonzero(tissue & covered))
        # Off the tissue, the tiles' own reach would decide what is drawn.
        probability[~tissue] = 0
        positive = (probability >= self._threshold) & tissue
        self._counts.positive_px += int(np.count_nonzero(positive))
        regions.add(outlines.add(positive))
        if top + len(positive) == height:
            regions.add(outlines.close())
        columns = np.add.reduceat(positive, np.arange(0, width, self._step), axis=1, dtype=np.int64)
        np.add.at(self._small, (top + np.arange(len(positive))) // self._step, columns)
        return (
            positive.view(np.uint8) * np.uint8(255),
            np.rint(probability * 255).astype(np.uint8),
        )

    def _answers(
        self, places: Sequence[tuple[int, int]], batch_size: int, workers: int
    ) -> Generator[tuple[tuple[int, int], Float | None], None, None]:
        """Yield what the model says of each tile; None of one that cannot be read."""
        allowed = BAD_TILES_MAX * len(places)
        faults = self._counts.faults
        with (
            contextlib.closing(in_order(self._read, places, workers)) as tiles,
            tqdm(
                total=len(places), desc=self._slide.path.name, unit="tile", disable=None,
                leave=False,
            ) as shown,
        ):  # fmt: skip
            ready = zip(places, tiles, strict=True)
            while batch := list(itertools.islice(ready, batch_size)):
                for _, tile in batch:
                    if isinstance(tile, SlideError):
                        faults.append(tile)
                        log.warning("a tile is left out: %s", tile)
                if len(faults) > allowed:
                    raise SlideError(
                        f"{self._slide.path.name}: {len(faults)} of {len(places)} tiles cannot be "
                        f"read, over {BAD_TILES_MAX:.0%}; the first: {faults[0]}"
                    )
                read = [tile for _, tile in batch if not isinstance(tile, SlideError)]
                answers = collections.deque(self._ask(np.stack(read)) if read else ())
                for place, tile in batch:
                    yield place, None if isinstance(tile, SlideError) else answers.popleft()
                shown.update(len(batch))

    def _ask(self, tiles: RGB) -> Float:
        answer = self._model.ask(tiles)
        if not np.isfinite(answer).all():
            raise TrainingError(
                f"{self._slide.path.name}: the model answers with what is no number; give "
                "--precision float32, or train again"
            )
        return answer

    def _read(self, place: tuple[int, int]) -> RGB | SlideError:
        """Read a tile; what lies beyond a small slide is the slide again, mirrored."""
        grid = self._grid
        (x, y), side = place, grid.tile_px
        width, height = (
            min(side, length - start) for length, start in zip(grid.size_px, place, strict=True)
        )
        try:
            tile = self._slide.read(x * grid.scale, y * grid.scale, width, height, grid.mpp)
        except SlideError as error:
            return error
        if (width, height) == (side, side):
            return tile
        return np.pad(tile, ((0, side - height), (0, side - width), (0, 0)), mode="symmetric")

    def overlay(self) -> RGB:
        """Return the slide, small, its positive regions tinted and outlined."""
        side = min(OVERVIEW_SIDE_PX, max(self._grid.size_px))
        view, mpp = self._slide.overview(side_px=side)
        step_um = self._grid.mpp * self._step
        y, x = (
            ((np.arange(length) + 0.5) * um / step_um - 0.5).astype(np.float32)
            for length, um in zip(view.shape[:2], reversed(mpp), strict=True)
        )
        share = remap(
            np.rint(self._small * (255 / self._step**2)).astype(np.uint8),
            np.broadcast_to(x, view.shape[:2]),
            np.broadcast_to(y[:, None], view.shape[:2]),
            cubic=False,
        )
        tinted = view.copy()
        for channel, value in enumerate(COLOUR):
            step = (value - view[..., channel].astype(np.float32)) * share
            tinted[..., channel] = np.rint(view[..., channel] + step * (TINT / 255))
        inside = (share >= 128).astype(np.uint8)
        found, _ = cv2.findContours(inside, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(tinted, found, -1, COLOUR, 1 + (max(tinted.shape) > 1024))
        return tinted


def _tiles(
    bands: Iterator[tuple[RGB, RGB]], grid: Grid, spool: _Spool | None
) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield the mask as the tiles of a pyramid; put the probability's aside, where it is wanted."""
    across, down = tile_count(grid.size_px)
    for _ in range(down):
        rows = np.zeros((2, TILE_PX, across * TILE_PX), np.uint8)
        top = 0
        for band in itertools.islice(bands, TILE_PX // BAND_PX):
            for own, values in zip(rows, band, strict=True):
                own[top : top + len(values), : values.shape[1]] = values
            top += len(band[0])
        for left in range(0, across * TILE_PX, TILE_PX):
            if spool is not None:
                spool.add(rows[1, :, left : left + TILE_PX])
            yield rows[0, :, left : left + TILE_PX]


def _write_map(
    path: Path, tiles: Iterator[npt.NDArray[np.uint8]], slide: Slide, grid: Grid, what: str
) -> None:
    # Nothing that XML cannot hold.
    shown = re.sub(r"[^\w .()+-]", "_", slide.path.name)
    write_pyramid(
        path,
        tiles,
        size_px=grid.size_px,
        mpp=grid.mpp,
        name=f"{shown}: {what}",
    )


class _Spool:
    """Tiles that wait on the disk until another file is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._lengths: list[int] = []

    def add(self, tile: npt.NDArray[np.uint8]) -> None:
        data = zlib.compress(tile.tobytes(), 1)
        self._file.write(data)
        self._lengths.append(len(data))

    def tiles(self) -> Iterator[npt.NDArray[np.uint8]]:
        self._file.seek(0)
        for length in self._lengths:
            data = zlib.decompress(self._file.read(length))
            yield np.frombuffer(data, np.uint8).reshape(TILE_PX, TILE_PX)


# What follows from the map


class _Regions:
    """The GeoJSON of the positive regions, written one by one, as QuPath takes them."""

    def __init__(
        self, file: IO[str], slide: Slide, grid: Grid, min_area_um2: float, counts: Counts
    ) -> None:
        self._file = file
        self._scale = grid.scale
        self._bounds = np.array(slide.size_px, np.float64)
        self._min_px = min_area_um2 / grid.mpp**2
        self._counts = counts
        file.write('{"type": "FeatureCollection", "features": [')

    def end(self) -> None:
        self._file.write("\n]}\n")

    def add(self, regions: Sequence[Region]) -> None:
        for region in regions:
            if region.area_px < self._min_px:
                self._counts.specks += 1
                continue
            self._file.write(",\n" if self._counts.regions else "\n")
            self._file.write(json.dumps(self._feature(region)))
            self._counts.regions += 1
            self._counts.regions_px += region.area_px

    def _feature(self, region: Region) -> dict[str, Any]:
        rings = []
        for ring in region.rings:
            # The map's last pixels may reach over the slide's edge.
            points = np.minimum(np.concatenate([ring, ring[:1]]) * self._scale, self._bounds)
            whole = np.rint(points)
            rings.append(
                whole.astype(int).tolist()
                if (points == whole).all()
                else np.round(points, 3).tolist()
            )
        return {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": rings},
            "properties": {
                "objectType": "annotation",
                "classification": {"name": CLASS, "color": list(COLOUR)},
            },
        }


def _facts(
    slide: Slide, grid: Grid, model: Model, counts: Counts, threshold: float, min_area_um2: float
) -> dict[str, Any]:
    pixel_um2 = grid.mpp**2
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
            "threshold": threshold,
            "tile_px": grid.tile_px,
            "overlap_px": grid.overlap_px,
        },
        "area": {
            "tissue_um2": counts.tissue_px * pixel_um2,
            "unreadable_um2": counts.lost_px * pixel_um2,
            "positive_um2": counts.positive_px * pixel_um2,
            "positive_fraction": counts.positive_px / counts.seen_px if counts.seen_px else None,
        },
        "regions": {
            "count": counts.regions,
            "area_um2": counts.regions_px * pixel_um2,
            "min_area_um2": min_area_um2,
            "left_out": counts.specks,
        },
        "tiles": {
            "grid": len(grid.starts(0)) * len(grid.starts(1)),
            "tissue": counts.tiles,
            "unreadable": len(counts.faults),
        },
        "model": model.facts,
        "versions": storage.versions(),
    }


def _tell(
    outputs: Mapping[str, Path], slide: Slide, counts: Counts, facts: Mapping[str, Any]
) -> None:
    if counts.faults:
        log.warning(
            "%s: %d of %d tiles cannot be read and are holes in the map, %.4g mm2; the "
            "first: %s",
            slide.path.name, len(counts.faults), counts.tiles,
            facts["area"]["unreadable_um2"] / 1e6, counts.faults[0],
        )  # fmt: skip
    log.info(
        "%s: %.2f%% of %.4g mm2 of tissue is HER2-positive, %d regions",
        outputs["mask"], 100 * (facts["area"]["positive_fraction"] or 0),
        facts["area"]["tissue_um2"] / 1e6, counts.regions,
    )  # fmt: skip


# Flags and files


def _outputs(slide: Path, folder: Path) -> dict[str, Path]:
    """Return where everything goes; refuse what cannot be before hours are spent on it."""
    if not slide.is_file():
        raise SlideError(f"{slide}: no such file; name a slide or an image")
    for parent in (folder, *folder.parents):
        if parent.exists():
            if not parent.is_dir():
                raise ConfigError(f"--out {folder}: {parent} is no folder; name another place")
            break
    name = slide.stem
    if name.lower().endswith(".ome") and len(name) > len(".ome"):
        name = name[: -len(".ome")]
    outputs = {kind: folder / f"{name}{suffix}" for kind, suffix in FILES.items()}
    for path in outputs.values():
        if path.is_dir():
            raise ConfigError(f"{path}: is a folder and would be replaced; name another --out")
        if path.exists() and os.path.samefile(path, slide):
            raise ConfigError(f"{path}: would be written over the slide; name another --out")
    return outputs


def _open(path: Path, mpp: float | None) -> Slide:
    try:
        return open_slide(path, mpp=mpp, mpp_column="--mpp")
    except SlideError as error:
        # There is no sheet here.
        raise SlideError(str(error).replace(" in pairs.tsv", "")) from error


def _share(word: str) -> float:
    value = flags.positive(word)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not between 0 and 1")
    return value


def _area(word: str) -> float:
    return 0.0 if word == "0" else flags.positive(word)
