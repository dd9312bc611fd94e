import io
import logging
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from hemera.errors import SlideError
from hemera.imaging.resample import area_resample
from hemera.imaging.slide import open_slide


def picture(rng, height=505, width=702):
    """Structures over a gradient, with glass on the right: no symmetry."""
    import cv2

    noise = cv2.GaussianBlur(rng.normal(size=(height, width, 3)).astype(np.float32), (0, 0), 2)
    y, x = np.mgrid[:height, :width]
    rgb = 150 + 200 * noise + np.stack([x / 20, y / 30, -x / 40], axis=-1)
    rgb[:, width * 3 // 4 :] = 241
    return np.clip(rgb, 0, 255).astype(np.uint8)


def halves(rgb):
    """The next level of a pyramid: two by two averaged, what does not divide dropped."""
    height, width = (side // 2 for side in rgb.shape[:2])
    return np.rint(
        rgb[: height * 2, : width * 2].reshape(height, 2, width, 2, 3).mean(axis=(1, 3))
    ).astype(np.uint8)


def write_pyramid(path, levels, mpp=(0.9, 0.9), *, subifds=False, compression="deflate"):
    keywords = {"tile": (128, 128), "photometric": "rgb", "compression": compression}
    if mpp is not None:
        keywords |= {"resolution": (1e4 / mpp[0], 1e4 / mpp[1]), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path) as writer:
        writer.write(levels[0], subifds=len(levels) - 1 if subifds else 0, **keywords)
        for level in levels[1:]:
            writer.write(level, subfiletype=1, **keywords)


@pytest.fixture
def pyramid(rng, tmp_path):
    first = picture(rng)
    levels = [first, halves(first), halves(halves(first))]
    path = tmp_path / "slide.tif"
    write_pyramid(path, levels)
    return path, levels


def png(path, rgb, **keywords):
    Image.fromarray(rgb).save(path, "PNG", **keywords)
    return path


def test_a_pyramid_is_read_as_it_was_written(pyramid):
    path, levels = pyramid
    with open_slide(path) as slide:
        assert slide.size_px == (702, 505)
        assert slide.level_sizes == ((702, 505), (351, 252), (175, 126))
        assert slide.level_downsamples == ((1, 1), (2, 2), (4, 4))
        assert slide.mpp == pytest.approx(0.9, rel=1e-5)
        assert slide.level_mpps == pytest.approx((0.9, 1.8, 3.6), rel=1e-5)
        for level, pixels_ in enumerate(levels):
            part = slide.read_level(level, 30, 41, 90, 70)
            assert (part == pixels_[41:111, 30:120]).all()


@pytest.mark.parametrize("reader", ["tiff", "openslide", "tiffslide"])
def test_readers_agree_at_level_0(pyramid, reader):
    path, levels = pyramid
    with open_slide(path, reader=reader) as slide:
        assert slide.reader == reader
        assert (slide.read(123, 77, 200, 150, slide.mpp) == levels[0][77:227, 123:323]).all()


@pytest.mark.parametrize("compression", ["jpeg", "deflate"])
def test_level_0_equals_openslide(rng, tmp_path, compression):
    path = tmp_path / "slide.tif"
    write_pyramid(path, [picture(rng)], compression=compression)
    with openslide.OpenSlide(path) as reference, open_slide(path) as slide:
        expected = np.asarray(reference.read_region((100, 60), 0, (411, 333)))[..., :3]
        assert (slide.read_level(0, 100, 60, 411, 333) == expected).all()


def test_an_mpp_of_a_level_is_that_level_untouched(pyramid):
    path, levels = pyramid
    with open_slide(path) as slide:
        part = slide.read(2 * 40, 2 * 30, 100, 80, slide.level_mpps[1])
        assert (part == levels[1][30:110, 40:140]).all()


def test_between_levels_the_finer_is_averaged_exactly(pyramid):
    path, levels = pyramid
    with open_slide(path) as slide:
        part = slide.read(60.5, 41.25, 70, 50, slide.mpp * 3)
        expected = area_resample(levels[1], 60.5 / 2, 41.25 / 2, 1.5, 1.5, 70, 50)
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


def test_outside_is_glass(pyramid):
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
        whole, _ = slide.overview(side_px=5000)
        assert (whole == levels[0]).all()
        again, effective = slide.overview(side_px=1024)
        assert (slide.overview(side_px=1024)[0] == again).all()
        assert slide.overview(side_px=1024)[1] == effective
    # From level 2, whose pixels are four of level 0 wide: the slide ends within its last.
    steps = 702 / 4 / view.shape[1], 505 / 4 / view.shape[0]
    area = area_resample(levels[2], 0, 0, *steps, view.shape[1], view.shape[0])
    assert np.abs(view.astype(int) - area).max() <= 1


def test_subifds_are_levels(rng, tmp_path):
    first = picture(rng)
    path = tmp_path / "sub.tif"
    write_pyramid(path, [first, halves(first)], subifds=True)
    with open_slide(path) as slide:
        assert len(slide.level_mpps) == 2
        assert (slide.read_level(1, 5, 7, 60, 50) == halves(first)[7:57, 5:65]).all()


def test_bytes_tell_what_an_image_is_not_its_name(rng, tmp_path):
    path = tmp_path / "00345_test_0.png"
    Image.fromarray(picture(rng)).save(path, "JPEG", quality=95)
    with open_slide(path, mpp=0.46) as slide:
        assert (slide.reader, slide.vendor) == ("image", "jpeg")
        expected = np.asarray(Image.open(path))
        assert (slide.read(3, 9, 200, 100, 0.46) == expected[9:109, 3:203]).all()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "TIFF"])
