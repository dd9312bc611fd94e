"""The workflow on a Slurm of one node: ``snakemake --profile slurm``, as a user would run it.

Run with ``make test-slurm``. A few faults; with FULL=1 all of them, and the demo's own sheet.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hemera.tables import read_metadata
from tests.small_slurm import Missing, Slurm, running, unpack, wait_for
from tests.small_workflow import ROOT, STATUS, TINY, digests, lay_out, snakemake, write_config

pytestmark = pytest.mark.slurm

FULL = os.environ.get("FULL") == "1"
needs_full = pytest.mark.skipif(not FULL, reason="FULL=1 runs it")
PROMPT = ("--slurm-init-seconds-before-status-checks=2", "--seconds-between-status-checks=2")
"""The profile waits longer, for the sake of a real controller."""
ONE = "results/describe/bci.000.parquet"
"""The result of one job."""

SHIM = """\
#!{python}
import os, sys, time
if sys.argv[1] == {stage!r}:
    with open({mark!r}, "a") as calls:
        calls.write("call\\n")
    if len(open({mark!r}).readlines()) == {call}:
        {fault}
os.execv({hemera!r}, [{hemera!r}, *sys.argv[1:]])
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    try:
        root = unpack(ROOT / "build" / "slurm")
    except Missing as missing:
        pytest.skip(str(missing))
    with running(root, tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def small(cohort: Path, tmp_path: Path) -> Path:
    """A working directory with the small cohort."""
    lay_out(tmp_path / "run", TINY)
    for path in cohort.iterdir():
        (tmp_path / "run" / path.name).symlink_to(path)
    return tmp_path / "run"


def on_slurm(
    slurm: Slurm,
    folder: Path,
    *words: str,
    check: bool = True,
    during: Callable[[], None] = lambda: None,
) -> str:
    """Run ``snakemake --profile slurm``, and `during` meanwhile; return what it printed."""
    found = [folder.parent / "shims", slurm.bin, Path(sys.executable).parent, os.environ["PATH"]]
    printed = folder.parent / "printed"
    with printed.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "snakemake", "--profile", "slurm", *words],
            cwd=folder,
            env={**os.environ, "PATH": os.pathsep.join(map(str, found))},
            stdout=out,
            stderr=out,
        )
        try:
            during()
            process.wait()
        finally:
            process.kill()
            process.wait()
    text = printed.read_text()
    assert not check or process.returncode == 0, text[-8000:]
    return text


def inject(folder: Path, stage: str, fault: str, call: int = 1) -> Path:
    """Let a call of a stage execute `fault`; return a file with one line for each call."""
    shims, mark = folder.parent / "shims", folder.parent / "injected"
    shims.mkdir(exist_ok=True)
    hemera = str(Path(sys.executable).parent / "hemera")
    text = SHIM.format(
        python=sys.executable, mark=str(mark), stage=stage, call=call, fault=fault, hemera=hemera
    )
    (shims / "hemera").write_text(text)
    (shims / "hemera").chmod(0o755)
    return mark


def own_jobs(slurm: Slurm, folder: Path) -> list[dict[str, str]]:
    return [job for job in slurm.jobs() if job["WorkDir"] == str(folder)]


def minutes(limit: str) -> int:
    """Return a limit as Slurm prints it, [days-]hours:minutes:seconds, in minutes."""
    days, _, clock = limit.rpartition("-")
    hours, mins, _ = clock.split(":")
    return int(days or 0) * 1440 + int(hours) * 60 + int(mins)


def planned_jobs(folder: Path, target: str = "data") -> dict[str, list[dict[str, int]]]:
    """Return threads and resources of the jobs of each rule, from the plan of a finished run."""
    text = snakemake(folder, "-n", "--cores", "64", "--forceall", target)
    found: dict[str, list[dict[str, int]]] = {}
    for block in re.split(r"^(?=rule )", text, flags=re.MULTILINE)[1:]:
        rule = re.match(r"rule (\w+):", block)
        resources = re.search(r"^ +resources: (.*)$", block, re.MULTILINE)
        threads = re.search(r"^ +threads: (\d+)$", block, re.MULTILINE)
        if rule is None or resources is None or rule[1] == target:
            continue
        own = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)(?=,|$)", resources[1])}
        found.setdefault(rule[1], []).append({**own, "threads": int(threads[1]) if threads else 1})
    return found


