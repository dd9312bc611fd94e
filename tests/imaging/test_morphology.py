"""The watershed at half the resolution against scikit-image's."""

import cv2
import numpy as np
from scipy import ndimage
from skimage import segmentation

from hemera.imaging import morphology


def test_the_watershed_at_half_the_resolution_is_scikit_images_within_a_pixel() -> None:
    """On an odd-sized picture: of touching discs, what differs is beside the cut."""
    y, x = np.mgrid[:101, :147].astype(float)
    inside = np.zeros(y.shape, bool)
    markers = np.zeros(y.shape, np.int32)
    for k, (cy, cx) in enumerate(((40, 40), (44, 58), (62, 49), (60, 100), (52, 114))):
        inside |= np.hypot(y - cy, x - cx) < 11
        markers[cy - 1 : cy + 2, cx - 1 : cx + 2] = k + 1
    distance = cv2.distanceTransform(inside.astype(np.uint8), cv2.DIST_L2, 5)
    ridge = (distance * 64).astype(np.uint16)
    ours = morphology.watershed(ridge, markers, inside)
    theirs = segmentation.watershed(-ridge.astype(np.int32), markers, mask=inside)
    np.testing.assert_array_equal(ours > 0, inside)
    differing = ours != theirs
    assert differing.mean() < 0.005
    lowest = ndimage.minimum_filter(np.where(theirs > 0, theirs, 99), 5)
    assert not (differing & (ndimage.maximum_filter(theirs, 5) == lowest)).any()


def test_detached_pixels_are_those_outside_the_largest_piece() -> None:
    labels = np.zeros((6, 9), np.int32)
    labels[0:3, 0:3] = 1
    labels[5, 5:7] = 1
    labels[0:2, 6:9] = 2
    assert morphology.detached_pixels(np.where(labels == 2, 1, 0), 1) is None
    found = morphology.detached_pixels(labels, 2)
    assert found is not None
    np.testing.assert_array_equal(np.argwhere(found), [[5, 5], [5, 6]])
