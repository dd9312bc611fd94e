"""What an image shows, from its colours: which stain, and whether two files are one image."""

import dataclasses
import hashlib
import math

import cv2
import numpy as np
import numpy.typing as npt

from hemera.errors import SlideError
from hemera.imaging.color import Color, optical_density
from hemera.imaging.morphology import coarse
from hemera.imaging.slide import Slide

RGB = npt.NDArray[np.uint8]

HE, IHC = "he", "ihc"
IS_IHC, IS_GRAY = "has no eosin and is IHC by its colours", "is gray and shows no stain"

DENSITY_MIN = 0.15
"""Least sum of the optical densities of red, green and blue of a stained pixel."""
CHROMA_MIN = 0.06
"""Least range of the three fractions of its density: ink, dust and shadows are gray."""
STAINED_MIN = 0.004
PIXELS_MIN = 100
"""Least fraction and number of stained pixels that make evidence."""
EOSIN_MIN, EOSIN_MAX = 0.345, 0.315
"""The 90th percentile of `eosin_excess` is at least the first on H&E, at most the second on IHC."""
MEDIAN_MIN = 0.25
"""Least median of `eosin_excess` on H&E: red ink on IHC covers less than half of the tissue."""

OVERVIEW_PX = 1024
STAIN_MPP = 8.0
"""Stains are identified on an overview of at most the first, or at the second where it is finer."""
SAMPLE_PX = 2_000_000

GRAY_CONTRAST_MIN = 20
"""Least range of the values of an image that is called gray; below it, it is empty."""

EXTENT_MISMATCH_MAX = 0.02
"""Largest relative difference in extent of images that come registered."""

SIDE_PX = 128
"""Both images are compared at this side; what is left of either is finer than 1/32 of it."""
CORRELATION_MIN = 0.7
DIFFERENCE_MAX = 10.0
"""The same image: least correlation of the details, largest mean difference of the colours.

Recompression (JPEG of quality 30) and resizing leave a correlation of .73 or more; consecutive
sections reach .3. The colours exclude one section that was stained twice."""


def eosin_excess(rgb: RGB, mpp: float, background: Color) -> tuple[npt.NDArray[np.float32], int]:
    """Return g - r / 2 of every stained pixel at `COARSE_MPP`, (N,), and the number of all pixels.

    r and g are the fractions of a pixel's optical density in red and green. Haematoxylin absorbs
    red as strongly as green and DAB absorbs blue most: on IHC, both and their mixtures stay near
    0.2. Eosin absorbs hardly any red: it reaches 0.4 to 0.6, also where it is brownish.
    """
    small = coarse(rgb, mpp).reshape(1, -1, 3)
    density = optical_density(small, background)[0]
    total = density.sum(axis=1)
    fractions = density / np.maximum(total, DENSITY_MIN)[:, None]
    stained = (total >= DENSITY_MIN) & (np.ptp(fractions, axis=1) >= CHROMA_MIN)
    return np.asarray(fractions[stained, 1] - fractions[stained, 0] / 2, np.float32), len(density)


def identify_stain(rgb: RGB, mpp: float, background: Color | None) -> str | None:
    """Return whether an image is `HE` or `IHC` with DAB, None where its colours do not show it.

    Args:
        rgb: (H, W, 3) RGB, 8 um/px or finer.
        mpp: its resolution.
        background: the colour of its background; None: all of it is tissue. The absorption beyond
            that of the palest tissue is then evaluated, and IHC must also be IHC relative to a
            gray as bright, because the palest tissue may be eosin.
    """
    if background is not None:
        return _stain(*eosin_excess(rgb, mpp, background))
    pixels = coarse(rgb, mpp).reshape(-1, 3)
    red, green, blue = (round(float(value)) for value in np.percentile(pixels, 99, axis=0))
    found = _stain(*eosin_excess(rgb, mpp, (red, green, blue)))
    lightest = max(red, green, blue)
    if found == IHC and _stain(*eosin_excess(rgb, mpp, (lightest,) * 3)) != IHC:
        return None
    return found


def _stain(excess: npt.NDArray[np.float32], pixels: int) -> str | None:
    """Return the stain with such values of `eosin_excess`, as `identify_stain`."""
    if len(excess) < max(PIXELS_MIN, STAINED_MIN * pixels):
        return None
    median, high = np.percentile(excess, (50, 90))
    if high >= EOSIN_MIN and median >= MEDIAN_MIN:
        return HE
    return IHC if high <= EOSIN_MAX else None


