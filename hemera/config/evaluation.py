"""Options of the evaluation of the networks."""

from __future__ import annotations

import re
from typing import ClassVar, Self

from pydantic import model_validator

from hemera.config.base import Device, Options, option


class EvaluateOptions(Options):
    """Metrics of the generators and of SegmentationNet on the test subsets."""

    section: ClassVar[str] = "evaluate"
    version: ClassVar[int] = 3

    generators: tuple[str, ...] = option(
        (),
        "presets whose generator is trained and evaluated besides the configured one: the method "
        "of the preset with the budget of this configuration's train_generation",
    )
    threshold: float = option(
        0.5, "predicted probability at and above which a pixel is positive", gt=0, lt=1
    )
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
    batch_size: int = option(4, "tiles per forward pass", ge=1)
    gallery_tiles: int = option(12, "tiles in the gallery of the page", ge=1, le=200)

    @model_validator(mode="after")
    def _generators_are_distinct_names(self) -> Self:
        if len(set(self.generators)) != len(self.generators):
            raise ValueError(f"generators: {list(self.generators)}; name each preset once")
        for name in self.generators:
            if not re.fullmatch(r"[a-z0-9_]+", name, re.ASCII):
                raise ValueError(f"generators: {name!r} is not a name of a file in hemera/presets")
        return self

    def names(self, preset: str) -> tuple[str, ...]:
        """Return the names of the generators: the configured one, named after `preset`, first."""
        return tuple(dict.fromkeys((preset, *self.generators)))
