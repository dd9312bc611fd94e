"""FID, KID and LPIPS with weights from files; nothing is downloaded, and loading runs no code."""

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
from torch.nn import functional

from hemera.errors import TrainingError
from hemera.evaluation.metrics import Summary
from hemera.files.faults import translated
from hemera.networks import storage

RGB = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

FEATURES = 2048
"""Of InceptionV3's last pooling layer, from which FID and KID are computed."""

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
"""Number and size of the subsets of KID, as is usual."""

LPIPS_PX = 31
"""Smallest side of an image that AlexNet has features of."""

ALEXNET_LAYERS = {0: 1, 3: 2, 6: 3, 8: 4, 10: 5}
"""torchvision's convolutions of AlexNet by number, and the slice of LPIPS that contains each."""


class Inception:
    """InceptionV3 as FID and KID use it: (B, H, W, 3) uint8 to (B, 2048) features."""

    def __init__(self, weights: Path, device: torch.device) -> None:
        """Load the network; raise TrainingError for weights of another one."""
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
        """Return the features of images of one size."""
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
        """Load the network; raise TrainingError for weights of another one."""
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

    def distance(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return the distances (B,) of images (B, 3, H, W) in [-1, 1], as a loss.

        Sides are at least `LPIPS_PX`. In the package the gradient of a place where all features
        are 0 is not a number; here it is 0.
        """
        net: Any = self._net
        maps = [net.net(net.scaling_layer(each.float())) for each in (images, truth)]
        found = []
        for head, *pair in zip(net.lins, *maps, strict=True):
            own, real = (functional.normalize(each, dim=1, eps=1e-10) for each in pair)
            found.append(head((own - real).square()).mean((1, 2, 3)))
        return torch.stack(found).sum(0)


@dataclasses.dataclass(frozen=True)
class FeatureExtractors:
    """The networks of the perceptual metrics; None where the options name no weights."""

    inception: Inception | None = None
    lpips: Lpips | None = None

    @classmethod
    def load(
        cls, fid_weights: str | None, lpips_weights: str | None, device: torch.device
    ) -> FeatureExtractors:
        """Load the networks whose weights are named."""
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


def frechet_distance(
    features: npt.NDArray[np.floating], truth: npt.NDArray[np.floating]
) -> float | None:
    """Return the squared Fréchet distance of (N, D) and (M, D) features: FID for Inception's.

    It is between Gaussians fitted to them, and None where one has fewer than two rows:
    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), with covariances divided by N - 1 (Heusel et al.
    2017). It is biased upwards, increasingly so below some thousand images.
    """
    if min(len(features), len(truth)) < 2:
        return None
    (mean, root), (true_mean, true_root) = _gaussian(features), _gaussian(truth)
    # With C1 = A'A and C2 = B'B the trace of (C1 C2)^(1/2) is the sum of the singular values of
    # AB': no square root of a matrix, which fails for covariances without full rank.
    common = float(np.linalg.svd(root @ true_root.T, compute_uv=False).sum())
    shift = float(np.square(mean - true_mean).sum())
    spread = float(np.square(root).sum() + np.square(true_root).sum())
    return max(0.0, shift + spread - 2 * common)


def kernel_distance(
    features: npt.NDArray[np.floating], truth: npt.NDArray[np.floating], *, seed: int
) -> Summary:
    """Return the squared kernel distance of two (N, D) features: KID for Inception's.

    The unbiased estimate with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018), which may be
    negative; of more than `KID_SUBSET_SIZE` images its mean and deviation over random subsets;
    without a value for fewer than two.
    """
    from torch_fidelity.metric_kid import kid_features_to_metric

    count = len(features)
    if count < 2:
        return Summary(None, None, count)
    has_subsets = count > KID_SUBSET_SIZE
    found = kid_features_to_metric(
        *(torch.from_numpy(given.astype(np.float64)) for given in (features, truth)),
        kid_subsets=KID_SUBSETS if has_subsets else 1,
        kid_subset_size=min(count, KID_SUBSET_SIZE),
        rng_seed=seed,
        verbose=False,
    )
    deviation = found["kernel_inception_distance_std"] if has_subsets else None
    return Summary(found["kernel_inception_distance_mean"], deviation, count)


def _gaussian(features: npt.NDArray[np.floating]) -> tuple[Floats, Floats]:
    """Return the mean (D,) and a matrix (K, D), K at most D, whose square is the covariance."""
    values = np.asarray(features, np.float64)
    mean = values.mean(0)
    root = (values - mean) / np.sqrt(len(values) - 1)
    if len(root) > root.shape[1]:
        root = np.linalg.qr(root, mode="r")
    return mean, root
