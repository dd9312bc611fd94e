"""The page that compares the generators of several presets, beside baselines and papers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hemera.config import CompareOptions
from hemera.evaluation.published import PAPERS
from hemera.reports import pictures
from hemera.reports.data import option_rows, score_name
from hemera.reports.evaluation import (
    METHODS,
    METRIC_WORDS,
    PAPER_METRICS,
    PICTURE_BYTES,
    PICTURE_SIDE_PX,
    cell,
    judging_notes,
)
from hemera.reports.html import count, duration, fixed, plural, write_page

RGB = npt.NDArray[np.uint8]

HIGHER, LOWER = ("psnr_db", "ssim", "ssim_gaussian"), ("lpips", "fid", "kid")
"""Metrics of which more is better, and of which less is."""


@dataclasses.dataclass(frozen=True, eq=False)
class ComparedTile:
    """One tile shown on the page, all images (H, W, 3) of one size."""

    tile: str
    case: str
    dataset: str
    score: str
    he: RGB
    her2: RGB
    """The real one."""
    generated: Mapping[str, RGB]
    """By preset."""
    ssim: Mapping[str, float]
    """By preset, baselines included."""


def comparison_page(
    path: Path,
    *,
    preset: str,
    table: pa.Table,
    cases: int,
    metadata: Mapping[str, Mapping[str, Any]],
    index_metadata: Mapping[str, str],
    examples: Sequence[ComparedTile],
    options: CompareOptions,
    report: str,
) -> None:
    """Write the page.

    Args:
        path: the page.
        preset: preset of the cohort; ``demo`` puts a banner on the page.
        table: `tables.COMPARISON`.
        cases: of the test tiles.
        metadata: the JSON beside the weights, by preset.
        index_metadata: the key-value metadata of the index.
        examples: tiles shown, in this order.
        options: what compare ran with.
        report: relative link from the page to the page about the data.
    """
    own = [row for row in table.to_pylist() if row["kind"] != "paper"]
    tiles = max((row["tiles"] for row in own), default=0)
    columns = [
        metric
        for metric in (*HIGHER, *LOWER)
        if metric in ("psnr_db", "ssim", "fid") or any(row[metric] is not None for row in own)
    ]
    cards, note = _examples(examples)
    content = {
        "title": "HEMERA: generators compared",
        "preset": preset,
        "report": report,
        "tiles": tiles,
        "cases": cases,
        "columns": [METRIC_WORDS[metric][0] for metric in columns],
        "rows": [_row(row, columns, own) for row in own],
        "papers": [
            {
                "method": figure.method,
                # As the source prints it.
                "cells": [
                    dict(zip(PAPER_METRICS["generation"], figure.values, strict=True)).get(metric)
                    for metric in columns
                ],
                "remark": f"{figure.source}; {figure.comparable}",
            }
            for figure in PAPERS["generation"]
        ],
        "warnings": _warnings(own, tiles),
        "notes": judging_notes(options, cases, tiles) if tiles else [],
        "presets": list(metadata),
        "differences": _differences(metadata),
        "examples": cards,
        "examples_note": note,
        "options": option_rows("compare", options.model_dump()),
        "fingerprint": index_metadata.get("fingerprint", ""),
    }
    write_page(path, "compare.html", content)


def _row(
    row: Mapping[str, Any], columns: Sequence[str], among: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return a row of the page's table; a cell that is the best of its column says so."""
    network = row["kind"] == "network"
    return {
        "method": row["method"] if network else METHODS.get(row["method"], row["method"]),
        "generator": row["generator"] or "",
        "parameters": count(row["parameters"]) if network else "",
        "epochs": count(row["epochs"]) if network else "",
        "time": "" if row["training_s"] is None else duration(row["training_s"]),
        "cells": [{**_cell(row, metric), "best": _best(row, metric, among)} for metric in columns],
    }


def _cell(row: Mapping[str, Any], metric: str) -> dict[str, str]:
    found = {part: row.get(f"{metric}_{part}") for part in ("deviation", "low", "high")}
    return cell({"value": row[metric], "tiles": row["tiles"], **found}, metric)


def _best(row: Mapping[str, Any], metric: str, among: Sequence[Mapping[str, Any]]) -> bool:
    values = [other[metric] for other in among if other[metric] is not None]
    if row[metric] is None or len(values) < 2:
        return False
    return bool(row[metric] == (max(values) if metric in HIGHER else min(values)))


def _warnings(rows: Sequence[Mapping[str, Any]], tiles: int) -> list[dict[str, str]]:
    if not tiles:
        return [
            {
                "level": "stop",
                "words": "Nothing was compared: GenerationNet's test part is empty; see the splits "
                "on the page about the data.",
                "link": "",
            }
        ]
    made = []
    for metric in ("psnr_db", "ssim"):
        words, digits = METRIC_WORDS[metric]
        known = [row for row in rows if row[metric] is not None]
        trivial = [(row[metric], row["method"]) for row in known if row["kind"] == "baseline"]
        beaten = [
            f"{row['method']} {fixed(row[metric], digits)}"
            for row in known
            if row["kind"] == "network" and trivial and row[metric] <= max(trivial)[0]
        ]
        if beaten:
            made.append(
                {
                    "level": "care",
                    "words": f"No better by {words} than a trivial answer, the "
                    f"{METHODS[max(trivial)[1]]} with {fixed(max(trivial)[0], digits)}: "
                    f"{', '.join(beaten)}.",
                    "link": "",
                }
            )
    for row in rows:
        if row["psnr_infinite"]:
            made.append(
                {
                    "level": "care",
                    "words": f"{METHODS.get(row['method'], row['method'])}: "
                    f"{plural(row['psnr_infinite'], 'tile')} equal to the real one and left out "
                    "of the mean of PSNR.",
                    "link": "",
                }
            )
    return made


def _differences(metadata: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the options in which the trainings differ, with the value of each."""
    options = [dict(described.get("options", {})) for described in metadata.values()]
    names = list(dict.fromkeys(name for each in options for name in each))
    found = []
    for name in names:
        values = [json.dumps(each.get(name)) for each in options]
        if len(set(values)) > 1:
            found.append({"name": name, "values": values})
    return found


def _examples(examples: Sequence[ComparedTile]) -> tuple[list[dict[str, Any]], str]:
    """Return the cards of the gallery as long as there is room, and a note when there was not."""
    album = pictures.Album(PICTURE_BYTES)
    cards = []
    for example in examples:
        images = {"H&E": example.he, "HER2, real": example.her2}
        images |= {f"{name}, generated": image for name, image in example.generated.items()}
        addresses = album.take_all(images, PICTURE_SIDE_PX)
        if not addresses:
            break
        cards.append(
            {
                "tile": example.tile,
                "case": example.case,
                "dataset": example.dataset,
                "score": score_name(example.score),
                "images": addresses,
                "values": [
                    (f"SSIM, {METHODS.get(name, name)}", fixed(value, METRIC_WORDS["ssim"][1]))
                    for name, value in example.ssim.items()
                ],
            }
        )
    note = (
        ""
        if len(cards) == len(examples)
        else f"{len(cards)} of {len(examples)} tiles are shown: more would not fit into 30 MB."
    )
    return cards, note
