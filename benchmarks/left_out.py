"""Masks of real images of sources that no limit was chosen on.

For every source, the limits of a small grid are those that are best for all others: of nuclei by
the sum of F1 of detection and of detection with sign, of HER2 by the sum of both correlations with
the score and of kappa. Dice of strong membranes is that with the limits of all scored sources,
because its images are one source. The whole table is of the images that are left out, each with
the limits of the others. Other weights, of other seeds, are measured beside those of the package.
See `real_masks.py` for the figures and the sources.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
import numpy.typing as npt
from _ordinal import kappa, rho
from _real_images import Image, images, labelled, prepared
from real_masks import (
    NUCLEAR,
    SCORED,
    Counts,
    detection,
    engine_of,
    estimated_from,
    f1,
    line,
    overlap,
    signed_f1,
)  # fmt: skip

from hemera.config import MaskOptions
from hemera.imaging.artefacts import artefact_pixels
from hemera.masks import label_format
from hemera.masks.engine import Engine
from hemera.masks.her2_score import CLASSES, h_scores, her2_scores
from hemera.masks.stain import Options, network
from hemera.masks.stain.engine import StainEngine
from hemera.masks.stain.membranes import find_membranes, measure_cells
from hemera.masks.stain.nuclei import Nuclei, Tile
from hemera.masks.stain.stains import Stains
from hemera.sheet import SCORES

Limits = tuple[float, ...]
Found = dict[Limits, dict[str, Counts]]

BY_THRESHOLDS = {
    "nucleus_contrast": (0.16, 0.20, 0.24),
    "nucleus_dab": (0.09, 0.12, 0.16),
}
BY_NETWORK = {
    "_EVIDENCE_UM": (0.5, 0.7, 0.9),
    "_ALONE_EVIDENCE_UM": (2.0, 2.5, 3.0),
    "nucleus_dab": (0.09, 0.12, 0.16),
}
_DENSITIES = ("dab_weak", "dab_moderate", "dab_strong")
MEMBRANES = {"densities x": (0.8, 1.0, 1.25), "completeness_min": (0.20, 0.28, 0.36)}
USUAL = (1.0, 0.28)
"""The default options, as a point of `MEMBRANES`."""


def described(names: Sequence[str], limits: Limits) -> str:
    """Return limits in words."""
    return ", ".join(f"{n.strip('_').lower()} {v:g}" for n, v in zip(names, limits, strict=True))


# --- nuclei


def by_network(weights: str, limits: Limits) -> Engine:
    """Return the engine whose network has these limits."""
    values = dict(zip(BY_NETWORK, limits, strict=True))
    own = values.pop("nucleus_dab")
    with mock.patch.multiple(network, **values):
        return engine_of("nucleus", nuclei=weights, nucleus_dab=own)


def detections(data: Mapping[str, Sequence[Image]], engines: Mapping[Limits, Engine]) -> Found:
    """Return the counts of every source with every engine; a network answers once per image."""
    found: Found = {limits: {s: np.zeros(5) for s in NUCLEAR} for limits in engines}
    answers: dict[str, Any] = {}
    maps = network.NetworkDetector.maps

    def once(detector: network.NetworkDetector, *tile: Any) -> Any:
        if "maps" not in answers:
            answers["maps"] = maps(detector, *tile)
        return tuple(one.copy() for one in answers["maps"])

    with mock.patch.object(network.NetworkDetector, "maps", once):
        for image in (image for source in NUCLEAR for image in data[source]):
            answers.clear()
            state = prepared(next(iter(engines.values())), estimated_from(image.rgb), image.mpp)
            artefacts = artefact_pixels(image.rgb, image.mpp, state.background)
            for limits, engine in engines.items():
                all_found = engine.segment(image.rgb, image.mpp, state, artefacts)
                if artefacts is not None:
                    all_found = label_format.exclude(all_found, artefacts)
                cells = all_found.cells
                counts = detection(image, cells.x_px, cells.y_px, cells.positive)
                found[limits][image.source] += counts
    return found


def nuclei_left_out(words: str, names: Sequence[str], found: Found) -> None:
    """Print F1 and sign of every source with the limits that suit the others."""
    for source in NUCLEAR:
        others = [s for s in NUCLEAR if s != source]
        sums = {
            limits: sum(f1(by[s][:3]) + signed_f1(by[s]) for s in others)
            for limits, by in found.items()
        }
        best = max(sums, key=sums.__getitem__)
        counts = found[best][source]
        values = f"{f1(counts[:3]):.3f}; {signed_f1(counts):.3f}"
        line(f"{words}: {source}", values, described(names, best))


# --- HER2


def membrane_options() -> Iterator[tuple[Limits, MaskOptions]]:
    """Return the options of every point of `MEMBRANES`."""
    usual = MaskOptions()
    for factor, completeness in itertools.product(*MEMBRANES.values()):
        densities = {name: factor * getattr(usual, name) for name in _DENSITIES}
        yield (factor, completeness), usual.replace(completeness_min=completeness, **densities)


@dataclasses.dataclass(frozen=True)
class Graded(StainEngine):
    """The engine that grades the cells of several detectors with several limits at once.

    `counted` has the cells of each intensity by name of the detector and limits.
    """

    detectors: Mapping[str, Callable[[Tile], Nuclei]] = dataclasses.field(default_factory=dict)
    counted: dict[tuple[str, Limits], npt.NDArray[np.int64]] = dataclasses.field(
        default_factory=dict
    )

    def _cells(
        self,
        rgb: npt.NDArray[np.uint8],
        separated: npt.NDArray[np.float32],
        mpp: float,
        state: Stains,
        excluded: npt.NDArray[np.bool_] | None,
    ) -> Any:
        tile = Tile(rgb, mpp, state, self._nuclear_stain(separated), excluded)
        nuclei = {name: find(tile) for name, find in self.detectors.items()}
        for limits, shared in membrane_options():
            membranes = find_membranes(separated, mpp, state, shared)
            for name, own in nuclei.items():
                grown, cells = measure_cells(own, membranes, mpp, shared)
                self.counted[name, limits] = np.bincount(cells.intensity, minlength=4)
        return own.labels, membranes.classes, grown, cells


def graded(folder: Path, detectors: Mapping[str, Callable[[Tile], Nuclei]]) -> list[dict[str, Any]]:
    """Return score, source and counted cells of every HER2 image."""
    rows = []
    for source in SCORED:
        for image in images(folder, source):
            engine = Graded(Options(), MaskOptions(), detectors)
            state = prepared(engine, estimated_from(image.rgb), image.mpp)
            labelled(engine, image.rgb, image.mpp, state)
            rows.append({"source": source, "score": image.score, "counts": engine.counted})
    return rows


def figures(rows: Sequence[Mapping[str, Any]], name: str, limits: Sequence[Limits]) -> list[float]:
    """Return both correlations and kappa of images, each with its own limits."""
    counts = np.array([row["counts"][name, own] for row, own in zip(rows, limits, strict=True)])
    true = np.array([row["score"] for row in rows])
    names = [CLASSES[max(k, 0)] for k in her2_scores(counts)]
    read = np.array([SCORES.index(one) if one in SCORES else 0 for one in names])
    intense = counts[:, 2:].sum(axis=1) / np.maximum(counts.sum(axis=1), 1)
    orders = [rho(true, values) for values in (np.nan_to_num(h_scores(counts)), intense)]
    return [*orders, kappa(true, read)]


def best_limits(rows: Sequence[Mapping[str, Any]], name: str) -> Limits:
    """Return the limits with which the sum of the figures is largest."""
    points = [limits for limits, _ in membrane_options()]
    return max(points, key=lambda point: sum(figures(rows, name, [point] * len(rows))))


def scores_left_out(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the figures of HER2 images with the default limits, and with those of the others."""
    usual = figures(rows, name, [USUAL] * len(rows))
    line(f"HER2, {name}: default", "; ".join(f"{v:.3f}" for v in usual), "")
    chosen = {
        source: best_limits([row for row in rows if row["source"] != source], name)
        for source in SCORED
    }
    for source, limits in chosen.items():
        own = [row for row in rows if row["source"] == source]
        values = "; ".join(f"{v:.3f}" for v in figures(own, name, [limits] * len(own)))
        line(f"HER2, {name}: {source}", values, described(list(MEMBRANES), limits))
    pooled = figures(rows, name, [chosen[row["source"]] for row in rows])
    line(f"HER2, {name}: all, each left out", "; ".join(f"{v:.3f}" for v in pooled), "")


