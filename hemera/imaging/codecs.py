"""Tiles and label images as bytes: JPEG and PNG, and the stored JPEG tiles of TIFF files."""

import re

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg

from hemera.errors import ShardError
from hemera.files.faults import translated

RGB = npt.NDArray[np.uint8]

SUFFIXES = {"jpeg": "jpg", "png": "png"}

_ADOBE = re.compile(rb"\xff\xee..Adobe.{6}(.)", re.DOTALL)
_ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
"""Adobe's marker with colour transform 0: the channels are RGB."""
_JPEG_HEAD = 2048
"""Bytes of a JPEG file that are searched for Adobe's marker."""
_COMMENT, _SCAN, _END, _APP0, _APP14, _APP15 = 0xFE, 0xDA, 0xD9, 0xE0, 0xEE, 0xEF


def encode(rgb: RGB, codec: str = "jpeg", quality: int = 95) -> bytes:
    """Encode a tile (H, W, 3) as jpeg (4:4:4) or png, which is lossless and ignores `quality`."""
    pixels = np.ascontiguousarray(rgb)
    if codec == "png":
        bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
        return cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()
    jpeg = simplejpeg.encode_jpeg(pixels, quality, colorspace="RGB", colorsubsampling="444")
    return bytes(jpeg)


def suffix(data: bytes) -> str:
    """Return the file name suffix of the bytes of a tile; ShardError when they have no codec."""
    if data.startswith(b"\xff\xd8\xff"):
        return SUFFIXES["jpeg"]
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return SUFFIXES["png"]
    raise ShardError("tile: neither JPEG nor PNG; run the stage tile again")


def decode(data: bytes) -> RGB:
    """Decode a tile to (H, W, 3) RGB; ShardError when it cannot be decoded."""
    jpeg = suffix(data) == SUFFIXES["jpeg"]
    with translated(ShardError, "tile: cannot be decoded ({error}); run the stage tile again"):
        if jpeg:
            return np.asarray(simplejpeg.decode_jpeg(data, colorspace="RGB"), np.uint8)
        bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        if bgr is None:
            raise ValueError("damaged PNG")
        return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)


def encode_mask(mask: npt.NDArray[np.uint8]) -> bytes:
    """Encode a label image (H, W) as gray PNG."""
    # Run-length encoding suits label images: they are runs of few values.
    parameters = [cv2.IMWRITE_PNG_COMPRESSION, 6, cv2.IMWRITE_PNG_STRATEGY, 3]
    return cv2.imencode(".png", np.ascontiguousarray(mask), parameters)[1].tobytes()


def decode_mask(data: bytes) -> npt.NDArray[np.uint8]:
    """Decode a label image to (H, W) uint8; ShardError when it is not a gray 8-bit image."""
    with translated(ShardError, "mask: cannot be decoded ({error}); run mask again"):
        mask = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if mask is None or mask.dtype != np.uint8 or mask.ndim != 2:
        raise ShardError("mask: not a gray 8-bit PNG; run mask again")
    return np.asarray(mask, np.uint8)


def jpeg_file(tile: bytes, tables: bytes, *, rgb: bool) -> bytes | None:
    """Return the JPEG file of a stored tile of a TIFF page; its pixels are kept byte by byte.

    Comments, EXIF and other metadata of the tile, and bytes behind its end, are left out. `tables`
    are the bytes of the tag ``JPEGTables``; `rgb`: the page stores RGB, not YCbCr. None where tile
    and page disagree on its colours.
    """
    adobe = _ADOBE.search(tile, 0, _JPEG_HEAD)
    if adobe and (adobe[1] == b"\0") != rgb:
        return None
    marker = _ADOBE_RGB if rgb and not adobe else b""
    # Without the first and the last marker; some writers append bytes to the last.
    tables = tables[2 : max(2, tables.rfind(b"\xff\xd9"))]
    return b"\xff\xd8" + marker + _without_metadata(tables) + _without_metadata(tile[2:])


def _without_metadata(segments: bytes) -> bytes:
    """Return segments of JPEG, and the scan behind them, without what is not needed to decode."""
    kept, at = [], 0
    while segments[at : at + 1] == b"\xff" and segments[at + 1 : at + 2] > b"\0":
        code = segments[at + 1]
        if code in (_SCAN, _END):
            break
        stop = at + 2 + max(2, int.from_bytes(segments[at + 2 : at + 4]))
        # Adobe's marker and that of JFIF, 18 bytes without a thumbnail, determine the colours.
        needed = code == _APP14 or (code == _APP0 and stop - at == 18)
        if needed or not (code == _COMMENT or _APP0 <= code <= _APP15):
            kept.append(segments[at:stop])
        at = stop
    # In a scan, this marker is its end.
    end = segments.find(b"\xff\xd9", at)
    return b"".join(kept) + segments[at : None if end < 0 else end + 2]
