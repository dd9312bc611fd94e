"""Perceptual metrics: features of InceptionV3 for FID and KID, and the distance LPIPS.

Both networks come from the packages that papers use, torch-fidelity and lpips; their weights come
from files that the user names. Nothing is downloaded, and loading a file runs no code.
"""

from __future__ import annotations

import dataclasses
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hemera.errors import TrainingError
from hemera.io.faults import translated
from hemera.networks import storage

RGB = npt.NDArray[np.uint8]

FEATURES = 2048
"""Of InceptionV3's last pooling layer, from which FID and KID are computed."""

ALEXNET_LAYERS = {0: 1, 3: 2, 6: 3, 8: 4, 10: 5}
"""torchvision's convolutions of AlexNet by number, and the slice of LPIPS that contains each."""


class Inception:
    """InceptionV3 as FID and KID use it: (B, H, W, 3) uint8 to (B, 2048) features."""

    def __init__(self, weights: Path, device: torch.device) -> None:
        """Load the network.

        Raises:
            TrainingError: weights that cannot be read or are of another network.
        """
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # The package would unpickle the file, code included, so it gets what was read safely.
        plain = io.BytesIO()
        torch.save(_read(weights, "fid_weights"), plain)
        plain.seek(0)
        with translated(
            TrainingError,
            f"{weights}: weights of another network ({{error}}); set fid_weights to those of "
            "torch-fidelity's InceptionV3, a file that ends in 6726825d.pth",
        ):
            net = FeatureExtractorInceptionV3("inception-v3-compat", [str(FEATURES)], plain)
        self._net: nn.Module = net.to(device)
        self._device = device
        self.sha256 = storage.file_digest(weights)

    @torch.inference_mode()
    def __call__(self, images: RGB) -> npt.NDArray[np.float32]:
        """Return the features of images of one size.

        Raises:
            TrainingError: when they are not finite.
        """
        (features,) = self._net(_planes(images).to(self._device))
        found = np.asarray(features.cpu().numpy(), np.float32)
        if not np.isfinite(found).all():
            raise TrainingError(
                "fid_weights: features are not finite; the file is damaged, download it again"
            )
        return found


class Lpips:
    """LPIPS with AlexNet: the distance of images from a real one."""

    def __init__(self, weights: Path, device: torch.device) -> None:
        """Load the network.

        Raises:
            TrainingError: weights that cannot be read or are of another network.
        """
        import lpips

        state = _read(weights, "lpips_weights")
        with warnings.catch_warnings():
            # torchvision warns about the argument by which lpips requests an untrained AlexNet.
            warnings.simplefilter("ignore")
            # Without pnet_rand it would download one. The five linear layers are in the package.
            net = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        with translated(
            TrainingError,
            f"{weights}: weights of another network ({{error}}); set lpips_weights to those of "
            "torchvision's AlexNet",
        ):
            net.net.load_state_dict(
                {
                    f"slice{part}.{number}.{kind}": state[f"features.{number}.{kind}"]
                    for number, part in ALEXNET_LAYERS.items()
                    for kind in ("weight", "bias")
                }
            )
        self._net: nn.Module = net.to(device).requires_grad_(False)
        self._device = device
        self.sha256 = storage.file_digest(weights)

    @torch.inference_mode()
    def __call__(self, images: RGB, truth: RGB) -> list[float]:
        """Return the distance of each image (B, H, W, 3) from one real image (H, W, 3)."""
        generated, real = (
            _planes(given).to(self._device).float() / 127.5 - 1 for given in (images, truth[None])
        )
        found: Tensor = self._net(generated, real.expand_as(generated))
        return [float(value) for value in found.flatten().cpu()]


@dataclasses.dataclass(frozen=True)
class FeatureExtractors:
    """The networks of the perceptual metrics; None where the options name no weights."""

    inception: Inception | None = None
    lpips: Lpips | None = None

    @classmethod
    def load(
        cls, fid_weights: str | None, lpips_weights: str | None, device: torch.device
    ) -> FeatureExtractors:
        """Load the networks whose weights are named.

        Raises:
            TrainingError: weights that cannot be read or are of another network.
        """
        return cls(
            None if fid_weights is None else Inception(Path(fid_weights), device),
            None if lpips_weights is None else Lpips(Path(lpips_weights), device),
        )

    def provenance(self) -> dict[str, str]:
        """Return the digests of the weights: only distances by the same weights compare."""
        networks = {"fid_weights_sha256": self.inception, "lpips_weights_sha256": self.lpips}
        return {name: net.sha256 for name, net in networks.items() if net is not None}


def _planes(images: RGB) -> Tensor:
    """Return (B, 3, H, W) uint8 of (B, H, W, 3)."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def _read(path: Path, option: str) -> dict[str, Any]:
    remedy = f"set {option} to another file, or to null to leave the metric out"
    return storage.read_weights(path, missing=remedy, remedy=remedy)
