"""The executor for Slurm, with scripts instead of Slurm; see also tests/test_slurm.py."""

import asyncio
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hemera.graph import slurm

FAILED = "SLURM-job '7' failed, SLURM status is: '{}'. Detailed failure reason unavailable"


@pytest.mark.parametrize(
    ("message", "log", "state"),
    [
        (FAILED.format("OUT_OF_MEMORY"), "", "OUT_OF_MEMORY"),
        (FAILED.format("FAILED"), "slurmstepd: error: Exceeded job memory limit", "OUT_OF_MEMORY"),
        (
            FAILED.format("FAILED"),
            "error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks have been OOM",
            "OUT_OF_MEMORY",
        ),
        (FAILED.format("FAILED"), "srun: error: n1: task 0: Out Of Memory", "OUT_OF_MEMORY"),
        (FAILED.format("CANCELLED"), "*** JOB 7 ON n1 CANCELLED DUE TO TIME LIMIT ***", "TIMEOUT"),
        (FAILED.format("CANCELLED"), "*** STEP 7.0 ON n1 CANCELLED AT 2026-01-01 ***", "CANCELLED"),
        (FAILED.format("FAILED"), "Error in rule tile", "FAILED"),
        ("SLURM-job '7' failed due to a node failure, ...", "", "NODE_FAIL"),
        ("SLURM sbatch failed. The error message was 'no such partition'", "", None),
    ],
)
def test_the_state_is_that_of_what_ended_the_job(message: str, log: str, state: str | None) -> None:
    assert slurm.failed_state(message, log) == state


class Job:
    """What the executor uses of a job of Snakemake."""

    def __init__(self, unit: str, restart_times: int) -> None:
        self.rule = types.SimpleNamespace(name="tile")
        self.wildcards_dict = {"unit": unit}
        self.restart_times, self.attempt = restart_times, 1

    def is_group(self) -> bool:
        return False

    @property
    def resources(self) -> dict[str, Any]:
        return {"mem_mb": 3000 * self.attempt, "runtime": 240 * self.attempt}


class Group(Job):
    def __init__(self, *units: str) -> None:
        super().__init__("", 1)
        self.jobs = [Job(unit, 1) for unit in units]

    def is_group(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("job", "state", "words"),
    [
        (Job("a", 2), "OUT_OF_MEMORY", "tile a: out of memory: 3000 MB; next attempt 6000 MB"),
        (Job("a", 2), "TIMEOUT", "tile a: time limit: 240 min; next attempt 480 min"),
        (Job("a", 2), "NODE_FAIL", "tile a: node n1 failed; next attempt"),
        (Job("a", 2), "FAILED", "tile a: exit status 3; next attempt"),
        (Job("a", 0), "CANCELLED",
         "tile a: cancelled, by scancel or by the cluster; no attempt is left"),
        (Job("a", 0), "TIMEOUT",
         "tile a: time limit: 240 min; no attempt is left, raise it with --set-resources "
         "tile:runtime=VALUE"),
        (Group("a", "b", "c", "d"), "BOOT_FAIL",
         "tile a, b, c and 1 more: node n1 did not start; next attempt"),
        (Job("a", 2), "REVOKED", "tile a: state REVOKED in Slurm; next attempt"),
    ],
)  # fmt: skip
def test_a_failure_is_explained(job: Job, state: str, words: str) -> None:
    assert slurm.explanation(job, state, {"NodeList": "n1", "ExitCode": "3:0"}) == words
    assert job.attempt == 1


