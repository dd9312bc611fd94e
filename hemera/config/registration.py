"""Options of registration and of its evaluation at landmarks."""

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from hemera.config.base import Device, Options, Threads, paper

Preset = Literal[
    "default_initial_nonrigid",
    "default_initial_nonrigid_fast",
    "default_initial_nonrigid_high_resolution",
]
CANVAS_PX: dict[Preset, int] = dict(zip(get_args(Preset), (4096, 2048, 8192), strict=True))
"""DeeperHistReg's presets, each with the shortest side of the images that it registers."""

MEMORY_MB = 2000
MEMORY_MB_PER_MEGAPIXEL = 350
"""Of registration on the processor; measured, see `benchmarks/registration.py`."""
TEMPORARY_BYTES_PER_PIXEL = 14
"""Of the canvas: both images and the displacement, in the files of the engine's process."""


Two = Field(min_length=2, max_length=2)
Limits = Annotated[tuple[Annotated[float, Field(ge=0)], ...], Two]
"""Limits of a signal of the certificate: of `pass` and of `fail`."""
Fractions = Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Two]
Correlations = Annotated[tuple[Annotated[float, Field(ge=-1, le=1)], ...], Two]

AT_LEAST = (
    *("tile_ok", "lncc", "ncc_margin", "match_fraction", "keypoint_fraction", "mirror_probe"),
    "coverage_fraction",
)
"""Signals of which larger values are better."""
AT_MOST = ("misaligned_fraction", "log_scale", "anisotropy", "folding_fraction")
"""Signals of which smaller values are better."""


class RegisterOptions(Options):
    """Registration of HER2 onto H&E by DeeperHistReg, and the limits of its certificate."""

    section: ClassVar[str] = "register"
    version: ClassVar[int] = 4

    preset: Annotated[Preset, paper("DeeperHistReg, rigid and nonrigid; no preset named")] = (
        "default_initial_nonrigid_fast"
    )
    """Parameter set of DeeperHistReg."""
    size_px: Annotated[int | None, Field(ge=128, le=8192)] = None
    """Shortest side of the common canvas of both slides during registration, px; null: that of the
    preset (fast 2048, default_initial_nonrigid 4096, high resolution 8192)."""
    levels: Annotated[int | None, Field(ge=1, le=12)] = None
    """Levels of the image pyramid of nonrigid registration; null: as many as leave 32 px of the
    shortest side at the coarsest, at most those of the preset."""
    iterations: Annotated[int | None, Field(ge=1, le=2000)] = 60
    """Iterations per pyramid level of nonrigid registration; null: those of the preset."""
    device: Device = "auto"
    """Device of the registration; auto: a GPU if there is one."""
    torch_threads: Threads = 2
    """CPU threads of PyTorch; another number changes the output bytes."""
    retries: Annotated[int, Field(ge=0, le=2)] = 2
    """Further attempts for a pair that fails or matches poorly, on its tissue alone with more
    angles and scales: first in colour, then on haematoxylin."""
    tile_ok: Fractions = (0.60, 0.30)
    """Fraction of tissue squares whose best match is in place: a pair passes with at least the
    first, fails below the second, and is for review between."""
    misaligned_fraction: Fractions = (0.2, 1.0)
    """Fraction of tissue squares in connected regions where few squares match in place: passes
    up to the first, fails above the second. Tiles in such regions are rejected in any case."""
    lncc: Correlations = (0.15, 0.08)
    """Median local correlation of haematoxylin: passes with at least the first, fails below the
    second."""
    ncc_margin: Correlations = (0.05, 0.0)
    """Correlation of haematoxylin minus the best of 36 shifted positions: passes with at least the
    first, fails below the second."""
    match_fraction: Fractions = (0.50, 0.25)
    """Fraction of feature matches near the similarity transform fitted to them: passes with at
    least the first, fails below the second."""
    keypoint_fraction: Fractions = (0.50, 0.25)
    """Fraction of feature matches near the final displacement, which was not fitted to them: passes
    with at least the first, fails below the second."""
    mirror_probe: Limits = (1.5, 1.0)
    """Feature matches of HER2 over those of its mirror image: passes with at least the first, fails
    below the second."""
    coverage_fraction: Fractions = (0.25, 0.0)
    """Fraction of the H&E tissue that HER2 covers, on which the other signals are measured: passes
    with at least the first, fails below the second."""
    log_scale: Limits = (0.25, 0.25)
    """Absolute logarithm of the scale of the affine transform: passes up to the first, fails above
    the second."""
    anisotropy: Limits = (1.2, 1.2)
    """Ratio of the two scales of the affine transform: passes up to the first, fails above the
    second."""
    folding_fraction: Fractions = (0.005, 0.02)
    """Fraction of folded tissue area: passes up to the first, fails above the second."""

    @model_validator(mode="after")
    def _pass_is_stricter_than_fail(self) -> Self:
        for name in (*AT_LEAST, *AT_MOST):
            passes, fails = getattr(self, name)
            if passes != fails and (passes < fails) == (name in AT_LEAST):
                raise ValueError(f"{name}: {passes} is less strict than {fails}; exchange them")
        return self

    def canvas_mpp(self, sizes_um: Sequence[tuple[float, float]], mpps: Sequence[float]) -> float:
        """Return the resolution of the canvas of slides of (width, height), finer than no slide."""
        width_um, height_um = (max(size[k] for size in sizes_um) for k in (0, 1))
        return max(min(width_um, height_um) / (self.size_px or CANVAS_PX[self.preset]), *mpps)

    def memory_mb(self, sizes_um: Sequence[tuple[float, float]], mpps: Sequence[float]) -> int:
        """Return the peak memory of registration on the processor; arguments as `canvas_mpp`."""
        mpp = self.canvas_mpp(sizes_um, mpps)
        width_um, height_um = (max(size[k] for size in sizes_um) for k in (0, 1))
        megapixels = width_um * height_um / mpp**2 / 1e6
        return math.ceil(MEMORY_MB + MEMORY_MB_PER_MEGAPIXEL * megapixels)


def temporary_bytes(memory_mb: int) -> int:
    """Return the size of the engine's temporary files, from `RegisterOptions.memory_mb`."""
    pixels = max(memory_mb - MEMORY_MB, 0) / MEMORY_MB_PER_MEGAPIXEL * 1e6
    return round(pixels * TEMPORARY_BYTES_PER_PIXEL)


class LandmarksOptions(Options):
    """Target registration error at an expert's landmarks."""

    section: ClassVar[str] = "landmarks"
    version: ClassVar[int] = 6

    coordinates: Literal["um", "px"] = "um"
    """Unit of the coordinates in landmark files of ACROBAT."""
