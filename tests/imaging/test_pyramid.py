"""Pyramids, as four readers see them."""

import tracemalloc

import cv2
import numpy as np
import openslide
import pytest
import tifffile
import tiffslide

from hemera.imaging.pyramid import TILE_PX, tile_count, write_pyramid
from hemera.imaging.slide import open_slide

MPP = 0.2527


def smooth(rng, width, height):
    """Colours that vary slowly, so that JPEG keeps them to a level or two."""
    noise = rng.integers(90, 220, (height // 20 + 2, width // 20 + 2, 3), dtype=np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def whole_tiles(image):
    across, down = tile_count((image.shape[1], image.shape[0]))
    margin = ((0, down * TILE_PX - image.shape[0]), (0, across * TILE_PX - image.shape[1]))
    padded = np.pad(image, margin + ((0, 0),) * (image.ndim - 2), mode="edge")
    for row in range(down):
        for column in range(across):
            top, left = row * TILE_PX, column * TILE_PX
            yield padded[top : top + TILE_PX, left : left + TILE_PX]


def halved(image):
    """The mean of each four pixels; an odd last row or column is dropped."""
    height, width = (side // 2 * 2 for side in image.shape[:2])
    four = image[:height, :width].reshape(height // 2, 2, width // 2, 2, *image.shape[2:])
    return four.astype(float).mean(axis=(1, 3))


def seen(path):
    """What each reader says: (sizes, mpp, pixels of each level)."""
    with openslide.OpenSlide(path) as slide:
        levels = [
            np.asarray(slide.read_region((0, 0), n, size).convert("RGB"))
            for n, size in enumerate(slide.level_dimensions)
        ]
        yield "openslide", slide.level_dimensions, slide.properties["openslide.mpp-x"], levels
    with tiffslide.TiffSlide(path) as slide:
        levels = [
            np.asarray(slide.read_region((0, 0), n, size, as_array=True))
            for n, size in enumerate(slide.level_dimensions)
        ]
        yield "tiffslide", slide.level_dimensions, slide.properties["tiffslide.mpp-y"], levels
    with tifffile.TiffFile(path) as file:
        (series,) = file.series
        assert series.kind == "ome"
        levels = [level.asarray() for level in series.levels]
        sizes = tuple((level.shape[1], level.shape[0]) for level in levels)
        pixels = tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]["Pixels"]
        assert (pixels["SizeX"], pixels["SizeY"]) == sizes[0]
        assert pixels["PhysicalSizeX"] == pixels["PhysicalSizeY"]
        yield "tifffile", sizes, pixels["PhysicalSizeX"], levels
    with open_slide(path) as slide:
        levels = [slide.read_level(n, 0, 0, *size) for n, size in enumerate(slide.level_sizes)]
        yield "hemera", slide.level_sizes, slide.mpp, levels


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        ((1700, 1101), ((1700, 1101), (850, 550), (425, 275))),
        # A column and a row of one pixel that are tiles of their own, and vanish when halved.
        ((2049, 1025), ((2049, 1025), (1024, 512), (512, 256))),
        # Two tiles of which the second is nearly empty on the next level.
        ((1030, 300), ((1030, 300), (515, 150), (257, 75))),
        ((512, 512), ((512, 512),)),
        ((90, 31), ((90, 31),)),
        ((1, 700), ((1, 700),)),
    ],
)
def test_every_reader_sees_every_level_and_the_resolution(tmp_path, rng, size, sizes):
    image = smooth(rng, *size)
    path = tmp_path / "made.ome.tif"
    write_pyramid(path, whole_tiles(image), size_px=size, mpp=MPP, quality=95)
    expected = [image.astype(float)]
    while len(expected) < len(sizes):
        expected.append(halved(expected[-1]))
    for reader, found, mpp, levels in seen(path):
        assert tuple(found) == sizes, reader
        assert float(mpp) == pytest.approx(MPP, rel=1e-8), reader
        for level, truth in zip(levels, expected, strict=True):
            # JPEG costs 1.5; one pixel to the side would cost 2.2, 4.4 and 8.6 on the three levels.
            assert np.abs(level - truth).mean() < 2, reader
    assert [entry.name for entry in tmp_path.iterdir()] == ["made.ome.tif"]


def test_the_levels_are_pages_of_the_chain_and_subifds_of_the_first(tmp_path, rng):
    """The chain is what OpenSlide follows, SubIFDs of the OME plane what Bio-Formats does."""
    path = tmp_path / "made.ome.tif"
    image = smooth(rng, 2100, 1300)
    name = '<a> & "b" \u00b5'
    write_pyramid(path, whole_tiles(image), size_px=(2100, 1300), mpp=MPP, name=name)
    with tifffile.TiffFile(path) as file:
        assert file.is_bigtiff
        assert len(file.pages) == 4
        assert file.pages[0].subifds == tuple(page.offset for page in file.pages[1:])
        assert [page.subfiletype for page in file.pages] == [0, 1, 1, 1]
        for page in file.pages:
            assert (page.tilewidth, page.tilelength) == (512, 512)
            assert page.photometric == tifffile.PHOTOMETRIC.YCBCR
            assert page.tags["YCbCrSubSampling"].value == (1, 1)
        image_ = tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]
        assert image_["Name"] == name
        assert image_["Pixels"]["TiffData"] == {"IFD": 0, "PlaneCount": 1}


def test_one_channel_is_kept_as_it_is_on_every_level(tmp_path, rng):
    labels = np.kron(rng.choice([0, 3, 255], (30, 45)), np.ones((37, 29))).astype(np.uint8)
    height, width = labels.shape
    path = tmp_path / "mask.tif"
    write_pyramid(path, whole_tiles(labels), size_px=(width, height), mpp=1.0)
    with tifffile.TiffFile(path) as file:
        whole, half, *_ = file.series[0].levels
        np.testing.assert_array_equal(whole.asarray(), labels)
        np.testing.assert_array_equal(half.asarray(), labels[: height // 2 * 2 : 2, :-1:2])
        assert set(np.unique(file.series[0].levels[-1].asarray())) <= {0, 3, 255}
    with openslide.OpenSlide(path) as slide:
        region = np.asarray(slide.read_region((600, 500), 0, (300, 200)))
        np.testing.assert_array_equal(region[..., 0], labels[500:700, 600:900])
        assert slide.level_count == 3
    with tiffslide.TiffSlide(path) as slide:
        assert slide.level_count == 3


def test_the_same_tiles_give_the_same_bytes(tmp_path, rng):
    image = smooth(rng, 1300, 900)
    for name in ("a.tif", "b.tif"):
        write_pyramid(tmp_path / name, whole_tiles(image), size_px=(1300, 900), mpp=0.5)
    assert (tmp_path / "a.tif").read_bytes() == (tmp_path / "b.tif").read_bytes()


def test_memory_does_not_grow_with_the_height(tmp_path):
    """20,000 rows of 3,000 px are 180 MB, its coarser levels 60 MB."""
    peaks = []
    for height in (4000, 20_000):
        across, down = tile_count((3000, height))
        tile = np.full((TILE_PX, TILE_PX, 3), 230, np.uint8)
        tracemalloc.start()
        write_pyramid(
            tmp_path / "made.tif",
            (tile for _ in range(across * down)),
            size_px=(3000, height),
            mpp=0.25,
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 2**20
