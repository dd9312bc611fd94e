import numpy as np
import pytest

from hemera.imaging.resample import area_resample, halved, remap, shift_resample


def test_half_the_resolution_is_the_mean_of_four_pixels():
    rgb = np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3)
    small = halved(rgb)
    assert small.shape == (2, 3, 3)
    mean = rgb[:4].astype(float).reshape(2, 2, 3, 2, 3).mean(axis=(1, 3))
    assert np.abs(small - mean).max() <= 0.5


@pytest.mark.parametrize(
    ("left", "top", "step_x", "step_y"),
    [(0.0, 0.0, 1.5, 1.5), (3.25, 1.75, 2.3, 2.3), (2.0, 4.0, 3.0, 2.0), (0.4, 0.6, 1.0, 1.0)],
)
def test_area_resampling_is_the_mean_over_each_pixel(rng, left, top, step_x, step_y):
    rgb = rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)
    width, height = 9, 6
    result = area_resample(rgb, (left, top), (step_x, step_y), (width, height))
    # Each source pixel cut in 200 x 200.
    fine = 200
    x = (left + (np.arange(width * fine) + 0.5) / fine * step_x).astype(int)
    y = (top + (np.arange(height * fine) + 0.5) / fine * step_y).astype(int)
    brute = rgb[y][:, x].reshape(height, fine, width, fine, 3).mean(axis=(1, 3))
    assert np.abs(result - brute).max() < 1.5
    assert np.abs(result - brute).mean() < 0.5


def test_enlarging_keeps_a_ramp_in_place():
    ramp = np.repeat(np.arange(0, 200, 2, dtype=np.uint8)[None, :, None], 40, axis=0)
    rgb = np.repeat(ramp, 3, axis=2)
    result = shift_resample(rgb, (7.3, 2.0), (0.4, 0.4), (30, 10))
    centres = 7.3 + (np.arange(30) + 0.5) * 0.4
    assert np.abs(result[3, :, 0] - 2 * (centres - 0.5)).max() <= 0.6


def test_remap_samples_at_pixel_centres(rng):
    rgb = rng.integers(0, 256, (20, 33, 3), dtype=np.uint8)
    x, y = np.meshgrid(np.arange(3, 13, dtype=np.float32), np.arange(2, 9, dtype=np.float32))
    for cubic in (False, True):
        assert (remap(rgb, x, y, cubic=cubic) == rgb[2:9, 3:13]).all()
