"""Register the HER2 slide onto the H&E slide, and certify the map or say why there is none."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hemera import tables
from hemera.config import RegisterOptions
from hemera.errors import RegistrationError, SheetError, SlideError
from hemera.imaging.slide import LOST_MAX, Slide, open_slide
from hemera.registration import deeperhistreg
from hemera.registration import displacement as fields
from hemera.registration.displacement import Displacement
from hemera.registration.displacement_files import read_displacement, write_displacement
from hemera.registration.local_quality import LocalQuality
from hemera.registration.signals import Signals, measure
from hemera.registration.verdict import Verdict, judge, prefer_rigid
from hemera.sheet import Pair, read_sheet

log = logging.getLogger(__name__)

RGB = npt.NDArray[np.uint8]

CERTIFICATE_SIDE_PX = 1000
"""About the longest side of the images that the certificate is measured on."""

TOLERANCE_PX = 0.05
"""The map is kept on a coarser grid where that moves no point by more, in H&E pixels."""

NODES_MAX = 8192 * 12_288
"""A finer grid than this is never kept, whatever is lost: it takes 800 MB of memory."""

MASK_MARGIN = 0.02
"""Glass kept around the tissue when only tissue is registered, as a share of the longest side."""


PIECE_PX = 64
"""Side of the pieces that are read where a band cannot be."""

HALVED_PX = 1024
"""A canvas at least this large may be tried at half its size: still enough to align it."""

FAST, FULL = "default_initial_nonrigid_fast", "default_initial_nonrigid"


@dataclasses.dataclass(frozen=True)
class _Try:
    """One way to run the engine."""

    preset: str
    tissue_only: bool = False
    factor: int = 1
    """By how much the canvas is reduced."""

    def words(self, size_px: int) -> str:
        """Say it in words."""
        what = ", tissue alone" if self.tissue_only else ""
        return f"{self.preset} at {size_px // self.factor} px{what}"


@dataclasses.dataclass(frozen=True, eq=False)
class _Result:
    """What a try came to."""

    map: Displacement
    verdict: Verdict
    local: LocalQuality | None
    row: dict[str, Any]

    @property
    def order(self) -> tuple[int, float]:
        """Smaller is better."""
        tile_ok = self.row.get("tile_ok")
        return self.verdict.rank, 1.0 if tile_ok is None else -tile_ok


def run(
    *,
    sheet: Path,
    unit: str,
    images_table: Path,
    displacement: Path,
    certificate: Path,
    quality: Path,
    options: RegisterOptions,
) -> None:
    """Register one pair of whole slides.

    Where the sheet names a displacement, that map is judged instead of one that the engine makes.
    A pair that cannot be registered, or whose map is wrong, is a certificate with verdict ``fail``
    and its reason, never an error. A person's verdict in the sheet is not applied here.

    Args:
        sheet: the sheet of pairs.
        unit: the pair.
        images_table: table `tables.DESCRIBE` of the unit.
        displacement: the map from H&E to HER2 as the slides are stored, um; empty where there is
            none. A failed map is written all the same, because a person may overrule.
        certificate: table `tables.CERTIFICATE`, one row.
        quality: table `tables.QUALITY`: the local quality of the map.
        options: engine and limits.

    Raises:
        SheetError: when the sheet cannot be used or has no such pair.
        RegistrationError: when the engine is not installed, or the device asked for is not there.
    """
    pair = _find(sheet, unit)
    described = {
        row["stain"]: row
        for row in tables.read(images_table, tables.DESCRIBE).to_pylist()
        if row["pair"] == pair.pair
    }
    row: dict[str, Any] = dict.fromkeys(tables.CERTIFICATE.names)
    row |= {
        "pair": pair.pair,
        "verdict": "fail",
        "engine": "own",
        "attempts": [],
        "map": "none",
    }
    if pair.displacement is None:
        row |= {"engine": "deeperhistreg", "engine_version": deeperhistreg.version()}
        row["preset"] = options.preset
    found, local = fields.none(), None
    row["reason"] = _refusal(described)
    if row["reason"] is None:
        try:
            if pair.displacement is None:
                result, row["attempts"] = _register(pair, described, displacement, options)
            else:
                result = _certify(pair, described, pair.displacement, options)
        except (SlideError, _OwnMapError) as error:
            row["reason"] = str(error)
        else:
            found, local = result.map, result.local
            row |= result.row
            row |= {"verdict": result.verdict.verdict, "reason": result.verdict.reason}
    level = logging.INFO if row["verdict"] == "pass" else logging.WARNING
    log.log(
        level, "pair %s: %s%s", pair.pair, row["verdict"],
        f" ({row['reason']})" if row["reason"] else "",
    )  # fmt: skip
    write_displacement(displacement, found)
    metadata = tables.provenance(options)
    tables.write(certificate, [row], tables.CERTIFICATE, metadata)
    rows = [] if local is None else pa.table(local.to_columns(pair.pair))
    tables.write(quality, rows, tables.QUALITY, metadata)


def _find(sheet: Path, unit: str) -> Pair:
    for pair in read_sheet(sheet).pairs:
        if pair.pair == unit:
            return pair
    raise SheetError(f"{sheet.name}: no pair {unit}; name one of its pairs of whole slides")


def _refusal(described: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return why the pair needs no engine, from what describe said of its images."""
    reasons = []
    for stain in tables.STAINS:
        row = described.get(stain)
        if row is None:
            reasons.append(f"{stain}: not described; run describe")
        elif row["verdict"] != "accept":
            reasons.append(row["reason"] or f"{stain}: refused by describe")
    return "; ".join(dict.fromkeys(reasons)) or None


