"""Options of the evaluation of the networks."""

from __future__ import annotations

import re
from typing import ClassVar, Self

from pydantic import model_validator

from hemera.config.base import Device, Options, option
from hemera.config.training import Network


class JudgingOptions(Options):
    """What evaluate and compare share: metrics of generated images."""

    blur_sigma_px: float = option(
        8.0, "standard deviation of the Gaussian blur of the trivial baseline, px", gt=0
    )
    fid_weights: str | None = option(
        None,
        "file of InceptionV3 weights for FID and KID (of torch-fidelity or pytorch-fid, ending in "
        "6726825d.pth); none: not measured; never downloaded",
    )
    lpips_weights: str | None = option(
        None,
        "file of torchvision's ImageNet weights of AlexNet for LPIPS; none: not measured; never "
        "downloaded",
    )
    bootstrap_samples: int = option(
        1000,
        "bootstrap samples of the cases for confidence intervals; 0: no intervals",
        ge=0,
        le=10_000,
    )
    confidence: float = option(0.95, "confidence level of the intervals", gt=0, lt=1)
    seed: int = option(20251, "seed of the bootstrap and of the subsets of KID", ge=0)
    device: Device = option("auto", "device of the networks; auto: a GPU if there is one")
    torch_threads: int = option(2, "CPU threads of PyTorch", ge=1, le=64)


class EvaluateOptions(JudgingOptions):
    """Metrics of both networks on the test subsets."""

    section: ClassVar[str] = "evaluate"
    version: ClassVar[int] = 3

    threshold: float = option(
        0.5, "predicted probability at and above which a pixel is positive", gt=0, lt=1
    )
    batch_size: int = option(4, "tiles per forward pass", ge=1)
    gallery_tiles: int = option(12, "tiles in the gallery of the page", ge=1, le=200)


class CompareOptions(JudgingOptions):
    """Generators of several presets on the same tiles; made by `snakemake compare` alone."""

    section: ClassVar[str] = "compare"

    presets: tuple[str, ...] = option(
        ("hemera", "pyramid_pix2pix", "pix2pix", "variance_penalized"),
        "presets whose train_generation is compared; device, threads, seed and the like are those "
        "of this config's train_generation",
    )
    network: Network | None = option(None, "generator of all of them; none: each preset's own")
    base_width: int | None = option(None, "the same for the generators' filters", ge=4, le=256)
    discriminator_width: int | None = option(
        None, "the same for the discriminators' filters", ge=4, le=256
    )
    crop_px: int | None = option(None, "the same for the side of a crop", ge=32, le=2048)
    epochs: int | None = option(None, "the same for epochs", ge=1)
    decay_from_epoch: int | None = option(
        None, "the same for the epoch after which the learning rate falls", ge=0
    )
    batch_size: int | None = option(None, "the same for tiles per step", ge=1)
    learning_rate: float | None = option(None, "the same for the learning rate", gt=0)
    gallery_tiles: int = option(8, "tiles shown on the page", ge=1, le=200)

    @model_validator(mode="after")
    def _presets_are_distinct_names(self) -> Self:
        if not self.presets or len(set(self.presets)) != len(self.presets):
            raise ValueError(f"presets: {list(self.presets)}; name at least one, and each once")
        wrong = [name for name in self.presets if not re.fullmatch(r"[a-z0-9_]+", name, re.ASCII)]
        if wrong:
            raise ValueError(f"presets: {wrong[0]!r} is not a name of a file in hemera/presets")
        return self
