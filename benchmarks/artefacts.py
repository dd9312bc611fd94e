"""Artefacts: drawn ones over real clean tiles, false alarms on these, and real overviews and tiles.

Drawn are pen (9 to 40 um wide, five colours of several dyes, three strengths), folds of two and
three layers, bubbles, blur of one half, dark particles 20 to 80 um wide and grey lines 3 to 8 um
wide. *Found* is a tile that `filter` would refuse for its artefact with default options, *correct*
one that it refuses for this reason. A table per artefact and stain, and one per source, of real
images that are given with --images; the ratios of both rules of folds that the clean tiles of all
sources but one allow, and what they find on that one.
"""

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import tifffile
from _resolutions import MPP

from hemera.config import FilterOptions
from hemera.dataset.criteria import CRITERIA
from hemera.imaging.artefacts import KINDS, find_artefacts, fractions, resized, typical_density
from hemera.imaging.background import measure_background
from hemera.imaging.blur import blurred_cells
from hemera.imaging.color import Color, density, optical_density, saturation
from hemera.imaging.folds import find_folds
from hemera.imaging.morphology import COARSE_MPP, at_mpp, coarse

RGB = npt.NDArray[np.uint8]

SOURCES = (
    ("bci", "he", "bci_pairs_1024/HE/*/*.png"),
    ("bci", "her2", "bci_*_1024/IHC/*/*.png"),
    ("mist", "he", "panels_*/HE/mist*.png"),
    ("mist", "her2", "panels_*/IHC/mist*.png"),
    ("normal", "he", "qc_artifact/normal*.png"),
    ("qc", "he", "qc_tiles/[tm]*.png"),
    ("focus", "he", "qc_focus/*in_focus.png"),
    ("fields", "her2", "her2_fields/*.jpg"),
    ("tma", "her2", "her2_tma/*.jpg"),
    ("bcdata", "her2", "ki67_bcdata/*.png"),
    ("shidc", "her2", "ki67_shidc/*.jpg"),
    ("glioma", "her2", "ki67_glioma/*original.jpg"),
    ("deepliif", "her2", "deepliif/test_ihc/*.png"),
    ("misc", "her2", "ihc_misc/*.png"),
    ("membrane", "her2", "her2_membrane_128/im?_t??.png"),
    ("os", "he", "he_os1/*.tif"),
    ("os", "her2", "ki67_os2/*.tif"),
    ("cmu", "he", "wsi/*.svs"),
)
"""Name, stain and files."""
OVERVIEW_MPP = MPP["overview"]
OVERVIEWS = {
    "qc_artifact/pen_green.png": OVERVIEW_MPP,
    "qc_artifact/coverslip_edge_he.png": OVERVIEW_MPP,
    "qc_artifact/pen_red_on_tissue_tupac.png": OVERVIEW_MPP,
    "qc_artifact/fold_strong_a.png": OVERVIEW_MPP,
    "wsi_derived/0_HE_val.tif": MPP["kidney"],
    "wsi_derived/0_PANCK_val.tif": MPP["kidney"],
}
"""Files and um/px."""
INKS = {
    "black": ((0.58, 0.58, 0.57), (0.59, 0.59, 0.55)),
    "blue": ((0.84, 0.50, 0.20), (0.75, 0.62, 0.22), (0.67, 0.67, 0.34), (0.88, 0.44, 0.20)),
    "green": ((0.82, 0.25, 0.50), (0.82, 0.31, 0.49), (0.82, 0.37, 0.44)),
    "red": ((0.06, 0.72, 0.69), (0.10, 0.77, 0.63), (0.18, 0.83, 0.53)),
    "violet": ((0.47, 0.83, 0.29),),
}
"""Unit vectors in optical density, of several dyes. The second and the third of blue have the ratio
of red to green of haematoxylin (RGB 45, 60, 150 and 60, 60, 120)."""
TILE_PX = 512
TILE_UM = 128.0
"""Sides of the tiles, whichever is longer."""
TILES_MAX = 6
"""Of one image."""
TISSUE_MIN = 0.5


LIMITS = {
    criterion.column.split("_")[1]: criterion.option
    for criterion in CRITERIA
    if criterion.column in {f"he_{kind}_fraction" for kind in KINDS}
}
"""Of every kind of artefact, the option of filter, in the order of its criteria."""


