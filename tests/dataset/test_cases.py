"""Cases of the HER2 status: labels, exclusion, folds, the same image twice."""

import collections
from pathlib import Path

import pytest

from hemera.config import CasesOptions
from hemera.dataset import cases
from hemera.errors import LeakageError, SheetError
from hemera.sheet import Pair


def pair(name, case=None, **values):
    return Pair(
        pair=name, case=case or name, dataset=values.pop("dataset", "d"), he=Path(f"{name}.tif"),
        **values,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("values", "equivocal", "expected"),
    [
        ({"score": "0"}, "drop", ("0", "negative", "score")),
        ({"score": "1+"}, "drop", ("1+", "negative", "score")),
        ({"score": "3+"}, "drop", ("3+", "positive", "score")),
        ({"score": "2+"}, "drop", ("2+", "", "")),
        ({"score": "2+"}, "positive", ("2+", "positive", "score")),
        ({"score": "2+"}, "negative", ("2+", "negative", "score")),
        ({"score": "2+", "status": "positive"}, "drop", ("2+", "positive", "status")),
        ({"score": "3+", "status": "negative"}, "drop", ("3+", "negative", "status")),
        ({"status": "negative"}, "drop", ("", "negative", "status")),
        ({}, "drop", ("", "", "")),
    ],
)
def test_a_status_of_the_sheet_goes_before_the_score(values, equivocal, expected, caplog):
    found = cases.label([pair("p", **values)], equivocal)
    assert (found.score, found.status, found.source) == expected
    contradictory = values == {"score": "3+", "status": "negative"}
    assert ("contradict each other; the status is used" in caplog.text) == contradictory


def test_a_case_with_two_scores_is_an_error():
    with pytest.raises(SheetError, match=r"case c: score 1\+ and 3\+"):
        cases.label([pair("p", "c", score="1+"), pair("q", "c", score="3+")], "drop")


def test_why_a_case_is_not_used():
    pairs = [
        pair("used", score="3+", site="north"),
        pair("more", "used", site="north"),
        pair("open", score="2+"),
        pair("bare"),
        pair("few", score="0"),
        pair("none", score="0"),
        pair("kept", score="0", split="test"),
    ]
    tiles = {"used": 3, "more": 2, "open": 9, "bare": 9, "few": 3, "kept": 4}
    rows = {row["case"]: row for row in cases.build(pairs, tiles, CasesOptions(min_tiles=4))}
    assert {name: row["state"] for name, row in rows.items()} == {
        "used": "used", "open": "equivocal", "bare": "unlabelled", "few": "too_few",
        "none": "no_tiles", "kept": "used",
    }  # fmt: skip
    assert rows["used"]["he_tiles"] == 5 and rows["used"]["pairs"] == 2
    assert rows["used"]["site"] == "north" and rows["open"]["site"] is None
    # A case with a score and without a status has a fold, for the score.
    folds = {name for name, row in rows.items() if row["fold"] is not None}
    assert folds == {"used", "open"}
    assert "3 H&E tiles" in rows["few"]["reason"] and rows["used"]["reason"] is None


def test_folds_have_equal_fractions_of_site_and_label():
    scores = ("0", "1+", "2+", "3+")
    pairs = [
        pair(f"p{k:03d}", score=scores[k % 4], site=("a", "b")[k // 4 % 2]) for k in range(160)
    ]
    rows = cases.build(pairs, {each.pair: 5 for each in pairs}, CasesOptions(folds=4))
    count = collections.Counter((row["fold"], row["score"], row["site"]) for row in rows)
    assert set(count.values()) == {5} and len(count) == 4 * 8
    again = cases.build(pairs[::-1], {each.pair: 5 for each in pairs}, CasesOptions(folds=4))
    assert again == rows


def test_the_fingerprint_is_of_labels_and_folds():
    pairs = [pair(f"p{k}", score="3+" if k % 2 else "0") for k in range(20)]
    tiles = {each.pair: 5 for each in pairs}
    rows = cases.build(pairs, tiles, CasesOptions())
    mark = cases.fingerprint(rows)
    assert cases.fingerprint(reversed(rows)) == mark
    assert cases.fingerprint([{**rows[0], "status": "positive"}, *rows[1:]]) != mark
    assert cases.fingerprint(cases.build(pairs, tiles, CasesOptions(seed=1))) != mark


def test_one_image_of_two_cases_is_a_leak():
    cases.check_images([("a", "c1", "x"), ("a", "c1", "y"), ("b", "c2", "z")])
    with pytest.raises(LeakageError, match="z of case c2 is the image x of case c1"):
        cases.check_images([("a", "c1", "x"), ("a", "c2", "z")])
