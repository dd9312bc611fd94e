"""One frozen Options class per stage: config section, command-line flags and library argument.

A default is the paper's value where the paper gives one (preset ``hemera``); `hemera/presets/`
holds the values that another preset changes. A class carries `version`, which is raised whenever
the same options give another output: Snakemake does not see edits inside a package.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml

from hemera.config.base import TOP, Options, collect, flags, from_mapping, nearest, option
from hemera.errors import ConfigError

PRESETS = Path(__file__).parents[1] / "presets"
DEMO_SHEET = "demo/pairs.tsv"
DEMO_VERSION = 2
"""Raised when `hemera.demo` writes other images than before."""


@dataclasses.dataclass(frozen=True)
class DescribeOptions(Options):
    """Headers, resolution, thumbnails and tissue outlines."""

    section: ClassVar[str] = "describe"

    reader: str = option(
        "auto",
        "what reads the slides, in every stage; auto: directly where the file is JPEG-tiled or the "
        "like, else OpenSlide or TiffSlide",
        choices=("auto", "tiff", "openslide", "tiffslide", "image"),
    )
    thumbnail_side_px: int = option(1024, "longest side of a thumbnail", ge=128, le=4096)
    tissue_mpp: float = option(8.0, "resolution at which tissue is outlined, um/px", gt=0, le=64)
    he_saturation_min: float = option(
        0.05, "lowest HSV saturation that Otsu's threshold on H&E may fall to, 0 to 1", ge=0, lt=1
    )
    he_saturation_max: float = option(
        0.10, "highest it may rise to: above, it splits pale tissue from dark", ge=0, lt=1
    )
    ihc_density_min: float = option(
        0.03,
        "lowest optical density over glass that Otsu's threshold on IHC may fall to",
        ge=0,
        le=0.5,
    )
    ihc_density_max: float = option(0.05, "highest it may rise to", ge=0, le=0.5)
    tissue_hole_um2: float = option(
        40_000.0, "holes in the tissue up to this area are filled, um^2", ge=0
    )
    tissue_speck_um2: float = option(
        40_000.0, "pieces of tissue below this area are dropped, um^2", ge=0
    )
    mpp_min: float = option(0.05, "finest resolution taken for real, um/px", gt=0)
    mpp_max: float = option(20.0, "coarsest resolution taken for real, um/px", gt=0)

    def check(self) -> None:
        """Raise ConfigError when a range is empty."""
        if self.mpp_min >= self.mpp_max:
            raise ConfigError(
                f"describe.mpp_min: {self.mpp_min} is not below describe.mpp_max {self.mpp_max}; "
                "give a range"
            )
        for name in ("he_saturation", "ihc_density"):
            low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
            if low > high:
                raise ConfigError(
                    f"describe.{name}_min: {low} is above describe.{name}_max {high}; give a range"
                )


CANVAS_PX = {
    "default_initial_nonrigid": 4096,
    "default_initial_nonrigid_fast": 2048,
    "default_initial_nonrigid_high_resolution": 8192,
}
"""DeeperHistReg's presets, each with the shortest side of the images it registers."""
MEMORY_MB = 2000
MEMORY_MB_PER_MEGAPIXEL = 300
"""Of registration on the processor; measured, see `benchmarks/registration.py`."""


