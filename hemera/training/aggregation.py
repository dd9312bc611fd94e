"""Training of the aggregators of stage aggregate, and what is chosen on cases held back."""

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from hemera.config import AggregateOptions
from hemera.dataset.cases import STATUSES
from hemera.networks.aggregators import (
    Aggregator,
    MeanAggregator,
    build_aggregator,
    score_probabilities,
)
from hemera.sheet import SCORES

Load = Callable[[str], Tensor]
"""The features of a case by its name, (N, D) float32."""

TEMPERATURES = np.exp(np.linspace(math.log(0.25), math.log(4.0), 65))


@dataclasses.dataclass
class Fitted:
    """A trained aggregator, and what the inner cases chose.

    Attributes:
        threshold: probability from which a case is positive, or has more than 1+.
        temperature: by which its logit is divided.
        history: mean loss of the training and of the inner cases, per epoch.
    """

    net: Aggregator
    threshold: float
    temperature: float
    history: list[tuple[float, float | None]]


def fit(
    load: Load,
    labels: Mapping[str, int],
    train: Sequence[str],
    inner: Sequence[str],
    target: str,
    options: AggregateOptions,
    seed: int,
    device: torch.device,
) -> Fitted:
    """Train an aggregator.

    Args:
        load: features of a case.
        labels: of all cases: 0 and 1 for status, 0 to 3 for score.
        train: cases that it is trained on, of two classes at least.
        inner: cases that choose epoch, threshold and temperature; may be empty.
        target: status or score.
    """
    torch.manual_seed(seed)
    net = build_aggregator(options, load(train[0]).shape[1], target).to(device)
    if isinstance(net, MeanAggregator):
        history = _fit_linear(net, load, labels, train, options)
    else:
        history = _fit_epochs(net, load, labels, train, inner, options, seed, device)
    net.eval()
    threshold, temperature = 0.5, 1.0
    if inner:
        logits = np.array([explained_logit(net, load(case).to(device)) for case in inner])
        truth = np.array([is_positive(labels[case], target) for case in inner])
        temperature = choose_temperature(logits, truth)
        if options.threshold == "inner":
            threshold = choose_threshold(1 / (1 + np.exp(-logits)), truth)
    return Fitted(net, threshold, temperature, history)


@dataclasses.dataclass(frozen=True)
class Predicted:
    """What several models predict of a case: the mean, and each view's part of it.

    Attributes:
        columns: of `tables.STATUS_PREDICTIONS`: predicted, logit, bias, probability, ...
        attention, contribution: of each view, (N,).
        calibrated: probability of positive after temperature by each model.
    """

    columns: dict[str, object]
    attention: list[float]
    contribution: list[float]
    calibrated: list[float]


@torch.inference_mode()
def predict_case(fitted: Sequence[Fitted], views: Tensor, target: str) -> Predicted:
    """Predict a case by the mean of several models.

    Args:
        fitted: models of the same target, one at least.
        views: features (N, D) float32, on the device of the models.
        target: status or score.
    """
    pooled = [model.net(views) for model in fitted]
    contribution = torch.stack([each.contribution.double() for each in pooled]).mean(0)
    attention = torch.stack([each.attention.double() for each in pooled]).mean(0) * len(views)
    bias = float(torch.stack([each.bias.double() for each in pooled]).mean())
    logits = torch.stack([each.bias.double() + each.contribution.double().sum() for each in pooled])
    temperatures = torch.tensor([model.temperature for model in fitted], device=views.device)
    calibrated = torch.sigmoid(logits / temperatures)
    probability = float(torch.sigmoid(logits).mean())
    threshold = float(np.mean([model.threshold for model in fitted]))
    predicted = STATUSES[int(probability >= threshold)]
    scores: dict[str, float] = {}
    if target == "score":
        each = torch.stack([score_probabilities(one.logits.double()) for one in pooled])
        fractions = each.mean(0).tolist()
        scores = {f"p{place}": value for place, value in enumerate(fractions)}
        # The median: the score that is exceeded with a probability below one half.
        predicted = SCORES[int((np.cumsum(fractions)[:-1] < 0.5).sum())]
    columns = {
        "predicted": predicted,
        "logit": float(logits.mean()),
        "bias": bias,
        "probability": probability,
        "calibrated": float(calibrated.mean()),
        "threshold": threshold,
        **scores,
        "models": len(fitted),
    }
    return Predicted(columns, attention.tolist(), contribution.tolist(), calibrated.tolist())


