"""Stage mask on a drawn unit of two pairs: what it writes, and what it refuses."""

import hashlib
import json
import math
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from hemera import tables
from hemera.config import MaskOptions
from hemera.dataset import excluded, shards
from hemera.errors import EngineError, ShardError, TableError
from hemera.imaging import codecs
from hemera.masks import label_format as labels
from hemera.masks.stain import Options, stains
from hemera.masks.stain.engine import StainEngine
from hemera.stages import mask
from tests.small_cells import segment
from tests.small_tables import stored, tile_row

OPTIONS = MaskOptions(engines={"stain": {}})
MPP = 0.5

GOLDEN = {13: "a8778292d714ac2c6521da8774561441628072eb43c77376c1932da349ed0471"}


# As the table of tiles has it; a little off what the tiles show, so that its origin is tested.
BACKGROUNDS = {"a": (182, 180, 180), "b": (250, 250, 250)}


def draw(seed: int, background: int, brown: float) -> npt.NDArray[np.uint8]:
    """Return a tile of 120 x 160 px with a few cells, half of them with a brown membrane."""
    rng = np.random.default_rng(seed)
    blue, dab = np.zeros((120, 160)), np.zeros((120, 160))
    y, x = np.mgrid[:120, :160]
    for k, (cy, cx) in enumerate((r, c) for r in (25, 70) for c in (25, 75, 125)):
        radius = np.hypot(y - cy - rng.integers(-4, 5), x - cx - rng.integers(-4, 5))
        blue += 0.5 * (radius < 8)
        dab += brown * ((radius > 9) & (radius < 14)) * (k % 2)
    vectors = np.array([stains.HAEMATOXYLIN, stains.DAB])
    density = np.stack([blue, dab], axis=-1) @ vectors
    density = cv2.GaussianBlur(density, (0, 0), 0.8)
    return (background * 10**-density).round().astype(np.uint8)


