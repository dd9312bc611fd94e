"""What a tile excludes, as its table stores it: artefacts of both stains, and where HER2 ends.

A PNG of one byte per pixel at `COARSE_MPP` or coarser: the number of the artefact on H&E, from
`hemera.imaging.artefacts.KINDS`, plus 16 times that on HER2; 15 is a place that the image does not
cover.
"""

import cv2
import numpy as np
import numpy.typing as npt

from hemera.imaging.morphology import coarse

Bytes = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

UNCOVERED = 15


def pack(
    he: Bytes | None,
    her2: Bytes | None,
    covered: tuple[Mask | None, Mask | None],
    shape: tuple[int, int],
    mpp: float,
) -> bytes | None:
    """Return the PNG of a tile (H, W), None where nothing is excluded.

    Args:
        he: artefacts, as `find_artefacts` returns them; None: none.
        her2: likewise.
        covered: pixels (H, W) of the tile where there is H&E, and HER2; None: all.
        shape: of the tile, px.
        mpp: its resolution, um/px.
    """
    if all(each is None for each in (he, her2, *covered)):
        return None
    size = coarse(np.zeros(shape, np.uint8), mpp).shape
    numbers = np.zeros(size, np.uint8)
    for unit, kinds, there in zip((1, 16), (he, her2), covered, strict=True):
        own = np.zeros(size, np.uint8) if kinds is None else kinds.copy()
        if there is not None:
            # Of a pixel that is covered in part, all.
            own[coarse(there.astype(np.float32), mpp) <= 1 - 1e-3] = UNCOVERED
        numbers += np.uint8(unit) * own
    return cv2.imencode(".png", numbers)[1].tobytes() if numbers.any() else None


def unpack(data: bytes | None, shape: tuple[int, int]) -> tuple[Bytes, Bytes] | None:
    """Return the numbers on H&E and on HER2 at the size (H, W) of the tile; None: none."""
    if data is None:
        return None
    stored = np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE), np.uint8)
    # By the centres of the pixels; INTER_NEAREST compares their corners.
    numbers = cv2.resize(stored, shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    return np.asarray(numbers % 16, np.uint8), np.asarray(numbers // 16, np.uint8)
