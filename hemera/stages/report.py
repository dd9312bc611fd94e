"""Write the page about the data, before any training and also when nothing was accepted."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tqdm import tqdm

from hemera import tables
from hemera.config import ReportOptions
from hemera.dataset import statistics
from hemera.dataset.shards import read_member
from hemera.errors import ShardError, TableError
from hemera.files import layout
from hemera.imaging.codecs import decode, decode_mask
from hemera.registration.canvas import size_um
from hemera.registration.displacement_files import read_displacement
from hemera.registration.local_quality import LocalQuality
from hemera.reports import data, filters, pictures, registration
from hemera.reports import tiles as galleries
from hemera.reports.html import write_page
from hemera.sheet import read_sheet

log = logging.getLogger(__name__)

PATTERNS = {
    "certificate": layout.CERTIFICATE,
    "displacement": layout.DISPLACEMENT,
    "quality": layout.QUALITY,
    "images": layout.IMAGES_TABLE,
}
"""Files of a registered pair."""

REGISTRATION_BYTES = 11_000_000
PAIR_BYTES = 20_000_000
"""Of a pair's own page: more than its pictures need."""


def run(
    *,
    sheet: Path,
    preset: str,
    images_tables: tuple[Path, ...],
    certificates: tuple[Path, ...] = (),
    displacements: tuple[Path, ...] = (),
    qualities: tuple[Path, ...] = (),
    landmarks: Path | None = None,
    tile_shards: tuple[Path, ...],
    pair_tables: tuple[Path, ...],
    mask_shards: tuple[Path, ...],
    funnel: Path,
    index: Path,
    page: Path,
    pairs: Path,
    options: ReportOptions,
) -> None:
    """Write the page from tables and thumbnails; pixels are read only of the tiles shown.

    Args:
        sheet: the sheet of pairs.
        preset: preset of the cohort; ``demo`` puts a banner on the page.
        images_tables: describe's tables of all units.
        certificates: register's tables of the pairs registered here.
        displacements: their displacements.
        qualities: their tables of local quality.
        landmarks: landmarks' table of the cohort; None: no pair has landmarks.
        tile_shards: tile's shards of all units.
        pair_tables: tile's tables of pairs of all units.
        mask_shards: mask's shards of all units.
        funnel: filter's counts.
        index: the index.
        page: the page, HTML of at most 30 MB; written last.
        pairs: folder of a page ``{pair}.html`` for each registered pair beyond those on the page.
        options: sizes of the galleries.

    Raises:
        SheetError: when the sheet cannot be used.
        TableError: when a table is missing or of another version.
        ShardError: when a shard does not contain what the index names.
        RegistrationError: when a displacement cannot be read.
    """
    cohort = _read_cohort(sheet, preset, images_tables, certificates, pair_tables, funnel, index)
    registered = _pair_files(
        certificate=certificates,
        displacement=displacements,
        quality=qualities,
        images=images_tables,
    )
    errors = _landmark_errors(landmarks, cohort)
    shards = {layout.member(path): path for path in (*tile_shards, *mask_shards)}

    def read(row: Mapping[str, Any], name: str) -> npt.NDArray[np.uint8]:
        return _read_tile(shards, row, name)

    rejections = statistics.rejections(cohort.funnel)
    biases = statistics.selection_bias(rejections)
    agreement = data.agreement(
        statistics.agreement(cohort.accepted, cohort.engines), cohort.engines
    )
    rows = [row for paths in registered.values() for row in _certificates(paths["certificate"])]
    drawn = options.gallery_tiles, options.seed
    content = {
        "title": f"HEMERA data report: {cohort.sheet}",
        "preset": preset,
        "sheet": cohort.sheet,
        "headline": data.headline(cohort),
        "warnings": [*data.warnings(cohort, biases, agreement), *registration.warnings(rows)],
        "pairs": data.pair_table(cohort),
        **_registrations(rows, registered, errors, cohort, page, pairs, options.worst_pairs),
        "landmarks": [row for row in errors if row["aggregation"] == "pair" and row["points"]],
        "cohort_errors": [row for row in errors if row["aggregation"] != "pair"],
        "filters": filters.filters(cohort, rejections),
        "biases": [data.bias_words(bias) for bias in biases],
        "quality": filters.quality(cohort),
        "accepted": galleries.accepted(cohort, read, *drawn),
        "rejected": galleries.rejected(cohort, read, *drawn),
        "masks": data.masks(cohort),
        "agreement": agreement,
        "disputed": galleries.disputed(agreement, read),
        "confusions": data.confusions(cohort, options.intense_share),
        "intense_fraction": options.intense_share,
        "splits": data.splits(cohort),
        "provenance": data.provenance(cohort),
        "target": cohort.metadata.get("mask_target", ""),
    }
    write_page(page, "report.html", content)
    log.info("%s: %.1f MB", page.name, page.stat().st_size / 1e6)


