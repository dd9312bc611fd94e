"""Maps known beforehand, because the model is a formula: dark is positive.

On a slide of pink with purple rectangles the mask, its areas and the corners of its regions are
known by hand.
"""

import dataclasses
import errno
import json
import os
import tracemalloc

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from hemera.errors import ConfigError, SlideError, TrainingError
from hemera.imaging import outlines
from hemera.imaging.slide import open_slide
from hemera.inference import whole_slide
from hemera.inference.model import Model
from hemera.inference.options import PredictOptions
from hemera.inference.whole_slide import grid_of, predict_slide
from tests.small_slides import damage_tile, write_pyramid
from tests.small_units import tissue

BACKGROUND, TISSUE, DARK = (240, 242, 243), (222, 150, 190), (90, 40, 120)
KINDS = {
    "mask": ".mask.tif",
    "probability": ".probability.tif",
    "regions": ".positive.geojson",
    "overlay": ".overlay.png",
    "facts": ".json",
}


def dark(tiles):
    """Stands in for the network: sure of what is dark, and sure of what is not."""
    return np.where(tiles[..., 0] < 150, 0.9, 0.1).astype(np.float32)


def slide_of(size, boxes, margin=0):
    """Tissue with dark boxes (x0, y0, x1, y1), and a margin of background."""
    rgb = np.empty((size[1], size[0], 3), np.uint8)
    rgb[:] = BACKGROUND
    rgb[margin : size[1] - margin, margin : size[0] - margin] = TISSUE
    for x0, y0, x1, y1 in boxes:
        rgb[y0:y1, x0:x1] = DARK
    return rgb


def write_slide(path, rgb, mpp=0.5):
    return write_pyramid(path, [rgb], (mpp, mpp))


def model_of(segment=dark, tile_px=128, mpp=0.5, mpp_max=None):
    return Model(lambda tiles: lambda: segment(tiles), tile_px, mpp, mpp_max or mpp)


def run(path, out, model=None, mpp=None, **options):
    """Predict; return the files by kind."""
    with open_slide(path, mpp=mpp) as slide:
        folder = predict_slide(slide, model or model_of(), out, PredictOptions(**options))
    return {kind: folder / f"{folder.name}{suffix}" for kind, suffix in KINDS.items()}


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
    # Regions come from the top.
    small, holed, last = polygons_of(outputs)
    assert [corners(ring) for ring in small] == [box(400, 30, 409, 38)]
    assert [corners(ring) for ring in holed] == [box(90, 70, 300, 260), box(150, 120, 250, 200)]
    assert [corners(ring) for ring in last] == [box(500, 380, 701, 433)]
    pixels = 9 * 8 + 210 * 190 - 100 * 80 + 201 * 53
    facts = facts_of(outputs)
    assert facts["area"] == {
        "tissue_um2": 701 * 433 / 4,
        "positive_um2": pixels / 4,
        "positive_fraction": pixels / (701 * 433),
    }
    assert facts["regions"] == {
        "count": 3, "area_um2": pixels / 4, "min_area_um2": 16, "left_out": 0,
        "pixel_mpp": pytest.approx(0.5),
    }  # fmt: skip
    # A stride of 96 px, the last tile at the edge: 0, 96, ..., 573 and 0, ..., 305.
    assert facts["tiles"] == {"grid": 7 * 5, "tissue": 7 * 5, "unreadable": 0}
    assert (facts["map"]["width_px"], facts["map"]["height_px"]) == (701, 433)
    assert (facts["slide"]["width_px"], facts["slide"]["mpp"]) == (701, pytest.approx(0.5))


def test_tiles_are_divided_by_the_background_of_their_slide_where_the_model_was(tmp_path):
    path = write_slide(tmp_path / "case.tif", slide_of((300, 260), [], margin=60))
    seen = {False: [], True: []}
    for normalised, tiles in seen.items():

        def segment(batch, tiles=tiles):
            tiles.append(batch.reshape(-1, 3).max(axis=0).tolist())
            return dark(batch)

        model = dataclasses.replace(model_of(segment), normalise_background=normalised)
        run(path, tmp_path / str(normalised), model)
    assert [255, 255, 255] in seen[True]
    assert list(BACKGROUND) in seen[False] and [255, 255, 255] not in seen[False]


