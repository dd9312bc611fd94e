"""Aggregators: sizes, exact contributions, order of the scores."""

import numpy as np
import pytest
import torch

from hemera.config import AggregateOptions
from hemera.errors import TrainingError
from hemera.networks.aggregators import (
    AbmilAggregator,
    Head,
    MeanAggregator,
    TopScoresAggregator,
    build_aggregator,
    score_probabilities,
    soft_argmax,
    top_places,
)


def small(aggregator, **options):
    return AggregateOptions(aggregator=aggregator, embed_width=16, attention_width=8, **options)


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
    net = build_aggregator(small(name, dropout=0.5), 7, target).eval()
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
        net = build_aggregator(small(name), 3, "status")
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


def test_a_rule_is_no_network():
    with pytest.raises(TrainingError, match="choose mean, abmil or top_scores"):
        build_aggregator(small("asco_cap", encoder="cells"), 3, "status")


def test_the_selection_of_the_highest_scores_is_exact():
    for views in range(1, 5001):
        places = top_places(views, 300, 0.15)
        top = views * 15 // 100
        assert len(places) == 300 and (np.diff(places) >= 0).all(), views
        if views < 300:
            counts = np.bincount(places, minlength=views)
            assert len(counts) == views and np.ptp(counts) <= 1, views
        elif top < 300:
            assert places.tolist() == list(range(300)), views
        else:
            steps = np.diff(places)
            assert (places[0], places[-1]) == (0, top - 1) and (steps > 0).all(), views
            # Evenly: no step differs from the mean step by one or more.
            assert (np.abs(steps - (top - 1) / 299) < 1).all(), views


def test_the_score_of_a_view_is_the_likeliest_unless_two_are_alike(rng):
    logits = torch.from_numpy(rng.normal(size=(2000, 4)) * 2)
    best = logits.sort(dim=1, descending=True).values
    clear = best[:, 0] - best[:, 1] > 0.05
    assert clear.sum() > 1900
    # As the files of features have them, in 16 bits.
    found = soft_argmax(torch.softmax(logits, 1).half().float(), 1000)
    assert torch.allclose(found[clear].double(), logits[clear].argmax(1).double(), atol=1e-6)
    assert float(soft_argmax(torch.tensor([[0.5, 0.0, 0.0, 0.5]]), 1000)) == pytest.approx(1.5)


def test_top_scores_has_the_size_of_the_paper():
    assert parameters(TopScoresAggregator("status")) == 118_338
    # Of score, the last layer has one weight vector and three biases instead of two of each.
    assert parameters(TopScoresAggregator("score")) == 118_338 - (2 * 64 + 2) + 64 + 3


@pytest.mark.parametrize("views", [1, 7, 300, 2500])
@pytest.mark.parametrize("target", ["status", "score"])
def test_contributions_of_top_scores_are_gradient_times_score(target, views):
    torch.manual_seed(views)
    net = build_aggregator(small("top_scores"), 4, target).double()
    probabilities = torch.softmax(3 * torch.randn(views, 4).double(), 1)
    with torch.no_grad():
        pooled = net(probabilities)
    logit = pooled.logits[0 if target == "status" else 1]
    assert float(pooled.bias + pooled.contribution.sum() - logit) == pytest.approx(0, abs=1e-9)
    assert float(pooled.attention.sum()) == pytest.approx(1)
    # The layers alone, on the selected scores, with the gradient of PyTorch.
    ordered = soft_argmax(probabilities, 1000).sort(descending=True).values
    scores = ordered[torch.from_numpy(top_places(views, 300, 0.15))].requires_grad_()
    hidden = scores
    for layer in net.layers:
        hidden = torch.relu(layer(hidden))
    if target == "status":
        negative, positive = net.head(hidden)
        expected = positive - negative
    else:
        expected = net.head.biases()[1] + hidden @ net.head.weight
    (gradient,) = torch.autograd.grad(expected, scores)
    assert float(logit) == pytest.approx(expected.item())
    total = (gradient * scores).sum().item()
    assert float(pooled.contribution.sum()) == pytest.approx(total, abs=1e-12)
    # The order of views does not matter.
    order = torch.randperm(views)
    assert torch.allclose(net(probabilities[order]).logits, pooled.logits, atol=1e-12)


def test_other_features_than_four_probabilities_are_an_error():
    with pytest.raises(TrainingError, match="64 features"):
        build_aggregator(small("top_scores"), 64, "status")
