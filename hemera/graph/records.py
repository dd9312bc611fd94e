"""Records of earlier runs: benchmark files of jobs, and Snakemake's logs."""

import csv
import dataclasses
import datetime
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

LOGS = Path(".snakemake/log")
_LOCKS = Path(".snakemake/locks")

KILLED = "nothing in its log; killed from outside, for example for want of memory, or not begun"

_START = re.compile(r"(?:local)?(?:rule|checkpoint) (\w+):")
_FAILED = re.compile(r"Error in rule (\w+):")
_FINISHED = re.compile(r"Finished jobid: (\d+) ")
_TIME = re.compile(r"\[(\w{3} \w{3} [ \d]\d \d\d:\d\d:\d\d \d{4})\]")
_STEPS = re.compile(r"\d+ of (\d+) steps")


def seconds(path: str | Path) -> float | None:
    """Return the mean duration of a job in its benchmark file; None without one."""
    try:
        with Path(path).open(newline="") as file:
            times = [float(row["s"]) for row in csv.DictReader(file, delimiter="\t")]
    except (OSError, KeyError, TypeError, ValueError):
        return None
    return statistics.fmean(times) if times else None


class Durations:
    """How long jobs took: that of the same unit, else the median of the units of its stage."""

    def __init__(self) -> None:
        self._medians: dict[Path, float | None] = {}

    def of(self, benchmark: str | None) -> float | None:
        """Return the seconds that a job with this benchmark file would take; None: unknown."""
        if benchmark is None:
            return None
        own = seconds(benchmark)
        return self._median(Path(benchmark).parent) if own is None else own

    def _median(self, folder: Path) -> float | None:
        if folder not in self._medians:
            found = [seconds(path) for path in sorted(folder.glob("*.tsv"))]
            times = [time for time in found if time is not None]
            self._medians[folder] = statistics.median(times) if times else None
        return self._medians[folder]

    def total(self, benchmarks: Iterable[str | None]) -> float | None:
        """Return the sum for several jobs; None where one of them is unknown."""
        times = [self.of(benchmark) for benchmark in benchmarks]
        return None if None in times else sum(time for time in times if time is not None)


@dataclasses.dataclass(frozen=True)
class Failure:
    """A job that failed."""

    rule: str
    outputs: tuple[str, ...]
    log: str
    cause: str
    """Last line of its log, or `KILLED`."""


@dataclasses.dataclass
class Run:
    """The last run, from its log."""

    log: Path
    first: datetime.datetime | None = None
    last: datetime.datetime | None = None
    steps: int = 0
    running: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    """Fields of the jobs that began and have not ended, by job id."""
    finished: list[str] = dataclasses.field(default_factory=list)
    """Benchmark files of the jobs that finished."""
    failures: list[Failure] = dataclasses.field(default_factory=list)
    """Each attempt that failed, also of jobs that were repeated."""
    failed: dict[tuple[str, ...], Failure] = dataclasses.field(default_factory=dict)
    """The jobs whose last attempt failed, by their outputs."""

    @property
    def elapsed_s(self) -> float:
        """Seconds between the first and the last record."""
        if self.first is None or self.last is None:
            return 0.0
        return (self.last - self.first).total_seconds()

    @property
    def concurrency(self) -> float:
        """Average number of jobs at once, at least 1: the sum of their durations over the time."""
        times = [time for time in map(seconds, self.finished) if time is not None]
        return max(1.0, sum(times) / self.elapsed_s) if self.elapsed_s else 1.0


def is_locked() -> bool:
    """Return whether Snakemake runs in this folder, or was killed here."""
    return _LOCKS.is_dir() and any(_LOCKS.iterdir())


def last_run(folder: Path = LOGS, since: float = 0.0) -> Run | None:
    """Read the log of the last run with jobs, written after a time; None without any."""
    for path in sorted(folder.glob("*.snakemake.log"), reverse=True):
        if path.stat().st_mtime < since:
            return None
        run = _read(path)
        if run.steps or run.running or run.failures:
            return run
    return None


def _read(path: Path) -> Run:
    run = Run(path)
    lines = path.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines):
        if match := _TIME.match(line):
            run.last = datetime.datetime.strptime(match[1], "%a %b %d %H:%M:%S %Y")
            run.first = run.first or run.last
        elif match := _START.match(line):
            fields = dict(_fields(lines, number))
            run.running[fields.get("jobid", "")] = {"rule": match[1], **fields}
            run.failed.pop(_outputs(fields), None)
        elif match := _FAILED.match(line):
            fields = dict(_fields(lines, number))
            run.running.pop(fields.get("jobid", ""), None)
            log = fields.get("log", "").removesuffix(" (check log file(s) for error details)")
            cause = last_line(Path(log)) or KILLED
            failure = Failure(match[1], _outputs(fields), log, cause)
            run.failures.append(failure)
            run.failed[failure.outputs] = failure
        elif match := _FINISHED.match(line):
            fields = run.running.pop(match[1], {})
            run.finished += [fields["benchmark"]] if "benchmark" in fields else []
        elif match := _STEPS.match(line):
            run.steps = int(match[1])
    return run


def _outputs(fields: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(fields.get("output", "").split(", "))


def _fields(lines: Sequence[str], number: int) -> Iterator[tuple[str, str]]:
    """Yield the indented fields below a line of a log."""
    for line in lines[number + 1 :]:
        if not line.startswith("    "):
            return
        name, _, value = line.strip().partition(": ")
        yield name, value


def last_line(path: Path) -> str:
    """Return the last line of a log that is not empty, without its level; empty without one."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    found = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return found.removeprefix("ERROR hemera: ")
