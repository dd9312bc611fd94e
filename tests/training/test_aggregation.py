"""Training of aggregators: the linear one against scikit-learn, attention on planted views."""

import numpy as np
import pytest
import torch

from hemera.config import AggregateOptions
from hemera.evaluation.classification import auc
from hemera.training import aggregation
from hemera.training.aggregation import (
    choose_temperature,
    choose_threshold,
    explained_logit,
    fit,
)

CPU = torch.device("cpu")


def bags(rng, cases, views, width):
    return {f"c{k:03d}": rng.normal(size=(views, width)).astype(np.float32) for k in range(cases)}


def loader(data):
    return lambda case: torch.from_numpy(data[case])


def test_the_linear_aggregator_is_scikit_learns_logistic_regression(rng):
    linear = pytest.importorskip("sklearn.linear_model")
    data = bags(rng, 60, 5, 6)
    signal = {case: float(views.mean(0)[0]) for case, views in data.items()}
    labels = {case: int(value + rng.normal(0, 0.3) > 0.25) for case, value in signal.items()}
    options = AggregateOptions(aggregator="mean", l2=0.5, torch_threads=1)
    fitted = fit(loader(data), labels, sorted(data), [], "status", options, 1, CPU)
    means = np.stack([data[case].mean(0) for case in sorted(data)]).astype(float)
    scaled = (means - means.mean(0)) / means.std(0)
    truth = [labels[case] for case in sorted(data)]
    expected = linear.LogisticRegression(C=2.0, class_weight="balanced", tol=1e-10, max_iter=5000)
    expected.fit(scaled, truth)
    logits = expected.decision_function(scaled)
    found = [float(fitted.net(loader(data)(case)).logits.detach()) for case in sorted(data)]
    assert found == pytest.approx(logits.tolist(), abs=2e-4)


def test_the_linear_aggregator_orders_scores(rng):
    data = bags(rng, 80, 3, 4)
    labels = {}
    for k, case in enumerate(sorted(data)):
        labels[case] = k % 4
        data[case][:, 0] += 3 * labels[case]
    options = AggregateOptions(aggregator="mean", torch_threads=1)
    fitted = fit(loader(data), labels, sorted(data), [], "score", options, 1, CPU)
    predicted = [
        int((fitted.net(loader(data)(case)).logits.detach() > 0).sum()) for case in sorted(data)
    ]
    right = np.mean([guess == labels[case] for guess, case in zip(predicted, labels, strict=True)])
    assert right > 0.95


@pytest.mark.slow
def test_attention_finds_one_view_in_twenty_and_the_mean_does_not(rng):
    """One view of each bag is marked on the first axis; its sign on the second is the label."""
    data, labels = bags(rng, 360, 20, 8), {}
    for k, case in enumerate(sorted(data)):
        labels[case] = k % 2
        place = rng.integers(20)
        # The other views are random on both axes, so that the mean nearly hides the sign.
        data[case][place, :2] = 6.0, 1.5 if labels[case] else -1.5
    names = sorted(data)
    train, inner, test = names[:200], names[200:240], names[240:]
    truth = np.array([labels[case] == 1 for case in test])
    found = {}
    for aggregator in ("abmil", "mean"):
        options = AggregateOptions(
            aggregator=aggregator, epochs=30, learning_rate=0.003, embed_width=32,
            attention_width=16, patience=30, dropout=0.1, torch_threads=1,
        )  # fmt: skip
        fitted = fit(loader(data), labels, train, inner, "status", options, 3, CPU)
        logits = [aggregation.explained_logit(fitted.net, loader(data)(case)) for case in test]
        found[aggregator] = float(auc(truth, np.array(logits), np.ones((1, len(test))))[0])
    assert found["abmil"] >= 0.95
    assert found["mean"] <= 0.75


def test_equal_seeds_give_equal_weights_and_others_do_not(rng):
    data = bags(rng, 12, 4, 5)
    labels = {case: k % 2 for k, case in enumerate(sorted(data))}
    names = sorted(data)
    options = AggregateOptions(
        epochs=2, embed_width=8, attention_width=4, learning_rate=0.01, torch_threads=1
    )

    def weights(seed):
        net = fit(loader(data), labels, names[:9], names[9:], "status", options, seed, CPU).net
        return torch.cat([tensor.ravel() for tensor in net.state_dict().values()])

    assert torch.equal(weights(5), weights(5))
    assert not torch.equal(weights(5), weights(6))


def test_the_threshold_has_the_best_balanced_accuracy():
    probability = np.array([0.1, 0.2, 0.3, 0.35, 0.6, 0.9])
    truth = np.array([False, False, True, True, True, True])
    assert choose_threshold(probability, truth) == pytest.approx(0.25)
    # Of several equally good ones, the nearest to one half.
    assert choose_threshold(np.array([0.1, 0.9]), np.array([False, True])) == 0.5
    assert choose_threshold(np.array([0.1, 0.9]), np.array([True, True])) == 0.5


def test_the_temperature_undoes_a_factor(rng):
    logits = rng.normal(0, 1.5, 20_000)
    truth = rng.random(20_000) < 1 / (1 + np.exp(-logits))
    assert choose_temperature(2.0 * logits, truth) == pytest.approx(2.0, rel=0.06)
    assert choose_temperature(logits, np.ones(20_000, bool)) == 1


def test_top_scores_are_selected_from_all_views():
    """One view in a hundred has the label, and a step of abmil would draw ten views."""
    draws = np.random.default_rng(3)
    data, labels = {}, {}
    for number in range(40):
        bag = torch.full((200, 4), 0.02)
        label = number % 2
        # Two views of a positive case are 3+; all others are 0 or 1+.
        bag[torch.arange(200), torch.from_numpy(draws.integers(0, 2, 200))] = 0.94
        if label:
            bag[:2] = torch.tensor([0.02, 0.02, 0.02, 0.94])
        data[f"c{number}"], labels[f"c{number}"] = bag, label
    names = list(data)
    options = AggregateOptions(
        aggregator="top_scores", standardise=False, epochs=30, learning_rate=0.003,
        weight_decay=0.0, bags_per_step=1, schedule="constant", select="accuracy",
        views_per_bag=10, top_scores=20,
    )  # fmt: skip
    fitted = fit(data.__getitem__, labels, names[:24], names[24:30], "status", options, 1, CPU)
    logits = [explained_logit(fitted.net, data[name]) for name in names[30:]]
    assert [logit > 0 for logit in logits] == [bool(labels[name]) for name in names[30:]]
