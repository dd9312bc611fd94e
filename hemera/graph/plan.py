"""What a run would do: its jobs by stage, why, and what they need of time, disk and memory."""

import dataclasses
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from hemera.config import Config, EmbedOptions, TrainEncoderOptions
from hemera.config.registration import temporary_bytes
from hemera.graph.dry_run import STAGE_ORDER, Job
from hemera.graph.reasons import OF_FILES, reasons
from hemera.graph.records import Durations

Number = TypeVar("Number", int, float)


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """The jobs of one rule that would run. None: no earlier job of this stage, or not known yet."""

    stage: str
    jobs: int
    units: tuple[str, ...]
    reasons: dict[str, int]
    """Number of jobs by reason; of missing and newer files the first is named."""
    hours: float | None
    """Sum over the jobs, of which several may run at once."""
    cpu_hours: float | None
    """`hours` times the threads of each job."""
    bytes: int | None
    replaced_bytes: int
    """Of the outputs that exist; Snakemake removes them when the job begins."""
    temporary_bytes: int | None
    """Most at once, beside the outputs."""
    memory_mb: int | None
    """Largest request of a job."""


def stage_plans(jobs: Sequence[Job], units: Iterable[str], cores: int) -> list[StagePlan]:
    """Return the plan of each rule in the order of the graph.

    Args:
        units: all units of the sheet: the outputs of those that exist give typical sizes.
        cores: processors of the run, which determine how many jobs run at once.
    """
    producers = {path: job.rule for job in jobs for path in job.outputs}
    sizes, durations = _Sizes(units), Durations()
    found = []
    for rule in sorted({job.rule for job in jobs}, key=STAGE_ORDER.index):
        own = [job for job in jobs if job.rule == rule]
        why = _counted([reasons(rule, job.reason, producers) for job in own])
        at_once = max(1, cores // max(1, *(job.threads for job in own)))
        temporary = [_temporary(job) for job in own]
        found.append(
            StagePlan(
                stage=rule,
                jobs=len(own),
                units=tuple(job.unit for job in own),
                reasons=why,
                hours=_hours(durations.total(job.benchmark for job in own)),
                cpu_hours=_hours(_sum(_cpu_seconds(job, durations, cores) for job in own)),
                bytes=_sum(sizes.expected(job) for job in own),
                replaced_bytes=sum(map(size_of, (path for job in own for path in job.outputs))),
                temporary_bytes=_largest(temporary, at_once),
                memory_mb=max((job.memory_mb or 0 for job in own), default=0) or None,
            )
        )
    return found


def _counted(found: Iterable[Sequence[str]]) -> dict[str, int]:
    """Return the number of jobs by reason, reasons that name a file as one."""
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for texts in found:
        kinds = {_kind(text): text for text in texts}
        counts.update(kinds.keys())
        for kind, text in kinds.items():
            first[kind] = min(text, first.get(kind, text))
    return {first[kind]: count for kind, count in counts.most_common()}


def _kind(text: str) -> str:
    return text.partition(": ")[0] if text.startswith(OF_FILES) else text


def missing(
    plans: Sequence[StagePlan], config: Config, memory_mb: float, free_bytes: int
) -> list[str]:
    """Return what the planned stages lack: weights and programs, memory, disk."""
    found: list[str] = []
    for plan in plans:
        if (options := config.stages.get(plan.stage)) is None:
            continue
        found += options.requirements()
        if isinstance(options, EmbedOptions | TrainEncoderOptions):
            for name in dict.fromkeys(unit.partition("/")[0] for unit in plan.units):
                found += options.missing(name)
    found += [
        f"memory: {plan.stage} requests {plan.memory_mb} MB, this machine has {memory_mb:.0f} MB"
        for plan in plans
        if plan.memory_mb is not None and plan.memory_mb > memory_mb
    ]
    needed = sum(plan.bytes or 0 for plan in plans) - sum(plan.replaced_bytes for plan in plans)
    needed += max((plan.temporary_bytes or 0 for plan in plans), default=0)
    if needed > free_bytes:
        found.append(
            f"disk: {needed / 1e9:.1f} GB more are needed, {free_bytes / 1e9:.1f} GB are free"
        )
    return found


def size_of(path: str | Path) -> int:
    """Return the bytes of a file or of the files in a folder; 0 where it does not exist."""
    path = Path(path)
    if path.is_dir():
        return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
    return path.stat().st_size if path.is_file() else 0


class _Sizes:
    """Expected bytes of outputs: those of the same job, else the median over the units."""

    def __init__(self, units: Iterable[str]) -> None:
        self._units = tuple(units)
        self._medians: dict[str, int | None] = {}

    def expected(self, job: Job) -> int | None:
        if all(Path(path).exists() for path in job.outputs):
            return sum(map(size_of, job.outputs))
        if not job.unit:
            return None
        if job.rule not in self._medians:
            self._medians[job.rule] = self._median(job)
        return self._medians[job.rule]

    def _median(self, job: Job) -> int | None:
        totals, own = [], job.unit.rpartition("/")[2]
        for other in self._units:
            paths = [Path(path.replace(f"/{own}.", f"/{other}.")) for path in job.outputs]
            if all(path.exists() for path in paths):
                totals.append(sum(map(size_of, paths)))
        return int(statistics.median(totals)) if totals else None


def _temporary(job: Job) -> int | None:
    """Return the temporary bytes of a job beside its outputs: those of the registration engine."""
    if job.rule != "register":
        return 0
    return None if job.memory_mb is None else temporary_bytes(job.memory_mb)


def _cpu_seconds(job: Job, durations: Durations, cores: int) -> float | None:
    time = durations.of(job.benchmark)
    return None if time is None else time * min(job.threads, cores)


def _largest(values: Sequence[int | None], count: int) -> int | None:
    """Return the sum of the `count` largest values; None where one is unknown."""
    known = [value for value in values if value is not None]
    return sum(sorted(known)[-count:]) if len(known) == len(values) else None


def _sum(values: Iterable[Number | None]) -> Number | None:
    """Return the sum; None where one of the values is unknown."""
    listed = list(values)
    known = [value for value in listed if value is not None]
    return sum(known[1:], known[0]) if known and len(known) == len(listed) else None


def _hours(value: float | None) -> float | None:
    return None if value is None else value / 3600
