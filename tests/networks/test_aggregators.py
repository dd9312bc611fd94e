"""Aggregators: sizes, exact contributions, order of the scores."""

import numpy as np
import pytest
import torch

from hemera.errors import TrainingError
from hemera.networks.aggregators import (
    AbmilAggregator,
    Head,
    MeanAggregator,
    build_aggregator,
    score_probabilities,
)


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("features", "count"), [(1536, 1_181_826), (1024, 919_682)])
def test_abmil_has_the_size_of_mil_lab(features, count):
    assert parameters(AbmilAggregator(features, "status")) == count


@pytest.mark.parametrize("target", ["status", "score"])
@pytest.mark.parametrize("name", ["mean", "abmil"])
@torch.no_grad()
def test_contributions_and_bias_are_the_logit(name, target):
    torch.manual_seed(1)
    net = build_aggregator(name, 7, target, embed_width=16, attention_width=8, dropout=0.5).eval()
    torch.nn.init.normal_(net.head.weight)
    net.fit_scale(torch.randn(7), torch.rand(7) + 0.5)
    views = torch.randn(13, 7)
    pooled = net(views)
    logit = pooled.logits[0] if target == "status" else pooled.logits[1]
    assert float(pooled.bias + pooled.contribution.sum()) == pytest.approx(float(logit), abs=1e-5)
    assert float(pooled.attention.sum()) == pytest.approx(1, abs=1e-6)
    # The order of views does not matter.
    order = torch.randperm(13)
    permuted = net(views[order])
    assert torch.allclose(permuted.logits, pooled.logits, atol=1e-6)
    assert torch.allclose(permuted.contribution, pooled.contribution[order], atol=1e-6)


@torch.no_grad()
def test_one_view_is_enough():
    for name in ("mean", "abmil"):
        net = build_aggregator(name, 3, "status", embed_width=4, attention_width=4, dropout=0.0)
        assert net(torch.ones(1, 3)).attention.tolist() == [1]


def test_scores_are_in_order_for_any_parameters():
    head = Head(4, "score")
    with torch.no_grad():
        head.steps.copy_(torch.tensor([-3.0, -5.0, 2.0]))
    biases = head.biases().tolist()
    assert biases == sorted(biases, reverse=True) and len(biases) == 3
    shares = score_probabilities(torch.tensor([3.0, 0.5, -2.0]))
    above = 1 / (1 + np.exp([-3.0, -0.5, 2.0]))
    expected = [1 - above[0], above[0] - above[1], above[1] - above[2], above[2]]
    assert shares.tolist() == pytest.approx(expected, abs=1e-6)


@torch.no_grad()
def test_a_constant_feature_does_not_count():
    net = MeanAggregator(2, "status")
    net.fit_scale(torch.tensor([1.0, 5.0]), torch.tensor([2.0, 0.0]))
    torch.nn.init.ones_(net.head.weight)
    assert float(net(torch.tensor([[3.0, 9.0], [5.0, 0.0]])).logits) == pytest.approx(1.5)


def test_an_unknown_aggregator_is_an_error():
    with pytest.raises(TrainingError, match="choose mean or abmil"):
        build_aggregator("max", 3, "status", embed_width=4, attention_width=4, dropout=0.0)
