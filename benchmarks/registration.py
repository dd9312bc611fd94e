"""Whether a bad registration passes, and what presets of the engine reach and cost.

*Stress*: right and wrong pairs through the real stage: as they are, turned, mirrored, cropped, of
other tissue, blank, noise, against themselves; target registration error where there is a truth,
and the verdict (goal: no wrong map is `pass`). *Presets* (``--only presets``): error and processor
time of options of the engine, on a synthetic slide of a known field at several canvas sizes and on
the kidney pair. Real pairs take part with ``--images DIR``; it takes hours on two cores.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import math
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from hemera import demo, tables
from hemera.config import DescribeOptions, RegisterOptions
from hemera.demo.plan import plan
from hemera.imaging.slide import open_slide
from hemera.registration import displacement as fields
from hemera.registration.attempts import ATTEMPTS, run_engine
from hemera.registration.canvas import Canvas
from hemera.registration.displacement_files import read_displacement
from hemera.stages import describe, register

RGB = npt.NDArray[np.uint8]
Points = npt.NDArray[np.float64]

ALARM = "  <-- A WRONG MAP PASSED"


@dataclasses.dataclass(frozen=True)
class Case:
    """One pair of images, and what is true of it."""

    name: str
    he: RGB
    her2: RGB
    mpp: tuple[float, float]
    he_points: Points | None = None
    """(N, 2), px of `he`; None: nothing corresponds."""
    her2_points: Points | None = None
    mirrored: bool = False
    """What the sheet says."""


def stressed(
    name: str, he: RGB, her2: RGB, mpp: tuple[float, float], here: Points, there: Points
) -> Iterator[Case]:
    """A right pair as it is and stressed; every map of it has a truth."""
    base = Case(name, he, her2, mpp, here, there)
    yield base
    rotated, matrix = turned(her2, 137)
    moved = there @ matrix[:, :2].T + matrix[:, 2]
    yield dataclasses.replace(base, name=f"{name}, turned 137", her2=rotated, her2_points=moved)
    flipped = np.ascontiguousarray(her2[:, ::-1])
    mirror = there * (-1, 1) + (her2.shape[1], 0)
    yield dataclasses.replace(base, name=f"{name}, mirrored", her2=flipped, her2_points=mirror)
    yield dataclasses.replace(
        base, name=f"{name}, mirrored, declared", her2=flipped, her2_points=mirror, mirrored=True
    )
    half = her2.shape[1] // 2
    for side, columns in (("left", slice(0, half)), ("right", slice(half, None))):
        inside = (there[:, 0] < half) == (side == "left")
        yield dataclasses.replace(
            base,
            name=f"{name}, {side} half of HER2",
            her2=np.ascontiguousarray(her2[:, columns]),
            he_points=here[inside],
            her2_points=there[inside] - (columns.start, 0),
        )


def wrong(name: str, he: RGB, other: RGB, mpp: tuple[float, float]) -> Iterator[Case]:
    """Pairs that no map is right for."""
    rng = np.random.default_rng(5)
    height, width = he.shape[:2]
    yield Case(f"{name}, other tissue", he, other, mpp)
    blank = np.full((height + 40, width - 30, 3), 243, np.uint8)
    speckle = rng.integers(-2, 3, blank.shape)
    yield Case(f"{name}, blank", he, (blank + speckle).astype(np.uint8), mpp)
    noise = cv2.GaussianBlur(rng.normal(size=blank.shape), (0, 0), 3)
    yield Case(f"{name}, noise", he, np.clip(190 + 220 * noise, 0, 255).astype(np.uint8), mpp)


def turned(rgb: RGB, degrees: float) -> tuple[RGB, npt.NDArray[np.float64]]:
    """Turn an image on a canvas that holds all of it; return it and the map of points, px."""
    height, width = rgb.shape[:2]
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1).astype(np.float64)
    corners = np.array([(0, 0), (width, 0), (0, height), (width, height)]) @ matrix[:, :2].T
    low, high = corners.min(axis=0), corners.max(axis=0)
    matrix[:, 2] = -low
    size = tuple(int(n) for n in np.ceil(high - low))
    # Points have pixel edges at the integers, OpenCV pixel centres.
    centred = matrix.copy()
    centred[:, 2] += matrix[:, :2] @ (0.5, 0.5) - 0.5
    image = cv2.warpAffine(
        rgb, centred, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_CONSTANT,
        borderValue=(255, 255, 255),
    )  # fmt: skip
    return np.asarray(image, np.uint8), matrix


def real_cases(images: Path) -> Iterator[Case]:
    """The kidney pair with its landmarks, and what it is no pair with."""
    folder = images / "registration" / "birl" / "rat-kidney_" / "scale-5pc"
    he, her2 = (_image(folder / f"Rat-Kidney_{n}.jpg") for n in ("HE", "PanCytokeratin"))
    here, there = (
        np.loadtxt(folder / f"Rat-Kidney_{n}.csv", delimiter=",", skiprows=1, usecols=(1, 2))
        for n in ("HE", "PanCytokeratin")
    )
    mpp = 4.6, 4.6
    yield from stressed("kidney", he, her2, mpp, here[: len(there)], there)
    with open_slide(images / "wsi" / "CMU-1-Small-Region.svs") as slide:
        other = slide.overview(side_px=1100)[0]
    yield from wrong("kidney", he, other, mpp)
    grid = np.stack(np.meshgrid(np.arange(100, 1000, 90.0), np.arange(90, 700, 70.0)), axis=-1)
    points = grid.reshape(-1, 2)
    yield Case("kidney, itself", he, he, mpp, points, points)


def demo_cases(folder: Path) -> Iterator[Case]:
    """Pairs of the demo cohort at a quarter of their resolution, with their exact truth."""
    names = [
        line.split("\t")[0] for line in demo.sheet_text().splitlines()[1:] if "\tacrobat\t" in line
    ]
    is_stressed = True
    for name in names:
        case = demo_case(folder, name, 4)
        if case.he_points is None or case.her2_points is None:
            yield case
            continue
        cases = stressed(case.name, case.he, case.her2, case.mpp, case.he_points, case.her2_points)
        # One of them in full, of the others the pair as it is.
        yield from cases if is_stressed else [case]
        is_stressed = False


def demo_case(folder: Path, name: str, factor: float) -> Case:
    """Return a pair of the demo cohort at a multiple of its um per pixel, with its exact truth."""
    truth = demo.load_truth(folder, name)
    stem, number = name.removeprefix("acrobat_").rsplit("_", 1)
    images, mpps = [], []
    for stain in ("HE", "HER2"):
        with open_slide(folder / "acrobat" / f"{number}_{stain}_{stem}.tif") as slide:
            small, effective = slide.overview(mpp=factor * slide.mpp)
            images.append(small)
            mpps.append(effective[0])
    he, her2 = images
    mpp = mpps[0], mpps[1]
    if truth.field is None:
        return Case(f"demo {name}, other tissue", he, her2, mpp)
    y, x = np.nonzero(_dark(he))
    chosen = np.random.default_rng(3).permutation(len(x))[:400]
    here = np.stack([x, y], axis=-1)[chosen] + 0.5
    there = truth.field.to_moving(here * mpp[0]) / mpp[1]
    inside = ((there > 0) & (there < (her2.shape[1], her2.shape[0]))).all(axis=1)
    return Case(f"demo {name}", he, her2, mpp, here[inside], there[inside])


def sized_cases(folder: Path, sizes_px: Sequence[int]) -> Iterator[Case]:
    """The first slide of the demo cohort on canvases of these shortest sides."""
    slide = plan("full").slides[0]
    native_px = max(slide.he_size_px[1], slide.her2_size_px[1])
    for size_px in sizes_px:
        case = demo_case(folder, slide.pair, max(1.0, native_px / size_px))
        yield dataclasses.replace(case, name=f"demo, {min(size_px, native_px)} px")


def _dark(rgb: RGB) -> npt.NDArray[np.bool_]:
    return cv2.GaussianBlur(cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)[..., 1], (0, 0), 3) > 25


def _image(path: Path) -> RGB:
    image = cv2.imread(str(path))
    assert image is not None, path
    return np.ascontiguousarray(image[..., ::-1])


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "default, 100 iterations": {"iterations": 100},
    "default, 6 levels": {"levels": 6},
    "as published, fast": {"iterations": None, "levels": 7},
    "as published": {"preset": "default_initial_nonrigid", "iterations": None, "levels": 8},
}


def presets(cases: list[Case]) -> Iterator[str]:
    """Run the engine alone on the canvas of each case; errors are in um of HER2."""
    yield f"{'pair':<24} {'options':<24} levels  CPU s  rigid: median p90    final: median p90"
    for case in cases:
        assert case.he_points is not None
        for name, changes in PRESETS.items():
            options = RegisterOptions(torch_threads=1, device="cpu", **changes)
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            attempt = ATTEMPTS[int("turned" in case.name)]
            canvas = Canvas(case.he, case.her2, case.mpp[0])
            with tempfile.TemporaryDirectory() as folder:
                found, mirrored, _ = run_engine(
                    canvas, attempt, case.mirrored, options, Path(folder) / "engine"
                )
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            at_um = case.he_points * case.mpp[0]
            width_um = case.her2.shape[1] * case.mpp[1]
            maps = [
                fields.mirrored(d, width_um) if mirrored else d
                for d in (found.rigid, found.nonrigid)
                if d is not None
            ]
            goal_um = case.her2_points * case.mpp[1]
            errors = [np.linalg.norm(fields.map_points(d, at_um) - goal_um, axis=1) for d in maps]
            figures = "".join(f"{np.median(e):14.2f} {np.percentile(e, 90):6.2f}" for e in errors)
            levels = options.levels or "auto"
            seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            yield f"{case.name:<24} {name:<24} {levels:>6} {seconds:6.0f} {figures}"


def register_case(case: Case, options: RegisterOptions) -> str:
    """Run describe and register on a case; return its line of the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for stain, rgb in (("he", case.he), ("her2", case.her2)):
            cv2.imwrite(str(folder / f"{stain}.png"), rgb[..., ::-1])
        header = "pair\tcase\tdataset\the\ther2\the_mpp\ther2_mpp\tmirrored"
        cells = ["p", "p", "own", "he.png", "her2.png", *map(str, case.mpp)]
        cells.append(str(case.mirrored).lower())
        (folder / "pairs.tsv").write_text(header + "\n" + "\t".join(cells) + "\n")
        common = {"sheet": folder / "pairs.tsv", "unit": "p", "images_table": folder / "d.parquet"}
        describe.run(**common, block_count=1, options=DescribeOptions())
        started = time.monotonic()
        register.run(
            **common,
            displacement=folder / "d.npz",
            certificate=folder / "c.parquet",
            quality=folder / "q.parquet",
            options=options,
        )
        seconds = time.monotonic() - started
        [row] = tables.read(folder / "c.parquet", tables.CERTIFICATE).to_pylist()
        errors = _errors(case, row, read_displacement(folder / "d.npz"))
    signals = " ".join(
        f"{row[key]:6.2f}" if row[key] is not None else "     -"
        for key in ("tile_ok", "lncc", "ncc_margin", "match_fraction", "mirror_probe")
    )
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    wrong_map = _wrong(case, errors)
    alarm = ALARM if wrong_map and row["verdict"] == "pass" else ""
    return (
        f"{case.name:<42} {errors:<27} {signals}  {row['map']:<8} {len(row['attempts'])} "
        f"{seconds:5.0f} s {memory:6.0f} MB  {row['verdict']:<6} {row['reason'] or ''}{alarm}"
    )


