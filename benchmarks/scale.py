"""What the plan of 10,000 slide pairs costs, beside a bare Snakemake graph of the same size.

The bare graph has the same stages, files, logs and benchmarks by patterns alone: no sheet, no
options, no resources. Goal: at most 1.6 times its processor time, measured in turn, and at most
1.5 GB. Then what Snakemake takes to start one job, which happens twice per job of Slurm.
`--pairs` gives another number.

Filter and index of 10^7 tiles of 10,000 pairs, as `--tiles` says: processor time, time on the clock
and memory. Goal: at most 10 min and 4 GiB.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _graph import lay_out, write_cohort
from threshold import ENGINES, write_unit

from hemera.sheet import read_sheet, units

REPEATS = 3
BARE = """
UNITS = [f"slide_{{n:05d}}" for n in range({pairs})]
IMAGES = ["img/{{unit}}_HE.tif", "img/{{unit}}_HER2.tif"]
DESCRIBED = "bare/describe/{{unit}}.parquet"
MAPS = ["bare/register/{{unit}}" + end for end in (".displacement.npz", ".parquet", ".q.parquet")]
TILES = ["bare/tile/{{unit}}" + end for end in (".tar", ".parquet", ".pairs.parquet")]
MASKS = ["bare/mask/{{unit}}" + end for end in (".tar", ".parquet", ".cells.parquet")]
COHORT = ["bare/filter/t", "bare/index/i", "bare/index/c", "bare/report/r", "bare/report/c"]


def each(*patterns):
    return [pattern.format(unit=unit) for pattern in patterns for unit in UNITS]


rule data:
    input: each(DESCRIBED, *MAPS, *TILES, *MASKS), COHORT
"""
RULE = """
rule {name}:
    input: {input}
    output: {output}
    log: "logs/{name}/{each}.log"
    benchmark: "logs/{name}/{each}.tsv"
    shell: "true"
"""
RULES = (
    ("describe", "IMAGES", "DESCRIBED", "{unit}"),
    ("register", "IMAGES, DESCRIBED", "MAPS", "{unit}"),
    ("tile", "IMAGES, DESCRIBED, MAPS", "TILES", "{unit}"),
    ("mask", "TILES[:2]", "MASKS", "{unit}"),
    ("filter", "each(*TILES[1:], MASKS[1])", "COHORT[0]", "filter"),
    ("index", "COHORT[0]", "COHORT[1:3]", "index"),
    (
        "report",
        "each(DESCRIBED, *MAPS, TILES[0], TILES[2], MASKS[0], MASKS[2]), COHORT[1]",
        "COHORT[3:]",
        "report",
    ),
)
JOB = "--target-jobs describe:unit=slide_00000 --allowed-rules describe --mode remote --nolock"


def planned(folder: Path, *words: str) -> tuple[float, float]:
    """Run a dry run; return its seconds of processor time and its peak memory in MB."""
    command = [sys.executable, "-m", "snakemake", "-n", "--quiet", "all", "--cores", "2", *words]
    with (folder / "out").open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=out)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"snakemake {' '.join(words)}:\n{(folder / 'out').read_text()[-4000:]}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6


def write_both(parent: Path, pairs: int) -> tuple[Path, Path]:
    """Write a working directory of HEMERA, and one of the bare graph with the same images."""
    cohort, bare = parent / "cohort", parent / "bare"
    lay_out(cohort, {"preset": "no_weights", "sheet": "pairs.tsv"})
    write_cohort(cohort, pairs, 0)
    bare.mkdir()
    (bare / "img").symlink_to(cohort / "img")
    rules = [
        RULE.format(name=name, input=input, output=output, each=each)
        for name, input, output, each in RULES
    ]
    (bare / "Snakefile").write_text(BARE.format(pairs=pairs) + "".join(rules))
    return cohort, bare


def compare(pairs: int, repeats: int) -> None:
    """Print the costs of both dry runs, and of the start of a job."""
    with tempfile.TemporaryDirectory() as name:
        cohort, bare = write_both(Path(name), pairs)
        rounds = [(planned(cohort, "data"), planned(bare, "data")) for _ in range(repeats)]
        starts = [
            (planned(cohort, *JOB.split())[0], planned(bare, *JOB.split())[0])
            for _ in range(repeats)
        ]
        shutil.rmtree(cohort / "img")
    ratios = [own[0] / plain[0] for own, plain in rounds]
    own_s, plain_s = (statistics.median(pair[side][0] for pair in rounds) for side in (0, 1))
    own_mb, plain_mb = (max(pair[side][1] for pair in rounds) for side in (0, 1))
    own_start, plain_start = (statistics.median(pair[side] for pair in starts) for side in (0, 1))
    sys.stdout.write(
        f"dry run of {pairs} slide pairs, {4 * pairs + 3} jobs: {own_s:.1f} s of processor time, "
        f"{own_mb:.0f} MB; the bare graph: {plain_s:.1f} s, {plain_mb:.0f} MB; ratio "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}; goal at most "
        f"1.6, and 1,500 MB)\n"
        f"start of one of its jobs: {own_start:.1f} s; of the bare graph: {plain_start:.1f} s\n"
    )


def stage(folder: Path, *words: str) -> str:
    """Run a stage; return its times and its memory, for printing."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "hemera", *words], cwd=folder)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"hemera {words[0]} failed")
    return (
        f"{words[0]} {usage.ru_utime + usage.ru_stime:.0f} s of processor time, "
        f"{time.monotonic() - started:.0f} s, {usage.ru_maxrss / 1024**2:.2f} GiB"
    )


def tabulate(pairs: int, tiles: int) -> None:
    """Print what filter and index cost for so many tiles."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lay_out(folder / "cohort", {"preset": "no_weights", "sheet": "pairs.tsv"})
        folder /= "cohort"
        write_cohort(folder, pairs, 0)
        for unit, rows in units(read_sheet(folder / "pairs.tsv"), 19).items():
            write_unit(folder / "results", unit, rows, [tiles // pairs])
        sheet, engines = ("--sheet", "pairs.tsv"), ("--engines", *ENGINES)
        filtered, index = "results/filter/tiles.parquet", "results/index/index.parquet"
        blocks = ("--block-count", "19")
        sys.stdout.write(
            f"{tiles} tiles of {pairs} pairs: "
            f"{stage(folder, 'filter', *sheet, *blocks, *engines, '--tiles', filtered)}; "
        )
        words = (*sheet, "--tiles", filtered, *engines, "--target", ENGINES[0])
        words += ("--index", index, "--card", "card.md")
        sys.stdout.write(f"{stage(folder, 'index', *words)} (goal at most 600 s and 4 GiB)\n")


def main() -> None:
    """Measure the graph at two sizes, and the tables at one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, nargs="*", default=[1_000, 10_000])
    parser.add_argument("--tiles", type=int, default=10_000_000)
    given = parser.parse_args()
    for pairs in given.pairs:
        compare(pairs, REPEATS if pairs < 5_000 else 1)
    if given.tiles:
        tabulate(max(given.tiles // 1_000, 1), given.tiles)


if __name__ == "__main__":
    main()