def _next_try(number: int, options: RegisterOptions, size_px: int, starved: bool) -> _Try:
    """Return what is tried next.

    Args:
        number: of the try, from 0.
        options: settings.
        size_px: shortest side of the canvas.
        starved: the tries before came to nothing, for want of time or memory, say.
    """
    if number == 0:
        return _Try(options.preset)
    if starved:
        return _Try(FAST, tissue_only=True, factor=2**number)
    if number == 1:
        return _Try(options.preset, tissue_only=True)
    if options.preset == FAST:
        return _Try(FULL, tissue_only=True)
    # What cannot be aligned in detail may still be in outline.
    return _Try(FAST, tissue_only=True, factor=2 if size_px >= HALVED_PX else 1)


def _register(
    pair: Pair,
    described: Mapping[str, Mapping[str, Any]],
    displacement: Path,
    options: RegisterOptions,
) -> tuple[_Result, list[str]]:
    """Read both slides once and try until a map passes; return the best try, and all in words."""
    fixed, moving, mpp = _read_both(pair, described, options)
    size_px = min(max(fixed.shape[side], moving.shape[side]) for side in (0, 1))
    best: _Result | None = None
    attempts: list[str] = []
    for number in range(1 + options.retries):
        starved = best is not None and best.map.empty
        attempt = _next_try(number, options, size_px, starved)
        words = attempt.words(size_px)
        log.info(
            "pair %s: %s; slides of %d x %d and %d x %d px at %.3f um/px",
            pair.pair, words, fixed.shape[1], fixed.shape[0], moving.shape[1], moving.shape[0],
            mpp,
        )  # fmt: skip
        # A try goes on from the orientation that the one before found.
        mirrored = pair.mirrored if best is None else best.row["mirrored"]
        result = _try(pair, described, fixed, moving, mpp, mirrored, attempt, displacement, options)
        verdict = result.verdict
        words += f": {verdict.verdict}" + (f" ({verdict.reason})" if verdict.reason else "")
        attempts.append(words)
        log.info("pair %s: %s", pair.pair, words)
        if best is None or result.order < best.order:
            best = result
        if not verdict.retryable:
            break
    assert best is not None
    return best, attempts


class _OwnMapError(RegistrationError):
    """The user's displacement cannot be read: a verdict, unlike an engine that is missing."""