class Tile(NamedTuple):
    """A tile of a real image, and what stage describe measures on that."""

    source: str
    stain: str
    rgb: RGB
    mpp: float
    background: Color
    tissue_density: float


def tiles(folder: Path) -> Iterator[Tile]:
    """Return clean tiles with tissue."""
    for source, stain, pattern in SOURCES:
        mpp = MPP[source]
        for path in sorted(folder.glob(pattern)):
            image = read(path)
            small, at = at_mpp(image, mpp, 1.0), max(mpp, 1.0)
            background = measure_background([small], at).color
            typical = typical_density(at_mpp(image, mpp, OVERVIEW_MPP), background)
            side = min(max(TILE_PX, round(TILE_UM / mpp)), *image.shape[:2])
            found = []
            for y in range(0, image.shape[0] - side + 1, side):
                for x in range(0, image.shape[1] - side + 1, side):
                    rgb = np.ascontiguousarray(image[y : y + side, x : x + side])
                    stained = (
                        saturation(rgb) > 15 if stain == "he" else density(rgb, background) > 15
                    )
                    if stained.mean() >= TISSUE_MIN:
                        found.append(Tile(source, stain, rgb, mpp, background, typical))
            yield from found[:: max(1, len(found) // TILES_MAX)][:TILES_MAX]


def read(path: Path) -> RGB:
    """Return an image (H, W, 3)."""
    if path.suffix in (".tif", ".svs"):
        return np.ascontiguousarray(tifffile.imread(path, key=0)[..., :3])
    return np.ascontiguousarray(cv2.imread(str(path), cv2.IMREAD_COLOR)[..., ::-1])


def reason(tile: Tile, rgb: RGB, options: FilterOptions) -> str:
    """Return the first artefact for which filter refuses a tile that shows `rgb`, or nothing."""
    found = find_artefacts(rgb, tile.mpp, tile.background, tile.tissue_density)
    measured: dict[str, float] = dict(fractions(found))
    measured["blur"] = float(blurred_cells(rgb, tile.mpp, tile.stain).mean())
    limits = options.model_dump()
    return next((k for k, option in LIMITS.items() if measured[k] > limits[option]), "")


def stroke(tile: Tile, width_um: float, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Return a wavy band across the tile, (H, W), 0 to 1."""
    height, width = tile.rgb.shape[:2]
    along = np.linspace(-0.1, 1.1, 200)
    angle = rng.uniform(0, np.pi)
    direction = np.array([np.cos(angle), np.sin(angle)])
    centre = np.array([width, height]) * (0.5 + rng.uniform(-0.2, 0.2, 2))
    wave = np.sin(along * rng.uniform(2, 5) + rng.uniform(0, 6)) * rng.uniform(10, 50) / tile.mpp
    points = centre + (along[:, None] - 0.5) * 1.5 * max(height, width) * direction
    points += wave[:, None] * np.array([-direction[1], direction[0]])
    band = np.zeros((height, width), np.uint8)
    line = [np.round(points * 16).astype(np.int32)]
    cv2.polylines(band, line, False, 255, max(1, round(width_um / tile.mpp)), cv2.LINE_AA, 4)
    edge_px = max(0.6, 0.7 / tile.mpp)
    return np.asarray(cv2.GaussianBlur(band.astype(np.float32) / 255, (0, 0), edge_px), np.float32)


def rounded(values: npt.NDArray[Any]) -> RGB:
    """Return values as pixels."""
    return np.asarray(values.round().clip(0, 255), np.uint8)


def pen(tile: Tile, ink: str, strength: float, rng: np.random.Generator) -> RGB:
    """Draw a stroke of one of the dyes of an ink, of an optical density."""
    band = stroke(tile, float(rng.choice([9, 12, 20, 40])), rng)[..., None]
    return rounded(tile.rgb * 10 ** (-strength * 1.6 * band * rng.choice(INKS[ink])))


def fold(tile: Tile, layers: int, rng: np.random.Generator) -> RGB:
    """Add the densities of other places of the tile within a band: those of layers add up."""
    own = np.log10(np.array(tile.background) / np.maximum(tile.rgb.astype(np.float32), 1)).clip(0)
    others = sum(
        np.roll(own, tuple(rng.integers(-60, 60, 2)), (0, 1))[:, :: int(rng.choice([-1, 1]))]
        for _ in range(layers - 1)
    )
    band = stroke(tile, float(rng.choice([20, 40, 80])), rng)[..., None]
    return rounded(np.array(tile.background) * 10 ** -(own + band * others))


def bubble(tile: Tile, strength: float, rng: np.random.Generator) -> RGB:
    """Draw a dark rim around a brighter, blurred inside."""
    height, width = tile.rgb.shape[:2]
    y, x = np.mgrid[:height, :width]
    down, right = y - rng.uniform(0.2, 0.8) * height, x - rng.uniform(0.2, 0.8) * width
    radius = np.hypot(down, right) * tile.mpp - rng.choice([25, 40, 60])
    rim = np.exp(-((radius / rng.uniform(3, 6)) ** 2))[..., None]
    blurred = cv2.GaussianBlur(tile.rgb, (0, 0), 3 / tile.mpp).astype(np.float32)
    inside = np.where(radius[..., None] < 0, 0.6 * blurred + 0.4 * 240, tile.rgb)
    return rounded(inside * 10 ** (-strength * rim))


def half_blur(tile: Tile, sigma_um: float, rng: np.random.Generator) -> RGB:
    """Blur one half of the tile, in any direction; its noise remains."""
    height, width = tile.rgb.shape[:2]
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:height, :width]
    half = (y - height / 2) * np.sin(angle) + (x - width / 2) * np.cos(angle) > 0
    blurred = cv2.GaussianBlur(tile.rgb, (0, 0), sigma_um / tile.mpp)
    return rounded(np.where(half[..., None], blurred + rng.normal(0, 1, tile.rgb.shape), tile.rgb))


def particle(tile: Tile, rng: np.random.Generator) -> RGB:
    """Draw a dark grey particle with a blurred edge."""
    height, width = tile.rgb.shape[:2]
    y, x = np.mgrid[:height, :width]
    down, right = y - rng.uniform(0.3, 0.7) * height, x - rng.uniform(0.3, 0.7) * width
    radius = np.hypot(down, right) * tile.mpp - rng.choice([10, 20, 40])
    inside = 1 / (1 + np.exp(np.clip(radius, -30, 30)))[..., None]
    return rounded(tile.rgb * 10 ** (-rng.uniform(0.6, 1.2) * inside))


def hair(tile: Tile, rng: np.random.Generator) -> RGB:
    """Draw a thin grey line, as of a hair, a scratch or a coverslip."""
    band = stroke(tile, float(rng.choice([3, 5, 8])), rng)[..., None]
    return rounded(tile.rgb * 10 ** (-rng.uniform(0.2, 0.8) * band))


def drawn(tile: Tile, rng: np.random.Generator) -> Iterator[tuple[str, str, RGB]]:
    """Yield the name of an artefact, the reason that is correct, and the tile with it."""
    # Their own generator, so that what is drawn otherwise does not depend on them.
    apart = np.random.default_rng([1, len(tile.rgb), int(tile.rgb.sum(dtype=np.int64))])
    yield "particle", "dust", particle(tile, apart)
    yield "line", "edge", hair(tile, apart)
    for ink in INKS:
        yield f"pen, {ink}", "pen", pen(tile, ink, float(rng.choice([0.5, 0.8, 1.2])), rng)
    for layers in (2, 3):
        yield f"fold, {layers} layers", "fold", fold(tile, layers, rng)
    yield "bubble", "edge", bubble(tile, float(rng.choice([0.3, 0.6])), rng)
    for sigma_um in (1.5, 3.0):
        yield f"half blur, {sigma_um:g} um", "blur", half_blur(tile, sigma_um, rng)


RATIOS = (1.6, 1.8, 2.0, 2.2)
BAND_RATIOS = (1.5, 1.6, 1.7, 1.8, 1.9)
OFF = math.inf
# Parts of a tile that a fold covers, with their upper ends.
COVERED = {"0 to 0.3": 0.3, "0.3 to 0.6": 0.6, "above 0.6": 1.0}


def false_folds(tile: Tile) -> tuple[list[bool], list[bool]]:
    """Return whether filter refuses a clean tile with each of `RATIOS`, and of `BAND_RATIOS`."""
    density = optical_density(coarse(tile.rgb, tile.mpp), tile.background)
    at, typical, limit = max(tile.mpp, COARSE_MPP), tile.tissue_density, FilterOptions().fold_max

    def refused(ratio: float, band_ratio: float) -> bool:
        return float(find_folds(density, at, typical, ratio, band_ratio).mean()) > limit

    return [refused(ratio, OFF) for ratio in RATIOS], [refused(OFF, each) for each in BAND_RATIOS]


def left_out(title: str, ratios: tuple[float, ...], found: dict[str, list[list[bool]]]) -> None:
    """Print the least ratio with which no tile of the other sources has a fold, and its alarms."""
    line(f"source left out, {title}", "ratio", "its tiles", "false folds")
    line(*["---"] * 4)
    for source, own in found.items():
        others = [row for name, rows in found.items() if name != source for row in rows]
        free = [k for k in range(len(ratios)) if not any(row[k] for row in others)]
        alarms = sum(row[free[0]] for row in own) if free else "-"
        line(source, ratios[free[0]] if free else "none", len(own), alarms)
    sys.stdout.write("\n")


def overviews(folder: Path) -> None:
    """Print what is found on real overviews, and its recall and precision where there is truth."""
    line("overview", "pen", "fold", "edge", "recall", "precision")
    line(*["---"] * 6)
    for name, mpp in OVERVIEWS.items():
        path = folder / name
        image = read(path)
        background = measure_background([image], mpp).color
        typical = typical_density(image, background)
        kinds = find_artefacts(image, mpp, background, typical)
        covered = fractions(kinds)
        figures = [f"{covered[kind]:.3f}" for kind in ("pen", "fold", "edge")]
        path = path.with_name(f"{path.stem}_mask.png")
        if path.exists() and kinds is not None:
            truth = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) > 0
            found = resized(kinds, truth.shape) > 0
            figures += [f"{found[truth].mean():.2f}", f"{truth[found].mean():.2f}"]
        else:
            figures += ["", ""]
        line(Path(name).name, *figures)


def line(*cells: object) -> None:
    """Print a row of a table."""
    sys.stdout.write("| " + " | ".join(str(cell) for cell in cells) + " |\n")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, help="folder of real test images")
    given = parser.parse_args()
    if given.images is None:
        sys.stdout.write("artefacts: not measured, no folder given (--images)\n")
        return
    cv2.setNumThreads(1)
    options, rng = FilterOptions(), np.random.default_rng(0)
    artefacts: dict[tuple[str, str], list[tuple[bool, bool]]] = defaultdict(list)
    folds: dict[tuple[str, str, str], list[bool]] = defaultdict(list)
    sources: dict[tuple[str, str], dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    edges: dict[str, list[list[bool]]] = defaultdict(list)
    bands: dict[str, list[list[bool]]] = defaultdict(list)
    for tile in tiles(given.images):
        for of_rule, refused in zip((edges, bands), false_folds(tile), strict=True):
            of_rule[tile.source].append(refused)
        of_source = sources[tile.source, tile.stain]
        of_source["clean"].append(not reason(tile, tile.rgb, options))
        for name, right, rgb in drawn(tile, rng):
            found = reason(tile, rgb, options)
            artefacts[name, tile.stain].append((bool(found), found == right))
            if right == "fold":
                covered = float((rgb != tile.rgb).any(axis=2).mean())
                part = next(text for text, most in COVERED.items() if covered <= most)
                folds[name, tile.stain, part].append(bool(found))
            of_source[name.split(",")[0]].append(bool(found))
    line("drawn", "stain", "tiles", "found", "correct reason")
    line(*["---"] * 5)
    for (name, stain), rows in artefacts.items():
        line(name, stain, len(rows), *(f"{value:.2f}" for value in np.mean(rows, axis=0)))
    sys.stdout.write("\n")
    line("drawn", "stain", "part of the tile", "tiles", "found")
    line(*["---"] * 5)
    for key, refusals in sorted(folds.items()):
        line(*key, len(refusals), f"{np.mean(refusals):.2f}")
    sys.stdout.write("\n")
    kinds = ("pen", "fold", "bubble", "half blur")
    line("source", "stain", "tiles", "clean accepted", *(f"{kind} found" for kind in kinds))
    line(*["---"] * 8)
    for (name, stain), of in sources.items():
        shown = (f"{np.mean(of[kind]):.2f}" for kind in kinds)
        line(name, stain, len(of["clean"]), sum(of["clean"]), *shown)
    sys.stdout.write("\n")
    left_out("edges", RATIOS, edges)
    left_out("bands", BAND_RATIOS, bands)
    overviews(given.images)


if __name__ == "__main__":
    main()