@dataclasses.dataclass(frozen=True, eq=False)
class Identity:
    """What is compared of an image.

    Attributes:
        stain: of `identify_stain`.
        digest: SHA-256 of its size and of the pixels of an overview, equal for copies of a file.
        small: (SIDE_PX, SIDE_PX, 3) RGB, from edge to edge.
    """

    name: str
    stain: str | None
    digest: str
    small: RGB
    size_px: tuple[int, int]
    mpp: float

    @property
    def gray(self) -> bool:
        """Whether something is to be seen, and nothing of it has a colour."""
        return not np.ptp(self.small, axis=2).any() and int(np.ptp(self.small)) > GRAY_CONTRAST_MIN

    @property
    def coarse_bits(self) -> int:
        """64 bits of its coarsest waves, of which copies of an image differ in few."""
        gray = cv2.cvtColor(self.small, cv2.COLOR_RGB2GRAY)
        gray = cv2.resize(gray, (32, 32), interpolation=cv2.INTER_AREA)
        waves = cv2.dct(gray.astype(np.float32))[:8, :8].ravel()
        return int.from_bytes(np.packbits(waves > np.median(waves[1:])).tobytes())


def identify(slide: Slide, view: RGB | None = None) -> Identity:
    """Identify a slide or image; `view` is one of all of it at about `STAIN_MPP`, where known."""
    overview, (mpp, _) = slide.overview(side_px=OVERVIEW_PX)
    found = slide.measured_background
    digest = hashlib.sha256(repr(slide.size_px).encode() + overview.tobytes()).hexdigest()
    small = cv2.resize(overview, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA)
    if mpp > STAIN_MPP:
        overview = slide.overview(mpp=STAIN_MPP)[0] if view is None else view
        mpp = slide.size_px[0] * slide.mpp / overview.shape[1]
    step = math.ceil(math.sqrt(overview[..., 0].size / SAMPLE_PX)) if mpp > 2 else 1
    stain = identify_stain(
        np.ascontiguousarray(overview[::step, ::step]), mpp, found.color if found.measured else None
    )
    return Identity(
        slide.path.name, stain, digest, np.asarray(small, np.uint8), slide.size_px, slide.mpp
    )


def check_he(image: Identity) -> None:
    """Raise SlideError where a slide that is predicted from is not one of H&E by its colours."""
    why = IS_GRAY if image.gray else IS_IHC if image.stain == IHC else None
    if why is not None:
        raise SlideError(f"{image.name}: {why}; give the H&E slide, or --any-stain if it is one")


def contradictions(
    he: Identity, her2: Identity | None, *, registered: bool = False
) -> dict[str, tuple[str, str]]:
    """Return what excludes that two images are an H&E and a HER2 image of a pair.

    Args:
        her2: None for H&E alone.
        registered: whether both are declared to have the same position, and so the same extent.

    Returns:
        By column, `he` and `her2`: `refuse` for the same image twice or another extent, or
        `wrong_stain`, and why.
    """
    reason = None
    if her2 is None:
        pass
    elif is_same_image(he, her2):
        reason = f"{he.name}, {her2.name}: the same image twice; correct he or her2 in the sheet"
    elif registered:
        reason = _extent_mismatch(he, her2)
    if reason is not None:
        return {"he": ("refuse", reason), "her2": ("refuse", reason)}
    wrong = []
    if he.stain == IHC:
        wrong.append(("he", f"he {he.name} {IS_IHC}"))
    if her2 is not None and her2.stain == HE:
        wrong.append(("her2", f"her2 {her2.name} has eosin and is H&E by its colours"))
    remedy = "swap he and her2" if len(wrong) == 2 else "correct the paths"
    gray = [
        (column, f"{column} {image.name} {IS_GRAY}")
        for column, image in (("he", he), ("her2", her2))
        if image is not None and image.gray
    ]
    if gray:
        wrong, remedy = gray, "give the image in colour"
    found = " and ".join(what for _, what in wrong)
    reason = f"{found}; {remedy}, or set verdict to accept in the sheet"
    return {column: ("wrong_stain", reason) for column, _ in wrong}


def _extent_mismatch(he: Identity, her2: Identity) -> str | None:
    extents = [[side * image.mpp for side in image.size_px] for image in (he, her2)]
    if all(abs(a - b) <= EXTENT_MISMATCH_MAX * max(a, b) for a, b in zip(*extents, strict=True)):
        return None
    shown = " and ".join(f"{width:.0f} x {height:.0f}" for width, height in extents)
    return (
        f"{he.name}, {her2.name}: {shown} um, yet registered; at most {EXTENT_MISMATCH_MAX:.0%} "
        "apart: correct he_mpp, her2_mpp or registered in the sheet"
    )


def is_same_image(first: Identity, second: Identity) -> bool:
    """Return whether two images differ in compression or size only."""
    if first.digest == second.digest:
        return True
    ratios = [width / height for width, height in (first.size_px, second.size_px)]
    if abs(math.log(ratios[0] / ratios[1])) > 0.02:
        return False
    small = [image.small.astype(np.float32) for image in (first, second)]
    if np.abs(small[0] - small[1]).mean() > DIFFERENCE_MAX:
        return False
    details = [(image - cv2.GaussianBlur(image, (0, 0), SIDE_PX / 32)).ravel() for image in small]
    norm = math.sqrt(float(details[0] @ details[0]) * float(details[1] @ details[1]))
    return norm > 0 and float(details[0] @ details[1]) >= CORRELATION_MIN * norm
