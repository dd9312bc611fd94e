"""Describe every image of a unit before anything expensive starts: size, resolution, tissue."""

import dataclasses
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from hemera import tables
from hemera.config import DescribeOptions
from hemera.errors import SlideError
from hemera.files.digests import content_digest
from hemera.imaging.artefact_files import read_artefacts
from hemera.imaging.artefacts import find_artefacts, resized, typical_density
from hemera.imaging.background import BRIGHTEST_MIN
from hemera.imaging.codecs import encode
from hemera.imaging.color import Color
from hemera.imaging.identity import OVERVIEW_PX, Identity, contradictions, identify
from hemera.imaging.slide import open_slide
from hemera.imaging.tissue import find_tissue
from hemera.registration.alignment import Structure, match_in_place, match_others, structure
from hemera.sheet import Pair, read_sheet, unit_pairs

log = logging.getLogger(__name__)


def run(
    *,
    sheet: Path,
    unit: str,
    block_count: int,
    images_table: Path,
    options: DescribeOptions,
) -> None:
    """Describe the images of every pair of a unit: size, resolution, tissue, stain.

    An image whose content cannot be used is a row with its reason, never an error.

    Raises:
        InputFileError: when an image is missing, unless `allow_missing`, or lost while it is read.
    """
    rows: list[dict[str, Any]] = []
    structures: dict[str, tuple[Structure, Structure]] = {}
    for pair in unit_pairs(read_sheet(sheet), unit, block_count):
        stains = dict(zip(tables.STAINS, pair.images, strict=False))
        he, *others = (_describe(pair, stain, path, options) for stain, path in stains.items())
        her2 = others[0] if others else None
        faults = {}
        if he.identity is not None and (her2 is None or her2.identity is not None):
            other = None if her2 is None else her2.identity
            faults = contradictions(he.identity, other, registered=pair.registered)
        for row in (he.row, *(image.row for image in others)):
            verdict, reason = faults.get(row["stain"], (None, None))
            if verdict is not None and row["verdict"] == "accept":
                row |= {"verdict": verdict, "reason": reason}
            if row["verdict"] != "accept":
                log.warning("pair %s, %s: %s", pair.pair, row["stain"], row["reason"])
            rows.append(row)
        refused = any(image.row["verdict"] != "accept" for image in (he, *others))
        if her2 and he.structure is not None and her2.structure is not None and not refused:
            structures[pair.pair] = he.structure, her2.structure
    _add_alignment(rows, structures)
    tables.write(images_table, rows, tables.DESCRIBE, tables.provenance(options))


def _add_alignment(
    rows: list[dict[str, Any]], structures: Mapping[str, tuple[Structure, Structure]]
) -> None:
    """Add to the rows of HER2 how well the images of pairs that come registered match in place."""
    others = match_others(structures)
    for row in rows:
        found = None
        if row["stain"] == "her2" and row["pair"] in structures:
            found = match_in_place(*structures[row["pair"]])
        if found is None:
            continue
        row["alignment_ncc"], row["alignment_margin"] = found
        row["alignment_others"] = others.get(row["pair"])
        if found[1] <= 0 and row["verdict"] == "accept":
            log.warning(
                "pair %s: registered in the sheet, but its structure matches as well elsewhere "
                "(correlation %.2f in place, %.2f shifted): the alignment is not measurable, or "
                "HER2 is of another place", row["pair"], found[0], found[0] - found[1],
            )  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class _Image:
    """The row of an image, what it shows, and its structure where the pair comes registered."""

    row: dict[str, Any]
    identity: Identity | None = None
    structure: Structure | None = None


