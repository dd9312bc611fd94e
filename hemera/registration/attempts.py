"""Registration of one pair in up to three attempts, each with its certificate; the best is kept."""

import dataclasses
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from hemera.config import RegisterOptions
from hemera.errors import RegistrationError
from hemera.registration import deeperhistreg
from hemera.registration import displacement as fields
from hemera.registration.canvas import Canvas, Described, read_canvas, size_um
from hemera.registration.displacement import Displacement
from hemera.registration.displacement_files import read_displacement
from hemera.registration.local_quality import LocalQuality
from hemera.registration.signals import match_keypoints, measure
from hemera.registration.verdict import FAIL, RIGID_TOLERANCE, VERDICTS, assess
from hemera.sheet import Pair

log = logging.getLogger(__name__)

CERTIFICATE_SIDE_PX = 1000
"""Approximate longest side of the images that signals are measured on."""
TOLERANCE_PX = 0.05
"""The displacement is stored on the coarsest grid that changes it by less, in H&E pixels."""


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What the engine registers: the slides, their tissue alone, or the haematoxylin of it."""

    name: str | None = None
    """In the list of attempts."""
    tissue_only: bool = False
    """Everything but tissue is white, and more angles and sizes are matched."""
    haematoxylin: bool = False


ATTEMPTS = (
    Attempt(),
    Attempt("tissue alone", tissue_only=True),
    # Both stains have it; strong DAB or eosin have other edges.
    Attempt("haematoxylin of the tissue alone", tissue_only=True, haematoxylin=True),
)
"""In this order. Matching is on images of 150 to 700 px whatever the canvas: a smaller canvas or
another preset would find the same matches again."""


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """A displacement with the columns of `tables.CERTIFICATE` that were determined."""

    displacement: Displacement
    row: dict[str, Any]
    local: LocalQuality | None = None
    retryable: bool = True


def register_pair(
    pair: Pair, described: Described, options: RegisterOptions, folder: Path
) -> tuple[Result, list[str]]:
    """Register a pair by DeeperHistReg until a displacement passes.

    The engine's `folder` is emptied before and removed after each run. Returns the best result, and
    all attempts with their verdicts in words.
    """
    canvas = read_canvas(pair, described, options)
    mirrored = pair.mirrored
    results: list[Result] = []
    attempts: list[str] = []
    for attempt in ATTEMPTS[: 1 + options.retries]:
        words = f"{options.preset} at {canvas.size_px} px"
        words += f", {attempt.name}" if attempt.name else ""
        log.info("pair %s: %s", pair.pair, words)
        result = _attempt(pair, described, canvas, attempt, mirrored, options, folder)
        reason = result.row["reason"]
        words += f": {result.row['verdict']}" + (f" ({reason})" if reason else "")
        attempts.append(words)
        results.append(result)
        if not result.retryable:
            break
        mirrored = result.row["mirrored"]
    return min(results, key=_order), attempts


def _order(result: Result) -> tuple[int, float]:
    tile_ok = result.row.get("tile_ok")
    return VERDICTS.index(result.row["verdict"]), 1.0 if tile_ok is None else -tile_ok


def certify_own(pair: Pair, path: Path, described: Described, options: RegisterOptions) -> Result:
    """Assess a displacement that was made elsewhere."""
    own = read_displacement(path)
    if own.empty:
        raise RegistrationError(f"{path.name}: an empty displacement; name another in the sheet")
    mirrored = own.affine.determinant < 0
    canvas = read_canvas(pair, described, options)
    signals, local = _measure(own, described, canvas, mirrored)
    row = {
        "map": "own",
        "mirrored": mirrored,
        "mirrored_by": "sheet" if mirrored and pair.mirrored else None,
        "displacement_mpp": own.mpp,
        **signals,
    }
    row["verdict"], row["reason"], retryable = assess(row, options)
    return Result(own, row, local, retryable)


def _attempt(
    pair: Pair,
    described: Described,
    canvas: Canvas,
    attempt: Attempt,
    mirrored: bool,
    options: RegisterOptions,
    folder: Path,
) -> Result:
    """Run the engine, first with the given orientation, and assess its result."""
    given = canvas.tissue_only(described) if attempt.tissue_only else canvas
    given = given.haematoxylin() if attempt.haematoxylin else given
    outcome, mirrored, other_count = run_engine(given, attempt, mirrored, options, folder)
    probe = None
    if other_count is not None and outcome.match_count:
        probe = outcome.match_count / max(other_count, 1)
    sheet = "sheet" if mirrored else None
    mirrored_by = sheet if mirrored == pair.mirrored else "probe"
    row: dict[str, Any] = {
        "preset": options.preset,
        "size_px": canvas.size_px,
        "mirrored": mirrored,
        "mirrored_by": mirrored_by,
        "match_count": outcome.match_count,
        "match_fraction": outcome.match_fraction,
        "mirror_probe": probe,
    }
    if outcome.rigid is None:
        row |= {"map": "none", "verdict": FAIL, "reason": outcome.reason}
        return Result(fields.none(), row)

    def stored(d: Displacement) -> Displacement:
        """Coarsen it; to the stored slide where its mirror image was registered."""
        coarse = fields.coarsen(d, TOLERANCE_PX * described["he"]["mpp"])
        return fields.mirrored(coarse, canvas.her2.shape[1] * canvas.mpp) if mirrored else coarse

    d = rigid = stored(outcome.rigid)
    signals, local = _measure(rigid, described, canvas, mirrored)
    row["map"] = "rigid"
    rigid_kept = False
    if outcome.nonrigid is not None:
        nonrigid = stored(outcome.nonrigid)
        refined, refined_local = _measure(nonrigid, described, canvas, mirrored)
        tile_ok, refined_tile_ok = signals.get("tile_ok"), refined.get("tile_ok")
        if tile_ok is not None and refined_tile_ok is not None:
            rigid_kept = refined_tile_ok < tile_ok - RIGID_TOLERANCE
        if not rigid_kept:
            row["map"], d, signals, local = "nonrigid", nonrigid, refined, refined_local
    matrix = np.column_stack([rigid.affine.matrix, rigid.affine.offset_um])
    row |= {**signals, "displacement_mpp": d.mpp, "rigid": matrix.ravel().tolist()}
    contradicts_sheet = pair.mirrored and not mirrored
    if outcome.keypoints_um is not None and len(outcome.keypoints_um):
        points_um = outcome.keypoints_um.copy()
        if mirrored:
            points_um[:, 1, 0] = canvas.her2.shape[1] * canvas.mpp - points_um[:, 1, 0]
        row |= match_keypoints(d, points_um, math.hypot(*size_um(described["he"])))
    row["verdict"], row["reason"], retryable = assess(
        row, options, rigid_kept=rigid_kept, contradicts_sheet=contradicts_sheet
    )
    return Result(d, row, local, retryable)


def run_engine(
    canvas: Canvas, attempt: Attempt, mirrored: bool, options: RegisterOptions, folder: Path
) -> tuple[deeperhistreg.Outcome, bool, int | None]:
    """Run the engine, and once more with HER2 mirrored where that matches better.

    Returns the outcome, whether it is mirrored, and the matches of the other orientation.
    """

    def run(mirrored: bool, probe: bool) -> deeperhistreg.Outcome:
        her2 = np.ascontiguousarray(canvas.her2[:, ::-1]) if mirrored else canvas.her2
        # A killed job may have left files.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            return deeperhistreg.register(
                canvas.he,
                her2,
                canvas.mpp,
                options,
                folder,
                thorough=attempt.tissue_only,
                probe=probe,
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    outcome = run(mirrored, probe=True)
    count, other_count = outcome.match_count, outcome.mirrored_match_count
    if other_count is None or count is None or other_count <= count:
        return outcome, mirrored, other_count
    return run(not mirrored, probe=False), not mirrored, count


def _measure(
    d: Displacement, described: Described, canvas: Canvas, mirrored: bool
) -> tuple[dict[str, float | None], LocalQuality]:
    """Measure a displacement on the slides as they were read."""
    small = canvas.reduced(max(1, round(max(canvas.he.shape) / CERTIFICATE_SIDE_PX)))
    return measure(
        small.he,
        small.her2,
        d,
        mpp=small.mpp,
        fixed_size_um=size_um(described["he"]),
        moving_size_um=size_um(described["her2"]),
        mirrored=mirrored,
    )
