"""Networks that judge pictures: InceptionV3's features for FID and KID, LPIPS's distance.

Both come from the packages that papers use, torch-fidelity and lpips; their weights come from files
that the user names. Nothing is downloaded, and of a file nothing but numbers is read.
"""

from __future__ import annotations

import io
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hemera.errors import TrainingError
from hemera.io.faults import brief
from hemera.networks import storage

log = logging.getLogger(__name__)

RGB = npt.NDArray[np.uint8]

FEATURES = 2048
"""Of InceptionV3's last pooling, which FID and KID are taken of."""

ALEXNET_LAYERS = {0: 1, 3: 2, 6: 3, 8: 4, 10: 5}
"""torchvision's convolutions of AlexNet by number, and the slice of LPIPS that each lies in."""


class Inception:
    """InceptionV3 as FID and KID take it: (B, H, W, 3) uint8 to (B, 2048) features."""

    def __init__(self, weights: Path, device: torch.device) -> None:
        """Load the network.

        Raises:
            TrainingError: weights that cannot be read or are of another network.
        """
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        option = "fid_weights"
        state = _read(weights, option)
        # The package would unpickle a file whole, code included: it is handed what was read here.
        plain = io.BytesIO()
        torch.save(state, plain)
        plain.seek(0)
        try:
            net = FeatureExtractorInceptionV3("inception-v3-compat", [str(FEATURES)], plain)
        except (RuntimeError, AttributeError, TypeError) as error:
            raise _foreign(
                weights, option, error, "torch-fidelity's InceptionV3, which ends in 6726825d.pth"
            ) from error
        self._net: nn.Module = net.to(device)
        self._device = device
        self.sha256 = storage.file_digest(weights)

    @torch.inference_mode()
    def __call__(self, images: RGB) -> npt.NDArray[np.float32]:
        """Return the features of images of one size.

        Raises:
            TrainingError: when they are no numbers.
        """
        (features,) = self._net(_planes(images).to(self._device))
        found = np.asarray(features.cpu().numpy(), np.float32)
        if not np.isfinite(found).all():
            raise TrainingError(
                "fid_weights: the network gives features that are no numbers; the file "
                "is damaged: get it again"
            )
        return found


class Lpips:
    """LPIPS with AlexNet: how far images lie from a real one, for a network trained on photos."""

    def __init__(self, weights: Path, device: torch.device) -> None:
        """Load the network.

        Raises:
            TrainingError: weights that cannot be read or are of another network.
        """
        import lpips

        option = "lpips_weights"
        state = _read(weights, option)
        with warnings.catch_warnings():
            # torchvision warns of the argument by which lpips asks for an untrained AlexNet.
            warnings.simplefilter("ignore")
            # pnet_rand: else it would download one. The five linear layers lie in the package.
            net = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        try:
            net.net.load_state_dict(
                {
                    f"slice{part}.{number}.{kind}": state[f"features.{number}.{kind}"]
                    for number, part in ALEXNET_LAYERS.items()
                    for kind in ("weight", "bias")
                }
            )
        except (KeyError, RuntimeError, AttributeError, TypeError) as error:
            raise _foreign(weights, option, error, "torchvision's AlexNet") from error
        self._net: nn.Module = net.to(device).requires_grad_(False)
        self._device = device
        self.sha256 = storage.file_digest(weights)

    @torch.inference_mode()
    def __call__(self, images: RGB, truth: RGB) -> list[float]:
        """Return the distance of each image (B, H, W, 3) from one real image (H, W, 3)."""
        judged, real = (
            _planes(given).to(self._device).float() / 127.5 - 1 for given in (images, truth[None])
        )
        found: Tensor = self._net(judged, real.expand_as(judged))
        return [float(value) for value in found.flatten().cpu()]


def _planes(images: RGB) -> Tensor:
    """Return (B, 3, H, W) uint8 of (B, H, W, 3)."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def _read(path: Path, option: str) -> dict[str, Any]:
    return storage.read_weights(
        path,
        missing=f"name one as {option}, or none to leave that out",
        remedy=f"name another as {option}, or none to leave that out",
    )


def _foreign(path: Path, option: str, error: BaseException, wanted: str) -> TrainingError:
    return TrainingError(
        f"{path}: weights of another network ({brief(error)}); name the weights of "
        f"{wanted}, as {option}"
    )
