"""A third engine, of which only its module and one dictionary entry exist: mask, filter, index."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest

from hemera import masks, tables
from hemera.__main__ import main
from hemera.commands import doctor
from hemera.config import FilterOptions, IndexOptions, MaskOptions, load
from hemera.config.base import Count, Options, flags
from hemera.dataset import shards
from hemera.imaging import codecs
from hemera.imaging.color import Color
from hemera.masks import label_format
from hemera.masks.engine import Resources
from hemera.sheet import read_sheet, units, write_rows
from hemera.stages import filter, index, mask
from tests.command_line import words
from tests.small_cells import RGB, draw
from tests.small_tables import stored, tile_row

Mask = npt.NDArray[np.bool_]


class ToyOptions(Options):
    """Options of the toy."""

    section: ClassVar[str] = "mask.engines.toy"

    side_px: Count = 9
    """Side of its only cell, px."""


class Toy:
    """One positive square cell in the middle of every tile, of the class of the pair's tiles."""

    versions: ClassVar[dict[str, str]] = {"toy": "1"}

    def __init__(self, options: ToyOptions) -> None:
        self.side_px = options.side_px

    def prepare(
        self,
        tiles: Sequence[RGB],
        mpp: float,
        background: Color | None = None,
        excluded: Sequence[Mask | None] = (),
    ) -> int:
        return len(tiles)

    def segment(
        self, rgb: RGB, mpp: float, state: int, excluded: Mask | None = None
    ) -> label_format.Labelled:
        classes = np.zeros(rgb.shape[:2], np.uint8)
        y, x = (length // 2 for length in classes.shape)
        classes[y : y + self.side_px, x : x + self.side_px] = label_format.POSITIVE
        one = np.ones(1, np.float32)
        area_px = np.array([self.side_px**2], np.int32)
        cells = label_format.Cells(
            x * one, y * one, area_px, np.array([True]), np.array([state], np.uint8), *[one] * 4
        )
        return label_format.Labelled(label_format.pack(classes, classes > 0, classes), cells)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("toy_engine")
    module.Options, module.LICENCE, module.PACKAGES = ToyOptions, "masks by a toy: any use", ()
    module.requirements = lambda options: []
    module.versions = lambda options: {}
    module.resources = lambda options: Resources(memory_mb=9000, gpu=True)
    module.load = lambda options, shared: Toy(options)
    monkeypatch.setitem(sys.modules, "toy_engine", module)
    monkeypatch.setitem(masks.ENGINES, "toy", "toy_engine")
    # A second one, so that three run without the weights of DeepLIIF.
    monkeypatch.setitem(masks.ENGINES, "deepliif", "toy_engine")


ENGINES: dict[str, Any] = {"stain": {}, "toy": {"side_px": 7}, "deepliif": None}
NAMES = ("deepliif", "stain", "toy")


@pytest.mark.usefixtures("toy")
def test_three_engines_from_the_configuration_to_the_index(tmp_path: Path) -> None:
    config = load({"mask": {"engines": ENGINES}, "filter": {"require_agreement": 0.9}})
    options, filters = config.stages["mask"], config.stages["filter"]
    assert isinstance(options, MaskOptions)
    assert isinstance(filters, FilterOptions)
    assert tuple(options.engines) == NAMES
    assert options.resources() == {"memory_mb": 9000, "threads": 1, "gpu": 1}
    found = [line for _, line in doctor.facts(config) if line.startswith("mask engine")]
    assert found == ["mask engine deepliif", "mask engine stain", "mask engine toy"]

    pair = {"pair": "p", "case": "p", "dataset": "bci", "he": "a.png", "her2": "b.png"}
    sheet = tmp_path / "pairs.tsv"
    sheet.write_text(write_rows([{**pair, "registered": "true"}]))
    (unit,) = units(read_sheet(sheet), 1)
    rows = write_unit(tmp_path, unit)
    paths = {
        "tiles": tmp_path / f"tile/{unit}.parquet",
        "tile_shard": tmp_path / "tile/p.tar",
        "shard": tmp_path / f"mask/{unit}.tar",
        "masks": tmp_path / f"mask/{unit}.parquet",
        "cells": tmp_path / f"mask/{unit}.cells.parquet",
    }
    mask.run(**paths, options=options)
    first = paths["masks"].read_bytes()
    assert main(["mask", *words(paths), *flags(options)]) == 0
    assert paths["masks"].read_bytes() == first, "command line and library"

    table = tables.read(paths["masks"], tables.MASK).to_pylist()
    assert [(row["tile"], row["engine"]) for row in table] == [
        (row["tile"], name) for row in rows for name in NAMES
    ]
    assert tables.read_metadata(paths["masks"])["toy"] == "1"
    by_name = {row["engine"]: row for row in table[:3]}
    # Two squares of 9 and 7 px overlap by 49 px; what stain finds is elsewhere.
    assert by_name["stain"]["agreement_dice"] < 2 * 49 / (81 + 49)
    assert by_name["toy"]["agreement_dice"] == by_name["stain"]["agreement_dice"]

    common = {"sheet": sheet, "engines": NAMES}
    tiles = tmp_path / "filter/tiles.parquet"
    filter.run(**common, results=tmp_path, block_count=1, tiles=tiles, options=filters)
    assert set(tables.read(tiles, tables.filtered(NAMES))["reason"].to_pylist()) == {
        "disputed_mask"
    }
    results = {"index": tmp_path / "index.parquet", "card": tmp_path / "card.md"}
    index.run(**common, tiles=tiles, **results, options=IndexOptions(target="toy"))
    metadata = tables.read_metadata(results["index"])
    assert json.loads(metadata["mask_engines"]) == list(NAMES)
    assert "masks by a toy: any use" in metadata["licences"]
    assert "masks by a toy: any use" in results["card"].read_text()


def write_unit(folder: Path, unit: str) -> list[dict[str, Any]]:
    """Write the tables and the shard of two drawn tiles."""
    (folder / "tile").mkdir()
    (folder / "mask").mkdir()
    rows = []
    with shards.ShardWriter(folder / "tile/p.tar") as writer:
        for number in range(2):
            data = codecs.encode(draw(np.full((2, 3), 0.6)).rgb, "png")
            place = stored(writer, "her2_", f"p_{number}.her2.png", data)
            rows.append(tile_row("p", number, mpp=0.5, **place))
    tables.write(folder / f"tile/{unit}.parquet", rows, tables.TILE)
    pairs = [dict.fromkeys(tables.PAIRS.names, 2) | {"pair": "p", "state": "tiled"}]
    pairs[0] |= {"reason": None, "registration": "registered"}
    tables.write(folder / f"tile/{unit}.pairs.parquet", pairs, tables.PAIRS)
    return rows
