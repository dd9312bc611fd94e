"""Judging: who answers to which tile, groups, and the distances of sets."""

import math

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from hemera.config import EvaluateOptions
from hemera.dataset.torch_dataset import TileDataset
from hemera.evaluation import image_quality, metrics
from hemera.evaluation.image_quality import Colours, Features
from tests.small_index import write_index

OPTIONS = EvaluateOptions(bootstrap_samples=200)
CPU = torch.device("cpu")


class Tiles:
    """Five tiles of two sizes, mixed, each of one grey that is its number."""

    sizes = ((8, 16), (12, 4), (8, 16), (12, 4), (8, 16))

    def __len__(self):
        return len(self.sizes)

    def stored(self, place):
        grey = np.full((*self.sizes[place], 3), 10 * place, np.uint8)
        return {"tile": f"t{place}", "he": grey, "her2": grey}


class Add(nn.Module):
    """Adds a number, and holds that it was given one size at a time."""

    def __init__(self, number):
        super().__init__()
        self.number = number
        self.seen = []

    def forward(self, image):
        self.seen.append(tuple(image.shape))
        return image + self.number


@pytest.mark.parametrize("batch_size", [1, 3, 9])
def test_every_network_answers_to_every_tile_whatever_its_size(batch_size):
    nets = {"a": Add(0.25), "b": Add(-0.5)}
    found = list(image_quality.answers(nets, Tiles(), "generation", CPU, batch_size))
    assert [item["tile"] for item, _ in found] == ["t0", "t1", "t2", "t3", "t4"]
    for place, (item, answers) in enumerate(found):
        assert list(answers) == ["a", "b"]
        for name, number in (("a", 0.25), ("b", -0.5)):
            assert answers[name].shape == (3, *item["he"].shape[:2])
            value = 10 * place / 255 * 2 - 1 + number
            assert torch.allclose(answers[name], torch.tensor(value), atol=1e-6)
    assert sum(shape[0] for shape in nets["a"].seen) == 5


def test_the_task_decides_what_a_network_is_given():
    ((_, found), *_) = image_quality.answers({"x": Add(0)}, Tiles(), "segmentation", CPU, 1)
    assert found["x"].unique().tolist() == [0], "0 to 1, not -1 to 1"


def test_baselines_by_hand():
    he = np.random.default_rng(1).integers(0, 256, (40, 24, 3)).astype(np.uint8)
    colours = Colours(
        np.array([200.4, 100.6, 50]), np.array([10.0, 0, 30]),
        np.array([120.0, 130, 140]), np.array([5.0, 6, 7]),
    )  # fmt: skip
    found = image_quality.baselines(he, colours, 3)
    assert np.unique(found["mean_colour"].reshape(-1, 3), axis=0).tolist() == [[200, 101, 50]]
    soft = cv2.GaussianBlur(he.astype(float), (0, 0), 3)
    expected = np.rint((soft[..., 2] - 140) / 7 * 30 + 50).clip(0, 255)
    assert (found["blurred"][..., 2] == expected).all()
    assert (found["blurred"][..., 1] == 101).all(), "HER2's channel does not vary"


@pytest.mark.parametrize("threads", [1, 3])
def test_colours_are_those_of_all_training_pixels(tmp_path, monkeypatch, threads):
    index = write_index(tmp_path, train=7, height=48, width=80)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found = image_quality.measure_colours(index, 2.5)
    tiles = TileDataset(index, network="generation", split="train")
    items = [tiles.stored(place) for place in range(len(tiles))]
    her2 = np.concatenate([item["her2"].reshape(-1, 3) for item in items]).astype(float)
    soft = np.concatenate(
        [cv2.GaussianBlur(item["he"].astype(float), (0, 0), 2.5).reshape(-1, 3) for item in items]
    )
    for values, mean, std in (
        (her2, found.her2_mean, found.her2_std),
        (soft, found.blurred_mean, found.blurred_std),
    ):
        assert np.allclose(mean, values.mean(0), rtol=0, atol=1e-4)
        assert np.allclose(std, values.std(0), rtol=0, atol=1e-4)


def row(network, tile, case="c", **values):
    return {
        "tile": tile, "case": case, "dataset": "bci", "score": "2+", "network": network,
        "method": "model", **values,
    }  # fmt: skip


def summarised(rows, features=None):
    return {
        (entry["group"], entry["metric"], entry["aggregation"]): entry
        for entry in image_quality.summarise(rows, features or Features(), OPTIONS)
    }


def test_an_infinite_psnr_is_counted_and_left_out():
    rows = [
        row("generation", tile, psnr_db=psnr, ssim=0.5, ssim_gaussian=0.5)
        for tile, psnr in (("a", 20.0), ("b", math.inf), ("c", 24.0))
    ]
    found = summarised(rows)
    assert found["all", "psnr_db", "mean"]["value"] == 22
    assert found["all", "psnr_db", "mean"]["tiles"] == 2
    assert found["all", "psnr_infinite", "count"]["value"] == 1
    assert found["all", "ssim", "mean"]["tiles"] == 3


def test_nothing_is_summarised_of_nothing():
    assert image_quality.summarise([], Features(), OPTIONS) == []


def test_groups_have_intervals_where_they_have_cases():
    rows = [
        row("generation", f"t{k}", f"c{k // 2}", psnr_db=20.0 + k, ssim=0.1 * k, ssim_gaussian=0.5)
        for k in range(6)
    ]
    found = summarised([{**each, "score": "3+"} if k > 3 else each for k, each in enumerate(rows)])
    for group, cases in (("all", 3), ("score=2+", 2), ("score=3+", 1), ("case=c1", 1)):
        entry = found[group, "psnr_db", "mean"]
        assert (entry["low"] is not None) == (cases > 1), group
        if cases > 1:
            assert entry["low"] < entry["value"] < entry["high"]


def test_distances_are_of_the_tiles_of_their_group():
    rng = np.random.default_rng(2)
    real, made = rng.normal(size=(2, 7, 5)).astype(np.float32)
    features = Features(methods={"model": []})
    rows = []
    for k in range(7):
        features.add(f"t{k}", ["model"], np.stack([made[k], real[k]]))
        rows.append(
            row("generation", f"t{k}", f"c{k}", psnr_db=20.0, ssim=0.5, ssim_gaussian=0.5)
            | {"score": "3+" if k in (1, 4, 6) else "2+"}
        )
    found = summarised(rows, features)
    part = [1, 4, 6]
    expected = metrics.frechet_distance(made[part], real[part])
    entry = found["score=3+", "fid", "set"]
    assert (entry["value"], entry["tiles"]) == (pytest.approx(expected), 3)
    assert found["all", "fid", "set"]["value"] == pytest.approx(
        metrics.frechet_distance(made, real)
    )
    assert found["all", "kid", "set"]["tiles"] == 7
    assert ("case=c1", "fid", "set") not in found


def test_features_that_do_not_fit_their_methods_are_an_error():
    with pytest.raises(ValueError, match="zip"):
        Features(methods={"a": []}).add("t", ["a"], np.zeros((3, 4), np.float32))
