"""Stage tile: states and reasons of pairs, shards, tables."""

import hashlib
import json
import os
import re
import tarfile

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from hemera import tables
from hemera.config import DescribeOptions, FilterOptions, TileOptions
from hemera.dataset.criteria import refusals
from hemera.dataset.excluded import UNCOVERED, unpack
from hemera.dataset.shards import read_member
from hemera.errors import InputFileError, SheetError
from hemera.imaging.codecs import decode
from hemera.registration.displacement import none
from hemera.registration.displacement_files import write_displacement
from tests.small_geojson import geometry, rectangle
from tests.small_registration import plain_errors
from tests.small_sheets import describe_unit, write_certificate
from tests.small_slides import damage_tile
from tests.small_units import (
    HE_MPP,
    Unit,
    registered,
    whole_slides,
)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mpp": 0.25}, "0.5 um/px is coarser than the tiles' 0.25; set tile.mpp"),
        ({"size_px": 512}, "smaller than a tile of 512 px"),
    ],
)
def test_images_too_coarse_or_too_small_are_a_state(unit, options, reason):
    assert unit.tile(**options) == []
    assert unit.state["state"] == "refused"
    assert reason in unit.state["reason"]
    with tarfile.open(unit.shard) as archive:
        assert archive.getnames() == []
    assert len(unit.tile(mpp=0.25, upsample=True)) == 6 * 4


def test_refused_images_and_verdicts_are_states(images_of_pair):
    folder, he, _ = images_of_pair
    Image.fromarray(np.full_like(he, 240)).save(folder / "blank.he.png")
    (folder / "cut.he.png").write_bytes((folder / "p1.he.png").read_bytes()[:3000])
    (folder / "person.he.png").write_bytes((folder / "p1.he.png").read_bytes())
    (folder / "wide.he.png").write_bytes((folder / "p1.he.png").read_bytes())
    changes = {"blank": {}, "cut": {}, "p1": {}, "person": {"verdict": "refuse"}}
    changes["wide"] = {"her2_mpp": 0.7}
    unit = Unit(folder, [registered(k, **{"her2": "p1.her2.png"} | v) for k, v in changes.items()])
    rows = unit.tile()
    assert {row["pair"] for row in rows} == {"p1"}
    assert {name: state["state"] for name, state in unit.states.items()} == {
        "blank": "no_tissue", "cut": "unreadable", "p1": "tiled", "person": "refused",
        "wide": "refused",
    }  # fmt: skip
    assert unit.states["person"]["registration"] == "refused"
    assert "cut.he.png: cannot be read" in unit.states["cut"]["reason"]


