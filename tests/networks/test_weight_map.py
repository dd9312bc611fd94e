import numpy as np
import pytest
from scipy import ndimage

from hemera.networks.weight_map import weight_map


@pytest.fixture
def nucleus():
    """The worked example: a 3x3 nucleus in the middle of 7x7."""
    mask = np.zeros((7, 7), bool)
    mask[2:5, 2:5] = True
    return mask


def test_inside_reading_of_the_worked_example(nucleus):
    weights = weight_map(nucleus, "inside")
    assert weights.dtype == np.float32
    assert weights[0, 0] == pytest.approx(0.333, abs=5e-4)
    assert weights[2, 3] == pytest.approx(0.667, abs=5e-4)
    assert weights[2, 2] == pytest.approx(0.667, abs=5e-4)
    assert weights[3, 3] == 1
    assert np.count_nonzero(weights == weights.min()) == 40


def test_literal_reading_of_the_worked_example(nucleus):
    weights = weight_map(nucleus, "literal")
    assert weights[3, 3] == pytest.approx(0.261, abs=5e-4)
    assert weights[0, 0] == 1
    assert weights[0, 3] == pytest.approx(3 / (1 + 2 * np.sqrt(2)), abs=5e-4)


def test_positive_pixels_have_twice_the_weight_of_others(nucleus):
    weights = weight_map(nucleus, "positive")
    assert (weights[nucleus] == 1).all() and (weights[~nucleus] == 0.5).all()
    assert (weight_map(np.zeros((5, 8), bool), "positive") == 0.5).all()
    assert weight_map(nucleus, "positive", renormalise_mean=True).mean() == pytest.approx(1)


LINE = np.ones((3, 2100), bool)
LINE[1, 2] = False
"""Its distances are beyond single precision."""
BLOBS = ndimage.gaussian_filter(np.random.default_rng(1).random((61, 94)), 3) > 0.5


@pytest.mark.parametrize("mode", ["inside", "literal"])
@pytest.mark.parametrize("mask", [BLOBS, LINE], ids=["blobs", "line"])
def test_distances_equal_scipys(mask, mode):
    distance = ndimage.distance_transform_edt(mask if mode == "inside" else ~mask)
    expected = (distance + 1) / (distance + 1).max()
    assert np.array_equal(weight_map(mask, mode), expected.astype(np.float32))


def test_equal_masks_give_equal_bits_wherever_they_lie_in_memory():
    rng = np.random.default_rng(2)
    mask = ndimage.gaussian_filter(rng.random((64, 94)), 2) > 0.5
    found = set()
    for _ in range(50):
        shifted = np.empty((64, 94 + int(rng.integers(1, 50))), bool)[:, :94]
        shifted[:] = mask
        found.add(weight_map(shifted, "inside").tobytes())
    assert len(found) == 1


@pytest.mark.parametrize("mode", ["inside", "literal", "none"])
@pytest.mark.parametrize("fill", [False, True])
def test_an_empty_and_a_full_mask_weigh_one_everywhere(mode, fill):
    weights = weight_map(np.full((5, 8), fill), mode)
    assert weights.shape == (5, 8)
    assert (weights == 1).all()


def test_none_weighs_one_and_the_mean_can_be_divided_out(nucleus):
    assert (weight_map(nucleus, "none") == 1).all()
    weights = weight_map(nucleus, "inside", renormalise_mean=True)
    assert weights.mean() == pytest.approx(1, abs=1e-6)
    assert weights[3, 3] == pytest.approx(3 * weights[0, 0], rel=1e-5)
