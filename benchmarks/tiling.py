"""What the tile stage costs, against the decode of its bytes and against the lab's script.

*On one grid*: a registered pair of slides, whole stage (reading, features, storage, tables) against
the limit, the decode of the stored JPEG bytes of both slides. Goals: 0.45 of the limit where stored
tiles are copied (512-px grid), 0.25 where they are encoded anew (256-px grid). *Displaced*: HER2
resampled through a displacement, against openslide + cv2.remap + PNG with the same features as
scripts compute them; goal: 5 times as fast. *Growth*: processor time per tile at 1 and at 40 times
the tissue; goal: at most 1.1. All in processor time, both sides in turn.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openslide
import simplejpeg
import tifffile
from _synthetic import MPP, interleaved, ratio, write_slide
from skimage.color import rgb2hed, rgb2hsv

from hemera import tables
from hemera.config import DescribeOptions, TileOptions
from hemera.registration.displacement import Displacement, identity, map_grid, node_points
from hemera.registration.displacement_files import write_displacement
from hemera.stages import describe, tile

SIDE_PX = 6144
TILE_PX = 512
COUNT = (SIDE_PX // TILE_PX) ** 2


def lay_out(folder: Path, grid_px: int, *, registered: bool, side_px: int = SIDE_PX) -> None:
    """Write a pair of slides, its sheet, the tables of describe, and a displacement."""
    for seed, stain in enumerate(("he", "her2")):
        write_slide(folder / f"{stain}.tif", side_px, grid_px, seed=seed)
    header = "pair\tcase\tdataset\the\ther2\tregistered"
    cells = ["p", "p", "own", "he.tif", "her2.tif", str(registered).lower()]
    (folder / "pairs.tsv").write_text(header + "\n" + "\t".join(cells) + "\n")
    describe.run(
        sheet=folder / "pairs.tsv",
        unit="p",
        block_count=1,
        images_table=folder / "describe.parquet",
        options=DescribeOptions(),
    )
    if registered:
        return
    grid = identity(side_px * MPP, side_px * MPP, 8.0)
    points = node_points(grid)
    bend = np.stack([np.sin(points[..., 1] / 90), np.cos(points[..., 0] / 110)], axis=-1) * 4
    turned = (points - side_px * MPP / 2) @ np.array([[0.0, 0.01], [-0.01, 0.0]])
    field = Displacement((bend + turned).astype(np.float32), grid.mpp)
    write_displacement(folder / "displacement.npz", field)
    row: dict[str, Any] = dict.fromkeys(tables.CERTIFICATE.names)
    row |= {"pair": "p", "verdict": "pass", "engine": "own"}
    tables.write(folder / "certificate.parquet", [row], tables.CERTIFICATE)


def stage(folder: Path, *, registered: bool) -> Callable[[], None]:
    """Return the whole tile stage, as its job runs it with one worker."""
    maps = {} if registered else {
        "displacement": folder / "displacement.npz",
        "certificate": folder / "certificate.parquet",
    }  # fmt: skip

    def run() -> None:
        tile.run(
            sheet=folder / "pairs.tsv",
            unit="p",
            block_count=1,
            images_table=folder / "describe.parquet",
            **maps,
            shard=folder / "tiles" / "p.tar",
            tiles=folder / "tiles" / "p.parquet",
            pairs=folder / "tiles" / "p.pairs.parquet",
            options=TileOptions(size_px=TILE_PX),
        )

    return run


def stored(path: Path) -> list[bytes]:
    """Return the bytes of all stored tiles of level 0."""
    with tifffile.TiffFile(path) as file:
        page: Any = file.pages[0]
        data = path.read_bytes()
        places = zip(page.dataoffsets, page.databytecounts, strict=True)
        return [data[offset : offset + count] for offset, count in places]


def decode_all(folder: Path) -> Callable[[], None]:
    """Return the limit: the decode of both slides' bytes."""
    tiles = [data for stain in ("he", "her2") for data in stored(folder / f"{stain}.tif")]

    def run() -> None:
        for data in tiles:
            simplejpeg.decode_jpeg(data)

    return run


