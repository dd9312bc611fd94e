"""The weight map W of GenerationNet's losses (SPEC 1.3, the paper's equation 1)."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt


def weight_map(
    mask: npt.NDArray[np.bool_], mode: str, *, renormalise_mean: bool = False
) -> npt.NDArray[np.float32]:
    """Return W = (D + 1) / max(D + 1) over a patch.

    Args:
        mask: (H, W), true on nuclei.
        mode: ``inside``: D is a nuclear pixel's distance to the nearest pixel that is none, 0
            elsewhere, so nuclei weigh most; this is what the paper's prose says. ``literal``: D
            is the distance to the nearest nuclear pixel, as equation 1 is printed, so nuclei weigh
            least. ``none``: W is 1.
        renormalise_mean: divide by the mean, so that every patch has mean weight 1.

    Returns:
        (H, W) in (0, 1], before the mean is divided out. A mask that is empty or full has no
        distance to measure: W is 1.
    """
    if mode not in ("inside", "literal", "none"):
        raise ValueError(
            f"mode: {mode!r} is not known; choose from inside, literal, none"
        )
    if mode == "none" or not mask.any() or mask.all():
        return np.ones(mask.shape, np.float32)
    source = mask if mode == "inside" else ~mask
    # Exact Euclidean distance to the nearest zero pixel.
    distance = cv2.distanceTransform(
        source.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE
    )
    weights = (distance + 1) / (distance.max() + 1)
    if renormalise_mean:
        weights = weights / weights.mean()
    return np.asarray(weights, np.float32)