def _certify(
    pair: Pair,
    described: Mapping[str, Mapping[str, Any]],
    path: Path,
    options: RegisterOptions,
) -> _Result:
    """Judge a map that was made elsewhere, on the slides as the engine would see them."""
    try:
        own = read_displacement(path)
        if own.empty:
            raise RegistrationError(f"{path.name}: holds no map; name another in pairs.tsv")
        mirrored = own.affine.determinant < 0
    except RegistrationError as error:
        raise _OwnMapError(str(error)) from error
    fixed, moving, mpp = _read_both(pair, described, options)
    signals = _signals({"own": own}, described, fixed, moving, mpp, mirrored)["own"]
    verdict = judge(
        signals, options, match_count=None, match_fraction=None, matched=False,
        mirrored=mirrored,
    )  # fmt: skip
    row = {
        **_measured(signals),
        "map": "own",
        "mirrored": mirrored,
        "mirrored_by": "sheet" if mirrored and pair.mirrored else None,
        "displacement_mpp": own.mpp,
    }
    return _Result(own, verdict, signals.local, row)


def _try(
    pair: Pair,
    described: Mapping[str, Mapping[str, Any]],
    fixed: RGB,
    moving: RGB,
    mpp: float,
    mirrored: bool,
    attempt: _Try,
    displacement: Path,
    options: RegisterOptions,
) -> _Result:
    """Run the engine, once more mirrored where that matches better, and judge what it found.

    Args:
        pair: the pair.
        described: rows of `tables.DESCRIBE` by stain.
        fixed: (H, W, 3) H&E on the canvas.
        moving: (H, W, 3) HER2 as it is stored.
        mpp: um per pixel of both.
        mirrored: the orientation that is tried first.
        attempt: how.
        displacement: the output, beside which the engine works.
        options: settings.
    """
    factor = attempt.factor
    canvas = {"he": _reduce(fixed, factor), "her2": _reduce(moving, factor)}
    if attempt.tissue_only:
        for stain in tables.STAINS:
            canvas[stain] = _tissue_alone(canvas[stain], described[stain], mpp * factor)
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
        her2 = np.ascontiguousarray(canvas["her2"][:, ::-1]) if mirrored else canvas["her2"]
        with _work_folder(displacement) as folder:
            return deeperhistreg.register(
                canvas["he"],
                her2,
                fixed_mpp=mpp * factor,
                moving_mpp=mpp * factor,
                settings=settings,
                folder=folder,
            )

    started = time.monotonic()
    outcome = run(mirrored, settings)
    other = outcome.mirrored_match_count
    if other is not None and outcome.match_count is not None and other > outcome.match_count:
        log.info(
            "pair %s: HER2 matches better %s, %d against %d; so it is taken",
            pair.pair, "as it is stored" if mirrored else "mirrored", other, outcome.match_count,
        )  # fmt: skip
        other, mirrored = outcome.match_count, not mirrored
        left_s = max(1.0, options.timeout_s - (time.monotonic() - started))
        outcome = run(mirrored, dataclasses.replace(settings, probe=False, timeout_s=left_s))
    probe = None
    if other is not None and outcome.match_count:
        probe = outcome.match_count / max(other, 1)
    found = {
        "preset": attempt.preset,
        "size_px": min(max(canvas[k].shape[side] for k in canvas) for side in (0, 1)),
        "mirrored": mirrored,
        "mirrored_by": "probe" if mirrored != pair.mirrored else "sheet" if mirrored else None,
        "match_count": outcome.match_count,
        "match_fraction": outcome.match_fraction,
        "mirror_probe": probe,
    }
    if outcome.rigid is None:
        failed = Verdict("fail", outcome.reason, retryable=True)
        return _Result(fields.none(), failed, None, {**found, "map": "none"})
    maps = {"rigid": outcome.rigid}
    if outcome.nonrigid is not None:
        maps["nonrigid"] = outcome.nonrigid
    # What was mirrored is the image that was registered, up to the edge of its last pixel.
    width_um = canvas["her2"].shape[1] * mpp * factor
    for name, d in maps.items():
        coarse = _coarsened(d, TOLERANCE_PX * described["he"]["mpp"])
        maps[name] = fields.mirrored(coarse, width_um) if mirrored else coarse
    signals = _signals(maps, described, fixed, moving, mpp, mirrored)
    rigid_kept = "nonrigid" in maps and prefer_rigid(
        signals["nonrigid"], signals["rigid"], options.rigid_tolerance
    )
    kept = "rigid" if rigid_kept or "nonrigid" not in maps else "nonrigid"
    verdict = judge(
        signals[kept],
        options,
        match_count=outcome.match_count,
        match_fraction=outcome.match_fraction,
        mirror_probe=probe,
        rigid_kept=rigid_kept,
        mirrored=mirrored,
        contradicts_sheet=pair.mirrored and not mirrored,
    )
    affine = maps["rigid"].affine
    rigid = np.column_stack([affine.matrix, affine.offset_um]).ravel().tolist()
    row = {
        **found,
        **_measured(signals[kept]),
        "map": kept,
        "displacement_mpp": maps[kept].mpp,
        "rigid": rigid,
    }
    return _Result(maps[kept], verdict, signals[kept].local, row)


