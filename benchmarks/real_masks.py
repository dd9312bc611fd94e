"""Masks against the truth of real images of eight sources, next to a simple baseline.

*Nuclei* of four Ki67 sources: found within 4.5 um of a marked centre, with the right sign, and as
objects of IoU above one half. *HER2*: Spearman correlation of the H-score and of the fraction of
moderate and strong cells with the score of the image, and the quadratic kappa of the score read
from the cells. Nuclei are those of the network, then those of the thresholds. *Membrane*: Dice of
strong staining. The simple baseline is Otsu's threshold on red density, a watershed, the ratio of
DAB to haematoxylin, and the 95th percentile of DAB, whose thresholds of the scores are fitted to
the other sources. Intervals are bootstrap intervals of 95 % over images. *Pen*: a stroke 9 um wide
of six inks is drawn on each of the four tiles of a BCI image in turn; counted are the cells of the
others that change. *Resolution*: the same figures of both where it is given 20 % off.
`left_out.py` has the figures of sources that no limit was chosen on.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from _ordinal import fitted, kappa, read_from_others, rho
from _real_images import (
    POSITIVE,
    UNSIGNED,
    Image,
    Labels,
    baseline_nuclei,
    dab,
    dab_percentile,
    images,
    labelled,
    numbered_nuclei,
    prepared,
)  # fmt: skip
from _resolutions import MPP
from _synthetic import interleaved, ratio
from scipy.optimize import linear_sum_assignment
from skimage import filters

from hemera.__main__ import keep_freed_memory
from hemera.config import MaskOptions
from hemera.masks import label_format
from hemera.masks.engine import Engine, module
from hemera.masks.her2_score import CLASSES, h_scores, her2_scores
from hemera.sheet import SCORES

RGB = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.float64]

NUCLEAR = ("bcdata", "shidc", "glioma", "deepliif")
SCORED = ("tma", "fields", "bci")
MATCH_UM = 4.5
RESAMPLES = 1000
# Blur of the baseline of membranes, um: 0.8 px of the images.
BLUR_UM = 0.8 * MPP["membrane"]


def engine_of(compartment: str, **own: object) -> Engine:
    """Load the engine `stain` for a marker of nuclei or of membranes."""
    options = MaskOptions(engines={"stain": {"compartment": compartment, **own}})
    return module("stain").load(options.engines["stain"], options)


def estimated_from(rgb: RGB) -> list[RGB]:
    """Return what stage mask would estimate stains from: tiles with tissue, or the image alone."""
    height, width = rgb.shape[:2]
    tiles = [
        np.ascontiguousarray(rgb[y : y + 512, x : x + 512])
        for y in range(0, height - 511, 512)
        for x in range(0, width - 511, 512)
    ]
    if len(tiles) < 3:
        return [rgb]
    bright = np.percentile(rgb[::8, ::8].mean(axis=2), 99)
    stained = [t for t in tiles if (t.mean(axis=2) < bright - 12).mean() > 0.05] or tiles
    count = min(len(stained), MaskOptions().stain_tiles)
    return [stained[i] for i in np.linspace(0, len(stained) - 1, count).round().astype(int)]


def segmented(engine: Engine, image: Image, scale: float = 1.0) -> label_format.Labelled:
    """Label an image; `scale`: factor on its resolution."""
    mpp = image.mpp * scale
    return labelled(engine, image.rgb, mpp, prepared(engine, estimated_from(image.rgb), mpp))


# --- counts that can be summed over images


def matched(
    truth: npt.NDArray[np.float64], own: npt.NDArray[np.float64], most: float
) -> npt.NDArray[np.int64]:
    """Return for every true centre the one found, one to one and nearest in total, else -1."""
    found = np.full(len(truth), -1)
    if len(truth) and len(own):
        apart = np.hypot(truth[:, None, 0] - own[None, :, 0], truth[:, None, 1] - own[None, :, 1])
        i, j = linear_sum_assignment(np.where(apart <= most, apart, 1e4))
        near = apart[i, j] <= most
        found[i[near]] = j[near]
    return found


def detection(image: Image, x: npt.NDArray, y: npt.NDArray, positive: npt.NDArray) -> Counts:
    """Return matched, true, found; right sign, signed or free: twice their ratio is an F1."""
    assert image.points is not None and image.signs is not None
    at = matched(image.points, np.column_stack([x, y]), MATCH_UM / image.mpp)
    hit, signed = at >= 0, image.signs != UNSIGNED
    right = (positive[at[hit & signed]] == (image.signs[hit & signed] == POSITIVE)).sum()
    free = len(x) - (hit & ~signed).sum()
    return np.array([hit.sum(), len(hit), len(x), right, signed.sum() + free], float)


def objects(true: Labels, mine: Labels) -> Counts:
    """Return pairs of nuclei with IoU above one half, true and found nuclei."""
    count = int(mine.max(initial=0)) + 1
    pairs, both = np.unique(true.astype(np.int64) * count + mine, return_counts=True)
    i, j = np.divmod(pairs, count)
    areas = np.bincount(true.ravel()), np.bincount(mine.ravel())
    iou = both / (areas[0][i] + areas[1][j] - both)
    numbers = len(np.unique(true)) - 1, len(np.unique(mine)) - 1
    return np.array([((iou > 0.5) & (i > 0) & (j > 0)).sum(), *numbers], float)


def overlap(mine: npt.NDArray, true: npt.NDArray) -> Counts:
    """Return common, true and found pixels."""
    return np.array([(mine & true).sum(), true.sum(), mine.sum()], float)


def f1(counts: Counts) -> float:
    """Return F1 (Dice) from common, true, found."""
    return float(2 * counts[0] / max(counts[1] + counts[2], 1))


def nuclear_counts(
    image: Image, x: npt.NDArray, y: npt.NDArray, positive: npt.NDArray, labels: Labels
) -> dict[str, Counts]:
    """Return all counts of an image with nuclei."""
    counts = {"cells": detection(image, x, y, positive)}
    if image.objects is not None and image.pixels is not None:
        counts["objects"] = objects(image.objects, labels)
        counts["pixels"] = overlap(labels > 0, image.pixels)
    return counts


def of_engine(engine: Engine, image: Image, scale: float = 1.0) -> dict[str, Counts]:
    """Return the counts of the engine on an image with nuclei."""
    found = segmented(engine, image, scale)
    cells = found.cells
    return nuclear_counts(
        image, cells.x_px, cells.y_px, cells.positive, numbered_nuclei(found.mask)
    )


def of_baseline(image: Image, scale: float = 1.0) -> dict[str, Counts]:
    """Return the counts of the simple baseline on an image with nuclei."""
    cells, labels = baseline_nuclei(image.rgb, image.mpp * scale)
    return nuclear_counts(image, cells["x"], cells["y"], cells["positive"], labels)


# --- HER2


def score_row(engine: Engine, image: Image, scale: float = 1.0) -> dict[str, float]:
    """Return the score of an image next to what the engine and the percentile of DAB make of it."""
    assert image.score is not None
    found = segmented(engine, image, scale)
    counts = np.bincount(found.cells.intensity, minlength=4)
    name = CLASSES[max(int(her2_scores(counts[None])[0]), 0)]
    return {
        "score": image.score,
        # Ultralow is a 0.
        "read": SCORES.index(name) if name in SCORES else 0,
        "H-score": float(np.nan_to_num(h_scores(counts[None])[0])),
        "moderate+strong": float(counts[2:].sum() / max(counts.sum(), 1)),
        "p95": dab_percentile(image.rgb, image.mpp * scale),
        "cells": int(counts.sum()),
        "excluded": float(label_format.excluded(found.mask).mean()),
    }


def interval(statistic: Callable[[npt.NDArray], float], count: int) -> str:
    """Return a statistic of numbered images with its bootstrap interval."""
    rng = np.random.default_rng(0)
    drawn = [statistic(rng.integers(0, count, count)) for _ in range(RESAMPLES)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return f"{statistic(np.arange(count)):.3f} ({low:.2f} to {high:.2f})"


# --- the table


def line(*cells: object) -> None:
    """Print one row of the table."""
    sys.stdout.write("| " + " | ".join(str(cell) for cell in cells) + " |\n")
    sys.stdout.flush()


def summed(rows: Sequence[dict[str, Counts]], name: str) -> Counts:
    """Return the sum of counts over images."""
    return np.sum([row[name] for row in rows], axis=0)


def signed_f1(counts: Counts) -> float:
    """Return the F1 of detection and sign."""
    return float(2 * counts[3] / max(counts[4], 1))


def in_brief(rows: Sequence[dict[str, Counts]]) -> str:
    """Return the figures of a source in one cell of the table."""
    cells = summed(rows, "cells")
    values = [f1(cells[:3]), signed_f1(cells)]
    if "pixels" in rows[0]:
        values += [f1(summed(rows, "objects")), float(np.mean([f1(r["pixels"]) for r in rows]))]
    return "; ".join(f"{value:.3f}" for value in values)


GOALS = {
    ("bcdata", "detection F1"): ">= .82",
    ("bcdata", "detection and sign"): ">= .72",
    ("shidc", "recall"): ">= .85",
    ("glioma", "detection F1"): ">= .84",
    ("glioma", "detection and sign"): ">= .80",
    ("glioma", "object F1"): ">= .66",
    ("deepliif", "object F1"): ">= .62",
    ("deepliif", "pixels"): ">= .80, .68",
}


def nuclear_table(data: dict[str, list[Image]], engine: Engine) -> None:
    """Print the figures of the sources with nuclei."""
    figures: list[tuple[str, Callable[[Counts], float], str]] = [
        ("detection F1", lambda c: f1(c[:3]), "cells"),
        ("detection and sign", signed_f1, "cells"),
        ("recall", lambda c: float(c[0] / c[1]), "cells"),
        ("object F1", f1, "objects"),
    ]
    for source in NUCLEAR:
        own = [of_engine(engine, image) for image in data[source]]
        simple = [of_baseline(image) for image in data[source]]
        for words, score, key in figures:
            if key in own[0]:
                ours = interval(
                    lambda k, f=score, n=key, r=own: f(summed([r[i] for i in k], n)), len(own)
                )
                theirs = f"{score(summed(simple, key)):.3f}"
                line(f"{source}, {words}", ours, theirs, GOALS.get((source, words), ""))
        if "pixels" in own[0]:
            each = [[f1(row["pixels"]) for row in rows] for rows in (own, simple)]
            means = [f"{np.mean(v):.3f}, least {min(v):.3f}" for v in each]
            line(f"{source}, nuclear pixel F1", *means, GOALS.get((source, "pixels"), ""))
        for scale in (1 / 1.2, 1.2):
            sides = [[of_engine(engine, image, scale) for image in data[source]],
                     [of_baseline(image, scale) for image in data[source]]]  # fmt: skip
            words = "F1; sign" + ("; objects; pixels" if "pixels" in own[0] else "")
            line(f"{source}, resolution x {scale:.2f}: {words}", *map(in_brief, sides), "")


def score_table(rows: Sequence[Mapping[str, float]], source: Sequence[str]) -> None:
    """Print the figures of the scored HER2 images."""
    true = np.array([row["score"] for row in rows])
    read = np.array([row["read"] for row in rows])
    p95 = np.array([row["p95"] for row in rows])
    simple = read_from_others(p95, true, source)
    # The largest kappa that p95 can have: thresholds fitted to the images it is measured on.
    best = np.searchsorted(fitted(p95, true), p95)
    for words in ("H-score", "moderate+strong"):
        values = np.array([row[words] for row in rows])
        line(
            f"HER2, Spearman of {words}",
            interval(lambda k, v=values: rho(true[k], v[k]), len(rows)),
            f"{rho(true, p95):.3f} (p95)",
            ">= .65" if words == "H-score" else ">= .60",
        )
    line(
        "HER2, quadratic kappa",
        interval(lambda k: kappa(true[k], read[k]), len(rows)),
        f"{kappa(true, simple):.3f} (p95); fitted here {kappa(true, best):.3f}",
        ">= .60",
    )
    for name in dict.fromkeys(source):
        own = np.array([each == name for each in source])
        ours = [
            rho(true[own], np.array([row[words] for row in rows])[own])
            for words in ("H-score", "moderate+strong")
        ]
        ours.append(kappa(true[own], read[own]))
        theirs = [rho(true[own], p95[own])] * 2 + [kappa(true[own], simple[own])]
        cells = ("; ".join(f"{v:.3f}" for v in side) for side in (ours, theirs))
        line(f"HER2, {name}: Spearman of both; kappa", *cells, "not below")
    for row, name in zip(rows, source, strict=True):
        found = f"{SCORES[int(row['read'])]}, H {row['H-score']:.0f}, {row['cells']:.0f} cells"
        found += f", excluded {row['excluded']:.3f}"
        line(f"{name} {row['name']}, score {row['score']:.0f}", found, f"p95 {row['p95']:.3f}", "")


def scaled_scores(
    folder: Path, data: dict[str, list[Image]], nuclei: str, engine: Engine, scale: float
) -> None:
    """Print the figures of HER2 images and membranes with their resolution given as `scale`."""
    rows, source = [], []
    for name in SCORED:
        for image in data.get(name) or images(folder, name):
            rows.append(score_row(engine, image, scale))
            source.append(name)
    true, read, p95 = (np.array([row[name] for row in rows]) for name in ("score", "read", "p95"))
    orders = [
        rho(true, np.array([row[name] for row in rows])) for name in ("H-score", "moderate+strong")
    ]
    own, simple = membrane_counts(data["membrane"], engine, scale)
    values = [*orders, kappa(true, read), f1(np.sum(own, axis=0))]
    theirs = [rho(true, p95)] * 2
    theirs += [kappa(true, read_from_others(p95, true, source)), f1(np.sum(simple, axis=0))]
    words = f"HER2, {nuclei}, resolution x {scale:.2f}: Spearman of both; kappa; Dice"
    line(words, *("; ".join(f"{v:.3f}" for v in side) for side in (values, theirs)), "not below")


def membrane_counts(
    images: Sequence[Image], engine: Engine, scale: float = 1.0
) -> tuple[list[Counts], list[Counts]]:
    """Return common, true and found pixels of strong membranes: the engine's, the baseline's."""
    maps = [
        cv2.GaussianBlur(dab(i.rgb, (255, 255, 255)), (0, 0), BLUR_UM / (scale * i.mpp))
        for i in images
    ]
    cut = filters.threshold_otsu(np.concatenate([m.ravel() for m in maps]))
    own, simple = [], []
    for image, density in zip(images, maps, strict=True):
        assert image.membrane is not None
        strong = label_format.intensity(segmented(engine, image, scale).mask) == 3
        own.append(overlap(strong, image.membrane))
        simple.append(overlap(density > cut, image.membrane))
    return own, simple


def membrane_table(images: Sequence[Image], engine: Engine) -> None:
    """Print the Dice of strong membranes."""
    own, simple = membrane_counts(images, engine)
    ours = interval(lambda k: f1(np.sum([own[j] for j in k], axis=0)), len(own))
    line("strong membrane, Dice", ours, f"{f1(np.sum(simple, axis=0)):.3f}", ">= .60")


INKS = {
    "blue": (0.95, 0.50, 0.05),
    "black": (0.80, 0.80, 0.75),
    "red": (0.10, 0.70, 0.55),
    "green": (0.60, 0.25, 0.50),
    "violet": (0.45, 0.80, 0.15),
    "brown": (0.25, 0.50, 0.70),
}


def pen(image: Image, engine: Engine) -> None:
    """Print how many cells of the other tiles of an image change with a stroke on one of them."""
    tiles = estimated_from(image.rgb)
    before = [
        labelled(engine, tile, image.mpp, prepared(engine, tiles, image.mpp)).cells
        for tile in tiles
    ]
    changes: dict[str, list[float]] = {name: [] for name in INKS}
    for (name, density), inked in itertools.product(INKS.items(), range(len(tiles))):
        height, width = tiles[inked].shape[:2]
        stroke = np.zeros((height, width), np.uint8)
        cv2.line(stroke, (10, height - 110), (width - 10, 90), 1, round(9 / image.mpp))
        under = tiles[inked] * np.where(stroke[..., None] > 0, 10.0 ** -np.array(density), 1.0)
        drawn = [under.round().astype(np.uint8) if k == inked else t for k, t in enumerate(tiles)]
        state = prepared(engine, drawn, image.mpp)
        old = new = same = 0
        for k in (k for k in range(len(tiles)) if k != inked):
            after = labelled(engine, tiles[k], image.mpp, state).cells
            places = [np.column_stack([c.x_px, c.y_px]).astype(float) for c in (before[k], after)]
            same += int((matched(*places, 2 / image.mpp) >= 0).sum())
            old, new = old + len(before[k]), new + len(after)
        changes[name].append(max(old - same, new - same) / max(old, 1))
    cells = sum(len(c) for c in before)
    each = "; ".join(
        f"{name} {np.mean(own):.3f}, {max(own):.3f}" for name, own in changes.items() if any(own)
    )
    line(f"pen on {image.name}, {cells} cells: mean, most", each or "none", "", "<= .05")


def speed(words: str, image: Image, engine: Engine, mpp: float, goal: int) -> None:
    """Print the time of the engine over the decode of a tile as JPEG, at a resolution."""
    size = [round(side * image.mpp / mpp) for side in image.rgb.shape[1::-1]]
    rgb = cv2.resize(image.rgb, size, interpolation=cv2.INTER_AREA)
    tiles = [np.ascontiguousarray(rgb[:512, :512], np.uint8)]
    state = prepared(engine, tiles, mpp)
    stored = simplejpeg.encode_jpeg(tiles[0], 85, colorsubsampling="420")
    sides = {"stain": lambda: engine.segment(tiles[0], mpp, state),
             "decode": lambda: [simplejpeg.decode_jpeg(stored) for _ in range(10)]}  # fmt: skip
    middle, least, most = (10 * v for v in ratio(interleaved(sides), "stain", "decode"))
    line(
        f"time over decode, {image.source} {image.name}, {words}, {mpp:.2f} um/px",
        f"{middle:.1f} ({least:.1f} to {most:.1f})",
        "",
        f"<= {goal}",
    )


def times(bci: Sequence[Image]) -> None:
    """Print the rows of time."""
    engines = {"thresholds": "classical", "network": "network"}
    for image, (words, detector) in itertools.product(bci[:3:2], engines.items()):
        engine = engine_of("membrane", nuclei=detector)
        speed(words, image, engine, 0.5, 40)
        speed(words, image, engine, 0.92, 120 if words == "network" else 40)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="folder of real test images")
    parser.add_argument("--images", type=Path, help="the same, as the other benchmarks take it")
    parser.add_argument("--time", action="store_true", help="only the rows of time")
    given = parser.parse_args()
    folder = given.folder or given.images
    if folder is None:
        sys.stdout.write("real images: not measured, no folder given\n")
        return
    # As the command line does.
    keep_freed_memory()
    cv2.setNumThreads(1)
    if given.time:
        times(list(images(folder, "bci")))
        return
    membrane = engine_of("membrane")
    data = {source: list(images(folder, source)) for source in (*NUCLEAR, "bci", "membrane")}
    line("data at hand", "engine", "simple baseline", "goal")
    line(*["---"] * 4)
    for detector in ("network", "classical"):
        line(f"nuclei: {detector}", "", "", "")
        nuclear_table(data, engine_of("nucleus", nuclei=detector))
    rows, source = [], []
    for name in SCORED:
        for image in data.get(name) or images(folder, name):
            rows.append({"name": image.name, **score_row(membrane, image)})
            source.append(name)
    score_table(rows, source)
    membrane_table(data["membrane"], membrane)
    detectors = {"thresholds": membrane, "network": engine_of("membrane", nuclei="network")}
    for (words, engine), scale in itertools.product(detectors.items(), (1 / 1.2, 1.0, 1.2)):
        scaled_scores(folder, data, words, engine, scale)
    for image in data["bci"]:
        pen(image, membrane)
    times(data["bci"])


if __name__ == "__main__":
    main()
