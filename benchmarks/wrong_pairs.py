"""Wrong pairs of real images: what `describe` and `hemera sheet check` find, as a confusion table.

Every real H&E and IHC image is given as `he` and as `her2`: right and other patient's, swapped, two
of one stain, the same file, a recompressed and a resized copy. *Left out*: the limits of the stain
are those in the middle of the gap between H&E and IHC of all other sources. *Quarters*: the stain
of each quarter of an image. *Alignment*: pairs that come registered whose structure matches best in
place, of true and of all wrong pairs. *Histograms*: the similarity of tiles of registered pairs.
Ready-made pairs of another patient are accepted with a warning. *Slides* (``--slides FILE``): the
verdict of `register`, with its default options, on every H&E slide with every IHC slide, right and
another patient's; hours. The verdicts are kept in FILE, a pair in it is not registered again; a
smaller canvas (``--size-px``) and fewer attempts (``--retries``) cost less.
"""

import argparse
import collections
import csv
import itertools
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from _resolutions import FOLDERS, MPP

from hemera import tables
from hemera.config import DescribeOptions, RegisterOptions
from hemera.config.registration import CANVAS_PX
from hemera.errors import SlideError
from hemera.imaging.background import measure_background
from hemera.imaging.identity import (
    HE,
    IHC,
    Identity,
    contradictions,
    eosin_excess,
    identify,
    identify_stain,
)
from hemera.imaging.morphology import coarse
from hemera.imaging.quality import histogram_similarity
from hemera.imaging.resample import halved
from hemera.imaging.slide import open_slide
from hemera.registration.alignment import Structure, match_in_place, structure
from hemera.stages import describe, register

RGB = npt.NDArray[np.uint8]

WITHOUT_TISSUE = ("no-tissue.png", "no-tissue-line.png")


class Real(NamedTuple):
    """A real image; `key` is that of its pair, `rgb` has at most 2,048 px a side."""

    name: str
    source: str
    key: str
    stain: str
    path: Path
    identity: Identity
    rgb: RGB
    mpp: float