@dataclasses.dataclass(frozen=True)
class RegisterOptions(Options):
    """Registration of HER2 onto H&E by DeeperHistReg, and the limits of its certificate."""

    section: ClassVar[str] = "register"
    version: ClassVar[int] = 2

    preset: str = option(
        "default_initial_nonrigid",
        "parameters of DeeperHistReg",
        choices=tuple(CANVAS_PX),
        paper="DeeperHistReg, rigid and nonrigid; no preset named",
    )
    size_px: int | None = option(
        None,
        "shortest side of the slides' common canvas during registration, px; none: the preset's "
        "(4096, fast 2048, high resolution 8192)",
        ge=128,
        le=16384,
    )
    levels: int | None = option(
        None, "levels of the nonrigid pyramid; none: the preset's", ge=1, le=12
    )
    iterations: int | None = option(None, "iterations per level; none: the preset's", ge=1, le=2000)
    device: str = option("auto", "where the engine runs", choices=("auto", "cpu", "cuda"))
    torch_threads: int = option(
        2, "threads of PyTorch: another number gives other bytes", ge=1, le=64
    )
    timeout_s: int = option(7_200, "a try that takes longer is given up, s", ge=1)
    retries: int = option(
        2,
        "further tries of a pair that does not pass: tissue alone with more angles and sizes, then "
        "another preset as well",
        ge=0,
        le=2,
    )
    rigid_tolerance: float = option(
        0.02, "the rigid map is kept when the nonrigid one lowers tile_ok by more", ge=0, le=1
    )
    tile_ok_pass: float = option(
        0.60, "share of tissue tiles that match best in place: pass", ge=0, le=1
    )
    tile_ok_fail: float = option(0.30, "the same: fail below", ge=0, le=1)
    lncc_pass: float = option(0.15, "median local correlation of haematoxylin: pass", ge=-1, le=1)
    lncc_fail: float = option(0.08, "the same: fail below", ge=-1, le=1)
    ncc_margin_pass: float = option(
        0.05, "correlation above the best of 36 shifts: pass", ge=-2, le=2
    )
    ncc_margin_fail: float = option(0.0, "the same: fail below", ge=-2, le=2)
    match_fraction_pass: float = option(
        0.50, "share of matches near the similarity fitted to them: pass", ge=0, le=1
    )
    match_fraction_fail: float = option(0.25, "the same: fail below", ge=0, le=1)
    mirror_probe_pass: float = option(
        1.5, "matches of HER2 over those of its mirror image: pass", ge=0
    )
    mirror_probe_fail: float = option(1.0, "the same: fail below", ge=0)
    log_scale_max: float = option(0.25, "largest |log| of the scale of the affine part", gt=0)
    anisotropy_max: float = option(1.2, "largest ratio of its two scales", ge=1)
    folding_pass: float = option(0.005, "share of folded tissue: pass up to", ge=0, le=1)
    folding_fail: float = option(0.02, "the same: fail above", ge=0, le=1)
    coverage_pass: float = option(0.90, "share of H&E tissue that HER2 covers: pass", ge=0, le=1)

    def check(self) -> None:
        """Raise ConfigError when a limit of pass lies on the wrong side of that of fail."""
        for name in ("tile_ok", "lncc", "ncc_margin", "match_fraction", "mirror_probe"):
            enough, least = getattr(self, f"{name}_pass"), getattr(self, f"{name}_fail")
            if enough < least:
                raise ConfigError(
                    f"register.{name}_pass: {enough} is below register.{name}_fail {least}; "
                    "a pass cannot ask for less than a review"
                )
        if self.folding_pass > self.folding_fail:
            raise ConfigError(
                f"register.folding_pass: {self.folding_pass} is above register.folding_fail "
                f"{self.folding_fail}; a pass cannot allow more than a review"
            )

    @property
    def canvas_px(self) -> int:
        """Shortest side of the canvas that both slides are laid on."""
        return self.size_px or CANVAS_PX[self.preset]

    def canvas_mpp(self, sizes_um: Sequence[tuple[float, float]], mpps: Sequence[float]) -> float:
        """Return the resolution of the canvas: no slide is read finer than it is.

        Args:
            sizes_um: (width, height) of both slides.
            mpps: um per pixel of both slides.
        """
        width_um, height_um = (max(size[k] for size in sizes_um) for k in (0, 1))
        return max(min(width_um, height_um) / self.canvas_px, *mpps)

    def memory_mb(self, sizes_um: Sequence[tuple[float, float]], mpps: Sequence[float]) -> int:
        """Return the most memory that registering these slides takes on the processor, MB.

        Args:
            sizes_um: (width, height) of both slides.
            mpps: um per pixel of both slides.
        """
        mpp = self.canvas_mpp(sizes_um, mpps)
        width_um, height_um = (max(size[k] for size in sizes_um) for k in (0, 1))
        megapixels = width_um * height_um / mpp**2 / 1e6
        return math.ceil(MEMORY_MB + MEMORY_MB_PER_MEGAPIXEL * megapixels)


@dataclasses.dataclass(frozen=True)
class LandmarksOptions(Options):
    """Target registration error at an expert's landmarks."""

    section: ClassVar[str] = "landmarks"
    version: ClassVar[int] = 2

    coordinates: str = option(
        "um", "unit of the coordinates of an ACROBAT landmark file", choices=("um", "px")
    )


@dataclasses.dataclass(frozen=True)
class TileOptions(Options):
    """Tiles of both stains, measured in the pass that reads them."""

    section: ClassVar[str] = "tile"
    version: ClassVar[int] = 3

    size_px: int = option(512, "side of a tile", ge=32, le=4096, paper="512")
    mpp: float | None = option(
        None,
        "resolution of the tiles, um/px; none: that of the H&E image",
        gt=0,
        paper="not stated",
    )
    stride_px: int | None = option(
        None, "distance between tiles; none: the size, no overlap", ge=16, le=4096
    )
    upsample: bool = option(False, "allow an mpp finer than the image's own")
    tissue_floor: float = option(
        0.05, "tiles with less tissue in the outline are not even read", ge=0, le=1
    )
    codec: str = option(
        "jpeg",
        "how a tile is stored; png is lossless",
        choices=("jpeg", "png"),
    )
    quality: int = option(95, "quality of jpeg, 4:4:4", ge=1, le=100)
    copy_stored: bool = option(
        True, "keep a tile's own JPEG bytes where one stored tile of the slide is one tile"
    )
    saturation_min: float = option(
        0.06, "lowest HSV saturation that counts as H&E tissue in a tile, 0 to 1", ge=0, lt=1
    )
    density_min: float = option(
        0.03, "lowest optical density over glass that counts as IHC tissue in a tile", ge=0, le=0.5
    )
    histogram_bins: int = option(64, "bins of the haematoxylin histograms", ge=8, le=256)
    bad_tiles_max: float = option(
        0.10, "a unit with a larger share of unreadable tiles is refused", ge=0, le=1
    )


