"""Stage evaluate_status: the table, the page, and predictions that are refused."""

import json

import numpy as np
import pytest

from hemera import tables
from hemera.__main__ import main
from hemera.config import EvaluateStatusOptions
from hemera.errors import LeakageError, TrainingError
from hemera.evaluation import classification
from hemera.files import layout
from hemera.stages import evaluate_status
from tests.command_line import words
from tests.small_status import case_rows, run_method, write_readings, write_status

OPTIONS = EvaluateStatusOptions(routes=("floor", "statistics_abmil"), bootstrap_samples=100)


def evaluate(results, options=OPTIONS):
    page = layout.path(layout.STATUS_PAGE, results)
    metrics = layout.path(layout.STATUS_METRICS, results)
    evaluate_status.run(
        cases=layout.path(layout.STATUS_CASES, results), results=results, preset="demo",
        metrics=metrics, page=page, options=options,
    )  # fmt: skip
    rows = tables.read(metrics, tables.STATUS_METRICS).to_pylist()
    found = {(row["target"], row["part"], row["group"], row["method"], row["metric"]): row
             for row in rows}  # fmt: skip
    return found, " ".join(page.read_text().split())


@pytest.fixture(scope="module")
def signal(tmp_path_factory):
    """Results of both methods on 60 cases with a signal, 12 of them of the test split."""
    results = tmp_path_factory.mktemp("results")
    write_status(results, case_rows(60, test=12), signal=3.0)
    for method in ("floor", "statistics_abmil"):
        run_method(results, method, epochs=15)
    return results


