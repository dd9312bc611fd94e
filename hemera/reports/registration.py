"""Registrations on a page: overlays, the map of local quality, the certificate."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from hemera.config import AT_LEAST
from hemera.registration.displacement import Displacement, map_points
from hemera.registration.local_quality import LocalQuality
from hemera.registration.verdict import FAIL, SIGNALS, VERDICTS, grade, log_scale
from hemera.reports import pictures
from hemera.reports.html import count, number, percent, plural

RGB = npt.NDArray[np.uint8]

SIDE_PX = 480
"""Longest side of a picture; thumbnails are worked on at this size."""

QUALITY = 75
"""Of their JPEG: with it a pair takes about 0.4 MB, of which there are hundreds."""

ERRORS_UM = (10, 25, 50, 100, 200, 400)
"""Where the colour of a square changes: the same on every card, so that pairs compare."""

SQUARE = 0.72
"""Side of a coloured square, as a fraction of the distance of two."""

FRACTIONS = ("tile_ok", "match_fraction", "coverage_fraction", "folding_fraction")
"""Signals shown in percent."""

OWN = "none: a map made elsewhere, which the sheet names"

NAMES_MAX = 5
"""Pairs that a warning names."""


def worst_first(row: Mapping[str, Any]) -> tuple[int, float, str]:
    """Return what to sort rows of `tables.CERTIFICATE` by: verdict, then `tile_ok`, then name."""
    tile_ok = row["tile_ok"]
    return -VERDICTS.index(row["verdict"]), -1.0 if tile_ok is None else tile_ok, row["pair"]


def warnings(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the warnings about mirrored slides: level, words, and an anchor of the page.

    A failed pair is left out: without matches, the mirror image may match better by chance.

    Args:
        rows: of `tables.CERTIFICATE`.
    """
    found = []
    for mirrored, words, remedy in (
        (True, "whose HER2 slide turned out to be mirrored", "write mirrored: true"),
        (False, "declared mirrored whose HER2 slide matches as it is stored", "clear mirrored"),
    ):
        names = [
            row["pair"]
            for row in rows
            if row["mirrored_by"] == "probe"
            and row["mirrored"] is mirrored
            and row["verdict"] != FAIL
        ]
        if names:
            more = f" and {len(names) - NAMES_MAX} more" if len(names) > NAMES_MAX else ""
            found.append(
                {
                    "level": "care",
                    "words": f"{plural(len(names), 'pair')} {words} "
                    f"({', '.join(names[:NAMES_MAX])}{more}): it was registered so. Inspect it "
                    f"and {remedy} in pairs.tsv.",
                    "link": "registration",
                }
            )
    return found


