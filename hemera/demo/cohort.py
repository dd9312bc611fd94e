"""Writes the demo cohort: slides, image pairs, ACROBAT's tables, the sheet, and the truth."""

import concurrent.futures
import csv
import dataclasses
import functools
import io
import logging
import multiprocessing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import tifffile

from hemera.demo.cells import EPITHELIUM, SPINDLE, TUMOUR, Cells
from hemera.demo.field import Field, make_field
from hemera.demo.plan import (
    LANDMARKS,
    META,
    SIZES,
    TILE_MPP,
    TILE_SIDE_PX,
    SlidePair,
    TilePair,
    plan,
    sheet_text,
)
from hemera.demo.render import Appearance, Image, Renderer, rasterise
from hemera.demo.scanner import defocus, pen_mark, photograph
from hemera.demo.tissue import Tissue, grow
from hemera.errors import HemeraError
from hemera.files import atomic

log = logging.getLogger(__name__)

TRUTH_MPP = 8.0
"""Spacing of the sampled displacement, um."""

LANDMARK_COUNT = 60


@dataclasses.dataclass(frozen=True)
class Truth:
    """What is true of one pair of the demo.

    Attributes:
        pair: its name in the sheet.
        score: HER2 score of the slide.
        field: the exact map from H&E to HER2, or None when HER2 is of another tissue.
        vectors_um: `field` sampled as HEMERA stores displacements: float32 (H, W, 2), (dx, dy) in
            um, node (i, j) at ((j + .5) mpp, (i + .5) mpp) on H&E; empty without a field.
        mpp: spacing of `vectors_um`, um.
        labels: (H, W) uint8 on the level-0 grid of H&E, in the format of masks: bits 0-1 class
            (0 background, 1 negative, 2 positive cell), bit 2 nucleus, bits 3-4 DAB intensity.
        cells: every cell of the H&E section: centre, radii, angle, kind, intensity; um on H&E.
    """

    pair: str
    score: str
    field: Field | None
    vectors_um: npt.NDArray[np.float32]
    mpp: float
    labels: npt.NDArray[np.uint8]
    cells: Cells

    @property
    def positive_fraction(self) -> float:
        """Fraction of tumour cells stained for HER2; NaN without tumour."""
        tumour = self.cells.kind == TUMOUR
        return float((self.cells.intensity[tumour] > 0).mean()) if tumour.any() else float("nan")


def write_cohort(folder: Path, size: str, *, seed: int, visibility: float, workers: int) -> None:
    """Write the cohort; see `hemera.demo.write_cohort`."""
    folder = Path(folder)
    sheet = folder / "pairs.tsv"
    if sheet.is_file() and sheet.read_text() not in map(sheet_text, SIZES):
        raise HemeraError(f"{sheet}: not a sheet of the demo, and kept; name another folder")
    cohort = plan(size)
    jobs: list[SlidePair | TilePair] = [*cohort.slides, *cohort.tiles]
    make = functools.partial(_make, folder, seed, visibility)
    if workers > 1:
        # Spawned, not forked: OpenCV's threads do not survive a fork.
        with concurrent.futures.ProcessPoolExecutor(
            workers, mp_context=multiprocessing.get_context("spawn")
        ) as pool:
            points = list(pool.map(make, jobs))
    else:
        points = [make(job) for job in jobs]
    atomic.write_text(folder / META, _metadata(cohort.slides))
    atomic.write_text(folder / LANDMARKS, _landmarks(cohort.slides, points))
    # The demo's own sheet is committed: it is not rewritten when unchanged.
    if not sheet.is_file() or sheet.read_text() != sheet_text(size):
        atomic.write_text(sheet, sheet_text(size))
    log.info("%s: %d slide pairs, %d image pairs", folder, len(cohort.slides), len(cohort.tiles))