def put(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder first on the path; accounting is looked up anew."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(slurm, "POLL_S", 0.05)
    slurm.has_accounting.cache_clear()
    yield tmp_path
    slurm.has_accounting.cache_clear()


@pytest.mark.parametrize(
    ("storage", "has"), [("accounting_storage/none", False), ("accounting_storage/slurmdbd", True)]
)
def test_sacct_is_used_only_with_a_database(clients: Path, storage: str, has: bool) -> None:
    put(clients, "scontrol", f"echo 'MinJobAge = 2 sec'; echo 'AccountingStorageType  = {storage}'")
    put(clients, "sacct", "true")
    assert slurm.has_accounting() is has
    assert slurm.plugin.is_query_tool_available("sacct") is has
    assert slurm.plugin.is_query_tool_available("scontrol")


def test_a_machine_without_slurm_is_an_error_and_not_waited_for(
    clients: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(clients))
    with pytest.raises(slurm.plugin.WorkflowError, match=r"scontrol: not found.*--profile slurm"):
        executor()._wait_for_controller()


def test_a_configuration_that_is_never_printed_is_an_error_before_any_job(
    clients: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "CONFIGURATION_S", 0.3)
    put(clients, "scontrol", f"echo x >> {clients}/asked; exit 1")
    with pytest.raises(
        slurm.plugin.WorkflowError,
        match=r"scontrol show config: failed for 0\.3 s.*start Snakemake",
    ):
        executor().__post_init__()
    assert (clients / "asked").read_text().count("x") > 1


class Resources(dict[str, Any]):
    """Resources of a job, as attributes too."""

    __getattr__ = dict.__getitem__


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        ({"mem_mb": 1000}, "srun -n1 --cpu-bind=q --cpus-per-task=3 --nodes=1 python -m snakemake"),
        (
            {"gpu": 2},
            "srun -n1 --cpu-bind=q --cpus-per-task=3 --gpus=2 --nodes=1 python -m snakemake",
        ),
        ({"mpi": "srun"}, "python -m snakemake"),
    ],
)
def test_the_step_of_a_job_is_its_only_start_of_snakemake(
    monkeypatch: pytest.MonkeyPatch, resources: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(
        slurm.plugin.Executor, "format_job_exec", lambda self, job: "python -m snakemake"
    )
    job = types.SimpleNamespace(threads=3, resources=Resources(resources))
    made = executor()
    made.array_jobs = set()
    assert made.format_job_exec(job) == words
    assert made.additional_general_args() == ""


def test_arrays_are_started_by_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm.plugin.Executor, "format_job_exec", lambda self, job: "python")
    made = executor()
    made.array_jobs = {"describe"}
    settings = types.SimpleNamespace(pass_command_as_script=False)
    made.workflow = types.SimpleNamespace(executor_settings=settings)
    assert made.format_job_exec(Job("a", 1)) == "python"
    assert "--executor slurm-jobstep" in made.additional_general_args()


def executor() -> Any:
    """An executor without its threads."""
    made = object.__new__(slurm.Executor)
    made.wait, made.warned = True, []
    made.logger = types.SimpleNamespace(warning=made.warned.append)
    return made


def test_the_controller_is_waited_for(clients: Path) -> None:
    put(clients, "scontrol", f"echo x >> {clients}/asked; [ $(wc -l < {clients}/asked) -gt 3 ]")
    made = executor()
    made._wait_for_controller()
    assert (clients / "asked").read_text().count("x") == 4
    assert "does not answer" in made.warned[0] and "Waited" in made.warned[1]
    made.warned.clear()
    made._wait_for_controller()
    assert made.warned == []


def test_a_cancelled_workflow_does_not_wait(clients: Path) -> None:
    put(clients, "scontrol", "exit 1")
    made = executor()
    made.cancelled = True
    made._wait_for_controller()
    assert "Waited 0 s" in made.warned[1]


def test_jobs_without_a_status_are_not_forgotten(
    clients: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plugin yields the jobs that run; after a failed query it yields none."""
    put(clients, "scontrol", "true")
    infos = [types.SimpleNamespace(external_jobid=str(number)) for number in range(4)]

    async def queried(self: Any, active: list[Any]) -> Any:
        self.report_job_success(active[0])
        yield active[1]

    monkeypatch.setattr(slurm.plugin.Executor, "check_active_jobs", queried)
    monkeypatch.setattr(slurm.plugin.Executor, "report_job_success", lambda self, info: None)

    async def left() -> list[str]:
        return [info.external_jobid async for info in executor().check_active_jobs(infos)]

    assert asyncio.run(left()) == ["1", "2", "3"]
