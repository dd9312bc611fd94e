"""Registration of one pair in up to three attempts, each with its certificate; the best is kept."""

import dataclasses
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from hemera.config import RegisterOptions
from hemera.config.registration import Preset
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
HALVED_PX = 1024
"""A canvas at least this large may be tried at half its size."""

FAST: Preset = "default_initial_nonrigid_fast"
FULL: Preset = "default_initial_nonrigid"


@dataclasses.dataclass(frozen=True)
class Attempt:
    """How the engine is run once.

    `tissue_only`: everything but tissue is white, and more angles and sizes are matched; `factor`:
    by which the canvas is reduced.
    """

    preset: Preset
    tissue_only: bool = False
    factor: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """A displacement with the columns of `tables.CERTIFICATE` that were determined."""

    displacement: Displacement
    row: dict[str, Any]
    local: LocalQuality | None = None
    retryable: bool = True


def plan(options: RegisterOptions, size_px: int) -> list[Attempt]:
    """Return the attempts at a canvas with this shortest side."""
    first = Attempt(options.preset)
    second = dataclasses.replace(first, tissue_only=True)
    third = dataclasses.replace(second, preset=FULL)
    if options.preset != FAST:
        # Slides without common detail may still have a common outline.
        factor = 2 if size_px >= HALVED_PX else 1
        third = dataclasses.replace(second, preset=FAST, factor=factor)
    return [first, second, third][: 1 + options.retries]


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
    for attempt in plan(options, canvas.size_px):
        words = f"{attempt.preset} at {canvas.size_px // attempt.factor} px"
        words += ", tissue alone" if attempt.tissue_only else ""
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
    reduced = canvas.reduced(attempt.factor)
    if attempt.tissue_only:
        reduced = reduced.tissue_only(described)
    outcome, mirrored, other_count = _run_engine(reduced, attempt, mirrored, options, folder)
    probe = None
    if other_count is not None and outcome.match_count:
        probe = outcome.match_count / max(other_count, 1)
    sheet = "sheet" if mirrored else None
    mirrored_by = sheet if mirrored == pair.mirrored else "probe"
    row: dict[str, Any] = {
        "preset": attempt.preset,
        "size_px": reduced.size_px,
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
        return fields.mirrored(coarse, reduced.her2.shape[1] * reduced.mpp) if mirrored else coarse

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
            points_um[:, 1, 0] = reduced.her2.shape[1] * reduced.mpp - points_um[:, 1, 0]
        row |= match_keypoints(d, points_um, math.hypot(*size_um(described["he"])))
    row["verdict"], row["reason"], retryable = assess(
        row, options, rigid_kept=rigid_kept, contradicts_sheet=contradicts_sheet
    )
    return Result(d, row, local, retryable)


def _run_engine(
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
                options.replace(preset=attempt.preset),
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
