"""Metrics of groups of test tiles, from rows of single tiles, with intervals over cases."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from hemera import tables
from hemera.config import EvaluateOptions
from hemera.dataset.statistics import Frame
from hemera.evaluation import metrics, perceptual, stain_quality
from hemera.evaluation.image_quality import (
    CONSTANTS,
    COUNTS,
    IMAGE_METRICS,
    REAL,
    SEGMENTER,
    Features,
    Rows,
)
from hemera.evaluation.metrics import Bootstrap, Summary
from hemera.masks import her2_score

Floats = npt.NDArray[np.float64]
Summaries = dict[tuple[str, str], Summary]
"""By metric and aggregation."""

CONFIDENCE = 0.95
"""Level of the confidence intervals."""

COMPARED = (SEGMENTER, "dark")
"""Methods whose difference of F1 has an interval."""


def summarise(
    rows: Sequence[Mapping[str, Any]], features: Features, options: EvaluateOptions
) -> Rows:
    """Return the rows of `tables.METRICS`: all tiles, and each data set, score and case.

    `rows` are of `tables.EVALUATION_TILES`; without `features` there is no FID and KID.
    """
    table = pd.DataFrame(rows, columns=tables.EVALUATION_TILES.names)
    table = table.astype(dict.fromkeys(IMAGE_METRICS, float))
    found: Rows = []
    for (network, group), members in _groups(table):
        methods = dict(list(members.groupby("method", sort=False)))
        # Every method has the same tiles in the same order.
        bootstrap = Bootstrap(
            next(iter(methods.values()))["case"],
            samples=options.bootstrap_samples,
            confidence=CONFIDENCE,
            seed=options.seed,
        )
        if network == "segmentation":
            measured = _segmentation_metrics(methods, bootstrap)
        else:
            measured = {method: _image_metrics(own, bootstrap) for method, own in methods.items()}
            # One case has too few tiles to compare sets.
            if features and not group.startswith("case="):
                for method, own in methods.items():
                    if method == REAL:
                        continue
                    measured[method] |= _set_metrics(own, method, features, options.seed)
        found += [
            {
                "network": network,
                "method": method,
                "group": group,
                "metric": metric,
                "aggregation": aggregation,
                **summary._asdict(),
            }
            for method, values in measured.items()
            for (metric, aggregation), summary in values.items()
        ]
    return found


def _groups(table: Frame) -> Iterator[tuple[tuple[str, str], Frame]]:
    """Yield (network, group) and its tiles; groups are all, dataset=..., score=..., case=...."""
    for network, own in table.groupby("network"):
        yield (network, "all"), own
        for key in ("dataset", "score", "case"):
            for value, members in own.groupby(key):
                yield (network, f"{key}={value}"), members


def _image_metrics(tiles: Frame, bootstrap: Bootstrap) -> Summaries:
    found = {
        (metric, "mean"): metrics.summarise(tiles[metric], bootstrap)
        for metric in IMAGE_METRICS
        if tiles[metric].notna().any()
    }
    infinite = float(np.isinf(tiles["psnr_db"]).sum())
    found["psnr_infinite", "count"] = Summary(infinite, None, len(tiles))
    return found | _stain_metrics(tiles, bootstrap) | _cell_metrics(tiles, bootstrap)


def _stain_metrics(tiles: Frame, bootstrap: Bootstrap) -> Summaries:
    """Return `stain_quality.FIGURES` of all pixels together, and r of the mean DAB of tiles."""
    sums = np.stack(tiles["stain_sums"].tolist())
    of_tiles = stain_quality.tile_moments(sums)
    samples, tile_samples = bootstrap.sums(sums), bootstrap.sums(of_tiles)
    found: Summaries = {}
    for name, figure in stain_quality.FIGURES.items():
        bounds = (None, None) if samples is None else bootstrap.bounds(figure(samples))
        found[name, "pooled"] = _summary(figure(sums.sum(0)), len(tiles), bounds)
    r = stain_quality.correlation
    bounds = (None, None) if tile_samples is None else bootstrap.bounds(r(tile_samples))
    found["dab_r", "tiles"] = _summary(r(of_tiles.sum(0)), len(tiles), bounds)
    return found


def _summary(value: Floats, tiles: int, bounds: tuple[float | None, float | None]) -> Summary:
    defined = bool(np.isfinite(value))
    return Summary(float(value) if defined else None, None, tiles, *bounds)


def _cell_metrics(tiles: Frame, bootstrap: Bootstrap) -> Summaries:
    """Return F1 of positive cells, and the fraction of cases in which both have one HER2 score.

    F1 is undefined where no cell of the real images is positive. The positive fraction of cells is
    that on the tiles whose real image has no positive cell.
    """
    compared = tiles[tiles["matched_cells"].notna()]
    if compared.empty:
        return {}
    # Zero for tiles that were not compared: the samples are of all cases.
    counts = tiles[["matched_cells", "positive_cells", "positive_cells_real"]].fillna(0)
    empty = tiles["positive_cells_real"] == 0
    cells = tiles["cells"].map(lambda each: np.sum(each) if isinstance(each, list) else 0)
    of_empty = np.stack([counts["positive_cells"] * empty, cells * empty], axis=1)

    def f1(sums: Floats) -> Floats:
        return metrics.ratio(2 * sums[..., 0], (sums[..., 1] + sums[..., 2]) * (sums[..., 2] > 0))

    scores = read_scores(compared)
    equal = (scores["generated"] == scores["real"]).to_numpy(float)
    return {
        ("cell_f1", "pooled"): metrics.of_sums(counts.to_numpy(), f1, len(compared), bootstrap),
        ("cell_false_positive_fraction", "empty"): metrics.of_sums(
            of_empty, _quotient, int(empty.sum()), bootstrap
        ),
        ("cell_score", "cases"): Summary(
            float(equal.mean()) if equal.size else None, None, len(compared)
        ),
    }


def _quotient(sums: Floats) -> Floats:
    return metrics.ratio(sums[..., 0], sums[..., 1])


def read_scores(tiles: Frame) -> Frame:
    """Return the HER2 scores of `her2_score.CLASSES` by case, read from the cells of both images.

    `tiles` are rows of one method with compared cells; the result has columns generated and real,
    -1 for a generated case without cells, and no cases without cells on the real images.
    """
    by_case = tiles.groupby("case")[["cells", "cells_real"]].agg(
        lambda column: np.sum(column.tolist(), axis=0)
    )
    by_case = by_case[by_case["cells_real"].map(np.sum) > 0]
    read = {
        name: her2_score.her2_scores(np.array(by_case[column].tolist(), np.int64).reshape(-1, 4))
        for name, column in (("generated", "cells"), ("real", "cells_real"))
    }
    return pd.DataFrame(read, index=by_case.index)


def _set_metrics(tiles: Frame, method: str, features: Features, seed: int) -> Summaries:
    """Return FID and KID of one method's tiles; without a value for fewer than two tiles."""
    generated, real = (
        np.stack([features[tile][name] for tile in tiles["tile"]]) for name in (method, REAL)
    )
    return {
        ("fid", "set"): Summary(perceptual.frechet_distance(generated, real), None, len(tiles)),
        ("kid", "set"): perceptual.kernel_distance(generated, real, seed=seed),
    }


