"""Write the page about the data, before any training and also when nothing was accepted."""

from __future__ import annotations

import collections
import contextlib
import csv
import hashlib
import json
import logging
import math
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
from hemera.dataset.criteria import REASONS
from hemera.dataset.shards import read_member
from hemera.imaging.codecs import decode, decode_mask
from hemera.imaging.quality import histogram_similarity
from hemera.registration.displacement_files import read_displacement
from hemera.registration.local_quality import LocalQuality
from hemera.reports import charts, data, pictures, registration
from hemera.reports.html import fixed, number, percent, write_page
from hemera.sheet import Pair, read_sheet, units

log = logging.getLogger(__name__)

REGISTRATION_BYTES = 11_000_000
GALLERY_BYTES = 8_000_000
DISPUTED_BYTES = 1_500_000
DISPUTED_TILES = 6
"""For each of both galleries. With the tables, which are cut as well, that is below 30 MB."""
PAIR_BYTES = 20_000_000
"""Of a pair's own page: more than its pictures can come to."""
TILE_SIDE_PX = 400
SIMILARITY_TILES = 200


def run(
    *,
    sheet: Path,
    block_count: int,
    preset: str,
    results: Path,
    page: Path,
    pairs: Path,
    logs: Path | None = None,
    options: ReportOptions,
) -> None:
    """Write the page from tables and thumbnails; pixels are read of the tiles shown, no more.

    Args:
        sheet: the sheet of pairs.
        block_count: blocks that image pairs are cut into.
        preset: preset of the cohort; ``demo`` puts a banner on the page.
        results: folder that holds the folders of all stages up to index.
        page: the page, HTML of at most 30 MB; written last.
        pairs: folder of a page ``{pair}.html`` for each registered pair that the page has no room
            for.
        logs: folder of Snakemake's logs, for what ``register/{pair}.tsv`` says a registration
            took; None: nothing is said.
        options: sizes of the galleries.

    Raises:
        SheetError: when the sheet cannot be used.
        TableError: when a table is missing or of another version.
        ShardError: when a shard does not hold what the index says.
        RegistrationError: when a displacement cannot be read.
    """
    rows = read_sheet(sheet)
    by_unit = units(rows, block_count)
    cohort = _read_cohort(sheet, preset, rows.pairs, by_unit, results)
    funnel = data.funnel(cohort)
    kept, kept_note = _kept(cohort, results, options)
    dropped, dropped_note = _dropped(cohort, results, options)
    agreement = data.agreement(cohort)
    registrations = _registrations(cohort, by_unit, results, logs, page, pairs, options)
    content = {
        "title": f"HEMERA: the data of {cohort.sheet}",
        "preset": preset,
        "sheet": cohort.sheet,
        "headline": data.headline(cohort),
        "warnings": [*data.warnings(cohort, funnel["leans"]), *registrations.pop("warnings")],
        "outcomes": data.outcomes(cohort),
        **registrations,
        "funnel": funnel,
        "quality": data.quality(cohort),
        "similarity": _similarity(cohort, results, options),
        "kept": kept,
        "kept_note": kept_note,
        "dropped": dropped,
        "dropped_note": dropped_note,
        "masks": data.mask_statistics(cohort),
        "agreement": agreement,
        "disputed": _disputed(cohort, results, agreement),
        "readings": data.readings(cohort, options.intense_share),
        "intense_share": options.intense_share,
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
    logs: Path | None,
    page: Path,
    folder: Path,
    options: ReportOptions,
) -> dict[str, Any]:
    """Write the pages of pairs, and return what the page about the data says of registrations."""
    certificates: list[tuple[dict[str, Any], str]] = []
    for unit in _registered_here(by_unit):
        table = tables.read(results / "register" / f"{unit}.parquet", tables.CERTIFICATE)
        certificates += [(row, unit) for row in table.to_pylist()]
    certificates.sort(key=lambda item: registration.worst_first(item[0]))
    persons = {pair.pair: pair.verdict for pair in cohort.pairs}
    score = _score(cohort, results)
    mpp = {row["pair"]: row["mpp"] for row in cohort.images.to_pylist() if row["stain"] == "he"}
    errors = {
        row["pair"]: registration.in_pixels(row, mpp.get(row["pair"]))
        for row in score
        if row["aggregation"] == "pair"
    }
    folder.mkdir(parents=True, exist_ok=True)
    album = pictures.Album(REGISTRATION_BYTES)
    room = options.worst_pairs
    shown, lines = [], []
    for row, unit in tqdm(certificates, desc="report", unit="pair", disable=None):
        name = row["pair"]
        own_page = folder / f"{name}.html"
        known = {"row": row, "person": persons[name], "landmarks": errors.get(name)}
        card = _card(known, unit, results, logs, album) if room else None
        if card is not None:
            room -= 1
            shown.append(card)
            own_page.unlink(missing_ok=True)
        else:
            room = 0
            alone = _card(known, unit, results, logs, pictures.Album(PAIR_BYTES))
            assert alone is not None, "a page of one pair has room"
            _write_pair(own_page, page, cohort, alone)
        lines.append(
            {
                **known,
                "link": f"#pair-{name}" if card is not None else _relative(own_page, page),
            }
        )
    # In the order of the certificates, then those that came registered.
    judged = [row["pair"] for row, _ in certificates if row["pair"] in errors]
    measured = [*judged, *(name for name in errors if name not in judged)]
    return {
        "registrations": shown,
        "registered": lines[: data.ROWS_MAX],
        "registered_more": max(0, len(lines) - data.ROWS_MAX),
        "pages": _relative(folder, page) if len(lines) > len(shown) else "",
        "landmarks": [errors[name] for name in measured if errors[name]["points"]][: data.ROWS_MAX],
        "score": [row for row in score if row["aggregation"] != "pair"],
        "warnings": registration.warnings([row for row, _ in certificates]),
    }


