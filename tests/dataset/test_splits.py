"""Splits and draws: by hand, by share, stable, and never the same case on both sides."""

import collections
import hashlib

import numpy as np
import pytest

from hemera.dataset.splits import check_leakage, draw, split_cases
from hemera.errors import LeakageError
from hemera.sheet import SPLITS

SCORES = ("0", "1+", "2+", "3+")


def cohort(count: int, dataset: str = "bci") -> dict[str, tuple[str, str, str]]:
    """Cases of all scores in unequal numbers: 10, 20, 30 and 40 of a hundred."""
    score = ["0"] * 10 + ["1+"] * 20 + ["2+"] * 30 + ["3+"] * 40
    return {f"{dataset}{number:04d}": (dataset, score[number % 100], "") for number in range(count)}


def split(
    cases: dict[str, tuple[str, str, str]], seed: int = 1, val: float = 0.15, test: float = 0.15
) -> dict[str, str]:
    return split_cases(cases, seed=seed, val_fraction=val, test_fraction=test)


def counts(splits: dict[str, str]) -> dict[str, int]:
    return dict(collections.Counter(splits.values()))


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, {}),
        (1, {"train": 1}),
        (2, {"train": 1, "val": 1}),
        (3, {"train": 1, "val": 1, "test": 1}),
        (4, {"train": 2, "val": 1, "test": 1}),
        (10, {"train": 6, "val": 2, "test": 2}),
        (20, {"train": 14, "val": 3, "test": 3}),
        (200, {"train": 140, "val": 30, "test": 30}),
    ],
)
def test_few_cases(count: int, expected: dict[str, int]) -> None:
    assert counts(split(cohort(count))) == expected


@pytest.mark.parametrize("count", range(3, 12))
@pytest.mark.parametrize(("val", "test"), [(0.6, 0.35), (0.0, 0.99), (0.99, 0.0), (0.5, 0.49)])
def test_something_is_left_to_train_on(count: int, val: float, test: float) -> None:
    found = counts(split(cohort(count), val=val, test=test))
    assert found.get("train", 0) >= 1
    assert ("val" in found) == (val > 0)
    assert ("test" in found) == (test > 0)


def test_each_part_holds_each_score_in_its_share() -> None:
    cases = cohort(400)
    splits = split(cases)
    for part, size in (("val", 60), ("test", 60), ("train", 280)):
        found = collections.Counter(cases[case][1] for case in cases if splits[case] == part)
        for score, share in zip(SCORES, (0.1, 0.2, 0.3, 0.4), strict=True):
            assert abs(found[score] - share * size) <= 1, (part, score)


def test_a_split_that_the_sheet_names_is_kept() -> None:
    cases = cohort(40)
    named = {name: (*cases[name][:2], part) for name, part in zip(cases, SPLITS * 3, strict=False)}
    splits = split({**cases, **named})
    assert {name: splits[name] for name in named} == {name: named[name][2] for name in named}
    free = {name: part for name, part in splits.items() if name not in named}
    assert set(free.values()) == {"train"}, "val and test are the sheet's own"


def test_a_data_set_with_its_own_test_gets_no_further() -> None:
    """BCI: its released test cases stay alone, and validation is drawn from the rest."""
    cases = cohort(100)
    released = {f"t{number}": ("bci", "1+", "test") for number in range(25)}
    splits = split({**cases, **released, **cohort(100, "acrobat")})
    assert {name for name, part in splits.items() if part == "test" and name[0] != "a"} == set(
        released
    )
    bci = {name: splits[name] for name in cases}
    assert counts(bci) == {"train": 85, "val": 15}
    assert counts({k: v for k, v in splits.items() if k[0] == "a"})["test"] == 15


def test_the_seed_counts_and_the_order_of_the_sheet_does_not() -> None:
    cases = cohort(90)
    assert split(cases, seed=1) == split(dict(reversed(cases.items())), seed=1)
    assert split(cases, seed=1) != split(cases, seed=2)


def test_an_added_case_moves_few() -> None:
    cases = cohort(200)
    before = split(cases)
    moved = []
    for number in range(30):
        after = split({**cases, f"new{number}": ("bci", SCORES[number % 4], "")})
        moved.append(sum(after[name] != before[name] for name in before))
    assert np.mean(moved) <= 2
    assert max(moved) <= 6


def test_draw_all_none_and_some() -> None:
    tiles = [f"t{number}" for number in range(100)]
    for count, expected in ((None, 100), (0, 0), (30, 30), (500, 100)):
        assert draw(tiles, count, seed=1, purpose="x").sum() == expected
    assert draw([], 5, seed=1, purpose="x").shape == (0,)


def test_draw_ranks_by_the_documented_hash() -> None:
    tiles = ["c", "a", "d", "b", "e"]
    order = sorted(
        tiles, key=lambda tile: hashlib.sha256(f"7/generation/val/{tile}".encode()).digest()
    )
    chosen = draw(tiles, 2, seed=7, purpose="generation/val")
    assert {tile for tile, taken in zip(tiles, chosen, strict=True) if taken} == set(order[:2])


def test_draws_for_different_ends_are_independent() -> None:
    tiles = [f"t{number}" for number in range(4000)]
    one = draw(tiles, 1000, seed=1, purpose="generation/train")
    two = draw(tiles, 1000, seed=1, purpose="segmentation/train")
    assert 200 < np.count_nonzero(one & two) < 300, "about a quarter of a quarter"


def test_leakage_is_raised() -> None:
    check_leakage([("c1", "1", "2", "train"), ("c1", "3", "4", "train"), ("c2", "5", "6", "val")])
    with pytest.raises(LeakageError, match="case c1: is in train and in val; give"):
        check_leakage([("c1", "1", "2", "train"), ("c1", "3", "4", "val")])
    for second in (("1", "9"), ("9", "2"), ("2", "9"), ("9", "1")):
        with pytest.raises(LeakageError, match=r"source image [12]: is in train and in test"):
            check_leakage([("c1", "1", "2", "train"), ("c2", *second, "test")])
