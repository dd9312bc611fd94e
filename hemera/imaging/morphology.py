"""Windows, holes, pieces and Voronoi regions: morphology of masks and of numbered regions."""

from typing import Any, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
from skimage import measure, segmentation

Image = TypeVar("Image", npt.NDArray[np.uint8], npt.NDArray[np.uint16], npt.NDArray[np.float32])
Labels = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]

# Resolution of what is searched for over wide areas, um/px.
COARSE_MPP = 2.0

DISTANCE_STEPS = 64
"""Distances are rounded to 1 / this px: OpenCV's may differ in their last bit from call to call,
which would decide between equal peaks."""


def coarse(image: Image, mpp: float) -> Image:
    """Return an image (H, W) or (H, W, 3) at `COARSE_MPP`, by area; a coarser one as it is."""
    return at_mpp(image, mpp, COARSE_MPP)


def at_mpp(image: Image, mpp: float, wanted_mpp: float) -> Image:
    """Return an image (H, W) or (H, W, 3) at a resolution, by area; a coarser one as it is."""
    scale = min(mpp / wanted_mpp, 1.0)
    height, width = image.shape[:2]
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), image.dtype)


def smoothed(image: Image, mpp: float, sigma_um: float) -> Image:
    """Return a Gaussian blur; its deviation is half a pixel at least."""
    return np.asarray(cv2.GaussianBlur(image, (0, 0), max(sigma_um / mpp, 0.5)), image.dtype)


def odd_px(length_um: float, mpp: float) -> int:
    """Return the side of a window that has a middle: the odd number of pixels nearest below."""
    return 2 * int(length_um / mpp / 2) + 1


def disc(diameter_um: float, mpp: float) -> npt.NDArray[np.uint8]:
    """Return a disc as a structuring element."""
    side = odd_px(diameter_um, mpp)
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)), np.uint8)


def fill_holes(inside: npt.NDArray[np.uint8], area_px: float) -> None:
    """Fill holes of a mask (H, W) of 0 and 1 up to an area, in place."""
    _, holes = cv2.connectedComponents(1 - inside, connectivity=4)
    # The first is nearly all of the background, and slow to count by number.
    least = 2 if np.count_nonzero(holes == 1) > area_px else 1
    at = np.flatnonzero(holes >= least)
    of = np.asarray(holes).ravel()[at]
    inside.ravel()[at[(np.bincount(of) <= area_px)[of]]] = 1


def distance_inside(inside: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint16]:
    """Return the distance to the edge of a mask (H, W) of 0 and 1, in 1 / `DISTANCE_STEPS` px."""
    steps = np.asarray(cv2.distanceTransform(inside, cv2.DIST_L2, 5), np.float32)
    # Without any background the distance has no bound.
    np.minimum(steps, 65535 / DISTANCE_STEPS, out=steps)
    steps *= DISTANCE_STEPS
    return np.rint(steps, out=steps).astype(np.uint16)


