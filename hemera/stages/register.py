"""Register the HER2 slide onto the H&E slide, and certify the map or say why there is none."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hemera import certificate as certificates
from hemera import displacement as fields
from hemera import tables
from hemera.config import RegisterOptions
from hemera.displacement import Displacement
from hemera.engines import deeperhistreg
from hemera.errors import SheetError, SlideError
from hemera.files import write_displacement
from hemera.sheet import Pair, read_sheet
from hemera.slides import Slide, open_slide

log = logging.getLogger(__name__)

RGB = npt.NDArray[np.uint8]

CERTIFICATE_SIDE_PX = 1000
"""About the longest side of the images that the certificate is measured on."""

TOLERANCE_PX = 0.05
"""The map is kept on a coarser grid where that moves no point by more, in H&E pixels."""

NODES_MAX = 24_000_000
"""A finer grid than this is never kept: 100 MB on disk."""


def run(
    *,
    sheet: Path,
    unit: str,
    images_table: Path,
    displacement: Path,
    certificate: Path,
    options: RegisterOptions,
) -> None:
    """Register one pair of whole slides.

    A pair that cannot be registered, or whose map is wrong, is a certificate with verdict ``fail``
    and its reason, never an error. A person's verdict in the sheet is not applied here.

    Args:
        sheet: the sheet of pairs.
        unit: the pair.
        images_table: table `tables.DESCRIBE` of the unit.
        displacement: the map from H&E to HER2 as the slides are stored, um; empty where there is
            none. A failed map is written all the same, because a person may overrule.
        certificate: table `tables.CERTIFICATE`, one row.
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
        "engine": "deeperhistreg",
        "engine_version": deeperhistreg.version(),
        "preset": options.preset,
        "map": "none",
    }
    found = fields.none()
    reason = _refusal(described)
    if reason is None:
        try:
            found, result = _register(pair, described, displacement, options)
            row |= result
        except SlideError as error:
            reason = str(error)
    if reason is not None:
        row["reason"] = reason
    level = logging.INFO if row["verdict"] == "pass" else logging.WARNING
    log.log(
        level, "pair %s: %s%s", pair.pair, row["verdict"],
        f" ({row['reason']})" if row["reason"] else "",
    )  # fmt: skip
    write_displacement(displacement, found)
    tables.write(certificate, [row], tables.CERTIFICATE, tables.provenance(options))


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


def _register(
    pair: Pair,
    described: Mapping[str, Mapping[str, Any]],
    displacement: Path,
    options: RegisterOptions,
) -> tuple[Displacement, dict[str, Any]]:
    """Read both slides once, run the engine, and judge what it found."""
    he, her2 = described["he"], described["her2"]
    he_um = he["width_px"] * he["mpp"], he["height_px"] * he["mpp"]
    her2_um = her2["width_px"] * her2["mpp"], her2["height_px"] * her2["mpp"]
    size_px = options.size_px or deeperhistreg.SIZES_PX[options.preset]
    # The canvas holds both slides. Neither is read finer than it is: that would only cost.
    short_um = min(max(he_um[0], her2_um[0]), max(he_um[1], her2_um[1]))
    mpp = max(short_um / size_px, he["mpp"], her2["mpp"])
    fixed = _read(pair.he, he, mpp)
    moving = _read(pair.her2, her2, mpp)
    log.info(
        "pair %s: %d x %d and %d x %d px at %.3f um/px to %s",
        pair.pair, fixed.shape[1], fixed.shape[0], moving.shape[1], moving.shape[0], mpp,
        options.preset,
    )  # fmt: skip
    with _work_folder(displacement) as folder:
        outcome = deeperhistreg.register(
            fixed,
            np.ascontiguousarray(moving[:, ::-1]) if pair.mirrored else moving,
            fixed_mpp=mpp,
            moving_mpp=mpp,
            settings=deeperhistreg.Settings(
                preset=options.preset,
                levels=options.levels,
                iterations=options.iterations,
                device=options.device,
                torch_threads=options.torch_threads,
                timeout_s=options.timeout_s,
            ),
            folder=folder,
        )
    found = {"match_count": outcome.match_count, "match_fraction": outcome.match_fraction}
    if outcome.nonrigid is None or outcome.rigid is None:
        return fields.none(), {**found, "reason": outcome.reason}
    maps = {"nonrigid": outcome.nonrigid, "rigid": outcome.rigid}
    # What was mirrored is the image that was read, up to the edge of its last pixel.
    width_um = moving.shape[1] * mpp
    tolerance_um = TOLERANCE_PX * he["mpp"]
    for name, d in maps.items():
        coarse = fields.coarsen(d, tolerance_um, node_count_max=NODES_MAX)
        maps[name] = fields.mirrored(coarse, width_um) if pair.mirrored else coarse
    factor = max(1, round(max(fixed.shape) / CERTIFICATE_SIDE_PX))
    small_fixed, small_moving = _reduce(fixed, factor), _reduce(moving, factor)
    signals = {
        name: certificates.measure(
            small_fixed,
            small_moving,
            d,
            fixed_mpp=mpp * factor,
            moving_mpp=mpp * factor,
            fixed_size_um=he_um,
            moving_size_um=her2_um,
            mirrored=pair.mirrored,
        )
        for name, d in maps.items()
    }
    rigid_kept = certificates.prefer_rigid(
        signals["nonrigid"], signals["rigid"], options.rigid_tolerance
    )
    kept = "rigid" if rigid_kept else "nonrigid"
    verdict, reason = certificates.judge(
        signals[kept],
        _limits(options),
        match_count=outcome.match_count,
        match_fraction=outcome.match_fraction,
        rigid_kept=rigid_kept,
        mirrored=pair.mirrored,
    )
    measured = {
        name: getattr(signals[kept], name)
        for name in tables.CERTIFICATE.names
        if hasattr(signals[kept], name)
    }
    return maps[kept], {
        **found,
        **measured,
        "verdict": verdict,
        "reason": reason,
        "map": kept,
        "displacement_mpp": maps[kept].mpp,
    }


def _limits(options: RegisterOptions) -> certificates.Limits:
    names = [field.name for field in dataclasses.fields(certificates.Limits)]
    return certificates.Limits(**{name: getattr(options, name) for name in names})


def _read(path: Path, described: Mapping[str, Any], mpp: float) -> RGB:
    """Read a whole slide at a resolution, its glass made white: (H, W, 3)."""
    with open_slide(path, mpp=described["mpp"], mpp_min=0, mpp_max=math.inf) as slide:
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
    for top in range(0, height, rows):
        count = min(rows, height - top)
        band = slide.read(0.0, top * mpp / slide.mpp, width, count, mpp)
        # The engine pads with white and turns what it rotates in from outside to white: glass of
        # another colour would end in an edge, and edges are what it looks for.
        for channel in range(3):
            result[top : top + count, :, channel] = white[channel][band[..., channel]]
    return result


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
