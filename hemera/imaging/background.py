"""Colour of the background: empty places of a slide or of a ready-made image.

It is measured once per image, in `describe`; the tables of tiles contain it. Densities of masks,
similarity and artefacts are relative to it.
"""

import dataclasses
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import numpy.typing as npt

from hemera.imaging.color import WHITE, Color
from hemera.imaging.morphology import COARSE_MPP, at_mpp, coarse

RGB = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

# Background is at most this fraction darker than the brightest pixels, and neighbouring pixels at
# `COARSE_MPP` differ by at most the second fraction: stroma is textured, background is not.
_DARKER_MAX = 0.05
_TEXTURE_MAX = 0.04
# Smallest fraction of the pixels that makes a background.
_FRACTION_MIN = 0.01
# Without background: resolution, um/px, and percentile of each channel that replace it. On windows
# of tissue from 11 real images whose background is known, the mean error is 0.01 to 0.02 in
# density; the 99th percentile at `COARSE_MPP` errs by 0.02 to 0.10.
_GAPS_MPP = 1.0
_GAPS_PERCENTILE = 99.9
# Fill: smallest place of exactly one colour, px; largest difference in gray values of what belongs
# to it; width, px, of the edge that JPEG or interpolation changes, two of JPEG's blocks, and the
# fraction of all further inside that has exactly one colour.
_FILL_AREA_PX = 16
_FILL_CHANGED = 12
_FILL_EDGE_PX = 16
_FILL_EXACT = 0.98
# Smallest area of dark fill, px, that of four blocks of JPEG: one may be of one colour in tissue.
_FILL_DARK_PX = 256
# Distance from fill of what the background is measured on, um and px; how much brighter fill is
# than gaps, and the largest difference of a background, fractions.
_FILL_AWAY_UM = 8.0
_FILL_AWAY_PX = 2.0
_FILL_BRIGHTER = 0.03
_FILL_DIFFERENCE = 0.05
# Smallest fraction of its convex hull that a convex region covers.
_FILL_CONVEX = 0.97
# Width of the edge of fill in a tile, px, one block of JPEG.
_FILL_BLOCK_PX = 8

_SQUARE = np.ones((3, 3), np.uint8)

BRIGHTEST_MIN = 100
"""Smallest value of the brightest channel of a background. A darker image is no bright field: the
least that is found on 4,028 windows of 60 um of real tissue, with and without background, is 171.
"""


@dataclasses.dataclass(frozen=True)
class Area:
    """A place at the border of an image: its only colour, and its pixels (H, W)."""

    color: Color
    pixels: Mask


@dataclasses.dataclass(frozen=True)
class Background:
    """Colour of the background (r, g, b), 0 to 255, and whether there is background to measure.

    `fill` are the colours of places without image, as of the corners of an image that a program has
    rotated.
    """

    color: Color
    measured: bool
    fill: tuple[Color, ...] = ()