def write_unit(
    folder: Path,
    tiles: list[tuple[str, str, bytes]],
    mpp: float = MPP,
    artefacts: Mapping[str, bytes] = MappingProxyType({}),
) -> tuple[Path, Path]:
    """Write tile table and shard of (tile, pair, HER2 bytes); H&E is a grey tile."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    shard = folder / "unit.tar"
    he = codecs.encode(np.full((120, 160, 3), 200, np.uint8))
    with shards.ShardWriter(shard) as writer:
        for name, pair, her2 in tiles:
            places = stored(writer, "he_", f"{name}.he.jpg", he)
            places |= stored(writer, "her2_", f"{name}.her2.jpg", her2)
            glass = BACKGROUNDS.get(pair, (250, 250, 250))
            places |= {"tile": name, "shard": "tile/unit.tar", "her2_background": list(glass)}
            places["artefacts"] = artefacts.get(name)
            rows.append(tile_row(pair, 0, mpp=mpp, **places))
    table = folder / "unit.parquet"
    tables.write(table, rows, tables.TILE)
    return table, shard


TILES = [
    ("b_000000_000000", "b", draw(1, 250, 0.6)),
    ("a_000000_000160", "a", draw(2, 180, 0.3)),
    ("b_000160_000000", "b", draw(3, 250, 0.6)),
    ("a_000000_000000", "a", np.full((120, 160, 3), 180, np.uint8)),
]


@pytest.fixture
def unit(tmp_path: Path) -> tuple[Path, Path]:
    return write_unit(tmp_path / "tile", [(n, p, codecs.encode(rgb, "png")) for n, p, rgb in TILES])


def run(unit: tuple[Path, Path], folder: Path, options: MaskOptions = OPTIONS) -> Path:
    folder.mkdir(exist_ok=True)
    mask.run(
        tiles=unit[0],
        tile_shard=unit[1],
        shard=folder / "unit.tar",
        masks=folder / "unit.parquet",
        cells=folder / "unit.cells.parquet",
        options=options,
    )
    return folder


def test_rows_members_and_cells_say_the_same(unit: tuple[Path, Path], tmp_path: Path) -> None:
    folder = run(unit, tmp_path / "mask")
    rows = tables.read(folder / "unit.parquet", tables.MASK).to_pylist()
    cells = tables.read(folder / "unit.cells.parquet", tables.CELLS).to_pandas()
    assert [(row["tile"], row["pair"], row["engine"]) for row in rows] == [
        (name, pair, "stain") for name, pair, _ in TILES
    ]
    with tarfile.open(folder / "unit.tar") as archive:
        assert archive.getnames() == [f"{name}.stain.png" for name, _, _ in TILES]
        members = [archive.extractfile(info).read() for info in archive.getmembers()]
    for row, member, (name, _, rgb) in zip(rows, members, TILES, strict=True):
        assert row["shard"] == "mask/unit.tar"
        data = shards.read_member(folder / "unit.tar", row["offset"], row["length"])
        assert data == member
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        assert image.shape == rgb.shape[:2]
        assert image.dtype == np.uint8
        pixels = image.size
        assert row["nucleus_fraction"] == pytest.approx((image & 4 > 0).sum() / pixels)
        for level, column in enumerate(("weak", "moderate", "strong"), start=1):
            assert row[f"{column}_fraction"] == pytest.approx((image >> 3 == level).sum() / pixels)
        assert row["excluded_fraction"] == 0
        assert row["agreement_dice"] is None, "one engine ran"
        assert row["positive_fraction"] == pytest.approx(labels.positive(image).sum() / pixels)
        own = cells[cells.tile == name]
        assert row["cells"] == len(own)
        assert list(own.cell) == list(range(1, len(own) + 1))
        assert row["positive_cells"] == own.positive.sum()
        assert row["strong_cells"] == (own.intensity == 3).sum()
        assert own.area_px.sum() == (image & 4 > 0).sum()


def test_what_was_drawn_is_found(unit: tuple[Path, Path], tmp_path: Path) -> None:
    rows = tables.read(run(unit, tmp_path / "mask") / "unit.parquet", tables.MASK).to_pylist()
    assert [row["cells"] for row in rows] == [6, 6, 6, 0]
    assert [row["positive_cells"] for row in rows] == [3, 3, 3, 0]
    assert [row["strong_cells"] for row in rows] == [3, 0, 3, 0]
    assert [row["moderate_cells"] for row in rows] == [0, 3, 0, 0]


def test_stains_are_those_of_the_pair_not_of_the_tile(
    unit: tuple[Path, Path], tmp_path: Path
) -> None:
    """One tile of pair a is empty; the background is that of the table of tiles."""
    folder = run(unit, tmp_path / "mask")
    row = tables.read(folder / "unit.parquet", tables.MASK).to_pylist()[1]
    image = codecs.decode_mask(
        shards.read_member(folder / "unit.tar", row["offset"], row["length"])
    )
    own = stains.estimate([TILES[1][2], TILES[3][2]], MPP, BACKGROUNDS["a"])
    np.testing.assert_array_equal(image, segment(TILES[1][2], MPP, own).mask)


def test_pixels_that_the_table_of_tiles_excludes_are_bit_5_and_their_cells_are_left_out(
    unit: tuple[Path, Path], tmp_path: Path
) -> None:
    """Pen on H&E over the left half of a tile, and no HER2 on the right."""
    table, shard = unit
    pen = np.zeros((30, 40), np.uint8)
    pen[:, :16] = 1
    covered = np.ones((120, 160), np.bool_)
    covered[:, 140:] = False
    rows = tables.read(table, tables.TILE).to_pylist()
    rows[0]["artefacts"] = excluded.pack(pen, None, (None, covered), (120, 160), MPP)
    changed = tmp_path / "changed.parquet"
    tables.write(changed, rows, tables.TILE)
    plain, found = (
        run(given, tmp_path / name) for name, given in (("a", unit), ("b", (changed, shard)))
    )
    before, after = (
        tables.read(folder / "unit.parquet", tables.MASK).to_pylist()[0]
        for folder in (plain, found)
    )
    first, second = (
        codecs.decode_mask(shards.read_member(folder / "unit.tar", row["offset"], row["length"]))
        for folder, row in ((plain, before), (found, after))
    )
    assert (second[:, :64] == 32).all()
    assert (second[:, 140:] == 32).all()
    # Where the border of HER2 cuts a cell, its contour is beside the cut.
    np.testing.assert_array_equal(second[:, 64:139], first[:, 64:139])
    assert after["excluded_fraction"] == pytest.approx((64 + 20) / 160)
    # Two of the three columns of cells are left.
    assert (before["cells"], after["cells"]) == (6, 4)


def test_artefacts_of_her2_in_the_table_of_tiles_reach_the_stains_and_the_cells(
    unit: tuple[Path, Path], tmp_path: Path
) -> None:
    """What is excluded is searched for in stage tile alone: a strip that no rule would find."""
    table, shard = unit
    rows = tables.read(table, tables.TILE).to_pylist()
    strip = np.zeros((30, 40), np.uint8)
    strip[:, 14:24] = 2
    rows[0]["artefacts"] = excluded.pack(None, strip, (None, None), (120, 160), MPP)
    tables.write(table, rows, tables.TILE)
    found = tables.read(run((table, shard), tmp_path / "mask") / "unit.parquet", tables.MASK)
    where = np.zeros((120, 160), np.bool_)
    where[:, 56:96] = True
    tiles = [TILES[0][2], TILES[2][2]]
    own = stains.estimate(tiles, MPP, BACKGROUNDS["b"], [where, None])
    assert own.nuclear_density != stains.estimate(tiles, MPP, BACKGROUNDS["b"]).nuclear_density
    engine = StainEngine(Options(), OPTIONS)
    for at, (rgb, without) in ((0, (tiles[0], where)), (2, (tiles[1], None))):
        row = found.to_pylist()[at]
        image = codecs.decode_mask(
            shards.read_member(tmp_path / "mask/unit.tar", row["offset"], row["length"])
        )
        labelled = engine.segment(rgb, MPP, own, without)
        assert row["cells"] == len(labelled.cells) == (4 if without is not None else 6)
        shown = np.ones(image.shape, np.bool_) if without is None else ~without
        np.testing.assert_array_equal(image[shown], labelled.mask[shown])
        assert (image[~shown] == 32).all()


def test_an_empty_unit_writes_empty_outputs(tmp_path: Path) -> None:
    # the default options, with an engine whose model is not there: nothing requires it
    folder = run(write_unit(tmp_path / "tile", []), tmp_path / "mask", MaskOptions())
    assert tables.read(folder / "unit.parquet", tables.MASK).num_rows == 0
    assert tables.read(folder / "unit.cells.parquet", tables.CELLS).num_rows == 0
    with tarfile.open(folder / "unit.tar") as archive:
        assert archive.getnames() == []


def test_deepliif_without_a_model_is_an_error(unit: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"^mask\.engines\.deepliif\.model: not given; "):
        run(unit, tmp_path / "mask", MaskOptions())
    assert not list((tmp_path / "mask").iterdir())


def test_a_tile_that_is_no_image_is_named(tmp_path: Path) -> None:
    good = codecs.encode(TILES[0][2], "png")
    unit = write_unit(tmp_path / "tile", [("good", "a", good), ("bad", "a", b"\xff\xd8\xff no")])
    with pytest.raises(ShardError, match=r"unit\.tar: bad\.her2 cannot be decoded; .*stage tile"):
        run(unit, tmp_path / "mask")
    assert not list((tmp_path / "mask").iterdir())


def test_a_truncated_shard_and_a_foreign_table_are_errors(
    unit: tuple[Path, Path], tmp_path: Path
) -> None:
    data = unit[1].read_bytes()
    unit[1].write_bytes(data[: len(data) // 2])
    with pytest.raises(ShardError, match=r"unit\.tar"):
        run(unit, tmp_path / "mask")
    tables.write(unit[0], [], tables.HISTORY)
    with pytest.raises(TableError, match="no columns"):
        run(unit, tmp_path / "mask")


def test_only_stain_needs_no_torch(unit: tuple[Path, Path], tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from hemera.stages import mask;"
        "from hemera.config import MaskOptions; t, s, o = map(Path, sys.argv[1:]);"
        "mask.run(tiles=t, tile_shard=s, shard=o / 'm.tar', masks=o / 'm.parquet',"
        " cells=o / 'c.parquet', options=MaskOptions(engines={'stain': {}}));"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, *unit, tmp_path], check=True)


def golden_tile(seed: int, pen: bool) -> npt.NDArray[np.uint8]:
    """Return 220 x 300 px: cells on the left, brown stroma in the middle, pen or background."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:220, :300].astype(float)
    blue, brown = np.zeros(y.shape), np.zeros(y.shape)
    for cy, cx, strength in zip(
        rng.uniform(10, 210, 40), rng.uniform(10, 120, 40), [0.1, 0.2, 0.6, 0.0] * 10, strict=True
    ):
        radius = np.hypot(y - cy, x - cx)
        blue = np.maximum(blue, 0.5 * (radius < 7))
        brown = np.maximum(brown, strength * ((radius > 8) & (radius < 11)))
    brown += 0.05 * (x < 210)
    density = np.stack([blue, brown], axis=-1) @ np.array([stains.HAEMATOXYLIN, stains.DAB])
    density = cv2.GaussianBlur(density, (0, 0), 0.8)
    if pen:
        density += (x > 235)[..., None] * np.array([0.1, 0.7, 0.55])
    noise = rng.normal(0, 1.5, density.shape)
    return (238 * 10**-density + noise).round().clip(0, 255).astype(np.uint8)