def test_small_regions_leave_the_geojson_and_nothing_else(tmp_path):
    rgb = slide_of((300, 200), [(20, 20, 30, 30), (100, 40, 140, 90)])
    path = write_slide(tmp_path / "case.tif", rgb)
    # The first is 100 px of 0.25 um2.
    outputs = run(path, tmp_path / "out", min_area_um2=25.01)
    document = json.loads(outputs["regions"].read_text())
    (feature,) = document["features"]
    assert (document["type"], feature["type"]) == ("FeatureCollection", "Feature")
    assert feature["properties"]["objectType"] == "annotation"
    assert feature["properties"]["classification"]["name"] == "HER2 positive"
    assert feature["geometry"]["type"] == "Polygon"
    assert corners(feature["geometry"]["coordinates"][0]) == box(100, 40, 140, 90)
    facts = facts_of(outputs)
    assert facts["regions"]["left_out"] == 1
    assert facts["regions"]["area_um2"] == 500
    assert facts["area"]["positive_um2"] == 525
    assert np.count_nonzero(tifffile.imread(outputs["mask"])) == 2100
    assert len(polygons_of(run(path, tmp_path / "other", min_area_um2=25))) == 2


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


def test_a_pyramid_is_taken_at_the_level_that_is_near(tmp_path):
    """0.25 and 0.51 um/px: the second level is what a model of 0.5 sees, as it is stored."""
    rgb = slide_of((800, 600), [(200, 100, 520, 240)])
    path = write_pyramid(tmp_path / "case.tif", [rgb, rgb[::2, ::2]], (0.255, 0.255))
    seen = []

    def segment(tiles):
        seen.append(np.unique(tiles.reshape(-1, 3), axis=0))
        return dark(tiles)

    outputs = run(path, tmp_path / "out", model_of(segment))
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


def test_only_tiles_with_tissue_are_segmented_and_off_it_nothing_is_positive(tmp_path):
    """The model says yes to everything; glass stays 0, and most of it is never read."""
    rgb = slide_of((1200, 704), [])
    rgb[:] = BACKGROUND
    rgb[208:512, 96:480] = TISSUE
    path = write_slide(tmp_path / "case.tif", rgb)
    segmented = 0

    def segment(tiles):
        nonlocal segmented
        segmented += len(tiles)
        return np.ones(tiles.shape[:3], np.float32)

    outputs = run(path, tmp_path / "out", model_of(segment))
    facts = facts_of(outputs)
    assert segmented == facts["tiles"]["tissue"] < facts["tiles"]["grid"] / 2
    assert facts["area"]["positive_fraction"] == 1
    mask = tifffile.imread(outputs["mask"])
    # The outline is found at 8 um/px, of which 96, 480, 208 and 512 px are whole numbers.
    assert (mask[208:512, 96:480] == 255).all()
    mask[208:512, 96:480] = 0
    assert not mask.any()
    assert facts["area"]["positive_um2"] == facts["area"]["tissue_um2"]


def test_a_slide_of_glass_gives_an_empty_map_and_no_share(tmp_path, caplog):
    path = write_slide(tmp_path / "glass.tif", slide_of((700, 300), [], margin=350))
    outputs = run(path, tmp_path / "out", probability=True)
    assert "no tissue found" in caplog.text
    for kind in ("mask", "probability"):
        assert tifffile.imread(outputs[kind]).shape == (300, 700)
        assert not tifffile.imread(outputs[kind]).any()
    assert polygons_of(outputs) == []
    facts = facts_of(outputs)
    assert facts["area"] == {"tissue_um2": 0, "positive_um2": 0, "positive_fraction": None}
    with Image.open(outputs["overlay"]) as picture:
        assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) == 1


