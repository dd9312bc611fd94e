import cv2
import numpy as np
import pytest

from hemera.errors import ShardError
from hemera.imaging.codecs import decode, decode_mask, encode, encode_mask, jpeg_file


def smooth(rng, height=48, width=80):
    noise = cv2.GaussianBlur(rng.normal(size=(height, width, 3)).astype(np.float32), (0, 0), 3)
    return np.clip(140 + 300 * noise, 0, 255).astype(np.uint8)


def test_png_is_lossless(rng):
    rgb = rng.integers(0, 256, (37, 53, 3), dtype=np.uint8)
    assert (decode(encode(rgb, "png")) == rgb).all()


def test_jpeg_is_444_and_close(rng):
    rgb = smooth(rng)
    data = encode(rgb, "jpeg", 95)
    assert np.abs(decode(data).astype(int) - rgb).mean() < 1.5
    # The frame header: three components, each sampled 1 x 1.
    frame = data.index(b"\xff\xc0")
    assert [data[frame + 11 + 3 * i] for i in range(3)] == [0x11] * 3
    assert len(encode(rgb, "jpeg", 50)) < len(data)


def test_damaged_images_are_errors():
    whole = encode(np.full((64, 90, 3), 120, np.uint8), "png")
    for data in (b"", b"GIF89a", whole[:40], b"\xff\xd8\xff" + bytes(40), b"RIFF0000WEBPVP8 "):
        with pytest.raises(ShardError):
            decode(data)
        with pytest.raises(ShardError):
            decode_mask(data)


def test_masks_survive_bit_by_bit(rng):
    mask = rng.integers(0, 32, (41, 67), dtype=np.uint8)
    assert (decode_mask(encode_mask(mask)) == mask).all()
    with pytest.raises(ShardError, match="not a gray"):
        decode_mask(encode(np.zeros((8, 9, 3), np.uint8), "png"))


def test_a_stored_tile_becomes_a_jpeg_file_by_the_tables_of_its_page():
    """Some writers append bytes to the tables; a tile may name its own colours."""
    marker = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
    tables, tile = b"\xff\xd8TABLES\xff\xd9\0\0", b"\xff\xd8SCAN\xff\xd9"
    assert jpeg_file(tile, tables, rgb=False) == b"\xff\xd8TABLESSCAN\xff\xd9"
    assert jpeg_file(tile, b"", rgb=False) == tile
    assert jpeg_file(tile, b"", rgb=True) == b"\xff\xd8" + marker + b"\0" + tile[2:]
    named = b"\xff\xd8" + marker + b"\1" + tile[2:]
    assert jpeg_file(named, b"", rgb=False) == named
    assert jpeg_file(named, b"", rgb=True) is None
