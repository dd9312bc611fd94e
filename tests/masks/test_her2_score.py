"""Matches, agreement and the ASCO/CAP reading against numbers worked out by hand."""

import numpy as np
import pytest

from hemera.masks import her2_score, label_format


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
        np.zeros(count, np.float32),
    )


def test_points_match_only_when_each_is_the_others_nearest() -> None:
    first = np.array([[0.0, 0.0], [10.0, 0.0], [30.0, 5.0], [50.0, 50.0]])
    second = np.array([[30.0, 7.0], [1.0, 0.0], [8.0, 0.0], [9.5, 0.0]])
    # 8 and 9.5 are both near 10, which has one partner; (50, 50) has none near
    np.testing.assert_array_equal(her2_score.matched(first, second, 4.0), [1, 3, 0, -1])
    np.testing.assert_array_equal(her2_score.matched(first, second, 1.5), [1, 3, -1, -1])
    for empty in (first[:0], np.zeros((0, 2))):
        assert her2_score.matched(empty, second, 4.0).shape == (0,)
    np.testing.assert_array_equal(her2_score.matched(first, second[:0], 4.0), [-1] * 4)


def test_dice_of_masks() -> None:
    first, second = np.zeros((4, 6), bool), np.zeros((4, 6), bool)
    assert her2_score.dice(first, second) == 1
    first[0, :4] = True
    assert her2_score.dice(first, second) == 0
    second[0, 2:6] = True
    assert her2_score.dice(first, second) == 0.5


def test_signs_are_compared_of_matched_cells_within_4_um() -> None:
    first = cells([(10, 10), (40, 10), (70, 10), (10, 60)], [True, True, False, False])
    second = cells([(42, 10), (11, 11), (70, 17), (90, 90)], [False, True, False, True])
    # at 0.5 um/px 4 um are 8 px: three match, the second of them of another sign
    assert her2_score.sign_agreement(first, second, 0.5) == (pytest.approx(2 / 3), 3)
    assert her2_score.sign_agreement(first, second, 1.0) == (0.5, 2)
    assert her2_score.sign_agreement(first, cells([], []), 0.5) == (None, 0)


def test_the_verdict_is_that_of_the_lower_agreement() -> None:
    assert her2_score.suitability(0.7, 0.7) == "suitable"
    assert her2_score.suitability(0.9, 0.69) == "doubtful"
    assert her2_score.suitability(0.39, 1.0) == "unsuitable"
    for unknown in (None, float("nan")):
        assert her2_score.suitability(0.8, unknown) == "suitable"
        assert her2_score.suitability(0.3, unknown) == "unsuitable"


@pytest.mark.parametrize(
    ("counts", "score"),
    [
        ((89, 0, 0, 11), "3+"),
        ((90, 0, 10, 0), "0"),
        ((89, 0, 11, 0), "2+"),
        ((80, 5, 6, 9), "2+"),
        ((90, 5, 3, 2), "0"),
        ((89, 11, 0, 0), "1+"),
        ((0, 0, 0, 3), "3+"),
        ((900, 100, 0, 0), "0"),
        ((0, 0, 0, 0), ""),
    ],
)
def test_the_reading_is_asco_caps_with_a_strict_tenth(
    counts: tuple[int, int, int, int], score: str
) -> None:
    assert her2_score.reading(counts) == score


def test_exactly_a_tenth_is_not_more() -> None:
    assert her2_score.reading((90, 0, 0, 10)) == "0"
    assert her2_score.reading((9, 1, 0, 0)) == "0"
    assert her2_score.reading((8, 1, 1, 0)) == "1+"


def test_few_intense_cells_are_2_only_where_that_clause_is_asked_for() -> None:
    assert her2_score.reading((95, 0, 0, 5)) == "0"
    assert her2_score.reading((95, 0, 0, 5), intense_share=0.0) == "2+"
    assert her2_score.reading((995, 0, 0, 5), intense_share=0.01) == "0"