def _read_both(
    pair: Pair, described: Mapping[str, Mapping[str, Any]], options: RegisterOptions
) -> tuple[RGB, RGB, float]:
    """Read both slides at the resolution of the canvas, um per pixel."""
    he, her2 = described["he"], described["her2"]
    mpp = options.canvas_mpp((_size_um(he), _size_um(her2)), (he["mpp"], her2["mpp"]))
    return _read(pair.he, he, mpp), _read(pair.her2, her2, mpp), mpp


def _measured(signals: Signals) -> dict[str, Any]:
    """Return the signals that the certificate holds, by name."""
    return {
        name: getattr(signals, name) for name in tables.CERTIFICATE.names if hasattr(signals, name)
    }


def _signals(
    maps: Mapping[str, Displacement],
    described: Mapping[str, Mapping[str, Any]],
    fixed: RGB,
    moving: RGB,
    mpp: float,
    mirrored: bool,
) -> dict[str, Signals]:
    """Measure each map on the slides as they were read, whatever the engine was given."""
    factor = max(1, round(max(fixed.shape) / CERTIFICATE_SIDE_PX))
    small_fixed, small_moving = _reduce(fixed, factor), _reduce(moving, factor)
    return {
        name: measure(
            small_fixed,
            small_moving,
            d,
            fixed_mpp=mpp * factor,
            moving_mpp=mpp * factor,
            fixed_size_um=_size_um(described["he"]),
            moving_size_um=_size_um(described["her2"]),
            mirrored=mirrored,
        )
        for name, d in maps.items()
    }


def _coarsened(d: Displacement, tolerance_um: float) -> Displacement:
    coarse = fields.coarsen(d, tolerance_um, node_count_max=NODES_MAX)
    if coarse.mpp > d.mpp and d.vectors_um.size > 2 * NODES_MAX:
        log.warning(
            "displacement: %d x %d nodes are too many to keep; every %d-th is kept, and points "
            "move by more than %.3g um; lower register.size_px",
            d.vectors_um.shape[1], d.vectors_um.shape[0], round(coarse.mpp / d.mpp), tolerance_um,
        )  # fmt: skip
    return coarse


def _tissue_alone(rgb: RGB, described: Mapping[str, Any], mpp: float) -> RGB:
    """Make all white but the tissue that describe outlined, with some glass around it."""
    png = np.frombuffer(described["tissue"], np.uint8)
    outline = np.asarray(cv2.imdecode(png, cv2.IMREAD_GRAYSCALE))
    side = 2 * round(MASK_MARGIN * max(outline.shape)) + 1
    wide = cv2.dilate(outline, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)))
    # The outline covers the slide from edge to edge, the canvas up to its last whole pixel.
    height, width = (
        max(1, round(described[f"{name}_px"] * described["mpp"] / mpp))
        for name in ("height", "width")
    )
    inside = cv2.resize(wide, (width, height), interpolation=cv2.INTER_NEAREST) > 0
    result = np.full_like(rgb, 255)
    rows, columns = min(height, rgb.shape[0]), min(width, rgb.shape[1])
    part = inside[:rows, :columns]
    result[:rows, :columns][part] = rgb[:rows, :columns][part]
    return result


