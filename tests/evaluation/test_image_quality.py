import math

import numpy as np
import pytest
import torch
from torch import nn

from hemera.config import EvaluateOptions
from hemera.evaluation import image_quality, perceptual, stain_quality
from hemera.evaluation.image_quality import SEGMENTER, Network
from hemera.evaluation.metrics import Confusion

OPTIONS = EvaluateOptions(bootstrap_samples=200)
CPU = torch.device("cpu")


class Tiles:
    """Five tiles of two sizes, mixed, each of one gray value that is its number."""

    sizes = ((8, 16), (12, 4), (8, 16), (12, 4), (8, 16))

    def __len__(self):
        return len(self.sizes)

    def stored(self, place):
        gray = np.full((*self.sizes[place], 3), 10 * place, np.uint8)
        return {"tile": f"t{place}", "he": gray, "her2": gray, "mask": gray[..., 0]}

    def background(self, place, stain):
        return (128, 128, 128) if stain == "he" else (250, 250, 250)


class Add(nn.Module):
    """Adds a number, and records the shapes of its inputs."""

    def __init__(self, number):
        super().__init__()
        self.number = number
        self.shapes = []

    def forward(self, image):
        self.shapes.append(tuple(image.shape))
        return image + self.number


@pytest.mark.parametrize("batch_size", [1, 3, 9])
def test_every_network_is_applied_to_every_tile_whatever_its_size(batch_size):
    modules = {"a": Add(0.25), "b": Add(-0.5)}
    nets = {name: Network(net, name == "b") for name, net in modules.items()}
    found = list(image_quality.predict_tiles(nets, Tiles(), "generation", CPU, batch_size))
    assert [item.tile for item, _ in found] == ["t0", "t1", "t2", "t3", "t4"]
    for place, (item, outputs) in enumerate(found):
        assert list(outputs) == ["a", "b"]
        for name, number in (("a", 0.25), ("b", -0.5)):
            assert outputs[name].shape == (3, *item.he.shape[:2])
            # The second divides by its background.
            shown = 10 * place if name == "a" else round(10 * place * 255 / 128)
            value = shown / 255 * 2 - 1 + number
            assert torch.allclose(outputs[name], torch.tensor(value), atol=1e-6)
    assert sum(shape[0] for shape in modules["a"].shapes) == 5


def test_the_segmenter_gets_images_in_0_to_1():
    ((_, found), *_) = image_quality.predict_tiles(
        {"x": Network(Add(0), False)}, Tiles(), "segmentation", CPU, 1
    )
    assert found["x"].unique().tolist() == [0]


def row(network, tile, case="c", **values):
    method = "hemera" if network == "generation" else SEGMENTER
    return {
        "tile": tile, "case": case, "dataset": "bci", "score": "2+", "network": network,
        "method": method, **values,
    }  # fmt: skip


def generated(tile, case="c", psnr_db=20.0, ssim=0.5):
    sums = np.ones(len(stain_quality.SUMS)).tolist()
    return row(
        "generation", tile, case, psnr_db=psnr_db, ssim=ssim, ssim_gaussian=0.5, stain_sums=sums
    )


def summarised(rows, features=None):
    return {
        (entry["group"], entry["metric"], entry["aggregation"]): entry
        for entry in image_quality.summarise(rows, features or {}, OPTIONS)
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
    assert ("case=c", "cell_f1", "pooled") not in found


def test_false_alarms_are_counted_where_nothing_is_positive():
    counts = {
        "a": Confusion(0, 10, 0, 90),
        "b": Confusion(0, 0, 0, 100),
        "c": Confusion(5, 50, 5, 40),
    }
    rows = [
        row("segmentation", tile, **dict(zip(image_quality.COUNTS, count, strict=True)))
        | {"method": method}
        for method in (SEGMENTER, *image_quality.CONSTANTS)
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


def test_examples_go_from_the_best_to_the_worst():
    counts = {
        "a": Confusion(1, 9, 9, 81), "b": Confusion(9, 1, 1, 89), "c": Confusion(0, 0, 0, 100),
        "d": Confusion(5, 5, 5, 85), "e": Confusion(0, 5, 5, 90),
    }  # fmt: skip
    rows = [
        row("segmentation", tile, **dict(zip(image_quality.COUNTS, count, strict=True)))
        for tile, count in counts.items()
    ]
    rows += [generated(tile, ssim=0.9) for tile in counts]
    assert [tile for tile, _ in image_quality.choose_examples(rows, "hemera", 99)] == list("bdaec")
    assert image_quality.choose_examples(rows, "hemera", 3) == [
        ("b", "best: F1 0.900"), ("a", "F1 0.100"), ("c", "no positive pixel"),
    ]  # fmt: skip
    assert image_quality.choose_examples([], "hemera", 3) == []
    only = [generated("x", ssim=0.2), generated("y", ssim=0.7)]
    assert [tile for tile, _ in image_quality.choose_examples(only, "hemera", 5)] == ["y", "x"]
