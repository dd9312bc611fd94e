"""The background of drawn images: glass beside pale tissue, noise, and tissue without glass."""

import cv2
import numpy as np
import pytest

from hemera.imaging.background import constant_areas, fill_pixels, measure_background


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


def turned(image: np.ndarray, fill: tuple[int, int, int], degrees: float = 8.0) -> np.ndarray:
    """An image rotated about its centre, with corners of one colour."""
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1)
    return cv2.warpAffine(image, matrix, (width, height), borderValue=fill)


def compressed(image: np.ndarray, quality: int) -> np.ndarray:
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], 1)


@pytest.mark.parametrize("fill", [(255, 255, 255), (0, 0, 0), (128, 90, 200)])
@pytest.mark.parametrize("quality", [None, 95, 80])
def test_corners_of_one_colour_are_not_the_background(
    fill: tuple[int, int, int], quality: int | None
) -> None:
    glass = (178, 177, 174)
    image = turned(drawn(glass, 0.3).astype(np.uint8), fill)
    if quality is not None:
        image = compressed(image, quality)
    found = measure_background([image], 0.5, [constant_areas(image)])
    assert found.measured
    assert found.color == pytest.approx(glass, abs=2)
    assert found.fill
    for color in found.fill:
        assert color == pytest.approx(fill, abs=2)
    truth = turned(np.full((300, 420), 255, np.uint8), (0, 0, 0)) == 0
    assert truth.mean() > 0.05
    where = fill_pixels(image, found.fill)
    assert where is not None
    assert where[truth].mean() > 0.99
    # Nothing else, except the edge of 8 px that JPEG changes.
    apart = cv2.distanceTransform((~truth).astype(np.uint8), cv2.DIST_L2, 5)
    assert not where[apart > 10].any()


@pytest.mark.parametrize("gain", [1.03, 1.2, 1.5])
def test_overexposed_background_remains_background(gain: float) -> None:
    absorbed = drawn((250, 250, 250), 0.3).astype(np.uint8)
    # Dense tissue with gaps of 3 um in 2 % of its area.
    dense = (absorbed.astype(float) / 250) ** 4 * 250
    dense[:, :126] = absorbed[:, :126]
    for y, x in np.random.default_rng(3).integers((20, 150), (280, 400), (28, 2)):
        dense[y : y + 6, x : x + 6] = 250
    image = np.clip(dense * gain, 0, 255).round().astype(np.uint8)
    areas = constant_areas(image)
    assert gain < 1.2 or {area.color for area in areas} == {(255, 255, 255)}
    found = measure_background([image], 0.5, [areas])
    assert found.measured
    assert found.color == (255, 255, 255)
    assert not found.fill


def test_an_image_of_one_colour_is_its_background() -> None:
    image = np.zeros((90, 130, 3), np.uint8)
    found = measure_background([image], 0.5, [constant_areas(image)])
    assert (found.color, found.fill) == ((0, 0, 0), ())


def test_noise_is_not_of_one_colour_and_an_overview_must_be_confirmed() -> None:
    image = drawn((240, 240, 240), 0.5).astype(np.uint8)
    assert not constant_areas(image)
    image[:40] = 255
    seen: list[tuple[float, float]] = []

    def confirmed(x: float, y: float) -> bool:
        seen.append((x, y))
        return False

    assert not constant_areas(image, confirmed)
    # Of the place deepest inside it.
    ((_, y),) = seen
    assert y == pytest.approx(20 / 300, abs=1 / 300)
