"""Training of the network of Oliveira et al. on views of low contrast."""

import numpy as np
import pytest
import torch

from hemera.config import TrainEncoderOptions
from hemera.networks.her2_cnn import INPUT_PX
from hemera.training.tile_scores import ScoredViews, train


def pale_views(count):
    """Gray views around a lightness of 0.88; of each score the darker half is 0.04 darker."""
    draws = np.random.default_rng(5)
    scores = np.arange(count) % 4
    pixels = draws.normal(232, 6, (count, INPUT_PX, INPUT_PX, 1))
    pixels[:, : INPUT_PX // 2] -= 10 * scores[:, None, None, None]
    gray = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    return ScoredViews(np.repeat(gray, 3, axis=3), scores.astype(np.int64))


def test_pale_views_are_learned_when_their_lightness_is_standardised():
    views, places = pale_views(24), np.arange(24)
    options = TrainEncoderOptions(
        base_width=4, hidden=32, epochs=5, batch_size=4, learning_rate=0.001, standardise=True
    )
    last = {}
    for standardise in (True, False):
        own = options.replace(standardise=standardise)
        trained = train(views, places, places[:0], own, torch.device("cpu"))
        last[standardise] = trained.history[-1][3]
        found = views.pixels[..., 0] / 255
        mean, deviation = (found.mean(), found.std()) if standardise else (0, 1)
        assert float(trained.net.shift) == pytest.approx(mean, abs=1e-6)
        assert 1 / float(trained.net.scale) == pytest.approx(deviation, rel=1e-5)
    assert last[True] < 1.0 < 1.3 < last[False], "ln 4, 1.39, is chance"
