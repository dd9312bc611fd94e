"""Nuclei by the network that was trained on synthetic tissue, see `hemera train-nuclei`."""

from __future__ import annotations

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
from hemera.imaging.morphology import detached_pixels, disc, fill_holes
from hemera.masks.stain import Options
from hemera.masks.stain.nuclei import Nuclei
from hemera.masks.stain.stains import Stains
from hemera.networks import nuclei as network
from hemera.networks.storage import load_into, read_weights

Labels = npt.NDArray[np.int32]
Map = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

# Smallest value of a maximum of the map of centres, and of the map of insides: out of 255. Chosen
# leaving one source of real images out at a time; see docs/methods.md.
_CENTRE_MIN = 0.45
_INSIDE_MIN = 0.30
# Smallest distance between two centres, and standard deviation of the blur of their map, um.
_SEPARATION_UM = 4.5
_BLUR_UM = 0.8
# Largest hole that is filled, um^2.
_HOLE_UM2 = 8.0
_CROSS = np.asarray(cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3)), np.uint8)
# Values of the map of centres down to which nuclei grow, one after the other, and their largest
# radius, um.
_LEVELS = (0.8, 0.6, 0.45, 0.3, 0.2, 0.1, 0.0)
_GROWTH_UM = 14.0
# A coarser tile is enlarged by no more than this: it has no finer detail.
_ENLARGED_MAX = 1.1


class NetworkDetector:
    """The network with its weights; see `hemera.masks.stain.detectors.Detector`."""

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
        self._area_min_um2 = options.nucleus_area_min_um2

    def find(
        self,
        rgb: npt.NDArray[np.uint8],
        haematoxylin: npt.NDArray[np.float32],
        mpp: float,
        stains: Stains,
        excluded: Mask | None,
    ) -> Nuclei:
        """Return the nuclei; the density of haematoxylin is not used."""
        height, width = rgb.shape[:2]
        centre, inside = self.maps(rgb, mpp, stains.background)
        if excluded is not None:
            rows, columns = inside.shape
            out = cv2.resize(excluded.view(np.uint8), (columns, rows)) > 0
            inside[out] = 0
        own_mpp = mpp * math.sqrt(height * width / inside.size)
        inside = _filled(inside, own_mpp, _INSIDE_MIN)
        small = numbered(centre, inside, own_mpp, area_min_um2=self._area_min_um2)
        labels = _enlarged(small, inside, (height, width), _INSIDE_MIN)
        if excluded is not None:
            labels[excluded] = 0
        if excluded is not None or own_mpp < mpp:
            labels = _renumbered(labels)
        return Nuclei.from_labels(labels)

    def maps(
        self, rgb: npt.NDArray[np.uint8], mpp: float, background: color.Color
    ) -> tuple[Map, Map]:
        """Return the maps of centres and insides, 0 to 255, at the network's resolution."""
        height, width = rgb.shape[:2]
        scale = min(mpp / network.MPP, _ENLARGED_MAX)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        # Areas where pixels are lost, else a surface.
        method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        own = np.asarray(cv2.resize(rgb, size, interpolation=method), np.uint8)
        margins = [-n % network.MULTIPLE for n in size]
        padded = cv2.copyMakeBorder(own, 0, margins[1], 0, margins[0], cv2.BORDER_REPLICATE)
        densities = torch.from_numpy(network.encode(np.asarray(padded, np.uint8), background))
        with torch.inference_mode(), _one_thread():
            # (H, W, 3) in memory is what the convolutions read fastest.
            logits = self._net.quarters(densities.permute(2, 0, 1)[None])
            values = (torch.sigmoid(logits) * 255).round().to(torch.uint8).contiguous()
            both = torch.nn.functional.pixel_shuffle(values, 2)[0].numpy()
        centre, inside = (np.ascontiguousarray(one[: size[1], : size[0]]) for one in both)
        return centre, inside


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let PyTorch use one thread: another number changes the last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def numbered(
    centre: Map,
    inside: Map,
    mpp: float,
    centre_min: float = _CENTRE_MIN,
    inside_min: float = _INSIDE_MIN,
    area_min_um2: float = 0.0,
) -> Labels:
    """Return nuclei (H, W), numbered from 1 without gaps, each one piece, from both maps.

    Each maximum of the map of centres is a nucleus. From there it grows within the insides, down
    the map of centres in steps, until it meets another.

    Args:
        centre: (H, W), 0 to 255.
        inside: (H, W), 0 to 255.
        mpp: their resolution, um/px.
        centre_min: smallest value of a maximum, 0 to 1.
        inside_min: smallest value inside of a nucleus, 0 to 1.
        area_min_um2: smallest area of a nucleus.
    """
    # In integers, so that the blur is exact.
    wide = centre.astype(np.uint16) * np.uint16(256)
    ridge = np.asarray(cv2.GaussianBlur(wide, (0, 0), max(_BLUR_UM / mpp, 0.5)), np.uint16)
    mask = (inside >= 255 * inside_min).view(np.uint8)
    peaks = ridge >= cv2.dilate(ridge, disc(_SEPARATION_UM, mpp))
    peaks &= (ridge >= 255 * 256 * centre_min) & (mask > 0)
    count, markers = cv2.connectedComponents(peaks.view(np.uint8))
    # OpenCV grows numbers of 16 bits.
    if count > np.iinfo(np.uint16).max:
        raise EngineError(
            f"more than {np.iinfo(np.uint16).max} nuclei on a tile; use smaller tiles"
        )
    labels = _grown(markers.astype(np.uint16), ridge, mask, _GROWTH_UM / mpp)
    area = np.bincount(labels.ravel(), minlength=count)
    kept = area * mpp**2 >= area_min_um2
    kept[0] = False
    numbers = np.where(kept, np.cumsum(kept), 0).astype(np.int32)
    return np.asarray(numbers[labels], np.int32)


