"""Matches and agreement of engines against numbers worked out by hand."""

import numpy as np
import pytest

from hemera.masks import agreement, label_format


def cells(places: list[tuple[float, float]], positive: list[bool]) -> label_format.Cells:
    """Return cells of which only place and sign matter."""
    count = len(places)
    x, y = np.array(places, np.float32).reshape(-1, 2).T
    return label_format.Cells(
        x,
        y,
        np.full(count, 40, np.int32),
        np.array(positive, bool),
        np.zeros(count, np.uint8),
        *[np.zeros(count, np.float32)] * 4,
    )


def test_points_match_only_when_each_is_the_others_nearest() -> None:
    first = np.array([[0.0, 0.0], [10.0, 0.0], [30.0, 5.0], [50.0, 50.0]])
    second = np.array([[30.0, 7.0], [1.0, 0.0], [8.0, 0.0], [9.5, 0.0]])
    # 8 and 9.5 are both near 10, which has one partner; (50, 50) has none near
    np.testing.assert_array_equal(agreement.matched(first, second, 4.0), [1, 3, 0, -1])
    np.testing.assert_array_equal(agreement.matched(first, second, 1.5), [1, 3, -1, -1])
    for empty in (first[:0], np.zeros((0, 2))):
        assert agreement.matched(empty, second, 4.0).shape == (0,)
    np.testing.assert_array_equal(agreement.matched(first, second[:0], 4.0), [-1] * 4)


def test_dice_of_masks() -> None:
    first, second = np.zeros((4, 6), bool), np.zeros((4, 6), bool)
    assert agreement.dice(first, second) == 1
    first[0, :4] = True
    assert agreement.dice(first, second) == 0
    second[0, 2:6] = True
    assert agreement.dice(first, second) == 0.5


def test_signs_are_compared_of_matched_cells_within_4_um() -> None:
    first = cells([(10, 10), (40, 10), (70, 10), (10, 60)], [True, True, False, False])
    second = cells([(42, 10), (11, 11), (70, 17), (90, 90)], [False, True, False, True])
    # at 0.5 um/px 4 um are 8 px: three match, the second of them of another sign
    assert agreement.sign_agreement(first, second, 0.5) == (pytest.approx(2 / 3), 3)
    assert agreement.sign_agreement(first, second, 1.0) == (0.5, 2)
    assert agreement.sign_agreement(first, cells([], []), 0.5) == (None, 0)


def test_the_verdict_is_that_of_the_lower_agreement() -> None:
    assert agreement.suitability(0.7, 0.7) == "suitable"
    assert agreement.suitability(0.9, 0.69) == "doubtful"
    assert agreement.suitability(0.39, 1.0) == "unsuitable"
    for unknown in (None, float("nan")):
        assert agreement.suitability(0.8, unknown) == "suitable"
        assert agreement.suitability(0.3, unknown) == "unsuitable"
