"""Files with planted identifiers: none of them is in an export."""

import itertools
import stat

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile

from hemera import config
from hemera.__main__ import main
from hemera.errors import ConfigError
from hemera.imaging.codecs import encode
from hemera.imaging.slide import open_slide
from hemera.interop import exports
from hemera.interop.anonymous import KEY_FILE, Names
from hemera.stages import filter, index, mask
from tests.interop.test_exports import content, stored
from tests.small_units import HER2_COLOURS, Unit, tissue

PLANTED = b"DOE^JANE"
PAIR, CASE = "Doe-Jane-HE7", "case-19610203"
IDENTIFIERS = (PLANTED, b"19610203", b"DOE_JANE", b"Doe-Jane")
SIDE, TILE = 512, 128


def planted_jpeg(rgb):
    """Return a JPEG file with the identifier in EXIF, a comment and bytes behind its end."""
    data = encode(rgb, quality=90)
    added = b""
    for code, text in ((0xE1, b"Exif\0\0" + PLANTED), (0xFE, PLANTED), (0xED, PLANTED)):
        added += bytes((0xFF, code)) + (len(text) + 2).to_bytes(2, "big") + text
    return data[:2] + added + data[2:] + PLANTED


def write_planted(path, rgb):
    """Write a slide: planted tags and tiles, a macro image in tiles, and a label in strips."""
    height, width = rgb.shape[:2]
    corners = itertools.product(range(0, height, TILE), range(0, width, TILE))
    jpegs = [planted_jpeg(rgb[y : y + TILE, x : x + TILE]) for y, x in corners]
    text = PLANTED.decode()
    with tifffile.TiffWriter(path) as writer:
        writer.write(
            iter(jpegs), shape=rgb.shape, dtype=np.uint8, tile=(TILE, TILE), photometric="ycbcr",
            compression="jpeg", subsampling=(1, 1), resolution=(2e4, 2e4),
            resolutionunit="CENTIMETER", description=text, software=text,
            extratags=[(315, "s", 0, text, True), (316, "s", 0, text, True)],
        )  # fmt: skip
        picture = np.tile(np.frombuffer(PLANTED, np.uint8), 3 * SIDE * SIDE // 32)
        macro = picture.reshape(SIDE // 2, SIDE // 2, 3)
        writer.write(
            macro, tile=(TILE, TILE), photometric="rgb", subfiletype=9,
            description="Aperio\nmacro 256x256",
        )  # fmt: skip
        writer.write(macro[:96], photometric="rgb", subfiletype=1, description="label 256x96")
    with tifffile.TiffFile(path) as file:
        return [(page.dataoffsets, page.databytecounts) for page in file.pages[1:]]


@pytest.fixture
def study(tmp_path, rng):
    """A pair of slides with planted identifiers, from its files to the index."""
    folder = tmp_path / "study"
    folder.mkdir()
    for stain, colours in (("HE", ((235, 190, 215), (95, 60, 140))), ("HER2", HER2_COLOURS)):
        write_planted(folder / f"DOE_JANE_{stain}.tif", tissue(rng, SIDE, SIDE, colours))
    row = {"pair": PAIR, "case": CASE, "he": "DOE_JANE_HE.tif", "her2": "DOE_JANE_HER2.tif"}
    unit = Unit(folder, [{**row, "registered": "true", "score": "2+"}], PAIR)
    assert len(unit.tile(codec="jpeg")) == 16
    results = unit.results
    labels = results / "mask" / f"{PAIR}.tar"
    tiles = unit.shard.with_suffix(".parquet")
    mask.run(
        tiles=tiles, tile_shard=unit.shard, shard=labels, masks=labels.with_suffix(".parquet"),
        cells=labels.with_suffix(".cells.parquet"),
        options=config.MaskOptions(engines={"stain": {}}),
    )  # fmt: skip
    loose = dict.fromkeys(("he_sharpness_min", "her2_sharpness_min", "nuclei_min_per_mm2"), 0.0)
    loose |= {"tissue_fraction_min": 0.0, "blur_max": 1.0, "registration_margin_min": -2.0}
    filtered = results / "filter" / "tiles.parquet"
    filter.run(
        sheet=unit.sheet, block_count=1, results=results, engines=("stain",), tiles=filtered,
        options=config.FilterOptions(**loose),
    )  # fmt: skip
    made, card = (results / "index" / name for name in ("index.parquet", "card.md"))
    index.run(
        sheet=unit.sheet, tiles=filtered, engines=("stain",), index=made, card=card,
        options=config.IndexOptions(target="stain"),
    )  # fmt: skip
    return made


def found_in(folder, texts):
    """Return which texts are in a name or the bytes of a file of a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    everything = b"\n".join(
        str(path.relative_to(folder)).encode() + b"\n" + path.read_bytes() for path in files
    )
    return [text for text in texts if text in everything]


@pytest.mark.parametrize("kind", ["webdataset", "huggingface", "aligned"])
def test_no_planted_identifier_is_in_an_anonymous_export(study, tmp_path, kind):
    # The identifiers are in the slides, and without the option the names are in the export.
    assert found_in(study.parents[2], IDENTIFIERS) == list(IDENTIFIERS)
    words = ["export", kind, "--index", str(study), "--where", f"case == '{CASE}'"]
    assert main([*words, str(tmp_path / "plain")]) == 0
    assert found_in(tmp_path / "plain", IDENTIFIERS) == [b"19610203", b"Doe-Jane"]
    assert main([*words, str(tmp_path / "out"), "--anonymous"]) == 0
    key = study.parents[2] / KEY_FILE
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    secret = key.read_text().strip()
    found = found_in(tmp_path / "out", [*IDENTIFIERS, secret.encode(), bytes.fromhex(secret)])
    assert not found
    assert "where a query is true" in (tmp_path / "out" / "README.md").read_text()
    # The key is kept, so that names are those of the first export.
    assert main([*words, str(tmp_path / "again"), "--anonymous"]) == 0
    assert content(tmp_path / "again") == content(tmp_path / "out")


def test_no_planted_identifier_is_in_an_anonymous_zarr_store(study, tmp_path):
    """It contains no case, and of a slide pixels alone."""
    folder = study.parents[2]
    settings = f"preset: hemera\nsheet: {folder / 'pairs.tsv'}\nindex:\n  target: stain\n"
    (folder / "config.yaml").write_text(settings + "mask:\n  engines:\n    stain: {}\n")
    words = ["export", "spatialdata", "--configfile", str(folder / "config.yaml")]
    words += ["--results", str(folder / "results")]
    assert main([*words, str(tmp_path / "plain")]) == 0
    assert found_in(tmp_path / "plain", IDENTIFIERS) == [b"Doe-Jane"]
    assert main([*words, str(tmp_path / "out"), "--anonymous"]) == 0
    texts = [*IDENTIFIERS, PAIR.encode(), str(folder).encode()]
    assert not found_in(tmp_path / "out", texts)
    # Without compression; no cell was found.
    (tiles,) = (tmp_path / "out").rglob("*.parquet")
    rows = str(pq.read_table(tiles).to_pylist())
    assert not [text for text in texts if text.decode() in rows]


def test_copied_tiles_have_no_metadata_and_the_same_pixels(study):
    (row, *_) = pq.read_table(study).to_pylist()
    jpeg = stored(study, row, "he")
    with tifffile.TiffFile(study.parents[2] / "DOE_JANE_HE.tif") as file:
        page = file.pages[0]
        number = row["y_px"] // TILE * (SIDE // TILE) + row["x_px"] // TILE
        start = page.dataoffsets[number]
        file.filehandle.seek(start)
        whole = file.filehandle.read(page.databytecounts[number])
    assert PLANTED in whole
    assert PLANTED not in jpeg
    scan = jpeg.index(b"\xff\xda")
    assert whole.removesuffix(PLANTED).endswith(jpeg[scan:])


def test_label_and_macro_images_are_not_read(tmp_path, rng):
    """The macro image has the proportions of a level; both are lost in the second file."""
    rgb = tissue(rng, SIDE, SIDE)
    for name in ("whole.tif", "lost.tif"):
        places = write_planted(tmp_path / name, rgb)
    with open(tmp_path / "lost.tif", "r+b") as file:
        for offset, count in itertools.chain(*(zip(*page, strict=True) for page in places)):
            file.seek(offset)
            file.write(bytes(count))
    with open_slide(tmp_path / "whole.tif") as whole, open_slide(tmp_path / "lost.tif") as lost:
        assert whole.reader == "tiff"
        assert whole.level_sizes == ((SIDE, SIDE),)
        lost.check_complete()
        view, _ = lost.overview(side_px=SIDE // 2)
        np.testing.assert_array_equal(view, whole.overview(side_px=SIDE // 2)[0])
        assert np.abs(view.astype(int) - rgb[::2, ::2]).mean() < 40


def test_a_label_of_ome_tiff_is_no_level(tmp_path, rng):
    rgb = tissue(rng, SIDE, SIDE)
    path = tmp_path / "slide.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as writer:
        keywords = {"tile": (TILE, TILE), "photometric": "rgb"}
        scale = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
        writer.write(rgb, subifds=1, metadata={"Name": "slide", **scale}, **keywords)
        writer.write(rgb[::2, ::2], subfiletype=1, **keywords)
        writer.write(rgb[::-4, ::-4], metadata={"Name": "label image"}, **keywords)
    with open_slide(path) as slide:
        assert slide.reader == "tiff"
        assert slide.level_sizes == ((SIDE, SIDE), (SIDE // 2, SIDE // 2))


def test_names_of_tiles_are_hashes_in_their_own_order(study):
    plain, hidden = (exports.choose(study, anonymous=given) for given in (False, True))
    rows, other = plain.splits["train"].to_pylist(), hidden.splits["train"].to_pylist()
    names = Names(study.parents[2])
    expected = names.of("pair", PAIR)
    assert len(expected) == 16
    assert {row["pair"] for row in other} == {expected}
    assert {row["case"] for row in other} == {names.of("case", CASE)} != {expected}
    assert [row["tile"] for row in other] == sorted(
        row["tile"].replace(PAIR, expected) for row in rows
    )
    by_place = {(row["x_px"], row["y_px"]): row for row in rows}
    for row in other:
        own = by_place[row["x_px"], row["y_px"]]
        assert row["he_sha256"] == own["he_sha256"]


def test_another_key_gives_other_names_and_a_damaged_one_is_an_error(tmp_path):
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    one, two = (Names(folder).of("case", CASE) for folder in folders)
    assert one != two
    assert Names(folders[0]).of("case", CASE) == one
    (folders[0] / KEY_FILE).write_text("00ff\n")
    with pytest.raises(ConfigError, match=r"anonymous\.key: not a key of 32 bytes in hexadecimal"):
        Names(folders[0])