def real_images(folder: Path) -> Iterator[Real]:
    """Read every H&E and IHC image that the list of the folder names."""
    with (folder / "MANIFEST.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    for row in rows:
        stain = {"H&E": HE, "IHC": IHC}.get(row["stain"].split(" ")[0])
        path = folder / row["file"]
        # A strip of several stains, and copies of the two sections under `registration`.
        if stain is None or path.parent.name == "train" or path.parts[-2] == "wsi_derived":
            continue
        if path.name in WITHOUT_TISSUE:
            continue
        top = Path(row["file"]).parts[0]
        mpp = MPP["normal" if path.name.startswith("normal") else FOLDERS.get(top, "misc")]
        try:
            with open_slide(path, mpp=mpp) as slide:
                rgb, (shown_mpp, _) = slide.overview(side_px=2048)
                identity = identify(slide)
        except SlideError as error:
            sys.stdout.write(f"left out: {error}\n")
            continue
        source = "mist" if "mist" in path.name else "bci" if "bci" in row["file"] else top
        yield Real(path.name, source, row["pair_id"], stain, path, identity, rgb, shown_mpp)


def verdict(he: Identity, her2: Identity) -> str:
    """Return the verdict on a pair of two images."""
    found = {name for name, _ in contradictions(he, her2).values()}
    return "refuse" if "refuse" in found else "wrong_stain" if found else "accept"


def copies(real: Real, folder: Path) -> Iterator[tuple[str, Identity]]:
    """Yield copies of an image: the same file, recompressed, resized, both."""
    yield "same file", real.identity
    rgb = real.rgb
    for name, factor, quality in (
        ("recompressed, JPEG 40", 1.0, 40),
        ("resized to 0.6", 0.6, 100),
        ("resized to 0.6, JPEG 60", 0.6, 60),
    ):
        small = cv2.resize(rgb, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
        path = folder / "copy.jpg"
        cv2.imwrite(str(path), small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
        with open_slide(path, mpp=real.mpp / factor) as slide:
            yield name, identify(slide)


def confusion(images: list[Real]) -> None:
    """Print the verdicts on all combinations beside the documented one."""
    he, ihc = ([real for real in images if real.stain == stain] for stain in (HE, IHC))
    table: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for a, b in itertools.product(he, ihc):
        kind = "right" if a.key and a.key == b.key else "another patient's, or tissue's, HER2"
        table[kind][verdict(a.identity, b.identity)] += 1
        table["swapped"][verdict(b.identity, a.identity)] += 1
    for name, group in (("H&E as HER2", he), ("HER2 as H&E", ihc)):
        for a, b in itertools.permutations(group, 2):
            table[name][verdict(a.identity, b.identity)] += 1
    with tempfile.TemporaryDirectory() as folder:
        for real in images:
            for kind, identity in copies(real, Path(folder)):
                table[kind][verdict(real.identity, identity)] += 1
    documented = collections.defaultdict(lambda: "refuse") | {
        "right": "accept",
        "another patient's, or tissue's, HER2": "accept",
        **dict.fromkeys(("swapped", "H&E as HER2", "HER2 as H&E"), "wrong_stain"),
    }
    sys.stdout.write(f"{len(he)} H&E and {len(ihc)} IHC images\n")
    columns = ("accept", "wrong_stain", "refuse")
    head = f"{'given':38}{'documented':>13}" + "".join(f"{name:>13}" for name in columns)
    sys.stdout.write(f"{head}{'correct':>10}\n")
    for kind, counts in table.items():
        right = counts[documented[kind]] / counts.total()
        line = "".join(f"{counts[name]:13}" for name in columns)
        sys.stdout.write(f"{kind:38}{documented[kind]:>13}{line}{right:10.1%}\n")


def background(real: Real) -> tuple[int, int, int] | None:
    """Return the colour of the background, None where there is none."""
    found = measure_background([real.rgb], real.mpp)
    return found.color if found.measured else None


def stains(images: list[Real]) -> None:
    """Print how many stains are identified, with the own limits and those of other sources."""
    counts: collections.Counter[tuple[str, str | None]] = collections.Counter()
    high: dict[str, list[tuple[str, float]]] = collections.defaultdict(list)
    for real in images:
        counts[real.stain, real.identity.stain] += 1
        # The 99th percentile where there is no background, as in `identify_stain`.
        color = background(real)
        if color is None:
            red, green, blue = np.percentile(
                coarse(real.rgb, real.mpp).reshape(-1, 3), 99, axis=0
            ).round()
            color = int(red), int(green), int(blue)
        excess, _ = eosin_excess(real.rgb, real.mpp, color)
        high[real.source].append((real.stain, float(np.percentile(excess, 90))))
        height, width = (side // 2 for side in real.rgb.shape[:2])
        if min(height, width) < 128:
            continue
        for y, x in itertools.product((0, height), (0, width)):
            part = real._replace(rgb=np.ascontiguousarray(real.rgb[y : y + height, x : x + width]))
            seen = identify_stain(part.rgb, part.mpp, background(part))
            counts[f"quarter of {real.stain}", seen] += 1
    for (truth, seen), number in sorted(counts.items(), key=str):
        sys.stdout.write(f"{truth}: {seen or 'not shown by its colours'}: {number}\n")
    wrong = total = 0
    for source, left_out in high.items():
        others = [item for name, own in high.items() if name != source for item in own]
        lowest = min(value for stain, value in others if stain == HE)
        highest = max(value for stain, value in others if stain == IHC)
        wrong += sum((value > (lowest + highest) / 2) != (stain == HE) for stain, value in left_out)
        total += len(left_out)
    values = [item for own in high.values() for item in own]
    lowest = min(value for stain, value in values if stain == HE)
    highest = max(value for stain, value in values if stain == IHC)
    sys.stdout.write(
        f"one of {len(high)} sources left out: {wrong} of {total} wrong; 90th percentile of the "
        f"eosin excess: H&E from {lowest:.3f}, IHC up to {highest:.3f}\n"
    )


def registered(images: list[Real]) -> list[tuple[Real, Real]]:
    """Return the pairs of ready-made images."""
    found: Mapping[str, dict[str, Real]] = collections.defaultdict(dict)
    for real in images:
        if real.source in ("bci", "mist"):
            found[real.key][real.stain] = real
    return [(own[HE], own[IHC]) for own in found.values() if len(own) == 2]


def alignment(pairs: list[tuple[Real, Real]]) -> None:
    """Print how many true and wrong pairs match best in place."""

    def of(real: Real) -> Structure:
        return structure(real.rgb, real.mpp, measure_background([real.rgb], real.mpp).color)

    shown = [(of(a), of(b)) for a, b in pairs]
    margins: dict[bool, list[float]] = {True: [], False: []}
    for (i, (he, _)), (j, (_, her2)) in itertools.product(enumerate(shown), repeat=2):
        found = match_in_place(he, her2)
        if found is not None:
            margins[i == j].append(found[1])
    true, wrong = (np.array(margins[key]) for key in (True, False))
    auc = float((np.subtract.outer(true, wrong) > 0).mean())
    sys.stdout.write(
        f"alignment measurable: {np.count_nonzero(true > 0)} of {len(true)} registered pairs, "
        f"{np.count_nonzero(wrong > 0)} of {len(wrong)} wrong pairs; AUC of the margin {auc:.2f}\n"
    )


def histograms(pairs: list[tuple[Real, Real]]) -> None:
    """Print the similarity of quarters of true and of wrong pairs."""
    tiles: list[list[tuple[RGB, tuple[int, int, int]]]] = []
    owner = []
    for a, b in pairs:
        side = a.rgb.shape[0] // 2
        for y, x in itertools.product((0, side), repeat=2):
            owner.append(a.key)
            tiles.append(
                [
                    (
                        halved(np.ascontiguousarray(real.rgb[y : y + side, x : x + side])),
                        measure_background([real.rgb], real.mpp).color,
                    )
                    for real in (a, b)
                ]
            )
    true: list[float] = []
    wrong: list[float] = []
    for (i, (he, _)), (j, (_, her2)) in itertools.product(enumerate(tiles), repeat=2):
        value = histogram_similarity(he[0], her2[0], he[1], her2[1])
        if value is not None and (i == j or owner[i] != owner[j]):
            (true if i == j else wrong).append(value)
    above = np.subtract.outer(true, wrong)
    sys.stdout.write(
        f"histogram similarity of {len(true)} quarters: least {min(true):.2f}, median "
        f"{np.median(true):.2f}; of other pairs least {min(wrong):.2f}, median "
        f"{np.median(wrong):.2f}; AUC {(above > 0).mean():.2f}\n"
    )


SLIDE_SOURCES = ("registration", "wsi", "he_os1", "her2_tma")
"""Whole sections, a part of one, whole tissue cores."""
SIGNALS = ("tile_ok", "lncc", "ncc_margin", "match_fraction", "keypoint_fraction", "mirror_probe")


def register_slides(he: Real, her2: Real, options: RegisterOptions) -> dict[str, str]:
    """Return the certificate of two slides as texts, by `describe` and `register`."""
    mpps = [
        "" if real.path.suffix in (".svs", ".tif") else str(MPP[FOLDERS[real.source]])
        for real in (he, her2)
    ]
    header = ("pair", "case", "dataset", "he", "her2", "he_mpp", "her2_mpp")
    cells = ["p", "p", "own", str(he.path.resolve()), str(her2.path.resolve()), *mpps]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pairs.tsv").write_text("\t".join(header) + "\n" + "\t".join(cells) + "\n")
        common = {"sheet": folder / "pairs.tsv", "unit": "p", "images_table": folder / "d.parquet"}
        describe.run(**common, block_count=1, options=DescribeOptions())
        register.run(
            **common,
            displacement=folder / "d.npz",
            certificate=folder / "c.parquet",
            quality=folder / "q.parquet",
            options=options,
        )
        [row] = tables.read(folder / "c.parquet", tables.CERTIFICATE).to_pylist()
    signals = {key: "" if row[key] is None else f"{row[key]:.2f}" for key in SIGNALS}
    attempts = str(len(row["attempts"]))
    size_px = str(options.size_px or CANVAS_PX[options.preset])
    common = {"size_px": size_px, "attempts": attempts, "verdict": row["verdict"]}
    return {**common, **signals, "reason": row["reason"] or ""}


def slides(images: list[Real], known: Path, options: RegisterOptions) -> None:
    """Register all combinations of slides that `known` lacks, add them, and print the verdicts."""
    chosen = [real for real in images if real.source in SLIDE_SOURCES]
    he, ihc = ([real for real in chosen if real.stain == stain] for stain in (HE, IHC))
    columns = ("he", "her2", "given", "size_px", "attempts", "verdict", *SIGNALS, "reason")
    rows = []
    if known.is_file():
        with known.open(newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
    done = {(row["he"], row["her2"]) for row in rows}
    # Those that are registered at a coarse resolution first: they take minutes, the others longer.
    pairs = sorted(itertools.product(he, ihc), key=lambda pair: -max(real.mpp for real in pair))
    for a, b in pairs:
        if (a.name, b.name) in done:
            continue
        given = "right" if a.key and a.key == b.key else "another patient's"
        rows.append(
            {"he": a.name, "her2": b.name, "given": given, **register_slides(a, b, options)}
        )
        with known.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, delimiter="\t")
            writer.writeheader()
            writer.writerows(rows)
    verdicts = collections.Counter((row["given"], row["size_px"], row["verdict"]) for row in rows)
    for (given, size_px, found), number in sorted(verdicts.items()):
        sys.stdout.write(f"slides, {given}, canvas of {size_px} px: {found}: {number}\n")
    for row in rows:
        sys.stdout.write("  " + "  ".join(row[name] or "-" for name in columns) + "\n")


def main() -> None:
    """Read the images once and print all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, help="folder of real images with MANIFEST.tsv")
    parser.add_argument("--slides", type=Path, help="TSV with verdicts on slides, to be completed")
    parser.add_argument("--size-px", type=int, help="canvas of the slides")
    parser.add_argument("--retries", type=int, default=RegisterOptions().retries)
    arguments = parser.parse_args()
    folder = arguments.images
    if folder is None:
        sys.stdout.write("not measured, no real images given (--images)\n")
        return
    images = list(real_images(folder))
    if arguments.slides is not None:
        options = RegisterOptions(
            torch_threads=1, size_px=arguments.size_px, retries=arguments.retries
        )
        slides(images, arguments.slides, options)
        return
    confusion(images)
    stains(images)
    pairs = registered(images)
    alignment(pairs)
    histograms(pairs)


if __name__ == "__main__":
    main()
