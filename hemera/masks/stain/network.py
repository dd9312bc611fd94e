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
from hemera.imaging.morphology import detached_pixels, disc, fill_holes, watershed
from hemera.masks.stain import Options
from hemera.masks.stain.nuclei import Nuclei
from hemera.masks.stain.stains import Stains
from hemera.networks import nuclei as network
from hemera.networks.storage import load_into, read_weights

Map = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

# Smallest value of a maximum of the map of centres, and of the map of insides: out of 255. Chosen
# leaving one source of real images out at a time; see docs/methods.md.
_CENTRE_MIN = 0.30
_INSIDE_MIN = 0.45
# Smallest distance between two centres, and standard deviation of the blur of their map, um.
_SEPARATION_UM = 4.5
_BLUR_UM = 0.6
# Largest hole that is filled, um^2.
_HOLE_UM2 = 8.0


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
        centre, inside = self.maps(rgb, mpp, stains.background)
        if excluded is not None:
            centre[excluded] = 0
            inside[excluded] = 0
        return Nuclei.from_labels(numbered(centre, inside, mpp, area_min_um2=self._area_min_um2))

    def maps(
        self, rgb: npt.NDArray[np.uint8], mpp: float, background: color.Color
    ) -> tuple[Map, Map]:
        """Return the maps of centres and insides, (H, W) each, 0 to 255."""
        height, width = rgb.shape[:2]
        scale = mpp / network.MPP
        size = max(1, round(width * scale)), max(1, round(height * scale))
        # Areas where pixels are lost, else a surface.
        method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        own = np.asarray(cv2.resize(rgb, size, interpolation=method), np.uint8)
        margins = [math.ceil(n / network.MULTIPLE) * network.MULTIPLE - n for n in size]
        padded = cv2.copyMakeBorder(own, 0, margins[1], 0, margins[0], cv2.BORDER_REPLICATE)
        densities = torch.from_numpy(network.encode(np.asarray(padded, np.uint8), background))
        with torch.inference_mode(), _one_thread():
            # (H, W, 3) in memory is what the convolutions read fastest.
            logits = self._net(densities.permute(2, 0, 1)[None])[0]
            values = (torch.sigmoid(logits) * 255).round().to(torch.uint8).numpy()
        centre, inside = (
            np.asarray(
                cv2.resize(
                    np.ascontiguousarray(values[k, : size[1], : size[0]]),
                    (width, height),
                    interpolation=cv2.INTER_LINEAR,
                ),
                np.uint8,
            )
            for k in (0, 1)
        )
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
) -> npt.NDArray[np.int32]:
    """Return nuclei (H, W), numbered from 1 without gaps, each one piece, from both maps.

    Each maximum of the map of centres is a nucleus; a watershed of that map divides the insides.

    Args:
        centre: (H, W), 0 to 255.
        inside: (H, W), 0 to 255.
        mpp: their resolution, um/px.
        centre_min: smallest value of a maximum, 0 to 1.
        inside_min: smallest value inside of a nucleus, 0 to 1.
        area_min_um2: smallest area of a nucleus.
    """
    # In integers, so that the blur is exact.
    ridge = cv2.GaussianBlur(
        centre.astype(np.uint16) * np.uint16(256), (0, 0), max(_BLUR_UM / mpp, 0.5)
    )
    mask = (inside >= 255 * inside_min).view(np.uint8)
    fill_holes(mask, _HOLE_UM2 / mpp**2)
    peaks = ridge >= cv2.dilate(ridge, disc(_SEPARATION_UM, mpp))
    peaks &= ridge >= 255 * 256 * centre_min
    peaks &= mask > 0
    count, markers = cv2.connectedComponents(peaks.view(np.uint8))
    labels = watershed(np.asarray(ridge, np.uint16), np.asarray(markers, np.int32), mask > 0)
    detached = detached_pixels(labels, count - 1)
    if detached is not None:
        labels[detached] = 0
    area = np.bincount(labels.ravel(), minlength=count)
    kept = area * mpp**2 >= area_min_um2
    kept[0] = False
    numbers = np.where(kept, np.cumsum(kept), 0).astype(np.int32)
    return np.asarray(numbers[labels], np.int32)
