"""hemera predict: maps known beforehand, because the model asked is a formula; and real networks.

The formula calls dark what is dark. So on a slide of pink with purple rectangles the mask, its
areas and the corners of its regions are known by hand.
"""

import argparse
import errno
import json
import logging
import os
import shutil
import tracemalloc

import cv2
import numpy as np
import openslide
import pytest
import tifffile
import tiffslide
import torch
from PIL import Image

from hemera.__main__ import main
from hemera.commands import predict
from hemera.commands.predict import FILES, Blend, Grid, Model, grid_of, load_model
from hemera.errors import ConfigError, SlideError, TrainingError
from hemera.imaging.slide import open_slide
from hemera.networks import storage
from tests.small_networks import write_networks

GLASS, TISSUE, DARK = (240, 242, 243), (222, 150, 190), (90, 40, 120)


def dark(tiles):
    """What stands in for the network: sure of what is dark, and sure of what is not."""
    return np.where(tiles[..., 0] < 150, 0.9, 0.1).astype(np.float32)


def slide_of(size, boxes, glass=0):
    """Tissue with dark boxes (x0, y0, x1, y1), and a rim of glass."""
    rgb = np.empty((size[1], size[0], 3), np.uint8)
    rgb[:] = GLASS
    rgb[glass : size[1] - glass, glass : size[0] - glass] = TISSUE
    for x0, y0, x1, y1 in boxes:
        rgb[y0:y1, x0:x1] = DARK
    return rgb


def write_slide(path, rgb, mpp=0.5, tile=128):
    resolution = None if mpp is None else (1e4 / mpp, 1e4 / mpp)
    tifffile.imwrite(
        path, rgb, tile=(tile, tile), photometric="rgb", compression="deflate",
        resolution=resolution, resolutionunit="CENTIMETER" if mpp else None,
    )  # fmt: skip
    return path


def model_of(ask=dark, tile_px=128, mpp=0.5, mpp_max=None):
    return Model(ask, tile_px, mpp, mpp_max or mpp)


def run(path, folder, model=None, mpp=None, **options):
    """Predict; return outputs by kind."""
    outputs = predict._outputs(path, folder)
    with open_slide(path, mpp=mpp) as slide:
        predict.predict(slide, outputs, model or model_of(), **options)
    return outputs


def facts_of(outputs):
    return json.loads(outputs["facts"].read_text())


def polygons_of(outputs):
    return [
        feature["geometry"]["coordinates"]
        for feature in json.loads(outputs["regions"].read_text())["features"]
    ]


def corners(ring):
    assert ring[0] == ring[-1], "a ring of GeoJSON is closed"
    return {tuple(point) for point in ring}


def box(x0, y0, x1, y1):
    return {(x0, y0), (x1, y0), (x1, y1), (x0, y1)}


# The map, known beforehand


def test_mask_regions_and_areas_are_those_counted_by_hand(tmp_path):
    """Boxes over the edges of tiles and bands, one with a hole; no side is a multiple of a tile."""
    rgb = slide_of((701, 433), [(90, 70, 300, 260), (500, 380, 701, 433), (400, 30, 409, 38)])
    rgb[120:200, 150:250] = TISSUE
    path = write_slide(tmp_path / "case.tif", rgb)
    outputs = run(path, tmp_path / "out", min_area_um2=16, workers=3, batch_size=3)
    truth = rgb[..., 0] < 150
    mask = tifffile.imread(outputs["mask"])
    assert mask.dtype == np.uint8
    assert (mask == np.where(truth, 255, 0)).all()
    # Regions come in the order in which they end.
    small, holed, last = polygons_of(outputs)
    assert [corners(ring) for ring in small] == [box(400, 30, 409, 38)]
    assert [corners(ring) for ring in holed] == [box(90, 70, 300, 260), box(150, 120, 250, 200)]
    assert [corners(ring) for ring in last] == [box(500, 380, 701, 433)]
    pixels = 9 * 8 + 210 * 190 - 100 * 80 + 201 * 53
    facts = facts_of(outputs)
    assert facts["area"] == {
        "tissue_um2": 701 * 433 / 4,
        "unreadable_um2": 0,
        "positive_um2": pixels / 4,
        "positive_fraction": pixels / (701 * 433),
    }
    assert facts["regions"] == {
        "count": 3, "area_um2": pixels / 4, "min_area_um2": 16, "left_out": 0,
    }  # fmt: skip
    # A stride of 96 px, the last tile at the edge: 0, 96, ..., 573 and 0, ..., 305.
    assert facts["tiles"] == {"grid": 7 * 5, "tissue": 7 * 5, "unreadable": 0}
    assert (facts["map"]["width_px"], facts["map"]["height_px"]) == (701, 433)
    assert (facts["slide"]["width_px"], facts["slide"]["mpp"]) == (701, pytest.approx(0.5))


