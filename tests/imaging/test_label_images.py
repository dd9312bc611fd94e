"""Label images, held against readers and writers that know nothing of HEMERA."""

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from hemera.errors import SlideError
from hemera.imaging.label_images import read_labels, write_labels
from hemera.imaging.pyramid import TILE_PX, tile_count

TYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32")


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def made(rng, dtype, height=610, width=1050):
    bounds = np.iinfo(dtype)
    return rng.integers(bounds.min, bounds.max, (height, width), dtype, endpoint=True)


def whole_tiles(image):
    across, down = tile_count((image.shape[1], image.shape[0]))
    padded = np.full((down * TILE_PX, across * TILE_PX), 99, image.dtype)
    padded[: image.shape[0], : image.shape[1]] = image
    for top in range(0, padded.shape[0], TILE_PX):
        for left in range(0, padded.shape[1], TILE_PX):
            yield padded[top : top + TILE_PX, left : left + TILE_PX]


def write(path, image, pixel_um=(0.5, 0.25)):
    size = image.shape[1], image.shape[0]
    write_labels(path, whole_tiles(image), size_px=size, dtype=image.dtype, pixel_um=pixel_um)


class TestRead:
    @pytest.mark.parametrize("dtype", TYPES)
    @pytest.mark.parametrize(
        "how",
        [
            {},
            {"tile": (128, 64), "compression": "deflate"},
            {"byteorder": ">"},
            {"compression": "lzw", "rowsperstrip": 37},
            {"bigtiff": True},
        ],
        ids=str,
    )
    def test_every_type_in_tiff(self, tmp_path, rng, dtype, how):
        image = made(rng, dtype)
        tifffile.imwrite(tmp_path / "labels.tif", image, photometric="minisblack", **how)
        found = read_labels(tmp_path / "labels.tif", tmp_path)
        assert found.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(found, image)

    @pytest.mark.parametrize("dtype", ["uint8", "uint16"])
    def test_png(self, tmp_path, rng, dtype):
        image = made(rng, dtype)
        cv2.imwrite(str(tmp_path / "labels.png"), image)
        found = read_labels(tmp_path / "labels.png", tmp_path)
        assert found.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(found, image)

    @pytest.mark.parametrize("bits", [8, 4, 1])
    def test_of_a_palette_the_numbers_count_not_the_colours(self, tmp_path, rng, bits):
        image = rng.integers(0, 2**bits, (50, 70), dtype=np.uint8)
        picture = Image.fromarray(image, "P")
        picture.putpalette(rng.integers(0, 256, 3 * 2**bits, dtype=np.uint8).tolist())
        picture.save(tmp_path / "labels.png", bits=bits)
        np.testing.assert_array_equal(read_labels(tmp_path / "labels.png", tmp_path), image)

    def test_what_is_no_label_image_is_refused(self, tmp_path, rng):
        def said(name):
            with pytest.raises(SlideError) as caught:
                read_labels(tmp_path / name, tmp_path)
            return str(caught.value)

        image = made(rng, "uint8", 40, 60)
        colour = np.dstack([image] * 3)
        cv2.imwrite(str(tmp_path / "colour.png"), colour)
        assert "shape (40, 60, 3)" in said("colour.png")
        Image.fromarray(image > 9).save(tmp_path / "bits.png")
        assert "1 bits" in said("bits.png")
        cv2.imwrite(str(tmp_path / "photo.jpg"), image)
        assert "cannot be read" in said("photo.jpg")
        tifffile.imwrite(tmp_path / "stack.tif", np.stack([image] * 4), photometric="minisblack")
        assert "shape (4, 40, 60)" in said("stack.tif")
        tifffile.imwrite(tmp_path / "float.tif", image.astype(np.float32))
        assert "float32" in said("float.tif")
        assert "no such file" in said("nowhere.png")
        (tmp_path / "empty.tif").write_bytes(b"")
        assert "cannot be read" in said("empty.tif")

    def test_damaged_files_are_refused_in_one_line(self, tmp_path, rng):
        image = made(rng, "uint8", 300, 400)
        cv2.imwrite(str(tmp_path / "whole.png"), image)
        tifffile.imwrite(tmp_path / "whole.tif", image, tile=(64, 64), compression="deflate")
        for suffix in ("png", "tif"):
            data = (tmp_path / f"whole.{suffix}").read_bytes()
            for length in (4, 12, 26, 60, len(data) // 2, len(data) - 200):
                path = tmp_path / f"cut.{suffix}"
                path.write_bytes(data[:length])
                with pytest.raises(SlideError) as caught:
                    read_labels(path, tmp_path)
                assert "\n" not in str(caught.value)


class TestWrite:
    @pytest.mark.parametrize("dtype", TYPES)
    @pytest.mark.parametrize("size", [(1050, 610), (512, 1024), (30, 7)])
    def test_tiff(self, tmp_path, rng, dtype, size):
        image = made(rng, dtype, size[1], size[0])
        write(tmp_path / "labels.tif", image)
        with tifffile.TiffFile(tmp_path / "labels.tif") as file:
            (page,) = file.pages
            assert page.dtype == np.dtype(dtype)
            np.testing.assert_array_equal(page.asarray(), image)
            resolution = [n / d for n, d in (page.tags[c].value for c in (282, 283))]
            assert resolution == pytest.approx([20_000, 40_000])
            assert page.compression == tifffile.COMPRESSION.ADOBE_DEFLATE
