"""Write the page about the data, before any training and also when nothing was accepted."""

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from hemera import tables
from hemera.config import ReportOptions
from hemera.dataset import statistics
from hemera.dataset.shards import read_member
from hemera.dataset.statistics import Frame
from hemera.files import layout
from hemera.imaging.codecs import decode, decode_mask
from hemera.registration.canvas import size_um
from hemera.registration.displacement_files import read_displacement
from hemera.registration.local_quality import LocalQuality
from hemera.reports import artefacts, data, filters, pictures, registration
from hemera.reports import tiles as galleries
from hemera.reports.evidence import evidence
from hemera.reports.html import write_page
from hemera.sheet import read_sheet, units

log = logging.getLogger(__name__)

REGISTRATION_BYTES = 10_000_000
ARTEFACT_BYTES = 1_000_000
PAIR_BYTES = 20_000_000


def run(
    *,
    sheet: Path,
    block_count: int,
    results: Path = Path(layout.RESULTS),
    preset: str,
    page: Path,
    pairs: Path,
    cases: Path,
    options: ReportOptions,
) -> None:
    """Write the page about the data, and the staining of each case.

    Args:
        page: HTML of at most 30 MB.
        pairs: folder with a page {pair}.html for each registered pair that is not on `page`.
        cases: table of the staining of each case and engine.
    """
    cohort = _read_cohort(sheet, block_count, results, preset)

    def read(row: Mapping[str, Any], name: str) -> npt.NDArray[np.uint8]:
        is_stain = name in tables.STAINS
        member = read_member(
            results / row["shard" if is_stain else f"{name}_shard"],
            int(row[f"{name}_offset"]),
            int(row[f"{name}_length"]),
        )
        return decode(member) if is_stain else decode_mask(member)

    rejections = statistics.rejections(cohort.tiles)
    compared = statistics.agreement(cohort.accepted, cohort.engines)
    staining = _staining(cohort, sheet, block_count, results)
    tables.write(cases, pa.Table.from_pandas(staining, tables.STAINING), tables.STAINING)
    errors = _landmark_errors(cohort, results)
    shown = filters.filters(cohort, rejections)
    content = {
        "title": f"HEMERA data report: {cohort.sheet}",
        **data.content(cohort, compared, staining, options.intense_fraction),
        **_registrations(
            errors, cohort, results, page, pairs, options.worst_pairs, shown["colors"]
        ),
        "errors": errors,
        "filters": shown,
        "artefacts": _artefacts(cohort, results),
        "biases": statistics.selection_bias(rejections),
        "comparable": sorted(set(statistics.comparable(rejections).index.get_level_values(0))),
        "quality": filters.quality(cohort),
        "evidence": evidence(cohort, read),
        "accepted": galleries.accepted(cohort, read, options.gallery_tiles),
        "rejected": galleries.rejected(cohort, read, options.gallery_tiles),
        "disputed": galleries.disputed(compared, cohort.engines, read),
    }
    content["lists"] = _write_lists(content, page, pairs)
    write_page(page, "report.html", content)
    log.info("%s: %.1f MB", page.name, page.stat().st_size / 1e6)


def _read_cohort(sheet: Path, block_count: int, results: Path, preset: str) -> data.Cohort:
    opened = read_sheet(sheet).with_her2
    found = units(opened, block_count)

    def paths(pattern: str) -> list[Path]:
        return [layout.path(pattern, results, unit=unit) for unit in found]

    index = layout.path(layout.INDEX, results)
    metadata = tables.read_metadata(index)
    schema = tables.index(json.loads(metadata["mask_engines"]))
    columns = [name for name in schema.names if not name.endswith("_sha256")]
    plain = [name for name in tables.DESCRIBE.names if name not in ("tissue", "thumbnail")]
    names = ["pair", "case", "dataset", "score", "verdict"]
    names += ["registered", "in_block", "has_landmarks"]
    pairs = [[getattr(pair, name) for name in names] for pair in opened.pairs]
    return data.Cohort(
        sheet=sheet.name,
        preset=preset,
        pairs=_named(pd.DataFrame(pairs, columns=names)),
        outcomes=_frame(paths(layout.PAIRS), tables.PAIRS),
        images=_frame(paths(layout.IMAGES_TABLE), tables.DESCRIBE, plain),
        tiles=_named(_frame([index], schema, columns)),
        metadata=metadata,
        notes=_frame(paths(layout.MASKS), tables.MASK, ["pair", "engine", "note"])
        .dropna()
        .drop_duplicates(),
    )


