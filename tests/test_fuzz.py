"""Readers of files of unknown origin: mutated and generated files are read or refused, no more.

A child process reads them with a gigabyte of memory. An input fails with any exception but
HemeraError, with a crash, and with more than five seconds of processor time. `make fuzz` runs more
of them, with FULL=1 all; failing inputs are kept in build/fuzz, to become tests.
"""

import datetime
import hashlib
import io
import json
import os
import re
import select
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import tifffile
import yaml

from hemera import tables
from hemera.config import STAGES
from hemera.config.base import keys
from tests.small_geojson import collection, feature, geometry, rectangle
from tests.small_slides import picture
from tests.small_tables import tile_row
from tests.small_workflow import ROOT, TINY

hypothesis = pytest.importorskip("hypothesis", reason="install requirements.lock")
from hypothesis import strategies as st  # noqa: E402

pytestmark = pytest.mark.slow

COUNTS = {
    **dict.fromkeys(("sheet", "config", "geojson", "landmarks", "npz"), 100_000),
    **dict.fromkeys(("table", "xlsx", "release"), 10_000),
    **dict.fromkeys(("parquet", "shard", "tiff"), 10_000),
}
"""Inputs with FULL=1."""
FRACTION = float(os.environ.get("FULL") or 0.002)

SECONDS_MAX = 5
HANGS_S = 600
"""Without an answer for so long, a child waits for something, however busy the machine is."""

TOKENS = (
    b"\0", b"\xff", b"\t", b"\n", b"\r", b'"', b"'", b"[", b"{", b"]", b"}", b":", b",", b"- ",
    b"-1", b"0", b"1e999", b"NaN", b"Infinity", b"99999999999999999999999", b"null", b"true",
    b"../", b"*a", b"&a ", b"!!python/object:os.system", b"[" * 200, b'{"a":' * 200,
    b"\xef\xbb\xbf", b"\xe2\x80\xa8", "é".encode(), b"PAR1", b"PK\3\4", b"\xff\xd8\xff",
)  # fmt: skip
VALUES = (
    b"0", b"-1", b"1", b"0.5", b"1e308", b"1e-320", b"100000000", b"99999999999999999999", b"null",
    b"true", b"false", b'""', b"[]", b"{}", b'"x"', b"[1, 2]", b'{"a": 1}', b"train", b" ", b"",
)  # fmt: skip
YAML = (
    b"2026-11-22", b"2026-13-45", b"0000-00-00", b"2026-11-22 25:61:61",
    b"2001-12-14t21:59:43.10-99:00", b"9" * 5000, b"-" + b"9" * 400, b"0x" + b"f" * 500, b"0b1",
    b"0o9", b"1_000", b"1:30:61", b".inf", b"-.NaN", b"1e400", b"~", b"yes",
    b"&a [&b [*a, *b]]", b"&a {b: &c [*a]}", b"&a &b 1", b"*nothing", b"!!timestamp x",
    b"!!int ''", b"!!float 1:1.", b"!!binary '='", b"!!set {a, b}", b"!!omap [a: 1]",
    b"!!pairs [1]", b"!!python/name:os.system", b"!<tag:x> 1", b"{<<: [1]}", b"{? [a] : b}",
    b"{{a: 1}: 2}", b"|2\n   a", b">-\n  a", b"'", b"%YAML 9.9", b"--- 1\n--- 2", b"[" * 1500,
    b"{a: " * 900, b"\x85", b"\xe2\x80\xa9", b'"\\ud800"', b'"\\x00"',
)  # fmt: skip
"""Scalars, anchors, tags and documents of YAML that a configuration does not need."""
WORD = re.compile(rb'"[^"]*"|[-0-9.]+|[A-Za-z_0-9]+')
NUMBERS = (0, 1, 2, 255, 2**16 - 1, 10**6, 2**31 - 1, 2**31, 2**32 - 1)
SUFFIXES = {"shard": ".tar", "table": ".csv", "xlsx": ".xlsx"}
BATCH = 50
"""Inputs of one example: hypothesis draws the seed of their edits, because drawing each edit takes
ten times as long as reading the file."""

Edit = tuple[str, int, int]


