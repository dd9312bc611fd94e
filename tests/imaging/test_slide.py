import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile

from hemera.errors import SlideError
from hemera.imaging.resample import area_resample
from hemera.imaging.slide import open_slide
from tests.small_slides import damage_tile, halves, picture, write_image, write_pyramid


@pytest.fixture
def pyramid(rng, tmp_path):
    first = picture(rng)
    levels = [first, halves(first), halves(halves(first))]
    return write_pyramid(tmp_path / "slide.tif", levels), levels


def error_of(path, **keywords):
    """The message of opening a file; in one line, it begins with the name of the file."""
    with pytest.raises(SlideError, match=rf"^{path.name}[^\n]*$") as caught:
        open_slide(path, **keywords)
    return str(caught.value)


def test_a_pyramid_is_read_as_it_was_written(pyramid):
    path, levels = pyramid
    with open_slide(path) as slide:
        assert slide.size_px == (702, 505)
        assert slide.level_sizes == ((702, 505), (351, 252), (175, 126))
        assert slide.level_downsamples == ((1, 1), (2, 2), (4, 4))
        assert slide.mpp == pytest.approx(0.9, rel=1e-5)
        assert slide.level_mpps == pytest.approx((0.9, 1.8, 3.6), rel=1e-5)
        for level, pixels in enumerate(levels):
            part = slide.read_level(level, 30, 41, 90, 70)
            assert (part == pixels[41:111, 30:120]).all()


def test_between_levels_the_finer_is_averaged_exactly(pyramid):
    path, levels = pyramid
    with open_slide(path) as slide:
        part = slide.read(60.5, 41.25, 70, 50, slide.mpp * 3)
        expected = area_resample(levels[1], (60.5 / 2, 41.25 / 2), (1.5, 1.5), (70, 50))
    assert np.abs(part.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("factor", [1.0, 1.3, 2.0, 2.7, 4.4, 0.8])
def test_a_ramp_stays_in_place_at_any_resolution(tmp_path, factor):
    x = np.arange(600) * 0.4
    ramp = np.repeat(np.repeat(x[None, :, None], 500, axis=0), 3, axis=2)
    levels = [np.rint(ramp).astype(np.uint8)]
    levels.append(np.rint(ramp.reshape(250, 2, 300, 2, 3).mean(axis=(1, 3))).astype(np.uint8))
    write_pyramid(tmp_path / "ramp.tif", levels, (0.5, 0.5))
    with open_slide(tmp_path / "ramp.tif") as slide:
        part = slide.read(101.37, 50.6, 60, 40, slide.mpp * factor)
    centres = 101.37 + (np.arange(60) + 0.5) * factor
    error = part[20, :, 0] - 0.4 * (centres - 0.5)
    assert np.abs(error).max() < 1.01
    assert abs(error.mean()) < 0.3  # rounding; where it counts, half a pixel is 0.4 and more


def test_outside_is_background(pyramid):
    path, levels = pyramid
    with open_slide(path) as slide:
        assert slide.background == (241, 241, 241)
        part = slide.read(-20, -10, 100, 60, slide.mpp)
        assert (part[:10] == 241).all()
        assert (part[:, :20] == 241).all()
        assert (part[10:, 20:] == levels[0][:50, :80]).all()
        assert (slide.read(5000, 5000, 40, 30, slide.mpp) == 241).all()
        assert (slide.read(690.3, 500.2, 40, 30, slide.mpp * 2.5)[10:] == 241).all()


def test_overview_covers_the_slide_from_edge_to_edge(pyramid):
    path, levels = pyramid
    with open_slide(path) as slide:
        view, (mpp_x, mpp_y) = slide.overview(mpp=9.0)
        assert view.shape == (51, 71, 3)
        assert mpp_x * view.shape[1] == pytest.approx(702 * slide.mpp)
        assert mpp_y * view.shape[0] == pytest.approx(505 * slide.mpp)
        assert (slide.overview(side_px=5000)[0] == levels[0]).all()
        assert (slide.overview(side_px=1024)[0] == levels[0]).all()
    # From level 2, whose pixels are four of level 0 wide: the slide ends within its last.
    steps = 702 / 4 / view.shape[1], 505 / 4 / view.shape[0]
    area = area_resample(levels[2], (0, 0), steps, view.shape[1::-1])
    assert np.abs(view.astype(int) - area).max() <= 1


def test_a_damaged_tile_is_white_in_the_overview_and_many_are_an_error(rng, tmp_path, caplog):
    rgb = picture(rng)
    path = write_pyramid(tmp_path / "slide.tif", [rgb], compression="jpeg")
    with open_slide(path) as slide:
        whole, _ = slide.overview(side_px=702)
    damage_tile(path, 8)  # row 1, column 2
    with open_slide(path) as slide:
        view, _ = slide.overview(side_px=702)
    damaged = np.zeros(rgb.shape[:2], bool)
    damaged[128:256, 256:384] = True
    assert (view[damaged] == 255).all()
    assert (view[~damaged] == whole[~damaged]).all()
    assert "16384 px are white" in caplog.text
    for index in (1, 2, 3):
        damage_tile(path, index)
    with open_slide(path) as slide, pytest.raises(SlideError, match="over 10%"):
        slide.overview(side_px=702)


# Resolution


def test_the_sheet_overrides_the_file_with_a_warning(pyramid, caplog):
    path, _ = pyramid
    with caplog.at_level(logging.WARNING), open_slide(path, mpp=0.25) as slide:
        assert (slide.mpp, slide.mpp_source) == (0.25, "sheet")
    assert "the sheet's is used" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING), open_slide(path, mpp=0.92) as slide:
        assert slide.mpp == 0.92
    assert not caplog.text


