"""Snakemake's executor for Slurm, which waits for the controller and names why a job failed.

Version 2.8 of the plugin, as observed: while the controller does not answer, it forgets the jobs
that run, so that the workflow never ends, and a submission counts as a failed attempt. It queries
the accounting database also where there is none. Of a failed job it prints the state without the
limit that was exceeded. Each of its jobs starts Snakemake twice, the second time in a step of the
job; here, the first start is that step. Import this module only where Snakemake is installed.
"""

import functools
import os
import re
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import snakemake_executor_plugin_slurm as plugin
from snakemake_executor_plugin_slurm_jobstep import (
    get_cpu_setting,
    get_gpu_setting,
    get_node_setting,
)

POLL_S = 5
CONFIGURATION_S = 600
"""How long the configuration of the cluster is waited for."""
CAUSES = {
    "OUT_OF_MEMORY": "out of memory: {mem_mb} MB",
    "TIMEOUT": "time limit: {runtime} min",
    "CANCELLED": "cancelled, by scancel or by the cluster",
    "NODE_FAIL": "node {node} failed",
    "BOOT_FAIL": "node {node} did not start",
    "DEADLINE": "past the deadline of the cluster",
    "FAILED": "exit status {exit}",
}
"""Cause by the state of a job in Slurm."""
GROWS = {"OUT_OF_MEMORY": ("mem_mb", "MB"), "TIMEOUT": ("runtime", "min")}
"""Resource that is to be raised for a job in this state, and its unit."""
SIGNS = {
    "OUT_OF_MEMORY": re.compile(r"exceeded \S*\s?memory limit|oom[-_ ]kill|out of memory", re.I),
    "TIMEOUT": re.compile(r"DUE TO TIME LIMIT"),
    "NODE_FAIL": re.compile(r"DUE TO NODE FAILURE"),
}
"""What Slurm writes into the log of a job that it ends; the job itself is only FAILED or CANCELLED
where a step inside it is ended."""