def edits(random: Random) -> list[Edit]:
    """Return one to five edits: what, where, and a number that says how."""
    kinds = ("flip", "cut", "end", "repeat", "token", "number", "value", "value", "value")
    return [
        (random.choice(kinds), random.getrandbits(20), random.getrandbits(8))
        for _ in range(random.choice((1, 1, 1, 2, 2, 5)))
    ]


def mutated(seed: bytes, changes: list[Edit], hot: list[tuple[int, int]]) -> bytes:
    """Return the seed after the edits: every other one in the ranges `hot`, where headers are."""
    data = bytearray(seed)
    for kind, place, value in changes:
        begin, end = hot[place // 2 % len(hot)] if place % 2 and hot else (0, len(data))
        at = begin + place // 8 % max(1, min(end, len(data)) - begin)
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << value % 8
        elif kind == "cut":
            del data[at : at + 1 + value % 40]
        elif kind == "end" and place % 5 == 0:
            del data[at:]
        elif kind == "repeat":
            data[at:at] = data[at : at + value]
        elif kind == "token":
            data[at:at] = TOKENS[value % len(TOKENS)]
        elif kind == "value" and (word := WORD.search(data, at)):
            data[word.start() : word.end()] = VALUES[value % len(VALUES)]
        elif kind == "number":
            data[at : at + 4] = NUMBERS[value % len(NUMBERS)].to_bytes(4, "little")
    return bytes(data)


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Child:
    """The child process; another one begins after a crash."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def answer(self, kind: str, path: Path) -> dict[str, Any]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz_child"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            # Imports take long on a busy machine.
            self._process.stdout.readline()  # type: ignore[union-attr]
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        begin, used = time.monotonic(), _cpu_seconds(process.pid)
        line = ""
        process.stdin.write(f"{kind} {path}\n")
        process.stdin.flush()
        while not select.select([process.stdout], [], [], 1)[0]:
            is_busy = _cpu_seconds(process.pid) - used > 2 * SECONDS_MAX
            if is_busy or time.monotonic() - begin > HANGS_S:
                break
        else:
            line = process.stdout.readline()
        if line:
            return dict(json.loads(line))
        outcome = "hang" if process.poll() is None else f"ended by {process.poll()}"
        self.close()
        return {"outcome": outcome, "place": "", "seconds": 0}

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    found = Child()
    yield found
    found.close()


def sheets() -> list[bytes]:
    header = "pair\tcase\tdataset\the\ther2\tregistered\the_mpp\tsplit\tscore\troi"
    rows = [
        "p_1\tc1\tacrobat\ta.tif\tb.tif\t\t0.46\ttrain\t2+\t",
        "p-2\tc2\tbci\tx.png\ty.png\ttrue",
    ]
    return ["\n".join([header, *rows, ""]).encode()]


def configs() -> list[bytes]:
    return [
        yaml.safe_dump({**TINY, "filter": {"dust_max": 0.1}}).encode(),
        b"preset: demo\nmask: {engines: {stain: {nucleus_dab: 0.1}}}\nindex:\n  target: stain\n",
    ]


def odd_config(random: Random) -> bytes:
    """Return a configuration whose keys are those of HEMERA, with values of YAML."""
    lines = []
    for name, section in random.sample(sorted(STAGES.items()), 3):
        lines.append(name.encode() + b": " + random.choice((b"", b"", b"", *YAML)))
        for key in random.sample(sorted(keys(section)), min(3, len(keys(section)))):
            lines.append(b"  " + key.encode() + b": " + random.choice((*YAML, *VALUES)))
    return b"preset: demo\n" + b"\n".join(lines) + b"\n"


def spreadsheets() -> list[bytes]:
    """A table as text; `release` and `xlsx` begin with others."""
    rows = ["he;her2;case;he_mpp;score", "a b.tif;c.tif;1;0,5;1+", '"x;y.tif";z.tif;2;;', ";;;;"]
    tabs = ["HE\tHER2\tdataset\tother", "a/b.svs\t../c.svs\td\t1", "A/B.svs\tc.svs\td"]
    return ["\n".join(rows).encode(), "\r\n".join(tabs).encode()]


def workbooks() -> list[bytes]:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (["he", "her2", "he_mpp"], ["a.tif", "b.tif", 0.5], ["c.tif", None, 0.25]):
        book.active.append(row)
    book.active["D2"] = datetime.datetime(2026, 11, 22)
    book.active["D1"] = "case"
    file = io.BytesIO()
    book.save(file)
    return [file.getvalue()]


def releases() -> list[bytes]:
    """Labels and names of files of all releases."""
    text = """\
name,score,status,split,filename,mpp_lvl_0,anon_filename_ihc
7,1,negative,,7_HE_train.tif,0.46,7_HER2_train.tif
Test_1,3+,positive,test,x,nan,

7_HE_train.tif
a/7_HER2_train.tif
a/df_acrobat_meta.csv
HE/train/00001_train_1+.png
IHC/train/00001_train_1+.png
HER2/TrainValAB/trainA/s1_0_0.jpg
HER2/TrainValAB/trainB/s1_0_0.jpg
test/Test_1.mrxs
test/Test_1/x.dat
07_HE.ndpi
07_HER2.ndpi
"""
    return [text.encode()]


def within(seed: bytes, changes: list[Edit], random: Random) -> bytes:
    """Return a zip archive one of whose members is edited."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(seed)) as old, zipfile.ZipFile(file, "w") as new:
        chosen = random.choice(old.namelist())
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, mutated(data, changes, []) if name == chosen else data)
    return file.getvalue()