def _errors(case: Case, row: dict[str, Any], d: fields.Displacement) -> str:
    """Median error at the points, px of HER2: identity, rigid, kept map; its 90th percentile."""
    if case.he_points is None or case.her2_points is None:
        return "no truth"
    he_um, her2_mpp = case.he_points * case.mpp[0], case.mpp[1]

    def error(points_um: Points) -> Points:
        return np.linalg.norm(points_um / her2_mpp - case.her2_points, axis=1)

    texts = [f"{np.median(error(he_um)):5.0f}"]
    if row["rigid"]:
        matrix = np.array(row["rigid"]).reshape(2, 3)
        texts.append(f"{np.median(error(he_um @ matrix[:, :2].T + matrix[:, 2])):6.1f}")
    if not d.empty:
        found = error(fields.map_points(d, he_um))
        texts += [f"{np.median(found):6.1f}", f"{np.percentile(found, 90):6.1f}"]
    return " ".join(texts)


def _wrong(case: Case, errors: str) -> bool:
    """A map is wrong without a truth, or beside it by 2 % of the diagonal (5 % for one in ten)."""
    if case.he_points is None:
        return True
    words = errors.split()
    diagonal_px = math.hypot(*case.he.shape[:2])
    return len(words) < 4 or (
        float(words[2]) > 0.02 * diagonal_px or float(words[3]) > 0.05 * diagonal_px
    )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--images", type=Path, help="folder of real images, for the real pairs")
    parser.add_argument("--only", choices=("stress", "presets"), help="one table")
    parser.add_argument("--preset", default=RegisterOptions().preset, help="of the stress table")
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=[768, 2048, 4096], help="of presets"
    )
    parser.add_argument("--retries", type=int, default=RegisterOptions().retries)
    parser.add_argument("--filter", default="", help="only cases whose name holds this")
    parser.add_argument("--workers", type=int, default=2, help="cases at a time")
    given = parser.parse_args()
    if given.only == "presets":
        with tempfile.TemporaryDirectory() as name:
            demo.write_cohort(Path(name))
            cases = [*sized_cases(Path(name), given.sizes)]
        if given.images:
            cases += [case for case in real_cases(given.images) if case.he_points is not None]
        for line in presets([case for case in cases if given.filter in case.name]):
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
        return
    sys.stdout.write(
        f"\n{'pair':<42} {'median px: before rigid map p90':<27} tile_ok lncc margin  match mirror"
        "  map  tries, time, engine's memory, verdict\n"
    )
    options = RegisterOptions(preset=given.preset, retries=given.retries, torch_threads=1)
    with (
        tempfile.TemporaryDirectory() as name,
        concurrent.futures.ProcessPoolExecutor(given.workers, max_tasks_per_child=1) as pool,
    ):
        demo.write_cohort(Path(name))
        cases = [*demo_cases(Path(name))]
        if given.images:
            cases = [*real_cases(given.images), *cases]
        chosen = [case for case in cases if given.filter in case.name]
        alarms = 0
        for line in pool.map(register_case, chosen, [options] * len(chosen)):
            alarms += line.endswith(ALARM)
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
    if alarms:
        sys.exit(f"{alarms} wrong maps passed")


if __name__ == "__main__":
    main()
