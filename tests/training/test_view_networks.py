"""Training of the encoders: views of low contrast, qualities, flips."""

import numpy as np
import pytest
import torch

from hemera.config import TrainEncoderOptions
from hemera.dataset.labelled_views import UNKNOWN
from hemera.networks.her2_cnn import INPUT_PX
from hemera.training.view_networks import LabelledViews, evaluate, quality_of, train


def pale_views(count):
    """Gray views around a lightness of 0.88; of each score the darker half is 0.04 darker."""
    draws = np.random.default_rng(5)
    scores = np.arange(count) % 4
    pixels = draws.normal(232, 6, (count, INPUT_PX, INPUT_PX, 1))
    pixels[:, : INPUT_PX // 2] -= 10 * scores[:, None, None, None]
    gray = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    return LabelledViews(np.repeat(gray, 3, axis=3), scores.astype(np.uint8))


def test_pale_views_are_learned_when_their_lightness_is_standardised():
    views, places = pale_views(24), np.arange(24)
    options = TrainEncoderOptions(
        base_width=4, hidden=32, epochs=5, batch_size=4, learning_rate=0.001, standardise=True
    )
    last = {}
    for standardise in (True, False):
        own = options.replace(standardise=standardise)
        trained = train("her2_cnn", views, places, places[:0], own, torch.device("cpu"))
        last[standardise] = trained.history[-1][3]
        found = views.pixels[..., 0] / 255
        mean, deviation = (found.mean(), found.std()) if standardise else (0, 1)
        assert float(trained.net.shift) == pytest.approx(mean, abs=1e-6)
        assert 1 / float(trained.net.scale) == pytest.approx(deviation, rel=1e-5)
    assert last[True] < 1.0 < 1.3 < last[False], "ln 4, 1.39, is chance"


def test_qualities_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    draws = np.random.default_rng(3)
    # Class 3 is neither labelled nor answered.
    truth, answer = draws.integers(3, size=200), draws.integers(3, size=200)
    found = quality_of(metrics.confusion_matrix(truth, answer, labels=range(4)))
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(truth, answer))
    assert found["f1"] == pytest.approx(metrics.f1_score(truth, answer, average="macro"))
    assert found["iou"] == pytest.approx(metrics.jaccard_score(truth, answer, average="macro"))


class ByRed(torch.nn.Module):
    """Answers class 1 of two where red is above one half, else class 0."""

    def forward(self, images):
        red = images[:, 0] - 0.5
        return torch.stack([-red, red], 1)


def test_unknown_pixels_do_not_count():
    pixels = np.zeros((2, 4, 6, 3), np.uint8)
    pixels[:, :, 3:, 0] = 255
    labels = np.zeros((2, 4, 6), np.uint8)
    labels[:, :, 3:] = 1
    labels[0, :, 5] = 0
    labels[0, 0, 5] = UNKNOWN
    views = LabelledViews(pixels, labels)
    counts, _ = evaluate(ByRed(), views, np.arange(2), 2, torch.device("cpu"))
    assert counts.tolist() == [[24, 3], [0, 20]]
    assert quality_of(counts)["iou"] == pytest.approx((24 / 27 + 20 / 23) / 2)


def test_labels_of_pixels_are_flipped_and_turned_with_their_views():
    from hemera.training.view_networks import _turned

    draws = np.random.default_rng(1)
    labels = torch.from_numpy(draws.integers(5, size=(16, 6, 6)))
    images = labels[:, None].float().expand(-1, 3, -1, -1)
    turned, own = _turned(images, labels, draws)
    assert torch.equal(turned[:, 0], own.float())
    kept = sum(torch.equal(a, b) for a, b in zip(own, labels, strict=True))
    assert 0 < kept < 10, "one of eight positions is the view itself"
    _, alone = _turned(images, labels[:, 0, 0], draws)
    assert torch.equal(alone, labels[:, 0, 0])
