"""Tests of hemera.masks.quantification."""

from __future__ import annotations

import numpy as np
import pytest

from hemera.masks.quantification import SCORES, h_scores, quantify, scores


def test_h_score_by_hand() -> None:
    """20 weak, 30 moderate, 10 strong of 100 cells: 20 + 60 + 30."""
    assert h_scores(np.array([[35, 5, 20, 30, 10], [0, 0, 0, 0, 7]])).tolist() == [110.0, 300.0]


@pytest.mark.parametrize(
    ("counts", "score"),
    [
        ((89, 0, 0, 0, 11), "3+"),
        ((80, 0, 0, 10, 10), "2+"),  # exactly 10 % is not more; strong cells are also moderate
        ((85, 0, 5, 0, 10), "1+"),
        ((85, 0, 15, 0, 0), "1+"),
        ((90, 0, 10, 0, 0), "ultralow"),
        ((50, 50, 0, 0, 0), "ultralow"),
        ((98, 2, 0, 0, 0), "ultralow"),
        ((99, 1, 0, 0, 0), "0"),
        ((100, 0, 0, 0, 0), "0"),
    ],
)
def test_score_of_counted_cells(counts: tuple[int, ...], score: str) -> None:
    assert SCORES[scores(np.array([counts]))[0]] == score


def _case(
    rng: np.random.Generator, tiles: int
) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """Return counts and density sums of a case's tiles, and its true H-score and density.

    Each tile has a mixture of classes of its own around that of the case, so that the cells of a
    tile are not independent.
    """
    mixture = rng.dirichlet([2, 0.5, 1, 1, 1])
    density = np.array([0.01, 0.03, 0.1, 0.25, 0.5])
    cells = rng.poisson(rng.gamma(4, 40, tiles)) + 1
    of_tiles = rng.dirichlet(mixture * rng.choice([3, 10, 30]) + 1e-3, tiles)
    counts = np.array([rng.multinomial(n, p) for n, p in zip(cells, of_tiles, strict=True)])
    sums = counts @ density + 0.05 * np.sqrt(cells) * rng.standard_normal(tiles)
    return counts, sums, (float(mixture @ (0, 0, 100, 200, 300)), float(mixture @ density))


def test_intervals_contain_the_truth_as_often_as_they_claim() -> None:
    """90 % intervals of 400 simulated cases of 4 to 40 tiles: 85 to 95 % contain the truth."""
    rng = np.random.default_rng(3)
    inside = []
    for number in range(400):
        counts, sums, truth = _case(rng, int(rng.integers(4, 41)))
        found = quantify(counts, sums, seed=number, samples=400)
        assert found is not None
        intervals = (found.h_score, found.membrane_od)
        inside.append([i.low <= true <= i.high for i, true in zip(intervals, truth, strict=True)])
    covered = np.mean(inside, axis=0)
    assert ((covered >= 0.85) & (covered <= 0.95)).all(), covered


def test_probabilities_of_a_case_between_two_scores() -> None:
    """Half of the tiles 9 % strong, half 12 %: the case is near the limit of 3+, and says so."""
    counts = np.array([[85, 0, 0, 6, 9], [82, 0, 0, 6, 12]] * 4)
    found = quantify(counts, np.zeros(8), seed=1)
    assert found is not None
    assert found.score == "3+"
    assert sum(found.probabilities) == pytest.approx(1)
    # 2+ where at least six of eight drawn tiles are the weak kind; binomial: 37 / 256.
    assert found.probabilities[3] == pytest.approx(37 / 256, abs=0.04)
    assert found.probabilities[4] == pytest.approx(219 / 256, abs=0.04)


def test_no_cells_are_no_score() -> None:
    assert quantify(np.zeros((3, 5), np.int64), np.zeros(3), seed=1) is None


def test_tiles_without_cells_and_single_units() -> None:
    counts = np.zeros((6, 5), np.int64)
    counts[2] = (1, 0, 0, 0, 3)
    found = quantify(counts, np.array([0, 0, 2.0, 0, 0, 0]), seed=1)
    assert found is not None
    assert (found.cells, found.score, found.membrane_od.value) == (4, "3+", 0.5)
    assert found.h_score.low == found.h_score.high == 225.0
