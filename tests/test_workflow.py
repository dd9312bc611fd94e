"""The graph run to the end, and what runs again after a change."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from hemera.sheet import read_sheet
from hemera.tables import read_metadata
from tests.small_workflow import (
    ROOT,
    TINY,
    digests,
    lay_out,
    planned,
    snakemake,
    write_config,
)

pytestmark = pytest.mark.slow  # `make run` runs the graph too

PIXEL_STAGES = {"describe", "register", "landmarks", "tile", "mask"}
DATA_STAGES = ("describe", "register", "landmarks", "tile", "mask", "filter", "index")


def data_digests(folder: Path) -> dict[str, str]:
    """Return the digest of every shard and table of the data stages."""
    return {
        name: digest
        for name, digest in digests(folder).items()
        if name.split("/")[1] in DATA_STAGES
    }


def reported(folder: Path, command: str, *words: str) -> dict[str, Any]:
    """Return what `hemera plan` or `hemera progress` reports."""
    done = subprocess.run(
        [sys.executable, "-m", "hemera", command, *words, "--json"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    return dict(json.loads(done.stdout))


def decided(folder: Path) -> dict[str, str | None]:
    """Return the reason of each tile, None: accepted."""
    columns = pq.read_table(folder / "results/filter/tiles.parquet", columns=["tile", "reason"])
    return dict(zip(*(column.to_pylist() for column in columns.columns), strict=True))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, finished: Path) -> Path:
    """The small cohort, run to the end with two processors."""
    return shutil.copytree(finished, tmp_path_factory.mktemp("small") / "run", symlinks=True)


def test_runs_to_the_end(small: Path) -> None:
    for page in ("results/report/report.html", "results/evaluate/evaluate.html"):
        assert (small / page).stat().st_size > 10_000
    assert planned(small) == {}
    metadata = read_metadata(small / "results/index/index.parquet")
    made_by = {key.removeprefix("options_") for key in metadata if key.startswith("options_")}
    assert made_by == {"describe", "register", "tile", "mask", "filter", "index"}


def test_one_and_two_processors_give_the_same_bytes(small: Path, tmp_path: Path) -> None:
    lay_out(tmp_path, TINY)
    for name in ("acrobat", "bci", "pairs.tsv"):
        (tmp_path / name).symlink_to(small / name)
    # And with copies of the images in a folder of the node, as a profile sets it.
    local = ("--default-resources", "local_folder='$NODE/own'", "--")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NODE", str(tmp_path / "node"))
        snakemake(tmp_path, "--cores", "1", *local, "data")
    assert list((tmp_path / "node" / "own").iterdir()) == []
    assert data_digests(tmp_path) == data_digests(small)
    assert planned(tmp_path, "data") == {}, "another folder reruns nothing"
    marks = [
        read_metadata(folder / "results/index/index.parquet")["fingerprint"]
        for folder in (small, tmp_path)
    ]
    assert marks[0] == marks[1]


def test_a_filter_reaches_no_pixel(small: Path) -> None:
    write_config(small, TINY, filter={"tissue_fraction_min": 0.55})
    counts = planned(small)
    trained = {"train_generation", "train_segmentation", "evaluate"}
    assert set(counts) == {"filter", "index", "report", *trained}
    plan = reported(small, "plan")
    reason = plan["stages"][0]["reasons"]
    assert list(reason) == ["filter.tissue_fraction_min: 0.5 -> 0.55"]
    before, decisions = data_digests(small), decided(small)
    snakemake(small, "--cores", "2", "data")
    after = data_digests(small)
    changed_tiles = sum(decisions[tile] != reason for tile, reason in decided(small).items())
    assert plan["decisions"]["changed"] == changed_tiles > 0
    assert plan["decisions"]["tiles"] == len(decisions)
    changed = {name.split("/")[1] for name in after if after[name] != before.get(name)}
    assert changed == {"filter", "index"}
    write_config(small, TINY)
    snakemake(small, "--cores", "2")
    assert data_digests(small) == before
    assert planned(small) == {}


def test_a_lost_shard_is_planned_and_progress_counts_what_is_left(small: Path) -> None:
    shard = small / "results/mask/bci.000.tar"
    data = shard.read_bytes()
    times = shard.stat()
    shard.unlink()
    try:
        (mask, *after) = reported(small, "plan", "data")["stages"]
        assert (mask["stage"], mask["units"]) == ("mask", ["bci.000"])
        assert mask["reasons"] == {"missing: results/mask/bci.000.tar": 1}
        assert [stage["stage"] for stage in after] == ["filter", "index", "report"]
        assert mask["hours"] > 0 and after[0]["reasons"] == {"follows mask": 1}
        stages = {stage["stage"]: stage for stage in reported(small, "progress")["stages"]}
        assert (stages["tile"]["finished"], stages["mask"]["finished"]) == (
            stages["tile"]["jobs"],
            stages["mask"]["jobs"] - 1,
        )
        images = 2 * len(read_sheet(small / "pairs.tsv").pairs)
        assert sum(stages["describe"]["verdicts"].values()) == images
        assert stages["mask"]["remaining_hours"] > 0 == stages["tile"]["remaining_hours"]
    finally:
        shard.write_bytes(data)
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert planned(small) == {}


def test_a_network_of_an_interrupted_run_is_evaluated(small: Path, tmp_path: Path) -> None:
    """Trained anew when a job of landmarks failed; the next run repeats that job and the report.

    Snakemake did not compare the networks with the evaluation while this had the report as an
    input marked `ancient`.
    """
    folder = shutil.copytree(small, tmp_path / "run", symlinks=True)
    networks = folder / "results" / "train_generation"
    (networks / "demo/history.parquet").write_bytes(
        (networks / "hemera/history.parquet").read_bytes()
    )
    (pair,) = [pair for pair in read_sheet(folder / "pairs.tsv").pairs if pair.he_landmarks]
    pair.he_landmarks.write_text(pair.he_landmarks.read_text() + "\n")
    assert set(planned(folder)) >= {"landmarks", "report", "evaluate"}


def test_a_mask_option_reaches_masks_and_what_follows(small: Path) -> None:
    write_config(small, TINY, mask={"completeness_min": 0.5})
    assert not PIXEL_STAGES - {"mask"} & set(planned(small))
    assert {"mask", "filter", "index"} <= set(planned(small))
    write_config(small, TINY)


def test_another_name_of_the_sheet_or_number_of_blocks_registers_nothing_again(small: Path) -> None:
    (small / "pairs.tsv").rename(small / "renamed.tsv")
    try:
        write_config(small, {**TINY, "sheet": "renamed.tsv"})
        assert planned(small) == {}
        write_config(small, {**TINY, "sheet": "renamed.tsv", "block_count": 1})
        counts = planned(small)
        assert counts["describe"] == counts["tile"] == counts["mask"] == 1
        assert "register" not in counts
    finally:
        (small / "renamed.tsv").rename(small / "pairs.tsv")
        write_config(small, TINY)


def test_a_training_option_reaches_that_training_and_what_follows(small: Path) -> None:
    write_config(small, TINY, train_segmentation={"epochs": 2})
    assert set(planned(small)) == {"train_segmentation", "evaluate"}
    write_config(small, TINY, train_generation={"epochs": 2})
    assert set(planned(small)) == {"train_generation", "train_segmentation", "evaluate"}
    write_config(small, TINY, report={"gallery_tiles": 3})
    assert set(planned(small)) == {"report"}
    write_config(small, TINY)
    assert planned(small) == {}


def test_an_added_generator_is_trained_and_evaluated_and_nothing_else(small: Path) -> None:
    write_config(small, TINY, evaluate={"generators": ["hemera", "pyramid_pix2pix"]})
    assert planned(small) == {"train_generation": 1, "evaluate": 1}
    text = snakemake(small, "-n", "-p", "--cores", "2")
    (command,) = re.findall(r"hemera train_generation .*", text)
    assert "results/train_generation/pyramid_pix2pix/generator.safetensors" in command
    assert "--network resnet_9blocks" in command and "--epochs 1 " in command
    write_config(small, TINY, evaluate={"generators": []})
    assert planned(small) == {"evaluate": 1}
    write_config(small, TINY)
    assert planned(small) == {}


def test_an_added_pair_reaches_its_own_unit_and_the_cohort(small: Path) -> None:
    text = (small / "pairs.tsv").read_text()
    header, *rows = text.splitlines()
    cells = dict(
        zip(header.split("\t"), next(r for r in rows if "\tbci\t" in r).split("\t"), strict=True)
    )
    for column in ("he", "her2"):
        copy = Path(cells[column]).with_name("added.png")
        shutil.copy(small / cells[column], small / copy)
        cells[column] = str(copy)
    cells["pair"] = cells["case"] = "bci_added"
    (small / "pairs.tsv").write_text(text + "\t".join(cells.values()) + "\n")
    try:
        counts = planned(small)
        assert "register" not in counts
        assert counts["describe"] == counts["tile"] == counts["mask"] == 1
        assert {"filter", "index", "report"} <= set(counts)
    finally:
        (small / "pairs.tsv").write_text(text)
    assert planned(small) == {}


def test_a_person_overrides_a_verdict_without_registering_again(small: Path) -> None:
    text = (small / "pairs.tsv").read_text()
    header, first, *rest = text.splitlines()
    cells = dict(zip(header.split("\t"), first.split("\t"), strict=True))
    assert cells["registered"] == "false"
    cells["verdict"] = "refuse"
    (small / "pairs.tsv").write_text("\n".join([header, "\t".join(cells.values()), *rest]) + "\n")
    try:
        counts = planned(small)
        assert counts["tile"] == 1
        assert "register" not in counts
        assert "describe" not in counts
    finally:
        (small / "pairs.tsv").write_text(text)


def test_a_version_raised_in_the_code_runs_again(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Snakemake does not see edits inside a package: `version` is what it sees."""
    package = tmp_path / "hemera"
    shutil.copytree(ROOT / "hemera", package, ignore=shutil.ignore_patterns("__pycache__"))
    config = package / "config" / "masks.py"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    config.write_text(config.read_text() + "\n# a comment changes nothing\n")
    assert planned(small) == {}
    edited, count = re.subn(
        r'(section: ClassVar\[str\] = "mask"\n(?:    version: ClassVar\[int\] = \d+\n)?)',
        r"\1    version: ClassVar[int] = 99\n",
        config.read_text(),
    )
    assert count == 1
    config.write_text(edited)
    assert "mask" in planned(small)
    assert not {"describe", "register", "tile"} & set(planned(small))
