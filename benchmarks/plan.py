"""How long the plan of the full cohort takes: 750 ACROBAT slide pairs and 4,873 BCI pairs.

Goal: a dry run in under 10 s (stretch 5 s). Beside it, interleaved, a dry run of one pair: what
Snakemake needs to start at all. Prints seconds, and the ratio of the two.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
REPEATS = 3


def lay_out(folder: Path, slides: int, pairs: int) -> None:
    """Make a working directory whose images are empty files: enough for planning."""
    for name in ("Snakefile", "workflow", "envs", "profiles"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "img").mkdir()
    lines = ["pair\tcase\tdataset\the\ther2\tregistered\the_mpp\ther2_mpp"]
    for number in range(slides + pairs):
        slide = number < slides
        name = f"{'slide' if slide else 'tile'}_{number:05d}"
        suffix = "tif" if slide else "png"
        files = [f"img/{name}_{stain}.{suffix}" for stain in ("HE", "HER2")]
        for file in files:
            (folder / file).touch()
        cells = ("", "", "") if slide else ("true", "0.46", "0.46")
        dataset = "acrobat" if slide else "bci"
        lines.append("\t".join([name, name, dataset, *files, *cells]))
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n")
    (folder / "config.yaml").write_text("preset: hemera\nsheet: pairs.tsv\n")


def dry_run_s(folder: Path) -> float:
    """Return the seconds of processor time of one dry run."""
    before = os.times()
    subprocess.run(
        [sys.executable, "-m", "snakemake", "-n", "--quiet", "all", "--cores", "2"],
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    after = os.times()
    return (after.children_user - before.children_user) + (
        after.children_system - before.children_system
    )


def main() -> None:
    """Measure both, in turn."""
    with tempfile.TemporaryDirectory() as parent:
        cohort, single = Path(parent) / "cohort", Path(parent) / "single"
        for folder, slides, pairs in ((cohort, 750, 4873), (single, 1, 0)):
            folder.mkdir()
            lay_out(folder, slides, pairs)
        times: list[tuple[float, float]] = []
        for _ in range(REPEATS):
            times.append((dry_run_s(cohort), dry_run_s(single)))
            time.sleep(0.1)
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
