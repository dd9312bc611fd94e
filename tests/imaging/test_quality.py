import cv2
import numpy as np
import pytest
from skimage.color import rgb2hed

from hemera.imaging.quality import histogram_similarity, sharpness


def tissue(rng, height=90, width=130):
    """H&E colours all over, from pale eosin to dark nuclei."""
    fraction = cv2.GaussianBlur(rng.random((height, width)).astype(np.float32), (0, 0), 3)
    fraction = (fraction - fraction.min()) / np.ptp(fraction)
    eosin, nucleus = np.array([235, 190, 215]), np.array([95, 60, 140])
    return np.rint(eosin + fraction[..., None] * (nucleus - eosin)).astype(np.uint8)


def texture(rng, height, width, sigma):
    """Gray noise with structures of the size `sigma`."""
    noise = cv2.GaussianBlur(rng.normal(size=(height, width)).astype(np.float32), (0, 0), sigma)
    noise = 128 + 40 * noise / noise.std()
    return np.repeat(np.clip(noise, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def correlation_by_definition(he, her2):
    histograms = []
    for rgb in (he, her2):
        stain = rgb2hed(rgb)[..., 0]
        scaled = (stain - np.median(stain)) / stain.std()
        histograms.append(np.histogram(scaled, 64, (-4, 4))[0])
    return np.corrcoef(*histograms)[0, 1]


def test_sharpness_at_half_a_micrometre_is_the_plain_variance(rng):
    rgb = rng.integers(0, 256, (61, 97, 3), dtype=np.uint8)
    gray = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    reference = cv2.Laplacian(gray, cv2.CV_64F).var()
    assert sharpness(rgb, 0.5) == pytest.approx(reference, rel=1e-9)
    assert sharpness(np.full((40, 30, 3), 200, np.uint8), 0.5) == 0


@pytest.mark.parametrize("sigma", [3.0, 4.0, 6.0])
def test_sharpness_is_comparable_between_resolutions(rng, sigma):
    fine = texture(rng, 800, 1200, sigma)
    at = {
        0.25 * factor: cv2.resize(
            fine, (1200 // factor, 800 // factor), interpolation=cv2.INTER_AREA
        )
        for factor in (1, 2, 4)
    }
    half = sharpness(at[0.5], 0.5)
    # Finer is measured after averaging: the same picture.
    assert sharpness(at[0.25], 0.25) == pytest.approx(half, rel=1e-6)
    # Coarser is extrapolated: right to a factor of three where unscaled values are up to 16 apart.
    raw = cv2.Laplacian(cv2.cvtColor(at[1.0], cv2.COLOR_RGB2GRAY), cv2.CV_64F).var()
    assert 1 / 3 < sharpness(at[1.0], 1.0) / half < 3.5
    assert abs(np.log(sharpness(at[1.0], 1.0) / half)) < abs(np.log(raw / half))


def test_similarity_ignores_brightness_and_contrast_but_not_shape(rng):
    he = tissue(rng)
    assert histogram_similarity(he, he) == pytest.approx(1.0)
    paler = np.rint(255 - (255 - he.astype(float)) * 0.6).astype(np.uint8)
    assert histogram_similarity(he, paler) > 0.8
    two = np.full_like(he, 230)
    two[:, : two.shape[1] // 2] = (90, 60, 150)
    assert histogram_similarity(he, two) < 0.3
    assert histogram_similarity(he, np.full_like(he, 200)) is None


def test_similarity_equals_its_definition(rng):
    he, her2 = tissue(rng), tissue(rng)[::-1] // 2 + 90
    reference = correlation_by_definition(he, her2)
    assert histogram_similarity(he, her2) == pytest.approx(reference, abs=0.02)
