"""Results of networks of preset demo are labelled: they are of no use beyond a test."""

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

RGB = npt.NDArray[np.uint8]

WORDS = "a network of demo sizes; not meaningful for HER2"
_PICTURE = "demo sizes, not meaningful"


def labelled(picture: RGB) -> RGB:
    """Return a picture (H, W, 3) with a label over its upper edge."""
    marked: Any = picture.copy()
    height, width = marked.shape[:2]
    (at_one, _), _ = cv2.getTextSize(_PICTURE, cv2.FONT_HERSHEY_SIMPLEX, 1, 2)
    scale = min(1.0, 0.9 * width / at_one)
    (_, ascent), descent = cv2.getTextSize(_PICTURE, cv2.FONT_HERSHEY_SIMPLEX, scale, 2)
    bottom = min(height, 2 * (ascent + descent))
    cv2.rectangle(marked, (0, 0), (width, bottom), (255, 255, 255), -1)
    place = int(0.04 * width), ascent + (bottom - ascent) // 2
    color, thick = (200, 0, 0), 2 if scale > 0.5 else 1
    cv2.putText(marked, _PICTURE, place, cv2.FONT_HERSHEY_SIMPLEX, scale, color, thick, cv2.LINE_AA)
    return np.asarray(marked, np.uint8)
