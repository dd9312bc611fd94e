"""Overlapping tiles: what agrees stays, what disagrees fades, what is missing is a hole."""

import numpy as np
import pytest

from hemera.inference.blend import BAND_PX, Blend, Grid


def grid(size, tile):
    return Grid(0.5, 1.0, size, tile)


def blended(field, tile, skip=()):
    """Cut a field into tiles and lay them together again."""
    own = grid(field.shape[::-1], tile)
    blend, rows, covered = Blend(own), [], []
    for y in own.starts(1):
        for x in own.starts(0):
            if (x, y) not in skip:
                blend.add(x, y, field[y : y + tile, x : x + tile])
    for band in range(-(-len(field) // BAND_PX)):
        height = min(BAND_PX, len(field) - BAND_PX * band)
        probability, known = blend.take(band)
        assert probability.shape == (height, field.shape[1])
        rows.append(probability)
        covered.append(known)
    return np.concatenate(rows), np.concatenate(covered)


@pytest.mark.parametrize(("size", "tile"), [((501, 390), 128), ((300, 700), 256), ((65, 31), 64)])
def test_tiles_that_agree_leave_no_trace(size, tile):
    field = np.random.default_rng(1).random(size[::-1]).astype(np.float32)
    result, covered = blended(field, tile)
    assert np.abs(result - field).max() <= 6e-6
    assert covered.all()


@pytest.mark.parametrize("value", [0.5, 0.3, 0.7, 0.123, 1.0])
def test_a_constant_stays_that_very_number(value):
    field = np.full((390, 501), value, np.float32)
    result, _ = blended(field, 128)
    assert (result == np.float32(value)).all()


def test_a_missing_tile_is_a_hole_as_large_as_what_it_alone_covers():
    field = np.full((400, 400), 0.25, np.float32)
    result, covered = blended(field, 128, skip={(96, 192)})
    # Tiles begin at 0, 96, 192 and 272.
    hole = np.zeros((400, 400), bool)
    hole[224:272, 128:192] = True
    assert (covered == ~hole).all()
    assert (result[covered] == 0.25).all()


def test_neighbours_that_disagree_fade_into_each_other_without_a_step():
    """Two tiles along x, 0 and 1: a raised cosine over the quarter they share."""
    own = grid((224, 128), 128)
    blend = Blend(own)
    assert own.starts(0) == [0, 96]
    blend.add(0, 0, np.zeros((128, 128), np.float32))
    blend.add(96, 0, np.ones((128, 128), np.float32))
    result, _ = blend.take(0)
    assert (result[:, :96] == 0).all()
    assert (result[:, 128:] == 1).all()
    expected = (1 - np.cos(np.pi * (np.arange(32) + 0.5) / 32)) / 2
    assert np.abs(result[:, 96:128] - expected).max() < 1e-5
    assert np.abs(np.diff(result[0])).max() < np.pi / 2 / 32 + 1e-5