def _size_um(described: Mapping[str, Any]) -> tuple[float, float]:
    return (
        described["width_px"] * described["mpp"],
        described["height_px"] * described["mpp"],
    )


def _read(path: Path, described: Mapping[str, Any], mpp: float) -> RGB:
    """Read a whole slide at a resolution, its glass made white: (H, W, 3)."""
    with open_slide(
        path, mpp=described["mpp"], reader=described["reader"], mpp_min=0, mpp_max=math.inf
    ) as slide:
        if slide.size_px != (described["width_px"], described["height_px"]):
            raise SlideError(
                f"{path.name}: {slide.size_px[0]} x {slide.size_px[1]} px, and describe saw "
                f"{described['width_px']} x {described['height_px']}; run describe again"
            )
        width, height = (max(1, math.ceil(n * slide.mpp / mpp - 1e-6)) for n in slide.size_px)
        glass = tuple(described["background"] or slide.background)
        return _read_bands(slide, width, height, mpp, glass)


def _read_bands(slide: Slide, width: int, height: int, mpp: float, glass: tuple[int, ...]) -> RGB:
    # In bands: the next finer level of a slide may have sixteen times as many pixels.
    result = np.empty((height, width, 3), np.uint8)
    rows = max(16, 16_000_000 // (16 * width))
    white = np.stack(
        [np.clip(np.rint(np.arange(256) * 255 / max(value, 1)), 0, 255) for value in glass]
    ).astype(np.uint8)
    lost: list[tuple[int, SlideError]] = []
    for top in range(0, height, rows):
        count = min(rows, height - top)
        band = _read_band(slide, top, width, count, mpp, lost)
        if sum(area for area, _ in lost) > LOST_MAX * width * height:
            raise lost[0][1]
        # The engine pads with white and turns what it rotates in from outside to white: glass of
        # another colour would end in an edge, and edges are what it looks for.
        for channel in range(3):
            result[top : top + count, :, channel] = white[channel][band[..., channel]]
    return result


def _read_band(
    slide: Slide,
    top: int,
    width: int,
    count: int,
    mpp: float,
    lost: list[tuple[int, SlideError]],
) -> RGB:
    """Read rows of a slide; what cannot be decoded is glass and noted as (area, error)."""
    scale = mpp / slide.mpp
    try:
        return slide.read(0.0, top * scale, width, count, mpp)
    except SlideError:
        pass
    # A broken tile must not cost the pair: piece by piece, what can be read.
    band = np.empty((count, width, 3), np.uint8)
    band[:] = slide.background
    for y in range(0, count, PIECE_PX):
        for x in range(0, width, PIECE_PX):
            size = min(PIECE_PX, width - x), min(PIECE_PX, count - y)
            try:
                part = slide.read(x * scale, (top + y) * scale, *size, mpp)
            except SlideError as error:
                log.warning("%s; it is taken for glass", error)
                lost.append((size[0] * size[1], error))
                continue
            band[y : y + size[1], x : x + size[0]] = part
    return band


def _reduce(rgb: RGB, factor: int) -> RGB:
    """Average squares of `factor` pixels, after white is added right and below to whole squares."""
    if factor == 1:
        return rgb
    height, width = (-(-n // factor) for n in rgb.shape[:2])
    result = np.empty((height, width, 3), np.uint8)
    for row in range(height):
        band = np.full((factor, width * factor, 3), 255, np.uint8)
        rows = rgb[row * factor : (row + 1) * factor]
        band[: rows.shape[0], : rows.shape[1]] = rows
        mean = band.reshape(factor, width, factor, 3).mean(axis=(0, 2))
        result[row] = np.rint(mean).astype(np.uint8)
    return result


@contextlib.contextmanager
def _work_folder(displacement: Path) -> Iterator[Path]:
    """Give an empty folder beside the output; what a killed job left there before goes first."""
    folder = displacement.with_name(f".{displacement.stem}.engine")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