def measure_background(
    images: Sequence[RGB], mpp: float, constant: Sequence[Sequence[Area]] = ()
) -> Background:
    """Measure the background of images of one slide: the brightest pixels without texture.

    At `COARSE_MPP`, where noise and the bright halos of sharpened edges are averaged, a pixel is
    background when it is nearly as bright as the brightest ones and as its neighbours; the colour
    is the median of the brighter quarter of them, because pale tissue may be among the rest.
    Where fewer than 1 % of the pixels are background, all of the images is tissue: the colour is
    then the 99.9th percentile of every channel at 1 um/px, of the gaps between cells. Without
    images it is white.

    Background has noise: a place of exactly one colour is fill, or background brighter than a
    camera can measure. In the latter case the gaps in the rest of the image are as bright. Such a
    colour is fill if it is more than 3 % brighter than these gaps, and the rest contains background
    or is convex, as a rotated image is and tissue is not; or if it is more than 5 % darker than the
    background of the rest.

    Args:
        images: (H, W, 3) uint8 RGB each, of any sizes.
        mpp: their resolution, um/px.
        constant: `constant_areas` of each image; nothing given: there are none.
    """
    if not images:
        return Background(WHITE, measured=False)
    areas = list(constant) or [()] * len(images)
    used = [_away(image, own, mpp) for image, own in zip(images, areas, strict=True)]
    if all(mask.all() for mask in used):
        return _measured(images, mpp, used)
    if _inside(used, mpp, COARSE_MPP).mean() < _FRACTION_MIN:
        return _measured(images, mpp, [np.ones_like(mask) for mask in used])
    rest, gaps = _measured(images, mpp, used), _gaps(images, mpp, used)
    limit = _FILL_DIFFERENCE * np.array(rest.color)
    sizes: dict[Color, int] = {}
    for image, area in ((i, area) for i, own in zip(images, areas, strict=True) for area in own):
        exact = (image[area.pixels] == area.color).all(axis=1).sum()
        sizes[area.color] = sizes.get(area.color, 0) + int(exact)
    may_be_brighter = rest.measured or all(_is_convex(own) for own in areas if own)
    fill = tuple(
        color
        for color in sizes
        if (may_be_brighter and (color > gaps * (1 + _FILL_BRIGHTER)).any())
        or (sizes[color] >= _FILL_DARK_PX and (color < rest.color - limit).any())
    )
    others = np.array([color for color in sizes if color not in fill])
    if len(others) and not (rest.measured and (np.abs(others - rest.color) <= limit).all()):
        # What is not fill is all the background that there is.
        areas = [[area for area in own if area.color in fill] for own in areas]
        used = [_away(image, own, mpp) for image, own in zip(images, areas, strict=True)]
        rest = _measured(images, mpp, used)
    return dataclasses.replace(rest, fill=fill)


def constant_areas(rgb: RGB, confirmed: Callable[[float, float], bool] | None = None) -> list[Area]:
    """Return the places at the border of an image that are of exactly one colour each.

    Their edges are not, where the image was compressed; 16 px inside they are.

    Args:
        rgb: (H, W, 3) uint8 RGB.
        confirmed: whether the original is of one colour around (x, y), fractions of its width and
            height; for an overview, which averages noise.
    """
    same = (cv2.dilate(rgb, _SQUARE) == cv2.erode(rgb, _SQUARE)).all(axis=2)
    border = np.ones(same.shape, np.bool_)
    border[1:-1, 1:-1] = False
    if not (same & border).any():
        return []
    _, pieces, boxes, _ = cv2.connectedComponentsWithStats(same.view(np.uint8), connectivity=4)
    numbers = np.unique(pieces[border & same])
    sizes = boxes[numbers, cv2.CC_STAT_AREA]
    found, seen = [], np.zeros(same.shape, np.bool_)
    for k in numbers[np.argsort(-sizes, kind="stable")][: int((sizes >= _FILL_AREA_PX).sum())]:
        y, x = np.unravel_index(int((pieces == k).argmax()), same.shape)
        if seen[y, x]:
            continue
        red, green, blue = rgb[y, x].tolist()
        whole = _connected(rgb, (red, green, blue), (int(y), int(x)))
        seen |= whole
        depth = _distance(~whole)
        inside = same[whole & (depth > _FILL_EDGE_PX)]
        if len(inside) and inside.mean() < _FILL_EXACT:
            continue
        if confirmed is not None:
            y, x = np.unravel_index(int(_framed(whole).argmax()), same.shape)
            if not confirmed((x + 0.5) / same.shape[1], (y + 0.5) / same.shape[0]):
                continue
        found.append(Area((red, green, blue), whole))
    return found


def fill_pixels(rgb: RGB, fill: Sequence[Color]) -> Mask | None:
    """Return the places (H, W) of a tile (H, W, 3) that are fill of some colours; None: nowhere.

    With the 8 pixels beside them, which compression or interpolation may have changed.
    """
    if not fill:
        return None
    areas = [area for area in constant_areas(rgb) if area.color in fill]
    if not areas:
        return None
    return _distance(np.any([area.pixels for area in areas], axis=0)) <= _FILL_BLOCK_PX


def _connected(rgb: RGB, color: Color, at: tuple[int, int]) -> Mask:
    """Return the pixels (H, W) of about a colour that are connected to one of them, (y, x)."""
    low, high = (np.clip(np.array(color) + k * _FILL_CHANGED, 0, 255) for k in (-1, 1))
    _, pieces = cv2.connectedComponents(cv2.inRange(rgb, low, high), connectivity=4)
    return np.asarray(pieces == pieces[at])


