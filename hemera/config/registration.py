"""Options of registration and of its evaluation at landmarks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from hemera.config.base import (
    Count,
    Device,
    Fraction,
    NonNegative,
    Options,
    Positive,
    Threads,
    paper,
)

Preset = Literal[
    "default_initial_nonrigid",
    "default_initial_nonrigid_fast",
    "default_initial_nonrigid_high_resolution",
]
CANVAS_PX: dict[Preset, int] = {
    "default_initial_nonrigid": 4096,
    "default_initial_nonrigid_fast": 2048,
    "default_initial_nonrigid_high_resolution": 8192,
}
"""DeeperHistReg's presets, each with the shortest side of the images that it registers."""

MEMORY_MB = 2000
MEMORY_MB_PER_MEGAPIXEL = 300
"""Of registration on the processor; measured, see `benchmarks/registration.py`."""


class RegisterOptions(Options):
    """Registration of HER2 onto H&E by DeeperHistReg, and the limits of its certificate."""

    section: ClassVar[str] = "register"
    version: ClassVar[int] = 2

    preset: Annotated[Preset, paper("DeeperHistReg, rigid and nonrigid; no preset named")] = (
        "default_initial_nonrigid"
    )
    """Parameter set of DeeperHistReg."""
    size_px: Annotated[int | None, Field(ge=128, le=16384)] = None
    """Shortest side of the common canvas of both slides during registration, px; none: that of the
    preset (4096, fast 2048, high resolution 8192)."""
    levels: Annotated[int | None, Field(ge=1, le=12)] = None
    """Levels of the image pyramid of nonrigid registration; none: those of the preset."""
    iterations: Annotated[int | None, Field(ge=1, le=2000)] = None
    """Iterations per pyramid level of nonrigid registration; none: those of the preset."""
    device: Device = "auto"
    """Device of the registration; auto: a GPU if there is one."""
    torch_threads: Threads = 2
    """CPU threads of PyTorch; another number changes the output bytes."""
    timeout_s: Count = 7_200
    """Time limit of one registration attempt, s."""
    retries: Annotated[int, Field(ge=0, le=2)] = 2
    """Further attempts for a pair that does not pass: first on the masked tissue with more angles
    and scales, then with another preset as well."""
    rigid_tolerance: Fraction = 0.02
    """Largest loss of tile_ok that the nonrigid transform may cause; above it the rigid transform
    is used."""
    tile_ok_pass: Fraction = 0.60
    """A pair passes with at least this fraction of tissue tiles whose best match is in place."""
    tile_ok_fail: Fraction = 0.30
    """A pair fails below this fraction of tissue tiles whose best match is in place."""
    lncc_pass: Annotated[float, Field(ge=-1, le=1)] = 0.15
    """A pair passes with at least this median local correlation of haematoxylin."""
    lncc_fail: Annotated[float, Field(ge=-1, le=1)] = 0.08
    """A pair fails below this median local correlation of haematoxylin."""
    ncc_margin_pass: Annotated[float, Field(ge=-2, le=2)] = 0.05
    """A pair passes when its correlation exceeds the best of 36 shifted positions by this."""
    ncc_margin_fail: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """A pair fails when its correlation exceeds the best of 36 shifted positions by less."""
    match_fraction_pass: Fraction = 0.50
    """A pair passes with at least this fraction of feature matches near the similarity transform
    fitted to them."""
    match_fraction_fail: Fraction = 0.25
    """A pair fails below this fraction of feature matches near the similarity transform fitted to
    them."""
    mirror_probe_pass: NonNegative = 1.5
    """A pair passes with at least this ratio of feature matches of HER2 to those of its mirror
    image."""
    mirror_probe_fail: NonNegative = 1.0
    """A pair fails below this ratio of feature matches of HER2 to those of its mirror image."""
    log_scale_max: Positive = 0.25
    """Largest absolute logarithm of the scale of the affine transform."""
    anisotropy_max: Annotated[float, Field(ge=1)] = 1.2
    """Largest ratio of the two scales of the affine transform."""
    folding_pass: Fraction = 0.005
    """A pair passes up to this fraction of folded tissue area."""
    folding_fail: Fraction = 0.02
    """A pair fails above this fraction of folded tissue area."""
    coverage_pass: Fraction = 0.90
    """A pair passes when HER2 covers at least this fraction of the H&E tissue."""

    @model_validator(mode="after")
    def _pass_is_stricter_than_fail(self) -> Self:
        for name in ("tile_ok", "lncc", "ncc_margin", "match_fraction", "mirror_probe"):
            enough, least = getattr(self, f"{name}_pass"), getattr(self, f"{name}_fail")
            if enough < least:
                raise ValueError(
                    f"{name}_pass: {enough} is below {name}_fail {least}; give at least {least}"
                )
        if self.folding_pass > self.folding_fail:
            raise ValueError(
                f"folding_pass: {self.folding_pass} is above folding_fail {self.folding_fail}; "
                f"give at most {self.folding_fail}"
            )
        return self

    @property
    def canvas_px(self) -> int:
        """Shortest side of the common canvas of both slides."""
        return self.size_px or CANVAS_PX[self.preset]

    def canvas_mpp(self, sizes_um: Sequence[tuple[float, float]], mpps: Sequence[float]) -> float:
        """Return the resolution of the canvas, which is finer than that of no slide.

        Args:
            sizes_um: (width, height) of both slides.
            mpps: um per pixel of both slides.
        """
        width_um, height_um = (max(size[k] for size in sizes_um) for k in (0, 1))
        return max(min(width_um, height_um) / self.canvas_px, *mpps)

    def memory_mb(self, sizes_um: Sequence[tuple[float, float]], mpps: Sequence[float]) -> int:
        """Return the peak memory of registering these slides on the processor, MB.

        Args:
            sizes_um: (width, height) of both slides.
            mpps: um per pixel of both slides.
        """
        mpp = self.canvas_mpp(sizes_um, mpps)
        width_um, height_um = (max(size[k] for size in sizes_um) for k in (0, 1))
        megapixels = width_um * height_um / mpp**2 / 1e6
        return math.ceil(MEMORY_MB + MEMORY_MB_PER_MEGAPIXEL * megapixels)


class LandmarksOptions(Options):
    """Target registration error at an expert's landmarks."""

    section: ClassVar[str] = "landmarks"
    version: ClassVar[int] = 2

    coordinates: Literal["um", "px"] = "um"
    """Unit of the coordinates in landmark files of ACROBAT."""