def test_small_regions_leave_the_geojson_and_nothing_else(tmp_path):
    rgb = slide_of((300, 200), [(20, 20, 30, 30), (100, 40, 140, 90)])
    path = write_slide(tmp_path / "case.tif", rgb)
    # The first is 100 px of 0.25 um2.
    outputs = run(path, tmp_path / "out", min_area_um2=25.01)
    (kept,) = polygons_of(outputs)
    assert corners(kept[0]) == box(100, 40, 140, 90)
    facts = facts_of(outputs)
    assert facts["regions"]["left_out"] == 1
    assert facts["regions"]["area_um2"] == 500
    assert facts["area"]["positive_um2"] == 525
    assert np.count_nonzero(tifffile.imread(outputs["mask"])) == 2100
    assert len(polygons_of(run(path, tmp_path / "out", min_area_um2=25))) == 2


def test_a_finer_slide_is_read_at_the_models_resolution(tmp_path):
    """0.25 um/px for a model of 0.5: the mask is half as wide, the regions on level 0."""
    rgb = slide_of((1003, 622), [(200, 100, 520, 240), (800, 500, 1003, 622)])
    path = write_slide(tmp_path / "case.tif", rgb, 0.25)
    outputs = run(path, tmp_path / "out")
    mask = tifffile.imread(outputs["mask"])
    assert mask.shape == (311, 502)
    assert (mask[:, :501] == np.where(rgb[::2, 0:1002:2, 0] < 150, 255, 0)).all()
    first, last = polygons_of(outputs)
    assert corners(first[0]) == box(200, 100, 520, 240)
    # The map's last column reaches over the slide's edge, the regions do not.
    assert corners(last[0]) <= box(800, 500, 1003, 622) | box(800, 500, 1002, 622)
    assert facts_of(outputs)["map"]["mpp"] == pytest.approx(0.5)


@pytest.mark.parametrize("mpp", [0.3, 0.37, 0.44])
def test_at_any_resolution_regions_lie_where_they_do_on_the_slide(tmp_path, mpp):
    rgb = slide_of((900, 640), [(231, 155, 577, 402)])
    path = write_slide(tmp_path / "case.tif", rgb, mpp)
    outputs = run(path, tmp_path / "out")
    (rings,) = polygons_of(outputs)
    ring = np.array(rings[0])
    pixel = 0.5 / mpp
    assert np.abs(ring.min(axis=0) - (231, 155)).max() <= pixel / 2 + 0.01
    assert np.abs(ring.max(axis=0) - (577, 402)).max() <= pixel / 2 + 0.01
    truth = 346 * 247 * mpp**2
    slack = 2 * (346 + 247) * mpp * 0.5 / 2
    assert abs(facts_of(outputs)["area"]["positive_um2"] - truth) <= slack


def test_a_pyramid_is_taken_at_the_level_that_is_near(tmp_path):
    """0.25 and 0.51 um/px: the second level is what a model of 0.5 sees, as it is stored."""
    rgb = slide_of((800, 600), [(200, 100, 520, 240)])
    with tifffile.TiffWriter(tmp_path / "case.tif") as file:
        for factor, level in ((1, rgb), (2, rgb[::2, ::2])):
            file.write(
                level, tile=(128, 128), photometric="rgb", compression="deflate",
                subfiletype=int(factor > 1), resolution=(1e4 / 0.255 / factor,) * 2,
                resolutionunit="CENTIMETER",
            )  # fmt: skip
    seen = []

    def ask(tiles):
        seen.append(np.unique(tiles.reshape(-1, 3), axis=0))
        return dark(tiles)

    outputs = run(tmp_path / "case.tif", tmp_path / "out", model_of(ask))
    assert facts_of(outputs)["map"]["mpp"] == pytest.approx(0.51)
    assert tifffile.imread(outputs["mask"]).shape == (300, 400)
    assert all(len(colours) <= 2 for colours in seen), "no colour is made by resampling"


