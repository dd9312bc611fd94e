"""Reads files that a test names, one after the other, with a gigabyte of memory.

Each line of the input is a kind and a path; the answer is a line of JSON.
"""

import contextlib
import json
import os
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from hemera import tables
from hemera.commands.new import completed, table_rows
from hemera.commands.sheet import LABELLED, Release, release_rows
from hemera.config import load_file
from hemera.dataset.index import TileIndex
from hemera.dataset.shards import ShardReader
from hemera.errors import HemeraError, SheetError
from hemera.files.geojson import read_features, read_polygons, with_features
from hemera.imaging.slide import open_slide
from hemera.registration.displacement_files import read_displacement
from hemera.registration.landmarks import predictions_csv, read_landmarks
from hemera.sheet import Pair, missing_files, parse_sheet, read_sheet, units, write_rows

MEMORY = 2**30


def sheet(path: Path) -> None:
    found = read_sheet(path)
    missing_files(found)
    units(found, 19)


def table(path: Path) -> None:
    """As `hemera new --sheet`, up to the sheet that it writes."""
    rows = completed(list(table_rows(path)), "study")
    path.with_name("pairs.tsv").write_text(write_rows(rows), encoding="utf-8")
    source = path.name, [int(row["row"]) for row in rows]
    _, faults = parse_sheet(path.with_name("pairs.tsv"), source)
    if faults:
        raise SheetError("\n".join(faults))


def release(path: Path) -> None:
    """As `hemera new --release`, of every release, in a folder of empty files.

    The file has the table of labels, an empty line, and the names of the files.
    """
    labels, _, names = path.read_bytes().partition(b"\n\n")
    path.with_name("labels.csv").write_bytes(labels)
    folder = path.with_name("release")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in names.splitlines():
        # Of a part with a NUL or of a file in the place of a folder, there is no file.
        with contextlib.suppress(OSError, ValueError):
            own = folder / os.fsdecode(name).lstrip("/").replace("..", ".")
            own.parent.mkdir(parents=True, exist_ok=True)
            own.write_bytes(labels if own.suffix == ".csv" else b"")
    refused = []
    for kind in get_args(Release):
        given = {"labels": path.with_name("labels.csv")} if kind in LABELLED else {}
        try:
            rows = completed(release_rows(kind, folder, **given), "study")
            path.with_name("pairs.tsv").write_text(write_rows(rows), encoding="utf-8")
            parse_sheet(path.with_name("pairs.tsv"))
        except HemeraError as error:
            refused.append(error)
    if len(refused) == len(get_args(Release)):
        raise refused[0]


def geojson(path: Path) -> None:
    document, features = read_features(path)
    json.dumps(with_features(document, [each.replaced(each.shapes) for each in features]))
    read_polygons(path)


def landmarks(path: Path) -> None:
    """In um, in pixels, or as the second of two files, by its size: each takes milliseconds."""
    plain = path.with_name("plain.csv")
    number = path.stat().st_size % 3
    he, coordinates = ((path, "um"), (path, "px"), (plain, "px"))[number]
    pair = Pair(
        pair="p", case="c", dataset="d", he=Path("7_HE_val.tif"), her2=Path("7_HER2_val.tif"),
        he_landmarks=he, her2_landmarks=path,
    )  # fmt: skip
    found = read_landmarks(pair, 0.46, 0.46, coordinates)
    predictions_csv(found, found.her2)


def parquet(path: Path) -> None:
    try:
        tables.read_metadata(path)
        for row in tables.read(path, tables.TILE).to_pylist():
            str(row)
    finally:
        TileIndex(path).select(("tile", "he_offset"), refused=True)


def shard(path: Path) -> None:
    """At the offsets beside the shard, of which some are wrong."""
    reader = ShardReader(path.parent)
    faults = []
    for offset, length, digest in json.loads(path.with_suffix(".json").read_text()):
        try:
            reader.read(path.name, offset, length, bytes.fromhex(digest))
        except HemeraError as error:
            faults.append(error)
    if faults:
        raise faults[0]


def tiff(path: Path) -> None:
    with open_slide(path, mpp=0.5) as slide:
        slide.overview(side_px=64)
        slide.read(3, 5, 150, 140, 0.5)
        slide.stored_jpeg(0, 0, 128, 128, 0.5)


READERS: dict[str, Callable[[Path], Any]] = {
    "sheet": sheet,
    "config": load_file,
    "geojson": geojson,
    "landmarks": landmarks,
    "npz": read_displacement,
    "parquet": parquet,
    "shard": shard,
    "tiff": tiff,
    "table": table,
    "xlsx": table,
    "release": release,
}


def answer(kind: str, path: Path) -> dict[str, Any]:
    start = time.process_time()
    try:
        READERS[kind](path)
        outcome, place = "read", ""
    except HemeraError:
        outcome, place = "refused", ""
    except BaseException as error:  # noqa: BLE001 (the answer)
        outcome = type(error).__name__
        own = [line for line in traceback.format_exception(error) if "hemera" in line]
        place = (own or [""])[-1].strip() + f" {error}"[:300]
    return {"outcome": outcome, "place": place, "seconds": time.process_time() - start}


def main() -> None:
    # Libraries also write to the terminal.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    status = Path("/proc/self/status").read_text().split()
    used = 1024 * int(status[status.index("VmData:") + 1])
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, used + MEMORY))
    out.write("ready\n")
    for line in sys.stdin:
        kind, _, path = line.rstrip("\n").partition(" ")
        out.write(json.dumps(answer(kind, Path(path))) + "\n")


if __name__ == "__main__":
    main()
