"""Results of networks of preset demo are labelled: they are of no use beyond a test."""

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

RGB = npt.NDArray[np.uint8]

WORDS = "a network of demo sizes; not meaningful for HER2"
_PICTURE = "demo sizes, not meaningful"


def labelled(picture: RGB) -> RGB:
    """Return a picture (H, W, 3) with a label in its upper left corner."""
    marked: Any = picture.copy()
    font, width = cv2.FONT_HERSHEY_SIMPLEX, marked.shape[1]
    (at_one, _), _ = cv2.getTextSize(_PICTURE, font, 1, 2)
    scale = min(1.0, 0.9 * width / at_one)
    thick = 2 if scale > 0.5 else 1
    (across, ascent), descent = cv2.getTextSize(_PICTURE, font, scale, thick)
    end = across + 2 * descent, ascent + 3 * descent
    cv2.rectangle(marked, (0, 0), end, (255, 255, 255), -1)
    place = descent, ascent + descent
    cv2.putText(marked, _PICTURE, place, font, scale, (200, 0, 0), thick, cv2.LINE_AA)
    return np.asarray(marked, np.uint8)
