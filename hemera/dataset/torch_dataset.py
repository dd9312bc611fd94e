"""The tiles of an index for PyTorch: which of them, how a network sees them, in which order.

What is drawn at random follows from (seed, epoch, position) alone, so neither the number of reading
processes nor how they start nor a break changes what is seen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import Dataset, Sampler

from hemera import tables
from hemera.dataset.queries import select
from hemera.dataset.shards import ShardReader
from hemera.errors import ConfigError, ShardError, TableError, TrainingError
from hemera.imaging.codecs import decode, decode_mask
from hemera.masks import label_format
from hemera.networks.weight_map import registration_weight, weight_map

STORED = ("he", "her2", "mask")
DERIVED = ("positive", "weight")
"""What is made of the mask."""


@dataclasses.dataclass(frozen=True)
class Weighting:
    """How GenerationNet's weight map is made (HEMERA paper, 3.1, equation 1).

    `mode` and `renormalise_mean` are those of `hemera.weights.weight_map`; `source` says whose
    distances count, nuclei or her2_positive; `scale_um` is the error of the registration at which
    a tile counts half, None: all tiles alike.
    """

    mode: str = "inside"
    source: str = "nuclei"
    renormalise_mean: bool = False
    scale_um: float | None = None

    def __post_init__(self) -> None:
        """Refuse what there is not."""
        for name, known in (("mode", ("inside", "literal", "none")), ("source", tuple(_SOURCES))):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(
                    f"Weighting.{name}: {value!r} is none; choose from {', '.join(known)}"
                )


_SOURCES = {"nuclei": label_format.nuclei, "her2_positive": label_format.positive}


class TileDataset(Dataset[dict[str, Any]]):
    """Tiles of an index as tensors; a map-style dataset.

    An item is a dict of ``tile`` (its id) and the images asked for, all on the same pixels:

    ========  ==========  =======  ================================================
    he, her2  (3, H, W)   uint8    RGB, 0 to 255: the GPU is the place to scale them
    mask      (1, H, W)   uint8    label byte, see `hemera.masks`
    positive  (1, H, W)   bool     HER2-positive pixels of the mask
    weight    (1, H, W)   float32  GenerationNet's weight map, in (0, 1]
    ========  ==========  =======  ================================================

    The key (epoch, position) gives a tile as it is seen in that epoch: cut, flipped and turned, the
    images of a tile alike, by (seed, epoch, position). Epoch 0 is validation: the cut is central,
    nothing is flipped or turned. A plain position takes the epoch of `set_epoch`, at first 0.

    Columns are held as arrays: about 100 bytes per tile, which forked workers share.
    """

    def __init__(
        self,
        index: Path | str,
        *,
        where: str | pc.Expression | None = None,
        network: str | None = None,
        part: str | None = None,
        refused: bool = False,
        engine: str | None = None,
        images: Sequence[str] = STORED,
        weighting: Weighting | None = None,
        crop_px: int | None = None,
        flips: Sequence[int] = (),
        turns: bool = False,
        deferred: bool = False,
        seed: int = 0,
    ) -> None:
        """Choose tiles, and how they are seen.

        Args:
            index: the index; shards are found from the folder above the index's own.
            where: a condition on its columns, a pandas query such as ``"score == '3+'"`` or a
                pyarrow expression.
            network: generation or segmentation: the tiles drawn for it.
            part: train, val or test, of the network or, without one, of the cohort.
            refused: take tiles too that filter refused.
            engine: whose masks; None for those that the index was made to train on.
            images: of he, her2, mask, positive and weight; only what they need is decoded.
            weighting: of the weight map; None for `Weighting()`.
            crop_px: side of the square that is cut out; None for the whole tile.
            flips: axes along which a tile may be flipped: 1 is left to right, 0 top to bottom.
            turns: whether a tile may be turned by quarters; it must be square, or cut so.
            deferred: leave flips and turns to `turned`, which does them for a batch where that
                lies, on a GPU say; an item then holds ``view``, what is to be done.
            seed: of cuts, flips and turns.

        Raises:
            ShardError: when the index lacks the columns, or a chosen tile its mask.
            ConfigError: when `where` cannot be asked of the index, or an argument cannot be.
        """
        index = Path(index)
        self.images = _known(images)
        self.weighting = weighting or Weighting()
        self.crop_px = crop_px
        self.flips = tuple(flips)
        self.turns = turns
        self.deferred = deferred
        self.seed = seed
        if crop_px is not None and crop_px < 1:
            raise ConfigError(f"crop_px: {crop_px}; give at least 1, or None for whole tiles")
        if set(self.flips) - {0, 1}:
            raise ConfigError(f"flips: {self.flips}; give axes, 0 and 1")
        if seed < 0:
            raise ConfigError(f"seed: {seed}; give at least 0")
        self._decoded = _decoded(self.images)
        scaled = "weight" in self.images and self.weighting.scale_um is not None
        own = ["tile", "shard"]
        places = [name for name in self._decoded if name != "mask"]
        mask_shard = None
        if "mask" in self._decoded:
            engine = engine or mask_engine(index)
            mask_shard = f"{engine}_shard"
            own.append(mask_shard)
            places.append(engine)
        offsets, lengths = ([f"{name}_{of}" for name in places] for of in ("offset", "length"))
        error = ["registration_error_um"] if scaled else []
        table = select(
            index,
            [*own, *offsets, *lengths, *error],
            where=where,
            network=network,
            split=part,
            refused=refused,
        )
        if mask_shard is not None and (lacking := table.column(mask_shard).null_count):
            raise ShardError(
                f"{index}: {lacking} tiles without a mask of {engine}; run mask and index again"
            )
        self.tiles: Sequence[str] = Texts(table.column("tile"))
        self._shards = [_codes(table.column("shard"))] * len(places)
        if mask_shard is not None:
            self._shards[-1] = _codes(table.column(mask_shard))
        self._offsets = _integers(table, offsets, np.int64)
        self._lengths = _integers(table, lengths, np.int32)
        self._errors_um = (
            table.column(error[0]).cast(pa.float64()).to_numpy().astype(np.float64)
            if scaled
            else None
        )
        self._reader = ShardReader(index.absolute().parent.parent)
        # Shared, so that workers which live on see the next epoch.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        """Return the number of tiles."""
        return len(self.tiles)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch plain positions are of, before a loader begins it; 0 is validation."""
        self._epoch[0] = epoch

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        """Return the tensors of a tile, and its id.

        Args:
            key: (epoch, position), or a position.

        Raises:
            IndexError: past the end.
            ShardError: when a shard does not hold what the index says.
            TrainingError: when the tile is smaller than the cut, or cannot be turned.
        """
        epoch, position = key if isinstance(key, tuple) else (int(self._epoch[0]), key)
        position = self._checked(position)
        seen: dict[str, npt.NDArray[np.uint8]] = {}
        size = None
        # One image after the other, while it is in the processor's cache.
        for name, image in self._images(position, self._decoded):
            if size is None:
                size = image.shape[:2]
                view = self._view(size, epoch, position)
                now = view._replace(transpose=False, flips=(False, False))
            seen[name] = _seen(image, now if self.deferred else view)
        item: dict[str, Any] = {"tile": self.tiles[position]}
        if self.deferred:
            item["view"] = torch.tensor([view.transpose, *view.flips])
        for name in self.images:
            planes = seen[name] if name in STORED else self._derived(name, seen["mask"], position)
            item[name] = torch.from_numpy(planes)
        return item

    def stored(self, position: int, images: Sequence[str] | None = None) -> dict[str, Any]:
        """Return a tile's id and images whole, as arrays: he and her2 (H, W, 3), mask (H, W).

        Args:
            position: of the tile.
            images: of he, her2 and mask, those that the dataset reads; None for all of these.

        Raises:
            IndexError: past the end.
            ShardError: when a shard does not hold what the index says.
        """
        position = self._checked(position)
        names = self._decoded if images is None else images
        return {"tile": self.tiles[position], **dict(self._images(position, names))}

    def _checked(self, position: int) -> int:
        if not -len(self) <= position < len(self):
            raise IndexError(f"tile {position} of {len(self)}")
        return int(position) % len(self)

    def _images(
        self, position: int, names: Sequence[str]
    ) -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
        """Read and decode images of a tile, held to one size."""
        size = None
        for name in names:
            place = self._decoded.index(name)
            shards, codes = self._shards[place]
            data = self._reader.read(
                shards[codes[position]],
                int(self._offsets[position, place]),
                int(self._lengths[position, place]),
            )
            image = decode_mask(data) if name == "mask" else decode(data)
            size = size or image.shape[:2]
            if image.shape[:2] != size:
                raise ShardError(
                    f"{self.tiles[position]}: {name} is {image.shape[1]} x {image.shape[0]} px and "
                    f"{names[0]} {size[1]} x {size[0]}; run tile and mask again"
                )
            yield name, image

    def _view(self, size: tuple[int, int], epoch: int, position: int) -> _View:
        """Draw what is seen of a tile of this size, (height, width)."""
        height, width = size
        cut_height, cut_width = self.crop_px or height, self.crop_px or width
        if cut_height > height or cut_width > width:
            raise TrainingError(
                f"{self.tiles[position]}: {width} x {height} px is smaller than crop_px "
                f"{self.crop_px}; give a smaller crop or none"
            )
        if self.turns and cut_height != cut_width:
            raise TrainingError(
                f"{self.tiles[position]}: {width} x {height} px cannot be turned by quarters; give "
                "crop_px"
            )
        room = (height - cut_height, width - cut_width)
        top, left = room[0] // 2, room[1] // 2
        transpose, flips = False, (False, False)
        if epoch and (any(room) or self.flips or self.turns):
            rng = np.random.default_rng((1, self.seed, epoch, position))
            top, left = (int(rng.integers(extent + 1)) for extent in room)
            axes = [axis for axis in self.flips if rng.random() < 0.5]
            flips = (0 in axes, 1 in axes)
            for _ in range(int(rng.integers(4)) if self.turns else 0):
                # A quarter to the left: rows and columns change places, then top and bottom.
                transpose, flips = not transpose, (not flips[1], flips[0])
        return _View(
            (slice(top, top + cut_height), slice(left, left + cut_width)),
            transpose,
            flips,
        )

    def _derived(
        self, name: str, mask: npt.NDArray[np.uint8], position: int
    ) -> npt.NDArray[np.generic]:
        """Return what is made of a mask (1, H, W), of the same shape."""
        if name == "positive":
            return label_format.positive(mask[0])[None]
        how = self.weighting
        weight = weight_map(
            _SOURCES[how.source](mask[0]), how.mode, renormalise_mean=how.renormalise_mean
        )
        if self._errors_um is not None:
            error_um = float(self._errors_um[position])
            weight = weight * np.float32(registration_weight(error_um, how.scale_um))
        return weight[None]


