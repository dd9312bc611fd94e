"""What the benchmarks of the graph share: working directories, and Snakemake with a stopwatch."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
HEADER = "pair\tcase\tdataset\the\ther2\tregistered\the_mpp\ther2_mpp"
TIMED = '#!/bin/sh\n{command} "$@"\ncode=$?\ntimes >> {times}\nexit $code\n'


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a run of Snakemake printed, and seconds of processor time: all of it, its jobs'."""

    text: str
    total_s: float
    job_s: tuple[float, ...]

    @property
    def overhead_s(self) -> float:
        """What is Snakemake's own: its process, its shells."""
        return self.total_s - sum(self.job_s)

    @property
    def planned(self) -> dict[str, int]:
        """How many jobs of each rule a dry run planned."""
        found = re.findall(r"^(\w+)\s+(\d+)$", self.text, re.MULTILINE)
        return {rule: int(n) for rule, n in found if rule not in ("total", "all", "data")}


def lay_out(folder: Path, config: Mapping[str, Any]) -> None:
    """Make a working directory of HEMERA with its own config.yaml."""
    folder.mkdir(parents=True)
    for name in ("Snakefile", "workflow", "envs", "profiles"):
        (folder / name).symlink_to(ROOT / name)
    write_config(folder, config)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.yaml."""
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config)))


def write_cohort(folder: Path, slides: int, pairs: int) -> None:
    """Write a sheet of slide pairs and of ready-made pairs whose images are empty files.

    That is enough for planning.
    """
    (folder / "img").mkdir()
    lines = [HEADER]
    for number in range(slides + pairs):
        slide = number < slides
        name = f"{'slide' if slide else 'tile'}_{number:05d}"
        files = [f"img/{name}_{stain}.{'tif' if slide else 'png'}" for stain in ("HE", "HER2")]
        for file in files:
            (folder / file).touch()
        cells = ("", "", "") if slide else ("true", "0.46", "0.46")
        lines.append("\t".join([name, name, "acrobat" if slide else "bci", *files, *cells]))
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n")


def snakemake(folder: Path, *words: str, command: str | None = None) -> Cost:
    """Run Snakemake in `folder`; the seconds of each job are taken around its command.

    The files of `benchmark:` are no clock for this: they are samples, and miss the end of a job.

    Args:
        folder: a working directory.
        words: of the command line.
        command: what `hemera` is in the jobs; None: HEMERA itself.
    """
    commands, times = folder / "commands", folder / "times"
    commands.mkdir(exist_ok=True)
    times.write_text("")
    timed = commands / "hemera"
    hemera = command or shlex.quote(str(Path(sys.executable).parent / "hemera"))
    timed.write_text(TIMED.format(command=hemera, times=shlex.quote(str(times))))
    timed.chmod(0o755)
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *words],
        cwd=folder,
        env={**os.environ, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    after = os.times()
    if done.returncode:
        sys.exit(f"snakemake {' '.join(words)}:\n{done.stdout[-4000:]}")
    total = (after.children_user + after.children_system) - (
        before.children_user + before.children_system
    )
    # Two lines per job: the shell's own times, then those of what it ran.
    jobs = [
        sum(int(minutes) * 60 + float(seconds) for minutes, seconds in spent)
        for line in times.read_text().splitlines()[1::2]
        if (spent := re.findall(r"(\d+)m([\d.]+)s", line))
    ]
    return Cost(done.stdout, total, tuple(jobs))