# Files as others see them


@pytest.mark.parametrize(
    ("colours", "said"),
    [
        (((205, 190, 175), (110, 80, 60)), "is IHC by its colours"),
        (((190, 190, 190), (90, 90, 90)), "is gray"),
    ],
)
def test_a_slide_that_is_not_of_he_is_refused_unless_it_is_said_to_be_one(tmp_path, colours, said):
    rgb = tissue(np.random.default_rng(1), 300, 420, colours)
    path = write_slide(tmp_path / "s.tif", rgb, mpp=2.0)
    with pytest.raises(SlideError, match=f"s.tif: .*{said}.*--any-stain"):
        run(path, tmp_path / "out", model_of(mpp=2.0))
    assert not (tmp_path / "out").exists()
    assert facts_of(run(path, tmp_path / "out", model_of(mpp=2.0), any_stain=True))["map"]


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
    tint = 0.7 * np.array(DARK) + 0.3 * np.array(whole_slide.COLOR)
    assert np.abs(picture[far] - tint).max() <= 1


def test_the_same_slide_gives_the_same_bytes(tmp_path):
    path = write_slide(tmp_path / "case.tif", slide_of((501, 390), [(90, 70, 300, 260)]))
    first = run(path, tmp_path / "a", workers=1, batch_size=1, probability=True)
    second = run(path, tmp_path / "b", workers=4, batch_size=5, probability=True)
    for kind in KINDS:
        assert first[kind].read_bytes() == second[kind].read_bytes(), kind


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_an_interrupted_run_leaves_nothing(tmp_path, fault):
    path = write_slide(tmp_path / "case.tif", slide_of((300, 700), [(100, 40, 140, 90)]))
    turns = 0

    def segment(tiles):
        nonlocal turns
        turns += 1
        if turns == 8:
            raise fault
        return dark(tiles)

    with pytest.raises(type(fault)):
        run(path, tmp_path / "out", model_of(segment), batch_size=1)
    assert not list((tmp_path / "out").iterdir())


def test_results_that_exist_are_not_replaced(tmp_path):
    path = write_slide(tmp_path / "case.ome.tif", slide_of((300, 200), [(100, 40, 140, 90)]))
    outputs = run(path, tmp_path / "out")
    before = {entry: entry.read_bytes() for entry in outputs["mask"].parent.iterdir()}
    assert sorted(entry.relative_to(tmp_path / "out").as_posix() for entry in before) == [
        "case/case.json", "case/case.mask.tif", "case/case.overlay.png",
        "case/case.positive.geojson",
    ]  # fmt: skip

    def segment(tiles):
        raise AssertionError("an hour later")

    with pytest.raises(ConfigError, match="is not empty"):
        run(path, tmp_path / "out", model_of(segment))
    assert {entry: entry.read_bytes() for entry in outputs["mask"].parent.iterdir()} == before


@pytest.mark.parametrize("name", ["-a b'\"<&>\n%s{}\N{GREEK SMALL LETTER MU}.tif", b"\xff\x01.tif"])
def test_hostile_names(tmp_path, name):
    path = tmp_path / os.fsdecode(name)
    write_slide(tmp_path / "case.tif", slide_of((300, 200), [(100, 40, 140, 90)]))
    (tmp_path / "case.tif").rename(path)
    outputs = run(path, tmp_path / "out", probability=True)
    assert facts_of(outputs)["slide"]["file"] == path.name
    assert len(polygons_of(outputs)) == 1
    with tifffile.TiffFile(outputs["mask"]) as file:
        assert tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]["Pixels"]["SizeX"] == 300


