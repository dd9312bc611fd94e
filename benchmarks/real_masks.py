"""Masks against the truth of real images of eight sources, next to a simple baseline.

*Nuclei* of four Ki67 sources: found within 4.5 um of a marked centre, with the right sign, and as
objects of IoU above one half. *HER2*: Spearman correlation of the H-score and of the fraction of
moderate and strong cells with the score of the image, and the quadratic kappa of the score read
from the cells. *Membrane*: Dice of strong staining. The simple baseline is Otsu's threshold on red
density, a watershed, the ratio of DAB to haematoxylin, and the 95th percentile of DAB.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from _real_images import (
    POSITIVE, UNSIGNED, Image, Labels, baseline_nuclei, dab, dab_percentile, images,
)  # fmt: skip
from _synthetic import interleaved, ratio
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from scipy.stats import spearmanr
from skimage import filters

from hemera.config import MaskOptions
from hemera.masks import label_format
from hemera.masks.engine import Engine, module
from hemera.masks.her2_score import asco_cap_score
from hemera.sheet import SCORES

RGB = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.float64]

NUCLEAR = ("bcdata", "shidc", "glioma", "deepliif")
SCORED = ("tma", "fields", "bci")
MATCH_UM = 4.5
RESAMPLES = 1000


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
    return engine.segment(image.rgb, mpp, engine.prepare(estimated_from(image.rgb), mpp))


def numbered_nuclei(mask: RGB) -> Labels:
    """Return the nuclei of a label image by number: pieces without their boundaries, grown back."""
    nuclear = label_format.nuclei(mask)
    inner = nuclear & (label_format.classes(mask) != label_format.BOUNDARY)
    pieces, _ = ndimage.label(inner)
    if not inner.any():
        return pieces.astype(np.int32)
    at = ndimage.distance_transform_edt(~inner, return_distances=False, return_indices=True)
    return np.where(nuclear, pieces[at[0], at[1]], 0).astype(np.int32)


# --- counts that can be summed over images


def matched(truth: npt.NDArray[np.float64], own: npt.NDArray[np.float64], most: float) -> npt.NDArray[np.int64]:
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


def nuclear_counts(image: Image, x: npt.NDArray, y: npt.NDArray, positive: npt.NDArray, labels: Labels) -> dict[str, Counts]:
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
    return nuclear_counts(image, cells.x_px, cells.y_px, cells.positive, numbered_nuclei(found.mask))


def of_baseline(image: Image) -> dict[str, Counts]:
    """Return the counts of the simple baseline on an image with nuclei."""
    cells, labels = baseline_nuclei(image.rgb, image.mpp)
    return nuclear_counts(image, cells["x"], cells["y"], cells["positive"], labels)


# --- HER2


def h_score(intensity: npt.NDArray[np.uint8]) -> float:
    """Return the H-score, 0 to 300, of the DAB classes of cells."""
    return float(100 * intensity.mean()) if len(intensity) else 0.0


def score_row(engine: Engine, image: Image, scale: float = 1.0) -> dict[str, float]:
    """Return the score of an image next to what the engine and the percentile of DAB make of it."""
    assert image.score is not None
    found = segmented(engine, image, scale)
    intensity = found.cells.intensity
    text = asco_cap_score(np.bincount(intensity, minlength=4).tolist())
    return {
        "score": image.score,
        "read": SCORES.index(text) if text else 0,
        "H-score": h_score(intensity),
        "moderate+strong": float((intensity >= 2).mean()) if len(intensity) else 0.0,
        "p95": dab_percentile(image.rgb, image.mpp),
        "cells": len(intensity),
        "excluded": found.excluded_fraction,
    }


def kappa(true: npt.NDArray, read: npt.NDArray, classes: int = 4) -> float:
    """Return Cohen's kappa with quadratic weights."""
    seen = np.zeros((classes, classes))
    np.add.at(seen, (true.astype(int), read.astype(int)), 1)
    weights = np.subtract.outer(np.arange(classes), np.arange(classes)) ** 2
    expected = np.outer(seen.sum(axis=1), seen.sum(axis=0)) / seen.sum()
    return float(1 - (weights * seen).sum() / max((weights * expected).sum(), 1e-9))


def rho(true: npt.NDArray, values: npt.NDArray) -> float:
    """Return Spearman's correlation, 0 where one of the two is constant."""
    if len(set(true)) < 2 or len(set(values)) < 2:
        return 0.0
    return float(spearmanr(values, true)[0])


def membrane_counts(engine: Engine, images: Sequence[Image], scale: float = 1.0) -> list[Counts]:
    """Return the overlap of strong staining with the membrane of every image."""
    found = [segmented(engine, image, scale) for image in images]
    return [
        overlap(label_format.intensity(f.mask) == 3, image.membrane)
        for f, image in zip(found, images, strict=True)
    ]
