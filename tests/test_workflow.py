"""The graph itself: what is planned, what runs again after a change, and one run to the end."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from hemera.config import STAGES
from hemera.sheet import read_sheet
from hemera.tables import read_metadata

ROOT = Path(__file__).parent.parent
PIXEL_STAGES = {"describe", "register", "landmarks", "tile", "mask"}
DATA_STAGES = ("describe", "register", "landmarks", "tile", "mask", "filter", "index")

TINY: dict[str, Any] = {
    "preset": "demo",
    "sheet": "pairs.tsv",
    "allow_demo_sizes": True,
    "block_count": 2,
    "register": {
        "preset": "default_initial_nonrigid_fast",
        "size_px": 512,
        "levels": 5,
        "iterations": 60,
    },
    "tile": {"size_px": 256},
    "train_generation": {
        "network": "unet_128",
        "base_width": 4,
        "discriminator_width": 4,
        "crop_px": 128,
        "epochs": 1,
        "decay_from_epoch": 1,
        "workers": 0,
    },
    "train_segmentation": {
        "base_width": 4,
        "crop_px": 128,
        "epochs": 1,
        "batch_size": 4,
        "workers": 0,
    },
    "evaluate": {"generators": ["hemera"]},
}


def lay_out(folder: Path, config: Mapping[str, Any]) -> None:
    """Make a working directory of HEMERA with its own config.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("Snakefile", "workflow", "envs", "profiles"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "slurm").symlink_to("profiles/slurm")
    write_config(folder, config)


def write_config(folder: Path, config: Mapping[str, Any], **changes: Mapping[str, Any]) -> None:
    values = dict(config)
    for section, keys in changes.items():
        values[section] = {**values.get(section, {}), **keys}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))


def snakemake(folder: Path, *words: str, check: bool = True) -> str:
    """Run Snakemake as a user would; return what it printed."""
    environment = dict(os.environ)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if check and done.returncode:
        pytest.fail(f"snakemake {' '.join(words)}:\n{done.stdout[-8000:]}")
    return done.stdout


def planned(folder: Path, *words: str) -> dict[str, int]:
    """Return how many jobs of each rule a dry run plans."""
    text = snakemake(folder, "-n", "--cores", "2", *words)
    counts = {
        rule: int(count) for rule, count in re.findall(r"^(\w+)\s+(\d+)$", text, re.MULTILINE)
    }
    counts.pop("total", None)
    counts.pop("all", None)
    return counts