def test_a_part_that_cannot_be_read_is_a_hole_that_is_counted(tmp_path, caplog):
    """One stored tile of 128 px: 4 of 12 x 8 tiles touch it, and what they alone cover is lost."""
    rgb = slide_of((1184, 800), [(480, 380, 620, 430), (900, 600, 1000, 700)])
    path = write_slide(tmp_path / "case.tif", rgb)
    damage_tile(path, 3 * 10 + 4)
    outputs = run(path, tmp_path / "out")
    facts = facts_of(outputs)
    # x 512 to 640 is in the tiles from 480 and 576 alone; y 384 to 512 in those from 288, 384, 480.
    assert facts["tiles"] == {"grid": 12 * 8, "tissue": 12 * 8, "unreadable": 2 * 3}
    # Lost: x 512 (the tile from 384 ends) to 672 (that from 672 begins), y 320 to 576.
    mask = tifffile.imread(outputs["mask"])
    assert not mask[320:576, 512:672].any()
    assert (mask[380:430, 480:512] == 255).all()
    positive = 32 * 50 + 100 * 100
    assert facts["area"]["positive_um2"] == positive / 4
    # Of the tissue, that which was seen: what is lost beside the stored tile is tissue, too.
    assert facts["area"]["positive_fraction"] == positive / (1184 * 800 - 160 * 256)
    assert "6 of 96 tiles cannot be read and are holes" in caplog.text


def test_outlines_of_a_reduced_mask(tmp_path, monkeypatch):
    """A factor of 4: areas and mask are counted before, regions lie on every fourth pixel."""
    monkeypatch.setattr(outlines, "PIXELS_MAX", 30_000)
    rgb = slide_of((701, 433), [(100, 72, 300, 260), (400, 38, 608, 70)])
    outputs = run(write_slide(tmp_path / "case.tif", rgb), tmp_path / "out")
    assert (tifffile.imread(outputs["mask"]) == np.where(rgb[..., 0] < 150, 255, 0)).all()
    shifted, exact = polygons_of(outputs)
    assert [corners(ring) for ring in exact] == [box(100, 72, 300, 260)]
    # A reduced pixel is positive when half of it is.
    assert [corners(ring) for ring in shifted] == [box(400, 36, 608, 72)]
    facts = facts_of(outputs)
    assert facts["area"]["positive_um2"] == (200 * 188 + 208 * 32) / 4
    assert facts["regions"]["area_um2"] == (200 * 188 + 208 * 36) / 4
    assert facts["regions"]["pixel_mpp"] == pytest.approx(2.0)


def test_a_slide_with_too_many_holes_is_refused(tmp_path):
    path = write_slide(tmp_path / "case.tif", slide_of((1184, 800), []))
    for index in (34, 38, 54):
        damage_tile(path, index)
    with pytest.raises(SlideError, match=r"tiles cannot be read, over 10%; the first: case.tif"):
        run(path, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_an_answer_that_is_no_number_is_refused(tmp_path):
    path = write_slide(tmp_path / "case.tif", slide_of((300, 200), []))
    with pytest.raises(TrainingError, match="not finite; give --precision float32"):
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


# Memory


def test_memory_grows_with_the_width_alone(tmp_path, monkeypatch):
    """A map four times as high takes no more; most of it are the sums, one row of tiles of floats.

    Measured without the slide's own reader, whose cache has a bound of its own.
    """

    class Plain:
        def __init__(self, size):
            self.size_px, self.mpp, self.level_mpps = size, 0.5, (0.5,)
            self.background, self.mpp_source = BACKGROUND, "made"

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

    def peak(name, width, height):
        Plain.path = tmp_path / name
        tracemalloc.start()
        predict_slide(
            Plain((width, height)),
            model_of(tile_px=512),
            tmp_path,
            PredictOptions(workers=1, batch_size=2, any_stain=True),
        )
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    # Of the mask for the outlines, a bounded number of pixels.
    monkeypatch.setattr(outlines, "PIXELS_MAX", 1_000_000)
    width = 6000
    low, high = peak("low", width, 3000), peak("high", width, 12000)
    assert high < 1.05 * low
    # 4 bytes of each of 512 + 128 rows, and the bands and rows of stored tiles in preparation.
    assert high < width * 8000 + 30 * 2**20
