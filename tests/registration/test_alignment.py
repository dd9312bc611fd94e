"""Alignment of pairs that come registered: on texture that was moved by a known distance."""

import cv2
import numpy as np
import pytest

from hemera.registration.alignment import match_in_place, match_others, structure

WHITE = (250, 250, 250)


def texture(seed, size=(150, 210), sigma=4.0):
    noise = np.random.default_rng(seed).normal(size=size).astype(np.float32)
    blurred = cv2.GaussianBlur(noise, (0, 0), sigma)
    return blurred / blurred.std()


def test_structure_is_the_mean_density_of_both_stains():
    """Whatever the stain and its background, equal absorption is equal structure."""
    amount = np.tile(np.where(np.arange(240) // 60 % 2, 0.4, 0.1), (180, 1))
    vector = np.array([0.3, 0.9, 0.6]) / 0.6
    for background in (WHITE, (180, 176, 170)):
        rgb = np.rint(np.array(background) * 10 ** -(amount[..., None] * vector)).astype(np.uint8)
        found = structure(rgb, 1.0, background)
        assert found.shape == (90, 120)
        assert found[45, 15] == pytest.approx(0.1, abs=0.01)
        assert found[45, 45] == pytest.approx(0.4, abs=0.01)


def test_in_place_and_moved():
    he = texture(1)
    noisy = he + 0.7 * texture(2)
    in_place, margin = match_in_place(he, noisy)
    assert in_place == pytest.approx(float(np.corrcoef(he.ravel(), noisy.ravel())[0, 1]), abs=1e-5)
    assert margin > 0.4
    # A shift of 27 px along x is one of the radii, 0.18 of the shorter side: the best shifted
    # version is the right one, and the correlation in place that of two textures.
    wide = texture(3, (150, 260))
    in_place, margin = match_in_place(wide[:, :210].copy(), wide[:, 27:237].copy())
    assert abs(in_place) < 0.3
    assert in_place - margin == pytest.approx(1.0, abs=1e-4)
    half = cv2.resize(noisy, (105, 75), interpolation=cv2.INTER_AREA)
    assert match_in_place(he, half)[1] > 0.3
    assert match_in_place(he, -he)[1] < -1
    assert match_in_place(he, np.zeros_like(he)) is None


def test_wrong_pairs_match_best_in_place_only_by_chance():
    """One in 49 by chance: of 300, 6 are expected, and more than 15 would be improbable."""
    margins = [match_in_place(texture(2 * n), texture(2 * n + 1))[1] for n in range(300)]
    assert np.count_nonzero(np.array(margins) > 0) <= 15


def test_others():
    he = [texture(n) for n in range(12)]
    pairs = {f"p{n}": (image, image + texture(100 + n)) for n, image in enumerate(he)}
    assert set(match_others(pairs).values()) == {0.0}
    # Two patients exchanged: each finds one better, and only one, unless by chance.
    pairs["p0"], pairs["p1"] = (he[0], pairs["p1"][1]), (he[1], pairs["p0"][1])
    found = match_others(pairs)
    assert found["p0"] >= 1 / 11
    assert found["p1"] >= 1 / 11
    assert {found[f"p{n}"] for n in range(2, 12)} == {0.0}
    assert match_others({name: pairs[name] for name in list(pairs)[:9]}) == {}
    flat = np.zeros((150, 210), np.float32)
    assert match_others({**pairs, "flat": (flat, flat)})["flat"] == 1.0
