"""Limits of filter on the page against stage filter itself, and in the configuration."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.testclient import TestClient

from hemera import tables
from hemera.config import FilterOptions, load_file
from hemera.dataset import statistics
from hemera.errors import ConfigError
from hemera.stages import filter
from hemera.view.decisions import Backups
from hemera.view.server import application
from hemera.view.settings import changed_section, save_filter
from tests.small_results import BLOCK_COUNT, Made, make
from tests.view.test_server import HOST, TOKEN

CONFIG = f"""\
# A study.
preset: no_weights
sheet: pairs.tsv  # of the tests
block_count: {BLOCK_COUNT}
mask:
  engines:
    stain: {{}}
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of 4 pairs of each of two scores, one of them less sharp, and of a slide."""
    folder = tmp_path_factory.mktemp("study")
    pairs = [
        Made(f"{score[0]}_{number}", score=score, tiles=8, sharpness=sharpness)
        for score, sharpness in (("1+", 60.0), ("3+", 40.0))
        for number in range(4)
    ]
    make(folder, [*pairs, Made("slide", slide=True, dataset="acrobat", tiles=5)])
    (folder / "config.yaml").write_text(CONFIG)
    return folder


@pytest.fixture
def client(results: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.chdir(results)
    (results / "config.yaml").write_text(CONFIG)
    app = application(Path("config.yaml"), TOKEN, (HOST,))
    with TestClient(app, base_url=f"http://{HOST}/{TOKEN}") as found:
        yield found


def refiltered(folder: Path, **limits: Any) -> Any:
    """Return the table that stage filter writes with these limits."""
    path = folder / "again.parquet"
    filter.run(
        sheet=folder / "pairs.tsv",
        block_count=BLOCK_COUNT,
        results=folder / "results",
        engines=("stain",),
        tiles=path,
        options=FilterOptions(**limits),
    )
    return tables.read(path, tables.filtered(("stain",))).to_pandas()


def limits(client: TestClient, pair: str = "slide", **values: Any) -> dict[str, Any]:
    answer = client.post("api/limits", json={"limits": values, "pair": pair})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.parametrize(
    "values", [{}, {"her2_sharpness_min": 50.0}, {"registration_error_max_um": 1, "pen_max": 1.0}]
)
def test_the_funnel_is_that_of_filter(
    client: TestClient, results: Path, values: dict[str, Any]
) -> None:
    found, truth = limits(client, **values), refiltered(results, **values)
    assert found["tiles"] == len(truth) == 69
    assert found["accepted"] == truth["accepted"].sum()
    counts = truth["reason"].value_counts()
    assert {name: count for name, count in found["reasons"].items() if count} == dict(counts)
    groups = truth.groupby(["dataset", "score"])["accepted"].agg(["size", "sum"])
    assert {
        (row["dataset"], row["score"].replace("unknown", "")): (row["tiles"], row["accepted"])
        for row in found["groups"]
    } == {key: (row["size"], row["sum"]) for key, row in groups.iterrows()}
    own = truth[truth["pair"] == "slide"]
    assert found["decisions"] == dict(zip(own["tile"], own["reason"].fillna(""), strict=True))
    biases = statistics.selection_bias(statistics.rejections(truth))
    assert [(bias["score"], bias["reason"]) for bias in found["biases"]] == [
        (bias.score, bias.reason) for bias in biases
    ]


def test_a_limit_that_only_one_score_misses_is_a_bias(client: TestClient) -> None:
    """All 32 tiles of 3+ have the sharpness 40, those of 1+ 60; some have too little tissue."""
    before, after = limits(client), limits(client, her2_sharpness_min=50.0)
    assert before["biases"] == [] and before["changed"] == 0
    (accepted,) = (row["accepted"] for row in before["groups"] if row["score"] == "3+")
    assert 0 < accepted < 32
    assert after["reasons"]["blurred_her2"] == accepted == after["changed"]
    (bias,) = after["biases"]
    assert (bias["score"], bias["fraction"], bias["reason"]) == ("3+", 0.0, "blurred_her2")


def test_limits_that_are_not_valid_are_errors(client: TestClient) -> None:
    for values in ({"pen_max": 2.0}, {"none": 1}, {"pen_max": "much"}, {"accept_review": 3}):
        answer = client.post("api/limits", json={"limits": values, "pair": ""})
        assert answer.status_code == 400 and "filter." in answer.json()["error"]


def test_controls_are_the_limits(client: TestClient) -> None:
    found = client.get("api/controls").json()
    named = {control["option"]: control for control in found["controls"]}
    # The data sets to which one of them applies are no limit.
    assert set(named) == set(FilterOptions.model_fields) - {"histogram_datasets"}
    assert named["accept_review"]["switch"] and not named["pen_max"]["switch"]
    sharpness = named["he_sharpness_min"]
    assert (sharpness["value"], sharpness["sign"], sharpness["low"]) == (30.0, "≥", 0)
    for control in named.values():
        if not control["switch"]:
            assert control["low"] < control["high"]
            assert control["value"] is None or control["low"] <= control["value"] <= control["high"]


def test_the_table_is_sorted_and_filtered(client: TestClient) -> None:
    query: dict[str, Any] = {"page": 2, "size": 20, "sort": [], "filter": []}

    def page(**changes: Any) -> Any:
        given = {"limits": {"her2_sharpness_min": 50.0}, "query": query | changes}
        return client.post("api/tiles", json=given)

    first = page().json()
    assert (first["last_row"], first["last_page"], len(first["data"])) == (69, 4, 20)
    blurred = page(page=1, size=500, filter=[{"field": "decision", "value": "BLURRED"}]).json()
    assert {row["score"] for row in blurred["data"]} == {"3+"} and 0 < blurred["last_row"] < 32
    sharp = page(page=1, size=500, filter=[{"field": "he_sharpness", "value": "170"}]).json()
    assert min(row["he_sharpness"] for row in sharp["data"]) >= 170 and sharp["last_row"] < 69
    values = [row["he_sharpness"] for row in page(
        page=1, size=69, sort=[{"field": "he_sharpness", "dir": "desc"}]
    ).json()["data"]]  # fmt: skip
    assert values == sorted(values, reverse=True) and len(values) == 69
    for wrong in (
        {"sort": [{"field": "shard", "dir": "asc"}]},
        {"filter": [{"field": "he_sharpness", "value": "much"}]},
        {"size": "x"},
    ):
        assert page(**wrong).status_code == 400


def test_pictures_are_members_of_the_shards(client: TestClient, results: Path) -> None:
    row = refiltered(results).iloc[0]
    shard = (results / "results" / row["shard"]).read_bytes()
    stored = shard[row["he_offset"] : row["he_offset"] + row["he_length"]]
    assert client.get(f"picture/{row['tile']}/he").content == stored
    assert client.get(f"picture/{row['tile']}/stain?side=48").content[:2] == b"\xff\xd8"
    for address in ("picture/none/he", "contours/none/stain", "api/cells/none/stain"):
        assert client.get(address).status_code == 403
    for address in ("he?side=0", "he?side=99999", "he?side=-1", "other", "secret", "he_shard"):
        assert client.get(f"picture/{row['tile']}/{address}").status_code in (400, 403)


def test_saved_limits_are_those_of_the_next_run(client: TestClient, results: Path) -> None:
    values = {"he_sharpness_min": 50.0, "registration_error_max_um": None, "accept_review": True}
    answer = client.post("api/save", json={"limits": values})
    assert answer.status_code == 200
    assert (results / answer.json()["backup"]).read_text() == CONFIG
    text = (results / "config.yaml").read_text()
    assert "# A study." in text and "# of the tests" in text
    options = load_file(results / "config.yaml").options(FilterOptions)
    assert options == FilterOptions(**values)
    assert limits(client) == limits(client, **values)


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\n",
        "a: 1",
        "a: 1\nfilter:\n  # pen_max: 3\nb: 2\n",
        "a: 1\nfilter: null # none\nb: 2\n",
        "a: 1\nfilter: {}\nb: 2\n",
        "a: 1\nfilter: {pen_max: 3, x: y} # z\nb: 2\n",
        "filter:\n    pen_max:   3 # three\n    x: y\nb: 2\n",
        "filter:\n  x: y\n  pen_max: 3",
        "a: 1\r\nfilter:\r\n  x: y\r\n",
    ],
)
def test_other_keys_and_comments_remain(text: str) -> None:
    changed = changed_section(text, "filter", {"pen_max": 0.25, "edge_max": None})
    before, after = yaml.safe_load(text), yaml.safe_load(changed)
    own = {**(before.pop("filter", None) or {}), "pen_max": 0.25, "edge_max": None}
    assert after.pop("filter") == own and after == before
    assert [line.partition("#")[2] for line in text.split("\n") if "#" in line] == [
        line.partition("#")[2] for line in changed.split("\n") if "#" in line
    ]


def test_a_file_that_cannot_be_changed_is_unchanged(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys in quotes are written once more, which the reader refuses."""
    monkeypatch.chdir(results)
    text = CONFIG + "filter: &limits\n  pen_max: 0.5\n"
    Path("config.yaml").write_text(text)
    monkeypatch.setattr("hemera.view.settings.changed_section", lambda *_: text + "report: {}\n")
    with pytest.raises(ConfigError, match="cannot be changed by a program"):
        save_filter(Path("config.yaml"), FilterOptions(), Backups())
    assert Path("config.yaml").read_text() == text
