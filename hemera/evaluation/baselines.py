"""Trivial baselines of both networks.

Of virtual staining: the mean colour, and blurred H&E in the colours of HER2. Of segmentation: a
threshold on the darkness of blurred H&E. They use the training tiles and nothing of the target
image. All tiles are divided by their backgrounds.
"""

import contextlib
import copy
import dataclasses
import threading
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from hemera.dataset.index import TileIndex
from hemera.dataset.torch_dataset import TileDataset
from hemera.files.threads import in_order
from hemera.masks import label_format

RGB = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

BASELINES = ("mean_colour", "blurred")

BLUR_SIGMA_PX = 8.0
"""Standard deviation of the Gaussian blur."""

DARKNESS_TILES = 200
"""Training tiles to which the threshold is fitted."""


@dataclasses.dataclass(frozen=True)
class Colors:
    """Mean and standard deviation (3,) of the channels over the training tiles, 0 to 255."""

    her2_mean: Floats
    her2_std: Floats
    blurred_mean: Floats
    blurred_std: Floats


def images(he: RGB, colors: Colors) -> dict[str, RGB]:
    """Return the images (H, W, 3) of `BASELINES` for an H&E tile (H, W, 3)."""
    standardised = (_blurred(he) - colors.blurred_mean) / np.maximum(colors.blurred_std, 1e-6)
    found = {
        "mean_colour": np.broadcast_to(colors.her2_mean, he.shape),
        "blurred": standardised * colors.her2_std + colors.her2_mean,
    }
    return {name: np.clip(np.rint(image), 0, 255).astype(np.uint8) for name, image in found.items()}


def measure_colors(index: TileIndex | Path) -> Colors:
    """Measure the colours of HER2 and of blurred H&E over GenerationNet's training tiles."""
    tiles = TileDataset(
        index,
        network="generation",
        split="train",
        images=("he", "her2"),
        normalise_background=True,
    )
    local = threading.local()

    def sums(position: int) -> tuple[int, Floats]:
        if not hasattr(local, "tiles"):
            # A shard reader is not thread-safe; a copy opens its own files.
            local.tiles = copy.deepcopy(tiles)
        item = local.tiles.stored(position)
        her2, soft = item["her2"], _blurred(item["he"])
        powers = (her2, np.square(her2, dtype=np.float32), soft, np.square(soft))
        found = np.array([cv2.sumElems(values)[:3] for values in powers])
        return her2.shape[0] * her2.shape[1], found.reshape(2, 2, 3)

    total, pixels = np.zeros((2, 2, 3)), 0
    measured = in_order(sums, range(len(tiles)), torch.get_num_threads())
    progress = tqdm(measured, "training colours", len(tiles), unit="tile", disable=None)
    with contextlib.closing(measured):
        # In the order of the tiles, so that the number of threads does not change the sums.
        for count, found in progress:
            pixels += count
            total += found
    mean = total[:, 0] / pixels
    std = np.sqrt(np.maximum(total[:, 1] / pixels - np.square(mean), 0))
    return Colors(mean[0], std[0], mean[1], std[1])


def dark(he: RGB, threshold: int) -> npt.NDArray[np.bool_]:
    """Return the pixels of an H&E tile (H, W, 3) with at least this darkness, (H, W)."""
    return np.asarray(_darkness(he) >= threshold)


def fit_darkness(index: TileIndex | Path) -> int:
    """Return the darkness, 0 to 255, with the highest F1 over SegmentationNet's training tiles.

    They are up to `DARKNESS_TILES`, evenly spaced.
    """
    tiles = TileDataset(
        index,
        network="segmentation",
        split="train",
        images=("he", "mask"),
        normalise_background=True,
    )
    counts = np.zeros((2, 256), np.int64)
    for place in np.linspace(0, len(tiles) - 1, min(DARKNESS_TILES, len(tiles))).round():
        item = tiles.stored(int(place))
        darkness, positive = _darkness(item["he"]), label_format.positive(item["mask"])
        valid = ~label_format.excluded(item["mask"])
        for row, where in enumerate((positive & valid, ~positive & valid)):
            counts[row] += np.bincount(darkness[where], minlength=256)
    hit, false = counts[:, ::-1].cumsum(axis=1)[:, ::-1]
    f1 = 2 * hit / np.maximum(hit + false + counts[0].sum(), 1)
    return int(f1.argmax())


def _darkness(he: RGB) -> npt.NDArray[np.uint8]:
    return np.asarray(255 - np.rint(_blurred(he).mean(axis=2)), np.uint8)


def _blurred(image: RGB) -> npt.NDArray[np.float32]:
    return np.asarray(cv2.GaussianBlur(image.astype(np.float32), (0, 0), BLUR_SIGMA_PX), np.float32)
