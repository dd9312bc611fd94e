"""The network of Oliveira et al.: size, input, weights on disk."""

import cv2
import numpy as np
import pytest
import torch

from hemera.config import HER2_CNN
from hemera.errors import TrainingError
from hemera.networks import storage
from hemera.networks.her2_cnn import (
    Her2Cnn,
    ScoreEncoder,
    lightness,
    load_score_encoder,
    network_input,
)

SMALL = {"base_width": 2, "hidden": 8}


def test_it_has_the_size_of_the_paper():
    net = Her2Cnn()
    assert sum(parameter.numel() for parameter in net.parameters()) == 26_051_972
    assert net.head[0].in_features == 25_088
    assert net(torch.zeros(1, 1, 256, 256)).shape == (1, 4)


def test_lightness_is_that_of_opencv(rng):
    rgb = rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)
    expected = cv2.cvtColor(rgb.astype(np.float32) / 255, cv2.COLOR_RGB2HLS)[..., 1]
    found = lightness(torch.from_numpy(rgb).permute(2, 0, 1).float() / 255)
    assert found[0].numpy() == pytest.approx(expected, abs=1e-6)


def test_views_of_another_side_are_resized():
    views = torch.full((2, 3, 128, 128), 0.25)
    views[1, 0] = 0.75
    found = network_input(views)
    assert found.shape == (2, 1, 256, 256)
    assert found[0].mean() == pytest.approx(0.25) and found[1].mean() == pytest.approx(0.5)


@torch.no_grad()
def test_lightness_of_a_mean_and_deviation_is_standardised():
    torch.manual_seed(3)
    net, views = Her2Cnn(4, 32).double(), torch.rand(2, 1, 256, 256).double()
    expected = net((views - 0.875) / 0.125)
    assert not torch.allclose(net(views), expected, atol=1e-6)
    net.fit_scale(0.875, 0.125)
    assert torch.allclose(net(views), expected, atol=1e-12)
    # All views of one colour.
    net.fit_scale(0.875, 0.0)
    assert net(torch.full_like(views, 0.875)).isfinite().all()


@torch.no_grad()
def test_features_are_the_probabilities_of_the_scores():
    torch.manual_seed(1)
    net = Her2Cnn(**SMALL)
    views = torch.rand(3, 3, 256, 256)
    found = ScoreEncoder(net)(views)
    logits = net(lightness(views)).double()
    expected = logits.exp() / logits.exp().sum(1, keepdim=True)
    assert torch.allclose(found.double(), expected, atol=1e-6)


def test_weights_are_read_back_and_others_refused(tmp_path):
    torch.manual_seed(2)
    net = Her2Cnn(**SMALL).eval()
    weights, metadata = tmp_path / "w.safetensors", tmp_path / "m.json"
    storage.write_weights(weights, net.state_dict())
    described = {"network": HER2_CNN, "model": SMALL, "trained_on": ["c1"]}
    storage.write_metadata(metadata, described, weights)
    encoder, found = load_score_encoder(weights, metadata)
    assert found["trained_on"] == ["c1"]
    views = torch.rand(2, 3, 256, 256)
    with torch.no_grad():
        assert torch.equal(encoder(views), torch.softmax(net(lightness(views)), 1))
    storage.write_weights(weights, Her2Cnn(**SMALL).state_dict())
    with pytest.raises(TrainingError, match="SHA-256"):
        load_score_encoder(weights, metadata)
    storage.write_metadata(metadata, {**described, "model": {"base_width": 4}}, weights)
    with pytest.raises(TrainingError, match="does not fit the network"):
        load_score_encoder(weights, metadata)
