"""Write the page about the data, before any training and also when nothing was accepted."""

from __future__ import annotations

import collections
import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hemera import tables
from hemera.config import ReportOptions
from hemera.files import read_displacement
from hemera.pages import charts, data, pictures, registration
from hemera.pages.html import fixed, number, percent, write_page
from hemera.pixels import histogram_similarity
from hemera.shards import decode, decode_mask, read_member
from hemera.sheet import Pair, read_sheet, units

log = logging.getLogger(__name__)

REGISTRATION_BYTES = 9_000_000
GALLERY_BYTES = 8_000_000
"""For each of both galleries. With the tables, which are cut as well, that is below 30 MB."""
TILE_SIDE_PX = 400
SIMILARITY_TILES = 200


def run(
    *,
    sheet: Path,
    block_count: int,
    preset: str,
    results: Path,
    page: Path,
    options: ReportOptions,
) -> None:
    """Write the page from tables and thumbnails; pixels are read of the tiles shown, no more.

    Args:
        sheet: the sheet of pairs.
        block_count: blocks that image pairs are cut into.
        preset: preset of the cohort; ``demo`` puts a banner on the page.
        results: folder that holds the folders of all stages up to index.
        page: the page, HTML of at most 30 MB.
        options: sizes of the galleries.

    Raises:
        SheetError: when the sheet cannot be used.
        TableError: when a table is missing or of another version.
        ShardError: when a shard does not hold what the index says.
    """
    pairs = read_sheet(sheet)
    by_unit = units(pairs, block_count)
    cohort = _read_cohort(sheet, preset, pairs.pairs, by_unit, results)
    funnel = data.funnel(cohort)
    kept, kept_note = _kept(cohort, results, options)
    dropped, dropped_note = _dropped(cohort, results, options)
    shown, more, landmarks = _registrations(cohort, by_unit, results, options)
    content = {
        "title": f"HEMERA: the data of {cohort.sheet}",
        "preset": preset,
        "sheet": cohort.sheet,
        "headline": data.headline(cohort),
        "warnings": data.warnings(cohort, funnel["leans"]),
        "outcomes": data.outcomes(cohort),
        "registrations": shown,
        "registrations_more": more,
        "landmarks": landmarks,
        "funnel": funnel,
        "quality": data.quality(cohort),
        "similarity": _similarity(cohort, results, options),
        "kept": kept,
        "kept_note": kept_note,
        "dropped": dropped,
        "dropped_note": dropped_note,
        "masks": data.mask_statistics(cohort),
        "agreement": data.agreement(cohort),
        "splits": data.splits(cohort),
        "provenance": data.provenance(cohort),
        "target": cohort.metadata.get("mask_target", ""),
    }
    write_page(page, "report.html", content)
    log.info("%s: %.1f MB", page.name, page.stat().st_size / 1e6)


def _read_cohort(
    sheet: Path,
    preset: str,
    pairs: tuple[Pair, ...],
    by_unit: Mapping[str, tuple[Pair, ...]],
    results: Path,
) -> data.Cohort:
    index = results / "index" / "index.parquet"
    metadata = tables.read_metadata(index) if index.is_file() else {}
    for stage, wanted in (("describe", by_unit), ("register", _registered_here(by_unit))):
        first = next((results / stage / f"{unit}.parquet" for unit in wanted), None)
        if first is not None and first.is_file():
            own = tables.read_metadata(first).get("options", "{}")
            metadata = {f"options_{stage}": own, **metadata}
    engines = json.loads(metadata.get("mask_engines", "[]"))
    schema = tables.index(engines)
    columns = [name for name in schema.names if not name.endswith("_sha256")]
    plain = [name for name in tables.DESCRIBE.names if name not in ("tissue", "thumbnail")]
    return data.Cohort(
        sheet=sheet.name,
        preset=preset,
        pairs=pairs,
        outcomes=_concat(
            (results / "tile" / f"{unit}.pairs.parquet" for unit in by_unit), tables.PAIRS
        ),
        images=_concat(
            (results / "describe" / f"{unit}.parquet" for unit in by_unit), tables.DESCRIBE, plain
        ),
        funnel=tables.read(results / "filter" / "funnel.parquet", tables.FUNNEL),
        index=tables.read(index, schema, columns),
        metadata=metadata,
    )