@pytest.mark.parametrize("size", [(90, 40), (128, 57), (1, 1), (3, 200)])
def test_an_image_smaller_than_a_tile(tmp_path, size):
    rgb = np.full((size[1], size[0], 3), DARK, np.uint8)
    rgb[: size[1] // 2] = TISSUE
    path = write_slide(tmp_path / "case.tif", rgb)
    outputs = run(path, tmp_path / "out", min_area_um2=0.1)
    assert (tifffile.imread(outputs["mask"]) == np.where(rgb[..., 0] < 150, 255, 0)).all()
    with Image.open(outputs["overlay"]) as picture:
        assert picture.size == size
    (rings,) = polygons_of(outputs)
    assert corners(rings[0]) == box(0, size[1] // 2, *size)


def test_only_tiles_with_tissue_are_asked_and_off_it_nothing_is_positive(tmp_path):
    """The model says yes to everything; glass stays 0, and most of it is never read."""
    rgb = slide_of((1200, 704), [])
    rgb[:] = GLASS
    rgb[208:512, 96:480] = TISSUE
    path = write_slide(tmp_path / "case.tif", rgb)
    asked = 0

    def ask(tiles):
        nonlocal asked
        asked += len(tiles)
        return np.ones(tiles.shape[:3], np.float32)

    outputs = run(path, tmp_path / "out", model_of(ask))
    facts = facts_of(outputs)
    assert asked == facts["tiles"]["tissue"] < facts["tiles"]["grid"] / 2
    assert facts["area"]["positive_fraction"] == 1
    mask = tifffile.imread(outputs["mask"])
    # The outline is found at 8 um/px, of which 96, 480, 208 and 512 px are whole numbers.
    assert (mask[208:512, 96:480] == 255).all()
    mask[208:512, 96:480] = 0
    assert not mask.any()
    assert facts["area"]["positive_um2"] == facts["area"]["tissue_um2"]


def test_a_slide_of_glass_gives_an_empty_map_and_no_share(tmp_path, caplog):
    path = write_slide(tmp_path / "glass.tif", slide_of((700, 300), [], glass=350))
    outputs = run(path, tmp_path / "out", probability=True)
    assert "no tissue found" in caplog.text
    for kind in ("mask", "probability"):
        assert tifffile.imread(outputs[kind]).shape == (300, 700)
        assert not tifffile.imread(outputs[kind]).any()
    assert polygons_of(outputs) == []
    facts = facts_of(outputs)
    assert facts["area"] == {
        "tissue_um2": 0, "unreadable_um2": 0, "positive_um2": 0, "positive_fraction": None,
    }  # fmt: skip
    with Image.open(outputs["overlay"]) as picture:
        assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) == 1


# The blend


def grid(size, tile):
    return Grid(0.5, 1.0, size, tile)


def blended(field, tile, skip=()):
    """Cut a field into tiles and lay them together again."""
    own = grid(field.shape[::-1], tile)
    blend, rows, covered = Blend(own), [], []
    for y in own.starts(1):
        for x in own.starts(0):
            if (x, y) not in skip:
                blend.add(x, y, field[y : y + tile, x : x + tile])
    for band in range(-(-len(field) // 128)):
        height = min(128, len(field) - 128 * band)
        probability, known, lost = blend.take(band)
        assert probability.shape == (height, field.shape[1])
        assert not lost.any()
        rows.append(probability)
        covered.append(known)
    return np.concatenate(rows), np.concatenate(covered)


@pytest.mark.parametrize(("size", "tile"), [((501, 390), 128), ((300, 700), 256), ((65, 31), 64)])
def test_tiles_that_agree_leave_no_trace(size, tile):
    field = np.random.default_rng(1).random(size[::-1]).astype(np.float32)
    result, covered = blended(field, tile)
    assert np.abs(result - field).max() <= 6e-6
    assert covered.all()


@pytest.mark.parametrize("value", [0.5, 0.3, 0.7, 0.123, 1.0])
def test_a_constant_stays_that_very_number(value):
    field = np.full((390, 501), value, np.float32)
    result, _ = blended(field, 128)
    assert (result == np.float32(value)).all()


def test_a_missing_tile_is_a_hole_as_large_as_what_it_alone_covers():
    field = np.full((400, 400), 0.25, np.float32)
    result, covered = blended(field, 128, skip={(96, 192)})
    # Tiles begin at 0, 96, 192 and 272.
    hole = np.zeros((400, 400), bool)
    hole[224:272, 128:192] = True
    assert (covered == ~hole).all()
    assert (result[covered] == 0.25).all()


def test_neighbours_that_disagree_fade_into_each_other_without_a_step():
    """Two tiles along x, 0 and 1: a raised cosine over the quarter they share."""
    own = grid((224, 128), 128)
    blend = Blend(own)
    assert own.starts(0) == [0, 96]
    blend.add(0, 0, np.zeros((128, 128), np.float32))
    blend.add(96, 0, np.ones((128, 128), np.float32))
    result, _, _ = blend.take(0)
    assert (result[:, :96] == 0).all()
    assert (result[:, 128:] == 1).all()
    expected = (1 - np.cos(np.pi * (np.arange(32) + 0.5) / 32)) / 2
    assert np.abs(result[:, 96:128] - expected).max() < 1e-5
    assert np.abs(np.diff(result[0])).max() < np.pi / 2 / 32 + 1e-5


def test_a_constant_model_of_the_threshold_is_positive_everywhere(tmp_path):
    path = write_slide(tmp_path / "case.tif", slide_of((501, 390), []))
    outputs = run(
        path, tmp_path / "out", model_of(lambda tiles: np.full(tiles.shape[:3], 0.3, np.float32)),
        threshold=0.3, probability=True,
    )  # fmt: skip
    assert (tifffile.imread(outputs["mask"]) == 255).all()
    assert (tifffile.imread(outputs["probability"]) == round(0.3 * 255)).all()


# Files as others see them


def test_readers_see_resolution_and_levels(tmp_path):
    rgb = slide_of((1400, 900), [(160, 96, 640, 480)])
    path = write_slide(tmp_path / "case.tif", rgb, 0.23, tile=256)
    outputs = run(path, tmp_path / "out", model_of(mpp=0.24), probability=True)
    for kind in ("mask", "probability"):
        with openslide.OpenSlide(outputs[kind]) as slide:
            assert slide.dimensions == (1400, 900)
            assert slide.level_count == 3
            assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.23, rel=1e-6)
        with tiffslide.TiffSlide(outputs[kind]) as slide:
            assert float(slide.properties["tiffslide.mpp-y"]) == pytest.approx(0.23, rel=1e-6)
        with tifffile.TiffFile(outputs[kind]) as file:
            assert file.is_bigtiff
            levels = [level.asarray() for level in file.series[0].levels]
            size = tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]["Pixels"]
            assert size["PhysicalSizeX"] == pytest.approx(0.23, rel=1e-6)
        for n, level in enumerate(levels):
            values = np.unique(level)
            assert set(values) == ({0, 255} if kind == "mask" else {26, 230})
            assert (level[96 >> n : 480 >> n, 160 >> n : 640 >> n] == values[1]).all()


def test_regions_are_what_qupath_imports(tmp_path):
    path = write_slide(tmp_path / "case.tif", slide_of((300, 200), [(100, 40, 140, 90)]))
    outputs = run(path, tmp_path / "out")
    document = json.loads(outputs["regions"].read_text())
    assert document["type"] == "FeatureCollection"
    (feature,) = document["features"]
    assert feature["type"] == "Feature"
    assert feature["geometry"]["type"] == "Polygon"
    assert feature["properties"]["objectType"] == "annotation"
    assert feature["properties"]["classification"]["name"] == "HER2 positive"


def test_the_overlay_is_tinted_where_the_map_is_positive_and_nowhere_else(tmp_path):
    rgb = slide_of((2600, 900), [(260, 130, 1300, 650)])
    path = write_slide(tmp_path / "case.tif", rgb)
    outputs = run(path, tmp_path / "out", model_of(tile_px=512))
    picture = np.asarray(Image.open(outputs["overlay"])).astype(int)
    assert picture.shape == (709, 2048, 3)
    scale = 2048 / 2600
    inside = np.zeros(picture.shape[:2], bool)
    inside[round(130 * scale) : round(650 * scale), round(260 * scale) : round(1300 * scale)] = True
    near = cv2.dilate(inside.astype(np.uint8), np.ones((9, 9))) > 0
    far = cv2.erode(inside.astype(np.uint8), np.ones((9, 9))) > 0
    assert (picture[~near] == TISSUE).all()
    tint = 0.7 * np.array(DARK) + 0.3 * np.array(predict.COLOUR)
    assert np.abs(picture[far] - tint).max() <= 1


def test_the_same_slide_gives_the_same_bytes(tmp_path):
    path = write_slide(tmp_path / "case.tif", slide_of((501, 390), [(90, 70, 300, 260)]))
    first = run(path, tmp_path / "a", workers=1, batch_size=1, probability=True)
    second = run(path, tmp_path / "b", workers=4, batch_size=5, probability=True)
    for kind in FILES:
        assert first[kind].read_bytes() == second[kind].read_bytes(), kind


def test_a_second_run_replaces_the_first_and_leaves_nothing_of_it(tmp_path):
    path = write_slide(tmp_path / "case.tif", slide_of((300, 200), [(100, 40, 140, 90)]))
    run(path, tmp_path / "out", probability=True)
    outputs = run(path, tmp_path / "out", model_of(lambda tiles: dark(tiles) * 0))
    assert not outputs["probability"].exists(), "it would be of another model"
    assert polygons_of(outputs) == []
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == [
        "case.json", "case.mask.tif", "case.overlay.png", "case.positive.geojson",
    ]  # fmt: skip


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_what_breaks_off_leaves_what_was_there_and_nothing_else(tmp_path, fault):
    path = write_slide(tmp_path / "case.tif", slide_of((300, 700), [(100, 40, 140, 90)]))
    outputs = run(path, tmp_path / "out")
    before = {entry: entry.read_bytes() for entry in (tmp_path / "out").iterdir()}
    turns = 0

    def ask(tiles):
        nonlocal turns
        turns += 1
        if turns == 8:
            raise fault
        return dark(tiles)

    with pytest.raises(type(fault)):
        run(path, tmp_path / "out", model_of(ask), batch_size=1)
    assert {entry: entry.read_bytes() for entry in (tmp_path / "out").iterdir()} == before
    assert outputs["facts"].exists()


@pytest.mark.parametrize(
    "name", ["a b'\"<&>\n%s{}.tif", "-rf.tif", "0_HE\N{GREEK SMALL LETTER MU}.tif", b"\xff\x01.tif"]
)
def test_hostile_names(tmp_path, name):
    path = tmp_path / os.fsdecode(name)
    write_slide(tmp_path / "case.tif", slide_of((300, 200), [(100, 40, 140, 90)]))
    (tmp_path / "case.tif").rename(path)
    outputs = run(path, tmp_path / "out", probability=True)
    assert facts_of(outputs)["slide"]["file"] == path.name
    assert len(polygons_of(outputs)) == 1
    with tifffile.TiffFile(outputs["mask"]) as file:
        assert tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]["Pixels"]["SizeX"] == 300