class _View(NamedTuple):
    """What is seen of an image: a part, whose rows and columns may change places, then flipped."""

    part: tuple[slice, slice]
    transpose: bool
    flips: tuple[bool, bool]
    """Top to bottom, left to right."""


_FLIP = {(True, False): 0, (False, True): 1, (True, True): -1}
"""As OpenCV counts."""


def _seen(image: npt.NDArray[np.uint8], view: _View) -> npt.NDArray[np.uint8]:
    """Return planes (C, H, W) of what a view shows of an image (H, W, C) or (H, W).

    OpenCV is ten times as fast here as NumPy with its strides, and fastest on single planes.
    """
    image = image[view.part]
    height, width = image.shape[:2]
    if image.ndim == 2:
        planes = np.ascontiguousarray(image)[None]
    else:
        planes = np.empty((image.shape[2], height, width), np.uint8)
        cv2.split(image, list(planes))
    if view.transpose:
        turned = np.empty((len(planes), width, height), np.uint8)
        for source, target in zip(planes, turned, strict=True):
            cv2.transpose(source, target)
        planes = turned
    if any(view.flips):
        flipped = np.empty_like(planes)
        for source, target in zip(planes, flipped, strict=True):
            cv2.flip(source, _FLIP[view.flips], target)
        planes = flipped
    return planes