def membranes_left_out(folder: Path, name: str, nuclei: str, limits: Limits) -> None:
    """Print the Dice of strong membranes with the default limits, and with those of the others."""
    engine = engine_of("membrane", nuclei=nuclei)
    for words, own in (("default", USUAL), ("left out", limits)):
        shared = dict(membrane_options())[own]
        counts = np.zeros(3)
        for image in images(folder, "membrane"):
            assert image.membrane is not None
            state = prepared(engine, estimated_from(image.rgb), image.mpp)
            grader = StainEngine(Options(nuclei=nuclei), shared)
            mask = labelled(grader, image.rgb, image.mpp, state).mask
            counts += overlap(label_format.intensity(mask) == 3, image.membrane)
        found = f"strong membrane, Dice, {name}: {words}"
        line(found, f"{f1(counts):.3f}", described(list(MEMBRANES), own))


def nuclear_sources(folder: Path, weights: Mapping[str, str]) -> None:
    """Print the figures of nuclei by thresholds and by networks, with their names."""
    data = {source: list(images(folder, source)) for source in NUCLEAR}
    grid = list(itertools.product(*BY_THRESHOLDS.values()))
    own = [dict(zip(BY_THRESHOLDS, values, strict=True)) for values in grid]
    engines = [engine_of("nucleus", nuclei="classical", **values) for values in own]
    found = detections(data, dict(zip(grid, engines, strict=True)))
    nuclei_left_out("thresholds", list(BY_THRESHOLDS), found)
    grid = list(itertools.product(*BY_NETWORK.values()))
    for name, file in weights.items():
        found = detections(data, {values: by_network(file, values) for values in grid})
        nuclei_left_out(name, list(BY_NETWORK), found)


def membrane_sources(folder: Path, weights: Mapping[str, str]) -> None:
    """Print the figures of HER2 with nuclei by thresholds and by networks, and of membranes."""
    named = {"thresholds": "classical", **weights}
    detectors: dict[str, Any] = {
        name: engine_of("membrane", nuclei=value).find  # type: ignore[attr-defined]
        for name, value in named.items()
    }
    rows = graded(folder, detectors)
    for name, nuclei in named.items():
        scores_left_out(name, rows)
        membranes_left_out(folder, name, nuclei, best_limits(rows, name))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, help="folder of real test images")
    parser.add_argument("--weights", type=Path, nargs="*", default=[], help="of other seeds")
    given = parser.parse_args()
    if given.images is None:
        sys.stdout.write("real images: not measured, no folder given (--images)\n")
        return
    cv2.setNumThreads(1)
    line("left out", "F1; with sign, or Spearman of both; kappa", "limits of the others")
    line(*["---"] * 3)
    weights = {"network": "network"} | {f"network, {p.stem}": str(p) for p in given.weights}
    nuclear_sources(given.images, weights)
    membrane_sources(given.images, weights)


if __name__ == "__main__":
    main()
