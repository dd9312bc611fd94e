"""The ASCO/CAP score against numbers worked out by hand."""

import pytest

from hemera.masks.her2_score import asco_cap_score


@pytest.mark.parametrize(
    ("counts", "score"),
    [
        ((89, 0, 0, 11), "3+"),
        ((90, 0, 0, 10), "0"),
        ((90, 0, 10, 0), "0"),
        ((89, 0, 11, 0), "2+"),
        ((80, 5, 6, 9), "2+"),
        ((90, 5, 3, 2), "0"),
        ((89, 11, 0, 0), "1+"),
        ((9, 1, 0, 0), "0"),
        ((8, 1, 1, 0), "1+"),
        ((0, 0, 0, 3), "3+"),
        ((900, 100, 0, 0), "0"),
        ((0, 0, 0, 0), ""),
    ],
)
def test_the_score_counts_strictly_more_than_a_tenth(
    counts: tuple[int, int, int, int], score: str
) -> None:
    assert asco_cap_score(counts) == score


def test_few_intense_cells_are_2_only_with_that_clause() -> None:
    assert asco_cap_score((95, 0, 0, 5)) == "0"
    assert asco_cap_score((95, 0, 0, 5), intense_fraction=0.0) == "2+"
    assert asco_cap_score((995, 0, 0, 5), intense_fraction=0.01) == "0"