def voronoi_regions(labels: Labels) -> tuple[npt.NDArray[np.float32], Labels]:
    """Return the distance to the nearest numbered region, px, and its number, (H, W) each.

    Without any region: infinite distances and zeros.
    """
    if not labels.any():
        return np.full(labels.shape, np.inf, np.float32), labels
    distance, place = cv2.distanceTransformWithLabels(
        (labels == 0).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    at = np.flatnonzero(labels != 0)
    number = np.zeros(int(place.max()) + 1, np.int32)
    number[place.ravel()[at]] = labels.ravel()[at]
    steps = np.rint(np.multiply(distance, DISTANCE_STEPS, out=distance))
    nearest = np.take(number, np.asarray(place), mode="clip")
    return np.asarray(steps / np.float32(DISTANCE_STEPS), np.float32), nearest


def detached_pixels(labels: Labels, regions: int) -> Mask | None:
    """Return the pixels (H, W) outside the largest piece of their region.

    None where each of the `regions` regions is one piece.
    """
    pieces = measure.label(labels, background=0, connectivity=2)
    count = int(pieces.max(initial=0)) + 1
    if count - 1 == regions:
        return None
    at = np.flatnonzero(labels != 0)
    of, piece = labels.ravel()[at], pieces.ravel()[at]
    number = np.zeros(count, np.int64)
    number[piece] = of
    # The largest piece last: a later assignment overwrites.
    order = np.argsort(np.bincount(piece, minlength=count), kind="stable")
    largest = np.zeros(int(number.max()) + 1, np.int64)
    largest[number[order]] = order
    detached = np.zeros(labels.shape, np.bool_)
    detached.ravel()[at[largest[of] != piece]] = True
    return detached


def watershed(ridge: npt.NDArray[np.uint16], markers: Labels, inside: Mask) -> Labels:
    """Return the watershed of a ridge from markers within a mask, all (H, W).

    At half the resolution, which moves a cut by at most a pixel and takes a quarter of the time.
    """
    height, width = inside.shape
    found = segmentation.watershed(
        -_halved(ridge).astype(np.int32), _halved(markers), mask=_halved(inside)
    )
    whole = np.repeat(np.repeat(found, 2, axis=0), 2, axis=1)[:height, :width]
    return np.where(inside, whole, 0)


def merged(
    labels: npt.NDArray[np.integer],
    ridge: npt.NDArray[np.uint16],
    peak: npt.NDArray[np.uint16],
    saddle_min: float,
) -> npt.NDArray[Any]:
    """Return numbered regions (H, W) of which those with a high saddle between them are one.

    Args:
        labels: (H, W), 0 outside.
        ridge: (H, W), for example the distance from the edge.
        peak: (N,), highest value of the ridge in each region.
        saddle_min: smallest saddle between parts of one region, as a fraction of the lower of their
            peaks.
    """
    first, second, saddle = _saddles(labels, ridge, len(peak))
    # The peak of a region does not fall when it is merged: what is too low now remains so.
    high = saddle >= saddle_min * np.minimum(peak[first], peak[second])
    first, second, saddle = first[high], second[high], saddle[high]
    one = np.arange(len(peak))
    # The highest saddle first; a merged region has the number of the one with the higher peak.
    for k in np.argsort(-saddle, kind="stable"):
        a, b = one[first[k]], one[second[k]]
        if a != b and saddle[k] >= saddle_min * min(peak[a], peak[b]):
            kept, lost = (a, b) if peak[a] >= peak[b] else (b, a)
            one[one == lost] = kept
    return np.take(one.astype(labels.dtype), labels, mode="clip")


def _saddles(
    labels: npt.NDArray[np.integer], ridge: npt.NDArray[np.uint16], count: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return pairs of regions that touch, and the highest value of the ridge between them."""
    pairs, values = [], []
    for here, there in (np.s_[:, 1:], np.s_[:, :-1]), (np.s_[1:], np.s_[:-1]):
        a, b = labels[here], labels[there]
        touching = (a != b) & (np.minimum(a, b) > 0)
        a, b = a[touching].astype(np.int64), b[touching].astype(np.int64)
        pairs.append(np.minimum(a, b) * count + np.maximum(a, b))
        values.append(np.minimum(ridge[here][touching], ridge[there][touching]).astype(np.int64))
    pair, inverse = np.unique(np.concatenate(pairs), return_inverse=True)
    saddle = np.zeros(len(pair), np.int64)
    np.maximum.at(saddle, inverse, np.concatenate(values))
    return pair // count, pair % count, saddle


def _halved(image: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an image at half the resolution: the maximum of four pixels, 0 outside."""
    height, width = image.shape
    if height % 2 or width % 2:
        image = np.pad(image, ((0, height % 2), (0, width % 2)))
    # Rows first, because they are contiguous in memory.
    rows = np.maximum(image[::2], image[1::2])
    return np.asarray(np.maximum(rows[:, ::2], rows[:, 1::2]))
