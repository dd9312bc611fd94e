"""How well a generated image reproduces the stain: DAB density, brown pixels and stained cells.

Images are divided by their backgrounds before. Every measure follows from sums over pixels, so that
tiles can be pooled and cases resampled.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch

from hemera.config import MaskOptions
from hemera.evaluation import metrics
from hemera.imaging.color import WHITE
from hemera.masks import engine
from hemera.masks.agreement import MATCH_UM, matched
from hemera.masks.label_format import Cells
from hemera.networks import losses
from hemera.networks.similarity import concordance, moments, pair_sums

RGB = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

BROWN_DENSITY = MaskOptions().dab_moderate
"""DAB density of a brown pixel, whose red exceeds its blue: gray has a DAB density too."""
TOLERANCES_PX = (8, 32)
"""Distances within which a brown pixel of the other image counts as the same."""
STEP = 0.02
BINS = 64
"""The histogram of DAB density has bins of `STEP`; the last one is open."""

STATE_TILES = 8
"""Real tiles of a case, at most, from which its stains are estimated."""

# Pseudo-count of a bin, so that an empty one has a finite divergence.
_PRIOR = 0.5

_SUMS = (
    *(f"dab_{name}" for name in ("pixels", "x", "y", "xx", "yy", "xy")),
    *("brown_dab", "brown_dab_real", "brown", "brown_real", "brown_both"),
    *(f"{name}_{px}" for px in TOLERANCES_PX for name in ("precise", "recalled")),
    *("positive", "positive_red", "other", "other_red"),
)
_PLACE = {name: slice(n, n + 1) for n, name in enumerate(_SUMS)} | {
    "dab": slice(0, 6),
    "generated_bins": slice(len(_SUMS), len(_SUMS) + BINS),
    "real_bins": slice(len(_SUMS) + BINS, len(_SUMS) + 2 * BINS),
}

SUMS = (*_SUMS, *(f"{name}_bin_{n}" for name in ("generated", "real") for n in range(BINS)))
"""Names of the sums of a tile."""


def tile_sums(image: RGB, real: RGB, positive: Mask, valid: Mask) -> Floats:
    """Return the sums of one tile that `FIGURES` are computed from.

    Args:
        image: generated, (H, W, 3), over a white background; `real` likewise.
        positive: the HER2-positive pixels of the mask, (H, W).
        valid: the pixels that the mask does not exclude.
    """
    white = torch.ones(1, 3, 1, 1)
    planes = [
        torch.from_numpy(np.ascontiguousarray(each.transpose(2, 0, 1)))[None].float() / 255
        for each in (image, real)
    ]
    densities = [losses.dab_density(each, white).clamp(min=0) for each in planes]
    sums = pair_sums(densities[0], densities[1], torch.from_numpy(valid)[None, None])[0].tolist()
    density = [each[0, 0].numpy() for each in densities]
    brown = [
        (dab >= BROWN_DENSITY) & (each[..., 0] > each[..., 2]) & valid
        for dab, each in zip(density, (image, real), strict=True)
    ]
    sums += [float(dab[where].sum()) for dab, where in zip(density, brown, strict=True)]
    counts = [brown[0], brown[1], brown[0] & brown[1]]
    for px in TOLERANCES_PX:
        near = [_within(each, px) for each in brown]
        counts += [brown[0] & near[1], brown[1] & near[0]]
    sums += [np.count_nonzero(each) for each in counts]
    red = image[..., 0].astype(np.int64) - image[..., 2]
    for where in (positive & valid, ~positive & valid):
        sums += [np.count_nonzero(where), int(red[where].sum())]
    for dab in density:
        steps = np.minimum(dab[valid] / np.float32(STEP), BINS - 1).astype(np.intp)
        sums += np.bincount(steps, minlength=BINS).tolist()
    return np.array(sums, np.float64)


def _within(mask: Mask, distance_px: int) -> Mask:
    """Return the pixels at most a distance away from those of a mask (H, W)."""
    if not mask.any():
        return mask
    away = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.asarray(away <= distance_px + 1e-3)


def _sum(sums: Floats, name: str) -> Floats:
    return sums[..., _PLACE[name]][..., 0]


def correlation(sums: Floats) -> Floats:
    """Return Pearson's r from `pair_sums` (..., 6); NaN where an image is uniform."""
    _, _, var_x, var_y, covariance = moments(sums)
    uniform = np.minimum(var_x, var_y) < 1e-12
    return np.where(uniform, np.nan, covariance / np.sqrt(np.maximum(var_x * var_y, 1e-24)))


def _brown_recall(px: int) -> Callable[[Floats], Floats]:
    return lambda sums: metrics.ratio(_sum(sums, f"recalled_{px}"), _sum(sums, "brown_real"))


def _brown_precision(px: int) -> Callable[[Floats], Floats]:
    return lambda sums: metrics.ratio(_sum(sums, f"precise_{px}"), _sum(sums, "brown"))


def _brown_dice(px: int) -> Callable[[Floats], Floats]:
    """Dice, of precision and recall with a tolerance."""

    def dice(sums: Floats) -> Floats:
        hit = _sum(sums, f"precise_{px}") + _sum(sums, f"recalled_{px}")
        return metrics.ratio(hit, _sum(sums, "brown") + _sum(sums, "brown_real"))

    return dice


