"""The synthetic cohort of the HER2 status: 64 cases, most of them of H&E alone.

Tumour cells that express HER2 look different on H&E (see `hemera.demo.cells`), so that the status
can be determined from H&E. Two variants control a classifier: in one H&E shows nothing, in the
other nothing but the site, which goes with the status.
"""

import concurrent.futures
import dataclasses
import functools
import json
import logging
import multiprocessing
from pathlib import Path

import cv2
import numpy as np
import shapely

from hemera.demo.grid import GRID_UM
from hemera.demo.plan import TILE_MPP
from hemera.demo.render import Appearance, Renderer, rasterise
from hemera.demo.scanner import photograph
from hemera.demo.tissue import Tissue, grow
from hemera.errors import ConfigError, HemeraError
from hemera.files import atomic
from hemera.files.geojson import annotation
from hemera.imaging.outlines import trace
from hemera.sheet import SCORES, write_rows

log = logging.getLogger(__name__)

SHEET = "status.tsv"
VARIANTS = ("signal", "null", "confounded")
"""H&E shows the expression; it does not; it does not, and the site goes with the status."""

CASES_PER_SCORE = 16
PAIRS_PER_SCORE = 6
"""Cases with a HER2 image."""
SIDE_PX = 1024
WIDE_PX = 1536
"""Width of the images of every fourth round of scores: 6 tiles of 512 px instead of 4."""
CONFOUNDED_FRACTION = 0.9
"""Cases of variant confounded whose site is that of their status."""

SITES = {
    "north": Appearance((228, 216, 222), 1.12, 0.92, 1.0),
    "south": Appearance((240, 236, 238), 0.88, 1.10, 0.8),
}
"""Laboratories with the look of their H&E slides."""
REGIONS = {"Tumor": (200, 0, 0), "Stroma": (0, 160, 0)}
"""Classes of the annotations with their colours in QuPath."""
NEST_UM = 24.0
"""Gaps between nests of tumour up to this width are annotated with them."""
HER2_LOOK = Appearance((254, 251, 249), 0.9, 0.95, 0.7, 0.6)