@pytest.mark.fault
def test_an_image_that_is_lost_or_has_changed_fails_the_job(images_of_pair, fault_seen):
    """A verdict would remain when the file is back."""
    folder, he, _ = images_of_pair
    unit = Unit(folder, [registered("p1")])
    path, stored = folder / "p1.her2.png", (folder / "p1.her2.png").read_bytes()
    times = path.stat()
    path.unlink()
    with pytest.raises(InputFileError, match=r"p1\.her2\.png: no such file"):
        unit.tile()
    # Another image at the same place, its time of change as before.
    Image.fromarray(he).save(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(InputFileError, match=r"p1\.her2\.png: has changed since stage describe"):
        unit.tile()
    assert not unit.shard.exists()
    path.write_bytes(stored)
    assert len(unit.tile()) == 6
    fault_seen(
        "a slide replaced with the same mtime",
        "the job fails: has changed since stage describe",
    )
    fault_seen("a slide lost between two stages", "the job fails: no such file")


def test_a_wrong_stain_is_a_state_unless_a_person_accepts_it(images_of_pair):
    folder, _, _ = images_of_pair
    swapped = {"he": "p1.her2.png", "her2": "p1.he.png"}
    unit = Unit(folder, [registered("p1", **swapped)])
    assert unit.tile() == []
    assert unit.state["state"] == "wrong_stain"
    assert "is IHC by its colours" in unit.state["reason"]
    unit = Unit(folder, [registered("p1", verdict="accept", **swapped)])
    assert len(unit.tile()) == 6
    assert unit.state["state"] == "tiled"


def test_places_without_image_are_excluded(images_of_pair):
    """The corner of a rotated image: background in the tile, ignored by masks."""
    folder, _, her2 = images_of_pair
    height, width = her2.shape[:2]
    corner = np.add.outer(np.arange(height), np.arange(width)) < 60
    changed = her2.copy()
    changed[corner] = 0
    Image.fromarray(changed).save(folder / "cut.her2.png")
    he = decode((folder / "p1.he.png").read_bytes())
    he[corner] = 0
    Image.fromarray(he).save(folder / "cut.he.png")
    unit = Unit(folder, [registered("p1"), registered("cut")])
    whole, cut = (
        min((row for row in unit.tile(codec="png") if row["pair"] == name), key=lambda r: r["tile"])
        for name in ("p1", "cut")
    )
    assert cut["her2_background"] == pytest.approx(whole["her2_background"], abs=2)
    assert whole["artefacts"] is None
    assert cut["her2_coverage_fraction"] == 1
    found = unpack(cut["artefacts"], (cut["size_px"],) * 2)
    assert found is not None
    inside = np.add.outer(*(np.arange(cut["size_px"]),) * 2) < 60
    for numbers in found:
        assert (numbers[inside] == UNCOVERED).all()
        # The edge is 8 px wide, of blocks of 4 px.
        assert not numbers[np.add.outer(*(np.arange(cut["size_px"]),) * 2) > 60 + 1.5 * 14].any()
    stored = decode(
        read_member(unit.shard, cut["her2_offset"], cut["her2_length"], cut["her2_sha256"])
    )
    assert (stored[inside] == max(cut["her2_background"])).all()


def test_any_number_of_workers_gives_the_same_bytes(images_of_pair):
    folder, he, _ = images_of_pair
    Image.fromarray(he[::-1]).save(folder / "p2.he.png")
    unit = Unit(folder, [registered("p1"), registered("p2", her2="p1.her2.png")])
    names = ("bci.000.tar", "bci.000.parquet", "bci.000.pairs.parquet")
    outputs = []
    for workers in (1, 2, 5):
        unit.tile(workers=workers, size_px=64, codec="jpeg")
        outputs.append([(unit.shard.parent / name).read_bytes() for name in names])
    assert len(unit.rows) == 48
    assert outputs[0] == outputs[1] == outputs[2]


def test_copies_on_the_node_give_the_same_bytes_and_are_removed(images_of_pair, tmp_path):
    folder, _, _ = images_of_pair
    unit = Unit(folder, [registered("p1")])
    names = ("bci.000.tar", "bci.000.parquet", "bci.000.pairs.parquet")
    outputs = []
    for local in (None, tmp_path / "node" / "own"):
        unit.tile(local_folder=local)
        outputs.append([(unit.shard.parent / name).read_bytes() for name in names])
    assert outputs[0] == outputs[1]
    assert list((tmp_path / "node" / "own").iterdir()) == []


@pytest.mark.parametrize(
    ("shape", "value", "reason"),
    [
        ((75, 105), 4, "artefacts cover more than 50% of each of 6 positions with tissue"),
        ((75, 75), 1, "he_artefacts: mask.png has 75 x 75 px, which are not the proportions of"),
    ],
)
def test_artefacts_of_a_file_can_refuse_a_pair(images_of_pair, shape, value, reason):
    folder, _, _ = images_of_pair
    Image.fromarray(np.full(shape, value, np.uint8)).save(folder / "mask.png")
    unit = Unit(folder, [registered("p1", he_artefacts="mask.png")])
    assert unit.tile() == []
    assert unit.state["state"] == "refused"
    assert reason in unit.state["reason"]


def test_only_inside_the_region_of_interest(images_of_pair):
    folder, _, _ = images_of_pair
    roi = folder / "roi.geojson"
    unit = Unit(folder, [registered("p1", roi=roi.name)])
    roi.write_text(polygon(0, 0, 200, 300))
    # Columns at 0 (whole), 128 (72 of 128 px: over half) and 256 (none).
    assert {row["x_px"] for row in unit.tile()} == {0, 128}
    assert {row["x_px"] for row in unit.tile(size_px=150)} == {0}


def polygon(*corners):
    return json.dumps(geometry("Polygon", [rectangle(*corners)]))


@pytest.mark.parametrize(
    ("text", "state", "reason"),
    [
        ("not json", "refused", r"^roi\.geojson: not GeoJSON"),
        (None, "refused", "no such file"),
        (polygon(9000, 9000, 9900, 9900), "no_tissue", "none of 6 positions with tissue"),
    ],
)
def test_a_region_without_tiles(images_of_pair, text, state, reason):
    folder, _, _ = images_of_pair
    unit = Unit(folder, [registered("p1", roi="roi.geojson")])
    if text:
        (folder / "roi.geojson").write_text(text)
    assert unit.tile() == []
    assert unit.state["state"] == state
    assert re.search(reason, unit.state["reason"])


@pytest.mark.parametrize(
    ("certificate", "manual", "registration", "tiles"),
    [
        ("fail", "", "fail", 0),
        ("fail", "accept", "accepted", 15),
        ("review", "", "review", 15),
    ],
)
def test_the_certificate_decides_unless_a_person_does(
    slides, certificate, manual, registration, tiles
):
    write_certificate(slides / "c.parquet", "case1", certificate, "tiles do not match")
    unit = whole_slides(slides, verdict=manual)
    assert len(unit.tile()) == tiles
    assert unit.state["registration"] == registration
    assert unit.state["state"] == ("tiled" if tiles else "refused")
    assert bool(unit.state["reason"]) == (not tiles)


@pytest.mark.parametrize(("damaged", "words"), [(False, "gave no map"), (True, "d.npz")])
def test_a_missing_or_damaged_map_is_a_state(slides, damaged, words):
    """Also where a person accepts it."""
    write_displacement(slides / "d.npz", none())
    if damaged:
        (slides / "d.npz").write_bytes(b"nothing of the kind")
    unit = whole_slides(slides, verdict="accept")
    assert unit.tile() == []
    assert unit.state["state"] == "refused"
    assert words in unit.state["reason"]


def test_each_tile_has_the_quality_of_the_registration_at_its_centre(slides, monkeypatch):
    """Squares 40 um apart that match in place, with an error that is a formula of the place."""
    plain_errors(monkeypatch)
    unit = whole_slides(slides)
    rows = [
        {
            "pair": "case1", "x_um": x, "y_um": y, "side_um": 80.0, "step_um": 40.0,
            "ncc": 0.2 + x / 1000, "best_shifted_ncc": 0.1,
            "residual_x_um": 3 * (x / 100), "residual_y_um": 4 * (x / 100), "spread_um": 1.0,
        }
        for y in np.arange(20.0, 200, 40) for x in np.arange(20.0, 300, 40)
    ]  # fmt: skip
    tables.write(slides / "q.parquet", rows, tables.QUALITY)
    found = unit.tile(registration_quality=slides / "q.parquet")
    assert len(found) > 10
    for row in found:
        centre = (row["x_px"] + 64) * HE_MPP
        if centre <= 260:
            assert row["registration_error_um"] == pytest.approx(5 * centre / 100)
            assert row["registration_error_low_um"] == pytest.approx(5 * centre / 400)
            assert row["registration_error_high_um"] == pytest.approx(5 * centre / 50)
            assert row["registration_ncc"] == pytest.approx(0.2 + centre / 1000)
            assert row["registration_margin"] == pytest.approx(0.1 + centre / 1000)
        elif centre > 300 + 40:
            assert row["registration_error_um"] is None
    assert {row["registration_error_um"] for row in unit.tile()} == {None}


def test_the_reader_chosen_for_describe_reads_here_too(slides, monkeypatch):
    unit = whole_slides(slides)
    direct = [row["he_sha256"] for row in unit.tile()]
    describe_unit(slides, "case1", unit.images_table, DescribeOptions(reader="openslide"))
    monkeypatch.delattr("hemera.imaging.tiff.TiffReader.read")
    assert [row["he_sha256"] for row in unit.tile()] == direct


def test_a_tile_that_cannot_be_decoded_costs_that_tile(slides, monkeypatch):
    # As of a large slide, whose finest level is not read by describe.
    monkeypatch.setattr("hemera.stages.tile.check_content", lambda *_: None)
    unit = whole_slides(slides)
    whole = {row["tile"]: row["he_sha256"] for row in unit.tile()}
    damage_tile(slides / "he.tif", 8)  # six stored tiles in a row: row 1, column 2
    rows = unit.tile(workers=2)
    assert unit.state["state"] == "tiled"
    assert (unit.state["tiles_unreadable"], unit.state["tiles_written"]) == (1, 14)
    assert {row["tile"] for row in rows} == set(whole) - {"case1_000256_000128"}
    assert all(whole[row["tile"]] == row["he_sha256"] for row in rows)
    damage_tile(slides / "he.tif", 7)
    damage_tile(slides / "he.tif", 9)
    assert unit.tile() == []
    assert unit.state["state"] == "unreadable"
    assert "over 10% (tile.bad_tiles_max)" in unit.state["reason"]
    with tarfile.open(unit.shard) as archive:
        assert archive.getnames() == []
    assert len(unit.tile(bad_tiles_max=0.5)) == 12


def test_a_real_slide_against_itself(images, tmp_path):
    path = images / "wsi" / "CMU-1-Small-Region.svs"
    row = {"pair": "cmu", "dataset": "wsi", "he": path, "her2": path, "registered": "true"}
    unit = Unit(tmp_path, [{**row, "he_mpp": "", "her2_mpp": ""}], unit="cmu")
    assert unit.tile() == []
    assert unit.state["state"] == "refused"
    assert "the same image twice" in unit.state["reason"]
    described = tables.read(unit.images_table, tables.DESCRIBE).to_pylist()
    accepted = [{**row, "verdict": "accept", "reason": None} for row in described]
    tables.write(unit.images_table, accepted, tables.DESCRIBE)
    rows = unit.tile(size_px=512, codec="jpeg", workers=2)
    assert unit.state["tiles_grid"] == 20
    assert 10 <= len(rows) < 20
    for row in rows:
        assert row["he_sha256"] == row["her2_sha256"]
        assert row["histogram_similarity"] == pytest.approx(1.0)
    assert max(row["tissue_fraction"] for row in rows) > 0.7


GOLDEN = {12: "48b8a7732de79303"}


def test_golden(slides):
    unit = whole_slides(slides)
    rows = unit.tile()
    plain = []
    for row in rows:
        pixels = [hashlib.sha256(unit.pixels(row, stain)).hexdigest() for stain in tables.STAINS]
        kept = {k: v for k, v in row.items() if not k.endswith(("offset", "length", "sha256"))}
        kept["artefacts"] = kept["artefacts"] and kept["artefacts"].hex()
        plain.append(
            [pixels, {k: round(v, 5) if isinstance(v, float) else v for k, v in kept.items()}]
        )
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
    assert digest == GOLDEN.get(TileOptions.version), (
        "tile's output changed: raise TileOptions.version and add the digest"
    )


def test_an_empty_cohort_is_an_error_of_the_sheet(unit):
    unit.unit = "bci.009"
    with pytest.raises(SheetError, match=r"no unit bci\.009"):
        unit.tile()
    assert not unit.shard.exists()


def test_real_bci_pairs_pass_the_filters(images, tmp_path):
    folder = images / "bci_pairs_1024"
    unit = Unit(
        tmp_path,
        [
            registered(name[:5], he=folder / "HE/test" / name, her2=folder / "IHC/test" / name)
            | {"he_mpp": 0.46, "her2_mpp": 0.46}
            for name in ("00345_test_0.png", "00820_test_2+.png")
        ],
    )
    rows = unit.tile(size_px=512, codec="jpeg")
    assert len(rows) == 8
    facts = {"dataset": "bci", "registration": "registered"}
    reasons = refusals(
        pa.Table.from_pylist([row | facts for row in rows]), FilterOptions().model_dump()
    )
    # Two quarters of a pair are mostly background, as one sees; none is rejected for its histogram.
    assert np.count_nonzero(reasons == "") >= 6
    assert set(reasons) <= {"", "low_tissue"}


def test_real_artefact_tiles_are_refused_for_what_they_show(images, tmp_path):
    """Pen, a field out of focus, no tissue; the ordinary tiles and the field in focus are kept."""
    resolutions = {"qc_tiles": 0.5, "qc_focus": 0.25}
    rows = [
        {"pair": path.stem, "he": path, "her2": "", "he_mpp": mpp, "her2_mpp": ""}
        for folder, mpp in resolutions.items()
        for path in sorted((images / folder).glob("*.png"))
    ]
    # Images of one stain alone are in the second half of the blocks.
    unit = Unit(tmp_path, rows, unit="bci.001")
    tiles = unit.tile(size_px=512, codec="jpeg")
    # HER2 as without artefacts: only H&E is judged.
    her2 = {name: 0.0 for name in tiles[0] if re.fullmatch("her2_[a-z]+_fraction", name)}
    facts = {"dataset": "bci", "registration": "registered", "histogram_similarity": 1.0}
    facts |= {"folding_fraction": 0.0}
    facts |= {**her2, "her2_sharpness": 1000.0, "her2_coverage_fraction": 1.0}
    reasons = refusals(
        pa.Table.from_pylist([row | facts for row in tiles]), FilterOptions().model_dump()
    )
    found = {row["tile"]: reason for row, reason in zip(tiles, reasons, strict=True)}
    expected = {
        "high-nuclei": {"pen"}, "low-nuclei": {"low_tissue"}, "medium-nuclei": {""},
        "tissue-level0": {""}, "fqpath_in": {""}, "fqpath_out": {"partly_blurred"},
    }  # fmt: skip
    for start, reason in expected.items():
        assert {found[name] for name in found if name.startswith(start)} == reason, start
    empty = {name for name, state in unit.states.items() if state["state"] == "no_tissue"}
    assert empty == {"almost-white-2", "no-tissue", "no-tissue-line"}
