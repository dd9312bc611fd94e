"""What the page shows of a registration: its certificate against the limits, before and after."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from hemera.displacement import Displacement, map_points
from hemera.pages import pictures
from hemera.pages.html import number, percent

RGB = npt.NDArray[np.uint8]

SIDE_PX = 560
"""Longest side of a picture; thumbnails are worked on at this size."""


@dataclasses.dataclass(frozen=True)
class Signal:
    """One row of a certificate: what it says, and the options that hold its limits."""

    words: str
    passes: str | None = None
    fails: str | None = None
    at_least: bool = True
    share: bool = False


SIGNALS = {
    "tile_ok": Signal(
        "tissue fields that match best in place", "tile_ok_pass", "tile_ok_fail", share=True
    ),
    "lncc": Signal("median local correlation of haematoxylin", "lncc_pass", "lncc_fail"),
    "ncc_margin": Signal(
        "correlation above the best of 36 shifts", "ncc_margin_pass", "ncc_margin_fail"
    ),
    "match_fraction": Signal(
        "matches near the similarity fitted to them",
        "match_fraction_pass",
        "match_fraction_fail",
        share=True,
    ),
    "match_count": Signal("matches"),
    "coverage_fraction": Signal("H&E tissue that HER2 covers", "coverage_pass", share=True),
    "folding_fraction": Signal(
        "folded tissue", "folding_pass", "folding_fail", at_least=False, share=True
    ),
    "anisotropy": Signal(
        "ratio of the two scales", "anisotropy_max", "anisotropy_max", at_least=False
    ),
    "log_scale": Signal(
        "|log| of the scale of the affine part", "log_scale_max", "log_scale_max", at_least=False
    ),
    "rotation_deg": Signal("rotation, degrees"),
    "displacement_median_um": Signal("median displacement, µm"),
}


def certificate(row: Mapping[str, Any], options: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the signals of a certificate: words, value, limits, and how the value stands to them.

    Args:
        row: of `tables.CERTIFICATE`.
        options: of register, or empty where they are not known: then nothing is judged.
    """
    scale = row["scale"]
    values = {**row, "log_scale": abs(math.log(scale)) if scale else None}
    rows = []
    for name, signal in SIGNALS.items():
        value = values[name]
        if value is None:
            if signal.passes:
                rows.append(_line(name, signal, "not measured", "", "none"))
            continue
        shown = percent(value) if signal.share else number(value)
        good = options.get(signal.passes) if signal.passes else None
        bad = options.get(signal.fails) if signal.fails else None
        if good is None:
            rows.append(_line(name, signal, shown, "", "none"))
            continue
        sign = 1 if signal.at_least else -1
        state = "pass" if sign * value >= sign * good else "review"
        if bad is not None and sign * value < sign * bad:
            state = "fail"
        rows.append(_line(name, signal, shown, _limits(signal, good, bad), state))
    return rows


def _line(name: str, signal: Signal, value: str, limits: str, state: str) -> dict[str, str]:
    return {"name": name, "words": signal.words, "value": value, "limits": limits, "state": state}


def _limits(signal: Signal, good: float, bad: float | None) -> str:
    show = percent if signal.share else number
    better, worse = ("≥", "<") if signal.at_least else ("≤", ">")
    text = f"pass {better} {show(good)}"
    return text if bad is None else f"{text}, fail {worse} {show(bad)}"


def landmark_errors(rows: list[dict[str, Any]], he_mpp: float | None) -> dict[str, Any] | None:
    """Return median and 90th percentile of a pair's landmark errors, and of the identity's.

    Args:
        rows: of `tables.LANDMARKS`, of one pair.
        he_mpp: of the H&E slide; None: no pixels are given.
    """
    errors = np.array([row["error_um"] for row in rows if row["error_um"] is not None])
    if not errors.size:
        return None
    relative = np.array(
        [
            np.nan if row["error_diagonal_fraction"] is None else row["error_diagonal_fraction"]
            for row in rows
            if row["error_um"] is not None
        ]
    )
    initial = np.array(
        [row["initial_error_um"] for row in rows if row["initial_error_um"] is not None]
    )
    median, p90 = float(np.median(errors)), float(np.percentile(errors, 90))
    return {
        "points": int(errors.size),
        "median_um": median,
        "p90_um": p90,
        "median_px": median / he_mpp if he_mpp else None,
        "p90_px": p90 / he_mpp if he_mpp else None,
        "median_diagonal": float(np.median(relative)),
        "p90_diagonal": float(np.percentile(relative, 90)),
        "initial_median_um": float(np.median(initial)) if initial.size else None,
    }


def views(
    he: RGB,
    her2: RGB,
    he_um: tuple[float, float],
    her2_um: tuple[float, float],
    background: tuple[int, int, int],
    displacement: Displacement,
) -> dict[str, RGB]:
    """Return the pictures of a pair: both stains, and laid over each other before and after.

    Before, the slides' corners lie on each other and micrometres are kept, so a difference of
    resolution does not count as a fault of the registration.

    Args:
        he: thumbnail of H&E (H, W, 3).
        her2: thumbnail of HER2, as the slide is stored.
        he_um: (width, height) of the H&E slide.
        her2_um: the same of the HER2 slide.
        background: colour of bare glass on HER2.
        displacement: from H&E to HER2; an empty one gives no picture of after.
    """
    he, her2 = pictures.shrink(he, SIDE_PX), pictures.shrink(her2, SIDE_PX)
    height, width = he.shape[:2]
    x = (np.arange(width) + 0.5) * he_um[0] / width
    y = (np.arange(height) + 0.5) * he_um[1] / height
    points = np.stack(np.meshgrid(x, y), axis=-1)
    before = _sample(her2, points, her2_um, background)
    made = {"he": he, "her2": her2, "before": pictures.two_colours(he, before)}
    if not displacement.empty:
        moved = map_points(displacement, points.reshape(-1, 2)).reshape(points.shape)
        after = _sample(her2, moved, her2_um, background)
        made["after"] = pictures.two_colours(he, after)
        made["checkerboard"] = pictures.checkerboard(he, after)
    return made


def _sample(
    rgb: RGB,
    points_um: npt.NDArray[np.float64],
    size_um: tuple[float, float],
    background: tuple[int, int, int],
) -> RGB:
    """Return the image (H, W, 3) at points (h, w, 2) in micrometres of its slide."""
    height, width = rgb.shape[:2]
    x = points_um[..., 0] / size_um[0] * width - 0.5
    y = points_um[..., 1] / size_um[1] * height - 0.5
    # Beyond the slide is glass, not a smear of its last pixels.
    sampled = cv2.remap(
        rgb,
        x.astype(np.float32),
        y.astype(np.float32),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=[float(value) for value in background],
    )
    return np.asarray(sampled, np.uint8)