def digests(folder: Path) -> dict[str, str]:
    """Return the digest of every shard and table of the data stages."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for stage in DATA_STAGES
        for path in sorted((folder / "results" / stage).rglob("*"))
        if path.is_file()
    }


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
    assert set(planned(bare)) == set(STAGES) - {"landmarks"}


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
        "pair\tcase\tdataset\the\ther2\tregistered\tdisplacement",
        "slide_1\tc1\tacrobat\timg/1_he.tif\timg/1_her2.tif\ttrue\t",
        "slide_2\tc2\tacrobat\timg/2_he.png\timg/2_her2.png\t\tfield.npz",
    ]
    (bare / "field.npz").touch()
    (bare / "pairs.tsv").write_text("\n".join(rows) + "\n")
    counts = planned(bare)
    assert counts["register"] == 1
    assert counts["tile"] == 2
    text = snakemake(bare, "-n", "--cores", "2", "-p")
    assert text.count("--displacement results/register/slide_2.displacement.npz") >= 2
    assert re.search(r"input: .*field\.npz", text)


def test_a_map_of_ones_own_is_measured_at_landmarks_too(bare: Path) -> None:
    columns = "pair\tcase\tdataset\the\ther2\tregistered\tdisplacement"
    rows = [
        f"{columns}\the_landmarks\ther2_landmarks",
        "slide_1\tc1\tacrobat\timg/1_he.tif\timg/1_her2.tif\ttrue\t\tpoints.csv\tpoints.csv",
        "slide_2\tc2\tacrobat\timg/2_he.png\timg/2_her2.png\t\tfield.npz\tpoints.csv\tpoints.csv",
    ]
    for name in ("points.csv", "field.npz"):
        (bare / name).touch()
    (bare / "pairs.tsv").write_text("\n".join(rows) + "\n")
    text = snakemake(bare, "-n", "--cores", "2", "-p")
    commands = re.findall(r"hemera landmarks .*--unit.*", text)
    assert len(commands) == 2
    own = "--displacement results/register/slide_2.displacement.npz"
    assert sum(own in command for command in commands) == 1


def test_the_demo_makes_its_own_images(tmp_path: Path) -> None:
    lay_out(tmp_path, {"preset": "demo"})
    (tmp_path / "demo").mkdir()
    shutil.copy(ROOT / "demo" / "pairs.tsv", tmp_path / "demo")
    counts = planned(tmp_path)
    assert counts["demo"] == 1
    assert set(counts) >= set(STAGES)


def test_slurm_profile_reaches_the_jobs(bare: Path) -> None:
    partition = yaml.safe_load((ROOT / "profiles/slurm/profile.yaml").read_text())[
        "default-resources"
    ]["slurm_partition"]
    text = snakemake(bare, "-n", "--profile", "slurm")
    jobs = re.findall(r"^rule (\w+):.*?^    resources: (.*?)$", text, re.MULTILINE | re.DOTALL)
    seen = dict(jobs)
    assert set(seen) >= set(STAGES) - {"landmarks"}
    for rule, resources in seen.items():
        if rule not in ("all", "data"):
            assert f"slurm_partition={partition}" in resources, rule
    assert "gpu=1" in seen["train_generation"]
    assert "gpu" not in planned_resources(seen["tile"])


def planned_resources(line: str) -> set[str]:
    return {item.split("=")[0] for item in line.split(", ")}


def test_default_profile_holds_nothing_that_slurm_sets() -> None:
    default = yaml.safe_load((ROOT / "profiles/default/profile.yaml").read_text())
    assert set(default) == {"rerun-incomplete", "keep-going", "printshellcmds", "show-failed-logs"}
    assert (ROOT / "slurm").resolve() == ROOT / "profiles/slurm"


@pytest.mark.parametrize("stage", [*STAGES, "demo"])
def test_every_rule_says_what_it_needs(stage: str) -> None:
    text = (ROOT / f"workflow/rules/{stage}.smk").read_text()
    assert re.search(rf"^\s*rule {stage}:", text, re.MULTILINE)
    for word in ("log:", "benchmark:", "conda:", "threads:", "mem_mb=", "runtime=", "shell:"):
        assert word in text, word
    if stage.startswith("train_") or stage == "mask":
        assert "gpu=" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"filtr": {}}, ["filtr", "did you mean filter?"]),
        ({"filter": {"tissue_fraction_min": 2}}, ["filter.tissue_fraction_min", "at most 1"]),
        ({"sheet": "none.tsv"}, ["none.tsv", "no such sheet"]),
    ],
)
def test_a_wrong_configuration_is_one_line_at_parse_time(
    bare: Path, changes: dict[str, Any], words: list[str]
) -> None:
    write_config(bare, {**TINY, **changes})
    text = snakemake(bare, "-n", "--cores", "1", check=False)
    assert "Traceback" not in text
    line = next(line for line in text.splitlines() if words[0] in line)
    assert all(word in line for word in words)


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


def test_the_paper_sizes_never_run_on_the_demo_by_accident(bare: Path) -> None:
    write_config(bare, {"preset": "hemera"})
    text = snakemake(bare, "-n", "--cores", "1", check=False)
    assert "sheet: not set" in text and "Job stats" not in text


def test_a_missing_image_is_named(bare: Path) -> None:
    (bare / "img/2_he.png").unlink()
    text = snakemake(bare, "-n", "--cores", "1", check=False)
    assert "MissingInputException" in text
    assert "img/2_he.png" in text


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, cohort: Path) -> Path:
    """The small cohort, run to the end with two processors."""
    folder = tmp_path_factory.mktemp("small")
    lay_out(folder, TINY)
    shutil.copytree(cohort, folder, dirs_exist_ok=True)
    snakemake(folder, "--cores", "2")
    return folder


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
    snakemake(tmp_path, "--cores", "1", "data")
    assert digests(tmp_path) == digests(small)
    marks = [
        read_metadata(folder / "results/index/index.parquet")["fingerprint"]
        for folder in (small, tmp_path)
    ]
    assert marks[0] == marks[1]


def test_a_filter_reaches_no_pixel(small: Path) -> None:
    write_config(small, TINY, filter={"tissue_fraction_min": 0.55})
    counts = planned(small)
    assert {
        "filter",
        "index",
        "report",
        "train_generation",
        "train_segmentation",
        "evaluate",
    } == set(counts)
    before = digests(small)
    snakemake(small, "--cores", "2", "data")
    after = digests(small)
    changed = {name.split("/")[1] for name in after if after[name] != before.get(name)}
    assert changed == {"filter", "index"}
    write_config(small, TINY)
    snakemake(small, "--cores", "2")
    assert digests(small) == before
    assert planned(small) == {}


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


def test_the_target_of_training_makes_no_mask_again(small: Path) -> None:
    write_config(small, TINY, mask={"engines": {"stain": {"nucleus_edge": 0.1}}})
    assert planned(small) == {}, "the default, written out"
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


def test_a_version_raised_in_the_code_runs_again(small: Path, tmp_path: Path) -> None:
    """Snakemake does not see edits inside a package: `version` is what it sees."""
    package = tmp_path / "hemera"
    shutil.copytree(ROOT / "hemera", package, ignore=shutil.ignore_patterns("__pycache__"))
    config = package / "config" / "masks.py"

    def plan() -> set[str]:
        done = subprocess.run(
            [sys.executable, "-m", "snakemake", "-n", "--cores", "2"],
            cwd=small,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
        )
        return {
            rule
            for rule, _ in re.findall(r"^(\w+)\s+(\d+)$", done.stdout, re.MULTILINE)
            if rule not in ("total", "all")
        }

    config.write_text(config.read_text() + "\n# a comment changes nothing\n")
    assert plan() == set()
    edited, count = re.subn(
        r'(section: ClassVar\[str\] = "mask"\n(?:    version: ClassVar\[int\] = \d+\n)?)',
        r"\1    version: ClassVar[int] = 99\n",
        config.read_text(),
    )
    assert count == 1
    config.write_text(edited)
    assert "mask" in plan()
    assert not {"describe", "register", "tile"} & plan()


def test_a_unit_that_the_sheet_lacks_is_named(bare: Path) -> None:
    text = snakemake(bare, "-n", "--cores", "1", "results/tile/nobody.tar", check=False)
    assert "no unit nobody" in text
