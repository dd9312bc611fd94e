"""Options of the stages that choose, split and present tiles: filter, index and report."""

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from hemera.config.base import Count, Fraction, NonNegative, Options, Positive, Seed, paper


class FilterOptions(Options):
    """Which tiles are accepted. Reads no pixel."""

    section: ClassVar[str] = "filter"
    version: ClassVar[int] = 5

    tissue_fraction_min: Annotated[Fraction, paper('"low tissue content", no number')] = 0.5
    """Smallest tissue fraction of an H&E tile."""
    her2_coverage_min: Fraction = 0.99
    """Smallest fraction of a tile that the HER2 image covers."""
    he_sharpness_min: Annotated[NonNegative, paper('"OpenCV sharpness", no number')] = 30.0
    """Smallest variance of the Laplacian of an H&E tile, at 0.5 um per pixel."""
    her2_sharpness_min: NonNegative = 5.0
    """Smallest variance of the Laplacian of a HER2 tile, at 0.5 um per pixel; low, because IHC is
    softer than H&E."""
    histogram_similarity_min: Annotated[
        float, Field(ge=-1, le=1), paper('"histogram similarity test", BCI only, no number')
    ] = 0.0
    """Smallest correlation of the centred haematoxylin histograms of both stains; low, because it
    hardly separates true from wrong pairs: a higher limit costs good tiles."""
    histogram_datasets: Annotated[tuple[str, ...], paper("BCI only")] = ("bci",)
    """Data sets to which histogram_similarity_min applies."""
    folding_max: Fraction = 0.01
    """Largest fraction of a tile in which the displacement folds."""
    registration_error_max_um: Positive | None = 100.0
    """Largest estimated registration error at a tile, um; null: no limit."""
    registration_margin_min: Annotated[float | None, Field(ge=-2, le=2)] = -0.05
    """Smallest difference between the haematoxylin correlation at a tile and that of its shifted
    positions; null: no limit."""
    accept_review: bool = False
    """Accept tiles of pairs whose registration has the verdict review."""
    pen_max: Fraction = 0.01
    """Largest fraction of a tile under pen, on either stain."""
    fold_max: Fraction = 0.05
    """Largest fraction of a tile in folds of the tissue, on either stain."""
    edge_max: Fraction = 0.01
    """Largest fraction of a tile under edges of bubbles and of the coverslip, and hairs, on either
    stain."""
    dust_max: Fraction = 0.05
    """Largest fraction of a tile under dust, on either stain."""
    other_max: Fraction = 0.05
    """Largest fraction of a tile under artefacts without a kind, in files that the sheet names, on
    either stain."""
    blur_max: Fraction = 0.25
    """Largest fraction of 4 x 4 cells of a tile that are out of focus, on either stain."""
    excluded_max: Fraction = 0.5
    """Largest fraction of a tile that its mask excludes: artefacts of both stains, and places that
    HER2 does not cover."""
    nuclei_min_per_mm2: NonNegative = 50.0
    """Smallest number of nuclei per mm^2 of a tile without its excluded pixels, by the mask engine
    that finds most."""
    require_agreement: Fraction | None = None
    """Smallest agreement of the mask engines on a tile, 0 to 1: the lower of the Dice of their
    positive masks and the fraction of cells with the same sign; null: not required."""


class IndexOptions(Options):
    """Splits and the subsets of both networks."""

    section: ClassVar[str] = "index"
    version: ClassVar[int] = 3

    target: Annotated[str, paper("deepliif")] = "deepliif"
    """Engine whose masks the networks are trained on."""
    seed: Seed = 20251
    """Seed of splits and subsets."""
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.15
    """Fraction of the cases without a given split that is used for validation."""
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.15
    """Fraction of the cases without a given split that is used for testing."""
    generation_train: Annotated[Count | None, paper("11,000")] = 11_000
    """Training tiles of GenerationNet; null: all."""
    generation_val: Annotated[Count | None, paper("4,000")] = 4_000
    """Validation tiles of GenerationNet; null: all."""
    generation_test: Annotated[Count | None, paper("1,000 unseen BCI patches")] = 1_000
    """Test tiles of GenerationNet; null: all."""
    generation_datasets: Annotated[tuple[str, ...], paper("ACROBAT and BCI")] = ()
    """Data sets on which GenerationNet is trained; empty: all."""
    generation_test_datasets: Annotated[tuple[str, ...], paper("BCI")] = ()
    """Data sets on which GenerationNet is tested; empty: all."""
    segmentation_train: Annotated[Count | None, paper("42,000")] = 42_000
    """Training tiles of SegmentationNet; null: all."""
    segmentation_val: Annotated[Count | None, paper("8,000")] = 8_000
    """Validation tiles of SegmentationNet; null: all."""
    segmentation_test: Annotated[Count | None, paper("2,000")] = 2_000
    """Test tiles of SegmentationNet; null: all."""
    segmentation_datasets: Annotated[tuple[str, ...], paper("ACROBAT and BCI")] = ()
    """Data sets on which SegmentationNet is trained and tested; empty: all."""
    mpp_tolerance: NonNegative = 0.10
    """Largest relative difference of tile resolutions that is not reported as a mixture."""

    @model_validator(mode="after")
    def _something_is_left_for_training(self) -> Self:
        held_out = self.val_fraction + self.test_fraction
        if held_out >= 1:
            raise ValueError(
                f"val_fraction: {self.val_fraction} plus test_fraction {self.test_fraction} leaves "
                "no tiles for training; keep the sum below 1"
            )
        return self


class ReportOptions(Options):
    """The page about the data."""

    section: ClassVar[str] = "report"
    version: ClassVar[int] = 18

    gallery_tiles: Annotated[int, Field(ge=1, le=500)] = 24
    """Tiles in each gallery."""
    worst_pairs: Annotated[int, Field(ge=1, le=200)] = 20
    """Registered pairs shown on the main page, worst first; the others have linked pages."""
    intense_fraction: Annotated[float | None, Field(ge=0, lt=1)] = None
    """Fraction of strongly stained cells, too few for 3+, above which a slide is scored 2+
    (0 in ASCO/CAP 2018: any such cell; 0.01 suppresses noise); null: this rule is not applied."""
