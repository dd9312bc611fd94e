"""The estimate of the local error: its formula, and its agreement with known errors."""

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from hemera.registration import local_error
from hemera.registration.local_error import estimate_error
from hemera.registration.signals import measure
from tests.small_registration import made
from tests.small_sections import FIXED_UM, MOVING_UM, MPP, sections, to_moving


def test_it_is_a_product_of_powers(monkeypatch):
    monkeypatch.setattr(local_error, "FLOOR", 0.01)
    monkeypatch.setattr(local_error, "ERROR_FLOOR", 0.002)
    factors = {"median": (math.log(2), 1, 0.5), "low": (0, 1, 0.5), "high": (math.log(3), 1, 0.5)}
    monkeypatch.setattr(local_error, "COEFFICIENTS", factors)
    found = estimate_error(np.array([0.09]), np.array([0.03]))
    assert found[:, 0] == pytest.approx(np.array([2, 1, 3]) * 0.1 * 0.2 - 0.002)


def test_it_grows_with_both_measures_and_is_in_its_interval():
    values = np.linspace(0, 0.4, 30)
    residuals, spreads = (axis.ravel() for axis in np.meshgrid(values, values))
    error, low, high = (part.reshape(30, 30) for part in estimate_error(residuals, spreads))
    for part in (error, low, high):
        assert (np.diff(part, axis=0) >= 0).all()
        assert (np.diff(part, axis=1) >= 0).all()
    assert (low >= 0).all() and (low <= error).all() and (error <= high).all()


def test_the_interval_contains_an_error_that_grows_across_the_slide():
    """From 0 to 24 um, on other tissue and another kind of map than it was fitted to."""

    def wrong(points):
        amount = 24 * (points[..., :1] / FIXED_UM[0] - 0.15).clip(0, 0.7) / 0.7
        return to_moving(points) + amount * (0.8, -0.6)

    fixed, moving = sections()
    _, local = measure(
        fixed, moving, made(wrong), mpp=MPP, fixed_size_um=FIXED_UM, moving_size_um=MOVING_UM
    )
    true = np.linalg.norm(wrong(local.centres_um) - to_moving(local.centres_um), axis=-1)
    error, low, high = local.errors_um
    assert spearmanr(error, true)[0] > 0.8
    assert ((low <= true) & (true <= high)).mean() > 0.8
