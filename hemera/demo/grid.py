"""The coarse grid of the tissue: noise, distances, sampling.

The same seed has to give the same bytes. The last digits of OpenCV's blur of floats depend on
memory alignment, so smoothing here uses integers or a Fourier transform.
"""

import cv2
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

GRID_UM = 3.0
"""Spacing of the coarse grid."""


def smooth_noise(
    rng: np.random.Generator, shape: tuple[int, int], wavelength_nodes: float
) -> Array:
    """Return smooth noise (H, W) of mean 0 and variance 1 in expectation."""
    step = max(wavelength_nodes / 2, 1.0)
    rows, columns = (int(np.ceil(side / step)) + 5 for side in shape)
    coarse = rng.standard_normal((rows, columns)).astype(np.float32)
    full = cv2.resize(
        coarse, (int(columns * step), int(rows * step)), interpolation=cv2.INTER_CUBIC
    )
    margin = int(step)
    part = full[margin : margin + shape[0], margin : margin + shape[1]]
    return np.asarray(part * np.float32(1.35), dtype=np.float32)


def signed_distance(inside: npt.NDArray[np.bool_]) -> Array:
    """Return the distance (um) to the border of a region of the coarse grid, positive inside."""
    padded = np.pad(inside.astype(np.uint8), 1, mode="edge")
    within = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    outside = cv2.distanceTransform(1 - padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # With no pixel of the other class the transform is huge: far away is far enough. Squares are
    # integers, independent of the last digit of a root; integer 64ths make the smoothing exact.
    near, far = (np.sqrt(np.rint(np.square(np.clip(d, 0, 300)))) for d in (within, outside))
    distance = np.rint((near - far) * 64)
    smooth = distance[:, :-2] + 2 * distance[:, 1:-1] + distance[:, 2:]
    smooth = smooth[:-2] + 2 * smooth[1:-1] + smooth[2:]
    return np.asarray(smooth * np.float32(GRID_UM / 1024), dtype=np.float32)


def hexagons(
    rng: np.random.Generator, size_um: tuple[float, float], spacing: float, jitter: float
) -> npt.NDArray[np.float64]:
    """Return points (N, 2) of a jittered hexagonal grid over the area."""
    height = spacing * np.sqrt(3) / 2
    rows, columns = int(size_um[1] / height) + 2, int(size_um[0] / spacing) + 2
    row, column = np.mgrid[0:rows, 0:columns]
    points = np.stack([(column + 0.5 * (row % 2)) * spacing, row * height], axis=-1).reshape(-1, 2)
    points = points + rng.normal(0, jitter * spacing, points.shape)
    inside = (points > 1).all(axis=1) & (points < np.array(size_um) - 1).all(axis=1)
    return np.asarray(points[inside], dtype=np.float64)


def sample(field: Array, points: npt.NDArray[np.floating]) -> Array:
    """Read a coarse field bilinearly at points (N, 2), um."""
    position = np.asarray(points, dtype=np.float32) / np.float32(GRID_UM) - np.float32(0.5)
    # remap takes no image of more than 32,767 rows: fold the list into a rectangle.
    count = len(position)
    width = 1024
    rows = -(-count // width) if count else 1
    folded = np.zeros((rows * width, 2), np.float32)
    folded[:count] = position
    map_x = np.ascontiguousarray(folded[:, 0]).reshape(rows, width)
    map_y = np.ascontiguousarray(folded[:, 1]).reshape(rows, width)
    values = cv2.remap(field, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(values.reshape(-1)[:count], dtype=np.float32)