def _framed(mask: Mask) -> npt.NDArray[np.float32]:
    """Return how far inside a mask (H, W) its pixels are, where the border is an edge too."""
    framed = cv2.distanceTransform(np.pad(mask, 1).view(np.uint8), cv2.DIST_L2, 5)
    return np.asarray(framed[1:-1, 1:-1], np.float32)


def _distance(mask: Mask) -> npt.NDArray[np.float32]:
    """Return the distance to the nearest pixel of a mask (H, W), px; infinite without any."""
    if not mask.any():
        return np.full(mask.shape, np.inf, np.float32)
    return np.asarray(cv2.distanceTransform((~mask).view(np.uint8), cv2.DIST_L2, 5), np.float32)


def _away(rgb: RGB, areas: Sequence[Area], mpp: float) -> Mask:
    """Return the pixels (H, W) of an image that are neither in some areas nor near them."""
    if not areas:
        return np.ones(rgb.shape[:2], np.bool_)
    inside = np.any([area.pixels for area in areas], axis=0)
    return _distance(inside) > max(_FILL_AWAY_UM / mpp, _FILL_AWAY_PX)


def _is_convex(areas: Sequence[Area]) -> bool:
    """Return whether the largest piece of the rest of an image is convex."""
    rest = ~np.any([area.pixels for area in areas], axis=0)
    _, pieces, boxes, _ = cv2.connectedComponentsWithStats(rest.view(np.uint8))
    if len(boxes) < 2:
        return False
    largest = pieces == 1 + int(boxes[1:, cv2.CC_STAT_AREA].argmax())
    hull = cv2.convexHull(cv2.findNonZero(largest.view(np.uint8)))
    return bool(largest.sum() >= _FILL_CONVEX * cv2.contourArea(hull))


def _measured(images: Sequence[RGB], mpp: float, used: Sequence[Mask]) -> Background:
    """Measure the background on the pixels (H, W) of each image that are used."""
    small = [coarse(image, mpp) for image in images]
    light = [image.mean(axis=2, dtype=np.float32) for image in small]
    inside = _inside(used, mpp, COARSE_MPP)
    brightness = np.concatenate([image.ravel() for image in light])
    top = np.percentile(brightness[inside], 99.5)
    even = np.concatenate([(_range(image) <= _TEXTURE_MAX * top).ravel() for image in light])
    clear = inside & even & (brightness >= (1 - _DARKER_MAX) * top)
    if clear.sum() < _FRACTION_MIN * inside.sum():
        return Background(_rounded(_gaps(images, mpp, used)), measured=False)
    pixels = np.concatenate([image.reshape(-1, 3) for image in small])
    brightest = clear & (brightness >= np.percentile(brightness[clear], 75))
    return Background(_rounded(np.median(pixels[brightest], axis=0)), measured=True)


def _gaps(images: Sequence[RGB], mpp: float, used: Sequence[Mask]) -> npt.NDArray[np.floating]:
    """Return the colour of the gaps between cells, see `measure_background`."""
    pixels = np.concatenate([at_mpp(image, mpp, _GAPS_MPP).reshape(-1, 3) for image in images])
    inside = _inside(used, mpp, _GAPS_MPP)
    return np.asarray(np.percentile(pixels[inside], _GAPS_PERCENTILE, axis=0))


def _inside(used: Sequence[Mask], mpp: float, wanted_mpp: float) -> Mask:
    """Return the pixels of images at another resolution (N,) of which all is used."""
    small = [at_mpp(mask.astype(np.float32), mpp, wanted_mpp) for mask in used]
    return np.concatenate([mask.ravel() > 1 - 1e-3 for mask in small])


def _range(image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the largest difference within 3 x 3 pixels, (H, W)."""
    return np.asarray(cv2.dilate(image, _SQUARE) - cv2.erode(image, _SQUARE), np.float32)


def _rounded(values: npt.NDArray[np.floating]) -> Color:
    red, green, blue = (round(float(value)) for value in values)
    return red, green, blue
