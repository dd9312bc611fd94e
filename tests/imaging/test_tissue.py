import numpy as np
import pytest
from skimage.filters import threshold_otsu

from hemera.imaging.tissue import clean_outline, otsu, tissue_threshold


def two_modes(rng):
    background = np.clip(rng.normal(4, 1.5, (50, 80)), 0, 255).astype(np.uint8)
    return background, np.clip(rng.normal(60, 10, (50, 80)), 0, 255).astype(np.uint8)


def test_otsu_equals_scikit_image(rng):
    values = rng.gamma(3, 12, 5000).clip(0, 255).astype(np.uint8)
    counts = np.bincount(values, minlength=256)
    assert otsu(counts).tolist() == [threshold_otsu(values, nbins=256)]
    # Between two values alone, every bin from the lower to below the upper is as good.
    assert otsu(np.bincount([2, 2, 5], minlength=9)).tolist() == [2, 3, 4]


def test_the_threshold_lies_between_two_modes_and_within_its_bounds(rng):
    background, stained = two_modes(rng)
    both = np.hstack([background, stained])
    assert 10 < tissue_threshold(both, 0, 255) < 45
    assert tissue_threshold(both, 0, 12) == 12
    # Of one mode alone, Otsu splits noise; the bounds prevent it.
    assert (background > tissue_threshold(background, 13, 25)).mean() == 0
    assert (stained > tissue_threshold(stained, 13, 25)).mean() > 0.99


def test_holes_are_filled_and_specks_dropped():
    mask = np.zeros((40, 60), bool)
    mask[5:30, 10:50] = True
    mask[10:13, 20:24] = False  # a hole of 12
    mask[20:26, 30:40] = False  # a hole of 60
    mask[35:37, 2:4] = True  # a speck of 4
    expected = mask.copy()
    expected[10:13, 20:24] = True
    expected[35:37, 2:4] = False
    assert (clean_outline(mask, 20) == expected).all()


@pytest.mark.parametrize("part", [np.s_[0:3, 4:6], np.s_[17:20, 4:6], np.s_[8:10, 29:31]])
def test_background_at_the_edge_is_no_hole(part):
    mask = np.ones((20, 31), bool)
    mask[part] = False
    assert (clean_outline(mask, 100) == mask).all()