def documents() -> list[bytes]:
    ring = rectangle(1, 2, 30, 40)
    shapes = (
        geometry("Polygon", [ring, rectangle(3, 4, 5, 6)]),
        geometry("MultiPolygon", [[ring]]),
        geometry("LineString", ring),
        collection(geometry("Point", [1, 2]), geometry("Polygon", [ring])),
    )
    named = {"properties": {"name": "a", "classification": {"name": "Tumor", "color": [1, 2, 3]}}}
    features = [feature(shape, nucleusGeometry=shapes[0], **named) for shape in shapes]
    return [json.dumps({"type": "FeatureCollection", "features": features}).encode()]


def landmark_files() -> list[bytes]:
    rows = [
        f"7,7_HE_val.ndpi,7_HER2_val.ndpi,{i},{i}.5,{i * 3},0.9,0.9,HER2,{i},2" for i in range(9)
    ]
    header = (
        "anon_id,anon_filename_he,anon_filename_ihc,point_id,ihc_x,ihc_y,mpp_ihc_10X,mpp_he_10X,"
        "ihc_antibody,he_x,he_y"
    )
    plain = "id,X,Y\n" + "".join(f"{i},{i * i},{50 - i}\n" for i in range(9))
    return ["\n".join([header, *rows, ""]).encode(), plain.encode()]


def arrays() -> list[bytes]:
    vectors = np.random.default_rng(3).normal(0, 9, (5, 7, 2)).astype(np.float32)
    found = []
    for save in (np.savez, np.savez_compressed):
        file = io.BytesIO()
        save(file, vectors_um=vectors, mpp=6.0)
        found.append(file.getvalue())
    return found


def parquet_files(folder: Path) -> list[bytes]:
    tables.write(
        folder / "t", [tile_row("p", number) for number in range(5)], tables.TILE, {"a": "b"}
    )
    return [(folder / "t").read_bytes()]


def shards(folder: Path) -> list[bytes]:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for number in range(4):
            member = tarfile.TarInfo(f"t{number}.he.jpg")
            member.size = 700 + number
            archive.addfile(member, io.BytesIO(bytes([number]) * member.size))
    return [file.getvalue()]


def slides(folder: Path) -> list[bytes]:
    rgb = picture(np.random.default_rng(1), 205, 302)
    found = []
    for compression, big, endian in (
        ("jpeg", False, "<"),
        ("deflate", True, "<"),
        (None, False, ">"),
        ("jpeg2000", False, "<"),
    ):
        path = folder / "s.tif"
        keywords = {"tile": (128, 128), "photometric": "rgb", "compression": compression}
        with tifffile.TiffWriter(path, bigtiff=big, byteorder=endian) as writer:
            writer.write(rgb, subifds=1, **keywords)
            writer.write(rgb[::2, ::2], subfiletype=1, **keywords)
            writer.write(rgb[::4, ::4], **keywords)
        found.append(path.read_bytes())
    return found


