import io

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

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