@dataclasses.dataclass(frozen=True)
class MaskOptions(Options):
    """Label images from the HER2 tiles."""

    section: ClassVar[str] = "mask"
    version: ClassVar[int] = 4

    engines: tuple[str, ...] = option(
        ("deepliif", "stain"), "engines that run", choices=("deepliif", "stain"), paper="deepliif"
    )
    target: str = option(
        "deepliif",
        "engine whose masks are trained on",
        choices=("deepliif", "stain"),
        paper="deepliif",
    )
    deepliif_model: str | None = option(
        None, "DeepLIIF model directory (Zenodo record 4751737); nothing is downloaded"
    )
    deepliif_sha256: str | None = option(
        None,
        "digest that the model's files must have; a wrong one is told what they have; none: not "
        "checked",
    )
    deepliif_seg_weights: tuple[float, ...] = option(
        (0.2, 0.2, 0.2, 0.2, 0.2), "weights of its five segmentations, 1 together", ge=0, le=1
    )
    deepliif_threshold: int = option(
        120, "red plus blue above which a pixel belongs to a cell", ge=0, le=510
    )
    deepliif_size_px: int | None = option(
        None, "cells up to this size are dropped; none: what DeepLIIF finds for the tile", ge=0
    )
    deepliif_batch: int = option(
        1,
        "windows of a tile that raw networks look at together; more than 1 replaces BatchNorm by "
        "instance normalisation with the same weights: equal but for rounding",
        ge=1,
        le=64,
    )
    deepliif_marker: int | None = option(
        None,
        "inferred marker above which a cell is positive in any case; none: not used",
        ge=0,
        le=255,
    )
    require_agreement: float | None = option(
        None,
        "tiles are refused on which two engines agree less, 0 to 1: the lower of the Dice of their "
        "positive masks and the share of cells they give the same sign; none: not asked",
        ge=0,
        le=1,
    )
    device: str = option("auto", "where DeepLIIF runs", choices=("auto", "cpu", "cuda"))
    torch_threads: int = option(
        2, "threads of PyTorch for DeepLIIF: another number gives other bytes", ge=1, le=64
    )
    nucleus_density_min: float = option(
        0.05, "haematoxylin below which nothing is a nucleus, optical density", gt=0, le=3
    )
    nucleus_contrast: float = option(
        0.15, "share of the slide's dark haematoxylin that a nucleus must reach", ge=0, lt=1
    )
    nucleus_edge: float = option(
        0.10, "the same share, by which it is darker than the 2 um around it", ge=0, lt=1
    )
    nucleus_window_um: float = option(
        15.0, "a nucleus is darker than the mean of a window this wide, um", gt=1, le=200
    )
    nucleus_area_min_um2: float = option(12.0, "smallest nucleus, um^2", gt=0)
    nucleus_area_max_um2: float = option(
        600.0, "what is larger after it was split is no nucleus, um^2", gt=0
    )
    ring_um: float = option(
        4.0, "how far around a nucleus its membrane is looked for, um", gt=0, le=20
    )
    dab_weak: float = option(
        0.055,
        "DAB from which staining counts as 1+, optical density over the slide's glass",
        gt=0,
        le=3,
    )
    dab_moderate: float = option(0.15, "the same for 2+", gt=0, le=3)
    dab_strong: float = option(0.35, "the same for 3+", gt=0, le=3)
    dab_contrast: float = option(
        1.3,
        "weak staining is a membrane's where it is so many times the mean of the 22 um around it",
        ge=0,
        le=10,
    )
    dab_control: float = option(
        2.0,
        "weak staining is also so many times what the slide's tissue away from nuclei takes up, "
        "its negative control; 0: not asked",
        ge=0,
        le=10,
    )
    completeness_min: float = option(
        0.30, "share of the ring that is stained in a positive cell", gt=0, le=1
    )
    positive_intensity_min: int = option(
        1, "weakest membrane of a positive cell: 1 any brown, 2 moderate, 3 strong", ge=1, le=3
    )
    stain_tiles: int = option(
        32,
        "tiles of a pair, evenly spaced, that its stain vectors are estimated from; fewer than "
        "three with tissue: fixed vectors",
        ge=1,
    )

    def unread(self) -> frozenset[str]:
        """Return what index and filter read, and the options of an engine that does not run."""
        names = {field.name for field in dataclasses.fields(self)}
        idle = {name for name in names if name.startswith("deepliif_")}
        idle |= {"device", "torch_threads"}
        return frozenset(
            {"target", "require_agreement"} | (set() if "deepliif" in self.engines else idle)
        )

    def effective(self) -> Self:
        """Return these options with what is not read as it would be if nobody had set it."""
        idle: dict[str, Any] = {
            field.name: field.default
            for field in dataclasses.fields(self)
            if field.name in self.unread()
        }
        # The default target may be an engine that does not run.
        idle["target"] = self.engines[0]
        return dataclasses.replace(self, **idle)

    def check(self) -> None:
        """Raise ConfigError when engines, target and intensity classes do not fit together."""
        if not self.engines:
            raise ConfigError("mask.engines: no engine; name one of deepliif, stain")
        if len(set(self.engines)) != len(self.engines):
            raise ConfigError("mask.engines: an engine stands twice; name each once")
        if self.target not in self.engines:
            raise ConfigError(
                f"mask.target: {self.target} is not among mask.engines {list(self.engines)}; "
                "add it there or name one that runs"
            )
        if self.require_agreement is not None and len(self.engines) < 2:
            raise ConfigError(
                f"mask.require_agreement: {self.require_agreement}, and only one engine runs; set "
                "mask.engines: [deepliif, stain] or require_agreement: none"
            )
        if len(self.deepliif_seg_weights) != 5:
            raise ConfigError(
                f"mask.deepliif_seg_weights: {len(self.deepliif_seg_weights)} weights; give five "
                "(IHC, haematoxylin, DAPI, Lap2, marker)"
            )
        # Its package takes any, and beyond 1 the gray levels of the sum wrap around.
        if abs(sum(self.deepliif_seg_weights) - 1) > 1e-6:
            raise ConfigError(
                f"mask.deepliif_seg_weights: together {sum(self.deepliif_seg_weights):g}; give "
                "five that make 1"
            )
        if not self.dab_weak < self.dab_moderate < self.dab_strong:
            raise ConfigError(
                f"mask.dab_weak, dab_moderate, dab_strong: {self.dab_weak}, {self.dab_moderate}, "
                f"{self.dab_strong} do not rise; give three rising densities"
            )
        if self.nucleus_area_min_um2 >= self.nucleus_area_max_um2:
            raise ConfigError(
                f"mask.nucleus_area_min_um2: {self.nucleus_area_min_um2} is not below "
                f"nucleus_area_max_um2 {self.nucleus_area_max_um2}; give a range"
            )


