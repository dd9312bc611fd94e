"""Where a run of the workflow is."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from hemera.commands import ConfigFile, text_table
from hemera.commands.workflow import snakefile


def progress(
    *targets: str,
    configfile: ConfigFile = Path("config.yaml"),
    json_: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> int:
    """Report how far a run is: jobs and verdicts by stage, failures, the remaining time.

    It may be called while Snakemake runs, from the same folder. Hours are from the benchmark files
    of finished jobs. Return 1 where a job of the last run failed and was not repeated.

    Args:
        targets: of Snakemake, such as data; by default all.
        configfile: the configuration of the workflow.
        json_: write JSON, not tables.
    """
    from hemera.graph.dry_run import outputs
    from hemera.graph.progress import stage_progress, unresolved
    from hemera.graph.records import is_locked, last_run

    files = outputs(snakefile(), configfile, targets)
    run = last_run()
    stages = stage_progress(files, run)
    hours = [each.remaining_hours for each in stages if each.finished < each.jobs]
    known = [value for value in hours if value is not None]
    concurrency = 1.0 if run is None else run.concurrency
    failures = unresolved(run, files)
    found: dict[str, Any] = {
        "stages": [dataclasses.asdict(each) for each in stages],
        "failures": [dataclasses.asdict(each) for each in failures],
        "remaining_hours": sum(known) / concurrency,
        "stages_of_unknown_hours": len(hours) - len(known),
        "jobs_at_once": round(concurrency, 2),
        "is_locked": is_locked(),
        "last_record": None if run is None or run.last is None else run.last.isoformat(),
        "log": None if run is None else str(run.log),
    }
    sys.stdout.write(json.dumps(found, indent=1) + "\n" if json_ else _text(found))
    return int(bool(failures))


def _text(found: dict[str, Any]) -> str:
    rows = [
        [
            each["stage"],
            *(str(each[name]) for name in ("jobs", "finished", "running", "failed")),
            ", ".join(f"{count} {verdict}" for verdict, count in each["verdicts"].items()),
        ]
        for each in found["stages"]
    ]
    text = text_table(["stage", "jobs", "finished", "running", "failed", "verdicts"], rows)
    for failure in found["failures"]:
        text += f"failed: {failure['rule']}, {', '.join(failure['outputs'])}\n"
        text += f"  {failure['cause']}\n  {failure['log']}\n"
    finished = all(each["finished"] == each["jobs"] for each in found["stages"])
    if finished:
        return text + "All results are up to date.\n"
    text += f"Remaining: {found['remaining_hours']:.2f} h"
    if found["stages_of_unknown_hours"]:
        text += f", and {found['stages_of_unknown_hours']} stages that never ran here"
    text += f", with {found['jobs_at_once']} jobs at once as in the last run.\n"
    state = "Snakemake runs, or was killed" if found["is_locked"] else "Snakemake does not run"
    when = f"; last record {found['last_record']}, {found['log']}" if found["log"] else ""
    return text + f"{state}{when}.\n"
