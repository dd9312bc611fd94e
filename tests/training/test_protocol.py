"""The protocol: nested folds, sites, permuted labels."""

import collections

import pytest

from hemera.config import AggregateOptions
from hemera.dataset.cases import OOF, SHUFFLED, SITE_OUT
from hemera.training.protocol import permute, plan


def case(number, **values):
    score = ("0", "1+", "2+", "3+")[number % 4]
    row = {
        "case": f"c{number:02d}", "dataset": "d", "site": ("a", "b")[number // 4 % 2], "split": "",
        "fold": number % 5, "score": score, "state": "used",
        "status": "positive" if score in ("2+", "3+") else "negative",
    }  # fmt: skip
    return {**row, **values}


ROWS = [case(number) for number in range(40)]
MEAN = AggregateOptions(aggregator="mean", shuffles=3)


def test_every_case_is_judged_once_by_models_that_have_not_seen_it():
    runs = list(plan(ROWS, 5, MEAN))
    for target in ("status", "score"):
        own = [run for run in runs if run.part == OOF and run.target == target]
        judged = [name for run in own for name in run.judged]
        assert sorted(judged) == [row["case"] for row in ROWS]
        for run in own:
            assert not set(run.judged) & set(run.seen)
            assert not set(run.train) & set(run.inner)
            assert len(run.inner) == round(0.15 * 32)
            assert set(run.seen) | set(run.judged) == {row["case"] for row in ROWS}


def test_a_site_is_left_out_whole():
    runs = [run for run in plan(ROWS, 5, MEAN) if run.part == SITE_OUT]
    assert [run.left_out for run in runs] == ["a", "b"]
    sites = {row["case"]: row["site"] for row in ROWS}
    for run in runs:
        assert {sites[name] for name in run.judged} == {run.left_out}
        assert run.left_out not in {sites[name] for name in run.seen}
    alone = [case(number, site="a") for number in range(20)]
    assert not [run for run in plan(alone, 5, MEAN) if run.part == SITE_OUT]


def test_test_cases_and_unlabelled_ones_are_never_trained_on():
    rows = [
        case(number, split="test", fold=None) if number < 8 else case(number)
        for number in range(40)
    ]
    rows[20] = case(20, status=None)
    out = {row["case"] for row in rows if row["fold"] is None}
    for run in plan(rows, 5, MEAN):
        assert not out & {*run.seen, *run.judged}
        if run.target == "status":
            assert "c20" not in {*run.seen, *run.judged}
        else:
            assert "c20" in {*run.seen, *run.judged}


def test_labels_are_permuted_within_sites_and_folds_drawn_anew():
    permuted = permute(ROWS, 0, 1)
    assert permuted != ROWS
    count = collections.Counter((row["site"], row["status"]) for row in ROWS)
    assert collections.Counter((row["site"], row["status"]) for row in permuted) == count
    assert permute(ROWS, 0, 1) == permuted and permute(ROWS, 1, 1) != permuted
    runs = [run for run in plan(ROWS, 5, MEAN) if run.part == SHUFFLED]
    assert collections.Counter(run.repeat for run in runs) == {0: 5, 1: 5, 2: 5}
    for run in runs:
        assert not set(run.judged) & set(run.seen)


@pytest.mark.parametrize("aggregator", ["abmil"])
def test_only_the_cheapest_aggregator_is_repeated_with_permuted_labels(aggregator):
    runs = plan(ROWS, 5, AggregateOptions(aggregator=aggregator))
    assert SHUFFLED not in {run.part for run in runs}
