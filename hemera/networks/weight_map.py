"""The weight map W of the losses of GenerationNet (HEMERA paper, 3.1, equation 1)."""

import cv2
import numpy as np
import numpy.typing as npt
from scipy import ndimage


def weight_map(
    mask: npt.NDArray[np.bool_], mode: str, *, renormalise_mean: bool = False
) -> npt.NDArray[np.float32]:
    """Return W = (D + 1) / max(D + 1) of a mask (H, W) of nuclei.

    It is 1 for an empty or full mask, but for mode positive.

    Args:
        mode: ``inside``: D is a nuclear pixel's distance to the nearest other pixel, 0 elsewhere,
            so nuclei weigh most, as in the paper's text. ``literal``: D is the distance to the
            nearest nuclear pixel, as equation 1 is printed, so nuclei weigh least. ``positive``: W
            is 1 on the mask and 1/2 elsewhere, whatever the distance. ``none``: W is 1.
        renormalise_mean: divide by the mean, so that every patch has mean weight 1.
    """
    if mode == "positive":
        weights = (mask + 1.0) / 2
    elif mode == "none" or not mask.any() or mask.all():
        return np.ones(mask.shape, np.float32)
    else:
        distance = _distance(mask if mode == "inside" else ~mask)
        weights = (distance + 1) / (distance.max() + 1)
    if renormalise_mean:
        weights = weights / weights.mean()
    return np.asarray(weights, np.float32)


def _distance(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Return the exact distance of every true pixel to the nearest false one, 0 on false ones.

    The squares of OpenCV's distances, which are not reproducible, are rounded to integers; beyond
    single precision SciPy is used.
    """
    found = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    if found.max() > 1000:
        return np.asarray(ndimage.distance_transform_edt(mask), np.float64)
    return np.sqrt(np.rint(np.square(found.astype(np.float64))))
