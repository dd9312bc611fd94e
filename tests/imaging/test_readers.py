import io
import os
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from hemera.errors import InputFileError, SlideError
from hemera.imaging import readers
from hemera.imaging.slide import open_slide
from tests.imaging.test_slide import error_of
from tests.small_slides import damage_tile, picture, write_image, write_pyramid


@pytest.mark.parametrize("reader", ["tiff", "openslide", "tiffslide"])
@pytest.mark.parametrize("compression", ["jpeg", "deflate"])
def test_readers_agree_at_level_0(rng, tmp_path, reader, compression):
    path = write_pyramid(tmp_path / "slide.tif", [picture(rng)], compression=compression)
    with open_slide(path, reader="openslide") as reference, open_slide(path, reader=reader) as own:
        assert own.reader == reader
        expected = reference.read_level(0, 123, 77, 411, 333)
        assert (own.read(123, 77, 411, 333, own.mpp) == expected).all()


def test_content_decides_not_the_name(rng, tmp_path):
    path = write_image(tmp_path / "00345_test_0.png", picture(rng), "JPEG", quality=95)
    with open_slide(path, mpp=0.46) as slide:
        assert (slide.reader, slide.vendor) == ("image", "jpeg")
        expected = np.asarray(Image.open(path))
        assert (slide.read(3, 9, 200, 100, 0.46) == expected[9:109, 3:203]).all()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "TIFF"])
def test_plain_images(rng, tmp_path, kind):
    rgb = picture(rng, 60, 85)
    lossless = {"lossless": True} if kind == "WEBP" else {}
    path = write_image(tmp_path / "image", rgb, kind, **lossless)
    with open_slide(path, mpp=0.5) as slide:
        assert (slide.read_level(0, 0, 0, 85, 60) == rgb).all()


