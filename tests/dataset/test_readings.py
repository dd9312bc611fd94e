"""Method cells: the ASCO/CAP score of counted cells, and what is refused."""

import json

import pytest

from hemera import tables
from hemera.dataset.readings import Readings, read_cases
from hemera.files import layout
from tests.small_status import case_rows, run_method, write_readings, write_status

NONE, WEAK, MODERATE, STRONG = (100, 0, 0, 0), (50, 50, 0, 0), (50, 0, 50, 0), (50, 0, 0, 50)


@pytest.fixture
def readings(tmp_path):
    counts = {
        "none": [NONE] * 4, "weak": [WEAK] * 4, "moderate": [MODERATE] * 4, "strong": [STRONG] * 4,
        # 40 of 400 are not more than 10 %, 41 are.
        "ten": [(80, 10, 0, 10)] * 4, "eleven": [(90, 0, 0, 10)] * 3 + [(89, 0, 0, 11)],
        "ultralow": [(98, 2, 0, 0)] * 4, "one_tile": [STRONG], "few": [(20, 0, 0, 4)] * 4,
        "blurred": [STRONG] * 4,
    }  # fmt: skip
    write_readings(tmp_path, counts, rejected=["blurred"])
    return Readings(tmp_path, 100)


@pytest.mark.parametrize(
    ("case", "score"),
    [("none", "0"), ("weak", "1+"), ("moderate", "2+"), ("strong", "3+"), ("ten", "1+"),
     ("eleven", "3+"), ("ultralow", "0"), ("one_tile", "3+")],
)  # fmt: skip
def test_scores_are_those_of_the_guideline(readings, case, score):
    assert readings.refusal(case) == ""
    assert readings.score(case) == score
    shares = readings.probabilities(case)
    assert len(shares) == 4 and sum(shares) == pytest.approx(1)
    if case in ("none", "weak", "moderate", "strong", "one_tile"):
        assert shares[["0", "1+", "2+", "3+"].index(score)] > 0.9
    if case in ("ten", "eleven"):
        assert 0.2 < shares[3] < 0.8, "on the limit, the score is uncertain"


def test_refusals_have_a_reason(readings):
    assert readings.refusal("few") == "fewer than 100 cells in its accepted tiles"
    assert "most for: her2_sharpness" in readings.refusal("blurred")
    assert "H&E alone" in readings.refusal("unknown")


@pytest.mark.parametrize(
    ("equivocal", "statuses", "probability"),
    [("drop", {}, None), ("positive", {"moderate": "positive"}, 1), ("negative",
     {"moderate": "negative"}, 0)],
)  # fmt: skip
def test_2_is_no_status_unless_configured(readings, equivocal, statuses, probability):
    names = ("none", "weak", "moderate", "strong", "few")
    rows = [row | {"case": case} for case, row in zip(names, case_rows(5), strict=True)]
    rows[-1]["split"], rows[-1]["fold"] = "test", None
    predictions, refused = read_cases(rows, ("status", "score"), readings, equivocal, "cells")
    known = {row["case"]: row for row in predictions if row["target"] == "status"}
    assert {case: row["predicted"] for case, row in known.items()} == {
        "none": "negative", "weak": "negative", "strong": "positive", **statuses,
    }  # fmt: skip
    if statuses:
        assert known["moderate"]["probability"] == pytest.approx(probability, abs=0.05)
    reasons = [(row["case"], row["target"]) for row in refused]
    assert reasons == [*([("moderate", "status")] if equivocal == "drop" else []),
                       ("few", "status"), ("few", "score")]  # fmt: skip
    scores = {row["case"]: row["predicted"] for row in predictions if row["target"] == "score"}
    assert scores == {"none": "0", "weak": "1+", "moderate": "2+", "strong": "3+"}


def test_the_stage_trains_nothing_and_has_seen_no_case(tmp_path):
    rows = case_rows(12, test=4)
    write_status(tmp_path, rows)
    looks = dict(zip(("0", "1+", "2+", "3+"), (NONE, WEAK, MODERATE, STRONG), strict=True))
    write_readings(tmp_path, {row["case"]: [looks[row["score"]]] * 4 for row in rows[1:]})
    folder = run_method(tmp_path, "cells")
    found = tables.read(folder / "predictions.parquet", tables.STATUS_PREDICTIONS).to_pylist()
    scores = [row for row in found if row["target"] == "score"]
    assert [row["case"] for row in scores] == [row["case"] for row in rows[1:]]
    assert all(row["predicted"] == row["truth"] for row in scores)
    assert [row["part"] for row in scores] == ["oof"] * 7 + ["test"] * 4
    described = json.loads((folder / "metadata.json").read_text())
    assert {tuple(run["trained_on"]) for run in described["runs"]} == {()}
    assert described["pretraining"] == "mask engine stain"
    refused = {(row["case"], row["target"]) for row in described["refused"]}
    equivocal = {(row["case"], "status") for row in rows if row["score"] == "2+"}
    assert refused == {("c000", "status"), ("c000", "score")} | equivocal
    for name, schema in (("history", tables.HISTORY), ("contributions", tables.CONTRIBUTIONS)):
        assert tables.read(folder / f"{name}.parquet", schema).num_rows == 0
    assert layout.path(layout.AGGREGATOR, tmp_path, method="cells").is_file()
