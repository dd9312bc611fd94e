"""What a run of Snakemake has done so far, from its log and the tables of finished jobs."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hemera import tables
from hemera.files import layout
from hemera.graph.records import last_run, seconds


@dataclasses.dataclass
class Stage:
    """The jobs of one rule in this run."""

    name: str
    jobs: int
    planned_hours: float | None
    done: int = 0
    running: int = 0
    failed: int = 0
    """Jobs whose last attempt failed."""
    refused: int = 0
    """Pairs of finished units that are not tiled."""
    seconds: float = 0.0
    """Sum of the durations of the jobs that are done."""

    @property
    def remaining_s(self) -> float | None:
        """Duration of the jobs that are not done, one after the other; None: unknown."""
        left = self.jobs - self.done
        if self.done:
            return left * self.seconds / self.done
        return None if self.planned_hours is None else left * 3600 * self.planned_hours / self.jobs


class Watch:
    """Reads the log of the run that began after its creation."""

    def __init__(self, planned: Sequence[Mapping[str, Any]]) -> None:
        self.stages = {
            each["stage"]: Stage(each["stage"], each["jobs"], each["hours"]) for each in planned
        }
        self.began = time.time() - 1
        """Time before which no log of this run was written, s."""
        self._seen: set[str] = set()
        self._failures = 0
        self.concurrency = 1.0

    def update(self) -> list[str]:
        """Read what is new; return lines about refused pairs and failed jobs."""
        run = last_run(since=self.began)
        if run is None:
            return []
        lines = [line for path in run.finished for line in self._finished(path)]
        for failure in run.failures[self._failures :]:
            lines.append(f"failed: {failure.rule}: {failure.cause}")
        self._failures = len(run.failures)
        for stage in self.stages.values():
            stage.running = sum(fields["rule"] == stage.name for fields in run.running.values())
            stage.failed = sum(each.rule == stage.name for each in run.failed.values())
        self.concurrency = run.concurrency
        return lines

    def _finished(self, benchmark: str) -> list[str]:
        """Count a finished job; return lines about its refused pairs."""
        stage = self.stages.get(Path(benchmark).parent.name)
        if stage is None or benchmark in self._seen:
            return []
        self._seen.add(benchmark)
        stage.done += 1
        stage.seconds += seconds(benchmark) or 0.0
        refused = refusals(Path(benchmark).stem) if stage.name == "tile" else []
        stage.refused += len(refused)
        return [f"{row['state']}: {row['pair']}: {row['reason']}" for row in refused]


def refusals(unit: str) -> list[dict[str, Any]]:
    """Return pair, state and reason of the pairs of a unit that are not tiled."""
    path = layout.path(layout.PAIRS, unit=unit)
    if not path.exists():
        return []
    rows = tables.read(path, tables.PAIRS, ["pair", "state", "reason"]).to_pylist()
    return [row for row in rows if row["state"] != "tiled"]
