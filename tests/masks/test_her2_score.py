"""HER2 scores and H-scores against numbers worked out by hand; intervals against a known truth."""

import numpy as np
import pytest
from scipy import stats

from hemera.masks.her2_score import CLASSES, h_scores, her2_scores, staining


@pytest.mark.parametrize(
    ("counts", "score"),
    [
        ((89, 0, 0, 11), "3+"),
        ((90, 0, 0, 10), "ultralow"),
        ((90, 0, 10, 0), "ultralow"),
        ((89, 0, 11, 0), "2+"),
        ((80, 5, 6, 9), "2+"),
        ((90, 5, 3, 2), "ultralow"),
        ((89, 11, 0, 0), "1+"),
        ((9, 1, 0, 0), "ultralow"),
        ((8, 1, 1, 0), "1+"),
        ((0, 0, 0, 3), "3+"),
        ((98, 2, 0, 0), "ultralow"),
        ((99, 1, 0, 0), "0"),
    ],
)
def test_a_score_needs_more_than_a_tenth(counts: tuple[int, ...], score: str) -> None:
    assert CLASSES[her2_scores(np.array([counts]))[0]] == score


def test_no_cell_has_no_score() -> None:
    nothing = np.zeros((1, 4), np.int64)
    assert her2_scores(nothing).tolist() == [-1]
    assert np.isnan(h_scores(nothing)).all()
    found = staining(np.zeros((5, 4), np.int64), np.zeros(5), seed=1)
    assert np.isnan([*found.h_score, *found.membrane_od, *found.probabilities]).all()


def test_few_intense_cells_are_2_only_with_that_clause() -> None:
    assert her2_scores(np.array([(95, 0, 0, 5)]), 0.0).tolist() == [3]
    assert her2_scores(np.array([(995, 0, 0, 5)]), 0.01).tolist() == [0]


def test_h_score_by_hand() -> None:
    """20 weak, 30 moderate, 10 strong of 100 cells: 20 + 60 + 30."""
    assert h_scores(np.array([[40, 20, 30, 10], [0, 0, 0, 7]])).tolist() == [110.0, 300.0]


def test_intervals_contain_the_truth_as_often_as_they_claim() -> None:
    """90 % intervals of 400 cases of 4 to 40 tiles: 85 to 95 % contain the truth of the case.

    Each tile has a mixture of intensities of its own around that of the case, so that the cells of
    a tile are not independent.
    """
    rng = np.random.default_rng(3)
    inside = np.zeros(2)
    for number in range(400):
        mixture = rng.dirichlet([2, 1, 1, 1])
        cells = rng.poisson(rng.gamma(4, 40, rng.integers(4, 41))) + 1
        of_tiles = rng.dirichlet(mixture * rng.choice([3, 10, 30]) + 1e-3, len(cells))
        counts = np.array([rng.multinomial(n, p) for n, p in zip(cells, of_tiles, strict=True)])
        densities = counts @ (0, 0.05, 0.15, 0.4)
        found = staining(counts, densities, seed=number, samples=400)
        inside += [
            estimate.low <= true <= estimate.high
            for estimate, true in (
                (found.h_score, mixture @ (0, 100, 200, 300)),
                (found.membrane_od, mixture @ (0, 0.05, 0.15, 0.4)),
            )
        ]
    assert (inside >= 0.85 * 400).all() and (inside <= 0.95 * 400).all()


def test_intervals_of_few_stained_cells_contain_the_truth() -> None:
    """Ultralow: 1 to 10 % weak cells, in few of the tiles; and cases without any."""
    rng = np.random.default_rng(4)
    inside = 0
    for number in range(300):
        true = rng.uniform(0.01, 0.10)
        cells = rng.poisson(100, rng.integers(4, 13)) + 1
        weak = rng.binomial(cells, rng.beta(true * 12, (1 - true) * 12, len(cells)))
        counts = np.column_stack([cells - weak, weak, 0 * weak, 0 * weak])
        found = staining(counts, 0.1 * weak, seed=number, samples=400)
        inside += found.h_score.low <= 100 * true <= found.h_score.high
    assert 0.85 * 300 <= inside <= 0.98 * 300
    unstained = staining(np.array([[100, 0, 0, 0]] * 6), np.zeros(6), seed=1)
    assert unstained.h_score[:2] == (0, 0)
    assert 0 < unstained.h_score.high < 15
    assert unstained.membrane_od[:2] == (0, 0)
    assert 0 < unstained.membrane_od.high < 0.01
    assert 0.5 < unstained.probabilities[0] < 1


