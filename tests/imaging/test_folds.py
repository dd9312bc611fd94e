"""Contrast of bands of several layers on drawn tissue."""

import numpy as np
import numpy.typing as npt
import pytest

from hemera.imaging.folds import fold_contrast

Density = npt.NDArray[np.float32]
STAIN = np.array([0.5, 0.8, 0.4])


def tissue(seed: int = 0) -> Density:
    """Densities of 200 x 260 um at 2 um/px, which vary by a fifth."""
    noise = np.random.default_rng(seed).normal(1, 0.2, (100, 130, 1))
    return np.asarray(0.2 * noise.clip(0.2) * STAIN, np.float32)


def apart(angle_deg: float) -> npt.NDArray[np.float64]:
    """Return the distance from a line through the middle, um."""
    y, x = (np.mgrid[:100, :130] + 0.5) * 2
    angle = np.deg2rad(angle_deg)
    return np.abs((x - 130) * np.sin(angle) - (y - 100) * np.cos(angle))


@pytest.mark.parametrize("angle_deg", [0, 37, 90, 160])
@pytest.mark.parametrize("layers", [2, 3])
def test_the_contrast_of_a_band_is_its_additional_layers(angle_deg: float, layers: int) -> None:
    band = apart(angle_deg) < 16
    density = tissue() + band[..., None] * sum(tissue(k) for k in range(1, layers))
    contrast = fold_contrast(density, 2.0)
    assert contrast.shape == (50, 65)
    # Relative to the mean of the image, which contains the band; the lowest of layers add up to
    # more than their lowest densities.
    mean = 1 + (layers - 1) * band.mean()
    assert 0.8 * (layers - 1) / mean < contrast.max() < 1.8 * (layers - 1) / mean
    inside = apart(angle_deg)[1::2, 1::2] < 8
    assert (contrast[inside] > 0.5 * contrast.max()).mean() > 0.8


def test_a_border_a_disc_another_stain_and_the_surface_of_tissue_are_no_bands() -> None:
    plain = tissue()
    y, x = (np.mgrid[:100, :130] + 0.5) * 2
    border = plain * (1 + 2 * (apart(20) * 0 + (y > 100)))[..., None]
    disc = plain * (1 + 2 * (np.hypot(y - 100, x - 130) < 30))[..., None]
    other = plain + (apart(20) < 16)[..., None] * np.array([0.4, 0.02, 0.01])
    surface = plain * np.where(y < 60, 0, np.where(y < 92, 3, 1))[..., None]
    for density in (plain, border, disc, other, surface):
        assert fold_contrast(np.asarray(density, np.float32), 2.0).max() < 0.3


@pytest.mark.parametrize("shape", [(1, 1), (7, 90), (60, 30)])
def test_an_image_that_is_small_or_empty_has_none(shape: tuple[int, int]) -> None:
    assert not fold_contrast(np.zeros((*shape, 3), np.float32), 2.0).any()