def _filled(inside: Map, mpp: float, inside_min: float) -> Map:
    """Return a map of insides (H, W) without small holes."""
    mask = (inside >= 255 * inside_min).view(np.uint8)
    before = mask.copy()
    fill_holes(mask, _HOLE_UM2 / mpp**2)
    inside[mask > before] = 255
    return inside


def _grown(
    labels: npt.NDArray[np.uint16], ridge: npt.NDArray[np.uint16], mask: Map, reach_px: float
) -> npt.NDArray[np.uint16]:
    """Grow numbered markers within a mask, first where the ridge is high; all (H, W)."""
    steps = max(2, math.ceil(reach_px / len(_LEVELS)))
    for level in _LEVELS:
        allowed = mask & (ridge >= 255 * 256 * level).view(np.uint8)
        for _ in range(steps):
            # Of two that meet, the higher number takes the pixel.
            around = cv2.dilate(labels, _CROSS)
            cv2.copyTo(around, allowed & (labels == 0).view(np.uint8), labels)
    return labels


def _enlarged(labels: Labels, inside: Map, shape: tuple[int, int], inside_min: float) -> Labels:
    """Return nuclei (H, W) in another size, with the outline of the enlarged map of insides."""
    numbers = labels.astype(np.uint16)
    # A pixel further, because the outline is between pixels.
    around = cv2.dilate(numbers, _CROSS)
    cv2.copyTo(around, (numbers == 0).view(np.uint8), numbers)
    size = shape[::-1]
    near = cv2.resize(numbers, size, interpolation=cv2.INTER_NEAREST_EXACT)
    smooth = cv2.resize(inside, size, interpolation=cv2.INTER_LINEAR)
    return np.asarray(near * (smooth >= 255 * inside_min), np.int32)


def _renumbered(labels: Labels) -> Labels:
    """Return nuclei (H, W) of which pixels were lost, each one piece, numbered without gaps."""
    detached = detached_pixels(labels, len(np.unique(labels[labels > 0])))
    if detached is not None:
        labels[detached] = 0
    present = np.bincount(labels.ravel()) > 0
    present[0] = False
    return np.where(present, np.cumsum(present), 0).astype(np.int32)[labels]
