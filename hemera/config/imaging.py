"""Options of the stages that read slides: describe and tile."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from hemera.config.base import Fraction, Options, paper


class DescribeOptions(Options):
    """Headers, resolution, thumbnails and tissue outlines."""

    section: ClassVar[str] = "describe"
    version: ClassVar[int] = 8

    reader: Literal["auto", "tiff", "openslide", "tiffslide", "wsidicom", "image"] = "auto"
    """Library that reads the slides, in every stage; auto: direct reading of tiled TIFF where
    possible, else OpenSlide, else TiffSlide."""
    allow_missing: bool = False
    """Leave out pairs whose images do not exist, with this reason in tables and report; false: the
    workflow does not begin without them."""
    digest: Literal["sampled", "whole"] = "sampled"
    """What the digest of an image file covers, by which later stages find that it has changed: its
    size and 4 MiB of it, or the whole file."""
    tissue_mpp: Annotated[float, Field(gt=0, le=64)] = 8.0
    """Resolution at which tissue is segmented, um per pixel."""
    he_saturation_min: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Lower clip of Otsu's threshold on the HSV saturation of H&E, 0 to 1."""
    he_saturation_max: Annotated[float, Field(ge=0, lt=1)] = 0.10
    """Upper clip of Otsu's threshold on the HSV saturation of H&E, 0 to 1; a higher threshold
    separates dark tissue from pale tissue."""
    ihc_density_min: Annotated[float, Field(ge=0, le=0.5)] = 0.03
    """Lower clip of Otsu's threshold on the optical density of IHC above the background."""
    ihc_density_max: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    """Upper clip of Otsu's threshold on the optical density of IHC above the background."""

    @model_validator(mode="after")
    def _ranges_are_not_empty(self) -> Self:
        for name in ("he_saturation", "ihc_density"):
            low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
            if low > high:
                raise ValueError(f"{name}_min: {low} is above {name}_max {high}; lower it")
        return self


class TileOptions(Options):
    """Tiles of both stains, measured in the pass that reads them."""

    section: ClassVar[str] = "tile"
    version: ClassVar[int] = 12

    size_px: Annotated[int, Field(ge=32, le=4096), paper("512")] = 512
    """Side of a tile, px."""
    mpp: Annotated[float | None, Field(gt=0, le=20), paper("not stated")] = None
    """Resolution of the tiles, um per pixel; null: the native resolution of the H&E image."""
    stride_px: Annotated[int | None, Field(ge=16, le=4096)] = None
    """Distance between the origins of adjacent tiles, px; null: size_px, without overlap."""
    upsample: bool = False
    """Allow a tile resolution finer than the native resolution of an image."""
    tissue_floor: Fraction = 0.05
    """Tiles whose tissue fraction in the outline is below this are neither read nor stored."""
    artefact_max: Fraction = 0.5
    """Tiles of which the outline of artefacts on H&E, or on HER2, covers more than this are neither
    read nor stored."""
    codec: Literal["jpeg", "png"] = "jpeg"
    """Image format of the tiles; png is lossless."""
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    """JPEG quality of the tiles; chroma is not subsampled."""
    copy_stored: bool = True
    """Copy the JPEG bytes of a slide without recompression where a tile coincides with one stored
    tile of the file."""
    saturation_min: Annotated[float, Field(ge=0, lt=1)] = 0.06
    """Lowest HSV saturation of a tissue pixel in an H&E tile, 0 to 1."""
    density_min: Annotated[float, Field(ge=0, le=0.5)] = 0.03
    """Lowest optical density above the background of a tissue pixel in an IHC tile."""
    bad_tiles_max: Fraction = 0.10
    """Largest fraction of unreadable tiles; a pair with more is refused."""