@pytest.mark.parametrize(
    ("blocks", "cells", "parts"), [(4, 1000, 1), (6, 100, 1), (8, 300, 1), (4, 20, 1), (4, 75, 4)]
)
def test_a_case_without_a_stained_cell_is_most_probably_0(
    blocks: int, cells: int, parts: int
) -> None:
    """Also of one tile in quarters. A quarter of the prior cell is stained."""
    found = staining(np.array([[cells, 0, 0, 0]] * blocks), np.zeros(blocks), seed=1, parts=parts)
    assert CLASSES[int(np.argmax(found.probabilities))] == "0"
    assert found.probabilities[0] > 0.6
    # Cells with a correlation of 0.05 within a tile are worth so many independent ones.
    effective = blocks * cells / (1 + (parts * cells - 1) * 0.05)
    stained = stats.beta(0.25, effective + 0.75)
    assert found.probabilities[0] == pytest.approx(stained.cdf(0.01), abs=0.03)
    assert found.probabilities[1] == pytest.approx(stained.cdf(0.1) - stained.cdf(0.01), abs=0.03)
    assert sum(found.probabilities[2:]) == pytest.approx(stained.sf(0.1), abs=0.01)
    if effective > 60:
        assert sum(found.probabilities[2:]) < 0.01


@pytest.mark.parametrize("tiles", [1, 2, 3])
def test_intervals_of_quarters_allow_for_their_correlation(tiles: int) -> None:
    """Quarters of a tile vary by 0.6 of the variance, and tiles by 0.4 of it."""
    rng = np.random.default_rng(5)
    inside = inside_od = 0
    for number in range(300):
        true = rng.uniform(0.2, 0.8)
        of_tile = 0.4**0.5 * rng.normal(size=(tiles, 1)) + 0.6**0.5 * rng.normal(size=(tiles, 4))
        weak = rng.binomial(60, (true + 0.08 * of_tile).clip(0, 1)).ravel()
        counts = np.column_stack([60 - weak, weak, 0 * weak, 0 * weak])
        found = staining(counts, 0.1 * weak, seed=number, parts=4, samples=400)
        inside += found.h_score.low <= 100 * true <= found.h_score.high
        inside_od += found.membrane_od.low <= 0.1 * true <= found.membrane_od.high
    assert min(inside, inside_od) >= 0.85 * 300


def test_the_density_of_a_case_without_a_stained_cell_may_be_that_of_weak_ones() -> None:
    found = staining(np.array([[50, 0, 0, 0]] * 4), np.zeros(4), seed=1)
    assert (found.membrane_od.value, found.membrane_od.low) == (0, 0)
    assert found.membrane_od.high == pytest.approx(0.07 * found.h_score.high / 100)
    assert found.h_score.high > 0


def test_the_density_is_at_least_as_uncertain_as_the_h_score() -> None:
    """Eight equal blocks do not differ, and yet the case has a tenth of stained cells by chance."""
    counts = np.array([[18, 1, 1, 0]] * 8)
    found = staining(counts, 0.3 * counts[:, 1:].sum(axis=1), seed=1)
    for end in ("low", "high"):
        density, score = (getattr(x, end) / x.value for x in (found.membrane_od, found.h_score))
        assert density == pytest.approx(score)


def test_probabilities_of_a_case_between_two_scores() -> None:
    """Half of eight tiles 9 % strong, half 12 %: 3+ above a tenth.

    800 cells whose correlation is 0.05 are worth 800 / (1 + 99 * 0.05) = 134.5 of independent ones.
    14.12 of them are strong, and a quarter of the prior cell.
    """
    found = staining(np.array([[85, 0, 6, 9], [82, 0, 6, 12]] * 4), np.zeros(8), seed=1)
    assert sum(found.probabilities) == pytest.approx(1)
    expected = stats.beta.sf(0.1, 14.12 + 0.25, 134.5 - 14.12 + 0.75)
    assert found.probabilities[4] == pytest.approx(expected, abs=0.03)


def test_three_blocks_have_values_without_intervals() -> None:
    found = staining(np.array([[1, 0, 0, 3]] * 3), np.full(3, 1.0), seed=1)
    assert (found.h_score.value, found.membrane_od.value) == (225, 0.25)
    assert np.isnan([*found.h_score[1:], *found.membrane_od[1:], *found.probabilities]).all()


def test_densities_that_were_not_measured_have_no_interval() -> None:
    found = staining(np.array([[1, 0, 0, 3]] * 5), np.full(5, np.nan), seed=1)
    assert np.isnan(found.membrane_od).all()
    assert found.h_score.value == 225
    assert 0 < found.h_score.low < 225 < found.h_score.high < 300
