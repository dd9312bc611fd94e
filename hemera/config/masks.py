"""Options of the mask stage and of its engines."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from hemera.config.base import Device, Fraction, Options, keys, option

Engine = Literal["deepliif", "stain"]


class MaskOptions(Options):
    """Label images from the HER2 tiles."""

    section: ClassVar[str] = "mask"
    version: ClassVar[int] = 4

    engines: tuple[Engine, ...] = option(
        ("deepliif", "stain"), "engines that make masks", paper="deepliif"
    )
    deepliif_model: str | None = option(
        None,
        "directory of the DeepLIIF model (Zenodo record 4751737); required by the engine deepliif, "
        "never downloaded",
    )
    deepliif_sha256: str | None = option(
        None,
        "expected SHA-256 of the DeepLIIF model files; a mismatch is an error that prints the "
        "actual digest; none: not checked",
    )
    deepliif_seg_weights: tuple[Fraction, ...] = option(
        (0.2, 0.2, 0.2, 0.2, 0.2),
        "weights of DeepLIIF's five segmentations (IHC, haematoxylin, DAPI, Lap2, marker), sum 1",
    )
    deepliif_threshold: int = option(
        120,
        "sum of red and blue of DeepLIIF's segmentation above which a pixel is a cell, 0 to 510",
        ge=0,
        le=510,
    )
    deepliif_size_px: int | None = option(
        None,
        "cells of DeepLIIF up to this area are removed, px; none: DeepLIIF's automatic threshold",
        ge=0,
    )
    deepliif_batch: int = option(
        1,
        "windows of a tile per forward pass of DeepLIIF's unconverted networks; above 1, BatchNorm "
        "is replaced by instance normalisation with the same weights, equal up to rounding",
        ge=1,
        le=64,
    )
    deepliif_marker: int | None = option(
        None,
        "inferred marker intensity above which a cell of DeepLIIF is positive regardless of its "
        "class; none: not used",
        ge=0,
        le=255,
    )
    device: Device = option("auto", "device of DeepLIIF; auto: a GPU if there is one")
    torch_threads: int = option(
        2,
        "CPU threads of PyTorch for DeepLIIF; another number changes the output bytes",
        ge=1,
        le=64,
    )
    nucleus_density_min: float = option(
        0.05, "smallest haematoxylin optical density of a nucleus", gt=0, le=3
    )
    nucleus_contrast: float = option(
        0.15,
        "smallest haematoxylin of a nucleus, as a fraction of the dark haematoxylin of the slide",
        ge=0,
        lt=1,
    )
    nucleus_edge: float = option(
        0.10,
        "smallest difference in haematoxylin between a nucleus and the 2 um around it, as a "
        "fraction of the dark haematoxylin of the slide",
        ge=0,
        lt=1,
    )
    nucleus_window_um: float = option(
        15.0,
        "side of the window whose mean haematoxylin is the local threshold of nuclei, um",
        gt=1,
        le=200,
    )
    nucleus_area_min_um2: float = option(12.0, "smallest area of a nucleus, um^2", gt=0)
    nucleus_area_max_um2: float = option(
        600.0, "largest area of a nucleus after touching nuclei are separated, um^2", gt=0
    )
    ring_um: float = option(
        4.0, "width of the ring around a nucleus that is searched for its membrane, um", gt=0, le=20
    )
    dab_weak: float = option(
        0.055,
        "smallest DAB optical density above the background of weak (1+) staining",
        gt=0,
        le=3,
    )
    dab_moderate: float = option(
        0.15,
        "smallest DAB optical density above the background of moderate (2+) staining",
        gt=0,
        le=3,
    )
    dab_strong: float = option(
        0.35,
        "smallest DAB optical density above the background of strong (3+) staining",
        gt=0,
        le=3,
    )
    dab_contrast: float = option(
        1.3,
        "smallest ratio of weak membrane staining to the mean DAB of the 22 um around it",
        ge=0,
        le=10,
    )
    dab_control: float = option(
        2.0,
        "smallest ratio of weak membrane staining to the background DAB of the slide, measured in "
        "tissue away from nuclei; 0: not required",
        ge=0,
        le=10,
    )
    completeness_min: float = option(
        0.30, "smallest stained fraction of the membrane ring of a positive cell", gt=0, le=1
    )
    positive_intensity_min: int = option(
        1,
        "weakest membrane staining of a positive cell: 1 weak, 2 moderate, 3 strong",
        ge=1,
        le=3,
    )
    stain_tiles: int = option(
        32,
        "evenly spaced tiles of a pair from which its stain vectors are estimated; with fewer than "
        "three tissue tiles, fixed vectors are used",
        ge=1,
    )

    def unread(self) -> frozenset[str]:
        """Return the options of an engine that does not run."""
        if "deepliif" in self.engines:
            return frozenset()
        idle = {name for name in keys(type(self)) if name.startswith("deepliif_")}
        return frozenset(idle | {"device", "torch_threads"})

    def effective(self) -> Self:
        """Return these options with the defaults of what is not read."""
        declared = keys(type(self))
        return self.replace(**{name: declared[name].default for name in self.unread()})

    @model_validator(mode="after")
    def _engines_are_distinct(self) -> Self:
        if not self.engines:
            raise ValueError("engines: no engine; give one or more of deepliif, stain")
        if len(set(self.engines)) != len(self.engines):
            raise ValueError(f"engines: {list(self.engines)} has a name twice; give each name once")
        return self

    @model_validator(mode="after")
    def _weights_of_five_segmentations(self) -> Self:
        if len(self.deepliif_seg_weights) != 5:
            raise ValueError(
                f"deepliif_seg_weights: {len(self.deepliif_seg_weights)} weights; give five (IHC, "
                "haematoxylin, DAPI, Lap2, marker)"
            )
        # DeepLIIF accepts any, and above 1 the gray levels of the sum overflow.
        if abs(sum(self.deepliif_seg_weights) - 1) > 1e-6:
            raise ValueError(
                f"deepliif_seg_weights: the sum is {sum(self.deepliif_seg_weights):g}; give five "
                "weights with sum 1"
            )
        return self

    @model_validator(mode="after")
    def _intensities_rise(self) -> Self:
        if not self.dab_weak < self.dab_moderate < self.dab_strong:
            raise ValueError(
                f"dab_weak: {self.dab_weak}, with dab_moderate {self.dab_moderate} and dab_strong "
                f"{self.dab_strong}, is not in ascending order; give three ascending densities"
            )
        return self

    @model_validator(mode="after")
    def _nuclei_have_a_range_of_areas(self) -> Self:
        if self.nucleus_area_min_um2 >= self.nucleus_area_max_um2:
            raise ValueError(
                f"nucleus_area_min_um2: {self.nucleus_area_min_um2} is not below "
                f"nucleus_area_max_um2 {self.nucleus_area_max_um2}; lower it"
            )
        return self