def turned(batch: dict[str, Any]) -> dict[str, Any]:
    """Do for a batch of deferred items what its ``view`` (B, 3) says, where its tensors lie.

    Its flags are: rows and columns change places, then flipped top to bottom, left to right.
    """
    views = batch["view"].view(-1, 3, 1, 1, 1).unbind(1)
    done = {}
    for name, images in batch.items():
        if name in (*STORED, *DERIVED):
            # Tiles that are turned are square: others cannot be asked for.
            if images.shape[-1] == images.shape[-2]:
                images = torch.where(views[0], images.transpose(-1, -2), images)
            images = torch.where(views[1], images.flip(-2), images)
            done[name] = torch.where(views[2], images.flip(-1), images)
        elif name != "view":
            done[name] = images
    return done


class Order(Sampler[list[tuple[int, int]]]):
    """The batches of a whole run, from any point on: each epoch is one shuffle of all tiles.

    It is given to a loader as its `batch_sampler`; its keys are those of a `TileDataset`.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        seed: int,
        epochs: int,
        epoch: int = 1,
        step: int = 0,
        whole: bool = False,
        parts: int = 1,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """Order `count` tiles, beginning with batch `step`, from 0, of `epoch`.

        Args:
            count: number of tiles.
            batch_size: tiles of a batch, over all its parts and processes.
            seed: of the shuffles.
            epochs: epochs in all.
            epoch: the first to be given.
            step: batches of it that are left out, being done.
            whole: leave a smaller last batch out, as is done wherever batches are shared out.
            parts: parts of equal size in which a batch is given, one after the other.
            rank: which process this is, from 0: it gets its share of each part.
            ranks: processes that share each part.

        Raises:
            TrainingError: when the tiles do not make one batch that must be whole.
        """
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self.epochs = epochs
        self.epoch = epoch
        self.step = step
        self.whole = whole or parts * ranks > 1
        self.parts = parts
        self.rank = rank
        self.ranks = ranks
        if self.whole and count < batch_size:
            raise TrainingError(
                f"batch_size: {batch_size} tiles make a step and there are {count}; give a smaller "
                "batch or more tiles"
            )

    @property
    def steps(self) -> int:
        """Batches per epoch; the last may be smaller, unless all must be whole."""
        return (
            self.count // self.batch_size if self.whole else math.ceil(self.count / self.batch_size)
        )

    @property
    def steps_left(self) -> int:
        """Batches that are left."""
        return (self.epochs - self.epoch + 1) * self.steps - self.step

    def __len__(self) -> int:
        """Return the number of parts left."""
        return self.steps_left * self.parts

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield the keys of this process of each part of each batch."""
        shares = self.parts * self.ranks
        for epoch in range(self.epoch, self.epochs + 1):
            order = np.random.default_rng((0, self.seed, epoch)).permutation(self.count)
            first = self.step if epoch == self.epoch else 0
            for step in range(first, self.steps):
                batch = order[step * self.batch_size : (step + 1) * self.batch_size]
                for share in np.array_split(batch, shares)[self.rank :: self.ranks]:
                    yield [(epoch, int(position)) for position in share]