def test_transparency_is_white(tmp_path):
    rgba = np.zeros((30, 41, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[:, :10, 3] = 255
    rgba[:, 10:20, 3] = 128
    with open_slide(write_image(tmp_path / "alpha.png", rgba), mpp=0.5) as slide:
        row = slide.read_level(0, 0, 0, 41, 30)[3]
    assert row[5].tolist() == [200, 0, 0]
    assert np.abs(row[15] - np.array([227, 127, 127])).max() <= 1
    assert row[30].tolist() == [255, 255, 255]


def test_resolution_of_an_image(rng, tmp_path):
    path = write_image(tmp_path / "dpi.png", picture(rng), dpi=(50_800, 50_800))
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx(0.5, rel=1e-3)
        assert slide.mpp_source == "dpi"


@pytest.mark.parametrize("reader", ["openslide", "tiffslide"])
def test_a_slide_that_is_lost_while_it_is_read_is_no_fault_of_its_content(rng, tmp_path, reader):
    path = write_pyramid(tmp_path / "slide.tif", [picture(rng)])
    with open_slide(path, reader=reader) as slide:
        slide.close()
        path.rename(tmp_path / "away.tif")
        with pytest.raises(InputFileError, match=r"slide\.tif: lost while it was read; run again"):
            slide.read_level(0, 0, 0, 200, 200)


def test_files_that_are_not_images(tmp_path):
    with pytest.raises(InputFileError, match=r"missing\.tif: no such file"):
        open_slide(tmp_path / "missing.tif")
    os.mkfifo(tmp_path / "pipe.tif")
    for path in (tmp_path, tmp_path / "pipe.tif"):
        assert "a folder, pipe or device" in error_of(path)
    empty = tmp_path / "empty.png"
    empty.touch()
    assert "is empty" in error_of(empty)
    text = tmp_path / "text.svs"
    text.write_text("not a slide, whatever its name says")
    assert "cannot be read as a slide or an image" in error_of(text)
    folder = tmp_path / "folder.tif"
    folder.mkdir()
    error_of(folder)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_truncated_images(rng, tmp_path, kind):
    buffer = io.BytesIO()
    Image.fromarray(picture(rng)).save(buffer, kind)
    path = tmp_path / "cut.img"
    for length in (buffer.tell() * 2 // 3, 20):
        path.write_bytes(buffer.getvalue()[:length])
        error_of(path, mpp=0.5)


def test_a_stored_jpeg2000_of_another_size_is_not_decoded(rng, tmp_path):
    """30,000 px in the header of one tile would take 13 GB and a minute."""
    path = tmp_path / "slide.tif"
    keywords = {"tile": (128, 128), "photometric": "rgb", "compression": "jpeg2000"}
    tifffile.imwrite(path, picture(rng), **keywords)
    data = bytearray(path.read_bytes())
    place = data.index(b"\xff\x4f\xff\x51") + 8
    data[place : place + 8] = data[place + 16 : place + 24] = struct.pack(">II", 30_000, 30_000)
    path.write_bytes(data)
    with open_slide(path, mpp=0.5) as slide:
        with pytest.raises(SlideError, match="900000000 pixels"):
            slide.read_level(0, 0, 0, 100, 100)
        assert slide.read_level(0, 128, 128, 128, 128).std() > 1


def test_a_changed_bit_of_a_png_is_a_fault(rng, tmp_path):
    """Its pixels would change, and all that follow; Pillow alone decodes them."""
    path = write_image(tmp_path / "image.png", picture(rng))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)
    assert "checksum" in error_of(path, mpp=0.5)


def test_sixteen_bits_are_refused_not_cut(tmp_path):
    deep = np.full((30, 40, 3), 40_000, np.uint16)
    cv2.imwrite(str(tmp_path / "deep.png"), deep)
    tifffile.imwrite(tmp_path / "deep.tif", deep, photometric="rgb")
    write_image(tmp_path / "gray.png", deep[..., 0])
    for name in ("deep.png", "gray.png"):
        assert "more than 8 bits" in error_of(tmp_path / name, mpp=0.5)
    assert "8" in error_of(tmp_path / "deep.tif", mpp=0.5)


def test_odd_colour_modes_are_refused(tmp_path):
    path = tmp_path / "print.jpg"
    Image.new("CMYK", (50, 40), (10, 20, 30, 40)).save(path, "JPEG")
    assert "colour mode CMYK" in error_of(path, mpp=0.5)


def test_a_huge_image_without_tiles_is_refused(tmp_path):
    path = tmp_path / "huge.bmp"
    # The header of a bitmap of 60,000 x 40,000 px, and no pixels.
    path.write_bytes(
        b"BM" + struct.pack("<IHHI", 54, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 60_000, 40_000, 1, 24, 0, 0, 0, 0, 0, 0)
    )  # fmt: skip
    # By Pillow or by HEMERA: libraries change the limit of Pillow.
    assert "178956970" in error_of(path, mpp=0.5)


def test_many_broken_reads_leave_no_file_open(rng, tmp_path):
    path = write_pyramid(tmp_path / "slide.tif", [picture(rng)], compression="jpeg")
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


def test_what_a_library_decodes_at_once_is_bounded_from_the_header(rng, tmp_path, monkeypatch):
    path = write_pyramid(tmp_path / "slide.tif", [picture(rng)])
    monkeypatch.setattr(readers, "TILE_PX_MAX", 128 * 128)
    readers.OpenSlideReader(path).close()
    monkeypatch.setattr(readers, "TILE_PX_MAX", 128 * 128 - 1)
    with pytest.raises(SlideError, match=r"stored tiles of 128 x 128 px on level 0"):
        readers.OpenSlideReader(path)
    # Strips of a page: all rows at once.
    strips = tmp_path / "strips.tif"
    rgb = picture(rng)
    tifffile.imwrite(strips, rgb, photometric="rgb", rowsperstrip=rgb.shape[0])
    monkeypatch.setattr(readers, "IMAGE_PIXELS_MAX", rgb[..., 0].size)
    readers.TiffSlideReader(strips).close()
    monkeypatch.setattr(readers, "IMAGE_PIXELS_MAX", rgb[..., 0].size - 1)
    with pytest.raises(SlideError, match=r"stored pieces of 702 x 505 px"):
        readers.TiffSlideReader(strips)
