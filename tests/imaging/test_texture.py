"""The 64 numbers of colour and texture."""

import numpy as np
import pytest

from hemera.imaging import texture

BACKGROUND = (240, 236, 238)


def number(values, name):
    return values[texture.NAMES.index(name)]


def test_there_are_64_numbers_with_distinct_names(rng):
    assert len(texture.NAMES) == len(set(texture.NAMES)) == 64
    rgb = rng.integers(0, 256, (96, 64, 3), dtype=np.uint8)
    values = texture.statistics(rgb, BACKGROUND, 0.5)
    assert values.shape == (64,) and values.dtype == np.float32 and np.isfinite(values).all()


def test_moments_and_quantiles_are_those_of_the_density(rng):
    rgb = rng.integers(20, 240, (120, 88, 3), dtype=np.uint8)
    values = texture.statistics(rgb, BACKGROUND, 0.5)
    density = np.maximum(-np.log10(rgb / np.array(BACKGROUND)), 0)
    for k, name in enumerate(("red", "green", "blue")):
        channel = density[..., k].ravel()
        centred = channel - channel.mean()
        assert number(values, f"{name}_mean") == pytest.approx(channel.mean(), abs=1e-5)
        assert number(values, f"{name}_std") == pytest.approx(channel.std(), abs=1e-5)
        skewness = (centred**3).mean() / channel.std() ** 3
        assert number(values, f"{name}_skewness") == pytest.approx(skewness, abs=1e-3)
        for quantile in texture.QUANTILES:
            found = number(values, f"{name}_q{round(100 * quantile):02d}")
            assert found == pytest.approx(np.quantile(channel, quantile), abs=2e-3)
    pair = np.corrcoef(density[..., 0].ravel(), density[..., 1].ravel())[0, 1]
    assert number(values, "red_green_correlation") == pytest.approx(pair, abs=1e-4)


def test_energy_is_greatest_at_the_scale_of_the_pattern():
    mpp = 0.25
    x, y = np.meshgrid(np.arange(256), np.arange(192))
    energies = {}
    for period_um in (3, 20):
        wave = np.sin(2 * np.pi * x * mpp / period_um) * np.sin(2 * np.pi * y * mpp / period_um)
        rgb = np.repeat((150 + 60 * wave)[..., None], 3, axis=2).astype(np.uint8)
        values = texture.statistics(rgb, BACKGROUND, mpp)
        found = [number(values, f"green_energy_{scale:g}um") for scale in texture.SCALES_UM]
        energies[period_um] = int(np.argmax(found))
    assert energies[3] < energies[20]


def test_numbers_do_not_depend_on_the_resolution_of_a_smooth_image():
    # The same pattern, 0.25 and 0.5 um per pixel.
    found = []
    for mpp, side in ((0.25, (256, 384)), (0.5, (128, 192))):
        y, x = np.mgrid[: side[0], : side[1]] * mpp + mpp / 2
        wave = np.sin(2 * np.pi * x / 16) * np.cos(2 * np.pi * y / 12)
        rgb = np.stack([150 + 60 * wave, 110 + 50 * wave, 140 + 40 * wave], axis=-1)
        found.append(texture.statistics(rgb.astype(np.uint8), BACKGROUND, mpp))
    difference = np.abs(found[0] - found[1])
    # The finest scale holds the rounding to whole gray values, which depends on the pixels.
    coarse = [k for k, name in enumerate(texture.NAMES) if "0.4um" not in name]
    assert difference[coarse].max() < 0.1


def test_a_constant_image_has_finite_numbers():
    for value in (0, 128, 255):
        rgb = np.full((48, 32, 3), value, np.uint8)
        values = texture.statistics(rgb, BACKGROUND, 0.5)
        assert np.isfinite(values).all()
        assert number(values, "red_std") == pytest.approx(0, abs=1e-6)
        assert number(values, "red_green_correlation") == 0
