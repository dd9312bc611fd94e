"""Where a run is: jobs by stage, verdicts in the tables, failures, remaining time."""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hemera import tables
from hemera.files import layout
from hemera.graph.dry_run import STAGE_ORDER, Output
from hemera.graph.records import Durations, Failure, Run

VERDICTS = {
    "describe": (layout.IMAGES_TABLE, tables.DESCRIBE, "verdict"),
    "register": (layout.CERTIFICATE, tables.CERTIFICATE, "verdict"),
    "tile": (layout.PAIRS, tables.PAIRS, "state"),
}
"""Table, schema and column in which a stage writes its verdicts."""


@dataclasses.dataclass(frozen=True)
class StageProgress:
    """The jobs of one rule."""

    stage: str
    jobs: int
    finished: int
    failed: int
    running: int
    verdicts: dict[str, int]
    """Number of images (describe), pairs or tiles by verdict, of the units that are finished."""
    remaining_hours: float | None
    """Sum over the jobs that are not finished; None: no job of this stage has finished."""


def stage_progress(files: Sequence[Output], run: Run | None) -> list[StageProgress]:
    """Return the progress of each rule, in the order of the graph.

    Args:
        files: every output of the graph.
        run: the last run; its failures count where the outputs are still missing.
    """
    pending: dict[str, dict[str, bool]] = collections.defaultdict(dict)
    for file in files:
        own = pending[file.rule]
        own[file.unit] = own.get(file.unit, False) or file.is_pending
    running = collections.Counter(
        fields["rule"] for fields in (run.running.values() if run is not None else ())
    )
    failures = unresolved(run, files)
    durations = Durations()
    found = []
    for rule, jobs in pending.items():
        left = {unit for unit, is_pending in jobs.items() if is_pending}
        seconds = durations.total(f"logs/{rule}/{unit or rule}.tsv" for unit in left)
        found.append(
            StageProgress(
                stage=rule,
                jobs=len(jobs),
                finished=len(jobs) - len(left),
                failed=sum(failure.rule == rule for failure in failures),
                running=running[rule],
                verdicts=_verdicts(rule, (unit for unit in jobs if unit not in left)),
                remaining_hours=None if seconds is None else seconds / 3600,
            )
        )
    return sorted(found, key=lambda each: STAGE_ORDER.index(each.stage))


def unresolved(run: Run | None, files: Iterable[Output]) -> list[Failure]:
    """Return the last failure of each job of a run whose outputs are still missing."""
    missing = {file.path for file in files if file.is_pending}
    last: Mapping[tuple[str, ...], Failure] = {
        failure.outputs: failure
        for failure in (run.failures if run is not None else ())
        if missing & set(failure.outputs)
    }
    return list(last.values())


def _verdicts(rule: str, units: Iterable[str]) -> dict[str, int]:
    counts: collections.Counter[str] = collections.Counter()
    if rule in VERDICTS:
        pattern, schema, column = VERDICTS[rule]
        for unit in units:
            path = Path(pattern.format(unit=unit))
            if path.exists():
                counts.update(tables.read(path, schema, [column]).column(column).to_pylist())
    elif rule == "filter" and list(units):
        accepted = tables.read(Path(layout.FILTERED), tables.filtered(()), ["accepted"])
        for value in accepted.column("accepted").to_pylist():
            counts["accepted" if value else "rejected"] += 1
    return dict(counts.most_common())