def load_truth(folder: Path, pair: str) -> Truth:
    """Read the truth of `pair`.

    Raises:
        HemeraError: the cohort in `folder` has no such pair.
    """
    path = Path(folder) / "truth" / f"{pair}.npz"
    try:
        with np.load(path) as arrays:
            stored = {name: arrays[name] for name in arrays.files}
    except FileNotFoundError:
        raise HemeraError(f"{path}: no such file; write the demo cohort first") from None
    names = [field.name for field in dataclasses.fields(Cells)]
    cells = Cells(**{name: stored[f"cells_{name}"] for name in names})
    field = None
    if "field_angle_deg" in stored:
        names = [item.name for item in dataclasses.fields(Field) if item.name != "angle_deg"]
        arguments = {name: stored[f"field_{name}"] for name in names}
        field = Field(float(stored["field_angle_deg"]), **arguments)
    return Truth(
        pair=str(stored["pair"]),
        score=str(stored["score"]),
        field=field,
        vectors_um=stored["vectors_um"],
        mpp=float(stored["mpp"]),
        labels=stored["labels"],
        cells=cells,
    )


def _generator(seed: int, name: str) -> np.random.Generator:
    """Return a random generator that depends on the seed and a name only."""
    return np.random.default_rng([seed, *name.encode()])


def _make(
    folder: Path, seed: int, visibility: float, job: SlidePair | TilePair
) -> list[tuple[float, ...]]:
    """Write one pair and its truth; return its landmarks (x, y on H&E, x, y on HER2), um."""
    cv2.setNumThreads(1)
    if isinstance(job, SlidePair):
        return _make_slides(folder, seed, visibility, job)
    _make_tiles(folder, seed, visibility, job)
    return []


def _make_slides(
    folder: Path, seed: int, visibility: float, slide: SlidePair
) -> list[tuple[float, ...]]:
    rng = _generator(seed, slide.pair)
    width, height = slide.he_size_px
    size_um = (width * slide.he_mpp, height * slide.he_mpp)
    tissue = grow(rng, size_um, slide.score, whole=True, visibility=visibility)
    renderer = Renderer(tissue, rasterise(tissue, slide.he_mpp, slide.he_size_px), rng)
    field = make_field(
        rng,
        angle_deg=slide.angle_deg,
        shift_um=slide.shift_um,
        elastic_um=slide.elastic_um,
        fixed_um=size_um,
        moving_um=(slide.her2_size_px[0] * slide.her2_mpp, slide.her2_size_px[1] * slide.her2_mpp),
    )
    red, green, blue = rng.integers((232, 226, 230), (242, 236, 240)).tolist()
    look = Appearance((red, green, blue), rng.uniform(0.9, 1.1), rng.uniform(0.9, 1.1))
    he = renderer.draw("he", look)
    if slide.artefacts:
        he = defocus(he, (0.63 * width, 0.58 * height), (0.17 * width, 0.19 * height))
        he = pen_mark(he, _stroke(width, height), 150 / slide.he_mpp, rng)
    _write_slide(folder / slide.he, photograph(he, look, rng), slide.he_mpp)

    labels = renderer.labels()
    if slide.other_tissue:
        other = _generator(seed, f"{slide.pair} other tissue")
        other_tissue = grow(other, size_um, slide.score, whole=True, visibility=visibility)
        raster = rasterise(other_tissue, slide.he_mpp, slide.he_size_px)
        renderer = Renderer(other_tissue, raster, other)
    look = Appearance((248, 247, 246), rng.uniform(0.9, 1.1), rng.uniform(0.95, 1.1), grain=0.7)
    her2 = field.warp(
        renderer.draw("her2", look),
        slide.he_mpp,
        slide.her2_size_px,
        slide.her2_mpp,
        look.background,
    )
    _write_slide(folder / slide.her2, photograph(her2, look, rng), slide.her2_mpp)
    true_field = None if slide.other_tissue else field
    _write_truth(folder, slide.pair, tissue, true_field, size_um, labels)
    if not slide.landmarks:
        return []
    return _points(rng, tissue, field, slide)


