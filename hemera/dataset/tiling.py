"""Tiles of a pair of slides: positions, reading of both stains, measurement and encoding."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import shapely

from hemera.config import TileOptions
from hemera.dataset.excluded import pack
from hemera.imaging.artefacts import find_artefacts, fractions
from hemera.imaging.background import fill_pixels
from hemera.imaging.blur import blurred_cells
from hemera.imaging.codecs import encode
from hemera.imaging.color import DENSITY_STEP, density, saturation
from hemera.imaging.geometry import grid_positions, polygon_fraction, same_mpp, tissue_fraction
from hemera.imaging.morphology import COARSE_MPP
from hemera.imaging.quality import histogram_similarity, sharpness
from hemera.imaging.resample import halved
from hemera.imaging.slide import Slide
from hemera.registration.alignment import match_in_place, structure
from hemera.registration.displacement import Displacement, folding_fraction_in, map_points
from hemera.registration.warping import read_displaced
from hemera.sheet import Pair

RGB = npt.NDArray[np.uint8]
Corners = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]

UPSAMPLING_MAX = {"he": 0.01, "her2": 0.10}
"""By how much the tiles' resolution may be finer than an image's own: scanners differ by less."""

ROI_FRACTION_MIN = 0.5
"""The fraction of a tile in the region of interest, at least."""

OUTLINE_POINTS = 12
"""Points along each side of a tile at which the artefacts of the HER2 slide are looked up."""


class NotTiled(Exception):
    """A pair that yields no tiles: a state of `tables.PAIRS`, and the reason as message."""

    def __init__(self, state: str, reason: str) -> None:
        super().__init__(reason)
        self.state = state


@dataclasses.dataclass
class Outcome:
    """A row of `tables.PAIRS`."""

    pair: str
    registration: str
    state: str = "tiled"
    reason: str | None = None
    tiles_grid: int = 0
    tiles_tissue: int = 0
    tiles_artefact: int = 0
    tiles_unreadable: int = 0
    tiles_written: int = 0


@dataclasses.dataclass(frozen=True)
class Tile:
    """One tile: its row of `tables.TILE`, and both images encoded; of H&E alone without HER2."""

    row: dict[str, Any]
    he: bytes
    her2: bytes | None


@dataclasses.dataclass(frozen=True)
class Tiling:
    """What all tiles of a pair have in common; no displacement where it comes registered.

    H&E alone has no HER2 slide.

    Tissue has at least `saturation_min`, 0 to 1, on H&E, and `density_min` on HER2;
    `tissue_density` is `imaging.artefacts.typical_density` of both. `artefacts` are the artefacts
    of both slides from edge to edge that the sheet gives, (H, W) numbers of `KINDS`; None: they
    are detected in each tile.
    """

    pair: Pair
    he: Slide
    her2: Slide | None
    displacement: Displacement | None
    saturation_min: float
    density_min: float
    tissue_density: tuple[float, float]
    artefacts: tuple[Bytes | None, Bytes | None]
    options: TileOptions

    @property
    def _her2(self) -> Slide:
        """The HER2 slide, where there is one."""
        assert self.her2 is not None
        return self.her2

    @property
    def _slides(self) -> tuple[tuple[str, Slide], ...]:
        """The slides with the names of their stains: H&E alone, or both."""
        he = ("he", self.he)
        return (he,) if self.her2 is None else (he, ("her2", self.her2))

    @functools.cached_property
    def mpp(self) -> float:
        """Resolution of the tiles, um/px; where a level of H&E nearly has it, that of the level."""
        wanted = self.options.mpp or self.he.mpp
        return next((mpp for mpp in self.he.level_mpps if same_mpp(wanted, mpp)), wanted)

    @property
    def side_px(self) -> float:
        """Side of a tile on level 0 of H&E."""
        return self.options.size_px * self.mpp / self.he.mpp

    @property
    def _on_one_grid(self) -> bool:
        """Whether both images, if they come registered, match pixel by pixel."""
        return same_mpp(self.he.mpp, self._her2.mpp)

    @property
    def _her2_ratio(self) -> float:
        """Pixels of HER2 per pixel of H&E where it comes registered."""
        return 1.0 if self._on_one_grid else self.he.mpp / self._her2.mpp

    @property
    def _her2_mpp(self) -> float:
        """Resolution to read HER2 with where it comes registered."""
        return self.mpp * self._her2.mpp / self.he.mpp if self._on_one_grid else self.mpp

    def positions(
        self,
        outline: Mask,
        artefacts: tuple[Bytes, Bytes],
        roi: Sequence[shapely.Polygon] | None,
        to: Outcome,
    ) -> Corners:
        """Return the positions of tiles with tissue, inside the region of interest.

        Args:
            outline: (H, W), the tissue of H&E from edge to edge.
            artefacts: of H&E and of HER2 from edge to edge, (H, W) each, 0 without any.
            roi: polygons on H&E, level-0 pixels; None: the whole slide.
            to: where the numbers of positions are noted.

        Returns:
            (N, 2) top-left corners (x, y) on level 0 of H&E, at least one; otherwise NotTiled.
        """
        name, size, side = self.he.path.name, self.he.size_px, self.side_px
        self._check_mpp()
        if min(size) + 1e-6 < side:
            raise NotTiled(
                "refused",
                f"{name}: {size[0]} x {size[1]} px at {self.he.mpp:.4g} um/px is smaller than a "
                f"tile of {side:.0f} px; lower tile.size_px",
            )
        stride = (self.options.stride_px or self.options.size_px) * self.mpp / self.he.mpp
        corners = grid_positions(*size, side, stride)
        to.tiles_grid = len(corners)
        floor = max(self.options.tissue_floor, 1e-9)
        corners = corners[tissue_fraction(outline, size, corners, side) >= floor]
        to.tiles_tissue = len(corners)
        if not len(corners):
            raise NotTiled(
                "no_tissue",
                f"{name}: none of {to.tiles_grid} positions has {self.options.tissue_floor:.0%} "
                "tissue; lower tile.tissue_floor",
            )
        covered = tissue_fraction(artefacts[0] > 0, size, corners, side) > self.options.artefact_max
        covered |= self._her2_covered(artefacts[1], corners) > self.options.artefact_max
        corners, to.tiles_artefact = corners[~covered], int(covered.sum())
        if not len(corners):
            raise NotTiled(
                "refused",
                f"{name}: artefacts cover more than {self.options.artefact_max:.0%} of each of "
                f"{to.tiles_tissue} positions with tissue; see the overview in the report, or "
                "raise tile.artefact_max, up to 1",
            )
        if roi is not None:
            corners = corners[polygon_fraction(roi, corners, side) >= ROI_FRACTION_MIN]
        if not len(corners):
            raise NotTiled(
                "no_tissue",
                f"roi: none of {to.tiles_tissue} positions with tissue is inside; draw it on "
                "level-0 pixels of the H&E slide",
            )
        return corners

    def _check_mpp(self) -> None:
        for stain, slide in self._slides:
            too_coarse = slide.mpp > self.mpp * (1 + UPSAMPLING_MAX[stain])
            if too_coarse and not self.options.upsample:
                raise NotTiled(
                    "refused",
                    f"{slide.path.name}: {slide.mpp:.4g} um/px is coarser than the tiles' "
                    f"{self.mpp:.4g}; set tile.mpp to "
                    f"{max(own.mpp for _, own in self._slides):.4g} or "
                    "more, or tile.upsample: true",
                )

    def tile(self, corner: npt.NDArray[np.int64]) -> Tile:
        """Read, measure and encode the tile at a position on level 0 of H&E."""
        x, y = corner.tolist()
        size, options = self.options.size_px, self.options
        he = self.he.read(x, y, size, size, self.mpp)
        shown_he = _without_fill(he, self.he)
        row: dict[str, Any] = {
            "tile": f"{self.pair.pair}_{x:06d}_{y:06d}",
            "pair": self.pair.pair,
            "x_px": x,
            "y_px": y,
            "size_px": size,
            "mpp": self.mpp,
            "he_mpp": self.he.mpp,
        }
        copied = options.codec == "jpeg" and options.copy_stored
        stored_he = None
        if copied and shown_he is None:
            stored_he = self.he.stored_jpeg(x, y, size, size, self.mpp)
        encoded_he = stored_he or encode(he, options.codec, options.quality)
        if self.her2 is None:
            row |= {**self._measure(he, None), **self._artefacts(x, y, he, None, (shown_he, None))}
            return Tile(row, encoded_he, None)
        her2, coverage, (her2_x, her2_y), covered = self._read_her2(x, y)
        shown_her2 = _without_fill(her2, self._her2)
        if shown_her2 is not None:
            covered = shown_her2 if covered is None else covered & shown_her2
        row |= {
            "her2_x_px": her2_x,
            "her2_y_px": her2_y,
            "her2_mpp": self._her2.mpp,
            "her2_coverage_fraction": coverage,
            "folding_fraction": self._folding(x, y),
            **self._measure(he, her2),
            **self._artefacts(x, y, he, her2, (shown_he, covered)),
        }
        stored_her2 = None
        # HER2 is on the grid of H&E where both come registered at one resolution.
        on_grid = self.displacement is None and not self.pair.mirrored and self._on_one_grid
        if copied and shown_her2 is None and on_grid:
            stored_her2 = self._her2.stored_jpeg(x, y, size, size, self._her2_mpp)
        return Tile(
            row,
            encoded_he,
            stored_her2 or encode(her2, options.codec, options.quality),
        )

    def _measure(self, he: RGB, her2: RGB | None) -> dict[str, Any]:
        """Measure tissue, sharpness and similarity; colours at half the resolution, for speed."""
        small_he = halved(he)
        tissue = saturation(small_he) > self.saturation_min * 255
        row: dict[str, Any] = {
            "tissue_fraction": cv2.countNonZero(tissue.view(np.uint8)) / tissue.size,
            "he_sharpness": sharpness(he, self.mpp),
            "he_background": list(self.he.background),
        }
        if her2 is None:
            return row
        small_her2 = halved(her2)
        absorbing = density(small_her2, self._her2.background) > self.density_min / DENSITY_STEP
        return row | {
            "her2_tissue_fraction": cv2.countNonZero(absorbing.view(np.uint8)) / tissue.size,
            "her2_sharpness": sharpness(her2, self.mpp),
            "histogram_similarity": histogram_similarity(
                small_he, small_her2, self.he.background, self._her2.background
            ),
            "alignment_margin": self._alignment_margin(small_he, small_her2),
            "her2_background": list(self._her2.background),
        }

    def _alignment_margin(self, he: RGB, her2: RGB) -> float | None:
        """Return the evidence of alignment in a tile, at half its resolution; None: registered."""
        if self.displacement is not None:
            return None
        found = match_in_place(
            structure(he, 2 * self.mpp, self.he.background),
            structure(her2, 2 * self.mpp, self._her2.background),
        )
        return None if found is None else found[1]

    def _artefacts(
        self,
        x: int,
        y: int,
        he: RGB,
        her2: RGB | None,
        covered: tuple[Mask | None, Mask | None],
    ) -> dict[str, Any]:
        """Return the columns of artefacts; `covered` are the pixels where there is an image."""
        row: dict[str, Any] = {}
        numbers: list[Bytes | None] = []
        sides = zip(self._slides, (he, her2), strict=False)
        for k, ((stain, slide), rgb) in enumerate(sides):
            assert rgb is not None
            if self.artefacts[k] is None:
                typical = self.tissue_density[k]
                kinds = find_artefacts(rgb, self.mpp, slide.background, typical)
            else:
                kinds = self._given_artefacts(k, x, y)
            row |= {f"{stain}_{kind}_fraction": part for kind, part in fractions(kinds).items()}
            blur = float(blurred_cells(rgb, self.mpp, stain).mean())
            row[f"{stain}_blur_fraction"] = max(blur, row[f"{stain}_blur_fraction"])
            numbers.append(kinds)
        of_her2 = numbers[1] if her2 is not None else None
        return row | {"artefacts": pack(numbers[0], of_her2, covered, he.shape[:2], self.mpp)}

    def _her2_covered(self, artefacts: Bytes, corners: Corners) -> npt.NDArray[np.float64]:
        """Return the fraction of each tile that artefacts of the HER2 slide cover, (N,)."""
        if not artefacts.any():
            return np.zeros(len(corners))
        points = self._points(OUTLINE_POINTS) + corners[:, None, None]
        return np.asarray((self._at(1, artefacts, points) > 0).mean(axis=(1, 2)))

    def _given_artefacts(self, k: int, x: int, y: int) -> Bytes | None:
        """Return the artefacts that the sheet gives for a tile of a stain, as `find_artefacts`."""
        given = self.artefacts[k]
        assert given is not None
        count = max(1, round(self.options.size_px * min(self.mpp / COARSE_MPP, 1.0)))
        kinds = self._at(k, given, self._points(count) + np.array([x, y]))
        return kinds if kinds.any() else None

    def _points(self, count: int) -> npt.NDArray[np.float64]:
        """Return points (x, y) over a tile, from its corner, on level 0 of H&E, (n, n, 2)."""
        centres = (np.arange(count) + 0.5) / count * self.side_px
        return np.stack(np.meshgrid(centres, centres), axis=-1)

    def _at(self, k: int, image: Bytes, points: npt.NDArray[np.float64]) -> Bytes:
        """Return an image of a slide, from edge to edge, at points (..., 2) on level 0 of H&E.

        0 where the slide does not cover the point; `k` is 0 for H&E, 1 for HER2.
        """
        width, height = self.he.size_px if k == 0 else self._her2.size_px
        if k and self.displacement is not None:
            mapped = map_points(self.displacement, (points * self.he.mpp).reshape(-1, 2))
            points = mapped.reshape(points.shape) / self._her2.mpp
        elif k:
            points = points * self._her2_ratio
            if self.pair.mirrored:
                points[..., 0] = width - points[..., 0]
        inside = np.asarray(((points >= 0) & (points < (width, height))).all(axis=-1))
        places = np.where(inside[..., None], points, 0) * image.shape[::-1] / (width, height)
        columns, rows = np.moveaxis(places.astype(np.int64), -1, 0)
        return np.where(inside, image[rows, columns], np.uint8(0))

    def _folding(self, x: int, y: int) -> float:
        if self.displacement is None:
            return 0.0
        left, top = x * self.he.mpp, y * self.he.mpp
        side = self.options.size_px * self.mpp
        box = left, top, left + side, top + side
        mirrored = self.displacement.affine.determinant < 0
        return folding_fraction_in(self.displacement, box, mirrored=mirrored)

    def _read_her2(self, x: int, y: int) -> tuple[RGB, float, tuple[float, float], Mask | None]:
        """Return HER2 for the tile at (x, y), the fraction covered, and the corner on HER2.

        The last are the covered pixels (H, W), None where HER2 covers all of them.
        """
        her2, size, mpp = self._her2, self.options.size_px, self.mpp
        if self.displacement is not None:
            x_um, y_um = x * self.he.mpp, y * self.he.mpp
            return read_displaced(her2, self.displacement, x_um, y_um, size_px=size, mpp=mpp)
        ratio = self._her2_ratio
        side = self.side_px * ratio
        left, top = x * ratio, y * ratio
        corner = left, top
        if self.pair.mirrored:
            left = her2.size_px[0] - left - side
            corner = left + side, top
        pixels = her2.read(left, top, size, size, self._her2_mpp)
        if self.pair.mirrored:
            pixels = np.ascontiguousarray(pixels[:, ::-1])
        inside = [
            max(0.0, min(low + side, length) - max(low, 0.0)) / side
            for low, length in ((left, her2.size_px[0]), (top, her2.size_px[1]))
        ]
        coverage = min(1.0, inside[0] * inside[1])
        if coverage == 1:
            return pixels, coverage, corner, None
        centres = (np.arange(size) + 0.5) * side / size
        columns, rows = (
            (low + centres >= 0) & (low + centres < length)
            for low, length in ((left, her2.size_px[0]), (top, her2.size_px[1]))
        )
        covered = rows[:, None] & (columns[::-1] if self.pair.mirrored else columns)
        return pixels, coverage, corner, covered


def _without_fill(rgb: RGB, slide: Slide) -> Mask | None:
    """Give the fill of a tile the brightness of the background; return the other pixels (H, W).

    None where there is no fill.
    """
    found = fill_pixels(rgb, slide.measured_background.fill)
    if found is None:
        return None
    # Neutral, because a background that is estimated from tissue may have its colour.
    rgb[found] = max(slide.background)
    return ~found
