"""Options of the stages that choose, split and present tiles: filter, index and report."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import model_validator

from hemera.config.base import NonNegative, Options, option


class FilterOptions(Options):
    """Which tiles are accepted. Reads no pixel."""

    section: ClassVar[str] = "filter"
    version: ClassVar[int] = 2

    tissue_fraction_min: float = option(
        0.5,
        "smallest tissue fraction of an H&E tile",
        ge=0,
        le=1,
        paper='"low tissue content", no number',
    )
    her2_coverage_min: float = option(
        0.99, "smallest fraction of a tile that the HER2 image covers", ge=0, le=1
    )
    he_sharpness_min: float = option(
        30.0,
        "smallest variance of the Laplacian of an H&E tile, at 0.5 um per pixel",
        ge=0,
        paper='"OpenCV sharpness", no number',
    )
    her2_sharpness_min: float = option(
        5.0,
        "smallest variance of the Laplacian of a HER2 tile, at 0.5 um per pixel; low, because IHC "
        "is softer than H&E",
        ge=0,
    )
    histogram_similarity_min: float = option(
        0.2,
        "smallest correlation of the centred haematoxylin histograms of both stains",
        ge=-1,
        le=1,
        paper='"histogram similarity test", BCI only, no number',
    )
    histogram_datasets: tuple[str, ...] = option(
        ("bci",), "data sets to which histogram_similarity_min applies", paper="BCI only"
    )
    folding_max: float = option(
        0.01, "largest fraction of a tile in which the displacement folds", ge=0, le=1
    )
    registration_error_max_um: float | None = option(
        100.0, "largest estimated registration error at a tile, um; none: no limit", gt=0
    )
    registration_margin_min: float | None = option(
        -0.05,
        "smallest difference between the haematoxylin correlation at a tile and that of its "
        "shifted positions; none: no limit",
        ge=-2,
        le=2,
    )
    accept_review: bool = option(
        False, "accept tiles of pairs whose registration has the verdict review"
    )
    require_agreement: float | None = option(
        None,
        "smallest agreement of the mask engines on a tile, 0 to 1: the lower of the Dice of their "
        "positive masks and the fraction of cells with the same class; none: not required",
        ge=0,
        le=1,
    )


class IndexOptions(Options):
    """Splits and the subsets of both networks."""

    section: ClassVar[str] = "index"

    target: str = option(
        "deepliif", "engine whose masks the networks are trained on", paper="deepliif"
    )
    seed: int = option(20251, "seed of splits and subsets", ge=0)
    val_fraction: float = option(
        0.15, "fraction of the cases without a given split that is used for validation", ge=0, lt=1
    )
    test_fraction: float = option(
        0.15, "fraction of the cases without a given split that is used for testing", ge=0, lt=1
    )
    generation_train: int | None = option(
        11_000, "training tiles of GenerationNet; none: all", ge=1, paper="11,000"
    )
    generation_val: int | None = option(
        4_000, "validation tiles of GenerationNet; none: all", ge=1, paper="4,000"
    )
    generation_test: int | None = option(
        1_000, "test tiles of GenerationNet; none: all", ge=1, paper="1,000 unseen BCI patches"
    )
    generation_datasets: tuple[str, ...] = option(
        (), "data sets on which GenerationNet is trained; empty: all", paper="ACROBAT and BCI"
    )
    generation_shares: tuple[NonNegative, ...] = option(
        (),
        "relative weight of each of generation_datasets among the tiles; empty: as available",
        paper="not stated",
    )
    generation_test_datasets: tuple[str, ...] = option(
        ("bci",), "data sets on which GenerationNet is tested; empty: all", paper="BCI"
    )
    segmentation_train: int | None = option(
        42_000, "training tiles of SegmentationNet; none: all", ge=1, paper="42,000"
    )
    segmentation_val: int | None = option(
        8_000, "validation tiles of SegmentationNet; none: all", ge=1, paper="8,000"
    )
    segmentation_test: int | None = option(
        2_000, "test tiles of SegmentationNet; none: all", ge=1, paper="2,000"
    )
    segmentation_datasets: tuple[str, ...] = option(
        (),
        "data sets on which SegmentationNet is trained and tested; empty: all",
        paper="ACROBAT and BCI",
    )
    segmentation_shares: tuple[NonNegative, ...] = option(
        (),
        "relative weight of each of segmentation_datasets among the tiles; empty: as available",
        paper="not stated",
    )
    mpp_tolerance: float = option(
        0.10,
        "largest relative difference of tile resolutions that is not reported as a mixture",
        ge=0,
    )
    allow_mixed_mpp: bool = option(
        True,
        "allow data sets of different resolution in one index; false: an error",
        paper="mixed, not discussed",
    )

    @model_validator(mode="after")
    def _something_is_left_for_training(self) -> Self:
        held_out = self.val_fraction + self.test_fraction
        if held_out >= 1:
            raise ValueError(
                f"val_fraction: {self.val_fraction} plus test_fraction {self.test_fraction} leaves "
                "no tiles for training; keep the sum below 1"
            )
        return self

    @model_validator(mode="after")
    def _each_dataset_has_one_share(self) -> Self:
        for network in ("generation", "segmentation"):
            datasets = getattr(self, f"{network}_datasets")
            shares = getattr(self, f"{network}_shares")
            if len(set(datasets)) != len(datasets):
                raise ValueError(
                    f"{network}_datasets: {list(datasets)} has a name twice; give each name once"
                )
            if shares and (len(shares) != len(datasets) or sum(shares) <= 0):
                raise ValueError(
                    f"{network}_shares: {list(shares)} does not match {network}_datasets "
                    f"{list(datasets)}; give one number for each data set, not all 0"
                )
        return self


class ReportOptions(Options):
    """The page about the data."""

    section: ClassVar[str] = "report"
    version: ClassVar[int] = 6

    gallery_tiles: int = option(24, "tiles in each gallery", ge=1, le=500)
    worst_pairs: int = option(
        20,
        "registered pairs shown on the main page, worst first; the others have linked pages",
        ge=1,
        le=200,
    )
    seed: int = option(20251, "seed of the random choice of gallery tiles", ge=0)
    intense_share: float | None = option(
        None,
        "fraction of strongly stained cells, too few for 3+, above which a slide is scored 2+ "
        "(ASCO/CAP 2018: any; 0.01 suppresses noise); none: this rule is not applied",
        ge=0,
        lt=1,
    )
