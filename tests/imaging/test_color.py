import cv2
import numpy as np
import pytest
from skimage.color import rgb2hed

from hemera.imaging import color
from hemera.imaging.color import DENSITY_STEP


def tissue(rng, height=90, width=130):
    """H&E colours all over, from pale eosin to dark nuclei."""
    fraction = cv2.GaussianBlur(rng.random((height, width)).astype(np.float32), (0, 0), 3)
    fraction = (fraction - fraction.min()) / np.ptp(fraction)
    eosin, nucleus = np.array([235, 190, 215]), np.array([95, 60, 140])
    return np.rint(eosin + fraction[..., None] * (nucleus - eosin)).astype(np.uint8)


def test_haematoxylin_equals_scikit_image(rng):
    rgb = rng.integers(0, 256, (37, 53, 3), dtype=np.uint8)
    rgb[0, :4] = [[0, 0, 0], [255, 255, 255], [1, 255, 0], [255, 0, 1]]
    assert np.abs(color.haematoxylin(rgb) - rgb2hed(rgb)[..., 0]).max() < 1e-6


def test_optical_density_by_hand():
    rgb = np.array([[[255, 25, 0], [200, 100, 50]]], np.uint8)
    density = color.optical_density(rgb, (250, 250, 200))
    assert density[0, 0] == pytest.approx([0.0, 1.0, np.log10(200)], abs=1e-5)
    assert density[0, 1] == pytest.approx(np.log10([250 / 200, 2.5, 4]), abs=1e-5)


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


@pytest.mark.parametrize(
    ("background", "width", "tolerance"), [((241, 240, 238), 140, 1), ((178, 178, 175), 60, 2)]
)
def test_background_is_the_brightest_gray_not_the_commonest_colour(
    rng, background, width, tolerance
):
    """The second is as in BCI: a dark gray, and little of it."""
    rgb = tissue(rng, 100, 140)
    rgb[:20, :width] = np.clip(rng.normal(background, 1.0, (20, width, 3)), 0, 255)
    assert np.abs(np.subtract(color.background_color(rgb), background)).max() <= tolerance


def test_without_background_the_brightest_colour_is_returned(rng):
    rgb = tissue(rng)
    found = color.background_color(rgb)
    assert np.abs(np.subtract(found, rgb.reshape(-1, 3).max(axis=0))).max() < 25
