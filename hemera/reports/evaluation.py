"""The page about the networks: metrics next to baselines and published results, examples."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from hemera import tables
from hemera.config import EvaluateOptions
from hemera.dataset.statistics import Frame
from hemera.evaluation import published, summary
from hemera.evaluation.image_quality import COUNTS, REAL, SEGMENTER
from hemera.evaluation.metrics import SEGMENTATION_METRICS, pooled_rate
from hemera.evaluation.stain_quality import BROWN_DENSITY
from hemera.masks.her2_score import CLASSES
from hemera.reports import pictures
from hemera.reports.data import NETWORKS
from hemera.reports.html import fixed, percent, write_page
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
    "dab_r": Metric("r of DAB", 3),
    "dab_concordance": Metric("concordance of DAB", 3),
    "dab_ratio": Metric("DAB, generated / real", 2),
    "dab_kl": Metric("KL divergence of DAB from real", 3, higher=False),
    "brown_fraction_real": Metric("brown fraction of the real images", 3),
    "brown_ratio": Metric("DAB of brown pixels, generated / real", 2),
    "brown_dice": Metric("Dice of brown", 3),
    "brown_dice_8": Metric("Dice of brown within 8 px", 3),
    "brown_dice_32": Metric("Dice of brown within 32 px", 3),
    "brown_precision": Metric("precision of brown", 3),
    "brown_precision_8": Metric("precision of brown within 8 px", 3),
    "brown_precision_32": Metric("precision of brown within 32 px", 3),
    "brown_recall": Metric("recall of brown", 3),
    "brown_recall_8": Metric("recall of brown within 8 px", 3),
    "brown_recall_32": Metric("recall of brown within 32 px", 3),
    "red_positive": Metric("red minus blue, positive pixels", 1),
    "red_other": Metric("red minus blue, other pixels", 1, higher=False),
    "cell_f1": Metric("F1 of positive cells", 3),
    "cell_false_positive_fraction": Metric(
        "positive fraction of cells where no real cell is", 4, higher=False
    ),
    "cell_score": Metric("fraction of cases with the score of the real image", 2),
    "precision": Metric("precision", 3),
    "recall": Metric("recall", 3),
    "f1": Metric("F1", 3),
    "iou": Metric("IoU", 3),
    "f1_over_dark": Metric("F1 minus that of the threshold on darkness", 3),
    "false_positive_fraction": Metric("false positives where none is", 4, higher=False),
    "branch_changed": Metric("answers that change", 4),
    "branch_f1_change": Metric("change of F1", 4),
}
IMAGE_COLUMNS = ("psnr_db", "ssim", "ssim_gaussian", "lpips", "fid", "kid")
STAIN_ROWS = (
    ("dab_r", "pooled"), ("dab_r", "tiles"), ("dab_ratio", "pooled"), ("dab_kl", "pooled"),
    ("brown_fraction_real", "pooled"), ("brown_ratio", "pooled"),
    ("brown_dice", "pooled"), ("brown_dice_8", "pooled"), ("brown_dice_32", "pooled"),
    ("brown_precision", "pooled"), ("brown_precision_8", "pooled"),
    ("brown_precision_32", "pooled"),
    ("brown_recall", "pooled"), ("brown_recall_8", "pooled"), ("brown_recall_32", "pooled"),
    ("red_positive", "pooled"), ("red_other", "pooled"),
    ("cell_f1", "pooled"), ("cell_false_positive_fraction", "empty"), ("cell_score", "cases"),
)  # fmt: skip
"""Rows of the table of the stain: metric and aggregation."""
BROWN_RATIO_MIN = 0.25
"""A generator with less DAB in brown pixels, as a fraction of that of the real images, has no
stain. Other pixels do not count: gray has a DAB density."""
BROWN_FRACTION_MIN = 0.001
"""Smallest brown fraction of the real images on which the stain of a generator is assessed."""
CELL_AGREEMENT_MIN = 0.5
"""Smallest F1 of positive cells, and fraction of cases with the HER2 score of the real image, above
which the page has no warning."""
BRANCH_CHANGED_MIN = 0.02
"""SegmentationNet uses its branch when that of another tile changes so many of its answers, and F1
for the worse."""
SWAPS = {
    "other_tile": "that of a tile of another case",
    "zeros": "zeros",
    "real_her2": "that of the real HER2 image",
}
NO_BROWN = "fewer than 0.1 % of the pixels of the real images are brown"
BASELINES = {
    "mean_colour": "mean colour of the training tiles",
    "blurred": "blurred H&E in the colours of HER2",
    "all_positive": "every pixel positive",
    "all_negative": "no pixel positive",
    "best_constant": "the better of both constants",
    "dark": "darkness of blurred H&E, threshold fitted to training tiles",
}
COMPARED_BASELINES = ("mean_colour", "blurred", "best_constant", "dark")
"""Baselines that a network should exceed."""
AGGREGATIONS = {
    "pooled": "all pixels of all tiles together",
    "mean": "mean over tiles; 1 where truth and prediction are both empty",
    "mean_nonempty": "mean over tiles with a positive pixel in truth",
}
HEADLINE = (
    ("generation", "dab_r", "pooled"),
    ("generation", "brown_dice", "pooled"),
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
    scores = _score_tables(rows, trained)
    content = {
        "title": "HEMERA: evaluation of the networks",
        "preset": preset,
        "report": report,
        "metrics": METRICS,
        "names": NETWORKS,
        "labels": BASELINES | {REAL: "real image"} | {each.name: each.label for each in trained},
        "aggregations": AGGREGATIONS,
        "headline": HEADLINE,
        "stain_rows": STAIN_ROWS,
        "unstained": _unstained(table, trained),
        "scores": scores,
        "other_cells": _other_cells(table, scores, trained),
        "swaps": SWAPS,
        "branch": _branch(trained),
        "unused": _unused_branch(table),
        "classes": CLASSES,
        "brown_density": BROWN_DENSITY,
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
    table = table.astype(dict.fromkeys(("value", "low", "high"), float)).set_index(key)
    higher = table.index.get_level_values("metric").map(
        lambda name: 1 if name not in METRICS or METRICS[name].higher else -1
    )
    quality = table["value"] * higher
    groups = quality.groupby(level=key)
    best = (quality == groups.transform("max")) & (groups.transform("count") > 1)
    ordered = table.assign(quality=quality).sort_values(["quality", "method"])
    baselines = ordered[ordered["method"].isin(COMPARED_BASELINES)]
    baselines = baselines.dropna(subset="value")
    baselines = baselines[~baselines.index.duplicated(keep="last")]
    compared = baselines["method"].rename("baseline"), baselines["value"].rename("baseline_value")
    return table.assign(best=best).join(list(compared))


def _unstained(table: Frame, trained: Sequence[Trained]) -> list[tuple[str, str]]:
    """Return a kind of warning and its text for each generator without a stain.

    See `BROWN_RATIO_MIN` and `BROWN_FRACTION_MIN`.
    """
    rows = table.set_index("method", append=True).to_dict("index")
    found = []
    for each in (each for each in trained if each.network == "generation"):
        real, ratio, r = (
            rows.get(("generation", "all", name, "pooled", each.name))
            for name in ("brown_fraction_real", "brown_ratio", "dab_r")
        )
        if real is None or ratio is None or r is None:
            continue
        if not real["value"] >= BROWN_FRACTION_MIN:
            found.append(("care", f"{each.label}: its stain is not assessed: {NO_BROWN}"))
            continue
        # A baseline without any DAB correlates with nothing.
        baseline = 0.0 if math.isnan(r["baseline_value"]) else r["baseline_value"]
        if ratio["value"] < BROWN_RATIO_MIN:
            fault = f"generates {ratio['value']:.0%} of the brown of the real images"
        elif not r["value"] > baseline:
            fault = (
                f"its DAB correlates with that of the real images with r {r['value']:.3f}, not "
                f"more than the best trivial baseline, {baseline:.3f}"
            )
        else:
            continue
        found.append(("stop", f"{each.label}: no usable stain, whatever its SSIM: {fault}"))
    return found


def _branch(trained: Sequence[Trained]) -> str:
    """Return the generation branch of SegmentationNet, or none."""
    model = next(
        each.metadata.get("model", {}) for each in trained if each.network == "segmentation"
    )
    # Metadata of early versions lack the only branch of theirs.
    return "none" if model.get("generation", "") is None else str(model.get("branch", "skip16"))


def _unused_branch(table: Frame) -> str:
    """Return in what way SegmentationNet does not use its branch; empty: it does, or not known."""
    rows = table.set_index("method", append=True).to_dict("index")
    key = ("other_tile", SEGMENTER)
    changed, f1 = (
        rows.get(("segmentation", "all", name, *key))
        for name in ("branch_changed", "branch_f1_change")
    )
    # Without a positive pixel in truth there is no F1.
    if changed is None or f1 is None or math.isnan(f1["value"]):
        return ""
    bounded = not (math.isnan(f1["low"]) or math.isnan(f1["high"]))
    worse = f1["high"] < 0 if bounded else f1["value"] < 0
    if changed["value"] >= BRANCH_CHANGED_MIN and worse:
        return ""
    value, low, high = (fixed(f1[name], 4) for name in ("value", "low", "high"))
    return (
        f"the branch of another tile changes {percent(changed['value'], 2)} of the answers, and F1 "
        f"by {value}" + (f", 95 % interval {low} to {high}" if bounded else "")
    )


def _score_tables(tiles: Frame, trained: Sequence[Trained]) -> dict[str, Any]:
    """Return, by generator, the cases by score read from real (row) and generated cells.

    The first column has the cases without cells on the generated images.
    """
    compared = tiles[tiles["matched_cells"].notna()]
    found = {}
    for each in trained:
        own = compared[compared["method"] == each.name]
        if own.empty:
            continue
        scores = summary.read_scores(own)
        counts = pd.crosstab(scores["real"], scores["generated"])
        every = range(len(CLASSES))
        counts = counts.reindex(index=every, columns=range(-1, len(CLASSES)), fill_value=0)
        found[each.name] = counts.to_numpy()
    return found


def _other_cells(
    table: Frame, scores: Mapping[str, npt.NDArray[np.int64]], trained: Sequence[Trained]
) -> list[str]:
    """Return in what way the cells of generators differ from those of the real images.

    `scores` are those of `_score_tables`. See `CELL_AGREEMENT_MIN`.
    """
    f1s = table["value"].set_axis(table.set_index("method", append=True).index)
    found = []
    for each in (each for each in trained if each.name in scores):
        f1 = f1s.get(("generation", "all", "cell_f1", "pooled", each.name), math.nan)
        counts = scores[each.name]
        equal, cases = int(np.trace(counts, offset=1)), int(counts.sum())
        if f1 < CELL_AGREEMENT_MIN or equal < CELL_AGREEMENT_MIN * cases:
            words = [] if math.isnan(f1) else [f"F1 of positive cells is {f1:.2f}"]
            words.append(f"{equal} of {cases} cases have the HER2 score of the real image")
            found.append(
                f"{each.label}: its cells are not those of the real images: " + ", ".join(words)
            )
    return found


def _section(network: str, table: Frame, trained: Sequence[Trained]) -> dict[str, Any]:
    """Return the methods, metrics and groups that a section of the page shows, in order."""
    by, aggregation = ("ssim", "mean") if network == "generation" else ("f1", "pooled")
    own = table[table.index.get_level_values("network") == network].reset_index()
    methods = [each.name for each in trained if each.network == network]
    present = set(own["metric"])
    first = own[(own["method"] == methods[0]) & (own["metric"] == by)]
    first = first[first["aggregation"] == aggregation].sort_values(
        ["value", "group"], na_position="last"
    )
    is_case = first["group"].str.startswith("case=")
    is_group = ~is_case & (first["group"] != "all")
    return {
        "methods": methods,
        "baselines": [name for name in BASELINES if name in set(own["method"])],
        "columns": [name for name in (*IMAGE_COLUMNS, *SEGMENTATION_METRICS) if name in present],
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
    counts = segmented[list(COUNTS)].to_numpy(float)
    segmented = segmented.assign(**{name: pooled_rate(name, counts) for name in ("f1", "iou")})
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