def test_a_name_too_long_for_the_outputs_is_found_at_once(tmp_path):
    path = write_slide(tmp_path / ("x" * 245 + ".tif"), slide_of((300, 200), []))

    def ask(tiles):
        raise AssertionError("asked before the names were tried")

    with pytest.raises(OSError, match="too long") as raised:
        run(path, tmp_path / "out", model_of(ask))
    assert raised.value.errno == errno.ENAMETOOLONG
    assert not list((tmp_path / "out").iterdir())


def test_an_ome_tiff_lends_its_name_without_ome(tmp_path):
    path = write_slide(tmp_path / "case.ome.tif", slide_of((30, 20), []))
    assert predict._outputs(path, tmp_path)["mask"].name == "case.mask.tif"


# What cannot be


def damage(path, indexes):
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        places = [(page.dataoffsets[n], page.databytecounts[n]) for n in indexes]
    with open(path, "r+b") as file:
        for offset, count in places:
            file.seek(offset)
            file.write(b"\xff" * count)


def test_a_part_that_cannot_be_read_is_a_hole_that_is_counted(tmp_path, caplog):
    """One stored tile of 128 px: 4 of 12 x 8 tiles touch it, and what they alone cover is lost."""
    rgb = slide_of((1184, 800), [(480, 380, 620, 430), (900, 600, 1000, 700)])
    path = write_slide(tmp_path / "case.tif", rgb)
    damage(path, [3 * 10 + 4])
    outputs = run(path, tmp_path / "out")
    facts = facts_of(outputs)
    # x 512 to 640 is in the tiles from 480 and 576 alone; y 384 to 512 in those from 288, 384, 480.
    assert facts["tiles"] == {"grid": 12 * 8, "tissue": 12 * 8, "unreadable": 2 * 3}
    # Lost: x 512 (the tile from 384 ends) to 672 (that from 672 begins), y 320 to 576.
    assert facts["area"]["unreadable_um2"] == 160 * 256 / 4
    mask = tifffile.imread(outputs["mask"])
    assert not mask[320:576, 512:672].any()
    assert (mask[380:430, 480:512] == 255).all()
    positive = 32 * 50 + 100 * 100
    assert facts["area"]["positive_um2"] == positive / 4
    # Of the tissue, that which was seen: what is lost beside the stored tile is tissue, too.
    assert facts["area"]["positive_fraction"] == positive / (1184 * 800 - 160 * 256)
    assert "6 of 96 tiles cannot be read and are holes" in caplog.text


