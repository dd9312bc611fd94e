"""What a changed threshold in config.yaml costs for 10^6 tiles: 750 slide pairs, 4,873 BCI pairs.

The tables that tile and mask leave are made, with preset no_weights, and the graph is told that
they are up to date. Then filter.tissue_fraction_min changes: the plan must
hold no stage that reads a pixel or makes a mask, and filter and index run. Goal: under 60 s of
processor time, stretch 20 s.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from _graph import lay_out, snakemake, write_cohort, write_config

from hemera import tables
from hemera.config import MaskOptions, TileOptions, load
from hemera.sheet import Pair, read_sheet, units

TILES = 1_000_000
SLIDES, PAIRS = 750, 4_873
TILES_PER_PAIR = 4
"""A BCI image of 1,024 px holds four tiles of 512."""

BEFORE: dict[str, Any] = {"preset": "no_weights", "sheet": "pairs.tsv"}
AFTER: dict[str, Any] = {**BEFORE, "filter": {"tissue_fraction_min": 0.55}}
ENGINES = tuple(load(BEFORE).options(MaskOptions).engines)
MAY_RUN = {"filter", "index", "report", "train_generation", "train_segmentation", "evaluate"}

ENDINGS = {".tar": bytes(1024), ".parquet": b"PAR1PAR1"}
"""Of files that are not cut off: the workflow refuses others."""

# `--touch` sleeps between jobs, because modification times once had a coarse clock.
TOUCH = """
import sys
from snakemake.cli import main
from snakemake.executors.touch import Executor
Executor.SLEEPING_TIME = 0
main(sys.argv[1:])
"""


def digests(count: int, rng: np.random.Generator) -> pa.Array:
    """Return so many SHA-256 as they stand in tables."""
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    text = digits[rng.integers(0, 16, count * 64)]
    offsets = np.arange(count + 1, dtype=np.int32) * 64
    return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(text))


def places(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return where members of these lengths begin in a tar."""
    return 512 + np.concatenate([[0], np.cumsum(512 + -(-lengths // 512) * 512)[:-1]])


def write_unit(results: Path, unit: str, pairs: tuple[Pair, ...], per_pair: list[int]) -> None:
    """Write the tables of a unit as stages describe, tile and mask leave them."""
    rng = np.random.default_rng(sum(unit.encode()))
    count = sum(per_pair)
    numbers = np.concatenate([np.arange(n) for n in per_pair])
    owner = np.repeat([pair.pair for pair in pairs], per_pair)
    block = pairs[0].in_block
    wide = 2 if block else 80
    x, y = 512 * (numbers % wide), 512 * (numbers // wide)
    tile = pa.array([f"{o}_{a:06d}_{b:06d}" for o, a, b in zip(owner, x, y, strict=True)])
    he_length, her2_length = rng.integers(60_000, 130_000, (2, count))
    offsets = places(np.stack([he_length, her2_length], axis=1).ravel())
    mpp = np.full(count, 0.46 if block else 0.92)
    nothing = pa.nulls(count, pa.float64())
    measured = nothing if block else pa.array(rng.gamma(2.0, 12.0, count))
    columns = {
        "tile": tile,
        "pair": owner,
        "x_px": x,
        "y_px": y,
        "her2_x_px": x + rng.normal(0, 20, count),
        "her2_y_px": y + rng.normal(0, 20, count),
        "size_px": np.full(count, 512, np.int32),
        "mpp": mpp,
        "he_mpp": mpp,
        "her2_mpp": mpp,
        "registration_error_um": measured,
        "registration_error_low_um": measured,
        "registration_error_high_um": measured,
        "registration_ncc": nothing if block else pa.array(rng.random(count)),
        "registration_margin": nothing if block else pa.array(rng.random(count) / 4),
        "tissue_fraction": rng.uniform(0.05, 1, count),
        "her2_tissue_fraction": rng.uniform(0.05, 1, count),
        "he_sharpness": rng.lognormal(5, 0.8, count),
        "her2_sharpness": rng.lognormal(3.5, 0.8, count),
        "histogram_similarity": rng.uniform(-0.1, 1, count),
        "alignment_margin": pa.array(rng.uniform(-0.5, 0.2, count)) if block else nothing,
        **{f"{stain}_background": [[240, 238, 241]] * count for stain in ("he", "her2")},
        **{
            f"{stain}_{kind}_fraction": (rng.random(count) < 0.01) * rng.random(count)
            for stain in ("he", "her2")
            for kind in ("pen", "fold", "edge", "dust", "other", "blur")
        },
        "artefacts": pa.nulls(count, pa.binary()),
        "her2_coverage_fraction": 1 - rng.exponential(0.002, count).clip(0, 1),
        "folding_fraction": rng.exponential(0.001, count).clip(0, 1),
        "shard": pa.array([f"tile/{unit}.tar"] * count),
        "he_offset": offsets[::2],
        "he_length": he_length,
        "he_sha256": digests(count, rng),
        "her2_offset": offsets[1::2],
        "her2_length": her2_length,
        "her2_sha256": digests(count, rng),
    }
    tables.write(
        results / f"tile/{unit}.parquet",
        pa.table({name: columns[name] for name in tables.TILE.names}),
        tables.TILE,
        tables.provenance(TileOptions()),
    )
    rows = [
        {
            "pair": pair.pair,
            "state": "tiled",
            "reason": None,
            "registration": "registered" if pair.registered else "pass",
            "tiles_grid": 3 * own,
            "tiles_tissue": own,
            "tiles_artefact": 0,
            "tiles_unreadable": 0,
            "tiles_written": own,
        }
        for pair, own in zip(pairs, per_pair, strict=True)
    ]
    tables.write(results / f"tile/{unit}.pairs.parquet", rows, tables.PAIRS)
    parts = []
    for engine in ENGINES:
        length = rng.integers(4_000, 14_000, count)
        statistics = {
            name: rng.integers(0, 300, count) if name.endswith("cells") else rng.random(count)
            for name in tables.MASK_STATISTICS
        }
        own_columns = {
            "tile": tile,
            "pair": owner,
            "engine": pa.array([engine] * count),
            **statistics,
            "note": pa.nulls(count, pa.string()),
            "shard": pa.array([f"mask/{unit}.tar"] * count),
            "offset": places(length),
            "length": length,
            "sha256": digests(count, rng),
        }
        parts.append(pa.table({name: own_columns[name] for name in tables.MASK.names}))
    tables.write(
        results / f"mask/{unit}.parquet",
        pa.concat_tables(parts),
        tables.MASK,
        tables.provenance(MaskOptions()),
    )
    # Registration asks these for the sizes of the slides, to say how much memory it needs.
    tables.write(results / f"describe/{unit}.parquet", [], tables.DESCRIBE)


def write_results(folder: Path) -> int:
    """Write everything that the graph makes: tables with rows, the rest empty; count the tiles."""
    for line in snakemake(folder, "--summary", "all").text.splitlines():
        name = line.split("\t")[0]
        if name.startswith("results/"):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix:
                path.write_bytes(ENDINGS.get(path.suffix, b""))
            else:
                path.mkdir()
    cohort = units(read_sheet(folder / "pairs.tsv"), 19)
    left = TILES - PAIRS * TILES_PER_PAIR
    written = slides = 0
    for unit, pairs in cohort.items():
        if pairs[0].in_block:
            per_pair = [TILES_PER_PAIR] * len(pairs)
        else:
            per_pair = [left // SLIDES + (slides < left % SLIDES)]
            slides += 1
        write_unit(folder / "results", unit, pairs, per_pair)
        written += sum(per_pair)
    return written


def main() -> None:
    """Make the tables, change the threshold, look at the plan, run it up to the index."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "cohort"
        lay_out(folder, BEFORE)
        write_cohort(folder, SLIDES, PAIRS)
        written = write_results(folder)
        words = ["--touch", "--forceall", "--quiet", "all", "--cores", "2000", "all"]
        subprocess.run(
            [sys.executable, "-c", TOUCH, *words], cwd=folder, check=True, capture_output=True
        )
        planned = snakemake(folder, "-n", "--cores", "1", "all").planned
        if planned:
            sys.exit(f"nothing changed, and yet the plan has {planned}")
        write_config(folder, AFTER)
        plan = snakemake(folder, "-n", "--cores", "1", "all")
        sys.stdout.write(
            f"a changed threshold, {written} tiles: the plan is {', '.join(plan.planned)}; no "
            "pixel is read, no mask made\n"
        )
        if set(plan.planned) != MAY_RUN:
            sys.exit(f"the plan should be {', '.join(sorted(MAY_RUN))}")
        run = snakemake(folder, "--cores", "1", "results/index/index.parquet")
        rows = pq.read_table(folder / "results/filter/tiles.parquet", columns=["accepted"])
        accepted = sum(rows.column("accepted").to_pylist())
    filtering, indexing = run.job_s
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    sys.stdout.write(
        f"filter {filtering:.1f} s, index {indexing:.1f} s: {filtering + indexing:.1f} s of "
        f"processor time (goal < 60, stretch < 20), with Snakemake {run.total_s:.1f} s; "
        f"{accepted} tiles accepted; peak {peak:.0f} MiB\n"
    )


if __name__ == "__main__":
    main()
