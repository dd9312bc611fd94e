"""Two sections of one small tissue, the second warped by a formula: the answer is the formula."""

import math

import cv2
import numpy as np

MPP = 4.0
FIXED_PX, MOVING_PX = (420, 312), (452, 338)
FIXED_UM = tuple(n * MPP for n in FIXED_PX)
MOVING_UM = tuple(n * MPP for n in MOVING_PX)

_ANGLE = math.radians(11.0)
_TURN = np.array([[math.cos(_ANGLE), -math.sin(_ANGLE)], [math.sin(_ANGLE), math.cos(_ANGLE)]])


def to_moving(points):
    """Map um on the fixed section to um on the moving one: a turn, a shift and a bend."""
    points = np.asarray(points, float)
    x, y = points[..., 0], points[..., 1]
    bend = np.stack([9 * np.sin(y / 260), 7 * np.sin(x / 310 + 1)], axis=-1)
    centre = np.array(FIXED_UM) / 2
    return (points + bend - centre) @ _TURN.T + np.array(MOVING_UM) / 2 + (14.0, -22.0)


def density(seed=1):
    """What the stain is of: nuclei in a piece of tissue, on a canvas wider than both sections."""
    rng = np.random.default_rng(seed)
    height, width = 480, 600
    nuclei = np.zeros((height, width), np.float32)
    for _ in range(2600):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        axes = (rng.uniform(1.6, 4.0), rng.uniform(1.6, 3.2))
        cv2.ellipse(
            nuclei,
            ((x, y), (2 * axes[0], 2 * axes[1]), rng.uniform(0, 180)),
            rng.uniform(0.4, 1),
            -1,
        )
    coarse = cv2.GaussianBlur(rng.normal(size=(height, width)).astype(np.float32), (0, 0), 22)
    y, x = np.mgrid[:height, :width]
    outline = 1 - ((x - 300) / 190.0) ** 2 - ((y - 240) / 135.0) ** 2 + 9 * coarse
    inside = 1 / (1 + np.exp(-12 * outline))
    return (cv2.GaussianBlur(nuclei, (0, 0), 0.8) * inside).astype(np.float32), inside


def stained(nuclei, inside, second):
    """Colour a section: haematoxylin on the nuclei, `second` on the rest of the tissue."""
    haematoxylin = np.array([0.65, 0.70, 0.29])
    absorbed = nuclei[..., None] * 0.9 * haematoxylin + inside[..., None] * 0.12 * np.array(second)
    return np.rint(255 * 10**-absorbed).astype(np.uint8)


def sections(seed=1, other_seed=None):
    """Return the fixed and the moving section; `other_seed`: the moving one of other tissue."""
    nuclei, inside = density(seed)
    # The canvas reaches 90 px beyond the fixed section on the left, 84 above.
    fixed = stained(nuclei, inside, (0.1, 0.9, 0.4))[84:396, 90:510]
    if other_seed is not None:
        nuclei, inside = density(other_seed)
    x, y = np.meshgrid(np.arange(MOVING_PX[0]) + 0.5, np.arange(MOVING_PX[1]) + 0.5)
    goal = np.stack([x, y], axis=-1) * MPP
    points = goal.copy()
    for _ in range(60):
        points += (goal - to_moving(points)) @ _TURN
    at = (points / MPP - 0.5 + (90, 84)).astype(np.float32)
    moved = [
        cv2.remap(np.asarray(image, np.float32), at[..., 0], at[..., 1], cv2.INTER_CUBIC)
        for image in (nuclei, inside)
    ]
    return fixed, stained(moved[0].clip(0), moved[1].clip(0, 1), (0.25, 0.55, 0.75))
