"""A pair of slides with all results that exports read."""

import json
import shutil

import pytest
import shapely
import shapely.geometry

from hemera import config, tables
from hemera.stages import filter, mask
from tests.small_sheets import write_certificate
from tests.small_units import whole_slides


@pytest.fixture
def study(slides):
    """A pair of slides up to filter, with a region of interest in its sheet."""
    region = shapely.geometry.mapping(shapely.box(0, 0, 690, 500))
    (slides / "roi.geojson").write_text(json.dumps(region))
    unit = whole_slides(slides, roi="roi.geojson")
    unit.tile()
    results, labels = unit.results, unit.results / "mask" / "case1.tar"
    mask.run(
        tiles=unit.shard.with_suffix(".parquet"), tile_shard=unit.shard, shard=labels,
        masks=labels.with_suffix(".parquet"), cells=labels.with_suffix(".cells.parquet"),
        options=config.MaskOptions(engines={"stain": {}}),
    )  # fmt: skip
    filtered = results / "filter" / "tiles.parquet"
    filter.run(
        sheet=unit.sheet, block_count=1, results=results, engines=("stain",), tiles=filtered,
        options=config.FilterOptions(),
    )  # fmt: skip
    rows = tables.read(filtered, tables.filtered(("stain",))).to_pylist()
    for number, row in enumerate(rows):
        reason = ("folded", None, "low_tissue")[number % 3]
        row |= {"accepted": reason is None, "reason": reason}
    tables.write(filtered, rows, tables.filtered(("stain",)))
    (results / "register").mkdir()
    shutil.copy(slides / "d.npz", results / "register" / "case1.displacement.npz")
    write_certificate(results / "register" / "case1.parquet", "case1", "pass")
    settings = f"preset: hemera\nsheet: {unit.sheet}\nindex:\n  target: stain\n"
    (slides / "config.yaml").write_text(settings + "mask:\n  engines:\n    stain: {}\n")
    return unit
