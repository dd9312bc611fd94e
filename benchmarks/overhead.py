"""The fraction of the processor time that Snakemake itself takes. Goal: at most 1 %, stretch 0.5 %.

*Demo*: the small demo cohort, whose jobs last seconds, so its fraction is not a real one's.
*Cohort*: the graph of whole slides at two sizes, with jobs that copy an empty table; all that is
left is Snakemake, at its start and per job. *Watching*: jobs that sleep in 600 MiB for 60 s, beside
the same that end at once: Snakemake samples the memory of a job while it runs. The sum is
against a job of 60 s of processor time; the tile stage takes about 80 s on a slide of 8 gigapixels.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from _graph import lay_out, snakemake, write_cohort

from hemera import demo, tables

JOB_S = 60
SIZES = 20, 60
WATCHED = 4
COHORT = 750
DEMO: dict[str, Any] = {
    "preset": "demo",
    "sheet": "pairs.tsv",
    "allow_demo_sizes": True,
    "register": {"preset": "default_initial_nonrigid_fast", "size_px": 512, "retries": 0},
    "tile": {"size_px": 256},
}
# Copies an empty table to whatever a job should make; what it reads is there already. Its first
# word is how long describe takes.
STAND_IN = """#!/bin/sh
seconds=$1
shift
if [ $1 = describe ] && [ $seconds -gt 0 ]; then
  {python} -c "import time; held = bytearray(b'1') * (600 << 20); time.sleep($seconds)"
fi
for path; do
  case $path in
    results/*.*) [ -e "$path" ] || cp {table} "$path" ;;
    results/report/pairs) mkdir -p "$path" ;;
  esac
done
"""


def on_demo(parent: Path) -> None:
    """Print Snakemake's share on the small demo cohort, up to the report."""
    folder = parent / "demo"
    lay_out(folder, DEMO)
    demo.write_cohort(folder, "small")
    cost = snakemake(folder, "--cores", "2", "data")
    jobs = len(cost.job_s)
    sys.stdout.write(
        f"demo, {jobs} jobs of {sum(cost.job_s) / jobs:.1f} s: Snakemake took "
        f"{cost.overhead_s:.1f} s of processor time, {cost.overhead_s / jobs:.2f} s per job, "
        f"{100 * cost.overhead_s / cost.total_s:.1f} % of all; "
        f"{100 * cost.overhead_s / jobs / JOB_S:.1f} % if they took {JOB_S} s each\n"
    )


def stood_in(parent: Path, slides: int, seconds: int = 0) -> tuple[int, float]:
    """Run a graph of stand-ins; return its jobs and Snakemake's seconds."""
    folder = parent / f"{slides}_{seconds}"
    lay_out(folder, {"preset": "no_weights", "sheet": "pairs.tsv"})
    write_cohort(folder, slides, 0)
    cost = snakemake(folder, "--cores", "8", "data", command=f"{parent / 'stand-in'} {seconds}")
    return len(cost.job_s), cost.overhead_s


def on_cohort(parent: Path) -> None:
    """Print what Snakemake takes per job, and what that is of a job of a real slide."""
    table = parent / "empty.parquet"
    tables.write(table, [], tables.DESCRIBE)
    stand_in = parent / "stand-in"
    stand_in.write_text(STAND_IN.format(table=table, python=sys.executable))
    stand_in.chmod(0o755)
    (few, less), (many, more) = (stood_in(parent, slides) for slides in SIZES)
    each = (more - less) / (many - few)
    start = less - each * few
    sys.stdout.write(
        f"cohort, {few} and {many} jobs of no length: Snakemake took {less:.1f} s and {more:.1f} s "
        f"of processor time: {start:.1f} s for its start, {each:.3f} s per job\n"
    )
    (_, short), (_, long) = (stood_in(parent, WATCHED, seconds) for seconds in (0, JOB_S))
    watching = (long - short) / WATCHED
    jobs = 4 * COHORT + 3
    share = (start / jobs + each + watching) / JOB_S
    sys.stdout.write(
        f"watching a job of {JOB_S} s: {watching:.2f} s\n"
        f"of {jobs} jobs of {JOB_S} s, which {COHORT} slide pairs have, Snakemake's share is "
        f"{100 * share:.2f} % (goal at most 1, stretch 0.5), carried on in a straight line\n"
    )


def main() -> None:
    """Measure on the demo, then on stand-ins."""
    with tempfile.TemporaryDirectory() as name:
        on_demo(Path(name))
        on_cohort(Path(name))


if __name__ == "__main__":
    main()
