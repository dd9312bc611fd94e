"""Stage aggregate: predictions of cases that were not seen, contributions, leaks."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from hemera import tables
from hemera.config import AggregateOptions
from hemera.dataset.cases import digest as digest_of_cases
from hemera.errors import LeakageError, TableError
from tests.small_status import case_rows, run_method, write_status
from tests.small_tables import digest

GOLDEN = {4: "5c4e1f8268727353"}


def predictions(folder):
    return tables.read(folder / "predictions.parquet", tables.STATUS_PREDICTIONS).to_pylist()


@pytest.mark.parametrize("method", ["floor", "statistics_abmil"])
def test_every_case_is_predicted_once_and_what_saw_it_is_recorded(tmp_path, method):
    rows = case_rows(40, test=8)
    write_status(tmp_path, rows)
    folder = run_method(tmp_path, method)
    described = json.loads((folder / "metadata.json").read_text())
    runs = {
        (run["part"], run["target"], run["fold"], run["left_out"], run["repeat"]): run
        for run in described["runs"]
    }
    found = predictions(folder)
    for target in ("status", "score"):
        own = [row for row in found if (row["target"], row["part"]) == (target, "oof")]
        assert sorted(row["case"] for row in own) == [row["case"] for row in rows[:32]]
        tested = [row for row in found if (row["target"], row["part"]) == (target, "test")]
        assert sorted(row["case"] for row in tested) == [row["case"] for row in rows[32:]]
        assert {row["models"] for row in tested} == {5}
    for row in found:
        if row["part"] == "test":
            seen = {c for run in runs.values() if run["part"] == "oof" for c in run["trained_on"]}
        else:
            names = ("part", "target", "fold", "left_out", "repeat")
            seen = set(runs[tuple(row[name] for name in names)]["trained_on"])
        assert row["case"] not in seen
    for run in runs.values():
        assert run["trained_on_sha256"] == digest_of_cases(run["trained_on"])
    shuffled = {row["repeat"] for row in found if row["part"] == "shuffled"}
    assert shuffled == ({0, 1} if method == "floor" else set())
    truth = {row["case"]: row for row in rows}
    assert all(
        row["truth"] == truth[row["case"]][row["target"]]
        for row in found if row["part"] != "shuffled"
    )  # fmt: skip


@pytest.mark.parametrize("method", ["floor", "statistics_abmil"])
def test_contributions_of_views_sum_to_the_logit(tmp_path, method):
    write_status(tmp_path, case_rows(24, test=4))
    folder = run_method(tmp_path, method, seeds=2)
    table = tables.read(folder / "contributions.parquet", tables.CONTRIBUTIONS).to_pandas()
    sums, views = (table.groupby("case")["contribution"].agg(name) for name in ("sum", "count"))
    attention = table.groupby("case")["attention"].mean()
    own = [row for row in predictions(folder)
           if row["target"] == "status" and row["part"] in ("oof", "test")]  # fmt: skip
    assert len(own) == len(sums) == 24
    for row in own:
        assert sums[row["case"]] + row["bias"] == pytest.approx(row["logit"], abs=1e-5)
        assert views[row["case"]] == 3 and attention[row["case"]] == pytest.approx(1, abs=1e-5)


def test_a_clear_signal_is_found_and_scores_are_predicted(tmp_path):
    write_status(tmp_path, case_rows(60), signal=4.0)
    found = predictions(run_method(tmp_path, "floor"))
    for target, least in (("status", 0.9), ("score", 0.8)):
        own = [row for row in found if (row["target"], row["part"]) == (target, "oof")]
        assert sum(row["predicted"] == row["truth"] for row in own) / len(own) >= least
    shares = [[row[f"p{k}"] for k in range(4)] for row in found if row["target"] == "score"]
    assert all(sum(each) == pytest.approx(1) and min(each) >= 0 for each in shares)


def test_an_encoder_that_saw_a_case_is_a_leak(tmp_path):
    write_status(tmp_path, case_rows(24), trained_on=("c005", "elsewhere"))
    with pytest.raises(LeakageError, match="was trained on c005"):
        run_method(tmp_path, "floor")


def test_one_class_is_a_named_state(tmp_path):
    rows = case_rows(24, status="negative", score="0")
    write_status(tmp_path, rows)
    folder = run_method(tmp_path, "floor")
    assert predictions(folder) == []
    reasons = {
        run.get("reason") for run in json.loads((folder / "metadata.json").read_text())["runs"]
    }
    assert "status: only one class to train on (negative)" in reasons


def test_no_label_and_one_view_are_no_errors(tmp_path):
    write_status(tmp_path / "a", case_rows(12, status=None, score=None, fold=None))
    assert predictions(run_method(tmp_path / "a", "floor")) == []
    write_status(tmp_path / "b", case_rows(24), views=1)
    assert predictions(run_method(tmp_path / "b", "statistics_abmil"))


def test_missing_features_are_an_error(tmp_path):
    write_status(tmp_path, case_rows(12))
    shutil.rmtree(tmp_path / "embed")
    with pytest.raises(TableError, match="run the stage embed"):
        run_method(tmp_path, "floor")


def test_a_repetition_gives_the_same_bytes(tmp_path):
    write_status(tmp_path, case_rows(24))
    found = []
    for _ in range(2):
        folder = run_method(tmp_path, "statistics_abmil")
        found.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert found[0] == found[1] and len(found[0]) == 5


def test_weights_are_those_of_every_fold(tmp_path):
    write_status(tmp_path, case_rows(24))
    weights = load_file(run_method(tmp_path, "statistics_abmil", seeds=2) / "weights.safetensors")
    places = {tuple(name.split(".")[:3]) for name in weights}
    assert len(places) == 2 * 5 * 2


def test_golden(tmp_path):
    """Fails when the split or the predictions change and the version does not: raise it then."""
    write_status(tmp_path, case_rows(24))
    found = predictions(run_method(tmp_path, "floor"))
    plain = [
        [row[name] for name in ("case", "part", "target", "fold", "left_out", "truth")]
        + [round(row["probability"], 2)]
        for row in found
    ]
    assert digest(json.dumps(plain))[:16] == GOLDEN[AggregateOptions.version]
