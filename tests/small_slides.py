"""Small slides and images for the tests of reading."""

import cv2
import numpy as np
import tifffile
from PIL import Image


def picture(rng, height=505, width=702):
    """Structures over a gradient, with background on the right: no symmetry."""
    noise = cv2.GaussianBlur(rng.normal(size=(height, width, 3)).astype(np.float32), (0, 0), 2)
    y, x = np.mgrid[:height, :width]
    rgb = 150 + 200 * noise + np.stack([x / 20, y / 30, -x / 40], axis=-1)
    # Background of exactly one colour would be a place without image.
    rgb[:, width * 3 // 4 :] = 240 + ((x + y) % 3)[:, width * 3 // 4 :, None]
    return np.clip(rgb, 0, 255).astype(np.uint8)


def halves(rgb):
    """The next level of a pyramid: two by two averaged, what does not divide dropped."""
    height, width = (side // 2 for side in rgb.shape[:2])
    return np.rint(
        rgb[: height * 2, : width * 2].reshape(height, 2, width, 2, 3).mean(axis=(1, 3))
    ).astype(np.uint8)


def write_pyramid(path, levels, mpp=(0.9, 0.9), *, subifds=False, compression="deflate"):
    """Write a TIFF of 128-px tiles, six in a row where the first level is `picture`."""
    keywords = {"tile": (128, 128), "photometric": "rgb", "compression": compression}
    if mpp is not None:
        keywords |= {"resolution": (1e4 / mpp[0], 1e4 / mpp[1]), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path) as writer:
        writer.write(levels[0], subifds=len(levels) - 1 if subifds else 0, **keywords)
        for level in levels[1:]:
            writer.write(level, subfiletype=1, **keywords)
    return path


def write_image(path, rgb, kind="PNG", **keywords):
    Image.fromarray(rgb).save(path, kind, **keywords)
    return path


def damage_tile(path, index):
    """Overwrite one stored tile of level 0 with zeros."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        offset, count = page.dataoffsets[index], page.databytecounts[index]
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(bytes(count))