def _read_cohort(
    sheet: Path,
    preset: str,
    images_tables: Sequence[Path],
    certificates: Sequence[Path],
    pair_tables: Sequence[Path],
    funnel: Path,
    index: Path,
) -> data.Cohort:
    metadata = tables.read_metadata(index)
    for stage, paths in (("describe", images_tables), ("register", certificates)):
        for path in paths[:1]:
            own = tables.read_metadata(path).get("options", "{}")
            metadata = {f"options_{stage}": own, **metadata}
    schema = tables.index(json.loads(metadata.get("mask_engines", "[]")))
    columns = [name for name in schema.names if not name.endswith("_sha256")]
    plain = [name for name in tables.DESCRIBE.names if name not in ("tissue", "thumbnail")]
    return data.Cohort(
        sheet=sheet.name,
        preset=preset,
        pairs=read_sheet(sheet).pairs,
        outcomes=_frame(pair_tables, tables.PAIRS),
        images=_frame(images_tables, tables.DESCRIBE, plain),
        funnel=_frame([funnel], tables.FUNNEL),
        tiles=_frame([index], schema, columns),
        metadata=metadata,
    )


def _frame(
    paths: Iterable[Path], schema: pa.Schema, columns: Sequence[str] | None = None
) -> statistics.Frame:
    return pa.concat_tables([tables.read(path, schema, columns) for path in paths]).to_pandas()


def _pair_files(**given: Sequence[Path]) -> dict[str, dict[str, Path]]:
    """Return the files of each pair registered here, by the names of the arguments."""
    files = {
        name: {layout.unit(path, PATTERNS[name]): path for path in paths}
        for name, paths in given.items()
    }
    for unit, path in files["certificate"].items():
        if not all(unit in own for own in files.values()):
            raise TableError(f"{path}: give displacement, quality and images table of {unit} too")
    return {unit: {name: own[unit] for name, own in files.items()} for unit in files["certificate"]}


def _certificates(path: Path) -> list[dict[str, Any]]:
    options = json.loads(tables.read_metadata(path).get("options", "{}"))
    rows = tables.read(path, tables.CERTIFICATE).to_pylist()
    return [{**row, "options": options} for row in rows]


def _landmark_errors(path: Path | None, cohort: data.Cohort) -> list[dict[str, Any]]:
    """Return the rows of landmarks' table with errors in pixels; one data set is shown once."""
    if path is None:
        return []
    rows = tables.read(path, tables.LANDMARKS_COHORT).to_pylist()
    single = len({row["dataset"] for row in rows if row["dataset"]}) == 1
    he = cohort.images[cohort.images["stain"] == "he"].set_index("pair")["mpp"]
    return [
        registration.in_pixels(row, he.get(row["pair"]))
        for row in rows
        if row["aggregation"] == "pair" or row["dataset"] is None or not single
    ]


