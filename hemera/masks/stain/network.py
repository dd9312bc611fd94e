"""Nuclei by the network that was trained on synthetic tissue, see `hemera train-nuclei`."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch

from hemera.errors import EngineError, TrainingError
from hemera.imaging import color
from hemera.masks.stain import Options
from hemera.masks.stain.nuclei import (
    Dark,
    Labels,
    Limits,
    Nuclei,
    Tile,
    areas_and_means,
    dark_pixels,
    outlined,
    split,
)
from hemera.masks.stain.numbering import enlarged, numbered
from hemera.networks import nuclei as network
from hemera.networks.storage import load_into, read_weights

Map = npt.NDArray[np.uint8]

# Value of the map of centres, 0 to 1, from which a nucleus needs no confirmation, and the fraction
# of it that confirms one: dark by the thresholds.
_CONFIRMED_MIN = 0.5
_DARK_FRACTION = 0.7
# Smallest evidence, see `Limits`, and how far dark pixels belong to a nucleus of the network, um.
_EVIDENCE_UM = 0.7
_GROW_UM = 4.0
# A nuclear marker: dark pixels that the network takes for nothing are a nucleus, too, with this
# evidence against the rest of the tile, and with at most this fraction of them in others.
_ALONE_EVIDENCE_UM = 2.5
_ALONE_FRACTION = 0.1


class NetworkDetector:
    """The network with its weights."""

    def __init__(self, weights: Path, options: Options) -> None:
        """Load the weights.

        Raises:
            EngineError: when they are missing, damaged, or of another network.
        """
        net = network.NucleusNet()
        try:
            load_into(net, read_weights(weights), str(weights))
        except TrainingError as error:
            raise EngineError(str(error)) from error
        # In float32: with bfloat16, labels differ between processors in 1 pixel of 800.
        self._net = network.fused(net)
        self._options = options
        self._alone_um = _ALONE_EVIDENCE_UM if options.compartment == "nucleus" else math.inf
        self._limits = Limits(
            area_min_um2=options.nucleus_area_min_um2,
            area_max_um2=options.nucleus_area_max_um2,
            edge_min=0.0,
            evidence_min_um=_EVIDENCE_UM,
            core_um=0.0,
            grow_um=_GROW_UM,
            without_pale=options.compartment == "nucleus",
        )

    def find(self, tile: Tile) -> Nuclei:
        """Return the nuclei of a tile.

        The network finds nuclei and separates those that touch. A nucleus whose maximum is low must
        also be dark by the thresholds of `nuclei.find_nuclei`. Of a nuclear marker, what is very
        dark by these is a nucleus without the network, which misses some of DAB alone. The outline
        is the edge of the stain at the resolution of the tile, finer than that of the network.
        """
        dark = dark_pixels(tile, self._options)
        centre, inside = self.maps(tile.rgb, tile.mpp, tile.stains.background)
        shape, excluded = tile.rgb.shape[:2], tile.excluded
        if excluded is not None:
            rows, columns = inside.shape
            inside[cv2.resize(excluded.view(np.uint8), (columns, rows)) > 0] = 0
        own_mpp = tile.mpp * math.sqrt(math.prod(shape) / inside.size)
        small = numbered(centre, inside, own_mpp, area_min_um2=self._options.nucleus_area_min_um2)
        pieces = enlarged(small, inside, shape)
        if excluded is not None:
            pieces[excluded] = 0
        count = int(small.max(initial=0)) + 1
        kept = np.bincount(small[centre >= 255 * _CONFIRMED_MIN], minlength=count) > 0
        area = np.bincount(pieces.ravel(), minlength=count)
        kept |= np.bincount(pieces[dark.inside > 0], minlength=count) >= _DARK_FRACTION * area
        kept[0] = False
        numbers = np.where(kept, np.arange(count), 0).astype(np.int32)
        pieces = np.take(numbers, pieces, mode="clip")
        if self._alone_um < math.inf:
            pieces = _with_dark(tile, dark, pieces, self._alone_um)
        return outlined(tile, dark, pieces, self._limits)

    def maps(
        self, rgb: npt.NDArray[np.uint8], mpp: float, background: color.Color
    ) -> tuple[Map, Map]:
        """Return the maps of centres and insides, 0 to 255, at the network's resolution."""
        height, width = rgb.shape[:2]
        # A coarser tile is not enlarged: it has no finer detail.
        scale = min(mpp / network.MPP, 1.0)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        own = np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), np.uint8)
        margins = [-n % network.MULTIPLE for n in size]
        padded = cv2.copyMakeBorder(own, 0, margins[1], 0, margins[0], cv2.BORDER_REPLICATE)
        densities = torch.from_numpy(network.encode(np.asarray(padded, np.uint8), background))
        with torch.inference_mode(), _one_thread():
            # (H, W, 3) in memory is what the convolutions read fastest.
            logits = self._net.quarters(densities.permute(2, 0, 1)[None])
            values = torch.sigmoid(logits).mul_(255).round_().to(torch.uint8)[0]
        # Of every position two maps of two rows of two pixels; a row is moved as one number.
        rows, columns = values.shape[1:]
        quarters = values.permute(1, 2, 0).numpy().reshape(rows, columns, 2, 2, 2)
        halves = quarters.view(np.uint16)[..., 0].transpose(2, 0, 3, 1)
        both = np.ascontiguousarray(halves).view(np.uint8).reshape(2, 2 * rows, 2 * columns)
        centre, inside = (np.ascontiguousarray(one[: size[1], : size[0]]) for one in both)
        return centre, inside


def _with_dark(tile: Tile, dark: Dark, pieces: Labels, evidence_min_um: float) -> Labels:
    """Return numbered pieces (H, W), and after them those that are very dark beside them."""
    alone = split(dark, tile.mpp)
    count = int(alone.max(initial=0)) + 1
    areas, densities = areas_and_means(alone, dark.smooth, alone > 0, count)
    others = np.bincount(alone[pieces > 0], minlength=count)
    rest = dark.smooth[dark.inside == 0]
    contrast = densities - (float(np.median(rest)) if rest.size else 0.0)
    least = evidence_min_um * tile.stains.nuclear_density
    added = (contrast * np.sqrt(areas) * tile.mpp >= least) & (others <= _ALONE_FRACTION * areas)
    added[0] = False
    numbers = np.where(added, int(pieces.max(initial=0)) + np.cumsum(added), 0).astype(np.int32)
    return np.where(pieces > 0, pieces, np.take(numbers, alone, mode="clip"))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let PyTorch use one thread: another number changes the last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
