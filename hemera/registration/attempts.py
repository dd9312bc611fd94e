"""Registration of one pair in up to three attempts, each with its certificate; the best is kept."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import time
from collections.abc import Iterator
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
from hemera.registration.signals import Signals, measure
from hemera.registration.verdict import FAIL, Verdict, assess, prefer_rigid
from hemera.sheet import Pair

log = logging.getLogger(__name__)

CERTIFICATE_SIDE_PX = 1000
"""Approximate longest side of the images that signals are measured on."""

TOLERANCE_PX = 0.05
"""The displacement is stored on the coarsest grid that changes it by less, in H&E pixels."""

NODES_MAX = 8192 * 12_288
"""Largest number of nodes stored: 800 MB of memory."""

HALVED_PX = 1024
"""A canvas at least this large may be tried at half its size."""

FAST, FULL = "default_initial_nonrigid_fast", "default_initial_nonrigid"


@dataclasses.dataclass(frozen=True)
class Attempt:
    """How the engine is run once."""

    preset: str
    tissue_only: bool = False
    """Everything but tissue is white, and more angles and sizes are matched."""
    factor: int = 1
    """By which the canvas is reduced."""


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """A displacement with its certificate."""

    displacement: Displacement
    verdict: Verdict
    signals: Signals | None
    columns: dict[str, Any]
    """Further columns of `tables.CERTIFICATE`."""

    @property
    def order(self) -> tuple[int, float]:
        """Smaller is better."""
        tile_ok = None if self.signals is None else self.signals.tile_ok
        return self.verdict.rank, 1.0 if tile_ok is None else -tile_ok

    def row(self) -> dict[str, Any]:
        """Return the columns of `tables.CERTIFICATE` that were determined."""
        measured = {} if self.signals is None else dict(vars(self.signals))
        measured.pop("local", None)
        verdict = {"verdict": self.verdict.verdict, "reason": self.verdict.reason}
        return {**verdict, **measured, **self.columns}


def plan(options: RegisterOptions, size_px: int) -> list[Attempt]:
    """Return the attempts, each by what it changes against the one before.

    Args:
        options: preset and number of retries.
        size_px: shortest side of the canvas.
    """
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
    """Register a pair by DeeperHistReg until a displacement passes; return the best result.

    Args:
        pair: the pair.
        described: rows of `tables.DESCRIBE` by stain.
        options: engine, retries and limits.
        folder: a folder that the engine may use; emptied before and removed after each run.

    Returns:
        The best result, and all attempts with their verdicts in words.

    Raises:
        SlideError: when a slide cannot be read.
        RegistrationError: when the engine is not installed, or the device is not available.
    """
    canvas = read_canvas(pair, described, options)
    best: Result | None = None
    attempts: list[str] = []
    for number, attempt in enumerate(plan(options, canvas.size_px)):
        if best is not None and best.displacement.empty:
            # No result at all, most often for lack of memory or time: half the size each time.
            attempt = Attempt(FAST, tissue_only=True, factor=2**number)
        words = f"{attempt.preset} at {canvas.size_px // attempt.factor} px"
        words += ", tissue alone" if attempt.tissue_only else ""
        log.info("pair %s: %s", pair.pair, words)
        # The orientation that the previous attempt found.
        mirrored = pair.mirrored if best is None else best.columns["mirrored"]
        result = _attempt(pair, described, canvas, attempt, mirrored, options, folder)
        verdict = result.verdict
        words += f": {verdict.verdict}" + (f" ({verdict.reason})" if verdict.reason else "")
        log.info("pair %s: %s", pair.pair, words)
        attempts.append(words)
        if best is None or result.order < best.order:
            best = result
        if not verdict.retryable:
            break
    assert best is not None
    return best, attempts


def certify_own(pair: Pair, path: Path, described: Described, options: RegisterOptions) -> Result:
    """Assess a displacement that was made elsewhere.

    Raises:
        RegistrationError: when the file cannot be read or contains no displacement.
        SlideError: when a slide cannot be read.
    """
    own = read_displacement(path)
    if own.empty:
        raise RegistrationError(f"{path.name}: an empty displacement; name another in pairs.tsv")
    mirrored = own.affine.determinant < 0
    canvas = read_canvas(pair, described, options)
    signals = _measure(own, described, canvas, mirrored)
    verdict = assess(
        signals, options, match_count=None, match_fraction=None, matched=False, mirrored=mirrored
    )
    columns = {
        "map": "own",
        "mirrored": mirrored,
        "mirrored_by": "sheet" if mirrored and pair.mirrored else None,
        "displacement_mpp": own.mpp,
    }
    return Result(own, verdict, signals, columns)


def _attempt(
    pair: Pair,
    described: Described,
    canvas: Canvas,
    attempt: Attempt,
    mirrored: bool,
    options: RegisterOptions,
    folder: Path,
) -> Result:
    """Run the engine for an attempt, starting with an orientation, and assess its result."""
    reduced = canvas.reduced(attempt.factor)
    if attempt.tissue_only:
        reduced = reduced.tissue_only(described)
    outcome, mirrored, other_count = _run_engine(reduced, attempt, mirrored, options, folder)
    probe = None
    if other_count is not None and outcome.match_count:
        probe = outcome.match_count / max(other_count, 1)
    if mirrored != pair.mirrored:
        log.info(
            "pair %s: HER2 matches better %s, against the sheet",
            pair.pair, "mirrored" if mirrored else "as it is stored",
        )  # fmt: skip
    columns = {
        "preset": attempt.preset,
        "size_px": reduced.size_px,
        "mirrored": mirrored,
        "mirrored_by": "probe" if mirrored != pair.mirrored else "sheet" if mirrored else None,
        "match_count": outcome.match_count,
        "match_fraction": outcome.match_fraction,
        "mirror_probe": probe,
        "map": "none",
    }
    if outcome.rigid is None:
        return Result(fields.none(), Verdict(FAIL, outcome.reason, True), None, columns)
    # What was mirrored is the image that was registered, up to its last pixel's edge.
    width_um = reduced.her2.shape[1] * reduced.mpp if mirrored else None
    tolerance_um = TOLERANCE_PX * described["he"]["mpp"]
    rigid = _stored(outcome.rigid, tolerance_um, width_um)
    kept, d = "rigid", rigid
    signals = _measure(rigid, described, canvas, mirrored)
    rigid_kept = False
    if outcome.nonrigid is not None:
        nonrigid = _stored(outcome.nonrigid, tolerance_um, width_um)
        refined = _measure(nonrigid, described, canvas, mirrored)
        rigid_kept = prefer_rigid(refined, signals, options.rigid_tolerance)
        if not rigid_kept:
            kept, d, signals = "nonrigid", nonrigid, refined
    verdict = assess(
        signals,
        options,
        match_count=outcome.match_count,
        match_fraction=outcome.match_fraction,
        mirror_probe=probe,
        rigid_kept=rigid_kept,
        mirrored=mirrored,
        contradicts_sheet=pair.mirrored and not mirrored,
    )
    matrix = np.column_stack([rigid.affine.matrix, rigid.affine.offset_um])
    columns |= {"map": kept, "displacement_mpp": d.mpp, "rigid": matrix.ravel().tolist()}
    return Result(d, verdict, signals, columns)


def _run_engine(
    canvas: Canvas, attempt: Attempt, mirrored: bool, options: RegisterOptions, folder: Path
) -> tuple[deeperhistreg.Outcome, bool, int | None]:
    """Run the engine, and once more with HER2 mirrored where that matches better.

    Returns:
        The outcome; whether it is of the mirror image; how many matches the other orientation has,
        None where it was not probed.
    """
    settings = deeperhistreg.Settings(
        preset=attempt.preset,
        levels=options.levels,
        iterations=options.iterations,
        device=options.device,
        torch_threads=options.torch_threads,
        timeout_s=options.timeout_s,
        thorough=attempt.tissue_only,
        match_fraction_min=options.match_fraction_fail,
    )

    def run(mirrored: bool, settings: deeperhistreg.Settings) -> deeperhistreg.Outcome:
        her2 = np.ascontiguousarray(canvas.her2[:, ::-1]) if mirrored else canvas.her2
        with _empty(folder):
            return deeperhistreg.register(
                canvas.he,
                her2,
                fixed_mpp=canvas.mpp,
                moving_mpp=canvas.mpp,
                settings=settings,
                folder=folder,
            )

    started = time.monotonic()
    outcome = run(mirrored, settings)
    count, other_count = outcome.match_count, outcome.mirrored_match_count
    if other_count is None or count is None or other_count <= count:
        return outcome, mirrored, other_count
    left_s = max(1.0, options.timeout_s - (time.monotonic() - started))
    settings = dataclasses.replace(settings, probe=False, timeout_s=left_s)
    return run(not mirrored, settings), not mirrored, count


def _measure(d: Displacement, described: Described, canvas: Canvas, mirrored: bool) -> Signals:
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


def _stored(d: Displacement, tolerance_um: float, mirrored_width_um: float | None) -> Displacement:
    """Return a displacement coarsened, and to the stored slide where its mirror image was given."""
    coarse = fields.coarsen(d, tolerance_um, node_count_max=NODES_MAX)
    if coarse.mpp > d.mpp and d.vectors_um.size > 2 * NODES_MAX:
        log.warning(
            "displacement: %d nodes are too many to store; nodes are %d times as far apart now, "
            "which may change it by more than %.3g um; lower register.size_px",
            d.vectors_um.size // 2, round(coarse.mpp / d.mpp), tolerance_um,
        )  # fmt: skip
    return coarse if mirrored_width_um is None else fields.mirrored(coarse, mirrored_width_um)


@contextlib.contextmanager
def _empty(folder: Path) -> Iterator[None]:
    """Create an empty folder, replacing what a killed job left, and remove it at the end."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
