"""The engine `stain`: nuclei from haematoxylin, membranes and their strength from DAB."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from hemera.config.base import Options as Base
from hemera.config.base import Positive
from hemera.masks.engine import Resources
from hemera.masks.stain import nucleus_files

if TYPE_CHECKING:
    from hemera.config import MaskOptions
    from hemera.masks.engine import Engine

LICENCE = ""
PACKAGES: tuple[str, ...] = ()


class Options(Base):
    """Nuclei and positive cells of the engine stain."""

    section: ClassVar[str] = "mask.engines.stain"

    nuclei: str = nucleus_files.AUTO
    """How nuclei are found. classical: by thresholds of haematoxylin, which the other options of
    nuclei are for; network: by the network that was trained on synthetic tissue (extra train),
    confirmed by the thresholds; auto: network with compartment nucleus, else classical; a file: by
    other weights of `hemera train-nuclei` (.safetensors), or by a TorchScript model of InstanSeg
    (extra instanseg)."""
    compartment: Literal["membrane", "nucleus"] = "membrane"
    """Where DAB makes a cell positive: membrane (HER2) or nucleus (Ki67, ER, PR)."""
    nucleus_density_min: Annotated[float, Field(gt=0, le=3)] = 0.045
    """Smallest haematoxylin optical density of a nucleus; lower in proportion on a slide whose dark
    nuclei have less than 0.20."""
    nucleus_contrast: Annotated[float, Field(ge=0, lt=1)] = 0.20
    """Smallest haematoxylin of a nucleus, as a fraction of the dark haematoxylin of the slide."""
    nucleus_edge: Annotated[float, Field(ge=0, lt=1)] = 0.10
    """Smallest difference in haematoxylin between a nucleus and the 2 um around it, as a fraction
    of the dark haematoxylin of the slide."""
    nucleus_dab: Annotated[float, Field(gt=0, lt=1)] = 0.12
    """Smallest DAB of a positive nucleus, as a fraction of the dark DAB of the slide; used with
    compartment nucleus."""
    nucleus_window_um: Annotated[float, Field(gt=1, le=200)] = 13.0
    """Side of the window whose mean haematoxylin is the local threshold of nuclei, um."""
    nucleus_area_min_um2: Positive = 12.0
    """Smallest area of a nucleus, um^2."""
    nucleus_area_max_um2: Positive = 600.0
    """Largest area of a nucleus after touching nuclei are separated, um^2."""
    positive_intensity_min: Annotated[int, Field(ge=1, le=3)] = 1
    """Weakest membrane staining of a positive cell: 1 weak, 2 moderate, 3 strong."""

    @property
    def detector(self) -> str:
        """How nuclei are found: the option `nuclei`, chosen by the compartment if it is auto.

        The network finds more nuclei of Ki67; on HER2 it is not better, see docs/how-to/masks.md.
        """
        if self.nuclei != nucleus_files.AUTO:
            return self.nuclei
        nuclear = self.compartment == "nucleus"
        return nucleus_files.NETWORK if nuclear else nucleus_files.CLASSICAL

    def files(self) -> list[str]:
        """Return the file that the option `nuclei` names."""
        own = (nucleus_files.AUTO, nucleus_files.CLASSICAL, nucleus_files.NETWORK)
        return [] if self.nuclei in own else [self.nuclei]

    @model_validator(mode="after")
    def _nuclei_have_a_range_of_areas(self) -> Self:
        if self.nucleus_area_min_um2 >= self.nucleus_area_max_um2:
            raise ValueError(
                f"nucleus_area_min_um2: {self.nucleus_area_min_um2} is not below "
                f"nucleus_area_max_um2 {self.nucleus_area_max_um2}; lower it"
            )
        return self


def requirements(options: Options) -> list[str]:
    """Return what is missing: packages or weights of the network that finds nuclei."""
    return nucleus_files.requirements(options.detector)


def versions(options: Options) -> dict[str, str]:
    """Return the digest of the weights that find nuclei; see `hemera.masks.engine`."""
    return nucleus_files.versions(options.detector)


def resources(options: Options) -> Resources:
    """Return what a job needs."""
    return Resources()


def load(options: Options, shared: MaskOptions) -> Engine:
    """Return the engine; see `hemera.masks.engine`."""
    from hemera.masks.stain.engine import StainEngine

    engine = StainEngine(options, shared)
    # Now, so that what is missing is an error before the first tile.
    _ = engine.find
    return engine