def golden_digest(folder: Path) -> str:
    """Return the digest of shard, masks and cells of two units: 0.5 and 0.3 um/px."""
    digest = hashlib.sha256()
    for mpp in (0.5, 0.3):
        tiles = [
            (f"{pair}_{k}", pair, codecs.encode(golden_tile(7 * k + len(pair), k == 1), "png"))
            for pair in ("a", "bb")
            for k in range(4 if pair == "a" else 1)
        ]
        pen = np.zeros((round(220 * mpp / 2), round(300 * mpp / 2)), np.uint8)
        pen[:, round(233 * mpp / 2) :] = 1
        packed = excluded.pack(None, pen, (None, None), (220, 300), mpp)
        assert packed is not None
        unit = write_unit(folder / f"tile{mpp}", tiles, mpp, {"a_1": packed})
        made = run(unit, folder / f"mask{mpp}")
        digest.update((made / "unit.tar").read_bytes())
        for name, schema in (("unit.parquet", tables.MASK), ("unit.cells.parquet", tables.CELLS)):
            for row in tables.read(made / name, schema).to_pylist():
                plain = {
                    key: f"{value:.5g}"
                    if isinstance(value, float) and math.isfinite(value)
                    else value
                    for key, value in row.items()
                }
                digest.update(json.dumps(plain).encode())
    return digest.hexdigest()


def test_golden(tmp_path: Path) -> None:
    """Fails when the outputs change: then raise `MaskOptions.version` and add its digest."""
    assert golden_digest(tmp_path) == GOLDEN[MaskOptions.version]