def test_a_slide_with_too_many_holes_is_refused(tmp_path):
    path = write_slide(tmp_path / "case.tif", slide_of((1184, 800), []))
    damage(path, [34, 38, 54])
    with pytest.raises(SlideError, match=r"tiles cannot be read, over 10%; the first: case.tif"):
        run(path, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_an_answer_that_is_no_number_is_refused(tmp_path):
    path = write_slide(tmp_path / "case.tif", slide_of((300, 200), []))
    with pytest.raises(TrainingError, match="no number; give --precision float32"):
        run(path, tmp_path / "out", model_of(lambda tiles: dark(tiles) * np.float32(np.nan)))


def test_the_resolution_of_a_map(tmp_path):
    path = write_slide(tmp_path / "case.tif", slide_of((300, 200), []), 0.9)
    with open_slide(path) as slide:
        with pytest.raises(SlideError, match=r"0.9 um/px is coarser than the 0.5 .*--upsample"):
            grid_of(slide, model_of(), upsample=False)
        # 300 * 0.9 / 0.5
        assert grid_of(slide, model_of(), upsample=True).size_px == (540, 360)
        # Trained on tiles of 0.46 and 0.92: each slide as it is.
        both = grid_of(slide, model_of(mpp=0.46, mpp_max=0.92), upsample=False)
        assert (both.mpp, both.size_px) == (pytest.approx(0.9), (300, 200))
        near = grid_of(slide, model_of(mpp=0.82), upsample=False)
        assert near.size_px == (300, 200)
        coarse = grid_of(slide, model_of(mpp=2.0), upsample=False)
        assert (coarse.mpp, coarse.size_px) == (2.0, (135, 90))
    fine = write_slide(tmp_path / "fine.tif", slide_of((300, 200), []), 0.25)
    with open_slide(fine) as slide:
        assert grid_of(slide, model_of(mpp=0.46, mpp_max=0.92), upsample=False).mpp == 0.46


def test_an_enlarged_slide_keeps_its_places(tmp_path):
    path = write_slide(tmp_path / "case.tif", slide_of((300, 200), [(100, 40, 140, 90)]), 1.0)
    outputs = run(path, tmp_path / "out", upsample=True)
    (rings,) = polygons_of(outputs)
    ring = np.array(rings[0])
    assert np.abs(ring.min(axis=0) - (100, 40)).max() <= 0.5
    assert np.abs(ring.max(axis=0) - (140, 90)).max() <= 0.5


# Memory


def test_what_is_held_grows_with_the_width_alone(tmp_path):
    """A map four times as high takes no more; most of it are the sums, one row of tiles of floats.

    Measured without the slide's own reader, whose cache has a bound of its own.
    """

    class Plain:
        path = tmp_path / "case.tif"

        def __init__(self, size):
            self.size_px, self.mpp, self.level_mpps = size, 0.5, (0.5,)
            self.background, self.mpp_source = GLASS, "made"

        def read(self, x, y, width, height, mpp):
            tile = np.full((height, width, 3), TISSUE, np.uint8)
            tile[10:20, 10:40] = DARK
            return tile

        def overview(self, side_px=None, mpp=None):
            count = round(max(self.size_px) * 0.5 / mpp) if mpp else side_px
            ratio = count / max(self.size_px)
            shape = [max(1, round(side * ratio)) for side in reversed(self.size_px)]
            return np.full((*shape, 3), TISSUE, np.uint8), tuple(
                side * 0.5 / length
                for side, length in zip(self.size_px, reversed(shape), strict=True)
            )

    def peak(width, height):
        outputs = {kind: tmp_path / f"m{suffix}" for kind, suffix in FILES.items()}
        tracemalloc.start()
        predict.predict(
            Plain((width, height)), outputs, model_of(tile_px=512), workers=1, batch_size=2
        )
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    width = 6000
    low, high = peak(width, 3000), peak(width, 12000)
    assert high < 1.05 * low
    # 4 bytes of each of 512 + 128 rows, and the bands and rows of stored tiles in the making.
    assert high < width * 8000 + 30 * 2**20


# Real networks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained network's folder, as the stage leaves it."""
    made = tmp_path_factory.mktemp("networks")
    paths = write_networks(made / "raw")
    folder = made / "train_segmentation"
    folder.mkdir()
    # Untrained, it says nearly the same of everything: its last layer is turned up.
    weights = storage.read_weights(paths["segmenter"])
    weights["decoder.head.weight"] *= 3000
    storage.write_weights(folder / "segmenter.safetensors", weights)
    described = json.loads(paths["segmenter_metadata"].read_text())
    storage.write_metadata(folder / "metadata.json", {**described, "mpp": 0.5, "tile_px": 256})
    return folder


def with_metadata(folder, target, **changes):
    shutil.copytree(folder, target)
    described = json.loads((target / "metadata.json").read_text()) | changes
    storage.write_metadata(
        target / "metadata.json", {key: value for key, value in described.items() if value != ""}
    )
    return target


@pytest.fixture(scope="module")
def texture():
    """Pink and purple blots on which even an untrained network says now yes, now no."""
    rng = np.random.default_rng(4)
    depth = cv2.GaussianBlur(rng.random((400, 640)).astype(np.float32), (0, 0), 9)
    depth = ((depth - depth.min()) / (depth.max() - depth.min()))[..., None]
    return np.rint(np.array(TISSUE) * (1 - depth) + np.array(DARK) * depth).astype(np.uint8)


def tiles_by_network(folder, rgb, places, side):
    """What the network itself says of each tile, without anything of this command."""
    net, _ = storage.load_segmentation(folder / "segmenter.safetensors", folder / "metadata.json")
    with torch.inference_mode():
        for x, y in places:
            image = torch.from_numpy(rgb[y : y + side, x : x + side] / np.float32(255))
            yield torch.sigmoid(net(image.permute(2, 0, 1)[None]))[0, 0].numpy()


def test_where_one_tile_lies_the_map_is_what_the_network_says_and_between_tiles_between_them(
    tmp_path, folder, texture
):
    path = tmp_path / "case.png"
    Image.fromarray(texture).save(path)
    words = ["--model", str(folder), "--out", str(tmp_path / "out"), "--torch-threads", "1"]
    assert main(["predict", str(path), *words, "--mpp", "0.5", "--probability"]) == 0
    found = tifffile.imread(tmp_path / "out" / "case.probability.tif") / 255
    # A stride of 192, the last tile at the edge.
    places = [(x, y) for y in (0, 144) for x in (0, 192, 384)]
    low, high = np.full(found.shape, np.inf), np.full(found.shape, -np.inf)
    count = np.zeros(found.shape, int)
    for (x, y), answer in zip(places, tiles_by_network(folder, texture, places, 256), strict=True):
        part = np.s_[y : y + 256, x : x + 256]
        low[part] = np.minimum(low[part], answer)
        high[part] = np.maximum(high[part], answer)
        count[part] += 1
    assert (count >= 1).all()
    alone = count == 1
    half = 0.5 / 255 + 1e-4
    assert np.abs(found - low)[alone].max() <= half
    assert ((found >= low - half) & (found <= high + half)).all()
    assert found.std() > 0.01, "the network says more than one thing"
    facts = json.loads((tmp_path / "out" / "case.json").read_text())
    assert facts["slide"]["mpp_source"] == "--mpp"
    assert facts["model"]["weights_sha256"] == storage.file_digest(folder / "segmenter.safetensors")
    assert facts["model"]["index_fingerprint"] == "f" * 64
    mask = tifffile.imread(tmp_path / "out" / "case.mask.tif")
    assert facts["area"]["positive_um2"] == pytest.approx(np.count_nonzero(mask) / 4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "case.png: no resolution in the file; give --mpp"),
        (["--mpp", "30"], "case.png: --mpp 30 is outside 0.05 to 20 um/px; correct it"),
        (["--mpp", "2"], "case.png: 2 um/px is coarser than the 0.5"),
        (["--mpp", "0.5", "--model-mpp", "0.5"], "--model-mpp 0.5: the model says 0.5 itself"),
        (["--mpp", "0.5", "--precision", "bf16", "--device", "cpu"], "--precision bf16: for a GPU"),
    ],
)
def test_errors_of_the_command_are_one_line(tmp_path, folder, texture, caplog, words, said):
    path = tmp_path / "case.png"
    Image.fromarray(texture[:64, :90]).save(path)
    out = tmp_path / "out"
    assert main(["predict", str(path), "--model", str(folder), "--out", str(out), *words]) == 1
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert line.startswith(said)
    assert "pairs.tsv" not in line
    assert not out.exists() or not list(out.iterdir())