def _make_tiles(folder: Path, seed: int, visibility: float, tile: TilePair) -> None:
    rng = _generator(seed, tile.pair)
    size_px = (TILE_SIDE_PX, TILE_SIDE_PX)
    size_um = (TILE_SIDE_PX * TILE_MPP, TILE_SIDE_PX * TILE_MPP)
    # Grown and drawn with a margin, so that the shifted HER2 image has tissue up to its edges.
    margin = 16
    grown_um = (size_um[0] + 2 * margin * TILE_MPP, size_um[1] + 2 * margin * TILE_MPP)
    drawn_px = (TILE_SIDE_PX + 2 * margin, TILE_SIDE_PX + 2 * margin)
    tissue = grow(rng, grown_um, tile.score, whole=False, empty=tile.empty, visibility=visibility)
    renderer = Renderer(tissue, rasterise(tissue, TILE_MPP, drawn_px), rng)
    turn, reach = rng.uniform(0, 2 * np.pi), rng.uniform(1.0, 4.0) * TILE_MPP
    field = make_field(
        rng,
        angle_deg=0.0,
        shift_um=(reach * np.cos(turn), reach * np.sin(turn)),
        elastic_um=0.3,
        fixed_um=size_um,
        moving_um=size_um,
    )
    he_look = Appearance((228, 216, 222), rng.uniform(0.88, 1.12), rng.uniform(0.9, 1.1), 1.0)
    if tile.gray:
        look = Appearance((180, 178, 175), rng.uniform(0.7, 0.8), rng.uniform(0.7, 0.85), 0.6, 0.75)
    else:
        look = Appearance((254, 251, 249), rng.uniform(0.8, 1.0), rng.uniform(0.85, 1.05), 0.7, 0.6)
    inner = slice(margin, margin + TILE_SIDE_PX)
    he = renderer.draw("he", he_look)[inner, inner]
    # The field is about the image without its margin; the drawing begins a margin earlier.
    drawn = dataclasses.replace(field, **_shifted(field, margin * TILE_MPP))
    her2 = drawn.warp(renderer.draw("her2", look), TILE_MPP, size_px, TILE_MPP, look.background)
    for path, image, scan in ((tile.he, he, he_look), (tile.her2, her2, look)):
        data = _encode(photograph(np.ascontiguousarray(image), scan, rng), tile.jpeg)
        atomic.write_bytes(folder / path, data)
    labels = np.ascontiguousarray(renderer.labels()[inner, inner])
    cells = tissue.cells
    moved = dataclasses.replace(
        cells, x=cells.x - np.float32(margin * TILE_MPP), y=cells.y - np.float32(margin * TILE_MPP)
    )
    tissue = dataclasses.replace(tissue, cells=moved)
    _write_truth(folder, tile.pair, tissue, field, size_um, labels)


def _shifted(field: Field, margin_um: float) -> dict[str, Any]:
    """Return what changes in a field when its fixed frame begins `margin_um` earlier."""
    return {
        "fixed_centre": field.fixed_centre + margin_um,
        "phases": field.phases - margin_um * field.frequencies.sum(axis=1),
    }


def _stroke(width: int, height: int) -> npt.NDArray[np.float64]:
    """Return a pen's path (N, 2), px, in an arc over the upper left corner of the section."""
    turn = np.linspace(0.15 * np.pi, 0.60 * np.pi, 60)
    x = 0.02 * width + 0.30 * width * np.sin(turn) + 12 * np.sin(9 * turn)
    y = 0.52 * height - 0.42 * height * np.cos(turn - 0.35 * np.pi) + 9 * np.cos(7 * turn)
    return np.stack([x, y], axis=-1)


def _encode(image: Image, jpeg: bool) -> bytes:
    """Return the bytes of an image: JPEG, as in some copies of BCI, or PNG as their names state."""
    bgr = np.ascontiguousarray(image[..., ::-1])
    if jpeg:
        ok, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 92])
    else:
        ok, data = cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, 4])
    if not ok:
        raise HemeraError("demo: OpenCV could not encode an image; reinstall it with its codecs")
    return data.tobytes()


