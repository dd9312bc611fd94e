"""Stage filter: every tile kept as a row; the criteria are tested where they are applied."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from hemera import tables
from hemera.__main__ import main
from hemera.config import FilterOptions, MaskOptions, TileOptions
from hemera.config.base import flags
from hemera.errors import TableError
from hemera.sheet import read_sheet, units, write_rows
from hemera.stages import filter
from tests.command_line import words
from tests.small_tables import digest, tile_row

GOLDEN = {5: "915271cc2abf0dd0"}
ENGINES = ("stain", "deepliif")
BLOCKS = 2


def tile(pair: str, number: int, **values: Any) -> dict[str, Any]:
    return tile_row(pair, number, y_px=1024, **values)


def mask(row: Mapping[str, Any], engine: str, number: int) -> dict[str, Any]:
    return {
        "tile": row["tile"],
        "pair": row["pair"],
        "engine": engine,
        **{
            name: 3 + number if name.endswith("cells") else 0.25 + number / 64
            for name in tables.MASK_STATISTICS
        },
        "note": None,
        "shard": f"mask/{row['pair']}.tar",
        "offset": 512 * (1 + number),
        "length": 77,
        "sha256": digest(f"{engine} {row['tile']}"),
    }


class Cohort:
    """The tables that tile and mask leave for a few pairs."""

    def __init__(self, folder: Path, pairs: Mapping[str, Mapping[str, str]]) -> None:
        """Write a sheet with one row for each of `pairs`, given the cells that matter."""
        self.folder = folder
        self.sheet = folder / "pairs.tsv"
        rows = []
        for name, cells in pairs.items():
            slide = cells.get("dataset", "bci") != "bci"
            ending = "tif" if slide else "png"
            rows.append({
                "pair": name, "case": name, "dataset": "bci",
                "he": f"HE/{name}.{ending}", "her2": f"IHC/{name}.{ending}",
                "registered": "" if slide else "true", **cells,
            })  # fmt: skip
        self.sheet.write_text(write_rows(rows))
        self.units = {
            unit: [pair.pair for pair in members]
            for unit, members in units(read_sheet(self.sheet), BLOCKS).items()
        }

    def write(
        self, rows: list[dict[str, Any]], registrations: Mapping[str, str] | None = None
    ) -> None:
        """Write the tables of all units; tiles in the order given."""
        for unit, members in self.units.items():
            own = [row for row in rows if row["pair"] in members]
            pairs = [
                {
                    **dict.fromkeys(tables.PAIRS.names, 9), "pair": name, "reason": None,
                    "state": "tiled" if any(row["pair"] == name for row in own) else "no_tissue",
                    "registration": (registrations or {}).get(name, "registered"),
                }
                for name in members
            ]  # fmt: skip
            masks = [
                mask(row, engine, number)
                for number, row in enumerate(own)
                for engine in reversed(ENGINES)
            ]
            provenance = [tables.provenance(options()) for options in (TileOptions, MaskOptions)]
            tile, mask_table = (self.folder / kind / f"{unit}.parquet" for kind in ("tile", "mask"))
            tables.write(tile, own, tables.TILE, provenance[0])
            tables.write(tile.with_suffix(".pairs.parquet"), pairs, tables.PAIRS)
            tables.write(mask_table, masks, tables.MASK, provenance[1])

    def paths(self, engines: tuple[str, ...], out: Path) -> dict[str, Any]:
        """Return the arguments of the stage but its options."""
        outputs = {"tiles": out / "tiles.parquet"}
        inputs = {"sheet": self.sheet, "block_count": BLOCKS, "results": self.folder}
        return inputs | {"engines": engines} | outputs

    def run(
        self, options: FilterOptions | None = None, engines: tuple[str, ...] = ENGINES
    ) -> pa.Table:
        """Run the stage and return the table of all tiles."""
        paths = self.paths(engines, self.folder / "filter")
        filter.run(**paths, options=options or FilterOptions())
        return tables.read(self.tiles, tables.filtered(engines))

    @property
    def tiles(self) -> Path:
        return self.folder / "filter" / "tiles.parquet"


def wide(folder: Path) -> Cohort:
    """Two whole slides, a free block pair and an empty one, tiles out of order."""
    cohort = Cohort(
        folder,
        {
            "slide1": {"dataset": "acrobat"},
            "slide2": {"dataset": "acrobat"},
            "b1": {"score": "3+"},
            "b2": {"score": "3+"},
            "b3": {"score": "0"},
            "b4": {"score": "1+"},
        },
    )
    rows = [
        tile("slide1", 2),
        tile("slide1", 0, tissue_fraction=0.25),
        tile("slide1", 1, tissue_fraction=0.25, he_sharpness=1.0),
        tile("slide2", 0),
        tile("b1", 0),
        tile("b1", 1, he_sharpness=12.0),
        tile("b2", 0, her2_sharpness=1.0),
        tile("b2", 1, he_sharpness=2.0),
        tile("b3", 0, histogram_similarity=None),
    ]
    cohort.write(rows, {"slide1": "pass", "slide2": "review"})
    return cohort


def test_no_row_is_dropped_and_no_value_changed(tmp_path: Path) -> None:
    cohort = wide(tmp_path)
    table = cohort.run()
    assert table["tile"].to_pylist() == sorted(table["tile"].to_pylist())
    given = {}
    for unit in cohort.units:
        for row in tables.read(tmp_path / "tile" / f"{unit}.parquet", tables.TILE).to_pylist():
            given[row["tile"]] = row
    found = {row["tile"]: row for row in table.to_pylist()}
    assert len(found) == table.num_rows == 9
    for name, row in given.items():
        assert {key: found[name][key] for key in row} == row
    for unit in cohort.units:
        for row in tables.read(tmp_path / "mask" / f"{unit}.parquet", tables.MASK).to_pylist():
            for name in tables.MASK_COLUMNS:
                assert found[row["tile"]][f"{row['engine']}_{name}"] == row[name]
    assert {found[name]["score"] for name in found if name.startswith("b1")} == {"3+"}
    assert all(row["accepted"] == (row["reason"] is None) for row in found.values())


def test_the_engines_asked_for_go_along_in_their_order(tmp_path: Path) -> None:
    cohort = wide(tmp_path)
    one = cohort.run(engines=("stain",))
    assert not [name for name in one.column_names if name.startswith("deepliif")]
    both = cohort.run(engines=("deepliif", "stain"))
    names = both.column_names
    assert names.index("deepliif_cells") < names.index("stain_cells")
    with pytest.raises(TableError) as error:
        cohort.run(engines=("stain", "other"))
    assert "0 masks of other beside" in str(error.value)
    assert "run stage mask again" in str(error.value)


def test_zero_tiles_are_an_empty_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cohort = Cohort(tmp_path, {"p": {}, "slide": {"dataset": "acrobat"}})
    cohort.write([])
    assert cohort.run().num_rows == 0
    assert "no tile is accepted" in caplog.text


def test_masks_of_other_tiles(tmp_path: Path) -> None:
    cohort = Cohort(tmp_path, {"p": {}})
    rows = [tile("p", 0), tile("p", 1)]
    cohort.write(rows)
    (unit,) = cohort.units
    path = tmp_path / "mask" / f"{unit}.parquet"
    good = tables.read(path, tables.MASK)
    order = [2, 3, 0, 1]
    for wrong in (
        good.slice(0, 2),
        good.slice(0, 0),
        good.take(order),
        pa.concat_tables([good] * 2),
    ):
        tables.write(path, wrong, tables.MASK)
        cohort.tiles.unlink(missing_ok=True)
        with pytest.raises(TableError, match=f"{unit}: .*run stage mask again"):
            cohort.run()
        assert not cohort.tiles.exists()


def test_the_options_of_three_stages_are_kept(tmp_path: Path) -> None:
    cohort = wide(tmp_path)
    cohort.run(FilterOptions(he_sharpness_min=31.0))
    kept = {key: json.loads(value) for key, value in tables.read_metadata(cohort.tiles).items()}
    assert set(kept) == {"options", "options_tile", "options_mask"}
    assert kept["options"]["he_sharpness_min"] == 31.0
    assert kept["options_tile"]["size_px"] == 512
    assert list(kept["options_mask"]["engines"]) == ["deepliif", "stain"]


def test_golden(tmp_path: Path) -> None:
    """Fails when what filter adds changes and `FilterOptions.version` does not: raise it then."""
    digests = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        cohort = wide(tmp_path / name)
        added = cohort.run().select(
            ["tile", "dataset", "score", "registration", "accepted", "reason"]
        )
        content = added.to_pylist()
        digests.append(digest(json.dumps(content))[:16])
        if name == "two":
            assert cohort.tiles.read_bytes() == (tmp_path / "one/filter/tiles.parquet").read_bytes()
    assert set(digests) == {GOLDEN[FilterOptions.version]}, digests


def test_the_command_line_gives_the_same_bytes(tmp_path: Path) -> None:
    cohort = wide(tmp_path)
    options = FilterOptions(he_sharpness_min=12.0, accept_review=True, histogram_datasets=())
    cohort.run(options)
    given = words(cohort.paths(ENGINES, tmp_path / "cli"))
    assert main(["filter", *given, *flags(options)]) == 0
    assert (tmp_path / "cli/tiles.parquet").read_bytes() == cohort.tiles.read_bytes()
