"""Outlines of a mask as polygons with holes, along the edges of its pixels."""

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import shapely

PIXELS_MAX = 100_000_000
"""A larger mask is reduced before its outlines are traced, which takes about 10 bytes per pixel."""


def reduction(size_px: tuple[int, int]) -> int:
    """Return the factor, a power of two, that brings a mask down to `PIXELS_MAX`."""
    factor = 1
    while -(-size_px[0] // factor) * -(-size_px[1] // factor) > PIXELS_MAX:
        factor *= 2
    return factor


def trace(mask: npt.NDArray[np.bool_]) -> list[shapely.Polygon]:
    """Return the regions of a mask (H, W), from the top: pixels connected by their edges.

    Valid polygons in pixels (x, y) along the edges of the pixels, which are the integers, so that
    their area is the number of pixels.
    """
    # cv2.findContours runs through pixel centres. In an image of twice the size plus one in which
    # every pixel is drawn as 3 x 3, it runs through the corners of the pixels, at even numbers.
    height, width = mask.shape
    drawn = np.zeros((2 * height + 1, 2 * width + 1), np.uint8)
    drawn[1::2, 1::2] = mask
    cv2.dilate(drawn, np.ones((3, 3), np.uint8), dst=drawn)
    contours, hierarchy = cv2.findContours(drawn, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    regions: list[shapely.Polygon] = []
    for n, contour in enumerate(contours):
        _, _, child, parent = hierarchy[0, n]
        if parent >= 0:
            continue
        holes = []
        while child >= 0:
            holes.append(_corners(contours[child]))
            child = hierarchy[0, child, 0]
        region = shapely.Polygon(_corners(contour), holes)
        # Regions that meet in a corner alone come as one ring that touches itself.
        regions += [region] if region.is_valid else shapely.make_valid(region).geoms
    return sorted(regions, key=lambda region: (region.bounds[1], region.bounds[0]))


def _corners(contour: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return the corners of a ring of pixels, (N, 2), from its contour in the drawn image."""
    points = contour[:, 0].astype(np.int64)
    following = np.roll(points, -1, axis=0)
    # At a concave corner the contour takes a diagonal from one odd point to the next, past the
    # corner, which is even.
    cut = (points != following).all(axis=1)
    between = np.where(points % 2 == 0, points, following)
    is_corner = (points % 2 == 0).all(axis=1)
    both = np.stack([points, between], axis=1)[np.stack([is_corner, cut], axis=1)]
    corners: npt.NDArray[np.int64] = both // 2
    return corners