def _segmentation_metrics(
    methods: Mapping[str, Frame], bootstrap: Bootstrap
) -> dict[str, Summaries]:
    measured = {}
    for method, tiles in methods.items():
        counts = tiles[list(COUNTS)].to_numpy(np.int64)
        measured[method] = metrics.aggregate(counts, bootstrap)
        measured[method] |= _false_alarms(counts, bootstrap)
    if set(COMPARED) <= set(methods):
        measured[SEGMENTER] |= _over_darkness(methods, bootstrap)
    measured["best_constant"] = {
        key: max(
            (measured[method][key] for method in CONSTANTS),
            key=lambda each: -math.inf if each.value is None else each.value,
        )
        for key in measured[CONSTANTS[0]]
        if key[0] in metrics.SEGMENTATION_METRICS
    }
    return measured


def _over_darkness(methods: Mapping[str, Frame], bootstrap: Bootstrap) -> Summaries:
    """Return pooled F1 of SegmentationNet minus that of the threshold on darkness."""
    counts = np.hstack([methods[name][list(COUNTS)].to_numpy(np.int64) for name in COMPARED])
    difference = metrics.of_sums(counts, metrics.f1_difference, len(counts), bootstrap)
    return {("f1_over_dark", "pooled"): difference}


def _false_alarms(counts: npt.NDArray[np.int64], bootstrap: Bootstrap) -> Summaries:
    """Return the positive fraction of tiles with empty truth, whose F1 is 0 or 1; counts (T, 4)."""
    empty = counts[:, 0] + counts[:, 2] == 0
    columns = np.stack([counts[:, 1] * empty, (counts[:, 1] + counts[:, 3]) * empty], axis=1)
    found = metrics.of_sums(columns, _quotient, int(empty.sum()), bootstrap)
    return {("false_positive_fraction", "empty"): found}
