"""The tiles of an index for PyTorch: selection, crops, flips and rotations.

What is drawn at random follows from (seed, epoch, position) alone, so neither the number of worker
processes nor how they start nor a resumed run changes the tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import Dataset

from hemera.dataset.index import TileIndex
from hemera.dataset.shards import ShardReader
from hemera.errors import ConfigError, ShardError, TrainingError
from hemera.imaging.codecs import decode, decode_mask
from hemera.imaging.color import WHITE, Color, normalise_background
from hemera.masks import label_format
from hemera.networks.weight_map import weight_map

STORED = ("he", "her2", "mask")
DERIVED = ("positive", "valid", "weight")
"""Computed from the mask."""

BACKGROUND = "her2_background"

MASK_SOURCES = {"nuclei": label_format.nuclei, "her2_positive": label_format.positive}
"""The pixels that the weight map measures distances to, by name."""


def tile_weight(
    mask: npt.NDArray[np.uint8],
    *,
    mode: str = "inside",
    source: str = "nuclei",
    renormalise_mean: bool = False,
) -> npt.NDArray[np.float32]:
    """Return GenerationNet's weight map of a label image, (H, W); see `weight_map`.

    `source` is a name of `MASK_SOURCES`; mode positive has her2_positive.
    """
    source = "her2_positive" if mode == "positive" else source
    return weight_map(MASK_SOURCES[source](mask), mode, renormalise_mean=renormalise_mean)


class TileDataset(Dataset[dict[str, Any]]):
    """Tiles of an index as tensors; a map-style dataset.

    An item is a dict of ``tile`` (its id) and the requested images, all on the same pixels:

    ========  ==========  =======  ================================================
    he, her2  (3, H, W)   uint8    RGB, 0 to 255: scale them on the GPU
    mask      (1, H, W)   uint8    label byte, see `hemera.masks.label_format`
    positive  (1, H, W)   bool     HER2-positive pixels of the mask
    valid     (1, H, W)   bool     pixels that the mask does not exclude
    weight    (1, H, W)   float32  GenerationNet's weight map, in (0, 1]
    ========  ==========  =======  ================================================

    With ``her2_background`` there is the colour of that background too, (3, 1, 1), float32, 0 to 1:
    white where `normalise_background`.

    The key (epoch, position) gives a tile as in that epoch: cropped, flipped and turned,
    the images of a tile alike, by (seed, epoch, position). Epoch 0 is validation: the crop is
    central, without flips and rotations. A plain position takes the epoch of `set_epoch`, at
    first 0.
    """

    def __init__(
        self,
        index: TileIndex | Path | str,
        *,
        engine: str | None = None,
        images: Sequence[str] = STORED,
        weighting: Callable[..., npt.NDArray[np.float32]] = tile_weight,
        crop_px: int | None = None,
        flips: Sequence[int] = (),
        turns: bool = False,
        normalise_background: bool = False,
        seed: int = 0,
        **rows: Any,
    ) -> None:
        """Select tiles and their augmentation.

        Args:
            index: the index; shards are found from the folder above the index's own.
            engine: whose masks; None for those that the index was made to train on.
            images: of he, her2, mask, positive, valid, weight and her2_background; only what they
                need is decoded.
            weighting: computes the weight map from the mask.
            crop_px: side of the square crop; None for the full tile.
            flips: axes along which a tile may be flipped: 1 is left to right, 0 top to bottom.
            turns: whether a tile may be turned by quarters; it must be square, or cropped.
            normalise_background: divide H&E and HER2 by their backgrounds, which become white.
            seed: of crops, flips and turns.
            rows: conditions of `TileIndex.select`: where, network, split, refused.
        """
        index = index if isinstance(index, TileIndex) else TileIndex(index)
        known = (*STORED, *DERIVED, BACKGROUND)
        if isinstance(images, str) or not {*images} - {BACKGROUND} or set(images) - set(known):
            raise ConfigError(f"images: {images!r}; give a list of {', '.join(known)}")
        if crop_px is not None and crop_px < 1:
            raise ConfigError(f"crop_px: {crop_px}; give at least 1, or None for full tiles")
        self.images = tuple(dict.fromkeys(images))
        self.weighting = weighting
        self.crop_px = crop_px
        self.flips = tuple(flips)
        self.turns = turns
        self.normalise_background = normalise_background
        self.seed = seed
        needed = {"mask" if name in DERIVED else name for name in images} - {BACKGROUND}
        self._decoded = [name for name in STORED if name in needed]
        self._locate(index, engine, rows)
        self._reader = ShardReader(index.path.parent.parent)
        # Shared, so that persistent workers read the next epoch.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def _locate(self, index: TileIndex, engine: str | None, rows: dict[str, Any]) -> None:
        """Read where the images of the selected rows are, into arrays shared by forked workers."""
        members = {name: ("shard", name) for name in self._decoded}
        if "mask" in members:
            engine = engine or index.mask_target
            members["mask"] = (f"{engine}_shard", engine)
        shards = [shard for shard, _ in members.values()]
        offsets, lengths, digests = (
            [f"{prefix}_{of}" for _, prefix in members.values()]
            for of in ("offset", "length", "sha256")
        )
        stains = ("he", "her2")
        backgrounds = [f"{stain}_background" for stain in stains]
        columns = dict.fromkeys(["tile", *shards, *offsets, *lengths, *digests, *backgrounds])
        table = index.select(list(columns), **rows)
        if lacking := table.column(shards[-1]).null_count:
            raise ShardError(
                f"{index.path}: {lacking} tiles without a mask of {engine}; run mask and index "
                "again"
            )
        self._backgrounds = {
            stain: np.stack(table.column(name).to_numpy()).astype(np.uint8).reshape(-1, 3)
            if len(table) else np.empty((0, 3), np.uint8)
            for stain, name in zip(stains, backgrounds, strict=True)
        }  # fmt: skip
        self._tiles = table.column("tile").cast(pa.large_string()).combine_chunks()
        self._shards = [table.column(name).combine_chunks().dictionary_encode() for name in shards]
        self._offsets, self._lengths = (
            np.stack([table.column(name).to_numpy().astype(kind) for name in names], axis=1)
            for names, kind in ((offsets, np.int64), (lengths, np.int32))
        )
        # The first eight bytes find an error as surely, in a quarter of the memory.
        self._digests = np.stack([_first_bytes(table.column(name)) for name in digests], axis=1)
        self._compared = np.zeros(self._digests.shape, np.bool_)

    @property
    def tiles(self) -> list[str]:
        """The ids of all tiles."""
        return list(self._tiles.to_pylist())

    def position(self, tile: str) -> int:
        """Return the position of a tile by its id; KeyError when it is not among the tiles."""
        found = pc.index(self._tiles, tile).as_py()
        if found < 0:
            raise KeyError(tile)
        return int(found)

    def __len__(self) -> int:
        """Return the number of tiles."""
        return len(self._tiles)

    def background(self, position: int, stain: str) -> Color:
        """Return the colour of the background of a tile's stored image of he or her2."""
        red, green, blue = self._backgrounds[stain][position].tolist()
        return red, green, blue

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of plain positions, before a loader begins it; 0 is validation."""
        self._epoch[0] = epoch

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        """Return the tensors of a tile, and its id, by (epoch, position) or by position."""
        epoch, position = key if isinstance(key, tuple) else (int(self._epoch[0]), key)
        position = self._checked(position)
        seen: dict[str, npt.NDArray[Any]] = {}
        view: _View | None = None
        # One image after the other, while it is in the processor's cache.
        for name, image in self._images(position, self._decoded):
            view = view or self._view(image.shape[:2], epoch, position)
            seen[name] = _apply(view, image)
        if "positive" in self.images:
            seen["positive"] = label_format.positive(seen["mask"][0])[None]
        if "valid" in self.images:
            seen["valid"] = ~label_format.excluded(seen["mask"][0])[None]
        if "weight" in self.images:
            seen["weight"] = self.weighting(seen["mask"][0])[None]
        if BACKGROUND in self.images:
            color = WHITE if self.normalise_background else self.background(position, "her2")
            seen[BACKGROUND] = np.array(color, np.float32).reshape(3, 1, 1) / 255
        return {
            "tile": self._name(position),
            **{name: torch.from_numpy(seen[name]) for name in self.images},
        }

    def stored(self, position: int, images: Sequence[str] | None = None) -> dict[str, Any]:
        """Return a tile's id and uncropped images: he and her2 (H, W, 3), mask (H, W).

        With `normalise_background` those of the stains are divided by their backgrounds. `images`
        are some of those that the dataset reads; None for all.
        """
        position = self._checked(position)
        names = self._decoded if images is None else images
        return {"tile": self._name(position), **dict(self._images(position, names))}

    def _name(self, position: int) -> str:
        return str(self._tiles[position].as_py())

    def _checked(self, position: int) -> int:
        if not -len(self) <= position < len(self):
            raise IndexError(f"tile {position} of {len(self)}")
        return int(position) % len(self)

    def _images(
        self, position: int, names: Sequence[str]
    ) -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
        """Read and decode images of a tile, which must have one size."""
        size = None
        for name in names:
            place = self._decoded.index(name)
            # Once per process: in each epoch, it would be 4 to 5 % of the decoding.
            compared = self._compared[position, place]
            data = self._reader.read(
                self._shards[place][position].as_py(),
                int(self._offsets[position, place]),
                int(self._lengths[position, place]),
                b"" if compared else self._digests[position, place].tobytes(),
            )
            self._compared[position, place] = True
            image = decode_mask(data) if name == "mask" else decode(data)
            if self.normalise_background and name != "mask":
                image = normalise_background(image, self.background(position, name))
            size = size or image.shape[:2]
            if image.shape[:2] != size:
                raise ShardError(
                    f"{self._name(position)}: {name} is {image.shape[1]} x {image.shape[0]} px and "
                    f"{names[0]} {size[1]} x {size[0]}; run tile and mask again"
                )
            yield name, image

    def _view(self, size: tuple[int, int], epoch: int, position: int) -> _View:
        """Draw the view of a tile of this size, (height, width)."""
        height, width = size
        cut_height, cut_width = self.crop_px or height, self.crop_px or width
        if cut_height > height or cut_width > width:
            raise TrainingError(
                f"{self._name(position)}: {width} x {height} px is smaller than crop_px "
                f"{self.crop_px}; give a smaller crop or none"
            )
        if self.turns and cut_height != cut_width:
            raise TrainingError(
                f"{self._name(position)}: {width} x {height} px cannot be turned by quarters; give "
                "crop_px"
            )
        margin = (height - cut_height, width - cut_width)
        top, left = margin[0] // 2, margin[1] // 2
        transpose, flips = False, (False, False)
        if epoch and (any(margin) or self.flips or self.turns):
            rng = np.random.default_rng((1, self.seed, epoch, position))
            top, left = (int(rng.integers(extent + 1)) for extent in margin)
            axes = [axis for axis in self.flips if rng.random() < 0.5]
            flips = (0 in axes, 1 in axes)
            for _ in range(int(rng.integers(4)) if self.turns else 0):
                # A quarter to the left: transposed, then flipped top to bottom.
                transpose, flips = not transpose, (not flips[1], flips[0])
        crop = (slice(top, top + cut_height), slice(left, left + cut_width))
        return _View(crop, transpose, flips)


def _first_bytes(digests: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """Return the first eight bytes of digests (N,) in hexadecimal digits, as they are in memory."""
    digits = "".join(pc.utf8_slice_codeunits(digests, 0, 16).to_pylist())
    return np.frombuffer(bytes.fromhex(digits), np.uint64)


class _View(NamedTuple):
    """A view of an image: a crop, which may be transposed, then flipped."""

    crop: tuple[slice, slice]
    transpose: bool
    flips: tuple[bool, bool]
    """Top to bottom, left to right."""


_FLIP = {(True, False): 0, (False, True): 1, (True, True): -1}
"""OpenCV's codes."""


def _apply(view: _View, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return planes (C, H, W) of a view of an image (H, W, C) or (H, W), by OpenCV for speed."""
    seen: Any = image[view.crop]
    if view.transpose:
        seen = cv2.transpose(seen)
    if any(view.flips):
        seen = cv2.flip(seen, _FLIP[view.flips])
    if seen.ndim == 2:
        return np.ascontiguousarray(seen)[None]
    planes = np.empty((seen.shape[2], *seen.shape[:2]), np.uint8)
    cv2.split(seen, list(planes))
    return planes
