import numpy as np
import pytest
from skimage.color import rgb2hed

from hemera.imaging import color
from hemera.imaging.color import DENSITY_STEP


def test_haematoxylin_equals_scikit_image(rng):
    rgb = rng.integers(0, 256, (37, 53, 3), dtype=np.uint8)
    rgb[0, :4] = [[0, 0, 0], [255, 255, 255], [1, 255, 0], [255, 0, 1]]
    assert np.abs(color.haematoxylin(rgb) - rgb2hed(rgb)[..., 0]).max() < 1e-6


def test_haematoxylin_over_a_gray_background_is_that_over_white():
    """Half the light: every value of the darker image is half of that over white."""
    over_white = np.array([[[255, 255, 255], [200, 100, 150], [30, 40, 160]]], np.uint8)
    over_gray = (over_white // 2).astype(np.uint8)
    found = color.haematoxylin(over_gray, (127, 127, 127))
    assert found == pytest.approx(color.haematoxylin(over_white), abs=0.01)


def test_optical_density_by_hand():
    rgb = np.array([[[255, 25, 0], [200, 100, 50]]], np.uint8)
    density = color.optical_density(rgb, (250, 250, 200))
    assert density[0, 0] == pytest.approx([0.0, 1.0, np.log10(200)], abs=1e-5)
    assert density[0, 1] == pytest.approx(np.log10([250 / 200, 2.5, 4]), abs=1e-5)


def test_an_image_over_its_background_is_one_over_white():
    rgb = np.array([[[179, 178, 174], [90, 178, 0], [200, 89, 87]]], np.uint8)
    found = color.normalise_background(rgb, (179, 178, 174))
    # 90 * 255 / 179 = 128.2, 89 * 255 / 178 = 127.5, to even; brighter than background is white.
    assert found.tolist() == [[[255, 255, 255], [128, 255, 0], [255, 128, 128]]]
    assert color.normalise_background(rgb, color.WHITE) is rgb


def test_gray_and_near_black_have_no_saturation():
    rgb = np.array([[[180, 180, 180], [20, 0, 10], [200, 80, 150]]], np.uint8)
    assert color.saturation(rgb).tolist() == [[0, 0, 153]]


def test_gray_haze_is_background_and_a_pale_counterstain_is_not():
    haze, pale = (176, 175, 172), (168, 172, 172)
    rgb = np.array([[haze, pale, (255, 255, 255)]], np.uint8)
    density = color.density(rgb, haze) * DENSITY_STEP
    assert density[0, 0] == 0
    assert density[0, 1] == pytest.approx(np.log10(176 / 168), abs=DENSITY_STEP)
    assert density[0, 2] == 0