@dataclasses.dataclass(frozen=True)
class FilterOptions(Options):
    """Which tiles are accepted. Reads no pixel."""

    section: ClassVar[str] = "filter"
    version: ClassVar[int] = 2

    tissue_fraction_min: float = option(
        0.5, "least tissue on the H&E tile", ge=0, le=1, paper='"low tissue content", no number'
    )
    her2_coverage_min: float = option(0.99, "least share of the tile that HER2 covers", ge=0, le=1)
    he_sharpness_min: float = option(
        30.0,
        "least variance of the Laplacian on H&E, at 0.5 um/px",
        ge=0,
        paper='"OpenCV sharpness", no number',
    )
    her2_sharpness_min: float = option(
        5.0, "the same on HER2, which is softer: refuses only what is hopeless", ge=0
    )
    histogram_similarity_min: float = option(
        0.2,
        "least correlation of the centred haematoxylin histograms",
        ge=-1,
        le=1,
        paper='"histogram similarity test", BCI only, no number',
    )
    histogram_datasets: tuple[str, ...] = option(
        ("bci",), "data sets to which histogram similarity applies", paper="BCI only"
    )
    folding_max: float = option(0.01, "largest folded share of a tile", ge=0, le=1)
    registration_error_max_um: float | None = option(
        100.0, "largest estimated error of the registration at a tile, um; none: any", gt=0
    )
    registration_margin_min: float | None = option(
        -0.05,
        "least correlation of haematoxylin at a tile above that of its shifted versions; none: any",
        ge=-2,
        le=2,
    )
    accept_review: bool = option(False, "take pairs whose registration is under review")


@dataclasses.dataclass(frozen=True)
class IndexOptions(Options):
    """Splits and the subsets of both networks."""

    section: ClassVar[str] = "index"

    seed: int = option(20251, "seed of splits and subsets", ge=0)
    val_fraction: float = option(0.15, "share of free cases that go to validation", ge=0, lt=1)
    test_fraction: float = option(0.15, "share of free cases that go to test", ge=0, lt=1)
    generation_train: int | None = option(
        11_000, "tiles GenerationNet trains on; none: all", ge=1, paper="11,000"
    )
    generation_val: int | None = option(
        4_000, "tiles it is validated on; none: all", ge=1, paper="4,000"
    )
    generation_test: int | None = option(
        1_000, "tiles it is tested on; none: all", ge=1, paper="1,000 unseen BCI patches"
    )
    generation_datasets: tuple[str, ...] = option(
        (), "data sets GenerationNet trains on; empty: all", paper="ACROBAT and BCI"
    )
    generation_shares: tuple[float, ...] = option(
        (), "share of each of generation_datasets; empty: as they come", ge=0, paper="not stated"
    )
    generation_test_datasets: tuple[str, ...] = option(
        ("bci",), "data sets GenerationNet is tested on; empty: all", paper="BCI"
    )
    segmentation_train: int | None = option(
        42_000, "tiles SegmentationNet trains on; none: all", ge=1, paper="42,000"
    )
    segmentation_val: int | None = option(
        8_000, "tiles it is validated on; none: all", ge=1, paper="8,000"
    )
    segmentation_test: int | None = option(
        2_000, "tiles it is tested on; none: all", ge=1, paper="2,000"
    )
    segmentation_datasets: tuple[str, ...] = option(
        (), "data sets SegmentationNet uses; empty: all", paper="ACROBAT and BCI"
    )
    segmentation_shares: tuple[float, ...] = option(
        (), "share of each of segmentation_datasets; empty: as they come", ge=0, paper="not stated"
    )
    mpp_tolerance: float = option(
        0.10, "widest relative spread of resolutions that is not called a mixture", ge=0
    )
    allow_mixed_mpp: bool = option(
        True, "mix data sets of different resolution; false: refuse", paper="mixed, not discussed"
    )

    def check(self) -> None:
        """Raise ConfigError when the parts leave nothing for training."""
        held_out = self.val_fraction + self.test_fraction
        if held_out >= 1:
            raise ConfigError(
                f"index.val_fraction + index.test_fraction: {held_out} leaves nothing to train on; "
                "keep the sum below 1"
            )
        for network in ("generation", "segmentation"):
            datasets = getattr(self, f"{network}_datasets")
            shares = getattr(self, f"{network}_shares")
            if len(set(datasets)) != len(datasets):
                raise ConfigError(
                    f"index.{network}_datasets: {list(datasets)} names one twice; name each once"
                )
            if shares and (len(shares) != len(datasets) or sum(shares) <= 0):
                raise ConfigError(
                    f"index.{network}_shares: {list(shares)} beside {network}_datasets "
                    f"{list(datasets)}; give one share for each data set, not all 0"
                )


@dataclasses.dataclass(frozen=True)
class ReportOptions(Options):
    """The page about the data."""

    section: ClassVar[str] = "report"
    version: ClassVar[int] = 5

    gallery_tiles: int = option(24, "tiles in each gallery", ge=1, le=500)
    worst_pairs: int = option(
        20,
        "registered pairs on the page itself, worst first; the others have pages beside it",
        ge=1,
        le=200,
    )
    seed: int = option(20251, "seed of the galleries", ge=0)
    intense_share: float | None = option(
        None,
        "share of strong cells above which a score reads 2+ though they are too few for 3+, as the "
        "guideline of 2018 says of any; a floor against noise, 0.01 say; none: not read so",
        ge=0,
        lt=1,
    )


