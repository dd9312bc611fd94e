"""hemera run in a small study, with the real workflow."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import yaml

from hemera.__main__ import main
from hemera.sheet import read_sheet, write_rows
from tests.small_workflow import TINY

pytestmark = pytest.mark.slow


@pytest.fixture
def study(cohort: Path, tmp_path: Path) -> Path:
    """Two registered pairs of images, one with swapped stains."""
    found = [pair for pair in read_sheet(cohort / "pairs.tsv").pairs if pair.dataset == "bci"][:2]
    rows = [
        {"pair": pair.pair, "case": pair.case, "dataset": "bci", "registered": "true",
         "he": str(images[0]), "her2": str(images[1]), "he_mpp": "0.46", "her2_mpp": "0.46"}
        for pair, images in zip(found, (found[0].images, found[1].images[::-1]), strict=True)
    ]  # fmt: skip
    (tmp_path / "cohort.tsv").write_text(write_rows(rows))
    assert main(["new", str(tmp_path / "study"), "--sheet", str(tmp_path / "cohort.tsv")]) == 0
    (tmp_path / "study" / "config.yaml").write_text(yaml.safe_dump(TINY))
    return tmp_path / "study"


def started(study: Path, *words: str, python: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *python, "-m", "hemera", "run", *words], cwd=study, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        # The tests may have been started where SIGINT is ignored, which processes inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


@pytest.mark.parametrize("module", ["hemera.graph.dry_run", "snakemake.dag"])
def test_an_interrupt_while_planning_is_one_line(study: Path, module: str) -> None:
    """SIGINT reaches the process when it has imported a module of the plan."""
    process = started(study, "data", "--cores", "2", python=("-X", "importtime"))
    assert process.stdout is not None
    for line in process.stdout:
        if line.split("|")[-1].strip() == module:
            break
    os.killpg(process.pid, signal.SIGINT)
    lines = [line for line in process.stdout if not line.startswith("import time:")]
    assert process.wait(120) == 130
    assert lines == ["ERROR hemera: interrupted\n"]


def test_a_run_ends_with_its_summary(study: Path) -> None:
    # Ctrl-C in a terminal: SIGINT to all processes of the group.
    process = started(study, "data", "--cores", "2")
    until = time.monotonic() + 120
    while not list(study.glob("logs/describe/*.log")) and time.monotonic() < until:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in text
    assert text.splitlines()[-1] == (
        "Interrupted: the jobs are ended, what is finished is kept. To continue, run the same "
        "command again."
    )
    assert "failed:" not in text
    found = json.loads((study / "results/summary.json").read_text())
    assert found["exit_status"] == 130 and found["failures"] == []
    # What follows -- are options of Snakemake.
    process = started(study, "--cores", "2", "--", "data", "--keep-going")
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    (swapped,) = [pair for pair in read_sheet(study / "pairs.tsv").pairs if "HE" in str(pair.her2)]
    assert f"wrong_stain: {swapped.pair}: " in text and "swap he and her2" in text
    assert "the data: results/report/report.html" in text
    found = json.loads((study / "results/summary.json").read_text())
    assert found["exit_status"] == 0 and found["failures"] == []
    assert [row["pair"] for row in found["refused"]] == [swapped.pair]
    assert found["tiles"] > 0 and found["demo_networks"]
    assert "rule describe" in Path(study, found["log"]).read_text()
    process = started(study, "data")
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and text.startswith("Nothing to be done")
    process = started(study, "--", "data", "--forcerun", "index")
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "without the options after --" in text
    found = json.loads((study / "results/summary.json").read_text())
    assert "rule index" in Path(study, found["log"]).read_text()
    process = started(study, "--", "data", "--cores=1")
    text, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "write --cores before --" in text
    # Snakemake says why it ends before any job.
    process = started(study, "--", "data", "--config", "mask={nuclei: classical}")
    text, _ = process.communicate(timeout=120)
    found = json.loads((study / "results/summary.json").read_text())
    assert process.returncode != 0 and "config.yaml: mask.nuclei: no such key" in text
    assert "no such key" in found["last_lines"][-1] and found["failures"] == []


def test_folders_of_real_images(images: Path, tmp_path: Path) -> None:
    """As a new user: two commands, no file is edited; the section of a kidney is too coarse."""
    pairs = {
        "bci": ("bci_pairs_1024/HE/test/*", "bci_pairs_1024/IHC/test/*", ("--mpp", "0.46")),
        "kidney": ("wsi_derived/*_HE_val.tif", "wsi_derived/*_PANCK_val.tif", ()),
    }
    for name, (he, her2, mpp) in pairs.items():
        study = tmp_path / name
        words = ["--he", str(images / he), "--her2", str(images / her2), *mpp]
        assert main(["new", str(study), *words]) == 0
        text, _ = (process := started(study, "data")).communicate(timeout=900)
        assert process.returncode == 0, text
        assert "the data: results/report/report.html" in text and "unknown at once" not in text
        found = json.loads((study / "results/summary.json").read_text())
        assert found["refused"] == []
        page = (study / "results/report/report.html").read_text()
        if name == "bci":
            assert 0 < found["accepted_tiles"] <= found["tiles"] == 8
            with tarfile.open(next(study.glob("results/mask/*.tar"))) as masks:
                assert masks.getnames()
            assert 'id="pair-' not in page
        else:
            assert found["tiles"] == sum(found["rejected_tiles"].values()) > 0
            assert found["accepted_tiles"] == 0
            assert 'id="pair-0"' in page and "No tile was accepted" in page
