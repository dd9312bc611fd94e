"""How long the plan of the full cohort takes: 750 ACROBAT slide pairs and 4,873 BCI pairs.

Goal: a dry run in under 10 s (stretch 5 s). Beside it, interleaved, a dry run of one pair: what
Snakemake needs to start at all. Prints seconds of processor time, and the ratio of the two.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

from _graph import lay_out, snakemake, write_cohort

REPEATS = 3


def dry_run_s(folder: Path) -> float:
    """Return the seconds of processor time of one dry run."""
    return snakemake(folder, "-n", "--quiet", "all", "--cores", "2").total_s


def main() -> None:
    """Measure both, in turn."""
    with tempfile.TemporaryDirectory() as parent:
        cohort, single = Path(parent) / "cohort", Path(parent) / "single"
        for folder, slides, pairs in ((cohort, 750, 4873), (single, 1, 0)):
            lay_out(folder, {"preset": "no_weights", "sheet": "pairs.tsv"})
            write_cohort(folder, slides, pairs)
        times = [(dry_run_s(cohort), dry_run_s(single)) for _ in range(REPEATS)]
    full = statistics.median(pair[0] for pair in times)
    one = statistics.median(pair[1] for pair in times)
    spread = [round(pair[0] / pair[1], 1) for pair in times]
    sys.stdout.write(
        f"dry run of 750 slide pairs and 4,873 image pairs: {full:.1f} s of processor time "
        f"(goal < 10, stretch < 5); of one pair: {one:.1f} s; ratio {full / one:.1f} "
        f"({min(spread)} to {max(spread)})\n"
    )


if __name__ == "__main__":
    main()