@dataclasses.dataclass(frozen=True)
class TrainingOptions(Options):
    """What both trainings share."""

    crop_px: int | None = option(
        None, "side of a random crop; none: the whole tile", ge=32, le=2048, paper="512, whole"
    )
    seed: int = option(20251, "seed", ge=0)
    device: str = option("auto", "where it trains", choices=("auto", "cpu", "cuda"))
    torch_threads: int = option(
        2, "threads of PyTorch: another number gives other bytes", ge=1, le=64
    )
    deterministic: bool = option(
        True, "the same machine gives the same bytes again; slower on a GPU"
    )
    precision: str = option(
        "tf32",
        "numbers the networks compute in: float32; tf32, the same but that a GPU rounds what it "
        "multiplies, as PyTorch does in convolutions by default; bf16, fp16: half the memory. "
        "Losses and weights stay float32",
        choices=("float32", "tf32", "bf16", "fp16"),
        paper="not stated",
    )
    compile: bool = option(
        False, "let torch.compile fuse the networks: minutes before the first step, faster after"
    )
    gpus: int = option(
        1,
        "GPUs that share each step, by torchrun; with device cpu, processes; batch norms, Dice and "
        "variance are then of each GPU's share, and a smaller last step is left out",
        ge=1,
        le=64,
    )
    accumulate: int = option(
        1,
        "parts in which a step's tiles go through one after the other, for less memory; Dice and "
        "variance are then of a part, the generator meets the discriminator of before the step, "
        "and a smaller last step is left out",
        ge=1,
        le=1024,
    )
    validate_every: int = option(1, "epochs between validations; the last is always one", ge=1)
    sample_tiles: int = option(
        4, "validation tiles of which each validation leaves pictures", ge=0, le=64
    )
    workers: int = option(2, "processes that read tiles, for each GPU", ge=0, le=64)
    checkpoint_minutes: float = option(10.0, "a checkpoint at least this often", gt=0)

    def check_steps(self, batch_size: int) -> None:
        """Raise ConfigError when a step cannot be shared out evenly."""
        shares = self.gpus * self.accumulate
        if batch_size % shares:
            raise ConfigError(
                f"{self.section}.batch_size: {batch_size} tiles cannot be shared out to gpus "
                f"{self.gpus} times accumulate {self.accumulate}; give a multiple of {shares}"
            )


GENERATORS = {
    "unet_512": 512,
    "unet_256": 256,
    "unet_128": 128,
    "unet_32": 32,
    "resnet_9blocks": 4,
    "resnet_6blocks": 4,
    "attention_unet_32": 32,
}
"""What the side of each generator's input must be a multiple of."""


@dataclasses.dataclass(frozen=True)
class TrainGenerationOptions(TrainingOptions):
    """GenerationNet (sections 3.1 and 4.1 of the HEMERA paper)."""

    section: ClassVar[str] = "train_generation"
    version: ClassVar[int] = 2

    network: str = option(
        "unet_512",
        "generator",
        choices=tuple(GENERATORS),
        paper="U-Net, depth not stated",
    )
    base_width: int = option(32, "filters of its first layer", ge=4, le=256, paper="32")
    norm: str = option(
        "batch",
        "normalisation of generator and discriminator",
        choices=("batch", "instance"),
        paper="batch",
    )
    dropout: bool = option(False, "dropout 0.5 within the generator while it trains", paper="none")
    discriminator_width: int = option(64, "filters of PatchGAN's first layer", ge=4, le=256)
    discriminator_layers: int = option(3, "stride-2 layers of PatchGAN", ge=1, le=5)
    epochs: int = option(100, "epochs", ge=1, paper="100")
    decay_from_epoch: int = option(
        50, "the learning rate falls linearly after this epoch", ge=0, paper="50"
    )
    lr_step: str = option(
        "end",
        "end: the last epoch trains; start: at rate 0, as the public code does",
        choices=("end", "start"),
    )
    batch_size: int = option(2, "tiles per step", ge=1, paper="2")
    learning_rate: float = option(2e-4, "of Adam, both networks", gt=0, paper="2e-4")
    beta1: float = option(0.5, "of Adam", ge=0, lt=1, paper="0.5")
    beta2: float = option(0.999, "of Adam", ge=0, lt=1, paper="0.999")
    l1_weights: tuple[float, ...] = option(
        (1.0, 25.0, 25.0, 25.0), "of the four levels of the pyramid", ge=0, paper="1, 25, 25, 25"
    )
    weight_map: str = option(
        "inside",
        "distance weights of nuclei (equation 1)",
        choices=("inside", "literal", "none"),
        paper="printed as literal, described as inside",
    )
    mask_source: str = option(
        "nuclei", "mask the weights grow from", choices=("nuclei", "her2_positive"), paper="nuclei"
    )
    gan_loss: str = option(
        "vanilla",
        "adversarial loss: vanilla, cross-entropy; lsgan, least squares",
        choices=("vanilla", "lsgan"),
        paper="not stated",
    )
    weight_adversarial: bool = option(False, "weight the adversarial loss too")
    renormalise_mean: bool = option(False, "divide the weights by their mean")
    registration_scale_um: float | None = option(
        None,
        "estimated error of the registration at which a tile counts half, um; none: all alike",
        gt=0,
        paper="not used",
    )
    dice_source: str = option(
        "dab",
        "what balanced Dice compares",
        choices=("dab", "intensity", "none"),
        paper="balanced Dice, undefined",
    )
    dice_weight: float = option(1.0, "of balanced Dice", ge=0)
    dice_slope: float = option(20.0, "steepness of the soft DAB mask", gt=0)
    dice_threshold: float | None = option(
        None, "its DAB density; none: fitted on training tiles", gt=0, le=3
    )
    variance_weight: float = option(
        0.0,
        "of the loss of Rehmat et al. that the pixels' variance over a batch be the real one; 0: "
        "not used",
        ge=0,
        paper="not used; its own paper does not state it",
    )
    variance_estimator: str = option(
        "unbiased",
        "of that variance: divided by the tiles less one, or by the tiles",
        choices=("unbiased", "biased"),
    )
    flip: bool = option(True, "flip pairs horizontally at random")
    select: str = option(
        "last",
        "epoch whose weights are kept; best: lowest reconstruction loss on validation tiles",
        choices=("last", "best"),
        paper="not stated; pix2pix keeps the last",
    )

    @property
    def divisor(self) -> int:
        """What the side of an input must be a multiple of, because the network halves it so far."""
        return GENERATORS[self.network]

    @property
    def whole_batches(self) -> bool:
        """Whether a smaller last batch is left out: a variance wants more than one tile."""
        return self.variance_weight > 0

    def check(self) -> None:
        """Raise ConfigError when schedule, pyramid or batch are impossible."""
        self.check_steps(self.batch_size)
        if self.variance_weight > 0 and self.batch_size // (self.gpus * self.accumulate) < 2:
            raise ConfigError(
                f"train_generation.variance_weight: {self.variance_weight:g} wants the variance "
                f"over a batch, and batch_size {self.batch_size}, shared out, leaves one tile; "
                "give at least two for each GPU and part, or variance_weight: 0"
            )
        if len(self.l1_weights) != 4:
            raise ConfigError(
                f"train_generation.l1_weights: {len(self.l1_weights)} weights; give four, finest "
                "first"
            )
        if not any(self.l1_weights):
            raise ConfigError(
                "train_generation.l1_weights: all are 0, and they say which epoch is best; give at "
                "least one above 0"
            )
        if self.decay_from_epoch > self.epochs:
            raise ConfigError(
                f"train_generation.decay_from_epoch: {self.decay_from_epoch} is past epochs "
                f"{self.epochs}; give at most {self.epochs}"
            )
        step = self.divisor
        if self.crop_px is not None and self.crop_px % step:
            raise ConfigError(
                f"train_generation.crop_px: {self.crop_px} is not a multiple of {step}, what "
                f"{self.network} halves its input to nothing in; give a multiple, or a network "
                "of less depth"
            )
        if self.crop_px is not None and self.crop_px < 3 * 2**self.discriminator_layers:
            raise ConfigError(
                f"train_generation.discriminator_layers: {self.discriminator_layers} need a crop "
                f"of at least {3 * 2**self.discriminator_layers} px and train_generation.crop_px "
                f"is {self.crop_px}; give fewer layers or a larger crop"
            )