def _staining(cohort: data.Cohort, sheet: Path, block_count: int, results: Path) -> Frame:
    """Return the staining of the cases with accepted tiles, by every engine."""
    few = statistics.with_few_tiles(cohort.accepted)
    pairs, names = set(few["pair"]), set(few["tile"])
    columns = ["tile", "engine", "x_px", "y_px", "intensity", "membrane_od"]
    found = [tables.CELLS.empty_table().select(columns)]
    for unit, own in units(read_sheet(sheet).with_her2, block_count).items():
        if not pairs.isdisjoint(pair.pair for pair in own):
            path = layout.path(layout.CELLS, results, unit=unit)
            cells = tables.read(path, tables.CELLS, columns)
            found.append(cells.filter(pc.is_in(cells["tile"], pa.array(names, pa.string()))))
    cells = pa.concat_tables(found).to_pandas()
    parts = [statistics.case_staining(cohort.accepted, name, cells) for name in cohort.engines]
    return pd.concat(parts, ignore_index=True)


def _frame(paths: Iterable[Path], schema: pa.Schema, columns: Sequence[str] | None = None) -> Frame:
    return pa.concat_tables([tables.read(path, schema, columns) for path in paths]).to_pandas()


def _named(frame: Frame) -> Frame:
    """Name the score of pairs that have none; this name is sorted after the others."""
    return frame.assign(score=frame["score"].replace("", "unknown"))


def _certificates(cohort: data.Cohort, results: Path) -> list[dict[str, Any]]:
    """Return the certificates of the pairs, each with the options of register."""
    rows = []
    for pair in cohort.pairs["pair"][~cohort.pairs["registered"]]:
        path = layout.path(layout.CERTIFICATE, results, unit=pair)
        (row,) = tables.read(path, tables.CERTIFICATE).to_pylist()
        rows.append({**row, "options": json.loads(tables.read_metadata(path)["options"])})
    return rows


def _landmark_errors(cohort: data.Cohort, results: Path) -> list[dict[str, Any]]:
    """Return the rows of landmarks' table of the cohort, with errors in pixels too."""
    if not cohort.pairs["has_landmarks"].any():
        return []
    path = layout.path(layout.LANDMARK_COHORT, results)
    rows = tables.read(path, tables.LANDMARKS_COHORT).to_pandas().fillna({"dataset": "all"})
    he = cohort.images[cohort.images["stain"] == "he"].set_index("pair")["mpp"]
    for name in ("median", "p90"):
        rows[f"error_{name}_px"] = rows[f"error_{name}_um"] / rows["pair"].map(he)
    found: list[dict[str, Any]] = rows.to_dict("records")
    return found


def _registrations(
    errors: Sequence[Mapping[str, Any]],
    cohort: data.Cohort,
    results: Path,
    page: Path,
    folder: Path,
    worst: int,
    colors: Mapping[str, str],
) -> dict[str, Any]:
    """Write the pages of pairs beyond the worst; return the page's content on registrations.

    `colors` are those of the reasons of `filters`.
    """
    rows = _certificates(cohort, results)
    verdicts = cohort.pairs.set_index("pair")["verdict"]
    at_landmarks = {row["pair"]: row for row in errors if row["aggregation"] == "pair"}
    folder.mkdir(parents=True, exist_ok=True)
    album = pictures.Album(REGISTRATION_BYTES)
    shown: list[dict[str, Any]] = []
    lines: list[dict[str, Any]] = []
    ordered = sorted(rows, key=registration.worst_first)
    for row in tqdm(ordered, desc="report", unit="pair", disable=None):
        name = row["pair"]
        known = {"row": row, "manual": verdicts[name], "landmarks": at_landmarks.get(name),
                 "colors": colors}  # fmt: skip
        drawn = _pictures(row, cohort, results)
        own_page = folder / f"{name}.html"
        # In order: no pair is on the page when a worse one is not.
        fits = len(shown) == len(lines) < worst
        card = registration.card(row, *drawn, album) if fits else None
        if card is not None:
            shown.append(known | card)
            own_page.unlink(missing_ok=True)
            link = f"#pair-{name}"
        else:
            card = registration.card(row, *drawn, pictures.Album(PAIR_BYTES)) or {}
            content = {
                "title": f"HEMERA: registration of {name}",
                "cohort": cohort,
                "preset": cohort.preset,
                "report": _relative(page, own_page),
                "item": known | card,
            }
            write_page(own_page, "pair.html", content)
            link = _relative(own_page, page)
        lines.append({**known, "link": link})
    return {
        "registrations": shown,
        "registered": lines[: data.ROWS_MAX],
        "registered_all": lines,
        "registered_left": max(0, len(lines) - data.ROWS_MAX),
        "mirrored": registration.mirrored(rows),
        "pages": _relative(folder, page) if len(lines) > len(shown) else "",
    }


