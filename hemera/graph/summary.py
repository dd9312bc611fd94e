"""What a run ended with: counts, refused pairs, warnings, failed jobs, pages; Markdown and JSON."""

import collections
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hemera import tables
from hemera.config import DEMO_SHEETS, Config
from hemera.errors import INTERRUPTED
from hemera.files import layout
from hemera.files.atomic import write_text
from hemera.graph.live import refusals
from hemera.graph.records import last_run
from hemera.sheet import Pair, read_sheet, units

SUMMARY = Path("results/summary.md")
DATA = Path("results/summary.json")

PAGES = {
    "the data": (layout.REPORT, layout.INDEX),
    "the networks": (layout.EVALUATION, layout.INDEX),
    "the HER2 status": (layout.STATUS_PAGE, layout.STATUS_CASES),
}
"""Each page, and the table that it shows: a page is written after it."""

_SHOWN = 10
"""Pairs that a warning lists, and last lines of Snakemake's output."""


def summarise(
    config: Config, status: int, log: Path | None = None, began: float = 0.0
) -> dict[str, Any]:
    """Return what results/summary.json contains.

    Args:
        config: the configuration of the run.
        status: exit status of Snakemake.
        log: its output; None where nothing had to be done.
        began: time at which it began; earlier logs are those of other runs.
    """
    cohort = config.cohort
    names = units(read_sheet(Path(cohort.sheet)), cohort.block_count)
    tiles, reasons = _decisions()
    # Jobs that Ctrl-C ended have not failed.
    run = last_run(since=began) if status not in (0, INTERRUPTED) else None
    failures = [
        dataclasses.asdict(each)
        for each in ({} if run is None else run.failed).values()
        if not all(Path(path).exists() for path in each.outputs)
    ]
    pages = {name: page for name, (page, _) in PAGES.items() if Path(page).exists()}
    older = [name for name in pages if _is_older(*map(Path, PAGES[name]))]
    return {
        "sheet": cohort.sheet,
        "preset": cohort.preset,
        "demo_networks": cohort.preset == "demo" or cohort.sheet in DEMO_SHEETS,
        "exit_status": status,
        "log": None if log is None else str(log),
        "pairs": sum(map(len, names.values())),
        "refused": [row for unit in names for row in refusals(unit)],
        "registered": _alignment(names),
        "tiles": tiles,
        "accepted_tiles": tiles - sum(reasons.values()),
        "rejected_tiles": reasons,
        "failures": failures,
        # Without a failed job, these say why Snakemake ended.
        "last_lines": [] if status in (0, INTERRUPTED) or failures else _last_lines(log),
        "pages": {name: page for name, page in pages.items() if name not in older},
        "older_pages": {name: pages[name] for name in older},
    }


def _last_lines(log: Path | None) -> list[str]:
    text = "" if log is None else log.read_text(errors="replace")
    return [line for line in text.splitlines() if line.strip()][-_SHOWN:]


def _is_older(page: Path, table: Path) -> bool:
    """Return whether a page is of an earlier state of its table."""
    return not table.exists() or page.stat().st_mtime_ns < table.stat().st_mtime_ns


def _alignment(names: Mapping[str, Sequence[Pair]]) -> dict[str, Any]:
    """Return in how many pairs that come registered the alignment was measured, and found.

    `to_inspect` are those without measurable alignment and without a verdict in the sheet.
    """
    measured, measurable, to_inspect = 0, 0, []
    for unit, own in names.items():
        path = layout.path(layout.IMAGES_TABLE, unit=unit)
        if not path.exists():
            continue
        rows = tables.read(path, tables.DESCRIBE, ["pair", "alignment_margin"]).drop_null()
        open_pairs = {pair.pair for pair in own if not pair.verdict}
        for name, margin in zip(*rows.to_pydict().values(), strict=True):
            measured += 1
            measurable += margin > 0
            if margin <= 0 and name in open_pairs:
                to_inspect.append(name)
    return {"measured": measured, "measurable": measurable, "to_inspect": to_inspect}


def _decisions() -> tuple[int, dict[str, int]]:
    """Return the number of tiles, and of rejected ones by reason; none before stage filter."""
    table = Path(layout.FILTERED)
    if not table.exists():
        return 0, {}
    found = tables.read(table, tables.filtered(()), ["reason"]).column("reason").to_pylist()
    reasons = collections.Counter(reason for reason in found if reason is not None)
    return len(found), dict(reasons.most_common())


def write_summary(summary: dict[str, Any]) -> str:
    """Write both files; return the text of the Markdown file."""
    text = _markdown(summary)
    write_text(SUMMARY, text)
    write_text(DATA, json.dumps(summary, indent=1) + "\n")
    return text


def _markdown(summary: dict[str, Any]) -> str:
    refused, failures = summary["refused"], summary["failures"]
    lines = ["# Summary", ""]
    so_far = " so far" if summary["exit_status"] else ""
    lines.append(f"- pairs: {summary['pairs']}, refused{so_far}: {len(refused)}")
    lines.append(f"- tiles: {summary['tiles']}, accepted: {summary['accepted_tiles']}")
    lines += [f"    - {reason}: {count}" for reason, count in summary["rejected_tiles"].items()]
    if summary["demo_networks"]:
        lines.append("- networks: of the demo, too small for any use")
    if refused:
        lines += ["", "## Refused pairs", ""]
        lines += [f"- {row['pair']}: {row['state']}; {row['reason']}" for row in refused]
        lines += ["", f"Correct their rows in {summary['sheet']}, or write a verdict; run again."]
    registered = summary["registered"]
    if registered["to_inspect"]:
        shown, more = registered["to_inspect"][:_SHOWN], len(registered["to_inspect"]) - _SHOWN
        lines += ["", "## Warnings", ""]
        lines.append(
            f"- {registered['measurable']} of {registered['measured']} pairs provided registered "
            f"show measurable alignment; not {', '.join(shown)}"
            + (f" and {more} more" if more > 0 else "")
            + ". Either they are aligned too coarsely to measure, or HER2 is of another place or "
            f"patient: inspect them (hemera view), and write a verdict in {summary['sheet']}."
        )
    if failures:
        lines += ["", "## Failed jobs", ""]
        lines += [f"- {each['rule']}: {each['cause']} ({each['log']})" for each in failures]
    if summary["last_lines"]:
        lines += ["", "## Snakemake ended without a failed job", ""]
        lines += [f"    {line}" for line in summary["last_lines"]]
    if summary["exit_status"]:
        again = "run the same command again"
        if failures or summary["last_lines"]:
            again = f"remove the cause, then {again}"
        lines += ["", f"The run ended early; what is finished is kept: {again}."]
        lines.append(f"Output of Snakemake: {summary['log']}")
    if summary["pages"] or summary["older_pages"]:
        lines += ["", "## Pages", ""]
        lines += [f"- {name}: {page}" for name, page in summary["pages"].items()]
        lines += [
            f"- {name}, of an earlier index: {page}"
            for name, page in summary["older_pages"].items()
        ]
    return "\n".join(lines) + "\n"