def _registered_here(by_unit: Mapping[str, tuple[Pair, ...]]) -> list[str]:
    """Return the units that register worked on."""
    return [unit for unit, pairs in by_unit.items() if not any(pair.registered for pair in pairs)]


def _concat(
    paths: Iterable[Path], schema: pa.Schema, columns: Sequence[str] | None = None
) -> pa.Table:
    return pa.concat_tables([tables.read(path, schema, columns) for path in paths])


# --- registration --------------------------------------------------------------------------------


def _registrations(
    cohort: data.Cohort,
    by_unit: Mapping[str, tuple[Pair, ...]],
    results: Path,
    options: ReportOptions,
) -> tuple[list[dict[str, Any]], int, list[dict[str, Any]]]:
    """Return the pairs shown, worst first, how many more there are, and all landmark errors."""
    certificates: list[tuple[dict[str, Any], str]] = []
    for unit in _registered_here(by_unit):
        table = tables.read(results / "register" / f"{unit}.parquet", tables.CERTIFICATE)
        certificates += [(row, unit) for row in table.to_pylist()]
    by_name = {pair.pair: pair for pair in cohort.pairs}
    mpp = {row["pair"]: row["mpp"] for row in cohort.images.to_pylist() if row["stain"] == "he"}
    errors = {}
    for unit, pairs in by_unit.items():
        for pair in pairs:
            if pair.landmarks and not pair.in_block:
                table = tables.read(results / "landmarks" / f"{unit}.parquet", tables.LANDMARKS)
                error = registration.landmark_errors(table.to_pylist(), mpp.get(pair.pair))
                if error:
                    errors[pair.pair] = error
    order = {"fail": 0, "review": 1, "pass": 2}
    certificates.sort(
        key=lambda item: (
            order.get(item[0]["verdict"], 3),
            -1.0 if item[0]["tile_ok"] is None else item[0]["tile_ok"],
            item[0]["pair"],
        )
    )
    album = pictures.Album(REGISTRATION_BYTES)
    shown = []
    for row, unit in certificates[: options.worst_pairs]:
        settings = tables.read_metadata(results / "register" / f"{unit}.parquet").get("options")
        shown.append(
            {
                "row": row,
                "person": by_name[row["pair"]].verdict,
                "signals": registration.certificate(row, json.loads(settings or "{}")),
                "landmarks": errors.get(row["pair"]),
                "pictures": _pair_pictures(row["pair"], unit, results, album),
            }
        )
    # In the order of the certificates, then those that came registered.
    judged = [row["pair"] for row, _ in certificates if row["pair"] in errors]
    names = [*judged, *(name for name in errors if name not in judged)]
    return (
        shown,
        len(certificates) - len(shown),
        [{"pair": name, **errors[name]} for name in names][: data.ROWS_MAX],
    )


def _pair_pictures(pair: str, unit: str, results: Path, album: pictures.Album) -> dict[str, str]:
    """Return the pictures of a registration; none where describe could not read an image."""
    table = tables.read(results / "describe" / f"{unit}.parquet", tables.DESCRIBE)
    rows = {row["stain"]: row for row in table.to_pylist() if row["pair"] == pair}
    given = {stain: row for stain, row in rows.items() if row["thumbnail"] is not None}
    if set(given) != set(tables.STAINS):
        made = {stain: decode(row["thumbnail"]) for stain, row in sorted(given.items())}
        return album.take_all(made, registration.SIDE_PX)
    he, her2 = given["he"], given["her2"]
    made = registration.views(
        decode(he["thumbnail"]),
        decode(her2["thumbnail"]),
        (he["width_px"] * he["mpp"], he["height_px"] * he["mpp"]),
        (her2["width_px"] * her2["mpp"], her2["height_px"] * her2["mpp"]),
        tuple(her2["background"] or (255, 255, 255)),
        read_displacement(results / "register" / f"{unit}.displacement.npz"),
    )
    return album.take_all(made, registration.SIDE_PX)


# --- tiles ---------------------------------------------------------------------------------------


