"""Registrations on a page: overlays, the map of local quality, the certificate."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd

from hemera.config import AT_LEAST
from hemera.dataset.criteria import ACCEPTED
from hemera.dataset.statistics import Frame
from hemera.registration.displacement import Displacement, map_points
from hemera.registration.local_quality import LocalQuality
from hemera.registration.verdict import FAIL, SIGNALS, VERDICTS, grade, log_scale
from hemera.reports import pictures

RGB = npt.NDArray[np.uint8]

SIDE_PX = 480
"""Longest side of a picture; thumbnails are worked on at this size."""

QUALITY = 75
"""Of their JPEG: a pair takes about 0.4 MB."""

ERRORS_UM = (10, 25, 50, 100, 200, 400)
"""Where the colour of a square changes: the same on every card, so that pairs compare."""

ERROR_CLASSES = tuple(
    zip(
        (
            f"up to {ERRORS_UM[0]} µm",
            *(f"{low} to {high}" for low, high in itertools.pairwise(ERRORS_UM)),
            f"above {ERRORS_UM[-1]}",
        ),
        pictures.steps(len(ERRORS_UM) + 1),
        strict=True,
    )
)
"""Name and colour of each class of squares."""

SQUARE = 0.72
"""Side of a coloured square, as a fraction of the distance of two."""

PALE = 0.45
"""Remaining contrast of H&E below the squares."""

FRACTIONS = (
    *("tile_ok", "misaligned_fraction", "match_fraction", "keypoint_fraction"),
    *("coverage_fraction", "folding_fraction"),
)
"""Signals shown in percent."""


def worst_first(row: Mapping[str, Any]) -> tuple[int, float, str]:
    """Return the key of a row of `tables.CERTIFICATE`: verdict, then `tile_ok`, then name."""
    tile_ok = row["tile_ok"]
    return -VERDICTS.index(row["verdict"]), -1.0 if tile_ok is None else tile_ok, row["pair"]


def signals(row: Mapping[str, Any], limits: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the signals of a certificate: name, words, value, its grade and its limits.

    `row` is of `tables.CERTIFICATE`; `limits` are options of register by name.
    """
    values = {**row, "log_scale": log_scale(row["scale"])}
    return [
        {
            "name": name,
            "words": words,
            "value": values[name],
            "grade": None if values[name] is None else grade(name, values[name], limits),
            "limits": limits.get(name),
            "signs": ("≥", "<") if name in AT_LEAST else ("≤", ">"),
            "is_fraction": name in FRACTIONS,
        }
        for name, words in SIGNALS.items()
    ]


def mirrored(rows: Sequence[Mapping[str, Any]]) -> dict[bool, list[str]]:
    """Return the pairs whose HER2 slide is mirrored against the sheet (True), or is not (False).

    A failed pair is left out: without matches, the mirror image may match better by chance.
    """
    found: dict[bool, list[str]] = {True: [], False: []}
    for row in rows:
        if row["mirrored_by"] == "probe" and row["verdict"] != FAIL:
            found[row["mirrored"]].append(row["pair"])
    return found


def card(
    row: Mapping[str, Any],
    images: dict[str, RGB],
    local: Frame | None,
    tiles: Frame | None,
    album: pictures.Album,
) -> dict[str, Any] | None:
    """Return what the page shows of a pair; None when its pictures exceed the album's limit.

    `row` is of `tables.CERTIFICATE` with the `options` of register, `images` are of `views`,
    `local` is of `local_squares`, and `tiles` of `tile_squares`.
    """
    drawn = local is not None and len(local) > 0
    if drawn:
        pale = 255 - (255 - images["he"]) * np.float32(PALE)
        images = {**images, "ground": pale.astype(np.uint8)}
    taken = album.take(images, SIDE_PX, QUALITY)
    if images and not taken:
        return None
    return {
        "row": row,
        "signals": signals(row, row["options"]),
        "pictures": taken,
        "size_px": images["he"].shape[1::-1] if "he" in images else None,
        "squares": local if drawn else None,
        "tiles": tiles if drawn and tiles is not None and len(tiles) else None,
        "classes": ERROR_CLASSES,
    }


def views(
    he: RGB,
    her2: RGB,
    he_um: tuple[float, float],
    her2_um: tuple[float, float],
    background: tuple[int, int, int],
    displacement: Displacement,
    rigid: Sequence[float] | None,
) -> dict[str, RGB]:
    """Return the pictures of a pair: both stains, and blends and checkerboards of each step.

    Before, the slides' corners coincide at equal um per pixel. `he` and `her2` are thumbnails
    (H, W, 3), `he_um` and `her2_um` (width, height) of their slides. An empty displacement gives no
    picture of final; `rigid`, as in `tables.CERTIFICATE`, is the map before the nonrigid stage.
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


def local_squares(
    local: LocalQuality, he_um: tuple[float, float], size_px: tuple[int, int]
) -> Frame:
    """Return the squares of local quality over a picture of H&E; sizes are (width, height).

    A row per square: `x`, `y`, `width`, `height` in pixels of the picture; `error_um`, and its
    class `kind`, an index of `ERROR_CLASSES`; `worse`: matches at least as well elsewhere;
    `misaligned`: in a region where most do.
    """
    scale = np.array(size_px) / he_um
    width, height = SQUARE * local.step_um * scale
    x, y = (local.centres_um * scale - (width / 2, height / 2)).T
    kind = np.searchsorted(ERRORS_UM, local.error_um)
    return pd.DataFrame(
        {"x": x, "y": y, "width": width, "height": height, "error_um": local.error_um,
         "kind": kind, "worse": ~local.ok, "misaligned": local.regions > 0}
    )  # fmt: skip


def tile_squares(tiles: Frame, he_um: tuple[float, float], size_px: tuple[int, int]) -> Frame:
    """Return the tiles of a pair over a picture of H&E; sizes are (width, height).

    A row per tile: `x`, `y`, `width`, `height` in pixels of the picture; `reason`, of the filter
    that rejected it, or `ACCEPTED`. `tiles` are its rows of the index.
    """
    scale = np.array(size_px) / he_um
    corners = tiles[["x_px", "y_px"]].to_numpy() * tiles[["he_mpp"]].to_numpy() * scale
    sides = (tiles["size_px"] * tiles["mpp"]).to_numpy()[:, None] * scale
    reason = tiles["reason"].where(~tiles["accepted"], ACCEPTED)
    return pd.DataFrame(
        {"x": corners[:, 0], "y": corners[:, 1], "width": sides[:, 0], "height": sides[:, 1],
         "reason": reason.to_numpy()}
    )  # fmt: skip


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