def _score(cohort: data.Cohort, results: Path) -> list[dict[str, Any]]:
    """Return the cohort's rows of landmarks, if any whole-slide pair has landmarks.

    Of a single data set, they stand once.
    """
    if not any(pair.landmarks and not pair.in_block for pair in cohort.pairs):
        return []
    rows: list[dict[str, Any]] = tables.read(
        results / "landmarks" / "cohort.errors.parquet", tables.LANDMARKS_COHORT
    ).to_pylist()
    single = len({row["dataset"] for row in rows if row["dataset"]}) == 1
    return [
        row for row in rows if row["aggregation"] == "pair" or row["dataset"] is None or not single
    ]


def _relative(path: Path, page: Path) -> str:
    return Path(os.path.relpath(path, page.parent)).as_posix()


def _card(
    known: Mapping[str, Any],
    unit: str,
    results: Path,
    logs: Path | None,
    album: pictures.Album,
) -> dict[str, Any] | None:
    """Return what a card shows of a registration; None: its pictures do not fit into the album."""
    row = known["row"]
    certificate = results / "register" / f"{unit}.parquet"
    settings = json.loads(tables.read_metadata(certificate).get("options", "{}"))
    signals, unmeasured = registration.certificate(row, settings)
    made, local = _pair_pictures(row, unit, results)
    images = album.take_all(made, registration.SIDE_PX, registration.QUALITY)
    if made and not images:
        return None
    return {
        **known,
        "signals": signals,
        "unmeasured": unmeasured,
        "facts": registration.facts(row, _cost(logs, unit)),
        "pictures": images,
        "size_px": made["he"].shape[1::-1] if "he" in made else None,
        "local": local,
    }


def _write_pair(path: Path, page: Path, cohort: data.Cohort, card: Mapping[str, Any]) -> None:
    name = card["row"]["pair"]
    content = {
        "title": f"HEMERA: the registration of {name}",
        "preset": cohort.preset,
        "sheet": cohort.sheet,
        "report": _relative(page, path),
        "item": card,
    }
    write_page(path, "pair.html", content)


