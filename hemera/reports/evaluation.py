"""The page about the networks: metrics next to baselines and published results, examples."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from hemera import tables
from hemera.config import EvaluateOptions
from hemera.dataset.statistics import Frame
from hemera.evaluation import published
from hemera.evaluation.image_quality import COUNTS, SEGMENTER
from hemera.evaluation.metrics import rates
from hemera.reports import pictures
from hemera.reports.data import NETWORKS
from hemera.reports.html import write_page
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
COMPARED_BASELINES = ("mean_colour", "blurred", "best_constant")
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
    """A tile shown on the page: images (H, W, 3) and masks (H, W) of one size."""

    tile: str
    case: str
    dataset: str
    score: str
    label: str
    """Why it is shown: its rank and metric."""
    he: RGB
    her2: RGB
    generated: Mapping[str, RGB]
    """By generator."""
    truth: npt.NDArray[np.bool_]
    probability: npt.NDArray[np.float32]
    """SegmentationNet's, 0 to 1."""


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
    """Write the page: rows of `tables.METRICS` and `tables.EVALUATION_TILES`, and examples.

    `trained` are the configured generator, other generators, SegmentationNet; `report` is the
    relative link to the page about the data.
    """
    table = _compared(pd.DataFrame(metrics, columns=tables.METRICS.names))
    rows = pd.DataFrame(tiles, columns=tables.EVALUATION_TILES.names)
    tested = rows.groupby("network")[["tile", "case"]].nunique()
    content = {
        "title": "HEMERA: evaluation of the networks",
        "preset": preset,
        "report": report,
        "metrics": METRICS,
        "names": NETWORKS,
        "labels": BASELINES | {each.name: each.label for each in trained},
        "aggregations": AGGREGATIONS,
        "headline": HEADLINE,
        "found": {(*row.Index, row.method): row for row in table.itertuples()},
        "tested": tested.reindex(list(NETWORKS), fill_value=0),
        "sections": {network: _section(network, table, trained) for network in NETWORKS},
        "cards": _cards(examples, rows),
        "examples": len(examples),
        "trained": trained,
        "settings": options,
        "index": index_metadata,
        "licences": json.loads(index_metadata.get("licences", "[]")),
    }
    write_page(path, "evaluate.html", content)


def _compared(table: Frame) -> Frame:
    """Return the metrics by network, group, metric and aggregation, with a comparison.

    `best` marks the best of several methods; `baseline` and `baseline_value` are the best baseline.
    """
    key = ["network", "group", "metric", "aggregation"]
    table["group"] = table["group"].replace("score=", "score=unknown")
    table = table.astype({"value": float}).set_index(key)
    higher = table.index.get_level_values("metric").map(
        lambda name: 1 if name not in METRICS or METRICS[name].higher else -1
    )
    quality = table["value"] * higher
    groups = quality.groupby(level=key)
    best = (quality == groups.transform("max")) & (groups.transform("count") > 1)
    baselines = table[table["method"].isin(COMPARED_BASELINES)].sort_values(["value", "method"])
    baselines = baselines.dropna(subset="value")
    baselines = baselines[~baselines.index.duplicated(keep="last")]
    compared = baselines["method"].rename("baseline"), baselines["value"].rename("baseline_value")
    return table.assign(best=best).join(list(compared))


def _section(network: str, table: Frame, trained: Sequence[Trained]) -> dict[str, Any]:
    """Return the methods, metrics and groups that a section of the page shows, in order."""
    by, aggregation = ("ssim", "mean") if network == "generation" else ("f1", "pooled")
    own = table[table.index.get_level_values("network") == network].reset_index()
    methods = [each.name for each in trained if each.network == network]
    present = set(own["metric"])
    first = own[(own["method"] == methods[0]) & (own["metric"] == by)]
    first = first[first["aggregation"] == aggregation].sort_values(
        ["value", "group"], na_position="first"
    )
    is_case = first["group"].str.startswith("case=")
    is_group = ~is_case & (first["group"] != "all")
    return {
        "methods": methods,
        "baselines": [name for name in BASELINES if name in set(own["method"])],
        "columns": [name for name in METRICS if name in present],
        "by": by,
        "aggregation": aggregation,
        "groups": sorted(first["group"][is_group]),
        "cases": first["group"][is_case].tolist()[:CASES_MAX],
        "cases_left": max(0, int(is_case.sum()) - CASES_MAX),
        "published": published.results(network),
        "published_metrics": published.METRICS[network],
    }


def _cards(examples: Sequence[Example], rows: Frame) -> list[dict[str, Any]]:
    """Return the cards of the gallery up to the limit of bytes."""
    segmented = rows[rows["method"] == SEGMENTER]
    segmented = segmented.assign(**rates(segmented[list(COUNTS)].to_numpy(float)))
    album = pictures.Album(PICTURE_BYTES)
    cards: list[dict[str, Any]] = []
    for example in examples:
        images = {"H&E": example.he, "HER2, real": example.her2}
        images |= {f"HER2, {name}": image for name, image in example.generated.items()}
        images["positive, truth"] = pictures.labelled(example.truth)
        images["positive, predicted probability"] = pictures.heat(example.probability)
        addresses = album.take(images, PICTURE_SIDE_PX)
        if not addresses:
            break
        own = rows[(rows["tile"] == example.tile) & rows["method"].isin(example.generated)]
        cards.append(
            {
                "example": example,
                "images": addresses,
                "generated": own,
                "segmented": segmented[segmented["tile"] == example.tile],
            }
        )
    return cards
