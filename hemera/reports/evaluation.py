"""The page about the networks: metrics next to baselines and published results, examples."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hemera.config import EvaluateOptions
from hemera.dataset.statistics import score_order
from hemera.evaluation import published
from hemera.evaluation.image_quality import IMAGE_METRICS, SEGMENTER, SET_METRICS, confusion
from hemera.evaluation.metrics import SEGMENTATION_METRICS, scores
from hemera.reports import pictures, training
from hemera.reports.data import NETWORKS, option_rows, score_name
from hemera.reports.html import fixed, percent, plural, write_page
from hemera.reports.training import Trained

RGB = npt.NDArray[np.uint8]

PICTURE_BYTES = 24_000_000
"""Limit of the pictures, so that the page stays below 30 MB."""
PICTURE_SIDE_PX = 448
CASES_MAX = 50


class Metric(NamedTuple):
    """How a metric is written: its name, its digits, and whether more is better."""

    name: str
    digits: int
    higher: bool = True


METRICS = {
    "psnr_db": Metric("PSNR, dB", 2),
    "ssim": Metric("SSIM", 3),
    "ssim_gaussian": Metric("SSIM, Gaussian", 3),
    "lpips": Metric("LPIPS", 3, higher=False),
    "fid": Metric("FID", 2, higher=False),
    "kid": Metric("KID", 4, higher=False),
    "precision": Metric("precision", 3),
    "recall": Metric("recall", 3),
    "f1": Metric("F1", 3),
    "iou": Metric("IoU", 3),
}
BASELINES = {
    "mean_colour": "mean colour of the training tiles",
    "blurred": "blurred H&E in the colours of HER2",
    "all_positive": "every pixel positive",
    "all_negative": "no pixel positive",
    "best_constant": "the better of both constants",
}
COMPARED_BASELINES = {"generation": ("mean_colour", "blurred"), "segmentation": ("best_constant",)}
"""Baselines that a network should exceed."""
AGGREGATIONS = {
    "pooled": "all pixels of all tiles together",
    "mean": "mean over tiles; 1 where truth and prediction are both empty",
    "mean_nonempty": "mean over tiles with a positive pixel in truth",
}
HEADLINE = (
    ("generation", "psnr_db", "mean"),
    ("generation", "ssim", "mean"),
    ("segmentation", "f1", "pooled"),
    ("segmentation", "iou", "pooled"),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A tile shown on the page, all images of one size (H, W)."""

    tile: str
    case: str
    dataset: str
    score: str
    label: str
    """Why it is shown: its rank and metric."""
    he: RGB
    """(H, W, 3)."""
    her2: RGB
    """(H, W, 3), the real one."""
    generated: Mapping[str, RGB]
    """(H, W, 3), by generator."""
    truth: npt.NDArray[np.bool_]
    """(H, W), the positive mask."""
    probability: npt.NDArray[np.float32]
    """(H, W), SegmentationNet's, 0 to 1."""


_Key = tuple[str, str, str, str, str]
"""Network, method, group, metric, aggregation."""
_Found = Mapping[_Key, Mapping[str, Any]]


def evaluation_page(
    path: Path,
    *,
    preset: str,
    metrics: Sequence[Mapping[str, Any]],
    tiles: Sequence[Mapping[str, Any]],
    trained: Sequence[Trained],
    index_metadata: Mapping[str, str],
    examples: Sequence[Example],
    options: EvaluateOptions,
    report: str,
) -> None:
    """Write the page.

    Args:
        path: the page.
        preset: preset of the cohort; ``demo`` puts a banner on the page.
        metrics: rows of `tables.METRICS`; none of a network that has no test tile.
        tiles: rows of `tables.EVALUATION_TILES`.
        trained: the networks: the configured generator, other generators, SegmentationNet.
        index_metadata: the key-value metadata of the index.
        examples: tiles shown, in this order.
        options: the options of evaluate.
        report: relative link from the page to the page about the data.
    """
    found = {
        (row["network"], row["method"], row["group"], row["metric"], row["aggregation"]): row
        for row in metrics
    }
    tested = {network: _tested(tiles, network) for network in NETWORKS}
    cards, note = _examples(examples, tiles)
    content = {
        "title": "HEMERA: evaluation of the networks",
        "preset": preset,
        "report": report,
        "metrics": METRICS,
        "names": NETWORKS,
        "labels": BASELINES | {each.name: each.label for each in trained},
        "aggregations": AGGREGATIONS,
        "tested": tested,
        "headline": _headline(found, trained),
        "warnings": _warnings(found, tested, trained),
        "networks": [_section(network, found, trained) for network in NETWORKS],
        "examples": cards,
        "examples_note": note,
        "differences": training.differences(trained),
        "trained": [training.summary(each) for each in trained],
        "settings": options,
        "options": option_rows("evaluate", options.model_dump()),
        "fingerprint": index_metadata.get("fingerprint", ""),
        "target": index_metadata.get("mask_target", ""),
        "licences": json.loads(index_metadata.get("licences", "[]")),
    }
    write_page(path, "evaluate.html", content)