def drawn(
    places: npt.NDArray[np.int64],
    groups: Sequence[str],
    names: Sequence[str],
    count: int,
    seed: int,
) -> list[int]:
    """Draw tiles by seed, one of each group in turn, so that a rare group is seen as well.

    Args:
        places: rows to draw from.
        groups: group of each of these rows.
        names: tile of each; the draw depends on names, not on rows, so it stays when others come.
        count: how many at most.
        seed: of the draw.

    Returns:
        Rows, ordered by group and then by name.
    """
    by_group: dict[str, list[tuple[bytes, str, int]]] = collections.defaultdict(list)
    for place, group, name in zip(places, groups, names, strict=True):
        key = hashlib.sha256(f"{seed}/report/{name}".encode()).digest()
        by_group[group].append((key, name, int(place)))
    for own in by_group.values():
        own.sort()
    taken: list[tuple[str, str, int]] = []
    turn = 0
    while len(taken) < count and any(len(own) > turn for own in by_group.values()):
        for group in sorted(by_group):
            if len(by_group[group]) > turn and len(taken) < count:
                _, name, place = by_group[group][turn]
                taken.append((group, name, place))
        turn += 1
    return [place for _, _, place in sorted(taken)]


def _kept(
    cohort: data.Cohort, results: Path, options: ReportOptions
) -> tuple[list[dict[str, Any]], str]:
    """Return accepted tiles of every data set and score, and a note when room ran out."""
    places = np.flatnonzero(cohort.accepted)
    groups = [
        f"{dataset}/{data.score_order(score)}"
        for dataset, score in zip(
            cohort.column("dataset")[places], cohort.column("score")[places], strict=True
        )
    ]
    names = cohort.column("tile")[places].tolist()
    chosen = drawn(places, groups, names, options.gallery_tiles, options.seed)
    album = pictures.Album(GALLERY_BYTES)
    cards = _cards(cohort, chosen, results, album)
    return cards, _room_note(len(cards), len(chosen))


def _dropped(
    cohort: data.Cohort, results: Path, options: ReportOptions
) -> tuple[list[dict[str, Any]], str]:
    """Return refused tiles by reason, each reason as many, and a note when room ran out."""
    places = np.flatnonzero(~cohort.accepted)
    reasons = cohort.column("reason")[places].astype(str)
    names = cohort.column("tile")[places].tolist()
    chosen = drawn(places, reasons.tolist(), names, options.gallery_tiles, options.seed)
    album = pictures.Album(GALLERY_BYTES)
    cards = _cards(cohort, chosen, results, album)
    limits = cohort.options("filter")
    found = collections.Counter(reasons)
    groups = []
    order = [*data.REASONS, *sorted(set(found) - set(data.REASONS))]
    for name in order:
        own = [card for card in cards if card["reason"] == name]
        if found[name]:
            groups.append(
                {
                    "reason": name,
                    "words": data.REASONS[name].words if name in data.REASONS else "",
                    "limit": data.limit_words(name, limits),
                    "tiles": found[name],
                    "cards": own,
                }
            )
    return groups, _room_note(len(cards), len(chosen))


def _room_note(made: int, wanted: int) -> str:
    if made == wanted:
        return ""
    return f"{made} of the {wanted} tiles drawn are shown: more would not fit into 30 MB."


def _cards(
    cohort: data.Cohort, places: Sequence[int], results: Path, album: pictures.Album
) -> list[dict[str, Any]]:
    """Return tiles with pictures and values, in the order given, as long as there is room."""
    cards = []
    target = cohort.metadata.get("mask_target", "")
    for row in cohort.index.take(pa.array(places, pa.int64())).to_pylist():
        he, her2 = (_image(row, stain, results) for stain in tables.STAINS)
        images = {"he": he, "her2": her2}
        if row.get(f"{target}_shard") is not None:
            place = [row[f"{target}_{name}"] for name in ("shard", "offset", "length")]
            mask = decode_mask(read_member(results / place[0], place[1], place[2]))
            images["mask"] = pictures.outlined(her2, mask)
        uris = album.take_all(images, TILE_SIDE_PX)
        if not uris:
            break
        reason = row["reason"] or ""
        measure = data.REASONS[reason].measure if reason in data.REASONS else None
        cards.append(
            {
                "tile": row["tile"],
                "dataset": row["dataset"],
                "score": data.score_name(row["score"]),
                "split": row["split"],
                "case": row["case"],
                "reason": reason,
                "images": uris,
                "values": _values(row, measure, target),
            }
        )
    return cards


