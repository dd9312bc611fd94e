"""Blurred cells of drawn tissue: which, at which resolution, and not for lack of contrast."""

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from hemera.imaging.blur import blurred_cells


def tissue(contrast: float, mpp: float) -> npt.NDArray[np.uint8]:
    """Nuclei of 7 um with chromatin over a pale cytoplasm, a tile of 240 x 240 um."""
    rng = np.random.default_rng(4)
    side = round(240 / 0.25)
    dark = np.zeros((side, side), np.float32)
    for y, x in rng.integers(0, side, (700, 2)).tolist():
        axes = rng.integers(10, 17, 2).tolist()
        cv2.ellipse(dark, (x, y), axes, float(rng.uniform(0, 180)), 0, 360, 1.0, -1)
    chromatin = cv2.GaussianBlur(rng.normal(size=dark.shape), (0, 0), 2.0)
    dark *= 1 + 0.3 * chromatin.astype(np.float32) / chromatin.std()
    value = 220 - contrast * cv2.GaussianBlur(dark, (0, 0), 1.6)
    gray = cv2.resize(value, None, fx=0.25 / mpp, fy=0.25 / mpp, interpolation=cv2.INTER_AREA)
    noisy = gray[..., None] + rng.normal(0, 1, (*gray.shape, 3))
    return np.asarray(noisy.round().clip(0, 255), np.uint8)


@pytest.mark.parametrize("stain", ["he", "her2"])
@pytest.mark.parametrize("mpp", [0.25, 0.5])
@pytest.mark.parametrize("contrast", [25.0, 90.0])
def test_the_right_half_is_blurred(stain: str, mpp: float, contrast: float) -> None:
    rgb = tissue(contrast, mpp)
    assert not blurred_cells(rgb, mpp, stain).any()
    half = rgb.shape[1] // 2
    rgb[:, half:] = cv2.GaussianBlur(rgb, (0, 0), 2.0 / mpp)[:, half:]
    expected = np.zeros((4, 4), np.bool_)
    expected[:, 2:] = True
    np.testing.assert_array_equal(blurred_cells(rgb, mpp, stain), expected)


def test_an_empty_tile_is_not_blurred() -> None:
    rng = np.random.default_rng(0)
    empty = rng.normal(240, 0.4, (480, 480, 3)).round().astype(np.uint8)
    assert not blurred_cells(empty, 0.5, "he").any()