def certificate(
    row: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[list[dict[str, str]], list[str]]:
    """Return the signals of a certificate: words, value, limits, and verdict on the value.

    Args:
        row: of `tables.CERTIFICATE`.
        options: of register, or empty if unknown: then values have no verdict.

    Returns:
        What was measured, and the names of what has limits and was not.
    """
    values = {**row, "log_scale": log_scale(row["scale"])}
    rows, missing = [], []
    for name, words in SIGNALS.items():
        value = values[name]
        if value is None:
            if name in options:
                missing.append(name)
            continue
        show = percent if name in FRACTIONS else number
        better, worse = ("≥", "<") if name in AT_LEAST else ("≤", ">")
        good, bad = options.get(name, (None, None))
        rows.append(
            {
                "name": name,
                "words": words,
                "value": show(value),
                "passes": "" if good is None else f"{better} {show(good)}",
                "fails": "" if bad is None else f"{worse} {show(bad)}",
                "state": grade(name, value, options) or "none",
            }
        )
    return rows, missing


def facts(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return how a displacement was made, as names and words.

    Args:
        row: of `tables.CERTIFICATE`.
    """
    version = f" {row['engine_version']}" if row["engine_version"] else ""
    engine = OWN if row["engine"] == "own" else f"{row['engine']}{version}"
    found = [("engine", engine)]
    if row["attempts"]:
        found.append(("preset", row["preset"] or ""))
    if row["size_px"] is not None:
        found.append(("canvas", f"{number(row['size_px'])} px, its shortest side"))
    if row["map"] in ("rigid", "nonrigid"):
        found.append(("map kept", row["map"]))
    elif row["match_count"] is not None:
        found.append(("matches", count(row["match_count"])))
    if row["mirrored"] is not None:
        yes = "yes" if row["mirrored"] else "no"
        by = {"sheet": ", as in the sheet", "probe": ", contrary to the sheet"}
        found.append(("mirrored", yes + by.get(row["mirrored_by"] or "", "")))
    return found


def card(
    row: Mapping[str, Any],
    images: dict[str, RGB],
    local: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return what the page shows of a pair beside its pictures.

    Args:
        row: of `tables.CERTIFICATE`, with the `options` of register.
        images: of `views`.
        local: of `local_map`.
    """
    signals, unmeasured = certificate(row, row["options"])
    return {
        "signals": signals,
        "unmeasured": unmeasured,
        "facts": facts(row),
        "size_px": images["he"].shape[1::-1] if "he" in images else None,
        "local": local,
    }


def embed(card: dict[str, Any], images: dict[str, RGB], album: pictures.Album) -> bool:
    """Add the pictures to a card; return False when they exceed the limit of the page."""
    if card["local"] is not None:
        images = {**images, "ground": pictures.paled(images["he"])}
    card["pictures"] = album.take(images, SIDE_PX, QUALITY)
    return bool(card["pictures"]) or not images


def in_pixels(row: Mapping[str, Any], he_mpp: float | None) -> dict[str, Any]:
    """Return a pair's row of `tables.LANDMARKS_COHORT` with errors in pixels of H&E added.

    Args:
        row: of a pair.
        he_mpp: of the H&E slide; None: unknown.
    """
    pixels = {
        f"error_{name}_px": um / he_mpp if um is not None and he_mpp else None
        for name, um in (("median", row["error_median_um"]), ("p90", row["error_p90_um"]))
    }
    return {**row, **pixels}


def views(
    he: RGB,
    her2: RGB,
    he_um: tuple[float, float],
    her2_um: tuple[float, float],
    background: tuple[int, int, int],
    displacement: Displacement,
    rigid: Sequence[float] | None,
) -> dict[str, RGB]:
    """Return the pictures of a pair: both stains, and overlaid before and after.

    Before, the slides' corners coincide at equal um per pixel, so a difference of resolution is not
    shown as a registration error.

    Args:
        he: thumbnail of H&E (H, W, 3).
        her2: thumbnail of HER2, as the slide is stored.
        he_um: (width, height) of the H&E slide.
        her2_um: the same of the HER2 slide.
        background: its colour on HER2.
        displacement: from H&E to HER2; an empty one gives no picture of final.
        rigid: the map before the nonrigid stage, as in `tables.CERTIFICATE`; None: no picture.

    Returns:
        `he`, `her2`, and of `before`, `rigid`, `final` each `{name}_blend`, `{name}_checkerboard`.
    """
    he, her2 = pictures.shrink(he, SIDE_PX), pictures.shrink(her2, SIDE_PX)
    height, width = he.shape[:2]
    x = (np.arange(width) + 0.5) * he_um[0] / width
    y = (np.arange(height) + 0.5) * he_um[1] / height
    points = np.stack(np.meshgrid(x, y), axis=-1)
    places = {"before": points}
    if rigid is not None:
        a, b, c, d, e, f = rigid
        places["rigid"] = points @ np.array([[a, d], [b, e]]) + (c, f)
    if not displacement.empty:
        places["final"] = map_points(displacement, points.reshape(-1, 2)).reshape(points.shape)
    made = {"he": he, "her2": her2}
    for name, at in places.items():
        other = _sample(her2, at, her2_um, background)
        made[f"{name}_blend"] = pictures.two_colours(he, other)
        made[f"{name}_checkerboard"] = pictures.checkerboard(he, other)
    return made


def local_map(
    local: LocalQuality, he_um: tuple[float, float], size_px: tuple[int, int]
) -> dict[str, Any] | None:
    """Draw the squares of local quality over a picture of H&E, coloured by their estimated error.

    Args:
        local: of a map.
        he_um: (width, height) of the H&E slide.
        size_px: the same of the picture.

    Returns:
        `squares` as SVG in pixels of the picture; `legend` as (words, colour, fraction of
        the squares); `count`, `median_um`, `p90_um`; `worse_fraction`: of squares, outlined, that
        match at least as well elsewhere. None without squares.
    """
    if not len(local.ncc):
        return None
    scale = np.array(size_px) / he_um
    side = SQUARE * local.step_um * scale
    corners = local.centres_um * scale - side / 2
    error = local.error_um
    classes = np.searchsorted(ERRORS_UM, error)
    colours = pictures.steps(len(ERRORS_UM) + 1)

    def path(which: npt.NDArray[np.bool_], look: str) -> Markup:
        box = f"h{side[0]:.1f}v{side[1]:.1f}h-{side[0]:.1f}z"
        moves = "".join(f"M{x:.1f} {y:.1f}{box}" for x, y in corners[which])
        return Markup('<path d="{}" {}/>').format(moves, Markup(look))

    drawn = [
        path(classes == k, f'fill="{colour}"')
        for k, colour in enumerate(colours)
        if np.any(classes == k)
    ]
    if not local.ok.all():
        drawn.append(path(~local.ok, 'class="worse"'))
    bounds = [number(value) for value in ERRORS_UM]
    words = [
        f"up to {bounds[0]} µm",
        *(f"{low} to {high}" for low, high in itertools.pairwise(bounds)),
        f"above {bounds[-1]}",
    ]
    return {
        "squares": Markup("").join(drawn),
        "legend": [
            (text, colour, float(np.mean(classes == k)))
            for k, (text, colour) in enumerate(zip(words, colours, strict=True))
        ],
        "count": len(local.ncc),
        "median_um": float(np.median(error)),
        "p90_um": float(np.percentile(error, 90)),
        "worse_fraction": float(np.mean(~local.ok)),
    }


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
    # Beyond the slide is background, not a copy of its last pixels.
    sampled = cv2.remap(
        rgb,
        x.astype(np.float32),
        y.astype(np.float32),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=[float(value) for value in background],
    )
    return np.asarray(sampled, np.uint8)
