"""What a run ended with: counts, refused pairs, failed jobs, pages; as Markdown and JSON."""

import collections
import dataclasses
import json
from pathlib import Path
from typing import Any

from hemera import tables
from hemera.config import DEMO_SHEETS, Config
from hemera.errors import INTERRUPTED
from hemera.files import layout
from hemera.files.atomic import write_text
from hemera.graph.live import refusals
from hemera.graph.records import last_run
from hemera.sheet import read_sheet, units

SUMMARY = Path("results/summary.md")
DATA = Path("results/summary.json")

PAGES = {
    "the data": layout.REPORT,
    "the networks": layout.EVALUATION,
    "the HER2 status": layout.STATUS_PAGE,
}


def summarise(config: Config, status: int, log: Path | None) -> dict[str, Any]:
    """Return what results/summary.json contains.

    Args:
        config: the configuration of the run.
        status: exit status of Snakemake.
        log: its output; None where nothing had to be done.
    """
    cohort = config.cohort
    names = units(read_sheet(Path(cohort.sheet)), cohort.block_count)
    tiles, reasons = _decisions()
    # Jobs that Ctrl-C ended have not failed.
    run = last_run() if status not in (0, INTERRUPTED) else None
    return {
        "sheet": cohort.sheet,
        "preset": cohort.preset,
        "demo_networks": cohort.preset == "demo" or cohort.sheet in DEMO_SHEETS,
        "exit_status": status,
        "log": None if log is None else str(log),
        "pairs": sum(map(len, names.values())),
        "refused": [row for unit in names for row in refusals(unit)],
        "tiles": tiles,
        "accepted_tiles": tiles - sum(reasons.values()),
        "rejected_tiles": reasons,
        "failures": [
            dataclasses.asdict(each)
            for each in ({} if run is None else run.failed).values()
            if not all(Path(path).exists() for path in each.outputs)
        ],
        "pages": {name: page for name, page in PAGES.items() if Path(page).exists()},
    }


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
    if failures:
        lines += ["", "## Failed jobs", ""]
        lines += [f"- {each['rule']}: {each['cause']} ({each['log']})" for each in failures]
    if summary["exit_status"]:
        lines += ["", "The run ended early; what is finished is kept: run the same command again."]
        lines.append(f"Output of Snakemake: {summary['log']}")
    if summary["pages"]:
        lines += ["", "## Pages", ""]
        lines += [f"- {name}: {page}" for name, page in summary["pages"].items()]
    return "\n".join(lines) + "\n"