@dataclasses.dataclass(frozen=True)
class TrainSegmentationOptions(TrainingOptions):
    """SegmentationNet (sections 3.2 and 4.1 of the HEMERA paper)."""

    section: ClassVar[str] = "train_segmentation"
    version: ClassVar[int] = 2

    generation_branch: str = option(
        "skip16",
        "features of the frozen GenerationNet",
        choices=("skip16", "attention_unet_32_bottleneck", "virtual_rgb_encoder", "none"),
        paper="512 x 16 x 16, which layer not stated",
    )
    generation_skips: bool = option(False, "hand its encoder's maps to the decoder too")
    base_width: int = option(
        64,
        "filters of the encoder's first layer; the decoder follows; 64 is ResNet34 itself",
        ge=4,
        le=256,
        paper="ResNet34",
    )
    decoder: str = option(
        "unet",
        "decoder",
        choices=("unet", "unetplusplus", "deeplabv3plus"),
        paper="unet",
    )
    encoder_weights: str | None = option(
        "imagenet",
        "weights that ResNet34 starts from: imagenet, torchvision's own where torch keeps what it "
        "downloaded; a file of them; none: untrained",
        paper="ImageNet",
    )
    epochs: int = option(300, "epochs", ge=1, paper="300")
    batch_size: int = option(16, "tiles per step", ge=1, paper="16")
    learning_rate: float = option(2e-4, "of AdamW", gt=0, paper="2e-4")
    weight_decay: float = option(0.01, "of AdamW", ge=0, paper="not stated")
    loss_lambda: float = option(
        0.5,
        "share of cross-entropy beside Dice; 1: cross-entropy alone",
        ge=0,
        le=1,
        paper="not stated; section 4.1: cross-entropy alone",
    )
    focal_gamma: float = option(
        0.0,
        "how far cross-entropy looks away from pixels that are certain (focal loss); 0: not at all",
        ge=0,
        le=5,
        paper="0",
    )
    tversky_beta: float = option(
        0.5,
        "what a missed pixel costs in Dice, a false one costing the rest to 1 (Tversky); above 0.5 "
        "favours recall",
        gt=0,
        lt=1,
        paper="0.5",
    )
    flip: bool = option(True, "flip tiles at random, both ways")
    turn: bool = option(False, "turn tiles by quarters at random", paper="not stated")
    select: str = option(
        "best",
        "epoch whose weights are kept; best: highest pooled F1 on validation tiles, at 0.5",
        choices=("last", "best"),
        paper="not stated",
    )

    @property
    def whole_batches(self) -> bool:
        """Whether a smaller last batch is left out: one tile alone cannot be normalised there."""
        return self.decoder == "deeplabv3plus"

    def check(self) -> None:
        """Raise ConfigError when crop, branch and weights do not fit the network."""
        self.check_steps(self.batch_size)
        if self.whole_batches and self.batch_size // (self.gpus * self.accumulate) < 2:
            raise ConfigError(
                f"train_segmentation.decoder: deeplabv3plus pools whole tiles, and batch_size "
                f"{self.batch_size}, shared out, leaves one, which cannot be normalised; give at "
                "least two for each GPU and part, or another decoder"
            )
        if self.base_width % 2:
            raise ConfigError(
                f"train_segmentation.base_width: {self.base_width} is odd, and the decoder ends in "
                "half of it; give an even number"
            )
        if self.crop_px is not None and self.crop_px % 32:
            raise ConfigError(
                f"train_segmentation.crop_px: {self.crop_px} is not a multiple of 32, by which the "
                "encoder divides its input; give a multiple of 32"
            )
        if self.generation_skips and self.generation_branch != "skip16":
            raise ConfigError(
                f"train_segmentation.generation_skips: true, and generation_branch is "
                f"{self.generation_branch}; set generation_branch: skip16 or generation_skips: "
                "false"
            )
        if self.encoder_weights is not None and self.base_width != 64:
            raise ConfigError(
                f"train_segmentation.encoder_weights: ResNet34's weights have base width 64, not "
                f"{self.base_width}; set base_width: 64 or encoder_weights: null"
            )


