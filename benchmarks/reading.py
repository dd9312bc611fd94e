"""How fast 512 x 512 tiles are read, against the decode of their bytes and against other readers.

The limit is the decode of the stored JPEG bytes, already in memory. Goals: at least 0.85 of the
limit (stretch 0.95), at least 4.5 times as fast as a loop over openslide-python (stretch 5.5).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import openslide
import simplejpeg
import tifffile
import tiffslide
from _synthetic import MPP, interleaved, ratio, write_slide

from hemera.imaging.slide import open_slide

SIDE_PX = 8192
TILE_PX = 512
CORNERS = [(x, y) for y in range(0, SIDE_PX, TILE_PX) for x in range(0, SIDE_PX, TILE_PX)]


def compare(grid_px: int) -> None:
    """Print one line per reader, for a slide of stored tiles of that side."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "slide.tif"
        write_slide(path, SIDE_PX, grid_px)
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            data = path.read_bytes()
            stored = [
                data[offset : offset + count]
                for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)
            ]
        ours = open_slide(path, mpp=MPP)
        theirs = openslide.OpenSlide(path)
        other = tiffslide.TiffSlide(path)

        def limit() -> None:
            for tile in stored:
                simplejpeg.decode_jpeg(tile)

        def direct() -> None:
            for x, y in CORNERS:
                ours.read(x, y, TILE_PX, TILE_PX, MPP)

        def by_openslide() -> None:
            for corner in CORNERS:
                theirs.read_region(corner, 0, (TILE_PX, TILE_PX)).convert("RGB")

        def by_tiffslide() -> None:
            for corner in CORNERS:
                other.read_region(corner, 0, (TILE_PX, TILE_PX), as_array=True)

        times = interleaved(
            {
                "limit": limit,
                "HEMERA": direct,
                "openslide-python": by_openslide,
                "tiffslide": by_tiffslide,
            }
        )
        ours.close()
    kilobytes = sum(map(len, stored)) / len(CORNERS) / 1000
    sys.stdout.write(f"stored tiles of {grid_px} px, {kilobytes:.0f} KB per {TILE_PX} px\n")
    for reader in ("HEMERA", "openslide-python", "tiffslide"):
        middle, least, most = ratio(times, reader, "limit")
        sys.stdout.write(f"  {reader:<20} {middle:5.2f} ({least:.2f} to {most:.2f})\n")
    share = 1 / ratio(times, "HEMERA", "limit")[0]
    faster = ratio(times, "openslide-python", "HEMERA")[0]
    sys.stdout.write(
        f"  HEMERA reaches {share:.2f} of the limit (goal 0.85), and is {faster:.1f} x as fast as "
        "openslide-python (goal 4.5)\n"
    )


def main() -> None:
    """Compare on both grids that slides have."""
    sys.stdout.write(f"reading {len(CORNERS)} tiles of {TILE_PX} px, x limit (lower is better)\n")
    for grid_px in (256, 512):
        compare(grid_px)


if __name__ == "__main__":
    main()