def test_a_model_that_does_not_say_its_resolution(tmp_path, folder):
    old = with_metadata(folder, tmp_path / "old", mpp="", tile_px="")
    device = torch.device("cpu")
    with pytest.raises(TrainingError, match=r"does not say at what um/px .* give --model-mpp"):
        load_model(old, device, "float32", None)
    model = load_model(old, device, "float32", 0.46)
    assert (model.mpp, model.mpp_max, model.tile_px) == (0.46, 0.46, 512)
    mixed = with_metadata(folder, tmp_path / "mixed", mpp=0.46, mpp_max=0.92)
    model = load_model(mixed, device, "float32", None)
    assert (model.mpp, model.mpp_max, model.tile_px) == (0.46, 0.92, 256)


@pytest.mark.parametrize("value", [-1, 0, "0.5", True, float("nan"), [0.5]])
def test_a_resolution_in_the_metadata_that_is_none(tmp_path, folder, value):
    broken = with_metadata(folder, tmp_path / "broken", mpp=value)
    with pytest.raises(TrainingError, match=r"mpp is .*, no positive number"):
        load_model(broken, torch.device("cpu"), "float32", None)


def test_a_folder_without_a_model(tmp_path, folder):
    device = torch.device("cpu")
    with pytest.raises(TrainingError, match="no such folder; name where train_segmentation"):
        load_model(tmp_path / "none", device, "float32", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainingError, match=r"metadata.json: no such file"):
        load_model(tmp_path / "empty", device, "float32", None)
    cut = with_metadata(folder, tmp_path / "cut")
    (cut / "segmenter.safetensors").write_bytes(b"half")
    with pytest.raises(TrainingError, match="damaged"):
        load_model(cut, device, "float32", None)