@dataclasses.dataclass(frozen=True)
class JudgingOptions(Options):
    """What evaluate and compare share: how pictures are judged."""

    blur_sigma_px: float = option(8.0, "blur of the trivial baseline", gt=0)
    fid_weights: str | None = option(
        None,
        "file of InceptionV3 weights (torch-fidelity's or pytorch-fid's, ending in 6726825d.pth), "
        "for FID and KID; none: not measured; nothing is downloaded",
    )
    lpips_weights: str | None = option(
        None,
        "file of ImageNet weights of AlexNet (torchvision's), for LPIPS; none: not measured; "
        "nothing is downloaded",
    )
    bootstrap_samples: int = option(
        1000,
        "times that the cases are drawn again for an interval; 0: no intervals",
        ge=0,
        le=10_000,
    )
    confidence: float = option(0.95, "share of these that an interval holds", gt=0, lt=1)
    seed: int = option(20251, "seed of the intervals and of KID's subsets", ge=0)
    device: str = option("auto", "where it runs", choices=("auto", "cpu", "cuda"))
    torch_threads: int = option(2, "threads of PyTorch", ge=1, le=64)


@dataclasses.dataclass(frozen=True)
class EvaluateOptions(JudgingOptions):
    """Metrics of both networks on the test subsets."""

    section: ClassVar[str] = "evaluate"
    version: ClassVar[int] = 3

    threshold: float = option(0.5, "probability from which a pixel is positive", gt=0, lt=1)
    batch_size: int = option(4, "tiles per step", ge=1)
    gallery_tiles: int = option(12, "tiles shown on the page", ge=1, le=200)


@dataclasses.dataclass(frozen=True)
class CompareOptions(JudgingOptions):
    """Generators of several presets on the same tiles; made by `snakemake compare` alone."""

    section: ClassVar[str] = "compare"

    presets: tuple[str, ...] = option(
        ("hemera", "pyramid_pix2pix", "pix2pix", "variance_penalized"),
        "presets whose train_generation is compared; device, threads, seed and the like are those "
        "of this config's train_generation",
    )
    network: str | None = option(
        None, "generator of all of them; none: each preset's own", choices=tuple(GENERATORS)
    )
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

    def check(self) -> None:
        """Raise ConfigError when the presets are none, one twice, or no names of files."""
        if not self.presets or len(set(self.presets)) != len(self.presets):
            raise ConfigError(
                f"compare.presets: {list(self.presets)}; name at least one, and each once"
            )
        wrong = [name for name in self.presets if not re.fullmatch(r"[a-z0-9_]+", name, re.ASCII)]
        if wrong:
            raise ConfigError(
                f"compare.presets: {wrong[0]!r} is no preset's name; give a name in hemera/presets"
            )


@dataclasses.dataclass(frozen=True)
class CohortOptions(Options):
    """The keys at the top of config.yaml: which cohort, cut how."""

    section: ClassVar[str] = TOP

    preset: str = option("hemera", "values that differ from the paper's: a name in hemera/presets")
    sheet: str = option(DEMO_SHEET, "the sheet of pairs")
    allow_demo_sizes: bool = option(False, "let preset demo run on another sheet than the demo's")
    block_count: int = option(
        19, "blocks that the image pairs of one data set are cut into", ge=1, le=4096
    )

    def check(self) -> None:
        """Raise ConfigError when the toy settings of the demo meet a real sheet."""
        if self.preset == "demo" and self.sheet != DEMO_SHEET and not self.allow_demo_sizes:
            raise ConfigError(
                f"preset: demo trains toys, and sheet is {self.sheet}; set preset: "
                "hemera for the paper's sizes, or allow_demo_sizes: true to try the graph"
            )