def output_of(*words: str) -> str | None:
    """Return what a client of Slurm prints; None if it fails, or does not end within 30 s.

    Raises:
        WorkflowError: when the client is not installed.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError as error:
        raise plugin.WorkflowError(
            f"{words[0]}: not found, it is a client of Slurm; run Snakemake on a node of the "
            "cluster that submits jobs, or without --profile slurm"
        ) from error
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


@functools.cache
def has_accounting() -> bool:
    """Return whether the cluster has an accounting database, which `sacct` queries.

    Raises:
        WorkflowError: when `scontrol show config` fails for `CONFIGURATION_S`.
    """
    until = time.monotonic() + CONFIGURATION_S
    while (text := output_of("scontrol", "show", "config")) is None:
        if time.monotonic() > until:
            raise plugin.WorkflowError(
                f"scontrol show config: failed for {CONFIGURATION_S} s; the controller of Slurm is "
                "down, or this account may not query it. Run the command in this shell; when it "
                "prints the configuration, start Snakemake again: finished jobs are kept"
            )
        time.sleep(POLL_S)
    found = re.search(r"^AccountingStorageType\s*=\s*(\S+)", text, re.MULTILINE)
    return found is not None and not found[1].endswith("none")


def record(job_id: str) -> dict[str, str]:
    """Return what the controller has of a job, by the names that `scontrol` prints."""
    text = output_of("scontrol", "show", "job", "--oneliner", job_id) or ""
    return dict(re.findall(r"(\S+?)=(\S*)", text))


def failed_state(message: str, log: str) -> str | None:
    """Return the state of a failed job from the plugin's message and the log of Slurm.

    None: the job was not submitted.
    """
    found = re.search(r"SLURM status is: '(\w+)'", message)
    if found is None:
        return "NODE_FAIL" if "node failure" in message else None
    if found[1] in ("FAILED", "CANCELLED"):
        return next((state for state, sign in SIGNS.items() if sign.search(log)), found[1])
    return found[1]


def cause(state: str, resources: dict[str, Any], of_slurm: dict[str, str]) -> str:
    """Return why a job in this state failed: the limit or the node."""
    return CAUSES.get(state, f"state {state} in Slurm").format(
        mem_mb=resources.get("mem_mb"),
        runtime=resources.get("runtime"),
        node=of_slurm.get("NodeList", "of the job"),
        exit=of_slurm.get("ExitCode", "unknown").split(":")[0],
    )


def next_resources(job: Any) -> dict[str, Any] | None:
    """Return the resources of the next attempt of a job, or None if it was the last."""
    if job.restart_times < job.attempt:
        return None
    job.attempt += 1
    try:
        # In a thread, because Snakemake evaluates resources in an event loop, and this one has one.
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: dict(job.resources.items())).result()
    finally:
        job.attempt -= 1


def explanation(job: Any, state: str, of_slurm: dict[str, str]) -> str:
    """Return which job failed and why, and what the next attempt has or what to raise."""
    members = list(job.jobs) if job.is_group() else [job]
    rules = ", ".join(sorted({member.rule.name for member in members}))
    units = [value for member in members for value in member.wildcards_dict.values() if value]
    more = f" and {len(units) - 3} more" if len(units) > 3 else ""
    subject = f"{rules} {', '.join(units[:3])}{more}".strip()
    text = f"{subject}: {cause(state, dict(job.resources.items()), of_slurm)}"
    following, (name, unit) = next_resources(job), GROWS.get(state, ("", ""))
    if following is not None:
        return f"{text}; next attempt{f' {following.get(name)} {unit}' if name else ''}"
    if not name:
        return f"{text}; no attempt is left"
    return f"{text}; no attempt is left, raise it with --set-resources {rules}:{name}=VALUE"


def _end_of_log(job_info: Any) -> str:
    """Return the last 10 kB of what Slurm logged of a job."""
    try:
        with Path(job_info.aux["slurm_logfile"]).open("rb") as file:
            file.seek(-min(10_000, file.seek(0, os.SEEK_END)), os.SEEK_END)
            return file.read().decode(errors="replace")
    except (OSError, KeyError):
        return ""


class Executor(plugin.Executor):  # type: ignore[misc]
    """The plugin's executor with these faults corrected."""

    cancelled = False

    def __post_init__(self, test_mode: bool = False) -> None:
        """Find out about the database before any job."""
        has_accounting()
        super().__post_init__(test_mode)

    def cancel(self) -> None:
        """End all waiting, and cancel the jobs."""
        self.cancelled = True
        super().cancel()

    def _wait_for_controller(self) -> None:
        """Return as soon as the controller answers, or after the workflow was cancelled."""
        if output_of("scontrol", "ping") is not None:
            return
        started = time.monotonic()
        self.logger.warning("Slurm's controller does not answer; waiting until it does.")
        while self.wait and not self.cancelled and output_of("scontrol", "ping") is None:
            time.sleep(POLL_S)
        waited = time.monotonic() - started
        self.logger.warning(f"Waited {waited:.0f} s for Slurm's controller.")

    def additional_general_args(self) -> str:
        """Return which executor a job uses: that of the plugin only for arrays, which need it."""
        return str(super().additional_general_args()) if self.array_jobs else ""

    def format_job_exec(self, job: Any) -> str:
        """Return the command of a job, in a step: Slurm signals steps at the end of the time."""
        command = str(super().format_job_exec(job))
        if self.array_jobs or "mpi" in job.resources:
            return command
        limits = (
            get_cpu_setting(job, bool(job.resources.get("gpu"))),
            get_gpu_setting(job),
            get_node_setting(job),
        )
        return " ".join(["srun -n1 --cpu-bind=q", *filter(None, limits), command])

    def run_job(self, job: Any) -> None:
        """Submit a job."""
        self._wait_for_controller()
        super().run_job(job)

    def run_array_jobs(self, jobs: list[Any]) -> None:
        """Submit jobs of one rule as an array."""
        self._wait_for_controller()
        super().run_array_jobs(jobs)

    async def check_active_jobs(self, active_jobs: list[Any]) -> AsyncIterator[Any]:
        """Report what ended; yield every other job, also where no status was to be had."""
        if active_jobs:
            self._wait_for_controller()
        self.reported: set[int] = set()
        yielded = set()
        async for info in super().check_active_jobs(active_jobs):
            yielded.add(id(info))
            yield info
        for info in active_jobs:
            if id(info) not in yielded | self.reported:
                yield info

    def report_job_success(self, job_info: Any) -> None:
        """Report a finished job."""
        self.reported.add(id(job_info))
        super().report_job_success(job_info)

    def report_job_error(self, job_info: Any, msg: str | None = None, **kwargs: Any) -> None:
        """Report a failed job, with its cause first."""
        if job_info.external_jobid is not None:
            self.reported.add(id(job_info))
            state = failed_state(msg or "", _end_of_log(job_info))
            if state is not None:
                of_slurm = record(job_info.external_jobid)
                self.logger.error(explanation(job_info.job, state, of_slurm))
        super().report_job_error(job_info, msg=msg, **kwargs)

    def get_account_arg(self, job: Any) -> Iterator[str]:
        """Yield the account; the plugin would look for one in the database."""
        if has_accounting() or job.resources.get("slurm_account"):
            yield from super().get_account_arg(job)
        else:
            yield ""


_is_installed = plugin.is_query_tool_available


def _is_of_use(tool: str) -> bool:
    return bool(_is_installed(tool)) and (tool != "sacct" or has_accounting())


plugin.is_query_tool_available = _is_of_use
