"""Plans of a study that never ran, in a folder of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hemera.graph.dry_run import ONCE, TARGETS
from tests.small_workflow import TINY


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study outside of the checkout: a configuration with its own name, a sheet, images."""
    rows = [
        "pair\tcase\tdataset\the\ther2\tregistered\the_mpp\ther2_mpp",
        "slide_1\tc1\tacrobat\timg/1_he.tif\timg/1_her2.tif\t\t\t",
        "tile_1\tc2\tbci\timg/2_he.png\timg/2_her2.png\ttrue\t0.46\t0.46",
    ]
    (tmp_path / "study.tsv").write_text("\n".join(rows) + "\n")
    (tmp_path / "img").mkdir()
    for name in ("1_he.tif", "1_her2.tif", "2_he.png", "2_her2.png"):
        (tmp_path / "img" / name).touch()
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({**TINY, "sheet": "study.tsv"}))
    return tmp_path


def hemera(folder: Path, *words: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "hemera", *words, "--configfile", "study.yaml"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def test_a_study_that_never_ran(study: Path) -> None:
    """Weights that are missing are listed beside the plan."""
    deepliif = {"mask": {"engines": {"deepliif": {}}}, "index": {"target": "deepliif"}}
    (study / "study.yaml").write_text(yaml.safe_dump({**TINY, "sheet": "study.tsv", **deepliif}))
    status, text = hemera(study, "plan", "data", "--json")
    found: dict[str, Any] = json.loads(text)
    jobs = {stage["stage"]: stage["jobs"] for stage in found["stages"]}
    units = {"describe": 2, "register": 1, "tile": 2, "mask": 2}
    assert jobs == {**units, "filter": 1, "index": 1, "report": 1}
    assert {stage["hours"] for stage in found["stages"]} == {None}
    assert found["decisions"] == {"known": False}
    assert status == 1 and any("mask.engines.deepliif.model" in line for line in found["missing"])


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("dta", "dta: no such target; did you mean data? Targets are all, data, status, a stage"),
        ("zzz", "zzz: no such target; targets are all, data, status, a stage of one job (filter,"),
        ("tile", "tile: a stage of several jobs is no target; targets are all"),
    ],
)
def test_an_unknown_target_is_one_line_before_anything_runs(
    study: Path, target: str, found: str
) -> None:
    status, text = hemera(study, "run", target)
    assert status == 1 and text.startswith(f"ERROR hemera: {found}") and text.count("\n") == 1
    assert not (study / "logs").exists()


def test_known_targets_are_planned(study: Path) -> None:
    done, text = hemera(study, "plan", *TARGETS[1:2], *ONCE[:3], "results/index/index.parquet")
    assert done == 0 and "index" in text


@pytest.mark.slow
def test_progress_of_a_study_that_never_ran(study: Path) -> None:
    status, text = hemera(study, "progress", "data")
    assert status == 0 and text.split("\n")[1].split() == ["describe", "2", "0", "0", "0"]
    assert "7 stages that never ran here" in text


@pytest.mark.slow
def test_faults_are_those_of_the_workflow(study: Path) -> None:
    (study / "img/1_he.tif").unlink()
    status, text = hemera(study, "plan")
    assert status == 1 and "img/1_he.tif: no such file" in text and "Traceback" not in text
