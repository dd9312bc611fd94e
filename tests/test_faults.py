"""Faults injected into the real graph: after a rerun, every file is that of an undisturbed run."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.small_workflow import (
    TINY,
    digests,
    killed_and_run_again,
    planned,
    snakemake,
    write_config,
)

pytestmark = pytest.mark.slow

Seen = Callable[..., None]

CHANGED = {"describe": {"he_saturation_max": 0.09}, "train_generation": {"seed": 7}}
"""Reruns every stage; `register` by its input."""


@pytest.fixture(scope="module")
def undisturbed(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the changed options give in one run."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    copied(finished, folder)
    snakemake(folder, "--cores", "2")
    return digests(folder)


def copied(finished: Path, folder: Path) -> None:
    """Copy a finished run with Snakemake's records, and change its options."""
    shutil.copytree(finished, folder, symlinks=True)
    write_config(folder, TINY, **CHANGED)


DATA = ("describe", "register", "landmarks", "tile", "mask", "filter", "index", "report")
TRAINING = ("train_generation", "train_segmentation", "evaluate")
FEW = [("mask", "during"), ("tile", "after"), ("train_segmentation", "during")]


def cases() -> Iterator[tuple[str, str]]:
    """Yield the stages and moments: a few, or with FULL=1 all."""
    if os.environ.get("FULL") != "1":
        yield from FEW
        return
    for stage in (*DATA, *TRAINING):
        for moment in ("before", "during", "after"):
            yield stage, moment


@pytest.mark.fault
@pytest.mark.parametrize(("stage", "moment"), list(cases()))
def test_a_killed_job_loses_nothing(
    stage: str, moment: str, finished: Path, undisturbed: dict[str, str], tmp_path: Path,
    fault_seen: Seen,
) -> None:  # fmt: skip
    """An option is changed, a job dies, the workflow is run again."""
    folder = tmp_path / "run"
    copied(finished, folder)
    killed_and_run_again(folder, stage, moment)
    same = digests(folder) == undisturbed
    fault_seen(f"an option changed, {stage} killed {moment}", "repeated by the next run", same)
    assert same


@pytest.mark.fault
def test_a_deleted_result_is_made_again(finished: Path, tmp_path: Path, fault_seen: Seen) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder, symlinks=True)
    before = digests(folder)
    lost = ["tile/bci.000.tar", "mask/bci.001.cells.parquet", "describe/bci.000.parquet"]
    for name in lost:
        (folder / "results" / name).unlink()
    counts = planned(folder, "data")
    assert counts["tile"] == counts["describe"] == counts["mask"] - 1 == 1
    snakemake(folder, "--cores", "2")
    same = digests(folder) == before
    fault_seen("a shard and two tables are deleted", "made again by the next run", same)
    assert same


@pytest.mark.fault
def test_a_flipped_bit_in_a_tile_stops_the_masks(
    finished: Path, tmp_path: Path, fault_seen: Seen
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder, symlinks=True)
    before = digests(folder)
    row = pq.read_table(folder / "results/tile/bci.000.parquet").to_pylist()[1]
    shard = folder / "results" / row["shard"]
    times, stored = shard.stat(), bytearray(shard.read_bytes())
    stored[row["her2_offset"] + row["her2_length"] // 2] ^= 0x10
    shard.write_bytes(stored)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    write_config(folder, TINY, mask={"completeness_min": 0.55})
    text = snakemake(folder, "--cores", "2", "data", check=False)
    assert f"{row['tile']}.her2.jpg differs from its SHA-256" in text
    assert not (folder / "results/mask/bci.000.parquet").exists()
    shard.unlink()
    write_config(folder, TINY)
    snakemake(folder, "--cores", "2", "data")
    after = {name: digest for name, digest in before.items() if name.split("/")[1] in DATA}
    found = digests(folder)
    same = {name: found[name] for name in after} == after
    fault_seen("one bit flipped in a stored JPEG", f"the job fails: {row['tile']} differs", same)
    assert same