def _tested(rows: Sequence[Mapping[str, Any]], network: str) -> dict[str, int]:
    own = [row for row in rows if row["network"] == network]
    return {
        "tiles": len({row["tile"] for row in own}),
        "cases": len({row["case"] for row in own}),
    }


def _best_baseline(
    found: _Found, network: str, metric: str, aggregation: str, group: str = "all"
) -> tuple[float, str] | None:
    """Return value and name of the best baseline, if any."""
    values = [
        (row["value"], method)
        for method in COMPARED_BASELINES[network]
        if (row := found.get((network, method, group, metric, aggregation)))
        and row["value"] is not None
    ]
    return max(values, default=None)


def _headline(found: _Found, trained: Sequence[Trained]) -> list[dict[str, Any]]:
    """Return the first generator's and SegmentationNet's headline metrics."""
    methods = {each.network: each.name for each in reversed(trained)}
    return [
        {
            "metric": metric,
            "network": network,
            "method": methods[network],
            "pooled": aggregation == "pooled",
            "row": found.get((network, methods[network], "all", metric, aggregation)),
            "baseline": _best_baseline(found, network, metric, aggregation),
        }
        for network, metric, aggregation in HEADLINE
    ]


def _warnings(
    found: _Found, tested: Mapping[str, Mapping[str, int]], trained: Sequence[Trained]
) -> list[dict[str, str]]:
    made = [
        {
            "level": "stop",
            "words": f"{name} was not evaluated: its test split has no tile; see the splits on the "
            "page about the data.",
            "link": "",
        }
        for network, name in NETWORKS.items()
        if not tested[network]["tiles"]
    ]
    for each in trained:
        for network, metric, aggregation in HEADLINE:
            row = found.get((each.network, each.name, "all", metric, aggregation))
            baseline = _best_baseline(found, network, metric, aggregation)
            if network != each.network or row is None or baseline is None:
                continue
            name, digits, _ = METRICS[metric]
            if row["value"] is not None and row["value"] <= baseline[0]:
                words = (
                    f"{each.label}: {name} {fixed(row['value'], digits)} does not exceed the "
                    f"trivial baseline ({BASELINES[baseline[1]]}: {fixed(baseline[0], digits)})."
                )
                made.append({"level": "care", "words": words, "link": each.network})
        infinite = found.get((each.network, each.name, "all", "psnr_infinite", "count"))
        if infinite is not None and infinite["value"]:
            words = (
                f"{each.label}: {plural(int(infinite['value']), 'tile')} equal to the real one, "
                "without a finite PSNR and not in its mean."
            )
            made.append({"level": "care", "words": words, "link": each.network})
    return made


def _section(network: str, found: _Found, trained: Sequence[Trained]) -> dict[str, Any]:
    """Return what the page shows about GenerationNet's generators or about SegmentationNet."""
    methods = [each.name for each in trained if each.network == network]
    columns = [(metric, "") for metric in SEGMENTATION_METRICS]
    if network == "generation":
        columns = [(metric, "mean") for metric in IMAGE_METRICS]
        columns += [(metric, "set") for metric in SET_METRICS]
        # LPIPS, FID and KID are measured where weights are named.
        columns = [
            (metric, aggregation)
            for metric, aggregation in columns
            if metric in IMAGE_METRICS[:3]
            or (network, methods[0], "all", metric, aggregation) in found
        ]
    return {
        "key": network,
        "columns": [metric for metric, _ in columns],
        "rows": _method_rows(found, network, methods, columns),
        "groups": _group_rows(found, network, methods),
        "published": published.results(network),
        "published_metrics": published.METRICS[network],
    }


