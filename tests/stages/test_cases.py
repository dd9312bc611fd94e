"""Stage cases: labels and tiles from the tables of describe and tile."""

import json
from pathlib import Path

import pytest

from hemera import tables
from hemera.__main__ import main
from hemera.config import CasesOptions, FilterOptions
from hemera.errors import LeakageError
from hemera.files import layout
from hemera.stages import cases
from tests.command_line import words
from tests.small_sheets import write_sheet
from tests.small_tables import digest, tile_row

GOLDEN = {2: "dfe77173c12d0d51"}
SCORES = ("0", "1+", "2+", "3+")


class Made:
    """A sheet of 12 slides of H&E alone with six tiles each, and what the stage makes of it."""

    def __init__(self, folder: Path, changed=None, digests=None) -> None:
        self.folder, self.results = folder, folder / "results"
        rows = [
            {"pair": f"s{k}", "case": f"c{k}", "dataset": "d", "he": f"{k}.svs",
             "score": SCORES[k % 4], "site": "ab"[k % 2]}
            for k in range(12)
        ]  # fmt: skip
        self.sheet = write_sheet(folder, rows)
        for row in rows:
            self._write(row["pair"], changed or {}, (digests or {}).get(row["pair"]))
        self.paths = {
            "cases": self.results / "cases/cases.parquet",
            "case_tiles": self.results / "cases/tiles.parquet",
        }

    def _write(self, pair: str, changed: dict, image: str | None) -> None:
        described = dict.fromkeys(tables.DESCRIBE.names)
        described |= {"pair": pair, "stain": "he", "file": f"{pair}.svs", "verdict": "accept",
                      "digest": image or digest(pair)}  # fmt: skip
        path = layout.path(layout.IMAGES_TABLE, self.results, unit=pair)
        tables.write(path, [described], tables.DESCRIBE)
        rows = [tile_row(pair, number, **changed.get((pair, number), {})) for number in range(6)]
        for row in rows:
            row |= {name: None for name in row if name.startswith(("her2_", "registration_"))}
        tables.write(layout.path(layout.TILES, self.results, unit=pair), rows, tables.TILE)

    def run(self, **options):
        cases.run(sheet=self.sheet, block_count=1, results=self.results, **self.paths,
                  options=CasesOptions(**options))  # fmt: skip
        read = {"cases": tables.STATUS_CASES, "case_tiles": tables.STATUS_TILES}
        return [tables.read(path, read[name]).to_pylist() for name, path in self.paths.items()]


def test_cases_have_labels_folds_and_tiles(tmp_path):
    changed = {
        ("s3", 0): {"he_sharpness": 3.0},
        ("s3", 1): {"he_pen_fraction": 0.4},
        ("s5", 2): {"tissue_fraction": 0.1},
    }
    rows, tiles = Made(tmp_path, changed).run(folds=3)
    states = {row["case"]: row["state"] for row in rows}
    assert [name for name, state in states.items() if state != "used"] == ["c10", "c2", "c6"]
    assert {row["case"]: row["he_tiles"] for row in rows}["c3"] == 4
    refused = {row["tile"]: row["reason"] for row in tiles if not row["accepted"]}
    assert list(refused.values()) == ["blurred_he", "pen", "low_tissue"]
    assert len(tiles) == 72 and {row["unit"] for row in tiles} == {f"s{k}" for k in range(12)}
    assert sorted({row["fold"] for row in rows}) == [0, 1, 2]


def test_the_limits_of_tiles_are_those_of_filter():
    own, filtering = CasesOptions(), FilterOptions()
    shared = set(type(own).model_fields) & set(type(filtering).model_fields)
    assert len(shared) == 8
    assert {name: getattr(own, name) for name in shared} == {
        name: getattr(filtering, name) for name in shared
    }


def test_one_slide_under_two_names_is_a_leak(tmp_path):
    made = Made(tmp_path, digests={"s1": digest("same"), "s6": digest("same")})
    with pytest.raises(LeakageError, match=r"s6\.svs of case c6 is the image s1\.svs of case c1"):
        made.run()


def test_one_tile_of_two_cases_is_a_leak(tmp_path):
    same = {"he_sha256": digest("same")}
    made = Made(tmp_path, {("s1", 0): same, ("s6", 3): same})
    with pytest.raises(LeakageError, match="of case c6 is the image s1_"):
        made.run()


def test_units_without_tiles_are_a_state(tmp_path):
    made = Made(tmp_path)
    tables.write(layout.path(layout.TILES, made.results, unit="s4"), [], tables.TILE)
    rows, _ = made.run()
    assert {row["case"]: row["state"] for row in rows}["c4"] == "no_tiles"


def test_the_command_line_gives_the_same_bytes_and_golden(tmp_path):
    made = Made(tmp_path)
    rows, tiles = made.run(folds=3)
    before = [path.read_bytes() for path in made.paths.values()]
    given = {"sheet": made.sheet, "block_count": 1, "results": made.results, **made.paths}
    assert main(["cases", *words(given), "--folds", "3"]) == 0
    assert [path.read_bytes() for path in made.paths.values()] == before
    assert digest(json.dumps([rows, tiles]))[:16] == GOLDEN[CasesOptions.version], (
        "the output of cases changed: raise CasesOptions.version and add the digest"
    )
