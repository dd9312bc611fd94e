"""The analytic map from H&E to HER2 that every pair of the demo is made with."""

import dataclasses

import cv2
import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Field:
    """A rotation, a shift and a smooth deformation, in um with pixel edges at integers.

    ``moving = turn(fixed - fixed_centre + e(fixed)) + moving_centre``, where ``e`` is a sum
    of sines: ``e(p) = sum_k amplitudes_k sin(frequencies_k . p + phases_k)``.
    """

    angle_deg: float
    fixed_centre: npt.NDArray[np.float64]
    moving_centre: npt.NDArray[np.float64]
    amplitudes: npt.NDArray[np.float64]
    frequencies: npt.NDArray[np.float64]
    phases: npt.NDArray[np.float64]

    def _turn(self, vectors: Points, back: bool = False) -> Points:
        """Rotate vectors (..., 2); y points down, so a positive angle turns clockwise."""
        # Not as a matrix product: that gives other last digits with other numbers of threads.
        c, s = np.cos(np.radians(self.angle_deg)), np.sin(np.radians(self.angle_deg))
        s = -s if back else s
        x, y = vectors[..., 0], vectors[..., 1]
        return np.stack([c * x - s * y, s * x + c * y], axis=-1)

    def elastic(self, points_um: Points) -> Points:
        """Return the deformation at points (..., 2) on H&E, um, before the rotation."""
        x, y = points_um[..., 0], points_um[..., 1]
        total = np.zeros(points_um.shape)
        for (ax, ay), (kx, ky), phase in zip(
            self.amplitudes, self.frequencies, self.phases, strict=True
        ):
            wave = np.sin(kx * x + ky * y + phase)
            total[..., 0] += ax * wave
            total[..., 1] += ay * wave
        return total

    def to_moving(self, points_um: Points) -> Points:
        """Map points (..., 2) on H&E to HER2, exactly."""
        points = np.asarray(points_um, dtype=np.float64)
        return self._turn(points - self.fixed_centre + self.elastic(points)) + self.moving_centre

    def to_fixed(self, points_um: Points, steps: int = 25) -> Points:
        """Map points (..., 2) on HER2 to H&E by fixed-point iteration, to far below 0.001 um."""
        offset = np.asarray(points_um, dtype=np.float64) - self.moving_centre
        target = self._turn(offset, back=True) + self.fixed_centre
        points = target.copy()
        for _ in range(steps):
            points = target - self.elastic(points)
        return points

    def displacement(self, size_um: tuple[float, float], mpp: float) -> npt.NDArray[np.float32]:
        """Sample moving - fixed on the H&E grid: float32 (H, W, 2), node (i, j) at (.5 + j) mpp."""
        columns, rows = (int(np.ceil(side / mpp)) for side in size_um)
        x = (np.arange(columns) + 0.5) * mpp
        y = (np.arange(rows) + 0.5) * mpp
        points = np.stack(np.meshgrid(x, y), axis=-1)
        return np.asarray(self.to_moving(points) - points, dtype=np.float32)

    def warp(
        self,
        fixed: npt.NDArray[np.uint8],
        fixed_mpp: float,
        size_px: tuple[int, int],
        moving_mpp: float,
        background: tuple[int, int, int],
    ) -> npt.NDArray[np.uint8]:
        """Bring an image (H, W, 3) from the H&E frame into the HER2 frame of (width, height)."""
        width, height = size_px
        step = 4
        columns, rows = -(-width // step) + 4, -(-height // step) + 4
        # Nodes on centres of step x step blocks, two more on every side: a linear enlargement
        # between them is exact to 0.01 px for waves of this length.
        x = (np.arange(columns) - 1.5) * step * moving_mpp
        y = (np.arange(rows) - 1.5) * step * moving_mpp
        nodes = self.to_fixed(np.stack(np.meshgrid(x, y), axis=-1), steps=8)
        source = (nodes / fixed_mpp - 0.5).astype(np.float32)
        dense = cv2.resize(source, (columns * step, rows * step), interpolation=cv2.INTER_LINEAR)[
            2 * step : 2 * step + height, 2 * step : 2 * step + width
        ]
        warped = cv2.remap(
            fixed,
            np.ascontiguousarray(dense[..., 0]),
            np.ascontiguousarray(dense[..., 1]),
            cv2.INTER_CUBIC,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=background,
        )
        return np.asarray(warped, dtype=np.uint8)


def make_field(
    rng: np.random.Generator,
    *,
    angle_deg: float,
    shift_um: tuple[float, float],
    elastic_um: float,
    fixed_um: tuple[float, float],
    moving_um: tuple[float, float],
) -> Field:
    """Draw a field that takes the centre of H&E near that of HER2.

    Args:
        rng: draws directions and phases of the deformation.
        angle_deg: rotation.
        shift_um: of the centre of HER2's tissue from the centre of HER2's slide.
        elastic_um: root mean square of the deformation.
        fixed_um: width and height of H&E.
        moving_um: width and height of HER2.
    """
    count = 6
    # Wavelengths of 0.45 to 1.1 of the long side: bends that no similarity explains, no folds.
    wavelengths = max(fixed_um) * np.linspace(1.1, 0.45, count)
    directions = rng.uniform(0, 2 * np.pi, count)
    frequencies = 2 * np.pi / wavelengths[:, None]
    frequencies = frequencies * np.stack([np.cos(directions), np.sin(directions)], axis=-1)
    headings = rng.uniform(0, 2 * np.pi, count)
    amplitudes = np.stack([np.cos(headings), np.sin(headings)], axis=-1) * wavelengths[:, None]
    amplitudes *= elastic_um / np.sqrt(0.5 * np.sum(amplitudes**2))
    return Field(
        angle_deg,
        np.array(fixed_um) / 2,
        np.array(moving_um) / 2 + np.array(shift_um),
        amplitudes,
        frequencies,
        rng.uniform(0, 2 * np.pi, count),
    )