def _cost(logs: Path | None, unit: str) -> dict[str, float]:
    """Return the seconds and the memory that Snakemake's benchmark says a registration took."""
    if logs is None:
        return {}
    try:
        with open(logs / "register" / f"{unit}.tsv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
    except (OSError, UnicodeDecodeError, csv.Error):
        return {}
    found = {}
    for name, column in (("seconds", "s"), ("memory_mb", "max_rss")):
        with contextlib.suppress(ValueError, TypeError):
            # A job that is over at once has a dash for its memory.
            value = float((rows[-1] if rows else {}).get(column) or "")
            if math.isfinite(value):
                found[name] = value
    return found


def _pair_pictures(
    row: Mapping[str, Any], unit: str, results: Path
) -> tuple[dict[str, npt.NDArray[np.uint8]], dict[str, Any] | None]:
    """Return the pictures of a pair, and its local quality drawn.

    Where describe could not read an image there is the picture of the other, or none.
    """
    table = tables.read(results / "describe" / f"{unit}.parquet", tables.DESCRIBE)
    rows = {one["stain"]: one for one in table.to_pylist() if one["pair"] == row["pair"]}
    images = {
        stain: decode(rows[stain]["thumbnail"])
        for stain in tables.STAINS
        if stain in rows and rows[stain]["thumbnail"] is not None
    }
    if set(images) != set(tables.STAINS):
        return images, None
    he_um, her2_um = (
        (
            rows[stain]["width_px"] * rows[stain]["mpp"],
            rows[stain]["height_px"] * rows[stain]["mpp"],
        )
        for stain in tables.STAINS
    )
    made = registration.views(
        images["he"],
        images["her2"],
        he_um,
        her2_um,
        tuple(rows["her2"]["background"] or (255, 255, 255)),
        read_displacement(results / "register" / f"{unit}.displacement.npz"),
        # Of a map that was kept rigid, it is the final one.
        row["rigid"] if row["map"] == "nonrigid" else None,
    )
    squares = tables.read(results / "register" / f"{unit}.quality.parquet", tables.QUALITY)
    local = registration.local_map(
        LocalQuality.from_columns(squares.to_pydict()), he_um, made["he"].shape[1::-1]
    )
    if local is not None:
        made["ground"] = pictures.paled(made["he"])
    return made, local


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
    order = [*REASONS, *sorted(set(found) - set(REASONS))]
    for name in order:
        own = [card for card in cards if card["reason"] == name]
        if found[name]:
            groups.append(
                {
                    "reason": name,
                    "words": REASONS[name].text if name in REASONS else "",
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
            images["mask"] = pictures.outlined(her2, _mask(row, target, results))
        uris = album.take_all(images, TILE_SIDE_PX)
        if not uris:
            break
        reason = row["reason"] or ""
        measure = REASONS[reason].column if reason in REASONS else None
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


def _disputed(
    cohort: data.Cohort, results: Path, agreement: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the tiles on which two engines agree least, with what each of them drew."""
    shown = agreement.get("worst", [])[:DISPUTED_TILES]
    places = [found["place"] for found in shown]
    album = pictures.Album(DISPUTED_BYTES)
    cards = []
    rows = cohort.index.take(pa.array(places, pa.int64())).to_pylist()
    for row, found in zip(rows, shown, strict=True):
        her2 = _image(row, "her2", results)
        images = {"her2": her2}
        for engine in agreement["engines"]:
            images[engine] = pictures.outlined(her2, _mask(row, engine, results))
        uris = album.take_all(images, TILE_SIDE_PX)
        if not uris:
            break
        cards.append({**found, "images": uris})
    return cards


def _mask(row: Mapping[str, Any], engine: str, results: Path) -> npt.NDArray[np.uint8]:
    """Return the label image of a tile by an engine."""
    place = [row[f"{engine}_{name}"] for name in ("shard", "offset", "length")]
    return decode_mask(read_member(results / place[0], place[1], place[2]))


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
    if row["registration_error_um"] is not None:
        words = f"{number(row['registration_error_um'])} µm"
        shown.append(("registration_error_um", "registration error", words))
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