@dataclasses.dataclass(frozen=True)
class Case:
    """One case: one H&E image, and for some a HER2 image of the same position."""

    number: int
    score: str
    status: str
    site: str
    paired: bool
    variant: str

    @property
    def name(self) -> str:
        """Pair and case in the sheet."""
        return f"case_{self.number:03d}"

    @property
    def he(self) -> str:
        """File of H&E, relative to the cohort's folder."""
        return f"{self.variant}/{self.name}_he.png"

    @property
    def her2(self) -> str:
        """File of HER2, empty without one."""
        return f"{self.variant}/{self.name}_her2.png" if self.paired else ""

    @property
    def annotations(self) -> str:
        """File of the annotated regions of H&E, empty without one."""
        return f"{self.variant}/{self.name}.geojson" if self.paired else ""

    @property
    def size_px(self) -> tuple[int, int]:
        """Width and height of its images."""
        return (WIDE_PX if self.number // len(SCORES) % 4 == 1 else SIDE_PX), SIDE_PX


def cases(variant: str = "signal") -> tuple[Case, ...]:
    """Return the cases of a variant, or raise ConfigError.

    0 and 1+ are negative, 3+ is positive, and so is every other case of 2+.
    """
    if variant not in VARIANTS:
        raise ConfigError(f"variant: {variant!r} is unknown; choose from {', '.join(VARIANTS)}")
    found: list[Case] = []
    of_status = {"negative": 0, "positive": 0}
    for number in range(CASES_PER_SCORE * len(SCORES)):
        turn, index = divmod(number, len(SCORES))
        score = SCORES[index]
        positive = score == "3+" or (score == "2+" and turn % 2 == 1)
        status = "positive" if positive else "negative"
        # Sites alternate within each score and each status.
        first = (turn // 2) % 2 == 0
        if variant == "confounded":
            step = round(1 / (1 - CONFOUNDED_FRACTION))
            first = positive != (of_status[status] % step == step // 2)
        of_status[status] += 1
        site = "north" if first else "south"
        paired = turn % 8 in (0, 3, 5)
        found.append(Case(number, score, status, site, paired, variant))
    return tuple(found)


def sheet_text(variant: str = "signal") -> str:
    """Return the sheet; only where the score leaves the status open, 2+, it has the status."""
    return write_rows(
        {
            "pair": case.name,
            "case": case.name,
            "dataset": variant,
            "he": case.he,
            "her2": case.her2,
            "score": case.score,
            "status": case.status if case.score == "2+" else "",
            "site": case.site,
            "annotations": case.annotations,
            "registered": "true" if case.paired else "",
            "he_mpp": f"{TILE_MPP:g}",
            "her2_mpp": f"{TILE_MPP:g}" if case.paired else "",
        }
        for case in cases(variant)
    )


def write_cohort(folder: Path, variant: str, *, seed: int, workers: int) -> None:
    """Write the images and status.tsv; any number of `workers` writes the same bytes."""
    sheet, text = folder / SHEET, sheet_text(variant)
    if sheet.is_file() and sheet.read_text() not in map(sheet_text, VARIANTS):
        raise HemeraError(f"{sheet}: not a sheet of the demo, and kept; name another folder")
    make = functools.partial(write_images, folder, seed)
    # Spawned, not forked: OpenCV's threads do not survive a fork.
    with concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        list(pool.map(make, cases(variant)))
    if not sheet.is_file() or sheet.read_text() != text:
        atomic.write_text(sheet, text)
    log.info("%s: %d cases, variant %s", folder, len(cases(variant)), variant)


def write_images(folder: Path, seed: int, case: Case) -> None:
    """Write the images of a case."""
    cv2.setNumThreads(1)
    rng = np.random.default_rng([seed, *f"{case.variant} {case.name}".encode()])
    size_um = case.size_px[0] * TILE_MPP, case.size_px[1] * TILE_MPP
    visibility = 1.0 if case.variant == "signal" else 0.0
    tissue = grow(rng, size_um, case.score, whole=False, visibility=visibility)
    renderer = Renderer(tissue, rasterise(tissue, TILE_MPP, case.size_px), rng)
    look = SITES[case.site]
    strength = rng.uniform(0.95, 1.05, 2)
    look = dataclasses.replace(
        look, first=look.first * float(strength[0]), second=look.second * float(strength[1])
    )
    images = [(case.he, "he", look)]
    images += [(case.her2, "her2", HER2_LOOK)] if case.paired else []
    for path, stain, scan in images:
        rgb = photograph(np.ascontiguousarray(renderer.draw(stain, scan)), scan, rng)
        bgr = np.ascontiguousarray(rgb[..., ::-1])
        data = cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()
        atomic.write_bytes(folder / path, data)
    if case.annotations:
        atomic.write_text(folder / case.annotations, regions_text(tissue, case.size_px))


def regions_text(tissue: Tissue, size_px: tuple[int, int]) -> str:
    """Return the tumour, and what is around it, as GeoJSON in pixels of an image of this size."""
    width = round(NEST_UM / GRID_UM) | 1
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))
    nests = cv2.morphologyEx(tissue.tumour.astype(np.uint8), cv2.MORPH_CLOSE, disc)
    image = shapely.box(0, 0, *size_px)
    pixels = GRID_UM / TILE_MPP
    outlines = shapely.transform(trace(nests > 0), lambda points: points * pixels)
    tumour = shapely.intersection(shapely.union_all(outlines), image)
    regions = dict(zip(REGIONS, (tumour, shapely.difference(image, tumour)), strict=True))
    features = [
        annotation(polygon, name, REGIONS[name])
        for name, region in regions.items()
        for polygon in shapely.get_parts(region)
        if isinstance(polygon, shapely.Polygon)
    ]
    return json.dumps({"type": "FeatureCollection", "features": features}) + "\n"
