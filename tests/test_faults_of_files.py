"""Hostile, lost and cut-off files in the real graph: a state or a failed job, then equal bytes."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile

from hemera.sheet import read_sheet
from tests.small_slides import picture, write_pyramid
from tests.small_workflow import TINY, digests, planned, snakemake, write_config

pytestmark = pytest.mark.slow

Seen = Callable[..., None]

SHIM = """\
#!{python}
import os, resource, subprocess, sys, threading, time
stage, fault, images = {stage!r}, {fault!r}, {images!r}
own = [{hemera!r}, *sys.argv[1:]]
if sys.argv[1] != stage:
    os.execv(own[0], own)
if fault == "full disk":
    # As on a full disk, a file ends in the middle of a write.
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    os.execv(own[0], own)
if fault == "unreachable mount":
    os.rename(images, images + ".away")
    status = subprocess.call(own)
    os.rename(images + ".away", images)
    sys.exit(status)
# The engine is a process of its own, which the scheduler or the system ends.
child = subprocess.Popen(own)
while child.poll() is None:
    found = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(child.pid)], capture_output=True, text=True
    )
    for line in found.stdout.splitlines():
        if "hemera.registration.deeperhistreg" in line:
            time.sleep(1)
            os.kill(int(line.split()[0]), 9)
    time.sleep(0.2)
sys.exit(child.returncode)
"""


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, with Snakemake's records."""
    return shutil.copytree(finished, tmp_path / "run", symlinks=True)


TRANSIENT = {
    "full disk": ("mask", "bci.000", "File too large"),
    "unreachable mount": ("tile", "bci.000", "no such file"),
    "killed engine": ("register", "acrobat_train_0", "was ended by SIGKILL"),
}


@pytest.mark.fault
@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_transient_fault_fails_the_job(
    fault: str, run: Path, tmp_path: Path, fault_seen: Seen
) -> None:
    """No verdict, no file; the same command makes the same bytes."""
    stage, unit, words = TRANSIENT[fault]
    before = digests(run)
    own = [Path(name) for name in before if name.startswith(f"results/{stage}/{unit}.")]
    for path in own:
        (run / path).unlink()
    shims = tmp_path / "shims"
    shims.mkdir()
    hemera = str(Path(sys.executable).parent / "hemera")
    values = {"python": sys.executable, "stage": stage, "fault": fault, "hemera": hemera}
    (shims / "hemera").write_text(SHIM.format(**values, images=str(run / "bci")))
    (shims / "hemera").chmod(0o755)
    target = str(own[0])
    text = snakemake(run, "--cores", "2", target, check=False, first_on_path=shims)
    (line,) = {line for line in text.splitlines() if words in line and "ERROR" in line}
    assert not any((run / path).exists() for path in own)
    assert "To continue, run the same command again" in text
    snakemake(run, "--cores", "2", target)
    after = digests(run)
    same = all(after[str(path)] == before[str(path)] for path in own)
    fault_seen(fault, f"the job fails: {line.strip()}", same)
    assert same


def _write_bomb(path: Path) -> None:
    """A TIFF of 2 kB that claims a million pixels per side."""
    tifffile.imwrite(
        path, np.zeros((128, 128, 3), np.uint8), tile=(128, 128), photometric="rgb",
        compression="deflate",
    )  # fmt: skip
    with tifffile.TiffFile(path, mode="r+") as file:
        for name in ("ImageWidth", "ImageLength"):
            file.pages[0].tags[name].overwrite(10**6)
    assert path.stat().st_size < 2500


def _write_pipe(path: Path) -> None:
    os.mkfifo(path)


def _write_repeated(path: Path) -> None:
    """A TIFF of which half of the offsets are those of one tile."""
    write_pyramid(path, [picture(np.random.default_rng(5))], mpp=(0.46, 0.46))
    with tifffile.TiffFile(path, mode="r+") as file:
        for name in ("TileOffsets", "TileByteCounts"):
            tag = file.pages[0].tags[name]
            tag.overwrite([tag.value[0] if k % 2 else value for k, value in enumerate(tag.value)])


HOSTILE = {
    "TIFF of 2 kB that claims 10^6 px per side": (_write_bomb, "positions of 1 tiles instead of"),
    "named pipe as slide": (_write_pipe, "pipe or device, not a file"),
    "half of the tile offsets point to one tile": (_write_repeated, "same stored picture"),
}


