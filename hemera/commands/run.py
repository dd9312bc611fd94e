"""Run the workflow with a line per stage on the terminal, and summarise it."""

import contextlib
import datetime
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hemera.commands import ConfigFile, Workers
from hemera.commands.plan import plan_text, planned
from hemera.commands.workflow import snakefile
from hemera.errors import INTERRUPTED, ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    from hemera.graph.live import Watch

POLL_S = 2.0
"""Least time between two readings of Snakemake's log; reading takes at most a tenth of it."""
_ELSEWHERE = ("--profile", "--executor", "-e")
_CORES = re.compile(r"(--cores|--jobs|-[cj])(=?(\d+|all))?")


def run(
    *words: str, configfile: ConfigFile = Path("config.yaml"), cores: Workers | None = None
) -> int:
    """Run the workflow: first the plan, then a line per stage, at the end a summary.

    A front end of Snakemake, whose own output goes to a file in logs/run. The summary is also
    written to results/summary.md and results/summary.json. Return the exit status of Snakemake, 130
    after Ctrl-C, or 1 without a run where weights, memory or disk are missing.

    Args:
        words: targets of Snakemake, such as data; after --, also its options, such as
            -- data --profile slurm.
        configfile: the configuration of the workflow.
        cores: processors of the run; by default those of this machine.
    """
    from rich.console import Console
    from rich.live import Live

    from hemera.graph.dry_run import FIRST_CONFIG, effective_config
    from hemera.graph.live import Watch
    from hemera.graph.summary import summarise, write_summary

    first = next((k for k, word in enumerate(words) if word.startswith("-")), len(words))
    elsewhere = any(word.partition("=")[0] in _ELSEWHERE for word in words)
    if not elsewhere and any(map(_CORES.fullmatch, words)):
        raise ConfigError(
            "processors are an option of hemera run, not of Snakemake: write --cores before --, "
            "such as hemera run --cores 4 -- data --keep-going"
        )
    count = cores or os.cpu_count() or 1
    console = Console(highlight=False, soft_wrap=True)
    found = planned(words[:first], configfile, count)
    console.print(plan_text(found), end="", markup=False)
    if first < len(words):
        console.print("The plan is that without the options after --.")
    if found["missing"] and not elsewhere:
        return 1
    status, log, began = 0, None, 0.0
    # Some options add jobs to those of the plan, such as --forcerun.
    if found["stages"] or first < len(words):
        options = [] if elsewhere and cores is None else ["--cores", str(count)]
        options += [] if configfile == FIRST_CONFIG else ["--configfile", str(configfile)]
        log = Path("logs/run") / f"{datetime.datetime.now():%Y-%m-%dT%H%M%S}.log"
        console.print(f"Output of Snakemake: {log}")
        watch = Watch(found["stages"])
        began = watch.began
        try:
            with (
                _started([*words, *options], log, console) as process,
                Live(console=console, refresh_per_second=1, transient=True) as live,
            ):
                status = _follow(process, watch, live, console)
            console.print(_table(watch))
        except KeyboardInterrupt:
            status = INTERRUPTED
    text = write_summary(summarise(effective_config(configfile), status, log, began))
    if status != INTERRUPTED:
        console.print(text, end="", markup=False)
    return status


@contextlib.contextmanager
def _started(
    words: Sequence[str], log: Path, console: "Console"
) -> Iterator["subprocess.Popen[bytes]"]:
    """Yield Snakemake as a process that writes to a file, and wait for its end in any case."""
    log.parent.mkdir(parents=True, exist_ok=True)
    # Jobs call `hemera`, also where the environment is not activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(snakefile()), *words]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "PATH": path}
        )
    try:
        yield process
    except KeyboardInterrupt:
        # The terminal has sent the signal to Snakemake too, which ends its jobs.
        console.print(
            "Interrupted: the jobs are ended, what is finished is kept. To continue, run the same "
            "command again."
        )
        raise
    finally:
        while process.returncode is None:
            with contextlib.suppress(KeyboardInterrupt):
                process.wait()


def _follow(
    process: subprocess.Popen[bytes], watch: "Watch", live: "Live", console: "Console"
) -> int:
    """Show the stages until Snakemake ends; return its exit status."""
    pause = POLL_S
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(pause)
        began = time.monotonic()
        for line in watch.update():
            console.print(line, markup=False)
        live.update(_table(watch))
        if process.returncode is not None:
            return process.returncode
        pause = max(POLL_S, 10 * (time.monotonic() - began))


def _table(watch: "Watch") -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("stage", "jobs", "done", "running", "refused", "failed", "remaining"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage in watch.stages.values():
        counts = (stage.jobs, stage.done, stage.running, stage.refused, stage.failed)
        seconds = stage.remaining_s
        left = "unknown" if seconds is None else _duration(seconds / watch.concurrency)
        table.add_row(stage.name, *map(str, counts), left if stage.done < stage.jobs else "")
    return table


def _duration(seconds: float) -> str:
    """Return a duration as hours and minutes, or minutes and seconds."""
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.0f} h {minutes % 60:02.0f} min" if hours >= 1 else f"{minutes:.1f} min"
