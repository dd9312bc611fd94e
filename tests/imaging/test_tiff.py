import contextlib
import io
import os
import struct

import numpy as np
import openslide
import pytest
import simplejpeg
import tifffile
from PIL import Image

from hemera.errors import SlideError
from hemera.imaging import readers
from hemera.imaging.slide import open_slide
from tests.small_slides import halves, picture, write_image, write_pyramid


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


def entries(path, tag):
    """Return the position in the file and the values of a tag of the first page."""
    with tifffile.TiffFile(path) as file:
        found = file.pages[0].tags[tag]
        return found.valueoffset, found.value


def test_several_tiles_with_one_stored_picture_are_a_fault(rng, tmp_path):
    path = write_pyramid(tmp_path / "slide.tif", [picture(rng)])
    for tag in ("TileOffsets", "TileByteCounts"):
        place, values = entries(path, tag)
        data = bytearray(path.read_bytes())
        struct.pack_into("<II", data, place + 4 * 9, values[2], values[2])
        path.write_bytes(data)
    with pytest.raises(SlideError, match=r"^slide\.tif: level 0 has several tiles with the same"):
        open_slide(path)


def test_empty_tiles_of_one_colour_may_be_stored_once(rng, tmp_path):
    rgb = picture(rng)
    rgb[128:256, 256:640] = 243
    path = write_pyramid(tmp_path / "slide.tif", [rgb])
    for tag in ("TileOffsets", "TileByteCounts"):
        place, values = entries(path, tag)
        data = bytearray(path.read_bytes())
        struct.pack_into("<II", data, place + 4 * 9, values[8], values[8])
        path.write_bytes(data)
    with open_slide(path) as slide:
        assert slide.reader == "tiff"
        assert (slide.read_level(0, 0, 0, 702, 505) == rgb).all()


@pytest.mark.parametrize(
    ("size", "words"), [(0, "the file ends [0-9]+ bytes early"), (5 * 10**9, "bytes for a tile")]
)
def test_a_tile_of_gigabytes_is_not_read(rng, tmp_path, monkeypatch, size, words):
    """A file may be as long as its tags claim."""
    path = write_pyramid(tmp_path / "slide.tif", [picture(rng)])
    place, _ = entries(path, "TileByteCounts")
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, place + 4 * 9, 4_000_000_000)
    path.write_bytes(data)
    os.truncate(path, size or len(data))
    asked, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *words: asked.append(words[1]) or pread(*words))
    # The fourth tile of the second row.
    with open_slide(path) as slide, pytest.raises(SlideError, match=words):
        slide.read_level(0, 384, 128, 128, 128)
    assert max(asked, default=0) < 10**6
    with (
        pytest.raises(SlideError, match="a stored piece of 4000000000 bytes")
        if not size
        else (contextlib.nullcontext())
    ):
        readers.TiffSlideReader(path).close()


def set_tag(path, code, value):
    """Overwrite the value of a tag of one number, in a file that begins with its directory."""
    data = bytearray(path.read_bytes())
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    for number in range(count):
        place = start + 2 + 12 * number
        tag, kind = struct.unpack_from("<HH", data, place)
        if tag == code:
            struct.pack_into("<I" if kind == 4 else "<H", data, place + 8, value)
    path.write_bytes(data)


def test_a_stored_jpeg_of_another_size_is_not_decoded(rng, tmp_path, monkeypatch):
    """65,500 px in its header, two changed bytes each, would take 12 GB."""
    path = write_pyramid(tmp_path / "slide.tif", [picture(rng)], compression="jpeg")
    with tifffile.TiffFile(path) as file:
        offset = file.pages[0].dataoffsets[0]
    data = bytearray(path.read_bytes())
    size = data.index(b"\xff\xc0", offset) + 5
    data[size : size + 4] = struct.pack(">HH", 65500, 65500)
    path.write_bytes(data)
    decoded = []
    decode = simplejpeg.decode_jpeg
    monkeypatch.setattr(
        simplejpeg, "decode_jpeg", lambda *args, **kinds: decoded.append(decode(*args, **kinds))
    )
    with open_slide(path, reader="tiff") as slide, pytest.raises(SlideError, match="65500"):
        slide.read_level(0, 0, 0, 100, 100)
    assert not decoded


@pytest.mark.parametrize("side", [50_000, 1_000_000, 4_000_000_000])
def test_a_size_that_the_file_cannot_have_is_a_fault_at_once(rng, tmp_path, side):
    """Without the bound, 10 s of failing reads, or a MemoryError."""
    path = write_pyramid(tmp_path / "slide.tif", [picture(rng, 70_000 // 250, 300)])
    for code in (256, 257):
        with tifffile.TiffFile(path) as file:
            is_long = file.pages[0].tags[code].dtype == 4
        if side < 2**16 or is_long:
            set_tag(path, code, side)
    with pytest.raises(SlideError, match=r"^slide\.tif: level 0 has positions of \d+ tiles"):
        open_slide(path)


def test_stored_tiles_are_of_a_size_that_can_be_decoded(tmp_path):
    path = tmp_path / "slide.tif"
    keywords = {"tile": (8192, 4096), "photometric": "rgb", "compression": "deflate"}
    tifffile.imwrite(path, np.zeros((100, 90, 3), np.uint8), **keywords)
    with pytest.raises(SlideError, match=r"stored tiles of 4096 x 8192 px, not 1 to 16777216 px"):
        open_slide(path)


def test_a_slide_wider_than_any_slide_is_a_fault(rng, tmp_path):
    path = write_pyramid(tmp_path / "slide.tif", [picture(rng)], (19.0, 19.0))
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx(19)
    with pytest.raises(SlideError, match=r"at 300 um/px are 210\.6 x 151\.5 mm, more than 160"):
        open_slide(path, mpp=300.0)


def test_what_is_not_jpeg_is_not_copied(tmp_path, rng):
    with open_slide(write_pyramid(tmp_path / "slide.tif", [picture(rng)])) as slide:
        assert slide.stored_jpeg(128, 128, 128, 128, slide.mpp) is None
    image = write_image(tmp_path / "image.png", picture(rng))
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
