"""Options of registration and of its evaluation at landmarks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from hemera.config.base import Device, Options, option

CANVAS_PX = {
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

    preset: Literal[
        "default_initial_nonrigid",
        "default_initial_nonrigid_fast",
        "default_initial_nonrigid_high_resolution",
    ] = option(
        "default_initial_nonrigid",
        "parameter set of DeeperHistReg",
        paper="DeeperHistReg, rigid and nonrigid; no preset named",
    )
    size_px: int | None = option(
        None,
        "shortest side of the common canvas of both slides during registration, px; none: that of "
        "the preset (4096, fast 2048, high resolution 8192)",
        ge=128,
        le=16384,
    )
    levels: int | None = option(
        None,
        "levels of the image pyramid of nonrigid registration; none: those of the preset",
        ge=1,
        le=12,
    )
    iterations: int | None = option(
        None,
        "iterations per pyramid level of nonrigid registration; none: those of the preset",
        ge=1,
        le=2000,
    )
    device: Device = option("auto", "device of the registration; auto: a GPU if there is one")
    torch_threads: int = option(
        2, "CPU threads of PyTorch; another number changes the output bytes", ge=1, le=64
    )
    timeout_s: int = option(7_200, "time limit of one registration attempt, s", ge=1)
    retries: int = option(
        2,
        "further attempts for a pair that does not pass: first on the masked tissue with more "
        "angles and scales, then with another preset as well",
        ge=0,
        le=2,
    )
    rigid_tolerance: float = option(
        0.02,
        "largest loss of tile_ok that the nonrigid transform may cause; above it the rigid "
        "transform is used",
        ge=0,
        le=1,
    )
    tile_ok_pass: float = option(
        0.60,
        "a pair passes with at least this fraction of tissue tiles whose best match is in place",
        ge=0,
        le=1,
    )
    tile_ok_fail: float = option(
        0.30,
        "a pair fails below this fraction of tissue tiles whose best match is in place",
        ge=0,
        le=1,
    )
    lncc_pass: float = option(
        0.15,
        "a pair passes with at least this median local correlation of haematoxylin",
        ge=-1,
        le=1,
    )
    lncc_fail: float = option(
        0.08, "a pair fails below this median local correlation of haematoxylin", ge=-1, le=1
    )
    ncc_margin_pass: float = option(
        0.05,
        "a pair passes when its correlation exceeds the best of 36 shifted positions by this",
        ge=-2,
        le=2,
    )
    ncc_margin_fail: float = option(
        0.0,
        "a pair fails when its correlation exceeds the best of 36 shifted positions by less",
        ge=-2,
        le=2,
    )
    match_fraction_pass: float = option(
        0.50,
        "a pair passes with at least this fraction of feature matches near the similarity "
        "transform fitted to them",
        ge=0,
        le=1,
    )
    match_fraction_fail: float = option(
        0.25,
        "a pair fails below this fraction of feature matches near the similarity transform fitted "
        "to them",
        ge=0,
        le=1,
    )
    mirror_probe_pass: float = option(
        1.5,
        "a pair passes with at least this ratio of feature matches of HER2 to those of its mirror "
        "image",
        ge=0,
    )
    mirror_probe_fail: float = option(
        1.0,
        "a pair fails below this ratio of feature matches of HER2 to those of its mirror image",
        ge=0,
    )
    log_scale_max: float = option(
        0.25, "largest absolute logarithm of the scale of the affine transform", gt=0
    )
    anisotropy_max: float = option(
        1.2, "largest ratio of the two scales of the affine transform", ge=1
    )
    folding_pass: float = option(
        0.005, "a pair passes up to this fraction of folded tissue area", ge=0, le=1
    )
    folding_fail: float = option(
        0.02, "a pair fails above this fraction of folded tissue area", ge=0, le=1
    )
    coverage_pass: float = option(
        0.90, "a pair passes when HER2 covers at least this fraction of the H&E tissue", ge=0, le=1
    )

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

    coordinates: Literal["um", "px"] = option(
        "um", "unit of the coordinates in landmark files of ACROBAT"
    )