STAGES: dict[str, type[Options]] = {
    cls.section: cls
    for cls in (
        DescribeOptions,
        RegisterOptions,
        LandmarksOptions,
        TileOptions,
        MaskOptions,
        FilterOptions,
        IndexOptions,
        ReportOptions,
        TrainGenerationOptions,
        TrainSegmentationOptions,
        EvaluateOptions,
        CompareOptions,
    )
}
"""Options class of every stage, in the order of the graph."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole configuration, checked."""

    cohort: CohortOptions
    stages: Mapping[str, Options]

    def flags(self, stage: str) -> str:
        """Return the options of `stage` as flags for the command line, quoted for a shell."""
        return shlex.join(flags(self.stages[stage].effective()))

    def compared(self, preset: str) -> TrainGenerationOptions:
        """Return how `compare` trains the generator of a preset.

        The method is the preset's, the budget what section compare says for all presets alike, and
        how it runs (device, threads, precision, seed, ...) what section train_generation says.

        Raises:
            ConfigError: one line per fault; no such preset, or values that cannot stand together.
        """
        own, budget, tile = (self.stages[name] for name in ("train_generation", "compare", "tile"))
        assert isinstance(tile, TileOptions)
        runs = {field.name for field in dataclasses.fields(TrainingOptions)} - {"crop_px"}
        known = {field.name for field in dataclasses.fields(TrainGenerationOptions)}
        values = dict(_preset(preset).get("train_generation") or {})
        values |= {name: getattr(own, name) for name in runs}
        values |= {
            field.name: getattr(budget, field.name)
            for field in dataclasses.fields(budget)
            if field.name in known - runs and getattr(budget, field.name) is not None
        }
        try:
            options = from_mapping(TrainGenerationOptions, values)
        except ConfigError as error:
            lines = str(error).splitlines()
            raise ConfigError("\n".join(f"preset {preset}: {line}" for line in lines)) from None
        # The whole tile goes through the generator when it is judged.
        crop_px = options.crop_px or tile.size_px
        if crop_px > tile.size_px or crop_px % options.divisor or tile.size_px % options.divisor:
            raise ConfigError(
                f"preset {preset}: network {options.network} takes multiples of {options.divisor} "
                f"px, and crop_px is {crop_px}, tile.size_px {tile.size_px}; set compare.network "
                "or compare.crop_px"
            )
        return options

    def compared_flags(self, preset: str) -> str:
        """Return these options as flags for the command line, quoted for a shell."""
        return shlex.join(flags(self.compared(preset).effective()))


def load(values: Mapping[str, Any], *, source: str = "config.yaml") -> Config:
    """Check a configuration, fill it from its preset and the defaults.

    Args:
        values: parsed config.yaml, or Snakemake's ``config``.
        source: name that error messages begin with.

    Raises:
        ConfigError: one line per fault, each naming key, bound and remedy.
    """
    cohort_keys = {field.name for field in dataclasses.fields(CohortOptions)}
    known = cohort_keys | set(STAGES)
    faults = [f"{key}: no such key{nearest(str(key), known)}" for key in values if key not in known]
    preset_name = values.get("preset", CohortOptions.preset)
    preset: Mapping[str, Any] = {}
    if isinstance(preset_name, str):
        try:
            preset = _preset(preset_name)
        except ConfigError as error:
            faults.append(str(error))
    top = {key: value for key, value in {**preset, **values}.items() if key in cohort_keys}
    cohort = collect(faults, CohortOptions, top)
    stages: dict[str, Options] = {}
    judging: dict[str, Any] = {}
    for name, cls in STAGES.items():
        own = values.get(name)
        if own is not None and not isinstance(own, Mapping):
            faults.append(f"{name}: {own!r} is not a section; indent its keys below it")
            own = None
        given = {**(preset.get(name) or {}), **(own or {})}
        if name == CompareOptions.section:
            given = {**judging, **given}
        section = collect(faults, cls, given)
        if isinstance(section, EvaluateOptions):
            # What is said there of how pictures are judged holds for compare too.
            judging = {
                field.name: getattr(section, field.name)
                for field in dataclasses.fields(JudgingOptions)
                if field.name in given
            }
        if section is not None:
            stages[name] = section
    if not faults:
        faults += _disagreements(stages)
    if faults or cohort is None:
        lines = [line for fault in faults for line in fault.splitlines()]
        raise ConfigError("\n".join(f"{source}: {line}" for line in lines))
    return Config(cohort, stages)


def _disagreements(stages: Mapping[str, Options]) -> list[str]:
    """Return where two stages cannot work together: better now than after the first of them."""
    tile, generation, segmentation = (
        stages[name] for name in ("tile", "train_generation", "train_segmentation")
    )
    assert isinstance(tile, TileOptions)
    assert isinstance(generation, TrainGenerationOptions)
    assert isinstance(segmentation, TrainSegmentationOptions)
    faults = []
    # SegmentationNet hands its input to GenerationNet too, unless it has no such branch.
    branch = segmentation.generation_branch
    both = 32 if branch == "none" else max(32, generation.divisor)
    for options, divisor in ((generation, generation.divisor), (segmentation, both)):
        if options.crop_px is not None and options.crop_px > tile.size_px:
            faults.append(
                f"{options.section}.crop_px: {options.crop_px} is larger than tile.size_px "
                f"{tile.size_px}; give a smaller crop or larger tiles"
            )
        # Crops are trained on, whole tiles are evaluated.
        elif (options.crop_px or 0) % divisor or tile.size_px % divisor:
            faults.append(
                f"{options.section}.crop_px: {options.crop_px or 'none'}, with tile.size_px "
                f"{tile.size_px}: both must be multiples of {divisor}, by which "
                f"train_generation.network {generation.network} or the encoder divides its input; "
                "give multiples, or a network of less depth"
            )
    fits = {
        "skip16": ("unet_512", "unet_256", "unet_128"),
        "attention_unet_32_bottleneck": ("attention_unet_32",),
    }.get(branch, tuple(GENERATORS))
    if generation.network not in fits:
        faults.append(
            f"train_segmentation.generation_branch: {branch} takes maps from within "
            f"{', '.join(fits)}, and train_generation.network is {generation.network}; choose one "
            "of these networks, or generation_branch: virtual_rgb_encoder or none"
        )
    return faults


def load_file(path: Path) -> Config:
    """Read and check a YAML file; see `load`."""
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; name a config file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name a file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: holds no keys; begin with `preset: hemera`")
    return load(values, source=str(path))


def _preset(name: str) -> Mapping[str, Any]:
    path = PRESETS / f"{name}.yaml"
    names = sorted(file.stem for file in PRESETS.glob("*.yaml"))
    if name not in names:
        raise ConfigError(f"preset: {name!r} is none of {', '.join(names)}; name one of these")
    values = yaml.safe_load(path.read_text())
    return values if isinstance(values, Mapping) else {}
