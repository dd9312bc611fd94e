"""Faults injected into the graph of the HER2 status are named; then the bytes are the same."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.small_workflow import (
    STATUS,
    digests,
    killed_and_run_again,
    planned,
    snakemake,
    write_config,
)

pytestmark = [pytest.mark.slow, pytest.mark.fault]

Seen = Callable[..., None]


def copied(finished: Path, parent: Path) -> Path:
    return shutil.copytree(finished, parent / "run", symlinks=True)


FEATURES = "results/embed/statistics/signal.000.h5"
ENCODER = "results/train_encoder/her2_cnn/weights.safetensors"
GENERATOR = "results/train_generation/demo/generator.safetensors"
PREDICTIONS = "results/aggregate/floor/predictions.parquet"
FLIPPED = {
    "features": (FEATURES, "results/aggregate/floor", "differs from its SHA-256"),
    "weights of an encoder": (ENCODER, "results/embed/her2_cnn", "differs from its SHA-256"),
    "weights of the generator": (GENERATOR, "results/restain", "differs from its SHA-256"),
    "predictions": (PREDICTIONS, "results/evaluate_status", "predictions.parquet"),
}
"""File, the folder of the results that are deleted so that it is read, and what is reported."""


@pytest.mark.parametrize("kind", FLIPPED)
def test_a_flipped_bit_stops_the_stage_that_reads_it(
    kind: str, finished_status: Path, tmp_path: Path, fault_seen: Seen
) -> None:
    """The file and those made with it are deleted, and made again with the same bytes."""
    name, reader, words = FLIPPED[kind]
    folder = copied(finished_status, tmp_path)
    before = digests(folder)
    path = folder / name
    stored, times = bytearray(path.read_bytes()), path.stat()
    place = len(stored) // 2
    if path.suffix == ".parquet":
        column = pq.ParquetFile(path).metadata.row_group(0).column(0)
        # Among the values; the header of a page begins with statistics, which nothing reads.
        place = column.dictionary_page_offset + column.total_compressed_size - 5
    stored[place] ^= 8
    path.write_bytes(stored)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    shutil.rmtree(folder / reader)
    text = snakemake(folder, "--cores", "2", "status", check=False)
    # Of several jobs that read the file, one message each.
    line, *_ = {line for line in text.splitlines() if "ERROR" in line and path.name in line}
    assert words in line
    assert not any(path.is_file() for path in (folder / reader).rglob("*"))
    for own in path.parent.iterdir():
        own.unlink()
    snakemake(folder, "--cores", "2", "status")
    same = digests(folder) == before
    fault_seen(f"one bit flipped in {kind}", f"the job fails: {line.strip()}", same)
    assert same


@pytest.mark.parametrize("name", [FEATURES, PREDICTIONS])
def test_a_file_that_was_cut_off_is_named_before_any_job(
    name: str, finished_status: Path, tmp_path: Path, fault_seen: Seen
) -> None:
    folder = copied(finished_status, tmp_path)
    before = digests(folder)
    os.truncate(folder / name, (folder / name).stat().st_size // 2)
    text = snakemake(folder, "-n", "--cores", "2", "status", check=False)
    (line,) = [line for line in text.splitlines() if "cut off" in line]
    assert name in line
    (folder / name).unlink()
    snakemake(folder, "--cores", "2", "status")
    same = digests(folder) == before and planned(folder, "status") == {}
    fault_seen(f"{Path(name).name} is cut off", f"no job begins: {line.strip()}", same)
    assert same


CHANGED = {
    "train_generation": {"seed": 7},
    "train_encoder": {"seed": 7},
    "cases": {"seed": 7},
}
"""Reruns every stage that only this target has, and the masks of virtual images."""
STAGES = ("cases", "train_encoder", "embed", "restain", "mask", "aggregate", "evaluate_status")
FEW = [("restain", "during"), ("aggregate", "after")]


def killed() -> Iterator[tuple[str, str]]:
    """Yield the stages and moments: a few, or with FULL=1 all."""
    if os.environ.get("FULL") != "1":
        yield from FEW
        return
    for stage in STAGES:
        for moment in ("before", "during", "after"):
            yield stage, moment


@pytest.fixture(scope="module")
def undisturbed(finished_status: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the changed options give in one run."""
    folder = copied(finished_status, tmp_path_factory.mktemp("undisturbed"))
    write_config(folder, STATUS, **CHANGED)
    snakemake(folder, "--cores", "2", "status")
    return digests(folder)


@pytest.mark.parametrize(("stage", "moment"), list(killed()))
def test_a_killed_job_loses_nothing(
    stage: str, moment: str, finished_status: Path, undisturbed: dict[str, str], tmp_path: Path,
    fault_seen: Seen,
) -> None:  # fmt: skip
    """Options are changed, a job dies, the workflow is run again."""
    folder = copied(finished_status, tmp_path)
    write_config(folder, STATUS, **CHANGED)
    killed_and_run_again(folder, stage, moment, "status")
    same = digests(folder) == undisturbed
    fault_seen(f"options changed, {stage} killed {moment}", "repeated by the next run", same)
    assert same