def _write_slide(path: Path, image: Image, mpp: float) -> None:
    """Write a pyramid as ACROBAT's: JPEG tiles of 512 px, one page per level."""
    levels = [image]
    while min(levels[-1].shape[:2]) > 512:
        height, width = levels[-1].shape[:2]
        half = cv2.resize(levels[-1], (width // 2, height // 2), interpolation=cv2.INTER_AREA)
        levels.append(np.asarray(half, dtype=np.uint8))
    with atomic.replacing(path) as temporary, tifffile.TiffWriter(temporary) as tiff:
        for level, pixels in enumerate(levels):
            effective = mpp * image.shape[1] / pixels.shape[1]
            tiff.write(
                pixels,
                photometric="rgb",  # of what comes in; the tiles are YCbCr
                compression="jpeg",
                compressionargs={"level": 90},
                tile=(512, 512),
                subfiletype=1 if level else 0,
                resolution=(1e4 / effective, 1e4 / effective),
                resolutionunit="CENTIMETER",
                metadata=None,
                software=False,
                maxworkers=1,
            )


def _write_truth(
    folder: Path,
    pair: str,
    tissue: Tissue,
    field: Field | None,
    size_um: tuple[float, float],
    labels: npt.NDArray[np.uint8],
) -> None:
    arrays: dict[str, npt.NDArray[Any]] = {
        "pair": np.array(pair),
        "score": np.array(tissue.score),
        "mpp": np.array(TRUTH_MPP),
        "labels": labels,
        "vectors_um": np.zeros((0, 0, 2), np.float32),
    }
    for item in dataclasses.fields(Cells):
        arrays[f"cells_{item.name}"] = getattr(tissue.cells, item.name)
    if field is not None:
        arrays["vectors_um"] = field.displacement(size_um, TRUTH_MPP)
        for item in dataclasses.fields(Field):
            arrays[f"field_{item.name}"] = np.asarray(getattr(field, item.name))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    atomic.write_bytes(folder / "truth" / f"{pair}.npz", buffer.getvalue())


def _points(
    rng: np.random.Generator, tissue: Tissue, field: Field, slide: SlidePair
) -> list[tuple[float, ...]]:
    """Return landmarks on both slides: nuclei far from each other, at their true positions."""
    cells = tissue.cells
    candidates = np.flatnonzero(np.isin(cells.kind, (EPITHELIUM, TUMOUR, SPINDLE)))
    fixed = np.stack([cells.x, cells.y], axis=-1).astype(np.float64)
    moving = field.to_moving(fixed)
    limit = np.array(slide.her2_size_px) * slide.her2_mpp
    chosen: list[int] = []
    for index in rng.permutation(candidates).tolist():
        inside = (moving[index] > 10).all() and (moving[index] < limit - 10).all()
        apart = all(np.hypot(*(fixed[index] - fixed[other])) > 90 for other in chosen)
        if inside and apart:
            chosen.append(index)
        if len(chosen) == LANDMARK_COUNT:
            break
    return [(*fixed[index].tolist(), *moving[index].tolist()) for index in chosen]


def _metadata(slides: tuple[SlidePair, ...]) -> str:
    """Return df_acrobat_meta.csv: one row per slide, empty where a level is missing."""
    levels = range(9)
    header = ["anon_id", "set", "stain", "filename", "vendor", "model"]
    header += [f"mpp_lvl_{level}" for level in levels]
    header += [f"magnification_lvl_{level}" for level in levels]
    rows = []
    for slide in slides:
        for stain, name, mpp, size in (
            ("HE", slide.he, slide.he_mpp, slide.he_size_px),
            ("HER2", slide.her2, slide.her2_mpp, slide.her2_size_px),
        ):
            count = 1
            while min(size) >> (count - 1) > 512:
                count += 1
            mpps = [f"{mpp * 2**k:.4f}" if k < count else "" for k in levels]
            powers = [f"{10 / 2**k:g}" if k < count else "" for k in levels]
            first = [str(slide.number), slide.part, stain, Path(name).name]
            rows.append([*first, "Hamamatsu", "NanoZoomer XR", *mpps, *powers])
    return _table([header, *rows])


def _landmarks(slides: tuple[SlidePair, ...], points: list[list[tuple[float, ...]]]) -> str:
    """Return landmarks as ACROBAT's, in um; its names end in .ndpi, though the files are .tif."""
    header = ["anon_id", "anon_filename_he", "anon_filename_ihc", "point_id", "ihc_x", "ihc_y"]
    header += ["mpp_ihc_10X", "mpp_he_10X", "ihc_antibody", "he_x", "he_y"]
    rows: list[list[str]] = []
    for slide, own in zip(slides, points, strict=False):
        names = [Path(name).with_suffix(".ndpi").name for name in (slide.he, slide.her2)]
        for he_x, he_y, ihc_x, ihc_y in own:
            # Counted through all pairs: the challenge identifies points by their number only.
            number = len(rows)
            rows.append(
                [
                    *(str(slide.number), *names, str(number), f"{ihc_x:.4f}", f"{ihc_y:.4f}"),
                    *(f"{slide.her2_mpp:g}", f"{slide.he_mpp:g}", "HER2"),
                    *(f"{he_x:.4f}", f"{he_y:.4f}"),
                ]
            )
    return _table([header, *rows])


def _table(rows: list[list[str]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()