def script(folder: Path, field: Displacement) -> Callable[[], None]:
    """Return what labs write: openslide, cv2.remap, scikit-image's features, PNG."""

    def run() -> None:
        he = openslide.OpenSlide(folder / "he.tif")
        her2 = openslide.OpenSlide(folder / "her2.tif")
        for top in range(0, SIDE_PX, TILE_PX):
            for left in range(0, SIDE_PX, TILE_PX):
                size = TILE_PX, TILE_PX
                first = np.asarray(he.read_region((left, top), 0, size).convert("RGB"))
                at = map_grid(field, left * MPP, top * MPP, MPP, *size) / MPP - 0.5
                x, y = at[..., 0], at[..., 1]
                x0, y0 = int(x.min()) - 2, int(y.min()) - 2
                extent = int(x.max()) + 4 - x0, int(y.max()) + 4 - y0
                region = np.asarray(her2.read_region((x0, y0), 0, extent).convert("RGB"))
                second = cv2.remap(
                    region, (x - x0).astype(np.float32), (y - y0).astype(np.float32),
                    cv2.INTER_CUBIC,
                )  # fmt: skip
                for rgb in (first, second):
                    cv2.Laplacian(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), cv2.CV_64F).var()
                    (rgb2hsv(rgb)[..., 1] > 0.06).mean()
                    np.histogram(rgb2hed(rgb)[..., 0], 64)
                    cv2.imencode(".png", rgb)

    return run


def on_one_grid(grid_px: int, goal: float, words: str) -> None:
    """Print what share of the limit the stage reaches on a registered pair."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lay_out(folder, grid_px, registered=True)
        sides = {"stage": stage(folder, registered=True), "limit": decode_all(folder)}
        times = interleaved(sides, rounds=3)
    middle, least, most = ratio(times, "limit", "stage")
    each = 1e3 * sum(times["stage"]) / len(times["stage"]) / COUNT
    sys.stdout.write(
        f"registered pair, {grid_px}-px grid ({words}): {middle:.2f} of the limit ({least:.2f} to "
        f"{most:.2f}; goal {goal}), {each:.1f} ms per pair of tiles\n"
    )


def displaced() -> None:
    """Print how much faster the stage is than the lab's script."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lay_out(folder, 256, registered=False)
        with np.load(folder / "displacement.npz") as arrays:
            field = Displacement(arrays["vectors_um"], float(arrays["mpp"]))
        sides = {
            "stage": stage(folder, registered=False),
            "limit": decode_all(folder),
            "script": script(folder, field),
        }
        times = interleaved(sides, rounds=2)
    middle, least, most = ratio(times, "script", "stage")
    share = ratio(times, "limit", "stage")[0]
    each = 1e3 * sum(times["stage"]) / len(times["stage"]) / COUNT
    sys.stdout.write(
        f"displaced pair: {middle:.1f} x as fast as the script ({least:.1f} to {most:.1f}; "
        f"goal 5), "
        f"{share:.2f} of the limit, {each:.1f} ms per pair of tiles\n"
    )


def growth() -> None:
    """Print how the cost of a tile grows with the slide."""
    with tempfile.TemporaryDirectory() as name:
        sides = {}
        for words, side_px in (("small", 1536), ("large", 9728)):
            folder = Path(name) / words
            folder.mkdir()
            lay_out(folder, 512, registered=True, side_px=side_px)
            sides[words] = stage(folder, registered=True)
        times = interleaved(sides, rounds=3)
    counts = {"small": 3**2, "large": 19**2}
    per_tile = {words: [seconds / counts[words] for seconds in own] for words, own in times.items()}
    middle, least, most = ratio(per_tile, "large", "small")
    sys.stdout.write(
        f"growth: a tile of {counts['large']} costs {middle:.2f} of one of {counts['small']} "
        f"({least:.2f} to {most:.2f}; goal at most 1.1)\n"
    )


def main() -> None:
    """Print one line per goal."""
    cv2.setNumThreads(1)
    on_one_grid(512, 0.45, "copied")
    on_one_grid(256, 0.25, "encoded anew")
    displaced()
    growth()


if __name__ == "__main__":
    main()
