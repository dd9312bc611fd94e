"""What the graph plans, from the sheet and the configuration alone."""

import os
import re
import shutil
import tarfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from hemera.config import STAGES
from hemera.files import layout
from hemera.masks.stain import nucleus_files
from hemera.sheet import read_sheet
from tests.small_workflow import ROOT, TINY, lay_out, planned, snakemake, write_config

OF_STATUS = {"cases", "restain", "train_encoder", "embed", "aggregate", "evaluate_status"}
"""The stages of target `status`, which `all` does not need."""


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A working directory whose images are empty files: enough for planning."""
    rows = [
        "pair\tcase\tdataset\the\ther2\tregistered\the_mpp\ther2_mpp",
        "slide_1\tc1\tacrobat\timg/1_he.tif\timg/1_her2.tif\t\t\t",
        "tile_1\tc2\tbci\timg/2_he.png\timg/2_her2.png\ttrue\t0.46\t0.46",
        "tile_2\tc3\tbci\timg/3_he.png\timg/3_her2.png\ttrue\t0.46\t0.46",
    ]
    lay_out(tmp_path, TINY)
    (tmp_path / "pairs.tsv").write_text("\n".join(rows) + "\n")
    (tmp_path / "img").mkdir()
    for pair in read_sheet(tmp_path / "pairs.tsv").pairs:
        for path in pair.images:
            path.touch()
    return tmp_path


def test_every_stage_is_planned(bare: Path) -> None:
    assert set(planned(bare)) == set(STAGES) - {"landmarks"} - OF_STATUS


def test_the_times_of_a_rule_are_in_the_folder_of_its_name() -> None:
    """From these, the progress of a run is counted and its duration estimated."""
    rules = "".join(path.read_text() for path in (ROOT / "workflow/rules").glob("*.smk"))
    blocks = re.split(r"^ *rule (\w+):", rules, flags=re.M)[1:]
    folders = {
        name: re.findall(r'benchmark:\s*"logs/(?:\{prefix\})?(\w+)/', block)
        for name, block in zip(blocks[::2], blocks[1::2], strict=True)
    }
    assert len(folders) > 15
    assert all(of == [name] for name, of in folders.items()), folders


def test_all_missing_files_are_named_before_anything_is_planned(bare: Path) -> None:
    for name in ("1_her2.tif", "3_he.png"):
        (bare / "img" / name).unlink()
    text = snakemake(bare, "-n", "--cores", "2", check=False)
    assert "Job stats" not in text and "Traceback" not in text
    for words in ("img/1_her2.tif: no such file", "img/3_he.png: no such file", "2 files of"):
        assert words in text
    write_config(bare, TINY, describe={"allow_missing": True})
    counts = planned(bare, "data")
    assert (counts["describe"], counts["register"]) == (2 + 1, 1)
    (bare / "img" / "3_he.png").touch()
    assert "img/3_he.png" in snakemake(bare, "-n", "--cores", "2", "data")


def test_a_result_that_was_cut_off_is_named(bare: Path) -> None:
    shard = bare / "results/tile/slide_1.tar"
    shard.parent.mkdir(parents=True)
    with tarfile.open(shard, "w"):
        pass
    assert planned(bare, "data")["tile"] == 3
    shard.write_bytes(shard.read_bytes()[:100] + b"x")
    table = bare / "results/mask/bci.000.parquet"
    table.parent.mkdir()
    table.write_bytes(b"PAR1 ...")
    text = snakemake(bare, "-n", "--cores", "2", "data", check=False)
    for words in ("tile/slide_1.tar: cut off", "mask/bci.000.parquet: cut off", "2 results are"):
        assert words in text
    assert "Job stats" not in text and "Traceback" not in text


def test_landmarks_are_planned_where_they_are_given(bare: Path) -> None:
    text = (bare / "pairs.tsv").read_text().splitlines()
    header, slide, *rest = text
    (bare / "points.csv").touch()
    (bare / "pairs.tsv").write_text(
        "\n".join(
            [
                f"{header}\the_landmarks\ther2_landmarks",
                f"{slide}\tpoints.csv\tpoints.csv",
                *(f"{row}\t\t" for row in rest),
            ]
        )
    )
    for target in ("all", "data"):
        counts = planned(bare, target)
        assert (counts["landmarks"], counts["landmarks_cohort"]) == (1, 1), target


def test_landmarks_of_ready_made_pairs_are_not_measured(bare: Path) -> None:
    rows = [
        "pair\tcase\tdataset\the\ther2\tregistered\the_landmarks\ther2_landmarks",
        "tile_1\tc2\tbci\timg/2_he.png\timg/2_her2.png\ttrue\tpoints.csv\tpoints.csv",
    ]
    (bare / "points.csv").touch()
    (bare / "pairs.tsv").write_text("\n".join(rows) + "\n")
    assert not {"landmarks", "landmarks_cohort"} & set(planned(bare))


def test_a_registered_slide_skips_registration_and_a_map_of_ones_own_is_judged(bare: Path) -> None:
    rows = [
        "pair\tcase\tdataset\the\ther2\tregistered\tdisplacement\the_landmarks\ther2_landmarks",
        "slide_1\tc1\tacrobat\timg/1_he.tif\timg/1_her2.tif\ttrue\t\tpoints.csv\tpoints.csv",
        "slide_2\tc2\tacrobat\timg/2_he.png\timg/2_her2.png\t\tfield.npz\tpoints.csv\tpoints.csv",
    ]
    for name in ("points.csv", "field.npz"):
        (bare / name).touch()
    (bare / "pairs.tsv").write_text("\n".join(rows) + "\n")
    counts = planned(bare)
    assert counts["register"] == 1
    assert counts["tile"] == 2
    text = snakemake(bare, "-n", "--cores", "2", "-p")
    own = "--displacement results/register/slide_2.displacement.npz"
    assert text.count(own) >= 2
    commands = re.findall(r"hemera landmarks .*--unit.*", text)
    assert [own in command for command in sorted(commands)] == [False, True]
    assert re.search(r"input: .*field\.npz", text)


def test_the_demo_makes_its_own_images(tmp_path: Path) -> None:
    lay_out(tmp_path, {"preset": "demo"})
    (tmp_path / "demo").mkdir()
    shutil.copy(ROOT / "demo" / "pairs.tsv", tmp_path / "demo")
    counts = planned(tmp_path)
    assert counts["demo"] == 1
    assert set(counts) >= set(STAGES) - OF_STATUS


def test_slurm_profile_reaches_the_jobs(bare: Path) -> None:
    partition = yaml.safe_load((ROOT / "profiles/slurm/profile.yaml").read_text())[
        "default-resources"
    ]["slurm_partition"]
    text = snakemake(bare, "-n", "--profile", "slurm")
    jobs = re.findall(r"^rule (\w+):.*?^    resources: (.*?)$", text, re.MULTILINE | re.DOTALL)
    seen = dict(jobs)
    assert set(seen) >= set(STAGES) - {"landmarks"} - OF_STATUS
    for rule, resources in seen.items():
        if rule not in ("all", "data"):
            assert f"slurm_partition={partition}" in resources, rule
    assert "gpu=1" in seen["train_generation"]
    assert "gpu" not in planned_resources(seen["tile"])


def test_slurm_profile_reaches_the_jobs_of_the_status(bare: Path) -> None:
    write_config(bare, {**TINY, "evaluate_status": {"routes": ["oliveira", "virtual"]}})
    defaults = ("--default-resources", "slurm_partition=cpu", "mem_mb=7", "runtime=7")
    text = snakemake(bare, "-n", "--profile", "slurm", *defaults, "--", "status")
    jobs = re.findall(r"^rule (\w+):.*?^    resources: (.*?)$", text, re.MULTILINE | re.DOTALL)
    seen = dict(jobs)
    assert set(seen) >= OF_STATUS
    for rule in OF_STATUS:
        found = {*seen[rule].split(", ")}
        assert "slurm_partition=cpu" in found, rule
        # Each states its own memory and run time.
        assert not found & {"mem_mb=7", "runtime=7"}, rule
        assert {item.split("=")[0] for item in found} >= {"mem_mb", "runtime"}, rule
        networks = rule in ("restain", "train_encoder", "embed", "aggregate")
        assert ("gpu=1" in found) == networks, rule


@pytest.mark.parametrize("name", ["slurm", "kubernetes"])
def test_clusters_repeat_a_failed_job_twice(name: str) -> None:
    profile = yaml.safe_load((ROOT / "profiles" / name / "profile.yaml").read_text())
    assert profile["retries"] == 2


def planned_resources(line: str) -> set[str]:
    return {item.split("=")[0] for item in line.split(", ")}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"filtr": {}}, ["filtr", "did you mean filter?"]),
        ({"filter": {"tissue_fraction_min": 2}}, ["filter.tissue_fraction_min", "at most 1"]),
        ({"sheet": "none.tsv"}, ["none.tsv", "no such file"]),
    ],
)
def test_a_wrong_configuration_is_one_line_at_parse_time(
    bare: Path, changes: dict[str, Any], words: list[str]
) -> None:
    write_config(bare, {**TINY, **changes})
    text = snakemake(bare, "-n", "--cores", "1", check=False)
    profile, line = [line for line in text.splitlines() if line]
    assert "profiles/default" in profile and all(word in line for word in words)


def test_missing_weights_stop_the_targets_that_need_them_before_the_first_job(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(bare / "empty"))
    untrained = {**TINY["train_segmentation"], "base_width": 64, "encoder_weights": "imagenet"}
    write_config(bare, {**TINY, "train_segmentation": untrained})
    assert "mask" in planned(bare, "data")
    text = snakemake(bare, "-n", "--cores", "1", check=False)
    assert "train_segmentation.encoder_weights" in text and "Job stats" not in text
    write_config(
        bare, {**TINY, "mask": {"engines": {"deepliif": {}}}, "index": {"target": "deepliif"}}
    )
    text = snakemake(bare, "-n", "--cores", "1", "data", check=False)
    assert "mask.engines.deepliif.model" in text and "stain" in text
    assert "describe" in planned(bare, "results/describe/slide_1.parquet")


def test_another_content_of_the_weights_of_nuclei_reruns_the_masks(bare: Path) -> None:
    weights = bare / "own.safetensors"
    shutil.copy(nucleus_files.SHIPPED, weights)
    write_config(bare, TINY, mask={"engines": {"stain": {"nuclei": "own.safetensors"}}})
    made = [layout.TILES, layout.TILE_SHARD, layout.MASK_SHARD, layout.MASKS, layout.CELLS]
    for age, name in enumerate(reversed(made), start=1):
        path = bare / name.format(unit="bci.000")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".tar":
            tarfile.open(path, "w").close()
        else:
            pq.write_table(pa.table({"tile": ["a"]}), path)
        os.utime(path, (time.time() - 60 * age,) * 2)
    for path in (weights, *(bare / "img").iterdir()):
        os.utime(path, (time.time() - 3600,) * 2)
    masks = layout.MASKS.format(unit="bci.000")
    assert planned(bare, masks) == {}
    os.utime(weights)
    assert planned(bare, masks) == {"mask": 1}


def test_the_paper_sizes_never_run_on_the_demo_by_accident(bare: Path) -> None:
    write_config(bare, {"preset": "hemera"})
    text = snakemake(bare, "-n", "--cores", "1", check=False)
    assert "sheet: not set" in text and "Job stats" not in text


def with_h_and_e_alone(folder: Path) -> None:
    """Add three rows of H&E alone to the sheet: a slide, and two plain images."""
    sheet = folder / "pairs.tsv"
    rows = [
        "slide_9\tc9\tacrobat\timg/9_he.tif\t\t\t\t",
        "tile_8\tc8\tbci\timg/8_he.png\t\t\t0.46\t",
        "tile_9\tc9\tbci\timg/9_he.png\t\t\t0.46\t",
    ]
    sheet.write_text(sheet.read_text() + "\n".join(rows) + "\n")
    for name in ("9_he.tif", "8_he.png", "9_he.png"):
        (folder / "img" / name).touch()


def test_the_status_needs_neither_masks_nor_networks(bare: Path) -> None:
    before = planned(bare)
    with_h_and_e_alone(bare)
    # H&E alone changes nothing in the training set.
    assert planned(bare) == before
    counts = planned(bare, "status")
    assert counts.pop("status") == 1
    units = before["tile"] + 3
    assert counts == {
        "describe": units, "register": 1, "tile": units, "cases": 1, "embed": units,
        "aggregate": 2, "evaluate_status": 1,
    }  # fmt: skip


def test_the_route_of_cells_needs_masks_and_index_but_no_features(bare: Path) -> None:
    with_h_and_e_alone(bare)
    before = planned(bare, "status")
    write_config(bare, TINY, evaluate_status={"routes": ["floor", "cells"]})
    counts = planned(bare, "status")
    assert counts.pop("mask") == counts["tile"] - 3, "none of H&E alone"
    assert (counts.pop("filter"), counts.pop("index")) == (1, 1)
    assert counts == {**before, "aggregate": 2}


def test_weights_of_an_encoder_that_are_missing_end_the_run(bare: Path) -> None:
    write_config(bare, TINY, evaluate_status={"routes": ["foundation"]})
    text = snakemake(bare, "-n", "--cores", "2", "status", check=False)
    assert "embed.weights: no weights of encoder uni2_h; set embed" in text
    assert "Job stats" not in text and "Traceback" not in text
    assert "embed" not in planned(bare)
    (bare / "uni2_h.bin").touch()
    write_config(
        bare, TINY, evaluate_status={"routes": ["foundation"]},
        embed={"weights": ["uni2_h=uni2_h.bin"]},
    )  # fmt: skip
    counts = planned(bare, "status")
    assert counts["embed"] == 2 * counts["tile"] and counts["aggregate"] == 2


def test_the_encoder_of_oliveira_is_trained_once_before_its_features(bare: Path) -> None:
    write_config(bare, TINY, evaluate_status={"routes": ["oliveira"]})
    counts = planned(bare, "status")
    assert counts["train_encoder"] == 1 and counts["aggregate"] == 2
    assert counts["embed"] == 2 * counts["tile"]
    assert "train_encoder" not in planned(bare)
    text = snakemake(bare, "-n", "--cores", "2", "-p", "status")
    assert "hemera train_encoder --network her2_cnn" in text
    weights = "results/train_encoder/her2_cnn/weights.safetensors"
    assert f"--encoder her2_cnn --encoder-weights {weights} --encoder-metadata" in text
    assert "--aggregator top_scores" in text and "--encoder-cases train_only" in text
    assert "--encoder statistics --features" in " ".join(text.split())


def test_the_networks_of_oyelade_need_masks_and_annotations(bare: Path) -> None:
    with_h_and_e_alone(bare)
    write_config(bare, TINY, evaluate_status={"routes": ["oyelade"]})
    counts = planned(bare, "status")
    units = counts["tile"]
    assert counts["train_encoder"] == 3 and counts["mask"] == units - 3
    # The networks are for units with HER2 alone.
    assert counts["embed"] == units + 3 * (units - 3)
    text = " ".join(snakemake(bare, "-n", "--cores", "2", "-p", "status").split())
    assert "--network tumour" in text and "--sheet" in text
    assert "--engine stain" in text and "--aggregator fused" in text
    write_config(
        bare, TINY, evaluate_status={"routes": ["oyelade"]},
        train_encoder={"labels": "slide"}, aggregate={"tumour_min": 0.0, "fusion": "class"},
    )  # fmt: skip
    counts = planned(bare, "status")
    assert counts["train_encoder"] == 2
    assert "filter" not in counts and "index" not in counts


def test_the_routes_of_both_networks_need_their_training(bare: Path) -> None:
    with_h_and_e_alone(bare)
    write_config(bare, TINY, evaluate_status={"routes": ["virtual"]})
    counts = planned(bare, "status")
    units = counts["tile"]
    assert counts["train_generation"] == 1 and "train_segmentation" not in counts
    # Real HER2 of pairs for the index, and generated HER2 of all.
    assert counts["restain"] == units and counts["mask"] == units - 3 + units
    text = " ".join(snakemake(bare, "-n", "--cores", "2", "-p", "status").split())
    assert "--tiles results/restain/" in text and "--shard results/restain_mask/" in text
    assert "--engine stain --encoder virtual" in text
    write_config(bare, TINY, evaluate_status={"routes": ["segmentation"]})
    counts = planned(bare, "status")
    assert counts["train_segmentation"] == 1 and counts["embed"] == 2 * units
    assert "restain" not in counts
    text = " ".join(snakemake(bare, "-n", "--cores", "2", "-p", "status").split())
    assert "--encoder segmenter --encoder-weights results/train_segmentation/" in text
    assert "--index results/index/index.parquet" in text
    assert not {"restain", "cases", "embed"} & {*planned(bare)}


def test_the_demo_of_the_status_is_in_a_folder_of_its_own(tmp_path: Path) -> None:
    lay_out(tmp_path, {"preset": "demo"})
    (tmp_path / "demo").mkdir()
    for name in ("status.tsv", "status.yaml"):
        shutil.copy(ROOT / "demo" / name, tmp_path / "demo")
    words = ("--directory", "demo_status", "--configfile", "demo/status.yaml")
    counts = planned(tmp_path, "status", *words)
    assert counts["demo"] == 1 and counts["embed"] == 4 and counts["aggregate"] == 2
