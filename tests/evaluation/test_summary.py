import math

import numpy as np
import pytest

from hemera.config import EvaluateOptions
from hemera.evaluation import perceptual, summary
from hemera.evaluation.image_quality import CONSTANTS, COUNTS, SEGMENTER
from hemera.evaluation.metrics import Confusion
from tests.small_rows import generated, row

OPTIONS = EvaluateOptions(bootstrap_samples=200)


def summarised(rows, features=None):
    return {
        (entry["group"], entry["metric"], entry["aggregation"]): entry
        for entry in summary.summarise(rows, features or {}, OPTIONS)
    }


def test_an_infinite_psnr_is_counted_and_left_out_of_the_mean():
    values = {"a": 20.0, "b": math.inf, "c": 24.0}
    found = summarised([generated(tile, psnr_db=value) for tile, value in values.items()])
    assert found["all", "psnr_db", "mean"]["value"] == 22
    assert found["all", "psnr_db", "mean"]["tiles"] == 2
    assert found["all", "psnr_infinite", "count"]["value"] == 1
    assert found["all", "ssim", "mean"]["tiles"] == 3


def test_scores_and_cells_are_those_of_the_tiles_that_were_compared():
    """Case a: 3+ on both; case b: no cell is stained on the generated image, 2+ on the real one."""
    cells = {
        "a0": ([0, 0, 0, 9], [0, 0, 0, 8], 9, 8, 7), "a1": ([5, 0, 0, 0], [5, 0, 0, 0], 0, 0, 0),
        "b0": ([9, 0, 0, 0], [5, 0, 4, 0], 0, 4, 0), "c0": None,
    }  # fmt: skip
    names = ("cells", "cells_real", "positive_cells", "positive_cells_real", "matched_cells")
    rows = [
        generated(tile, tile[0]) | (dict(zip(names, counted, strict=True)) if counted else {})
        for tile, counted in cells.items()
    ]
    found = summarised(rows)
    assert found["all", "cell_f1", "pooled"]["value"] == pytest.approx(2 * 7 / (9 + 12))
    assert found["all", "cell_f1", "pooled"]["tiles"] == 3
    assert found["all", "cell_score", "cases"]["value"] == 0.5
    assert found["all", "cell_false_positive_fraction", "empty"]["value"] == 0
    assert ("case=c", "cell_f1", "pooled") not in found


def test_false_alarms_are_counted_where_nothing_is_positive():
    counts = {
        "a": Confusion(0, 10, 0, 90),
        "b": Confusion(0, 0, 0, 100),
        "c": Confusion(5, 50, 5, 40),
    }
    rows = [
        row("segmentation", tile, **dict(zip(COUNTS, count, strict=True))) | {"method": method}
        for method in (SEGMENTER, *CONSTANTS)
        for tile, count in counts.items()
    ]
    found = summarised(rows)
    assert found["all", "false_positive_fraction", "empty"]["value"] == 0.05
    assert found["all", "false_positive_fraction", "empty"]["tiles"] == 2


def test_set_metrics_are_of_the_tiles_of_their_group():
    rng = np.random.default_rng(2)
    real, made = rng.normal(size=(2, 7, 5)).astype(np.float32)
    features = {f"t{k}": {"hemera": made[k], "real": real[k]} for k in range(7)}
    rows = [
        generated(f"t{k}", f"c{k}") | {"score": "3+" if k in (1, 4, 6) else "2+"} for k in range(7)
    ]
    found = summarised(rows, features)
    part = [1, 4, 6]
    entry = found["score=3+", "fid", "set"]
    expected = perceptual.frechet_distance(made[part], real[part])
    assert (entry["value"], entry["tiles"]) == (pytest.approx(expected), 3)
    expected = perceptual.frechet_distance(made, real)
    assert found["all", "fid", "set"]["value"] == pytest.approx(expected)
    assert found["all", "kid", "set"]["tiles"] == 7
    assert ("case=c1", "fid", "set") not in found


def segmented(counts, methods=(SEGMENTER, *CONSTANTS), **facts):
    """Rows of tiles, by name or (name, case), of which every method has the same pixels."""
    return [
        row("segmentation", *(key if isinstance(key, tuple) else (key,)))
        | dict(zip(COUNTS, count, strict=True)) | {"method": method} | facts
        for method in methods
        for key, count in counts.items()
    ]  # fmt: skip


def test_a_group_without_a_positive_pixel_has_false_positives_and_no_f1():
    found = summarised(segmented({"a": Confusion(0, 10, 0, 90)}, score="0"))
    assert found["score=0", "f1", "pooled"]["value"] is None
    assert found["score=0", "recall", "pooled"]["value"] is None
    assert found["score=0", "false_positive_fraction", "empty"]["value"] == 0.1


def test_a_group_without_a_positive_cell_has_false_positives_and_no_f1():
    names = ("cells", "cells_real", "positive_cells", "positive_cells_real", "matched_cells")
    counted = dict(zip(names, ([6, 1, 1, 2], [9, 0, 0, 0], 4, 0, 0), strict=True))
    found = summarised([generated("a") | counted])
    assert found["all", "cell_f1", "pooled"]["value"] is None
    assert found["all", "cell_false_positive_fraction", "empty"]["value"] == 0.4


def test_the_difference_to_darkness_is_paired_over_cases():
    """Both methods differ between cases by .4, and by .1 from each other in either case."""
    own = {("a", "a"): Confusion(90, 10, 10, 890), ("b", "b"): Confusion(50, 50, 50, 850)}
    dark = {("a", "a"): Confusion(80, 20, 20, 880), ("b", "b"): Confusion(40, 60, 60, 840)}
    rows = segmented(own, (SEGMENTER, *CONSTANTS)) + segmented(dark, ("dark",))
    found = {
        (each["method"], each["metric"]): each
        for each in summary.summarise(rows, {}, OPTIONS)
        if (each["group"], each["aggregation"]) == ("all", "pooled")
    }
    gain = found[SEGMENTER, "f1_over_dark"]
    assert (gain["value"], gain["low"], gain["high"]) == pytest.approx((0.1, 0.1, 0.1))
    assert found["dark", "f1"]["high"] - found["dark", "f1"]["low"] == pytest.approx(0.4)
    assert ("dark", "f1_over_dark") not in found