def is_positive(label: int, target: str) -> bool:
    """Return whether a label is positive, or a score of more than 1+."""
    return label >= (1 if target == "status" else 2)


@torch.inference_mode()
def explained_logit(net: Aggregator, views: Tensor) -> float:
    """Return the logit that the contributions explain."""
    pooled = net(views)
    return float(pooled.bias + pooled.contribution.sum())


def choose_threshold(probability: npt.NDArray[np.float64], truth: npt.NDArray[np.bool_]) -> float:
    """Return the threshold of the greatest balanced accuracy; of several, the nearest to 0.5.

    0.5 where one class is missing.
    """
    if truth.all() or not truth.any():
        return 0.5
    ordered = np.unique(probability)
    candidates = np.concatenate([[0.5], (ordered[1:] + ordered[:-1]) / 2])
    above = probability[None] >= candidates[:, None]
    balanced = (above[:, truth].mean(1) + (~above[:, ~truth]).mean(1)) / 2
    best = candidates[balanced >= balanced.max() - 1e-12]
    return float(best[np.argmin(np.abs(best - 0.5))])


def choose_temperature(logits: npt.NDArray[np.float64], truth: npt.NDArray[np.bool_]) -> float:
    """Return the temperature of the least cross-entropy, 1/4 to 4; 1 where one class is missing."""
    if truth.all() or not truth.any():
        return 1.0
    signed = np.where(truth, 1, -1) * logits
    losses = np.logaddexp(0, -signed[None] / TEMPERATURES[:, None]).mean(1)
    return float(TEMPERATURES[np.argmin(losses)])


def _targets(labels: Tensor, outputs: int) -> Tensor:
    """Return which thresholds labels exceed, (N, `outputs`)."""
    return (labels[:, None] > torch.arange(outputs, device=labels.device)).to(torch.float64)


def _class_weights(labels: Tensor) -> Tensor:
    """Return weights of cases, (N,) with mean 1, by which all classes have the same sum."""
    place, counts = torch.unique(labels, return_inverse=True, return_counts=True)[1:]
    weights: Tensor = len(labels) / (len(counts) * counts.to(torch.float64))
    return weights[place]