def _describe(pair: Pair, stain: str, path: Path, options: DescribeOptions) -> _Image:
    """Describe one image; that of an unusable image has the reason."""
    mpp = pair.he_mpp if stain == "he" else pair.her2_mpp
    row: dict[str, Any] = dict.fromkeys(tables.DESCRIBE.names)
    row |= {"pair": pair.pair, "stain": stain, "file": path.name, "verdict": "accept"}
    if options.allow_missing and not path.exists():
        reason = f"{path.name}: no such file; left out by describe.allow_missing"
        return _Image(row | {"verdict": "refuse", "reason": reason})
    if path.is_file():
        row["content_digest"] = content_digest(path, options.digest == "whole")
    try:
        with open_slide(path, mpp=mpp, reader=options.reader, mpp_column=f"{stain}_mpp") as slide:
            width, height = slide.size_px
            row |= {
                "reader": slide.reader,
                "vendor": slide.vendor,
                "width_px": width,
                "height_px": height,
                "level_count": len(slide.level_mpps),
                "mpp": slide.mpp,
                "mpp_source": slide.mpp_source,
            }
            view, (mpp_x, mpp_y) = slide.overview(mpp=options.tissue_mpp)
            found = slide.measured_background
            identity = identify(slide, view)
            filled = slide.filled(view.shape[:2])
            if filled is not None:
                view[filled] = max(found.color)
            tissue, threshold = find_tissue(
                view, stain, slide.background, math.sqrt(mpp_x * mpp_y), options
            )
            fraction = float(tissue.mean())
            row |= {
                "digest": identity.digest,
                "stain_found": identity.stain,
                "background": list(found.color),
                "background_measured": found.measured,
                "fill": [value for color in found.fill for value in color] or None,
                "tissue_threshold": threshold,
                "tissue_fraction": fraction,
                "tissue_area_um2": fraction * width * height * slide.mpp**2,
                "tissue_mpp": mpp_x,
                "tissue": cv2.imencode(".png", tissue.astype(np.uint8) * 255)[1].tobytes(),
            }
            given = pair.he_artefacts if stain == "he" else pair.her2_artefacts
            kinds = None
            if given is not None:
                kinds = read_artefacts(given, slide.size_px, tissue, f"{stain}_artefacts")
            row |= _artefacts(view, math.sqrt(mpp_x * mpp_y), slide.background, tissue, kinds)
            shown = None
            if pair.registered:
                small, (small_mpp, _) = slide.overview(side_px=OVERVIEW_PX)
                if pair.mirrored and stain == "her2":
                    small = np.ascontiguousarray(small[:, ::-1])
                shown = structure(small, small_mpp, slide.background)
            if not pair.in_block:
                # A report shows registrations on it; the pairs of a block are not registered.
                thumbnail, (thumbnail_mpp, _) = slide.overview(side_px=OVERVIEW_PX)
                row |= {"thumbnail": encode(thumbnail, "jpeg", 85), "thumbnail_mpp": thumbnail_mpp}
    except SlideError as error:
        return _Image(row | {"verdict": "refuse", "reason": str(error)})
    if max(found.color) < BRIGHTEST_MIN:
        reason = (
            f"{path.name}: its brightest places are RGB {found.color}; the background of a "
            f"bright-field image has at least {BRIGHTEST_MIN} in one channel: scan it again, or "
            "leave it out"
        )
        row |= {"verdict": "refuse", "reason": reason}
    elif not fraction and stain == "he":
        row |= {"verdict": "refuse", "reason": f"{path.name}: no tissue found on it"}
    elif not fraction:
        # Unstained tissue may be invisible on IHC, but not on H&E.
        log.warning("pair %s, her2: no tissue found; the outline of H&E is used", pair.pair)
    return _Image(row, identity, shown)


def _artefacts(
    view: npt.NDArray[np.uint8],
    mpp: float,
    background: Color,
    tissue: npt.NDArray[np.bool_],
    kinds: npt.NDArray[np.uint8] | None,
) -> dict[str, Any]:
    """Return the columns of DESCRIBE about artefacts on an overview; `kinds`: as given, or None."""
    typical = typical_density(view, background)
    row: dict[str, Any] = {"tissue_density": typical if math.isfinite(typical) else None}
    if kinds is None:
        kinds = find_artefacts(view, mpp, background, typical)
    if kinds is None or not kinds.any():
        return row | {"artefact_fraction": 0.0}
    kinds = resized(kinds, view.shape[:2])
    covered = float((kinds > 0)[tissue].mean()) if tissue.any() else 0.0
    stored = cv2.imencode(".png", kinds)[1].tobytes()
    return row | {"artefact_fraction": covered, "artefacts": stored}
