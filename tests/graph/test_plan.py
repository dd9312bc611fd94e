"""Times, sizes and what is missing, from files written by hand."""

from pathlib import Path
from typing import Any

import pytest

from hemera.config import load
from hemera.graph.dry_run import Job
from hemera.graph.plan import StagePlan, missing, stage_plans


def job(unit: str, rule: str = "tile", threads: int = 2, memory_mb: int | None = 3000) -> Job:
    outputs = (f"results/{rule}/{unit}.tar", f"results/{rule}/{unit}.parquet")
    reason = f"Missing output files: {outputs[0]}"
    return Job(rule, unit, outputs, f"logs/{rule}/{unit}.tsv", reason, threads, memory_mb)


def test_times_and_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("logs/tile").mkdir(parents=True)
    Path("results/tile").mkdir(parents=True)
    for unit, time, size in (("p1", 360, 1000), ("p2", 720, 3000), ("p3", 1080, 9000)):
        Path(f"logs/tile/{unit}.tsv").write_text(f"s\n{time}\n")
        Path(f"results/tile/{unit}.tar").write_bytes(bytes(size))
        Path(f"results/tile/{unit}.parquet").write_bytes(bytes(10))
    jobs = [job("p1"), job("new"), job("new", "mask"), job("new", "register", 1, 2350)]
    units = ["p1", "p2", "p3", "new"]
    register, tile, mask = stage_plans(jobs, units, cores=4)
    assert (tile.stage, tile.jobs, tile.units) == ("tile", 2, ("p1", "new"))
    assert tile.reasons == {"missing: results/tile/new.tar": 2}
    # Its own six minutes, and the median, twelve.
    assert (tile.hours, tile.cpu_hours) == (pytest.approx(0.3), pytest.approx(0.6))
    assert (tile.bytes, tile.replaced_bytes) == (1010 + 3010, 1010)
    assert (mask.hours, mask.bytes, mask.replaced_bytes) == (None, None, 0)
    # A canvas of one megapixel: two images of three bytes, a displacement of two floats.
    assert register.temporary_bytes == 14_000_000
    assert tile.temporary_bytes == 0


def test_what_is_missing() -> None:
    config = load({"preset": "demo"})
    plan = StagePlan("mask", 1, ("p",), {}, 1.0, 1.0, 5_000_000_000, 1_000_000_000, 0, 9000)
    assert missing([plan], config, 16_000, 5_000_000_000) == []
    memory, disk = missing([plan], config, 8_000, 3_000_000_000)
    assert memory == "memory: mask requests 9000 MB, this machine has 8000 MB"
    assert disk == "disk: 4.0 GB more are needed, 3.0 GB are free"


def test_weights_of_the_planned_networks_are_missing() -> None:
    config = load({"preset": "demo", "train_encoder": {"weights": ["tumour=none.pth"]}})
    unknown: tuple[Any, ...] = ({}, None, None, None, 0, None, None)
    embed = StagePlan("embed", 3, ("uni2_h/p", "uni2_h/q", "statistics/p"), *unknown)
    train = StagePlan("train_encoder", 2, ("tumour", "stain"), *unknown)
    of_embed, of_train = missing([embed, train], config, 16_000, 0)
    assert "no weights of encoder uni2_h" in of_embed
    assert of_train == "train_encoder.weights: none.pth, of tumour, does not exist; correct it"