def _write_lists(content: Mapping[str, Any], page: Path, folder: Path) -> dict[str, str]:
    """Write the tables that are cut on the page, complete, on pages of their own.

    Returns:
        their paths from the page, by the name of the table. No pair has a name with a point.
    """
    links = {}
    tables_of = {"pairs": "All pairs", "registered": "All registered pairs"}
    for name, heading in tables_of.items():
        own_page = folder / f"{name}.list.html"
        own_page.unlink(missing_ok=True)
        if not content[f"{name}_left"]:
            continue
        lines = [
            {**line, "link": _relative(page, own_page) + line["link"]}
            if line["link"].startswith("#")
            else {**line, "link": _relative(page.parent / line["link"], own_page)}
            for line in content["registered_all"]
        ]
        listed = {
            "title": f"HEMERA: {heading.lower()} of {content['cohort'].sheet}",
            "heading": heading,
            "cohort": content["cohort"],
            "preset": content["preset"],
            "report": _relative(page, own_page),
            "registered": lines if name == "registered" else [],
            "pairs": content["pairs_all"],
            "images": content["images"],
        }
        write_page(own_page, "list.html", listed)
        links[name] = _relative(own_page, page)
    return links


def _artefacts(cohort: data.Cohort, results: Path) -> dict[str, Any]:
    """Return the page's content on artefacts, with pictures of the slides that have some."""
    found = artefacts.content(cohort)
    album = pictures.Album(ARTEFACT_BYTES)
    cards = []
    for name, *covered in found["slides"]:
        described = tables.described(layout.path(layout.IMAGES_TABLE, results, unit=name))[name]
        own = cohort.tiles[cohort.tiles["pair"] == name]
        drawn = album.take(artefacts.overview(described, own), artefacts.SIDE_PX)
        if drawn:
            cards.append({"pair": name, "covered": covered, "pictures": drawn})
    return {**found, "slides": cards}


def _pictures(
    row: Mapping[str, Any], cohort: data.Cohort, results: Path
) -> tuple[dict[str, npt.NDArray[np.uint8]], Frame | None, Frame | None]:
    """Return the pictures, local quality and tiles of a pair, as far as its images are readable."""
    images_table, displacement, quality = (
        layout.path(pattern, results, unit=row["pair"])
        for pattern in (layout.IMAGES_TABLE, layout.DISPLACEMENT, layout.QUALITY)
    )
    described = tables.described(images_table)[row["pair"]]
    squares = LocalQuality.from_columns(tables.read(quality, tables.QUALITY).to_pydict())
    thumbnails = {
        stain: decode(described[stain]["thumbnail"])
        for stain in tables.STAINS
        if described[stain]["thumbnail"] is not None
    }
    if set(thumbnails) != set(tables.STAINS):
        return thumbnails, None, None
    he_um, her2_um = (size_um(described[stain]) for stain in tables.STAINS)
    images = registration.views(
        thumbnails["he"],
        thumbnails["her2"],
        he_um,
        her2_um,
        tuple(described["her2"]["background"] or (255, 255, 255)),
        read_displacement(displacement),
        # Where the rigid displacement was kept, it is the final one.
        row["rigid"] if row["map"] == "nonrigid" else None,
    )
    size_px = images["he"].shape[1::-1]
    tiles = cohort.tiles[cohort.tiles["pair"] == row["pair"]]
    return (
        images,
        registration.local_squares(squares, he_um, size_px),
        registration.tile_squares(tiles, he_um, size_px),
    )


def _relative(path: Path, page: Path) -> str:
    return Path(os.path.relpath(path, page.parent)).as_posix()