def test_places_that_cannot_be(tmp_path, texture):
    path = tmp_path / "case.mask.tif"
    write_slide(path, texture)
    with pytest.raises(SlideError, match="no such file; name a slide"):
        predict._outputs(tmp_path / "none.svs", tmp_path)
    with pytest.raises(SlideError, match="no such file"):
        predict._outputs(tmp_path, tmp_path)
    with pytest.raises(ConfigError, match="is no folder"):
        predict._outputs(path, path / "below")
    (tmp_path / "case.mask.json").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        predict._outputs(path, tmp_path)
    (tmp_path / "case.mask.json").rmdir()
    (tmp_path / "case.mask.mask.tif").symlink_to(path)
    with pytest.raises(ConfigError, match="over the slide"):
        predict._outputs(path, tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--threshold", "1"], "'1' is not between 0 and 1"),
        (["--threshold", "nan"], "is not a positive number"),
        (["--min-area-um2", "-3"], "is not a positive number"),
        (["--batch-size", "0"], "is not a whole number"),
    ],
)
def test_wrong_flags(capsys, words, said):
    with pytest.raises(SystemExit):
        main(["predict", "x.svs", "--model", "x", *words])
    assert said in capsys.readouterr().err
    assert predict._area("0") == 0
    with pytest.raises(argparse.ArgumentTypeError):
        predict._share("2")


def test_a_real_slide_and_a_real_image(tmp_path, folder, images):
    """The network is untrained; the files are right."""
    own = with_metadata(folder, tmp_path / "model", tile_px=512)
    svs = images / "wsi" / "CMU-1-Small-Region.svs"
    (png,) = (images / "bci_pairs_1024" / "HE" / "test").glob("00820*")
    for path, size, words in ((svs, (2220, 2967), []), (png, (1024, 1024), ["--mpp", "0.46"])):
        given = [str(path), "--model", str(own), "--out", str(tmp_path / "out"), *words]
        assert main(["predict", *given]) == 0
        facts = json.loads((tmp_path / "out" / f"{path.stem}.json").read_text())
        with tiffslide.TiffSlide(tmp_path / "out" / f"{path.stem}.mask.tif") as mask:
            assert mask.dimensions == size
            assert float(mask.properties["tiffslide.mpp-x"]) == pytest.approx(
                facts["slide"]["mpp"], rel=1e-6
            )
        assert 0 < facts["area"]["tissue_um2"] <= size[0] * size[1] * facts["map"]["mpp"] ** 2
        assert facts["tiles"]["unreadable"] == 0