def test_no_resolution(rng, tmp_path):
    path = write_pyramid(tmp_path / "17_HE.tif", [picture(rng)], None)
    assert error_of(path) == "17_HE.tif: no resolution in the file; give he_mpp in the sheet"
    assert "give her2_mpp" in error_of(path, mpp_column="her2_mpp")
    with open_slide(path, mpp=0.5) as slide:
        assert slide.mpp == 0.5


@pytest.mark.parametrize("value", [(20_000, 0), (0, 0), (0, 1)])
@pytest.mark.parametrize("reader", ["tiff", "openslide"])
def test_a_resolution_that_is_not_a_number(rng, tmp_path, value, reader):
    path = write_pyramid(tmp_path / "none.tif", [picture(rng)], (0.5, 0.5))
    with tifffile.TiffFile(path, mode="r+") as file:
        for code in (282, 283):
            file.pages[0].tags[code].overwrite(value)
    assert "no resolution in the file; give he_mpp" in error_of(path, reader=reader)


@pytest.mark.parametrize(
    ("mpp", "message"),
    [
        ((0.5, 0.6), "0.5 um/px along x but 0.6 along y (tiff.XResolution)"),
        ((350.0, 350.0), "outside 0.05 to 20; give he_mpp in the sheet"),
    ],
)
def test_implausible_resolutions(rng, tmp_path, mpp, message):
    path = write_pyramid(tmp_path / "odd.tif", [picture(rng)], mpp)
    assert message in error_of(path)
    with open_slide(path, mpp=0.5) as slide:
        assert slide.mpp == 0.5
    # What a camera or a screen writes is not the resolution of the section.
    screen = write_image(tmp_path / "screen.png", picture(rng), dpi=(96, 96))
    assert "264.6 um/px (dpi) is outside" in error_of(screen)


# Damage, threads and processes


def test_truncated_tiff(pyramid):
    path, _ = pyramid
    whole = path.read_bytes()
    for length in (6, 400, len(whole) // 2):
        path.write_bytes(whole[:length])
        with (
            pytest.raises(SlideError, match=r"^slide\.tif[^\n]*$"),
            open_slide(path, mpp=0.9) as slide,
        ):
            slide.read_level(0, 0, 0, 702, 505)


THREADS = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from hemera.errors import SlideError
from hemera.imaging.slide import open_slide

path, reader = Path(sys.argv[1]), sys.argv[2]
healthy = [(10, 10), (400, 20), (20, 300), (530, 390), (140, 260), (390, 130)]

with open_slide(path, reader=reader) as slide:
    expected = [slide.read_level(0, x, y, 110, 100) for x, y in healthy]

    def read(turn):
        if turn % 3 == 0:
            try:
                slide.read_level(0, 260, 130, 50, 40)
            except SlideError:
                return "broken"
            return "a broken tile was read"
        place = turn % len(healthy)
        x, y = healthy[place]
        part = slide.read_level(0, x, y, 110, 100)
        return "healthy" if np.array_equal(part, expected[place]) else "wrong pixels"

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(read, range(1200)))
print(found.count("broken"), found.count("healthy"))
"""


@pytest.mark.parametrize("reader", ["tiff", "openslide", "tiffslide"])
def test_a_broken_tile_costs_no_other_thread_its_read(rng, tmp_path, reader):
    path = write_pyramid(tmp_path / "slide.tif", [picture(rng)], compression="jpeg")
    damage_tile(path, 8)
    # In a process of its own: a handle closed while it reads ends the process by SIGABRT.
    done = subprocess.run(
        [sys.executable, "-c", THREADS, str(path), reader],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["400", "800"]


def test_real_svs_equals_openslide(images):
    path = images / "wsi" / "CMU-1-Small-Region.svs"
    with openslide.OpenSlide(path) as reference, open_slide(path) as slide:
        assert slide.mpp == 0.499
        assert slide.size_px == (2220, 2967)
        for x, y, *size in ((0, 0, 512, 400), (1001, 700, 333, 555), (1900, 2700, 320, 267)):
            expected = np.asarray(reference.read_region((x, y), 0, size))[..., :3]
            assert (slide.read_level(0, x, y, *size) == expected).all()


@pytest.mark.parametrize("reader", ["tiff", "tiffslide"])
def test_real_pyramids_are_read_exactly_at_every_level(images, reader):
    path = images / "wsi_derived" / "0_HE_val.tif"
    with tifffile.TiffFile(path) as file, open_slide(path, reader=reader) as slide:
        assert slide.mpp == pytest.approx(4.6, rel=1e-5)
        assert [down[0] for down in slide.level_downsamples] == [1, 2, 4, 8]
        for level, page in enumerate(file.pages):
            part = slide.read_level(level, 21, 13, 101, 70)
            assert (part == page.asarray()[13:83, 21:122]).all()