def test_plain_images(rng, tmp_path, kind):
    rgb = picture(rng, 60, 85)
    path = tmp_path / "image"
    Image.fromarray(rgb).save(path, kind, **({"lossless": True} if kind == "WEBP" else {}))
    with open_slide(path, mpp=0.5) as slide:
        assert (slide.read_level(0, 0, 0, 85, 60) == rgb).all()
        assert slide.mpp_source == "sheet"


def test_transparency_is_white(tmp_path):
    rgba = np.zeros((30, 41, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[:, :10, 3] = 255
    rgba[:, 10:20, 3] = 128
    path = tmp_path / "alpha.png"
    Image.fromarray(rgba).save(path)
    with open_slide(path, mpp=0.5) as slide:
        row = slide.read_level(0, 0, 0, 41, 30)[3]
    assert row[5].tolist() == [200, 0, 0]
    assert np.abs(row[15] - np.array([227, 127, 127])).max() <= 1
    assert row[30].tolist() == [255, 255, 255]


def test_gray_images_are_read(tmp_path):
    gray = np.arange(35 * 50, dtype=np.uint16).reshape(35, 50).astype(np.uint8)
    path = png(tmp_path / "gray.png", gray)
    with open_slide(path, mpp=1.0) as slide:
        assert (slide.read_level(0, 0, 0, 50, 35) == gray[..., None]).all()


def test_the_sheet_beats_the_file_and_says_so(pyramid, caplog):
    path, _ = pyramid
    with caplog.at_level(logging.WARNING), open_slide(path, mpp=0.25) as slide:
        assert (slide.mpp, slide.mpp_source) == (0.25, "sheet")
    assert "the sheet's is used" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING), open_slide(path, mpp=0.92) as slide:
        assert slide.mpp == 0.92
    assert not caplog.text


def error_of(path, **keywords):
    with pytest.raises(SlideError) as caught:
        open_slide(path, **keywords)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(path.name)
    return text


def test_no_resolution(rng, tmp_path):
    path = tmp_path / "17_HE.tif"
    write_pyramid(path, [picture(rng)], None)
    assert error_of(path) == "17_HE.tif: no resolution in the file; give he_mpp in pairs.tsv"
    assert "give her2_mpp" in error_of(path, mpp_column="her2_mpp")
    with open_slide(path, mpp=0.5) as slide:
        assert slide.mpp == 0.5
    # What a camera or a screen writes is no resolution.
    screen = tmp_path / "screen.png"
    Image.fromarray(picture(rng)).save(screen, dpi=(96, 96))
    assert "no resolution in the file" in error_of(screen)


@pytest.mark.parametrize("value", [(20_000, 0), (0, 0), (0, 1)])
@pytest.mark.parametrize("reader", ["tiff", "openslide", "tiffslide"])
def test_a_resolution_that_is_no_number(rng, tmp_path, value, reader):
    path = tmp_path / "none.tif"
    write_pyramid(path, [picture(rng)], (0.5, 0.5))
    with tifffile.TiffFile(path, mode="r+") as file:
        tags = file.pages[0].tags
        for code in (282, 283):
            tags[code].overwrite(value)
    assert "no resolution in the file; give he_mpp" in error_of(path, reader=reader)


def test_anisotropic_resolution(rng, tmp_path):
    path = tmp_path / "narrow.tif"
    write_pyramid(path, [picture(rng)], (0.5, 0.6))
    text = error_of(path)
    assert "0.5 um/px along x but 0.6 along y" in text
    assert "give he_mpp" in text
    with open_slide(path, mpp=0.5) as slide:
        assert slide.mpp == 0.5


def test_a_resolution_that_cannot_be(rng, tmp_path):
    path = tmp_path / "coarse.tif"
    write_pyramid(path, [picture(rng)], (350.0, 350.0))
    assert "outside 0.05 to 20 um/px; give he_mpp in pairs.tsv" in error_of(path)
    assert "he_mpp 0.001 is outside" in error_of(path, mpp=0.001)


def test_resolution_of_an_image(rng, tmp_path):
    path = tmp_path / "dpi.png"
    Image.fromarray(picture(rng)).save(path, dpi=(50_800, 50_800))
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx(0.5, rel=1e-3)
        assert slide.mpp_source == "dpi"


def test_files_that_are_no_image(tmp_path):
    missing = tmp_path / "missing.tif"
    assert "no such file" in error_of(missing)
    empty = tmp_path / "empty.png"
    empty.touch()
    assert "is empty" in error_of(empty)
    text = tmp_path / "text.svs"
    text.write_text("not a slide, whatever its name says")
    assert "neither an image nor a slide" in error_of(text)
    assert "no reader" in error_of(text, reader="vips")
    folder = tmp_path / "folder.tif"
    folder.mkdir()
    error_of(folder)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_truncated_images(rng, tmp_path, kind):
    buffer = io.BytesIO()
    Image.fromarray(picture(rng)).save(buffer, kind)
    path = tmp_path / "cut.img"
    path.write_bytes(buffer.getvalue()[: buffer.tell() * 2 // 3])
    assert "cannot be read as an image" in error_of(path, mpp=0.5)
    path.write_bytes(buffer.getvalue()[:20])
    error_of(path, mpp=0.5)


def test_truncated_tiff(pyramid):
    path, _ = pyramid
    whole = path.read_bytes()
    for length in (6, 400, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(SlideError) as caught, open_slide(path, mpp=0.9) as slide:
            slide.read_level(0, 0, 0, 702, 505)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("slide.tif")


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_refused_not_cut(tmp_path, kind):
    path = tmp_path / f"deep.{kind.lower()}"
    deep = np.full((30, 40, 3), 40_000, np.uint16)
    if kind == "PNG":
        import cv2

        cv2.imwrite(str(path), deep)
    else:
        tifffile.imwrite(path, deep, photometric="rgb")
    assert "8" in error_of(path, mpp=0.5)
    gray = tmp_path / "gray16.png"
    Image.fromarray(np.full((30, 40), 40_000, np.uint16)).save(gray)
    assert "more than 8 bits" in error_of(gray, mpp=0.5)


def test_odd_colour_modes_are_refused(tmp_path):
    path = tmp_path / "print.jpg"
    Image.new("CMYK", (50, 40), (10, 20, 30, 40)).save(path, "JPEG")
    assert "colour mode CMYK" in error_of(path, mpp=0.5)


def damage_tile(path, index):
    """Overwrite one stored tile of level 0 with zeros."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        offset, count = page.dataoffsets[index], page.databytecounts[index]
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(bytes(count))


@pytest.mark.parametrize("reader", ["tiff", "openslide", "tiffslide"])
def test_a_broken_tile_costs_that_read_alone(rng, tmp_path, reader):
    rgb = picture(rng)
    path = tmp_path / "slide.tif"
    write_pyramid(path, [rgb], compression="jpeg")
    damage_tile(path, 8)  # six tiles in a row: row 1, column 2
    with openslide.OpenSlide(path) as handle:
        expected = np.asarray(handle.read_region((10, 10), 0, (100, 90)))[..., :3]
    with open_slide(path, reader=reader) as slide:
        for _ in range(2):
            with pytest.raises(SlideError, match="cannot be read at 260, 130"):
                slide.read_level(0, 260, 130, 50, 40)
            assert (slide.read_level(0, 10, 10, 100, 90) == expected).all()


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
    path = tmp_path / "slide.tif"
    write_pyramid(path, [picture(rng)], compression="jpeg")
    damage_tile(path, 8)
    # In a process of its own: a handle closed under a reader ends it by SIGABRT.
    done = subprocess.run(
        [sys.executable, "-c", THREADS, str(path), reader],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["400", "800"]


def test_many_broken_reads_leave_no_file_open(rng, tmp_path):
    path = tmp_path / "slide.tif"
    write_pyramid(path, [picture(rng)], compression="jpeg")
    damage_tile(path, 8)
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("open files are counted under /proc")

    def opened():
        links = (link for link in descriptors.iterdir() if link.is_symlink())
        return sum(os.readlink(link) == str(path) for link in links)

    slide = open_slide(path, reader="openslide")
    for _ in range(40):
        with pytest.raises(SlideError):
            slide.read_level(0, 260, 130, 50, 40)
    assert opened() <= 1
    slide.close()
    assert opened() == 0


def test_an_open_slide_is_never_pickled(pyramid):
    with open_slide(pyramid[0]) as slide, pytest.raises(TypeError, match="open it per process"):
        pickle.dumps(slide)


def test_a_huge_image_without_tiles_is_refused(tmp_path):
    path = tmp_path / "huge.bmp"
    # The header of a bitmap of 60,000 x 40,000 px, and no pixels.
    path.write_bytes(
        b"BM" + struct.pack("<IHHI", 54, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 60_000, 40_000, 1, 24, 0, 0, 0, 0, 0, 0)
    )  # fmt: skip
    assert "exceeds limit of 178956970" in error_of(path, mpp=0.5)


def test_real_svs_equals_openslide(images):
    path = images / "wsi" / "CMU-1-Small-Region.svs"
    with openslide.OpenSlide(path) as reference, open_slide(path) as slide:
        assert slide.mpp == 0.499
        assert slide.size_px == (2220, 2967)
        for x, y, width, height in (
            (0, 0, 512, 400),
            (1001, 700, 333, 555),
            (1900, 2700, 320, 267),
        ):
            expected = np.asarray(reference.read_region((x, y), 0, (width, height)))[..., :3]
            assert (slide.read_level(0, x, y, width, height) == expected).all()


@pytest.mark.parametrize("reader", ["tiff", "tiffslide"])
def test_real_pyramids_are_read_exactly_at_every_level(images, reader):
    path = images / "wsi_derived" / "0_HE_val.tif"
    with tifffile.TiffFile(path) as file, open_slide(path, reader=reader) as slide:
        assert slide.mpp == pytest.approx(4.6, rel=1e-5)
        assert [down[0] for down in slide.level_downsamples] == [1, 2, 4, 8]
        for level, page in enumerate(file.pages):
            part = slide.read_level(level, 21, 13, 101, 70)
            assert (part == page.asarray()[13:83, 21:122]).all()


def vips_slide(path, rgb, quality):
    """A TIFF of libtiff's: the tables stand once, in a tag; from Q 90 on pyvips writes RGB."""
    import pyvips

    image = pyvips.Image.new_from_memory(rgb.tobytes(), rgb.shape[1], rgb.shape[0], 3, "uchar")
    image.tiffsave(
        str(path), tile=True, tile_width=128, tile_height=128, compression="jpeg", Q=quality,
        xres=1000 / 0.9, yres=1000 / 0.9, resunit="cm",
    )  # fmt: skip


@pytest.mark.parametrize(("quality", "photometric"), [(80, "YCBCR"), (95, "RGB")])
def test_a_stored_tile_comes_out_as_a_jpeg_file_with_its_scan_untouched(
    rng, tmp_path, quality, photometric
):
    path = tmp_path / "slide.tif"
    vips_slide(path, picture(rng), quality)
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        assert page.jpegtables
        assert page.photometric.name == photometric
        # The third tile of the second row.
        place = page.dataoffsets[6 + 2], page.databytecounts[6 + 2]
    with open_slide(path) as slide, openslide.OpenSlide(path) as reference:
        assert slide.reader == "tiff"
        stored = slide.stored_jpeg(256, 128, 128, 128, slide.mpp)
        theirs = np.asarray(reference.read_region((256, 128), 0, (128, 128)).convert("RGB"))
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(stored))), theirs)
        np.testing.assert_array_equal(slide.read(256, 128, 128, 128, slide.mpp), theirs)
        own = path.read_bytes()[place[0] : sum(place)]
        scan = own.index(b"\xff\xda")
        assert stored.endswith(own[scan:])
        # Off the grid, of another size, resampled, over the edge: nothing to copy.
        for x, y, side, mpp in (
            (255, 128, 128, slide.mpp),
            (256, 128, 64, slide.mpp),
            (256, 128, 128, slide.mpp * 1.5),
            (640, 384, 128, slide.mpp),
            (-128, 0, 128, slide.mpp),
        ):
            assert slide.stored_jpeg(x, y, side, side, mpp) is None


def test_what_is_not_jpeg_is_not_copied(pyramid, tmp_path, rng):
    with open_slide(pyramid[0]) as slide:
        assert slide.stored_jpeg(128, 128, 128, 128, slide.mpp) is None
    image = png(tmp_path / "image.png", picture(rng))
    with open_slide(image, mpp=0.5) as slide:
        assert slide.stored_jpeg(0, 0, 128, 128, 0.5) is None


def test_a_tile_that_contradicts_its_page_about_its_colours_is_not_copied(rng, tmp_path):
    """Tiles that call themselves RGB on a page that says YCbCr: what OpenSlide shows counts."""
    rgb = picture(rng)[:128, :256]
    path = tmp_path / "adobe.tif"
    marker = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
    tiles = []
    for left in (0, 128):
        buffer = io.BytesIO()
        Image.fromarray(rgb[:, left : left + 128]).save(buffer, "JPEG", quality=95, subsampling=0)
        tiles.append(buffer.getvalue()[:2] + marker + buffer.getvalue()[2:])
    tifffile.imwrite(
        path,
        iter(tiles),
        shape=rgb.shape,
        dtype=np.uint8,
        tile=(128, 128),
        photometric="ycbcr",
        compression="jpeg",
        subsampling=(1, 1),
        resolution=(1e4, 1e4),
        resolutionunit="CENTIMETER",
    )
    with open_slide(path) as slide, openslide.OpenSlide(path) as reference:
        assert slide.stored_jpeg(0, 0, 128, 128, slide.mpp) is None
        theirs = np.asarray(reference.read_region((0, 0), 0, (256, 128)).convert("RGB"))
        np.testing.assert_array_equal(slide.read(0, 0, 256, 128, slide.mpp), theirs)


def test_what_is_read_may_be_written_on(rng, tmp_path):
    path = tmp_path / "slide.tif"
    vips_slide(path, picture(rng), 80)
    with open_slide(path) as slide:
        for _ in range(2):
            for x in (128, 120):
                region = slide.read(x, 128, 128, 128, slide.mpp)
                before = region.copy()
                region[:] = 0
                np.testing.assert_array_equal(slide.read(x, 128, 128, 128, slide.mpp), before)


def test_a_missing_tile_of_a_coarser_level_is_left_to_openslide(rng, tmp_path):
    """Aperio leaves such tiles out; OpenSlide fills them from the finer level."""
    path = tmp_path / "slide.svs"
    first = picture(rng)
    with tifffile.TiffWriter(path) as writer:
        for level, rgb in enumerate((first, halves(first))):
            writer.write(
                rgb, tile=(128, 128), photometric="rgb", compression="jpeg",
                subfiletype=1 if level else 0,
                description="Aperio Image Library v11\n1x1|AppMag = 20|MPP = 0.5",
                metadata=None,
            )  # fmt: skip
    with open_slide(path) as slide:
        assert slide.reader == "tiff"
    with tifffile.TiffFile(path) as file:
        tag = file.pages[1].tags["TileByteCounts"]
        values = list(tag.value)
    values[3] = 0
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages[1].tags["TileByteCounts"].overwrite(values)
    with open_slide(path) as slide:
        assert slide.reader == "openslide"
