"""Gate, fusion and rules on grids of 3 x 3 views."""

import math

import numpy as np
import pytest

from hemera.masks.view_scores import fuse, grade, view_scores

ONE_HOT = np.eye(4)


def case(scores, *, tumour=1.0, area=0.5, unplaced=()):
    """A grid of 3 x 3 views whose map and classifier agree on the scores."""
    scores = np.asarray(scores).ravel()
    classes = ONE_HOT[scores]
    placed = np.ones(9, bool)
    placed[list(unplaced)] = False
    chances = np.broadcast_to(np.asarray(tumour, float).ravel(), 9).copy()
    return chances, area * classes, classes, placed


NEGATIVE = [[0, 0, 0], [0, 0, 0], [0, 0, 0]]
ONE_STRONG = [[0, 0, 0], [0, 3, 0], [0, 0, 0]]


def test_one_strong_view_of_nine_is_more_than_a_tenth():
    found = grade(*case(ONE_STRONG))
    assert found.score == "3+" and found.fractions.tolist() == pytest.approx([8 / 9, 0, 0, 1 / 9])
    assert (found.tumour, found.voting, found.unplaced) == (9, 9, 0)
    assert found.positive_fraction == pytest.approx(0.5 / 9)


def test_a_small_strong_view_decides_the_maximum_and_not_the_fraction():
    """The view has a fifth of the cell area of the others: 1 of 41 parts."""
    tumour, areas, classes, placed = case(ONE_STRONG)
    areas[4] /= 5
    assert grade(tumour, areas, classes, placed).score == "0"
    assert grade(tumour, areas, classes, placed, rule="paper_max").score == "3+"


def test_exactly_a_tenth_is_not_more():
    """Areas of 9 parts unstained and 1 part strong, in powers of two so that sums are exact."""
    areas = np.array([[9, 0, 0, 1]]) / 16
    arguments = np.array([1.0]), areas, ONE_HOT[[0]], np.array([True])
    assert grade(*arguments, fusion="map").score == "0"
    areas[0, 3] += 1 / 1024
    assert grade(*arguments, fusion="map").score == "3+"


def test_views_without_tumour_do_not_vote():
    tumour = [[1, 1, 1], [1, 0.49, 1], [1, 1, 0.5]]
    found = grade(*case(ONE_STRONG, tumour=tumour))
    assert (found.score, found.tumour, found.voting) == ("0", 8, 8)
    assert grade(*case(ONE_STRONG, tumour=tumour), tumour_min=0.4).score == "3+"


def test_views_whose_stains_are_not_in_register_are_counted_and_do_not_vote():
    found = grade(*case(ONE_STRONG, unplaced=(4,)))
    assert (found.score, found.tumour, found.voting, found.unplaced) == ("0", 9, 8, 1)


def test_views_without_a_cell_do_not_vote():
    tumour, areas, classes, placed = case(ONE_STRONG)
    areas[4] = 0
    found = grade(tumour, areas, classes, placed)
    assert (found.score, found.tumour, found.voting) == ("0", 9, 8)


@pytest.mark.parametrize("rule", ["asco_cap", "paper_max"])
def test_nothing_that_votes_has_no_score(rule):
    for found in (
        grade(*case(ONE_STRONG, tumour=0.2), rule=rule),
        grade(*case(ONE_STRONG, unplaced=range(9)), rule=rule),
        grade(*(values[:0] for values in case(ONE_STRONG)), rule=rule),
    ):
        assert found.score == "" and found.voting == 0
        assert math.isnan(found.positive_fraction) and np.isnan(found.fractions).all()


def test_weak_views_have_no_score_by_the_maximum():
    weak = [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    assert grade(*case(weak)).score == "1+"
    assert grade(*case(weak), rule="paper_max").score == ""
    assert grade(*case([[2, 0, 0], [0, 0, 0], [0, 0, 0]]), rule="paper_max").score == "2+"
    assert grade(*case(NEGATIVE)).score == "0"


def test_of_equal_probabilities_the_higher_score_counts():
    tied = np.array([[0.5, 0.0, 0.5, 0.0], [0.25, 0.25, 0.25, 0.25], [0.4, 0.6, 0.0, 0.0]])
    assert view_scores(tied).tolist() == [2, 3, 1]


def test_fusion_is_the_mean_of_map_and_class():
    areas, classes = np.array([[0.1, 0.0, 0.3, 0.0]]), np.array([[0.0, 0.5, 0.0, 0.5]])
    assert fuse(areas, classes, "map").tolist() == [pytest.approx([0.25, 0, 0.75, 0])]
    assert fuse(areas, classes, "class").tolist() == classes.tolist()
    expected = [pytest.approx([0.125, 0.25, 0.375, 0.25])]
    assert fuse(areas, classes, "mean").tolist() == expected


def test_a_prediction_never_has_more_voting_views_than_tumour_views():
    """The published table compares 53 predicted stain views with 95 annotated ones on 66."""
    tumour = np.r_[np.ones(66), np.zeros(95 - 66)]
    classes = ONE_HOT[np.arange(95) % 4]
    found = grade(tumour, classes / 2, classes, np.ones(95, bool))
    assert (found.tumour, found.voting) == (66, 66)


def test_probabilities_are_those_of_samples_of_the_voting_views():
    """Of nine views each is in a sample of nine with 1 - (8 / 9)^9, and more than a tenth then."""
    found = grade(*case(ONE_STRONG))
    expected = 1 - (8 / 9) ** 9
    assert found.probabilities[3] == pytest.approx(expected, abs=0.03)
    assert found.probabilities[0] == pytest.approx(1 - expected, abs=0.03)
    assert sum(found.probabilities) == pytest.approx(1)
    found = grade(*case([[2, 0, 0], [0, 0, 0], [0, 0, 0]]), rule="paper_max")
    assert found.probabilities[2] == pytest.approx(expected, abs=0.03)
    assert grade(*case(ONE_STRONG, tumour=0.1)).probabilities == (0, 0, 0, 0)