def _image(row: Mapping[str, Any], stain: str, results: Path) -> npt.NDArray[np.uint8]:
    """Return one stain of a tile."""
    place = row[f"{stain}_offset"], row[f"{stain}_length"]
    return decode(read_member(results / row["shard"], *place))


def _values(row: Mapping[str, Any], measure: str | None, target: str) -> list[dict[str, Any]]:
    """Return what was measured on a tile: name, value, whether it is what the tile fell by."""
    shown = [
        ("tissue_fraction", "tissue", percent(row["tissue_fraction"], 0)),
        ("her2_coverage_fraction", "HER2 covers", percent(row["her2_coverage_fraction"], 0)),
        ("he_sharpness", "sharpness H&E", number(row["he_sharpness"])),
        ("her2_sharpness", "sharpness HER2", number(row["her2_sharpness"])),
        ("histogram_similarity", "similarity", fixed(row["histogram_similarity"], 2)),
    ]
    if row["folding_fraction"]:
        shown.append(("folding_fraction", "folded", percent(row["folding_fraction"])))
    if row.get(f"{target}_cells") is not None:
        shown.append(("", "positive", percent(row[f"{target}_positive_fraction"])))
        shown.append(
            ("", "cells", f"{row[f'{target}_positive_cells']} of {row[f'{target}_cells']}")
        )
    return [
        {"name": words, "value": value, "decides": name == measure and bool(name)}
        for name, words, value in shown
    ]


def _similarity(
    cohort: data.Cohort, results: Path, options: ReportOptions
) -> dict[str, Any] | None:
    """Compare the histogram similarity of true pairs with that of mismatched ones.

    Each H&E tile of a seeded sample is set beside the HER2 tile of another case; None where no
    two cases have a tile.
    """
    limits = cohort.options("filter")
    datasets = limits.get("histogram_datasets", [])
    # What falls by another reason was never compared.
    asked = cohort.accepted | (cohort.column("reason").astype(str) == "unlike_histograms")
    asked &= np.isfinite(cohort.column("histogram_similarity"))
    compared = asked & np.isin(cohort.column("dataset").astype(str), datasets)
    places = np.flatnonzero(compared if compared.any() else asked)
    names = cohort.column("tile")[places].tolist()
    cases = cohort.column("case")
    chosen = drawn(places, cases[places].tolist(), names, SIMILARITY_TILES, options.seed)
    # Half the list onwards stands another case, unless one case makes up more than half.
    shift = len(chosen) // 2
    partners = [
        (place, chosen[(k + shift) % len(chosen)])
        for k, place in enumerate(chosen)
        if cases[place] != cases[chosen[(k + shift) % len(chosen)]]
    ]
    if not partners:
        return None
    taken = cohort.index.take(pa.array(chosen, pa.int64())).to_pylist()
    rows = dict(zip(chosen, taken, strict=True))
    bins = cohort.options("tile").get("histogram_bins", 64)
    found = [
        histogram_similarity(_image(rows[a], "he", results), _image(rows[b], "her2", results), bins)
        for a, b in partners
    ]
    true = cohort.column("histogram_similarity")[[a for a, _ in partners]]
    false = np.array([math.nan if value is None else value for value in found])
    usable = np.isfinite(false)
    if not usable.any():
        return None
    true, false = true[usable], false[usable]
    limit = limits.get("histogram_similarity_min")
    better = np.mean(true[:, None] > false) + 0.5 * np.mean(true[:, None] == false)
    return {
        "pairs": int(usable.sum()),
        "datasets": sorted(set(cohort.column("dataset")[chosen])),
        "applied": bool(compared.any()),
        "true_median": float(np.median(true)),
        "false_median": float(np.median(false)),
        "limit": limit,
        "true_kept": None if limit is None else float(np.mean(true >= limit)),
        "false_kept": None if limit is None else float(np.mean(false >= limit)),
        "auc": float(better),
        "charts": [
            charts.histogram(
                title,
                [(title, colour, values)],
                limits=[] if limit is None else [(f"≥ {limit:g}", limit)],
                unit="histogram similarity",
                span=(min(*true, *false, *([] if limit is None else [limit])), 1.0),
            )
            for title, colour, values in (
                ("True pairs", charts.BLUE, true),
                ("Mismatched pairs", charts.ORANGE, false),
            )
        ],
    }