def _read_tile(
    shards: Mapping[str, Path], row: Mapping[str, Any], name: str
) -> npt.NDArray[np.uint8]:
    """Return a stain of a tile (a row of the index), or the label image of an engine."""
    shard = row["shard" if name in tables.STAINS else f"{name}_shard"]
    if shard not in shards:
        raise ShardError(f"{shard}: the index names it, and it is not given; run index again")
    read = decode if name in tables.STAINS else decode_mask
    member = read_member(shards[shard], int(row[f"{name}_offset"]), int(row[f"{name}_length"]))
    return read(member)


def _registrations(
    rows: Sequence[Mapping[str, Any]],
    files: Mapping[str, Mapping[str, Path]],
    errors: Sequence[Mapping[str, Any]],
    cohort: data.Cohort,
    page: Path,
    folder: Path,
    worst: int,
) -> dict[str, Any]:
    """Write the pages of pairs beyond the worst; return the page's content on registrations."""
    manual = {pair.pair: pair.verdict for pair in cohort.pairs}
    at_landmarks = {row["pair"]: row for row in errors if row["aggregation"] == "pair"}
    folder.mkdir(parents=True, exist_ok=True)
    album = pictures.Album(REGISTRATION_BYTES)
    shown: list[dict[str, Any]] = []
    lines: list[dict[str, Any]] = []
    ordered = sorted(rows, key=registration.worst_first)
    for row in tqdm(ordered, desc="report", unit="pair", disable=None):
        name = row["pair"]
        known = {"row": row, "manual": manual[name], "landmarks": at_landmarks.get(name)}
        images, local = _pictures(row, files[name])
        card = {**known, **registration.card(row, images, local)}
        own_page = folder / f"{name}.html"
        # In order: no pair is on the page when a worse one is not.
        on_page = len(shown) == len(lines) < worst and registration.embed(card, images, album)
        if on_page:
            shown.append(card)
            own_page.unlink(missing_ok=True)
        else:
            registration.embed(card, images, pictures.Album(PAIR_BYTES))
            content = {
                "title": f"HEMERA: registration of {name}",
                "preset": cohort.preset,
                "sheet": cohort.sheet,
                "report": _relative(page, own_page),
                "item": card,
            }
            write_page(own_page, "pair.html", content)
        lines.append({**known, "link": f"#pair-{name}" if on_page else _relative(own_page, page)})
    return {
        "registrations": shown,
        "registered": lines[: data.ROWS_MAX],
        "registered_more": max(0, len(lines) - data.ROWS_MAX),
        "pages": _relative(folder, page) if len(lines) > len(shown) else "",
    }


def _pictures(
    row: Mapping[str, Any], files: Mapping[str, Path]
) -> tuple[dict[str, npt.NDArray[np.uint8]], dict[str, Any] | None]:
    """Return the pictures of a pair and its local quality, as far as its images could be read."""
    described = tables.described(files["images"])[row["pair"]]
    displacement = read_displacement(files["displacement"])
    squares = LocalQuality.from_columns(tables.read(files["quality"], tables.QUALITY).to_pydict())
    thumbnails = {
        stain: decode(described[stain]["thumbnail"])
        for stain in tables.STAINS
        if stain in described and described[stain]["thumbnail"] is not None
    }
    if set(thumbnails) != set(tables.STAINS):
        return thumbnails, None
    he_um, her2_um = (size_um(described[stain]) for stain in tables.STAINS)
    images = registration.views(
        thumbnails["he"],
        thumbnails["her2"],
        he_um,
        her2_um,
        tuple(described["her2"]["background"] or (255, 255, 255)),
        displacement,
        # Where the rigid displacement was kept, it is the final one.
        row["rigid"] if row["map"] == "nonrigid" else None,
    )
    local = registration.local_map(squares, he_um, images["he"].shape[1::-1])
    return images, local


def _relative(path: Path, page: Path) -> str:
    return Path(os.path.relpath(path, page.parent)).as_posix()