@pytest.mark.fault
def test_hostile_images_are_states_of_their_pairs(run: Path, fault_seen: Seen) -> None:
    """All at once; the rest of the cohort continues. With the images restored, the same bytes."""
    before = digests(run)
    pairs = [pair for pair in read_sheet(run / "pairs.tsv").pairs if pair.in_block]
    paths = dict(zip(HOSTILE, (run / pair.he for pair in pairs), strict=False))
    for name, path in paths.items():
        path.rename(f"{path}.kept")
        HOSTILE[name][0](path)
    snakemake(run, "--cores", "2", "data")
    tables = sorted((run / "results/tile").glob("bci.*.pairs.parquet"))
    states = {row["pair"]: row for table in tables for row in pq.read_table(table).to_pylist()}
    for (name, (_, words)), pair in zip(HOSTILE.items(), pairs, strict=False):
        assert states[pair.pair]["state"] == "unreadable", name
        assert words in states[pair.pair]["reason"], name
    others = [pair.pair for pair in pairs[len(HOSTILE) :]]
    assert others and {states[name]["state"] for name in others} == {"tiled"}
    for path in paths.values():
        path.unlink()
        Path(f"{path}.kept").rename(path)
        path.touch()
    snakemake(run, "--cores", "2", "data")
    same = digests(run) == before
    for name, pair in zip(HOSTILE, pairs, strict=False):
        fault_seen(name, f"the pair is refused: {states[pair.pair]['reason']}", same)
    assert same


@pytest.mark.fault
def test_a_shard_that_was_cut_off_is_named_before_any_job(run: Path, fault_seen: Seen) -> None:
    before = digests(run)
    shard = run / "results/mask/bci.000.tar"
    os.truncate(shard, 100)
    text = snakemake(run, "-n", "--cores", "2", "data", check=False)
    (line,) = [line for line in text.splitlines() if "cut off" in line]
    shard.unlink()
    snakemake(run, "--cores", "2", str(shard.relative_to(run)))
    same = digests(run) == before
    fault_seen("a shard is truncated to 100 bytes", f"no job begins: {line.strip()}", same)
    assert same


@pytest.mark.fault
def test_a_flipped_bit_in_a_table_stops_the_stage_that_reads_it(
    run: Path, fault_seen: Seen
) -> None:
    table = run / "results/mask/bci.000.parquet"
    stored, times = table.read_bytes(), table.stat()
    before = digests(run)
    column = pq.ParquetFile(table).metadata.row_group(0).column(3)
    # Among the values; the header of a page begins with statistics, which nothing reads.
    place = column.dictionary_page_offset + column.total_compressed_size - 5
    table.write_bytes(stored[:place] + bytes([stored[place] ^ 8]) + stored[place + 1 :])
    os.utime(table, ns=(times.st_atime_ns, times.st_mtime_ns))
    write_config(run, TINY, filter={"dust_max": 0.2})
    filtered = "results/filter/tiles.parquet"
    text = snakemake(run, "--cores", "2", filtered, check=False)
    (line,) = {line for line in text.splitlines() if "bci.000.parquet" in line and "ERROR" in line}
    write_config(run, TINY)
    table.unlink()
    snakemake(run, "--cores", "2", "data")
    same = digests(run) == before
    fault_seen("one bit flipped in a table", f"the job fails: {line.strip()}", same)
    assert same and planned(run, "data") == {}


@pytest.mark.fault
def test_files_that_are_away_at_planning_are_listed_together(run: Path, fault_seen: Seen) -> None:
    before = digests(run)
    (run / "bci").rename(run / "away")
    write_config(run, TINY, mask={"completeness_min": 0.55})
    text = snakemake(run, "--cores", "2", "data", check=False)
    lines = [line for line in text.splitlines() if "do not exist" in line]
    assert len(lines) == 1 and "Job stats" not in text
    (run / "away").rename(run / "bci")
    write_config(run, TINY)
    same = digests(run) == before
    words = f"no job begins: {lines[0].strip()}"
    fault_seen("a folder of images is away at planning", words, same)
    assert planned(run, "data") == {} and same


def test_a_failed_job_is_in_the_progress(run: Path) -> None:
    """With the reason from its log; not any more when it has been repeated."""
    shard = run / "results/tile/bci.000.tar"
    data = bytearray(shard.read_bytes())
    times = shard.stat()
    row = pq.read_table(run / "results/tile/bci.000.parquet").to_pylist()[0]
    data[row["her2_offset"] + row["her2_length"] // 2] ^= 4
    shard.write_bytes(data)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    (run / "results/mask/bci.000.tar").unlink()
    snakemake(run, "--cores", "2", "data", check=False)
    words = [sys.executable, "-m", "hemera", "progress", "data"]
    done = subprocess.run(words, cwd=run, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "failed: mask, results/mask/bci.000.tar" in done.stdout
    assert "differs from its SHA-256" in done.stdout and "logs/mask/bci.000.log" in done.stdout
