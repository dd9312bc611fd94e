"""The background of drawn images: glass beside pale tissue, noise, and tissue without glass."""

import cv2
import numpy as np
import pytest

from hemera.imaging.background import measure_background


def drawn(glass: tuple[int, int, int], fraction: float) -> np.ndarray:
    """Textured pale tissue over an image, of which a fraction is glass; both with noise."""
    rng = np.random.default_rng(6)
    texture = cv2.GaussianBlur(rng.normal(size=(300, 420)), (0, 0), 6)
    absorbed = 0.10 + 0.05 * texture / texture.std()
    density = absorbed.clip(0.02)[..., None] * (0.6, 0.7, 0.3)
    density[:, : round(fraction * 420)] = 0
    return (np.array(glass) * 10**-density + rng.normal(0, 2, density.shape)).round().clip(0, 255)


@pytest.mark.parametrize("glass", [(178, 178, 176), (239, 236, 208), (252, 250, 248)])
@pytest.mark.parametrize("fraction", [0.08, 0.6])
def test_the_colour_of_the_glass_is_measured(glass: tuple[int, int, int], fraction: float) -> None:
    image = drawn(glass, fraction).astype(np.uint8)
    found = measure_background([image], 0.5)
    assert found.measured
    # A channel near white is cut off at 255.
    assert found.color == pytest.approx(glass, abs=2)


def test_one_image_with_glass_is_enough_for_those_without() -> None:
    glass = (226, 222, 215)
    tissue = drawn(glass, 0.0).astype(np.uint8)
    found = measure_background([tissue, drawn(glass, 0.3).astype(np.uint8), tissue], 0.5)
    assert found.color == pytest.approx(glass, abs=2)


def test_tissue_without_glass_falls_back_to_its_brightest_colour() -> None:
    rng = np.random.default_rng(1)
    texture = cv2.GaussianBlur(rng.normal(size=(200, 310)), (0, 0), 3)
    density = 0.4 * np.exp(0.5 * texture / texture.std())[..., None] * (0.6, 0.7, 0.3)
    # Gaps of 3 um in 0.4 % of the area: too few for a background, enough for its colour.
    for y, x in rng.integers(0, (197, 307), (28, 2)):
        density[y : y + 3, x : x + 3] = 0
    image = (240 * 10**-density).round().clip(0, 255).astype(np.uint8)
    found = measure_background([image], 1.0)
    assert not found.measured
    assert found.color == pytest.approx((240, 240, 240), abs=3)


def test_without_images_the_background_is_white() -> None:
    assert measure_background([], 0.5).color == (255, 255, 255)
