"""What a tile excludes, stored and read again: artefacts of two stains, an uncovered strip."""

import numpy as np

from hemera.dataset.excluded import UNCOVERED, pack, unpack


def test_both_stains_and_the_uncovered_strip_return_at_the_size_of_the_tile() -> None:
    he, her2 = np.zeros((25, 40), np.uint8), np.zeros((25, 40), np.uint8)
    he[2:5, 30:] = 1
    her2[10:20, 3:7] = 3
    covered = np.ones((100, 160), np.bool_)
    covered[:, :8] = False
    data = pack(he, her2, (None, covered), (100, 160), 0.5)
    found = unpack(data, (100, 160))
    assert found is not None
    first, second = found
    np.testing.assert_array_equal(first, np.kron(he, np.ones((4, 4), np.uint8)))
    expected = np.kron(her2, np.ones((4, 4), np.uint8))
    expected[:, :8] = UNCOVERED
    np.testing.assert_array_equal(second, expected)


def test_the_pixels_of_a_tile_have_the_number_at_their_centres() -> None:
    height, width, mpp = 100, 160, 0.46
    rows, columns = 23, 37
    he = (np.arange(rows * columns) % 7).astype(np.uint8).reshape(rows, columns)
    found = unpack(pack(he, None, (None, None), (height, width), mpp), (height, width))
    assert found is not None
    y = ((np.arange(height) + 0.5) * rows / height).astype(int)
    x = ((np.arange(width) + 0.5) * columns / width).astype(int)
    np.testing.assert_array_equal(found[0], he[np.ix_(y, x)])


def test_a_tile_that_excludes_nothing_stores_nothing() -> None:
    assert pack(None, None, (None, None), (100, 160), 0.5) is None
    assert pack(np.zeros((25, 40), np.uint8), None, (None, None), (100, 160), 0.5) is None
    assert unpack(None, (100, 160)) is None
