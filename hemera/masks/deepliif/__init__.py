"""The engine `deepliif`: DeepLIIF as the HEMERA paper uses it, through its own package.

DeepLIIF (Ghahremani et al., Nat Mach Intell 4, 2022) was trained for nuclear markers; on membranes
of HER2 its cells are an extrapolation, which the engine `stain` checks.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import Field, model_validator

from hemera.config.base import Device, Fraction, Threads
from hemera.config.base import Options as Base
from hemera.errors import EngineError
from hemera.masks.deepliif import model_files
from hemera.masks.engine import Resources

if TYPE_CHECKING:
    from hemera.config import MaskOptions
    from hemera.masks.engine import Engine

LICENCE = "masks by DeepLIIF: Apache-2.0 with the Commons Clause, weights for non-commercial use"
PACKAGES = ("deepliif",)


class Options(Base):
    """Model, thresholds and device of the engine deepliif."""

    section: ClassVar[str] = "mask.engines.deepliif"

    model: str | None = None
    """Directory of the DeepLIIF model (Zenodo record 4751737); required, never downloaded."""
    sha256: str | None = None
    """Expected SHA-256 of the model files; a mismatch is an error that prints the actual digest;
    null: not checked."""
    seg_weights: tuple[Fraction, ...] = (0.2, 0.2, 0.2, 0.2, 0.2)
    """Weights of the five segmentations (IHC, haematoxylin, DAPI, Lap2, marker), sum 1."""
    threshold: Annotated[int, Field(ge=0, le=510)] = 120
    """Sum of red and blue of the segmentation above which a pixel is a cell, 0 to 510."""
    size_px: Annotated[int | None, Field(ge=0)] = None
    """Cells up to this area are removed, px; null: DeepLIIF's automatic threshold."""
    marker: Annotated[int | None, Field(ge=0, le=255)] = None
    """Inferred marker intensity above which a cell is positive regardless of its class; null: not
    used."""
    device: Device = "auto"
    """Device; auto: a GPU if there is one."""
    torch_threads: Threads = 2
    """CPU threads of PyTorch; another number changes the output bytes."""

    @model_validator(mode="after")
    def _weights_of_five_segmentations(self) -> Self:
        # DeepLIIF accepts any, and above 1 the gray levels of the sum overflow.
        if len(self.seg_weights) != 5 or abs(sum(self.seg_weights) - 1) > 1e-6:
            raise ValueError(
                f"seg_weights: {len(self.seg_weights)} weights with sum {sum(self.seg_weights):g}; "
                "give five (IHC, haematoxylin, DAPI, Lap2, marker) with sum 1"
            )
        return self


def requirements(options: Options) -> list[str]:
    """Return what is missing: the package, the model directory or files in it."""
    missing = []
    if importlib.util.find_spec("deepliif") is None:
        missing.append(f"deepliif: the package is not installed; {model_files.PACKAGE_REMEDY}")
    try:
        model_files.check_model(options.model)
    except EngineError as error:
        missing.append(str(error))
    return missing


def versions(options: Options) -> dict[str, str]:
    """Return the digest of the model files; EngineError when it is not the expected one."""
    folder, _ = model_files.check_model(options.model)
    digest = model_files.digest(folder)
    if options.sha256 is not None and digest != options.sha256.lower():
        raise EngineError(
            f"{folder}: its files have the SHA-256 {digest}, but mask.engines.deepliif.sha256 is "
            f"{options.sha256}; {model_files.REMEDY}, or correct the digest"
        )
    return {"deepliif_sha256": digest}


def resources(options: Options) -> Resources:
    """Return what a job needs."""
    return Resources(8000, options.torch_threads, gpu=options.device != "cpu")


def load(options: Options, shared: MaskOptions) -> Engine:
    """Return the engine; see `hemera.masks.engine`."""
    from hemera.masks.deepliif.engine import DeepliifEngine

    return DeepliifEngine(options, shared)
