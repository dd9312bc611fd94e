"""What a run of the workflow would do, and why."""

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from hemera.commands import ConfigFile, Workers, text_table
from hemera.commands.workflow import snakefile
from hemera.config import Config, FilterOptions, MaskOptions
from hemera.files import layout
from hemera.sheet import read_sheet, units


def plan(
    *targets: str,
    configfile: ConfigFile = Path("config.yaml"),
    cores: Workers | None = None,
    json_: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> int:
    """Report what `snakemake --configfile CONFIGFILE TARGETS` would do here; nothing is run.

    For each stage: the number of jobs, why they would run, hours from the benchmark files of
    earlier jobs, the size of the outputs. Where only options of filter have changed, how many tiles
    would have another decision. Return 1 where weights, memory or disk are missing.

    Args:
        targets: of Snakemake, such as data; by default all.
        configfile: the configuration of the workflow.
        cores: processors of the run; by default those of this machine.
        json_: write JSON, not tables.
    """
    found = planned(targets, configfile, cores or os.cpu_count() or 1)
    sys.stdout.write(json.dumps(found, indent=1) + "\n" if json_ else plan_text(found))
    return int(bool(found["missing"]))


def planned(targets: Sequence[str], configfile: Path, cores: int) -> dict[str, Any]:
    """Return what `hemera plan --json` writes."""
    from hemera.graph.dry_run import effective_config, planned_jobs
    from hemera.graph.plan import missing, stage_plans

    jobs = planned_jobs(snakefile(), configfile, targets, cores)
    config = effective_config(configfile)
    cohort = config.cohort
    names = units(read_sheet(Path(cohort.sheet)), cohort.block_count)
    plans = stage_plans(jobs, names, cores)
    memory_mb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6
    lacking = missing(plans, config, memory_mb, shutil.disk_usage(".").free)
    decisions = _decisions({each.stage for each in plans}, config)
    return {
        "stages": [dataclasses.asdict(each) for each in plans],
        "hours_at_least": _total([each.cpu_hours for each in plans], 1 / cores),
        "cores": cores,
        "decisions": decisions,
        "missing": lacking,
    }


def _total(values: list[float | None], factor: float = 1) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) * factor if len(known) == len(values) else None


def _decisions(planned: set[str], config: Config) -> dict[str, Any] | None:
    """Return the tiles whose decision changes; None where filter would not run."""
    if "filter" not in planned:
        return None
    table = Path(layout.FILTERED)
    engines = tuple(config.options(MaskOptions).engines)
    if planned & {"describe", "register", "tile", "mask"} or not table.exists():
        return {"known": False}
    from hemera import tables
    from hemera.dataset.criteria import changed_decisions

    rows = tables.read(table, tables.filtered(engines))
    limits = config.options(FilterOptions).model_dump()
    changed = changed_decisions(rows, limits, engines)
    return {
        "known": True,
        "tiles": rows.num_rows,
        "changed": sum(changed.values()),
        "changes": [
            {"before": before, "after": after, "tiles": count}
            for (before, after), count in changed.items()
        ],
    }


def plan_text(found: dict[str, Any]) -> str:
    """Return the plan as `hemera plan` prints it."""
    if not found["stages"]:
        return "Nothing to be done: all results exist and are up to date.\n"
    lines = []
    for each in found["stages"]:
        cells = [each["stage"], str(each["jobs"]), _hours(each["hours"]), _size(each["bytes"])]
        for text, count in each["reasons"].items():
            jobs = "" if count == each["jobs"] else f" ({count} of {each['jobs']} jobs)"
            lines.append([*cells, text + jobs])
            cells = [""] * 4
    hours = [each["hours"] for each in found["stages"]]
    sizes = [each["bytes"] for each in found["stages"]]
    jobs = sum(each["jobs"] for each in found["stages"])
    lines.append(["total", str(jobs), _hours(_total(hours)), _size(_total(sizes)), ""])
    text = text_table(["stage", "jobs", "hours", "size", "why"], lines)
    text += "\n"
    if found["hours_at_least"] is not None:
        text += f"At least {_hours(found['hours_at_least'])} h with {found['cores']} processors. "
    temporary = [each["temporary_bytes"] for each in found["stages"]]
    known = [value for value in temporary if value is not None]
    most = max(known) if len(known) == len(temporary) else None
    text += f"Temporary files: at most {_size(most)} at once.\n" if most else ""
    text += _decision_text(found["decisions"])
    return text + "".join(f"missing: {line}\n" for line in found["missing"])


def _decision_text(decisions: dict[str, Any] | None) -> str:
    if decisions is None:
        return ""
    if not decisions["known"]:
        return "Decisions of filter: unknown before tiles and masks are made.\n"
    text = f"{decisions['changed']} of {decisions['tiles']} tiles would have another decision"
    rows = [[str(row["tiles"]), row["before"], row["after"]] for row in decisions["changes"]]
    return text + (":\n" + text_table(["tiles", "now", "then"], rows) if rows else ".\n")


def _hours(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}" if value < 1 else f"{value:.1f}"


def _size(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"
