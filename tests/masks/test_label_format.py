"""The label byte against hand-made pictures and DESIGN's bit layout."""

import itertools

import numpy as np

from hemera.masks import label_format


def test_every_combination_has_its_own_byte_and_comes_back() -> None:
    cells = np.array(list(itertools.product(range(4), (False, True), range(4))))
    classes, nucleus, intensity = (cells[:, k].reshape(4, 8) for k in range(3))
    mask = label_format.pack(classes, nucleus.astype(bool), intensity)
    assert mask.dtype == np.uint8
    assert len(np.unique(mask)) == 32
    assert mask.max() < 32
    np.testing.assert_array_equal(label_format.classes(mask), classes)
    np.testing.assert_array_equal(label_format.nuclei(mask), nucleus.astype(bool))
    np.testing.assert_array_equal(label_format.intensity(mask), intensity)


def test_bits_stand_where_the_design_says() -> None:
    one = np.array([[1]])
    assert label_format.pack(one * 3, one.astype(bool), one * 2).item() == 0b10111
    assert label_format.pack(one * 0, one.astype(bool), one * 0).item() == 0b00100
    assert label_format.pack(one * 0, ~one.astype(bool), one * 3).item() == 0b11000


def test_positive_takes_its_boundary_by_eight_neighbours_and_no_other() -> None:
    classes = np.array(
        [
            [3, 0, 0, 0, 0, 0, 0],
            [0, 2, 3, 1, 3, 0, 3],
            [0, 3, 0, 3, 3, 0, 0],
            [3, 0, 0, 0, 0, 2, 0],
        ],
        dtype=np.uint8,
    )
    expected = np.array(
        [
            [1, 0, 0, 0, 0, 0, 0],
            [0, 1, 1, 0, 0, 0, 0],
            [0, 1, 0, 0, 1, 0, 0],
            [0, 0, 0, 0, 0, 1, 0],
        ],
        dtype=bool,
    )
    # the other bits must not disturb the class
    mask = label_format.pack(classes, np.ones(classes.shape, bool), np.full(classes.shape, 3))
    np.testing.assert_array_equal(label_format.positive(mask), expected)


def test_contours_are_one_pixel_wide_inside_cells_and_single_between_them() -> None:
    labels = np.zeros((7, 11), np.int32)
    labels[1:6, 1:5] = 1
    labels[1:6, 5:10] = 2
    expected = np.zeros((7, 11), bool)
    expected[1, 1:10] = expected[5, 1:10] = True
    expected[1:6, 1] = expected[1:6, 9] = True
    expected[1:6, 5] = True  # the side of cell 2 alone
    np.testing.assert_array_equal(label_format.boundaries(labels), expected)


def test_the_edge_of_the_image_is_no_contour() -> None:
    assert not label_format.boundaries(np.ones((4, 6), np.int32)).any()


def test_excluded_pixels_have_no_other_bit_and_their_cells_are_gone() -> None:
    one, densities = np.ones(2, np.float32), np.array([0.5, 0.25], np.float32)
    cells = label_format.Cells(
        np.array([1.5, 4.5], np.float32), np.array([0.5, 1.5], np.float32),
        np.array([2, 3], np.int32), np.array([True, False]), np.array([3, 1], np.uint8), one,
        densities, densities / 2, np.full(2, np.nan, np.float32),
    )  # fmt: skip
    classes = np.array([[2, 2, 0, 1, 1], [2, 2, 0, 1, 1]])
    found = label_format.Labelled(label_format.pack(classes, classes > 0, classes), cells)
    where = np.zeros((2, 5), np.bool_)
    where[:, :3] = True
    kept = label_format.exclude(found, where)
    assert (label_format.excluded(kept.mask) == where).all()
    assert not label_format.excluded(found.mask).any()
    assert kept.mask[where].tolist() == [32] * 6
    assert (kept.mask[:, 3:] == found.mask[:, 3:]).all()
    assert kept.cells.x_px.tolist() == [4.5]
    counted = label_format.statistics(kept)
    assert (counted["excluded_fraction"], counted["cells"]) == (0.6, 1)
    # The cell that is left is weak: 100 %, once.
    assert (counted["h_score"], counted["membrane_od"], counted["cytoplasm_od"]) == (
        100,
        0.25,
        0.125,
    )


def test_without_cells_there_is_no_score_and_no_density() -> None:
    counted = label_format.statistics(label_format.blank((4, 6)))
    assert [counted[name] for name in ("h_score", "membrane_od", "cytoplasm_od")] == [None] * 3
    assert counted["positive_fraction"] == 0
