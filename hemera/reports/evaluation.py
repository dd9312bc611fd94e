"""The page about the networks: curves, metrics beside baselines and papers, pictures."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hemera.config import STAGES, EvaluateOptions, JudgingOptions
from hemera.evaluation.metrics import SEGMENTATION_METRICS, Confusion, scores
from hemera.evaluation.published import PAPERS
from hemera.reports import charts, pictures
from hemera.reports.data import NETWORKS, option_rows, score_name, score_order
from hemera.reports.html import count, fixed, percent, plural, write_page

RGB = npt.NDArray[np.uint8]

PICTURE_BYTES = 24_000_000
"""What the pictures may take of the page's 30 MB."""
PICTURE_SIDE_PX = 448
CASES_MAX = 50

METHODS = {
    "model": "the network",
    "mean_colour": "mean colour of the training tiles",
    "blurred": "blurred H&E in the colours of HER2",
    "all_positive": "everything positive",
    "all_negative": "nothing positive",
    "best_constant": "the better of both constants",
}
TRIVIAL = {"generation": ("mean_colour", "blurred"), "segmentation": ("best_constant",)}
AGGREGATION_WORDS = {
    "pooled": "all pixels of all tiles in one",
    "mean": "mean over tiles; 1 where truth and answer are both empty",
    "mean_nonempty": "mean over tiles with a positive pixel in truth",
}
METRIC_WORDS = {
    "psnr_db": ("PSNR, dB", 2),
    "ssim": ("SSIM", 3),
    "ssim_gaussian": ("SSIM, Gaussian", 3),
    "lpips": ("LPIPS", 3),
    "fid": ("FID", 2),
    "kid": ("KID", 4),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "f1": ("F1", 3),
    "iou": ("IoU", 3),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One tile shown on the page, all images of one size (H, W).

    What a network was not asked about this tile is None.
    """

    tile: str
    case: str
    dataset: str
    score: str
    label: str
    """Why it is shown: best, median, worst, drawn by seed."""
    he: RGB
    """(H, W, 3)."""
    her2: RGB
    """(H, W, 3), the real one."""
    generated: RGB | None = None
    """(H, W, 3), GenerationNet's HER2."""
    truth: npt.NDArray[np.bool_] | None = None
    """(H, W), the positive mask."""
    probability: npt.NDArray[np.float32] | None = None
    """(H, W), SegmentationNet's, 0 to 1."""
    values: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    """Metrics of this tile by their names in METRICS: psnr_db, ssim, f1, iou."""


def evaluation_page(
    path: Path,
    *,
    preset: str,
    metrics: pa.Table,
    tiles: pa.Table,
    histories: Mapping[str, pa.Table],
    metadata: Mapping[str, Mapping[str, Any]],
    index_metadata: Mapping[str, str],
    examples: Sequence[Example],
    options: EvaluateOptions,
    report: str,
) -> None:
    """Write the page.

    Args:
        path: the page.
        preset: preset of the cohort; ``demo`` puts a banner on the page.
        metrics: `tables.METRICS`; no row where a network has no test tile.
        tiles: `tables.EVALUATION_TILES`.
        histories: `tables.HISTORY` of ``generation`` and of ``segmentation``.
        metadata: the JSON beside the weights of ``generation`` and of ``segmentation``.
        index_metadata: the key-value metadata of the index.
        examples: tiles shown, in this order.
        options: what evaluate ran with.
        report: relative link from the page to the page about the data.
    """
    found = _lookup(metrics)
    tested = {network: _tested(tiles, network) for network in NETWORKS}
    shown = {network: _shown(found, network) for network in NETWORKS}
    cards, note = _examples(examples)
    content = {
        "title": "HEMERA: what the networks do",
        "preset": preset,
        "report": report,
        "headline": _headline(found, tested, options),
        "warnings": _warnings(found, tested, metadata),
        "networks": [
            {
                "key": network,
                "name": name,
                "table": _method_rows(found, network, shown[network]),
                "columns": [METRIC_WORDS[metric][0] for metric, _ in shown[network]],
                "groups": _group_rows(found, network),
                "papers": PAPERS[network],
                "paper_columns": [METRIC_WORDS[metric][0] for metric in PAPER_METRICS[network]],
                "notes": judging_notes(
                    options,
                    tested[network]["cases"],
                    None if network == "segmentation" else tested[network]["tiles"],
                ),
                "curves": _curves(histories.get(network), metadata.get(network, {})),
                "training": _training(network, metadata.get(network, {})),
                "spread": _spread(tiles, network),
                "tested": tested[network],
            }
            for network, name in NETWORKS.items()
        ],
        "aggregations": AGGREGATION_WORDS,
        "examples": cards,
        "examples_note": note,
        "threshold": options.threshold,
        "options": option_rows("evaluate", options.model_dump()),
        "fingerprint": index_metadata.get("fingerprint", ""),
        "target": index_metadata.get("mask_target", ""),
        "licences": json.loads(index_metadata.get("licences", "[]")),
    }
    write_page(path, "evaluate.html", content)


_Lookup = Mapping[tuple[str, str, str, str, str], Mapping[str, Any]]


def _lookup(metrics: pa.Table) -> _Lookup:
    return {
        (row["network"], row["method"], row["group"], row["metric"], row["aggregation"]): row
        for row in metrics.to_pylist()
    }


def _value(
    found: _Lookup, network: str, method: str, metric: str, aggregation: str, group: str = "all"
) -> float | None:
    row = found.get((network, method, group, metric, aggregation))
    return None if row is None else row["value"]


def _tested(tiles: pa.Table, network: str) -> dict[str, int]:
    rows = [
        (tile, case)
        for tile, case, own, method in zip(
            *(tiles.column(name).to_pylist() for name in ("tile", "case", "network", "method")),
            strict=True,
        )
        if own == network and method == "model"
    ]
    return {"tiles": len(rows), "cases": len({case for _, case in rows})}


def _best_trivial(
    found: _Lookup, network: str, metric: str, aggregation: str
) -> tuple[str, float] | None:
    """Return the best of the baselines and its value, None where there is none."""
    values = [
        (value, method)
        for method in TRIVIAL[network]
        if (value := _value(found, network, method, metric, aggregation)) is not None
    ]
    return None if not values else (max(values)[1], max(values)[0])


_JUDGED = (
    ("generation", "psnr_db", "mean"),
    ("generation", "ssim", "mean"),
    ("segmentation", "f1", "pooled"),
    ("segmentation", "iou", "pooled"),
)


def _headline(
    found: _Lookup, tested: Mapping[str, Mapping[str, int]], options: JudgingOptions
) -> list[dict[str, str]]:
    cards = []
    for network, metric, aggregation in _JUDGED:
        value = _value(found, network, "model", metric, aggregation)
        words, digits = METRIC_WORDS[metric]
        row = found.get((network, "model", "all", metric, aggregation))
        between = "" if row is None else interval(row, digits)
        trivial = _best_trivial(found, network, metric, aggregation)
        cards.append(
            {
                "value": fixed(value, digits),
                "of": f"{words}, {NETWORKS[network]}"
                + (" (pooled)" if aggregation == "pooled" else ""),
                "more": (
                    "no test tile"
                    if value is None
                    else f"on {plural(tested[network]['tiles'], 'tile')} of "
                    f"{plural(tested[network]['cases'], 'unseen case')}"
                )
                + (f"; {100 * options.confidence:g} % interval {between}" if between else "")
                + (
                    f"; best baseline {fixed(trivial[1], digits)} ({METHODS[trivial[0]]})"
                    if trivial is not None
                    else ""
                ),
            }
        )
    return cards


def _warnings(
    found: _Lookup,
    tested: Mapping[str, Mapping[str, int]],
    metadata: Mapping[str, Mapping[str, Any]],
) -> list[dict[str, str]]:
    made: list[dict[str, str]] = []
    for network, name in NETWORKS.items():
        if not tested[network]["tiles"]:
            made.append(
                {
                    "level": "stop",
                    "words": f"{name} was tested on no tile: its test part is empty; see the "
                    "splits on the page about the data.",
                    "link": "",
                }
            )
    for network, metric, aggregation in _JUDGED:
        value = _value(found, network, "model", metric, aggregation)
        trivial = _best_trivial(found, network, metric, aggregation)
        if value is None or trivial is None or value > trivial[1]:
            continue
        words, digits = METRIC_WORDS[metric]
        made.append(
            {
                "level": "care",
                "words": f"{NETWORKS[network]} does not beat a trivial answer by {words}: "
                f"{fixed(value, digits)} against {fixed(trivial[1], digits)} of "
                f"{METHODS[trivial[0]]}.",
                "link": network,
            }
        )
    infinite = _value(found, "generation", "model", "psnr_infinite", "count")
    if infinite:
        made.append(
            {
                "level": "care",
                "words": f"{plural(int(infinite), 'tile')} equal to the real one and left out of "
                "the mean of PSNR.",
                "link": "generation",
            }
        )
    prints = {
        str(described["index_fingerprint"])
        for described in metadata.values()
        if described.get("index_fingerprint")
    }
    if len(prints) > 1:
        made.append(
            {
                "level": "care",
                "words": "The two networks were trained on different indexes.",
                "link": "training",
            }
        )
    return made


def judging_notes(options: JudgingOptions, cases: int, tiles: int | None) -> list[str]:
    """Return what a reader of metrics must know of how they were judged, or why they are lacking.

    Args:
        options: how they were.
        cases: of the test tiles.
        tiles: how many pictures FID and KID are of; None: no pictures were judged.
    """
    notes = []
    share = f"{100 * options.confidence:g} %"
    if not options.bootstrap_samples:
        notes.append(f"No intervals: {options.section}.bootstrap_samples is 0.")
    elif cases < 2:
        notes.append(
            "No intervals: they come from drawing cases again, and all test tiles are of one case."
        )
    else:
        notes.append(
            f"Below a value stands its {share} interval, from drawing the {count(cases)} cases "
            f"again {plural(options.bootstrap_samples, 'time')}. Where a data set names no "
            "patients, as BCI does not, each image counts as a case and intervals are too narrow."
        )
    if tiles is None:
        return notes
    if options.lpips_weights is None:
        notes.append(
            f"LPIPS is not measured: {options.section}.lpips_weights names no file of AlexNet's "
            "weights."
        )
    else:
        notes.append("LPIPS by AlexNet, mean over tiles; lower is better.")
    if options.fid_weights is None:
        notes.append(
            f"FID and KID are not measured: {options.section}.fid_weights names no file of "
            "InceptionV3's weights."
        )
    elif tiles < 2:
        notes.append("FID and KID are not measured: they compare sets of two tiles or more.")
    else:
        notes.append(
            "FID and KID by 2,048 features of InceptionV3, of the number N of tiles below them; "
            "lower is better. FID grows as N shrinks: compare it only at equal N, and below some "
            "2,048 tiles not at all with those of papers; KID does not."
        )
    return notes


_GENERATION = ("psnr_db", "ssim", "ssim_gaussian", "lpips")
PAPER_METRICS = {"generation": ("psnr_db", "ssim", "fid"), "segmentation": SEGMENTATION_METRICS}
"""What the figures of `hemera.anchors` are of."""


def _shown(found: _Lookup, network: str) -> list[tuple[str, str]]:
    """Return metric and aggregation of the columns of a network's table, as far as measured.

    For masks every row has an aggregation of its own; the word here is empty.
    """
    if network == "segmentation":
        return [(metric, "") for metric in SEGMENTATION_METRICS]
    columns = [*((metric, "mean") for metric in _GENERATION), ("fid", "set"), ("kid", "set")]
    always = _GENERATION[:3]
    return [
        (metric, aggregation)
        for metric, aggregation in columns
        if metric in always or (network, "model", "all", metric, aggregation) in found
    ]


def cell(row: Mapping[str, Any] | None, metric: str) -> dict[str, str]:
    """Return how a row of METRICS stands in a table: the value, and what stands small below it."""
    digits = METRIC_WORDS[metric][1]
    if row is None or row["value"] is None:
        return {"text": fixed(None), "below": ""}
    text = fixed(row["value"], digits)
    if row["deviation"] is not None:
        text += f" ± {fixed(row['deviation'], digits)}"
    below = interval(row, digits)
    return {
        "text": text,
        "below": f"N {count(row['tiles'])}" if metric in ("fid", "kid") else below,
    }


def interval(row: Mapping[str, Any], digits: int) -> str:
    """Return the interval of a row of METRICS in words, empty where it has none."""
    if row["low"] is None or row["high"] is None:
        return ""
    return f"{fixed(row['low'], digits)} to {fixed(row['high'], digits)}"


def _method_rows(
    found: _Lookup, network: str, columns: Sequence[tuple[str, str]]
) -> list[dict[str, Any]]:
    """Return the rows of a network's table: every method, and for masks every aggregation."""
    aggregations = ("mean",) if network == "generation" else tuple(AGGREGATION_WORDS)
    made = []
    present = {key[1] for key in found if key[0] == network and key[2] == "all"}
    for aggregation in aggregations:
        for method in (name for name in METHODS if name in present):
            keys = [(network, method, "all", metric, own or aggregation) for metric, own in columns]
            rows = [found[key] for key in keys if key in found]
            if rows:
                made.append(
                    {
                        "own": method == "model",
                        "method": METHODS[method],
                        "aggregation": aggregation,
                        "cells": [cell(found.get(key), key[3]) for key in keys],
                        "tiles": max(row["tiles"] for row in rows),
                    }
                )
    return made


def _group_rows(found: _Lookup, network: str) -> dict[str, Any]:
    """Return the model's metrics per data set, score and case, with the best baseline's beside."""
    metric, aggregation = ("ssim", "mean") if network == "generation" else ("f1", "pooled")
    shown = ("psnr_db", "ssim") if network == "generation" else ("precision", "recall", "f1", "iou")
    groups = sorted(
        {key[2] for key in found if key[0] == network and "=" in key[2]},
        key=lambda group: (score_order(group.removeprefix("score=")), group),
    )
    rows: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for group in groups:
        kind, _, name = group.partition("=")
        trivial = [
            value
            for method in TRIVIAL[network]
            if (value := _value(found, network, method, metric, aggregation, group)) is not None
        ]
        keys = [(network, "model", group, m, aggregation) for m in shown]
        own = [found[key] for key in keys if key in found]
        if not own:
            continue
        rows[kind].append(
            {
                "kind": "data set" if kind == "dataset" else kind,
                "name": score_name(name) if kind == "score" else name,
                "tiles": max(row["tiles"] for row in own),
                "cells": [cell(found.get(key), key[3]) for key in keys],
                "trivial": fixed(max(trivial), METRIC_WORDS[metric][1]) if trivial else fixed(None),
                "order": _value(found, network, "model", metric, aggregation, group) or 0.0,
            }
        )
    cases = sorted(rows["case"], key=lambda row: (row["order"], row["name"]))
    return {
        "columns": [METRIC_WORDS[m][0] for m in shown],
        "by": METRIC_WORDS[metric][0],
        "rows": rows["dataset"] + rows["score"],
        "cases": cases[:CASES_MAX],
        "cases_left": max(0, len(cases) - CASES_MAX),
    }


def _curves(history: pa.Table | None, described: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a chart of each quantity of a history: losses, metrics, learning rates."""
    if history is None:
        return []
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in history.to_pylist():
        series = lines.setdefault(row["quantity"], {}).setdefault(row["part"], [])
        series.append((row["epoch"], float("nan") if row["value"] is None else row["value"]))
    kept = described.get("epoch")
    mark = ("kept", float(kept)) if kept is not None else None
    return [
        {
            "quantity": quantity,
            "chart": charts.curves(
                f"{quantity} over the epochs",
                {part: series[part] for part in ("train", "val") if part in series},
                mark=mark,
            ),
        }
        for quantity, series in sorted(lines.items(), key=lambda item: (_kind(item[0]), item[0]))
    ]


def _kind(quantity: str) -> int:
    return 2 if "rate" in quantity else 1 if quantity in METRIC_WORDS else 0


def _training(network: str, described: Mapping[str, Any]) -> dict[str, Any]:
    """Return what stands beside the weights, as rows."""
    stage = f"train_{network}"
    facts = []
    for key, words in (
        ("parameters", "parameters"),
        ("parameters_trained", "of these, trained"),
        ("epoch", "epoch kept"),
        ("best_epoch", "best epoch on validation tiles"),
        ("mask_engine", "masks of"),
        ("seed", "seed"),
    ):
        value = described.get(key)
        if value is not None:
            facts.append((words, count(value) if isinstance(value, int) else str(value)))
    for part, tiles in dict(described.get("tiles", {})).items():
        facts.append((f"tiles, {part}", str(tiles)))
    for name, value in dict(described.get("model", {})).items():
        facts.append((name, json.dumps(value) if not isinstance(value, str) else value))
    options = described.get("options", {})
    return {
        "stage": stage,
        "facts": facts,
        "options": option_rows(stage, options) if stage in STAGES else [],
        "versions": dict(described.get("versions", {})),
        "fingerprint": described.get("index_fingerprint", ""),
    }


def _spread(tiles: pa.Table, network: str) -> list[dict[str, Any]]:
    """Return histograms of the network's metrics over tiles."""
    rows = [
        row for row in tiles.to_pylist() if row["network"] == network and row["method"] == "model"
    ]
    if not rows:
        return []
    values: dict[str, list[float]] = collections.defaultdict(list)
    for row in rows:
        if network == "generation":
            for metric in ("psnr_db", "ssim"):
                values[metric].append(float("nan") if row[metric] is None else row[metric])
        else:
            names = ("true_positive", "false_positive", "false_negative", "true_negative")
            each = Confusion(*(int(row[f"{name}_px"] or 0) for name in names))
            # A tile without a positive pixel in truth scores 0 or 1 and says nothing in between.
            if each.true_positive + each.false_negative:
                values["f1"].append(scores(each)["f1"])
    return [
        {
            "title": f"{METRIC_WORDS[metric][0]} per tile"
            + (", tiles with a positive pixel" if metric == "f1" else ""),
            "chart": charts.histogram(
                f"{METRIC_WORDS[metric][0]} per tile",
                [("tiles", charts.BLUE, np.asarray(own, np.float64))],
                unit=METRIC_WORDS[metric][0],
                bins=30,
                span=(0.0, 1.0) if metric != "psnr_db" and min(own) >= 0 else None,
            ),
        }
        for metric, own in values.items()
    ]


def _examples(examples: Sequence[Example]) -> tuple[list[dict[str, Any]], str]:
    """Return the cards of the gallery as long as there is room, and a note when there was not."""
    album = pictures.Album(PICTURE_BYTES)
    cards = []
    for example in examples:
        images = {"H&E": example.he, "HER2, real": example.her2}
        if example.generated is not None:
            images["HER2, generated"] = example.generated
        if example.truth is not None:
            images["positive, truth"] = pictures.labelled(example.truth)
        if example.probability is not None:
            images["positive, predicted probability"] = pictures.heat(example.probability)
        addresses = album.take_all(images, PICTURE_SIDE_PX)
        if not addresses:
            break
        cards.append(
            {
                "tile": example.tile,
                "case": example.case,
                "dataset": example.dataset,
                "score": score_name(example.score),
                "label": example.label,
                "images": addresses,
                "values": [
                    (METRIC_WORDS[name][0], fixed(value, METRIC_WORDS[name][1]))
                    for name, value in example.values.items()
                    if name in METRIC_WORDS
                ]
                + (
                    [("positive in truth", percent(float(example.truth.mean())))]
                    if example.truth is not None
                    else []
                ),
            }
        )
    note = (
        ""
        if len(cards) == len(examples)
        else f"{len(cards)} of {len(examples)} tiles are shown: more would not fit into 30 MB."
    )
    return cards, note