def _divergence(sums: Floats) -> Floats:
    """Return the Kullback-Leibler divergence, nats, of the generated from the real histogram."""
    real, generated = (sums[..., _PLACE[f"{name}_bins"]] + _PRIOR for name in ("real", "generated"))
    real, generated = (each / each.sum(-1, keepdims=True) for each in (real, generated))
    return np.asarray((real * np.log(real / generated)).sum(-1))


FIGURES: dict[str, Callable[[Floats], Floats]] = {
    "dab_r": lambda sums: correlation(sums[..., _PLACE["dab"]]),
    "dab_concordance": lambda sums: concordance(sums[..., _PLACE["dab"]]),
    "dab_ratio": lambda sums: metrics.ratio(_sum(sums, "dab_x"), _sum(sums, "dab_y")),
    "dab_kl": _divergence,
    "brown_fraction_real": lambda sums: metrics.ratio(
        _sum(sums, "brown_real"), _sum(sums, "dab_pixels")
    ),
    "brown_ratio": lambda sums: metrics.ratio(
        _sum(sums, "brown_dab"), _sum(sums, "brown_dab_real")
    ),
    "brown_dice": lambda sums: metrics.ratio(
        2 * _sum(sums, "brown_both"), _sum(sums, "brown") + _sum(sums, "brown_real")
    ),
    "brown_precision": lambda sums: metrics.ratio(_sum(sums, "brown_both"), _sum(sums, "brown")),
    "brown_recall": lambda sums: metrics.ratio(_sum(sums, "brown_both"), _sum(sums, "brown_real")),
    **{f"brown_dice_{px}": _brown_dice(px) for px in TOLERANCES_PX},
    **{f"brown_precision_{px}": _brown_precision(px) for px in TOLERANCES_PX},
    **{f"brown_recall_{px}": _brown_recall(px) for px in TOLERANCES_PX},
    "red_positive": lambda sums: metrics.ratio(_sum(sums, "positive_red"), _sum(sums, "positive")),
    "red_other": lambda sums: metrics.ratio(_sum(sums, "other_red"), _sum(sums, "other")),
}
"""The figures (...) of sums (..., K) over tiles, see `tile_sums`; NaN where one is undefined."""


def tile_moments(sums: Floats) -> Floats:
    """Return the sums, (T, 6), whose `correlation` is that of the mean DAB of T tiles."""
    x, y = (metrics.ratio(_sum(sums, f"dab_{name}"), _sum(sums, "dab_pixels")) for name in "xy")
    measured = np.isfinite(x)
    x, y = (np.where(measured, each, 0) for each in (x, y))
    return np.stack([measured, x, y, x * x, y * y, x * y], axis=1).astype(np.float64)


class CellComparison:
    """The mask engine `stain` for generated and real tiles."""

    def __init__(
        self,
        cases: Mapping[str, Sequence[str]],
        read: Callable[[str], tuple[RGB, Mask]],
        options: MaskOptions,
    ) -> None:
        """Load the engine.

        Args:
            cases: the tiles of each case, on some of which its stains are estimated.
            read: returns a real tile (H, W, 3) over white, and its valid pixels, by its id.
            options: of the engine, or its defaults where the cohort has no masks of it.
        """
        own = options.engines.get("stain", MaskOptions().engines["stain"])
        self._engine = engine.module("stain").load(own, options)
        self._cases = cases
        self._read = read
        self._states: dict[tuple[str, float], Any] = {}

    def compare(
        self, images: Mapping[str, RGB], real: RGB, valid: Mask, case: str, mpp: float
    ) -> dict[str, dict[str, Any]]:
        """Compare the valid pixels of images of a tile (H, W, 3), over white, with the real one.

        Returns columns of `tables.EVALUATION_TILES` by image.
        """
        if not images:
            return {}
        if (case, mpp) not in self._states:
            tiles = self._cases[case]
            chosen = tiles[:: -(-len(tiles) // STATE_TILES)]
            reference, used = zip(*(self._read(tile) for tile in chosen), strict=True)
            self._states[case, mpp] = self._engine.prepare(
                reference, mpp, WHITE, [~each for each in used]
            )
        state = self._states[case, mpp]
        truth = self._engine.segment(real, mpp, state, ~valid).cells
        found = {}
        for name, image in images.items():
            cells = self._engine.segment(image, mpp, state, ~valid).cells
            points = [_positive_points(each) for each in (cells, truth)]
            hits = matched(points[0], points[1], MATCH_UM / mpp) >= 0
            found[name] = {
                "cells": _counts(cells),
                "cells_real": _counts(truth),
                "positive_cells": len(points[0]),
                "positive_cells_real": len(points[1]),
                "matched_cells": int(hits.sum()),
            }
        return found


def _positive_points(cells: Cells) -> Floats:
    points = np.column_stack([cells.x_px, cells.y_px])
    return np.asarray(points[cells.positive], np.float64)


def _counts(cells: Cells) -> list[int]:
    counts: list[int] = np.bincount(cells.intensity, minlength=4).tolist()
    return counts