class Texts(Sequence[str]):
    """Texts in two arrays: a million of them take the room of their letters, and forks share it."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        """Take the texts of a column."""
        array = column.cast(pa.large_string()).combine_chunks()
        _, bounds, data = array.buffers()
        held = np.frombuffer(bounds, np.int64) if bounds is not None else np.zeros(1, np.int64)
        held = held[array.offset : array.offset + len(array) + 1]
        self._bounds = held - held[0]
        self._data = memoryview(data)[held[0] : held[-1]].tobytes() if data is not None else b""

    def __len__(self) -> int:
        """Return how many they are."""
        return len(self._bounds) - 1

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        """Return one text, or those of a slice."""
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(f"text {place} of {len(self)}")
        place %= len(self)
        return self._data[self._bounds[place] : self._bounds[place + 1]].decode()


def mask_engine(index: Path) -> str:
    """Return the engine whose masks an index was made to train on.

    Raises:
        ShardError: when it does not say.
    """
    try:
        found = tables.read_metadata(index).get("mask_target")
    except TableError as error:
        raise ShardError(f"{index}: not an index ({error}); run index again") from error
    if found is None:
        raise ShardError(f"{index}: does not say whose masks count; name an engine")
    return found


def _known(images: Sequence[str]) -> tuple[str, ...]:
    known = (*STORED, *DERIVED)
    if isinstance(images, str) or not images or set(images) - set(known):
        raise ConfigError(f"images: {images!r}; give a list of {', '.join(known)}")
    return tuple(dict.fromkeys(images))


def _decoded(images: Sequence[str]) -> tuple[str, ...]:
    """Return what must be decoded for these images, in the order of `STORED`."""
    needed = {name if name in STORED else "mask" for name in images}
    return tuple(name for name in STORED if name in needed)


def _codes(column: pa.ChunkedArray) -> tuple[list[str], npt.NDArray[np.int32]]:
    """Keep each shard's name once: a long index names few shards many times."""
    coded = column.combine_chunks().dictionary_encode()
    return coded.dictionary.to_pylist(), coded.indices.to_numpy().astype(np.int32)


def _integers(table: pa.Table, names: Sequence[str], kind: type) -> npt.NDArray[Any]:
    return np.stack([table.column(name).to_numpy().astype(kind) for name in names], axis=1)
