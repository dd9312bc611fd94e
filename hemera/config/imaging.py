"""Options of the stages that read slides: describe and tile."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from hemera.config.base import Options, option
from hemera.sheet import MPP_BOUNDS


class DescribeOptions(Options):
    """Headers, resolution, thumbnails and tissue outlines."""

    section: ClassVar[str] = "describe"

    reader: Literal["auto", "tiff", "openslide", "tiffslide", "image"] = option(
        "auto",
        "library that reads the slides, in every stage; auto: direct reading of tiled TIFF where "
        "possible, else OpenSlide, else TiffSlide",
    )
    thumbnail_side_px: int = option(1024, "longest side of a thumbnail, px", ge=128, le=4096)
    tissue_mpp: float = option(
        8.0, "resolution at which tissue is segmented, um per pixel", gt=0, le=64
    )
    he_saturation_min: float = option(
        0.05, "lower clip of Otsu's threshold on the HSV saturation of H&E, 0 to 1", ge=0, lt=1
    )
    he_saturation_max: float = option(
        0.10,
        "upper clip of Otsu's threshold on the HSV saturation of H&E, 0 to 1; a higher threshold "
        "separates dark tissue from pale tissue",
        ge=0,
        lt=1,
    )
    ihc_density_min: float = option(
        0.03,
        "lower clip of Otsu's threshold on the optical density of IHC above the background",
        ge=0,
        le=0.5,
    )
    ihc_density_max: float = option(
        0.05,
        "upper clip of Otsu's threshold on the optical density of IHC above the background",
        ge=0,
        le=0.5,
    )
    tissue_hole_um2: float = option(
        40_000.0, "largest hole in the tissue outline that is filled, um^2", ge=0
    )
    tissue_speck_um2: float = option(
        40_000.0, "tissue regions below this area are removed, um^2", ge=0
    )
    mpp_min: float = option(
        MPP_BOUNDS[0],
        "finest plausible resolution of a slide, um per pixel; a finer one is an error",
        gt=0,
    )
    mpp_max: float = option(
        MPP_BOUNDS[1],
        "coarsest plausible resolution of a slide, um per pixel; a coarser one is an error",
        gt=0,
    )

    @model_validator(mode="after")
    def _ranges_are_not_empty(self) -> Self:
        if self.mpp_min >= self.mpp_max:
            raise ValueError(
                f"mpp_min: {self.mpp_min} is not below mpp_max {self.mpp_max}; lower it"
            )
        for name in ("he_saturation", "ihc_density"):
            low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
            if low > high:
                raise ValueError(f"{name}_min: {low} is above {name}_max {high}; lower it")
        return self


class TileOptions(Options):
    """Tiles of both stains, measured in the pass that reads them."""

    section: ClassVar[str] = "tile"
    version: ClassVar[int] = 4

    size_px: int = option(512, "side of a tile, px", ge=32, le=4096, paper="512")
    mpp: float | None = option(
        None,
        "resolution of the tiles, um per pixel; none: the native resolution of the H&E image",
        gt=0,
        paper="not stated",
    )
    stride_px: int | None = option(
        None,
        "distance between the origins of adjacent tiles, px; none: size_px, without overlap",
        ge=16,
        le=4096,
    )
    upsample: bool = option(
        False, "allow a tile resolution finer than the native resolution of an image"
    )
    tissue_floor: float = option(
        0.05,
        "tiles whose tissue fraction in the outline is below this are neither read nor stored",
        ge=0,
        le=1,
    )
    codec: Literal["jpeg", "png"] = option("jpeg", "image format of the tiles; png is lossless")
    quality: int = option(95, "JPEG quality of the tiles; chroma is not subsampled", ge=1, le=100)
    copy_stored: bool = option(
        True,
        "copy the JPEG bytes of a slide without recompression where a tile coincides with one "
        "stored tile of the file",
    )
    saturation_min: float = option(
        0.06, "lowest HSV saturation of a tissue pixel in an H&E tile, 0 to 1", ge=0, lt=1
    )
    density_min: float = option(
        0.03,
        "lowest optical density above the background of a tissue pixel in an IHC tile",
        ge=0,
        le=0.5,
    )
    histogram_bins: int = option(
        64, "bins of the haematoxylin histograms that are compared between stains", ge=8, le=256
    )
    bad_tiles_max: float = option(
        0.10, "largest fraction of unreadable tiles; a pair with more is refused", ge=0, le=1
    )