def test_the_table_has_methods_controls_and_groups(signal):
    found, page = evaluate(signal)
    assert "Test split of the sheet: 12 cases, 6 positive" in page
    for part, count in (("oof", 48), ("test", 12)):
        for method in ("floor", "statistics_abmil", "majority", "all_positive", "all_negative"):
            row = found["status", part, "all", method, "balanced_accuracy"]
            assert (row["cases"], row["positive"]) == (count, count // 2)
    floor = found["status", "oof", "all", "floor", "auc"]
    assert 0.8 < floor["low"] < floor["value"] < floor["high"] <= 1
    assert found["status", "oof", "all", "all_positive", "auc"]["value"] == 0.5
    assert found["status", "oof", "all", "all_positive", "f1"]["value"] == pytest.approx(2 / 3)
    assert found["score", "oof", "all", "majority", "qwk"]["value"] == 0
    difference = found["status", "oof", "all", "statistics_abmil", "auc_minus_floor"]
    own = found["status", "oof", "all", "statistics_abmil", "auc"]["value"]
    assert difference["value"] == pytest.approx(own - floor["value"])
    assert difference["low"] <= difference["value"] <= difference["high"]
    shuffled = found["status", "shuffled", "all", "floor", "auc"]
    assert shuffled["low"] <= shuffled["value"] <= shuffled["high"] < floor["value"]
    assert found["status", "oof", "site=a", "floor", "auc"]["cases"] == 24
    assert ("status", "site_out", "all", "floor", "auc") in found
    assert found["status", "oof", "score=2+", "floor", "auc"]["value"] is None
    assert "a signal was found" in page and "only one class" not in page


def test_no_signal_is_reported(tmp_path):
    write_status(tmp_path, case_rows(60), signal=0.0, seed=4)
    run_method(tmp_path, "floor")
    found, page = evaluate(tmp_path, OPTIONS.replace(routes=("floor",)))
    assert found["status", "oof", "all", "floor", "auc"]["low"] <= 0.5
    assert "no signal found" in page and "a signal was found" not in page


@pytest.mark.slow
@pytest.mark.parametrize("method", ["floor", "statistics_abmil"])
def test_at_most_3_of_20_intervals_miss_chance_without_a_signal(tmp_path, method):
    missed = 0
    for seed in range(20):
        results = tmp_path / str(seed)
        write_status(results, case_rows(64), signal=0.0, seed=seed)
        run_method(results, method, shuffles=0, epochs=10)
        rows = tables.read(
            layout.path(layout.STATUS_PREDICTIONS, results, method=method),
            tables.STATUS_PREDICTIONS,
        ).to_pandas()
        rows = rows[(rows["target"] == "status") & (rows["part"] == "oof")]
        truth = (rows["truth"] == "positive").to_numpy()
        weights = classification.resample(truth, 1000, seed)
        found = classification.auc(truth, rows["probability"].to_numpy(), weights)
        low, high = np.quantile(found, (0.025, 0.975))
        missed += not low <= 0.5 <= high
    assert missed <= 3


def test_status_that_goes_with_the_site_is_a_warning(tmp_path):
    rows = case_rows(60)
    for row in rows:
        row["site"] = "a" if (row["status"] == "positive") != (row["case"] < "c006") else "b"
    write_status(tmp_path, rows)
    run_method(tmp_path, "floor")
    _, page = evaluate(tmp_path, OPTIONS.replace(routes=("floor",)))
    assert "Status and site go together" in page


@pytest.mark.parametrize("method", ["floor", "statistics_abmil"])
def test_a_method_that_recognises_the_site_alone_shows_no_signal_without_it(tmp_path, method):
    """Nine of ten cases of site b are positive, and no feature shows the status."""
    rows = case_rows(80)
    for number, row in enumerate(rows):
        row["site"] = "ab"[(row["status"] == "positive") != (number // 4 % 10 == 0)]
    write_status(tmp_path, rows, signal=0.0, site=4.0)
    routes = tuple(dict.fromkeys(("floor", method)))
    for name in routes:
        run_method(tmp_path, name, epochs=15)
    found, page = evaluate(tmp_path, OPTIONS.replace(routes=routes))
    assert found["status", "oof", "all", method, "auc"]["low"] > 0.7
    assert found["status", "site_out", "all", method, "auc_within_sites"]["low"] <= 0.5
    assert f"{method}: no signal within sites that were left out" in page
    assert "Status and site go together" in page


def test_sites_of_one_class_each_show_no_signal(tmp_path):
    rows = case_rows(48)
    for row in rows:
        row["site"] = {"positive": "a", "negative": "b"}.get(row["status"], "b")
    write_status(tmp_path, rows, signal=3.0)
    run_method(tmp_path, "floor")
    _, page = evaluate(tmp_path, OPTIONS.replace(routes=("floor",)))
    assert "floor: no site has both classes: the method may recognise the site" in page


def test_methods_are_compared_on_the_cases_of_all(tmp_path):
    """The cells are right where they are read; a third of the cases has none."""
    rows = case_rows(48)
    write_status(tmp_path, rows, signal=3.0)
    looks = {"0": (100, 0, 0, 0), "1+": (50, 50, 0, 0), "2+": (50, 0, 50, 0), "3+": (50, 0, 0, 50)}
    write_readings(tmp_path, {row["case"]: [looks[row["score"]]] * 4 for row in rows[16:]})
    for method in ("floor", "cells"):
        run_method(tmp_path, method)
    found, page = evaluate(tmp_path, OPTIONS.replace(routes=("floor", "cells")))
    everything, common = (found["score", "oof", group, "floor", "accuracy"]["cases"]
                          for group in ("all", "common"))  # fmt: skip
    assert (everything, common) == (48, 32)
    assert found["score", "oof", "all", "cells", "accuracy"]["cases"] == 32
    assert found["score", "oof", "common", "cells", "qwk"]["value"] == 1
    status = found["status", "oof", "common", "cells", "auc"]
    assert (status["cases"], status["value"]) == (24, 1), "2+ is no status"
    assert ("status", "oof", "all", "cells", "brier_calibrated") not in found
    agreement = found["score", "oof", "all", "floor", "kappa_with_cells"]
    assert agreement["cases"] == 32
    assert agreement["value"] == found["score", "oof", "common", "floor", "qwk"]["value"]
    assert "it is read as 2+, which is no status: 8" in page
    assert "registration was refused: 16" in page and "silver" in page
    assert "nan" not in page


def test_few_cases_allow_no_claim(tmp_path):
    write_status(tmp_path, case_rows(24), signal=4.0)
    run_method(tmp_path, "floor")
    _, page = evaluate(tmp_path, OPTIONS.replace(routes=("floor",)))
    assert "fewer than 20 cases of one class, so no claim can be made" in page


def test_a_test_split_of_one_class_leaves_the_headline_to_cross_validation(tmp_path):
    write_status(tmp_path, case_rows(49, test=1), signal=4.0)
    run_method(tmp_path, "floor")
    found, page = evaluate(tmp_path, OPTIONS.replace(routes=("floor",)))
    assert found["status", "test", "all", "floor", "auc"]["value"] is None
    assert "Cross-validation: 48 cases, 24 positive" in page
    assert "floor: a signal was found" in page and "one class is missing" not in page


def test_cases_without_a_model_have_the_reason(tmp_path):
    write_status(tmp_path, case_rows(24, status="negative", score="0"))
    run_method(tmp_path, "floor")
    _, page = evaluate(tmp_path, OPTIONS.replace(routes=("floor",)))
    assert "only one class to train on (negative): 24" in page
    assert "no prediction" not in page


@pytest.mark.parametrize("method", ["floor", "statistics_abmil", "cells"])
def test_cases_that_are_all_equivocal_give_a_page(tmp_path, method):
    write_status(tmp_path, case_rows(12, status=None, score="2+", state="equivocal", fold=None))
    write_readings(tmp_path, {"c000": [(100, 0, 100, 0)]})
    for each in dict.fromkeys(("floor", method)):
        run_method(tmp_path, each)
    found, page = evaluate(tmp_path, OPTIONS.replace(routes=(method,)))
    assert not [key for key in found if key[0] == "status"]
    assert "no case was predicted" in page and "nan" not in page


def test_one_class_gives_a_page(tmp_path):
    write_status(tmp_path, case_rows(12, status="negative", score="0"))
    run_method(tmp_path, "floor")
    found, page = evaluate(tmp_path, OPTIONS.replace(routes=("floor",)))
    assert found == {} and "no case was predicted" in page


@pytest.mark.parametrize("place", ["run", "encoder"])
def test_a_prediction_of_a_seen_case_is_refused(signal, tmp_path, place):
    path = layout.path(layout.AGGREGATOR_METADATA, signal, method="floor")
    described = json.loads(path.read_text())
    if place == "run":
        run = next(run for run in described["runs"] if run["part"] == "oof")
        fold = run["fold"]
        table = tables.read(
            layout.path(layout.STATUS_PREDICTIONS, signal, method="floor"),
            tables.STATUS_PREDICTIONS,
        ).to_pylist()
        judged = next(row["case"] for row in table if row["part"] == "oof" and row["fold"] == fold)
        run["trained_on"].append(judged)
    else:
        judged = "c007"
        described["encoder_trained_on"] = [judged]
    rows = tables.read(
        layout.path(layout.STATUS_PREDICTIONS, signal, method="floor"), tables.STATUS_PREDICTIONS
    ).to_pylist()
    with pytest.raises(LeakageError, match=f"was trained on {judged}"):
        evaluate_status.check_leakage("floor", rows, described)


def test_predictions_of_other_labels_are_refused(signal, tmp_path):
    rows = case_rows(60, test=12)
    rows[0]["status"] = "positive"
    cases = tmp_path / "cases.parquet"
    tables.write(cases, rows, tables.STATUS_CASES, {"fingerprint": "another"})
    with pytest.raises(TrainingError, match="of other cases or labels"):
        evaluate_status.run(
            cases=cases, results=signal, preset="demo", metrics=tmp_path / "m.parquet",
            page=tmp_path / "p.html", options=OPTIONS,
        )  # fmt: skip


def test_the_command_line_gives_the_same_bytes(signal, tmp_path):
    evaluate(signal)
    given = {"cases": layout.path(layout.STATUS_CASES, signal), "results": signal,
             "preset": "demo", "metrics": tmp_path / "m.parquet", "page": tmp_path / "p.html",
             "routes": OPTIONS.routes, "bootstrap_samples": 100}  # fmt: skip
    assert main(["evaluate_status", *words(given)]) == 0
    for path, pattern in ((tmp_path / "m.parquet", layout.STATUS_METRICS),
                          (tmp_path / "p.html", layout.STATUS_PAGE)):  # fmt: skip
        assert path.read_bytes() == layout.path(pattern, signal).read_bytes()