def _fit_linear(
    net: MeanAggregator,
    load: Load,
    labels: Mapping[str, int],
    train: Sequence[str],
    options: AggregateOptions,
) -> list[tuple[float, float | None]]:
    """Fit the linear aggregator to the means of the cases: the one minimum of a convex loss.

    The sum of cross-entropies with balanced classes and of l2 / 2 times the squared weights, as
    scikit-learn's LogisticRegression(C=1/l2, class_weight="balanced") has it.
    """
    means = torch.stack([load(case).double().mean(0) for case in train])
    known = torch.tensor([labels[case] for case in train])
    if options.standardise:
        net.fit_scale(means.mean(0).float(), means.std(0, correction=0).float())
    net.double()
    scaled = (means.to(net.shift.device) - net.shift) * net.scale
    weights = _class_weights(known).to(scaled.device)
    outputs = len(net.head.steps)
    targets = _targets(known, outputs).to(scaled.device)
    optimiser = torch.optim.LBFGS(
        net.parameters(), max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        optimiser.zero_grad()
        logits = (scaled @ net.head.weight)[:, None] + net.head.biases()
        each = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        total = (weights * each.sum(1)).sum() + options.l2 / 2 * net.head.weight.square().sum()
        total.backward()
        return total

    optimiser.step(loss)
    final = float(loss().detach()) / len(train)
    net.float()
    return [(final, None)]


def _fit_epochs(
    net: Aggregator,
    load: Load,
    labels: Mapping[str, int],
    train: Sequence[str],
    inner: Sequence[str],
    options: AggregateOptions,
    seed: int,
    device: torch.device,
) -> list[tuple[float, float | None]]:
    """Train by steps of several cases; keep the weights of the best epoch on the inner cases.

    The best has the least loss, or the greatest accuracy and of equal ones the least loss.
    """
    draws = np.random.default_rng([seed, len(train)])
    if options.standardise:
        _fit_scale(net, load, train, options.views_per_bag, draws)
    optimiser = torch.optim.AdamW(
        net.parameters(), options.learning_rate, weight_decay=options.weight_decay
    )
    schedule = (
        torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, options.epochs)
        if options.schedule == "cosine"
        else torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1.0)
    )
    classes: dict[int, list[str]] = {}
    for case in train:
        classes.setdefault(labels[case], []).append(case)
    members = [classes[label] for label in sorted(classes)]
    steps = math.ceil(len(train) / options.bags_per_step)
    # The highest scores are those of all views.
    count = None if options.aggregator == "top_scores" else options.views_per_bag
    history: list[tuple[float, float | None]] = []
    best: tuple[tuple[float, float], int, dict[str, Tensor]] = ((math.inf, math.inf), 0, {})
    for epoch in range(options.epochs):
        net.train()
        losses = []
        for _ in range(steps):
            drawn = [members[k] for k in draws.integers(len(members), size=options.bags_per_step)]
            cases = [own[draws.integers(len(own))] for own in drawn]
            each = []
            for case in cases:
                views = _some(load(case), count, draws).to(device)
                each.append(_loss(net(views).logits, labels[case]))
            loss = torch.stack(each).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        schedule.step()
        validated = _validate(net, load, labels, inner, device) if inner else None
        history.append((float(np.mean(losses)), validated[0] if validated else None))
        if validated:
            value = (-validated[1] if options.select == "accuracy" else 0.0, validated[0])
            if value < best[0]:
                best = value, epoch, copy.deepcopy(net.state_dict())
        if inner and epoch - best[1] >= options.patience:
            break
    if best[2]:
        net.load_state_dict(best[2])
    return history


def _fit_scale(
    net: Aggregator, load: Load, train: Sequence[str], count: int, draws: np.random.Generator
) -> None:
    """Standardise over views, in which each case counts the same."""
    views = [_some(load(case), count, draws).double() for case in train]
    mean = torch.stack([own.mean(0) for own in views]).mean(0)
    square = torch.stack([(own - mean).square().mean(0) for own in views]).mean(0)
    net.fit_scale(mean.float(), square.sqrt().float())


def _some(views: Tensor, count: int | None, draws: np.random.Generator) -> Tensor:
    """Return all views, or `count` of them at random."""
    if count is None or len(views) <= count:
        return views
    return views[torch.from_numpy(np.sort(draws.choice(len(views), count, replace=False)))]


def _loss(logits: Tensor, label: int) -> Tensor:
    targets = _targets(torch.tensor([label], device=logits.device), len(logits))[0]
    return functional.binary_cross_entropy_with_logits(
        logits, targets.to(logits.dtype), reduction="sum"
    )


@torch.inference_mode()
def _validate(
    net: Aggregator,
    load: Load,
    labels: Mapping[str, int],
    inner: Sequence[str],
    device: torch.device,
) -> tuple[float, float]:
    """Return the mean loss of the inner cases, in which each class counts the same; the accuracy.

    A logit above 0 is a status that is positive, or a score that is exceeded.
    """
    net.eval()
    logits = [net(load(case).to(device)).logits for case in inner]
    losses = torch.stack(
        [_loss(own, labels[case]) for own, case in zip(logits, inner, strict=True)]
    )
    weights = _class_weights(torch.tensor([labels[case] for case in inner]))
    hits = [int((own > 0).sum()) == labels[case] for own, case in zip(logits, inner, strict=True)]
    return float((losses.cpu().double() * weights).mean()), float(np.mean(hits))
