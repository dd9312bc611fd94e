"""Options of the evaluation of the networks."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from hemera.config.base import Count, Device, Options, Seed, Threads


class EvaluateOptions(Options):
    """Metrics of the generators and of SegmentationNet on the test subsets."""

    section: ClassVar[str] = "evaluate"
    version: ClassVar[int] = 9

    generators: tuple[str, ...] = ()
    """Presets, such as pix2pix, whose generators are trained and evaluated for comparison with the
    configured one, on the same tiles and with the same epochs, batch size and learning rate."""
    fid_weights: str | None = None
    """File of InceptionV3 weights for FID and KID (of torch-fidelity or pytorch-fid, ending in
    6726825d.pth); null: not measured; never downloaded."""
    lpips_weights: str | None = None
    """File of torchvision's ImageNet weights of AlexNet for LPIPS; null: not measured; never
    downloaded."""
    bootstrap_samples: Annotated[int, Field(ge=0, le=10000)] = 1000
    """Bootstrap samples of the cases for confidence intervals; 0: no intervals."""
    seed: Seed = 20251
    """Seed of the bootstrap and of the subsets of KID."""
    device: Device = "auto"
    """Device of the networks; auto: a GPU if there is one."""
    torch_threads: Threads = 2
    """CPU threads of PyTorch."""
    batch_size: Count = 4
    """Tiles per forward pass."""
    workers: Annotated[int, Field(ge=1, le=64)] = 2
    """Threads that read and decode tiles in advance; 1: none, they are read when needed."""
    precision: Literal["float32", "tf32", "bf16", "fp16"] = "float32"
    """Numeric precision of the networks that are evaluated, as of a training; metrics are computed
    in float32 or better."""
    cell_tiles: Annotated[int, Field(ge=0, le=100000)] = 500
    """Evenly spaced test tiles on which the cells of generated and real images are compared."""
    swap_tiles: Annotated[int, Field(ge=0, le=100000)] = 200
    """Evenly spaced test tiles on which the branch of SegmentationNet is exchanged, to measure how
    far its answers depend on GenerationNet; 0: not measured."""
    public_mode: bool = False
    """Run the generators tile by tile with batch normalisation and dropout as in training, as the
    test script of the public code of pix2pix does."""
    gallery_tiles: Annotated[int, Field(ge=1, le=200)] = 12
    """Tiles in the gallery of the page."""

    def requirements(self) -> list[str]:
        """Return the files of weights that are named and missing."""
        return [
            f"evaluate.{name}: {path} does not exist; correct the path, or remove the option"
            for name in ("fid_weights", "lpips_weights")
            if (path := getattr(self, name)) is not None and not Path(path).is_file()
        ]

    @model_validator(mode="after")
    def _generators_are_distinct(self) -> Self:
        if len(set(self.generators)) != len(self.generators):
            raise ValueError(f"generators: {list(self.generators)}; name each preset once")
        return self

    def names(self, preset: str) -> tuple[str, ...]:
        """Return the names of the generators: the configured one, named after `preset`, first."""
        return tuple(dict.fromkeys((preset, *self.generators)))