def _hot(kind: str, seed: bytes) -> list[tuple[int, int]]:
    """Return where the headers of a file are."""
    if kind == "tiff":
        with tifffile.TiffFile(io.BytesIO(seed)) as file:
            pages = [*file.pages, *(file.pages[0].pages or [])]
            tags = [(page.offset, page.offset + 12 * 18) for page in pages]
            stored = pages[0].dataoffsets[0]
            return [(0, 16), (stored, stored + 640), *tags]
    if kind == "parquet":
        return [(len(seed) - 6000, len(seed)), (0, 200)]
    return []


def _seeds(kind: str, folder: Path) -> list[bytes]:
    of_kind = {
        "sheet": sheets, "config": configs, "geojson": documents, "landmarks": landmark_files,
        "npz": arrays, "table": spreadsheets, "xlsx": workbooks, "release": releases,
    }  # fmt: skip
    if kind in of_kind:
        return of_kind[kind]()
    return {"parquet": parquet_files, "shard": shards, "tiff": slides}[kind](folder)


_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda items: (
        st.lists(items, max_size=4)
        | st.dictionaries(
            st.sampled_from(["type", "coordinates", "geometry", "features", "properties", "name"]),
            items | st.sampled_from(["Feature", "Polygon", "GeometryCollection", "Point"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)
"""JSON with the names of GeoJSON in other places."""


@pytest.mark.parametrize("kind", COUNTS)
def test_mutated_files_are_read_or_refused(kind: str, tmp_path: Path, child: Child) -> None:
    seeds = _seeds(kind, tmp_path)
    hot = [_hot(kind, seed) for seed in seeds]
    (tmp_path / "plain.csv").write_bytes(landmark_files()[1])
    count = max(BATCH, int(COUNTS[kind] * FRACTION))
    faults: dict[str, int] = {}
    outcomes: dict[str, int] = {}
    path = tmp_path / f"file{SUFFIXES.get(kind, '')}"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        found = child.answer(kind, path)
        outcomes[found["outcome"]] = outcomes.get(found["outcome"], 0) + 1
        if found["outcome"] in ("read", "refused") and found["seconds"] <= SECONDS_MAX:
            return
        cause = f"{found['outcome']} {found['place']} {found['seconds'] > SECONDS_MAX}"
        if cause not in faults:
            kept = ROOT / "build" / "fuzz" / f"{kind}-{hashlib.sha256(data).hexdigest()[:12]}"
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(data)
        faults[cause] = faults.get(cause, 0) + 1

    settings = hypothesis.settings(
        database=None,
        deadline=None,
        derandomize=True,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )

    @hypothesis.settings(settings, max_examples=-(-count // BATCH))
    @hypothesis.given(st.integers(0, 2**63))
    def edited(start: int) -> None:
        random = Random(start)
        for _ in range(BATCH):
            number, changes = random.randrange(len(seeds)), edits(random)
            if kind == "shard":
                members = [
                    (512, 700, hashlib.sha256(bytes(700)).hexdigest()),
                    (1536 + 512, 701, ""),
                ]
                if random.random() < 0.5:
                    members += [(place - 512, value * 16, "") for _, place, value in changes]
                path.with_suffix(".json").write_text(json.dumps(members))
            if kind == "config" and random.random() < 0.5:
                check(odd_config(random))
            elif kind == "xlsx" and random.random() < 0.9:
                check(within(seeds[number], changes, random))
            else:
                check(mutated(seeds[number], changes, hot[number]))

    edited()
    if kind == "geojson":

        @hypothesis.settings(settings, max_examples=count // 10)
        @hypothesis.given(_JSON)
        def generated(document: Any) -> None:
            check(json.dumps(document).encode())

        generated()
    assert faults == {}
    # Mutations that no reader accepts, or every one, would test little.
    assert set(outcomes) == {"read", "refused"}