def _method_rows(
    found: _Found, network: str, methods: Sequence[str], columns: Sequence[tuple[str, str]]
) -> list[dict[str, Any]]:
    """Return the rows of a network's table: each method, and for masks each aggregation."""
    made = []
    present = {key[1] for key in found if key[0] == network and key[2] == "all"}
    for aggregation in ("mean",) if network == "generation" else AGGREGATIONS:
        rows = {
            method: [
                found.get((network, method, "all", metric, own or aggregation))
                for metric, own in columns
            ]
            for method in (*methods, *BASELINES)
            if method in present
        }
        best = [
            _best([cells[place] for cells in rows.values()], METRICS[metric].higher)
            for place, (metric, _) in enumerate(columns)
        ]
        made += [
            {
                "own": method in methods,
                "method": method,
                "aggregation": aggregation,
                "cells": cells,
                "best": [
                    cell is not None and cell["value"] == value
                    for cell, value in zip(cells, best, strict=True)
                ],
                "tiles": max(cell["tiles"] for cell in cells if cell is not None),
            }
            for method, cells in rows.items()
        ]
    return made


def _best(cells: Sequence[Mapping[str, Any] | None], higher: bool) -> float:
    """Return the best value of a column, NaN where fewer than two methods have one."""
    values = [cell["value"] for cell in cells if cell is not None and cell["value"] is not None]
    if len(values) < 2:
        return math.nan
    return float(max(values) if higher else min(values))


def _group_rows(found: _Found, network: str, methods: Sequence[str]) -> dict[str, Any]:
    """Return the networks' metrics per data set, score and case, with the best baseline."""
    metric, aggregation = ("ssim", "mean") if network == "generation" else ("f1", "pooled")
    shown = ("psnr_db", "ssim") if network == "generation" else SEGMENTATION_METRICS
    groups = sorted(
        {key[2] for key in found if key[0] == network and "=" in key[2]},
        key=lambda group: (score_order(group.removeprefix("score=")), group),
    )
    rows: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for group in groups:
        kind, _, name = group.partition("=")
        rows[kind] += [
            {
                "kind": "data set" if kind == "dataset" else kind,
                "name": score_name(name) if kind == "score" else name,
                "method": method,
                "tiles": found[network, method, group, metric, aggregation]["tiles"],
                "cells": [found.get((network, method, group, m, aggregation)) for m in shown],
                "baseline": _best_baseline(found, network, metric, aggregation, group),
            }
            for method in methods
        ]

    def order(row: Mapping[str, Any]) -> tuple[float, str]:
        value = found[network, methods[0], f"case={row['name']}", metric, aggregation]["value"]
        return value or 0.0, row["name"]

    limit = CASES_MAX * len(methods)
    return {
        "columns": shown,
        "by": metric,
        "rows": rows["dataset"] + rows["score"],
        "cases": sorted(rows["case"], key=order)[:limit],
        "cases_left": max(0, len(rows["case"]) - limit) // len(methods),
    }


def _examples(
    examples: Sequence[Example], rows: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], str]:
    """Return the cards of the gallery up to the limit of bytes, and a note when it is reached."""
    album = pictures.Album(PICTURE_BYTES)
    cards: list[dict[str, Any]] = []
    for example in examples:
        images = {"H&E": example.he, "HER2, real": example.her2}
        images |= {f"HER2, {name}": image for name, image in example.generated.items()}
        images["positive, truth"] = pictures.labelled(example.truth)
        images["positive, predicted probability"] = pictures.heat(example.probability)
        addresses = album.take(images, PICTURE_SIDE_PX)
        if not addresses:
            note = f"{len(cards)} of {len(examples)} tiles are shown: the page is limited to 30 MB."
            return cards, note
        values = []
        for row in rows:
            if row["tile"] == example.tile and row["method"] in example.generated:
                values += [
                    (f"{METRICS[metric].name}, {row['method']}", metric, row[metric])
                    for metric in ("psnr_db", "ssim")
                ]
            elif row["tile"] == example.tile and row["method"] == SEGMENTER:
                of_tile = scores(confusion(row))
                values += [
                    (METRICS[metric].name, metric, of_tile[metric]) for metric in ("f1", "iou")
                ]
        cards.append(
            {
                "tile": example.tile,
                "about": f"{example.dataset}, case {example.case}, "
                f"score {score_name(example.score)}",
                "label": example.label,
                "images": addresses,
                "values": [
                    *(
                        (name, fixed(value, METRICS[metric].digits), False)
                        for name, metric, value in values
                    ),
                    ("positive in truth", percent(float(example.truth.mean())), False),
                ],
            }
        )
    return cards, ""