def test_the_data_workflow_is_that_of_one_machine(
    slurm: Slurm, small: Path, cohort: Path, tmp_path: Path
) -> None:
    config = TINY
    if FULL:
        config = {"preset": "demo"}
        (small / "demo").mkdir()
        shutil.copy(ROOT / "demo" / "pairs.tsv", small / "demo")
    write_config(small, config)
    on_slurm(slurm, small, "data", *(() if FULL else PROMPT))
    records = own_jobs(slurm, small)
    assert {job["JobState"] for job in records} == {"COMPLETED"}
    check_resources(records, planned_jobs(small))
    local = tmp_path / "local"
    lay_out(local, config)
    for path in cohort.iterdir():
        (local / path.name).symlink_to(path)
    if FULL:
        shutil.copytree(small / "demo", local / "demo")
    snakemake(local, "--cores", "2", "data")
    marks = [read_metadata(f / "results/index/index.parquet") for f in (local, small)]
    assert marks[0]["fingerprint"] == marks[1]["fingerprint"]
    assert digests(local) == digests(small)


@needs_full
def test_the_status_is_that_of_one_machine(
    slurm: Slurm, finished_status: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    lay_out(folder, STATUS)
    for path in finished_status.iterdir():
        if not (path.name in {"results", "logs", "finished"} or (folder / path.name).exists()):
            (folder / path.name).symlink_to(path)
    on_slurm(slurm, folder, *PROMPT, "status")
    records = own_jobs(slurm, folder)
    assert {job["JobState"] for job in records} == {"COMPLETED"}
    check_resources(records, planned_jobs(folder, "status"))
    assert digests(folder) == digests(finished_status)


def check_resources(
    records: list[dict[str, str]], planned: dict[str, list[dict[str, int]]]
) -> None:
    """Every job has the processors, memory, GPU and run time of its rule."""
    seen: dict[str, list[dict[str, str]]] = {}
    for job in records:
        rule = re.match(r"rule_(\w+?)(_wildcards_.*)?$", job["Comment"])
        assert rule is not None, job["Comment"]
        seen.setdefault(rule[1], []).append(job)
    assert set(seen) == set(planned)
    for name, jobs in seen.items():
        own = planned[name]
        for job in jobs:
            assert int(job["NumCPUs"]) == own[0]["threads"], name
            assert job["MinMemoryNode"].endswith("M"), name
            memory = int(job["MinMemoryNode"][:-1])
            assert memory in {one["mem_mb"] for one in own}, (name, memory)
        gpus = sum("gpu:1" in job.get("TresPerJob", "") for job in jobs)
        assert gpus == sum(one.get("gpu", 0) for one in own), name
        limits = sum(minutes(job["TimeLimit"]) for job in jobs)
        assert limits == sum(one["runtime"] for one in own), name


def test_a_job_starts_snakemake_once(slurm: Slurm, small: Path) -> None:
    on_slurm(slurm, small, *PROMPT, "--slurm-keep-successful-logs", ONE)
    (log,) = (small / ".snakemake/slurm_logs/rule_describe").rglob("*.log")
    assert log.read_text().count("Building DAG of jobs") == 1


@needs_full
def test_jobs_of_a_rule_may_be_an_array(slurm: Slurm, small: Path) -> None:
    on_slurm(slurm, small, *PROMPT, "--slurm-array-jobs", "describe, tile", "data")
    arrays = [job for job in own_jobs(slurm, small) if "ArrayJobId" in job]
    assert len(arrays) > 2
    assert {job["JobState"] for job in own_jobs(slurm, small)} == {"COMPLETED"}


def test_out_of_memory_is_named_and_the_next_attempt_has_more(slurm: Slurm, small: Path) -> None:
    inject(small, "describe", "b = bytearray(b'1') * (3000 << 20); time.sleep(60)")
    text = on_slurm(slurm, small, *PROMPT, ONE)
    assert "out of memory: 2000 MB; next attempt 4000 MB" in text
    assert (small / ONE).exists()


@needs_full
def test_without_an_attempt_left_the_message_names_the_remedy(slurm: Slurm, small: Path) -> None:
    inject(small, "describe", "b = bytearray(b'1') * (3000 << 20); time.sleep(60)")
    text = on_slurm(slurm, small, *PROMPT, "--retries=0", ONE, check=False)
    assert "describe bci.000: out of memory: 2000 MB; no attempt is left" in text
    assert "--set-resources describe:mem_mb=" in text
    assert "To continue, run the same command again" in text


@needs_full
def test_a_time_limit_is_named_and_the_next_attempt_has_more(slurm: Slurm, small: Path) -> None:
    inject(small, "describe", "time.sleep(600)")
    limit = "--set-resources=describe:runtime=2*attempt-1"
    text = on_slurm(slurm, small, *PROMPT, limit, ONE)
    assert "time limit: 1 min; next attempt 3 min" in text
    assert (small / ONE).exists()


def once_running(
    slurm: Slurm, folder: Path, calls: Path, act: Callable[[str], object], *words: str
) -> str:
    """Run the workflow; call `act` with the running job's id once the fault is reached."""

    def during() -> None:
        wait_for(calls.exists, "the job has not started", 240)
        states = {job["JobState"]: job["JobId"] for job in own_jobs(slurm, folder)}
        act(states["RUNNING"])

    return on_slurm(slurm, folder, *words, during=during)


@needs_full
def test_a_cancelled_job_is_repeated(slurm: Slurm, small: Path) -> None:
    mark = inject(small, "describe", "time.sleep(600)")
    text = once_running(
        slurm, small, mark, lambda job: slurm.client("scancel", job), *PROMPT, ONE
    )  # fmt: skip
    assert "cancelled, by scancel or by the cluster; next attempt" in text
    assert (small / ONE).exists()


def test_the_controller_may_be_away(slurm: Slurm, small: Path) -> None:
    """One job ends meanwhile, and others are to be submitted."""
    mark = inject(small, "describe", "time.sleep(20)")

    def away(job: str) -> None:
        slurm.stop("slurmctld")
        time.sleep(120 if FULL else 45)
        slurm.start("slurmctld")

    text = once_running(slurm, small, mark, away, *PROMPT, "results/tile/bci.000.tar", ONE)
    assert "Slurm's controller does not answer" in text
    assert "sacct" not in text
    assert "Error in" not in text and "Trying to restart" not in text
    assert (small / "results/tile/bci.000.tar").exists()


@needs_full
def test_a_node_may_fail(slurm: Slurm, small: Path) -> None:
    mark = inject(small, "describe", "time.sleep(600)")

    def fail(job: str) -> None:
        slurm.client("scontrol", "update", f"NodeName={slurm.host}", "State=DOWN", "Reason=test")
        time.sleep(10)
        # Its daemon is alive, so that it may have returned already.
        slurm.client("scontrol", "update", f"NodeName={slurm.host}", "State=RESUME", check=False)

    once_running(slurm, small, mark, fail, *PROMPT, ONE)
    assert (small / ONE).exists()
    (job,) = own_jobs(slurm, small)
    assert job["Restarts"] == "1"


@needs_full
def test_a_training_that_is_cancelled_resumes(slurm: Slurm, finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(folder, undisturbed, symlinks=True)
    for where in (folder, undisturbed):
        write_config(where, TINY, train_generation={"epochs": 40, "decay_from_epoch": 1, "seed": 7})
    target = "results/train_generation/demo/generator.safetensors"
    snakemake(undisturbed, "--cores", "2", target)
    log = folder / "logs/train_generation/demo.log"
    log.unlink()

    def cancel() -> None:
        wait_for(lambda: log.is_file() and "epoch 3" in log.read_text(), "no epoch", 300)
        (job,) = [job for job in own_jobs(slurm, folder) if job["JobState"] == "RUNNING"]
        slurm.client("scancel", job["JobId"])

    # The memory of the second attempt is twice that of the first; the node has 24,000 MB.
    memory = "--set-resources=train_generation:mem_mb=8000"
    text = on_slurm(slurm, folder, *PROMPT, memory, target, during=cancel)
    assert "cancelled, by scancel or by the cluster; next attempt" in text
    assert "resumed at epoch" in log.read_text()
    assert (folder / target).read_bytes() == (undisturbed / target).read_bytes()
