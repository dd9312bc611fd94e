import cv2
import numpy as np
import pytest
import torch

from hemera.dataset.torch_dataset import TileDataset
from hemera.evaluation import baselines
from hemera.evaluation.baselines import Colors
from hemera.masks import label_format
from tests.small_index import write_index


def test_baselines_by_formula():
    he = np.random.default_rng(1).integers(0, 256, (40, 24, 3)).astype(np.uint8)
    colors = Colors(
        np.array([200.4, 100.6, 50]), np.array([10.0, 0, 30]),
        np.array([120.0, 130, 140]), np.array([5.0, 6, 7]),
    )  # fmt: skip
    found = baselines.images(he, colors)
    assert np.unique(found["mean_colour"].reshape(-1, 3), axis=0).tolist() == [[200, 101, 50]]
    soft = cv2.GaussianBlur(he.astype(float), (0, 0), 8)
    expected = np.rint((soft[..., 2] - 140) / 7 * 30 + 50).clip(0, 255)
    assert (found["blurred"][..., 2] == expected).all()
    assert (found["blurred"][..., 1] == 101).all(), "HER2's channel does not vary"


@pytest.mark.parametrize("threads", [1, 3])
def test_colors_are_those_of_all_training_pixels(tmp_path, monkeypatch, threads):
    index = write_index(tmp_path, train=7, height=48, width=80)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found = baselines.measure_colors(index)
    tiles = TileDataset(index, network="generation", split="train", normalise_background=True)
    items = [tiles.stored(place) for place in range(len(tiles))]
    her2 = np.concatenate([item["her2"].reshape(-1, 3) for item in items]).astype(float)
    soft = np.concatenate(
        [cv2.GaussianBlur(item["he"].astype(float), (0, 0), 8).reshape(-1, 3) for item in items]
    )
    for values, mean, std in (
        (her2, found.her2_mean, found.her2_std),
        (soft, found.blurred_mean, found.blurred_std),
    ):
        assert np.allclose(mean, values.mean(0), rtol=0, atol=1e-4)
        assert np.allclose(std, values.std(0), rtol=0, atol=1e-4)


def test_the_threshold_of_darkness_has_the_highest_f1(tmp_path):
    index = write_index(tmp_path, train=4, height=48, width=80)
    tiles = TileDataset(index, network="segmentation", split="train", normalise_background=True)
    items = [tiles.stored(place) for place in range(len(tiles))]
    truth = np.stack([label_format.positive(item["mask"]) for item in items])

    def f1(threshold):
        found = np.stack([baselines.dark(item["he"], threshold) for item in items])
        return 2 * np.sum(found & truth) / (np.sum(found) + np.sum(truth))

    fitted = baselines.fit_darkness(index)
    assert 0 < fitted < 255
    assert f1(fitted) == max(f1(threshold) for threshold in range(256))
