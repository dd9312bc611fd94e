"""Aggregators: from the features of the views of a case to one number, with exact contributions.

The number is linear in pooled features, so it is the sum of one contribution per view and a bias;
that of `TopScoresAggregator` is linear in the selected scores as long as no unit changes its sign.
"""

import abc
import itertools
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hemera.config import AggregateOptions
from hemera.errors import TrainingError
from hemera.sheet import SCORES


class Pooled(NamedTuple):
    """Logits of a case, (K,), and of its views (N,) the attention and the contribution.

    `bias` and the sum of the contributions are the logit that is explained: of status the only
    one, of score that of more than 1+.
    """

    logits: Tensor
    attention: Tensor
    contribution: Tensor
    bias: Tensor


class Head(nn.Module):
    """A linear function of pooled features, with one bias for status, three for score.

    Of the score, the logits of more than 0, 1+ and 2+ share their weights and are in order (CORAL,
    Cao, Mirjalili and Raschka 2020): each bias is the last less a positive number.
    """

    def __init__(self, width: int, target: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        bound = width**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        steps = [0.0] if target == "status" else [1.0, 0.5, 0.5]
        self.steps = nn.Parameter(torch.tensor(steps))

    def biases(self) -> Tensor:
        """Return the biases, (K,), in descending order."""
        first, rest = self.steps[:1], self.steps[1:]
        return torch.cat([first, first - nn.functional.softplus(rest).cumsum(0)])

    def pool(self, features: Tensor, attention: Tensor) -> Pooled:
        """Return the logits of views (N, width) with attention (N,), which sums to 1."""
        contribution = attention * (features @ self.weight)
        biases = self.biases()
        explained = biases[0] if len(biases) == 1 else biases[1]
        return Pooled(biases + contribution.sum(), attention, contribution, explained)


class Aggregator(nn.Module, abc.ABC):
    """Base of all aggregators: features are first shifted and scaled, see `fit_scale`."""

    shift: Tensor
    scale: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))

    def fit_scale(self, mean: Tensor, deviation: Tensor) -> None:
        """Give features of this mean and deviation, (D,), mean 0 and deviation 1.

        A constant feature becomes 0.
        """
        constant = deviation < 1e-6
        self.shift.copy_(mean)
        self.scale.copy_(torch.where(constant, 0, 1 / deviation.clamp_min(1e-6)))

    @abc.abstractmethod
    def forward(self, views: Tensor) -> Pooled:
        """Return the logits of one case from the features of its views (N, D), N at least 1."""


class MeanAggregator(Aggregator):
    """A linear function of the mean of the views."""

    def __init__(self, features: int, target: str) -> None:
        super().__init__(features)
        self.head = Head(features, target)
        nn.init.zeros_(self.head.weight)

    def forward(self, views: Tensor) -> Pooled:
        """Return the logits of one case; see `Aggregator.forward`."""
        views = (views - self.shift) * self.scale
        pooled: Pooled = self.head.pool(views, views.new_full((len(views),), 1 / len(views)))
        return pooled


class AbmilAggregator(Aggregator):
    """Gated attention over views (Ilse, Tomczak and Welling 2018), in the sizes of MIL-Lab."""

    def __init__(
        self,
        features: int,
        target: str,
        embed_width: int = 512,
        attention_width: int = 384,
        dropout: float = 0.25,
    ) -> None:
        super().__init__(features)
        self.embed = nn.Sequential(nn.Linear(features, embed_width), nn.ReLU(), nn.Dropout(dropout))
        self.tanh = nn.Linear(embed_width, attention_width)
        self.gate = nn.Linear(embed_width, attention_width)
        self.attend = nn.Linear(attention_width, 1)
        self.head = Head(embed_width, target)

    def forward(self, views: Tensor) -> Pooled:
        """Return the logits of one case; see `Aggregator.forward`."""
        embedded = self.embed((views - self.shift) * self.scale)
        gated = torch.tanh(self.tanh(embedded)) * torch.sigmoid(self.gate(embedded))
        attention = torch.softmax(self.attend(gated).squeeze(-1), dim=0)
        pooled: Pooled = self.head.pool(embedded, attention)
        return pooled


def soft_argmax(probabilities: Tensor, beta: float) -> Tensor:
    """Return the score of views, (N,), from the probabilities of the scores 0 to 3+, (N, 4).

    The sum over scores i of i times softmax(beta * logits)_i, as Oliveira et al. have it; the
    logarithms of the probabilities are the logits less a constant, which the softmax cancels.
    """
    logits = probabilities.double().clamp_min(1e-12).log()
    places = torch.arange(probabilities.shape[-1], dtype=logits.dtype, device=logits.device)
    return (torch.softmax(beta * logits, dim=-1) * places).sum(-1).to(probabilities.dtype)


def top_places(views: int, count: int, fraction: float) -> npt.NDArray[np.int64]:
    """Return which of so many scores in descending order are selected, (`count`,), ascending.

    Oliveira et al.: of the highest `fraction`, k of them, the first, the last and the others evenly
    between; the `count` highest where k is less. Where there are fewer views than `count`, for
    which they cut tiles again with overlap, each is repeated, equally often but for one.
    """
    if views < count:
        return np.sort(np.arange(count) % views)
    # The fraction as written: 0.15 times 20 is 3, whatever the binary number nearest to 0.15 is.
    top = max(count, int(Fraction(str(fraction)) * views))
    return np.rint(np.linspace(0, top - 1, count)).astype(np.int64)


class TopScoresAggregator(Aggregator):
    """The scores of the highest views, in order, through dense layers (Oliveira et al. 2020).

    With 300 scores and target status it has 118,338 parameters. Its contributions are the local
    ones: the gradient of the logit times each selected score, summed over the places of a view.
    They and `bias` are the logit exactly, because the layers are piecewise linear.
    """

    def __init__(
        self, target: str, count: int = 300, fraction: float = 0.15, beta: float = 1000.0
    ) -> None:
        super().__init__(len(SCORES))
        self.count, self.fraction, self.beta = count, fraction, beta
        widths = (count, 256, 128, 64)
        self.layers = nn.ModuleList(
            nn.Linear(before, after) for before, after in itertools.pairwise(widths)
        )
        self.head = nn.Linear(widths[-1], 2) if target == "status" else Head(widths[-1], target)

    def forward(self, views: Tensor) -> Pooled:
        """Return the logits of one case from the probabilities of its views (N, 4)."""
        scores = soft_argmax(views, self.beta)
        ordered = torch.argsort(scores, descending=True, stable=True)
        places = torch.from_numpy(top_places(len(views), self.count, self.fraction))
        chosen = ordered[places.to(views.device)]
        found, active = scores[chosen], []
        for layer in self.layers:
            found = layer(found)
            active.append(found > 0)
            found = found.relu()
        if isinstance(self.head, Head):
            gradient: Tensor = self.head.weight
            logits = self.head.biases() + found @ gradient
            explained = logits[1]
        else:
            # Of a softmax of two, only the difference counts.
            gradient = self.head.weight[1] - self.head.weight[0]
            negative, positive = self.head(found)
            logits = (positive - negative)[None]
            explained = logits[0]
        for layer, signs in zip(reversed(self.layers), reversed(active), strict=True):
            gradient = (gradient * signs) @ layer.weight
        each = gradient * scores[chosen]
        zeros = torch.zeros_like(scores)
        return Pooled(
            logits,
            zeros.index_add(0, chosen, torch.full_like(each, 1 / self.count)),
            zeros.index_add(0, chosen, each),
            explained - each.sum(),
        )


def build_aggregator(options: AggregateOptions, features: int, target: str) -> Aggregator:
    """Return an untrained aggregator of so many features, for target status or score.

    Raises:
        TrainingError: when the aggregator cannot combine these features.
    """
    if options.aggregator == "mean":
        return MeanAggregator(features, target)
    if options.aggregator == "abmil":
        widths = options.embed_width, options.attention_width
        return AbmilAggregator(features, target, *widths, options.dropout)
    if options.aggregator != "top_scores":
        raise TrainingError(
            f"aggregator {options.aggregator}: a rule, which is not trained; choose mean, abmil or "
            "top_scores"
        )
    if features != len(SCORES):
        raise TrainingError(
            f"aggregator top_scores: {features} features, and it needs the probabilities of the "
            f"{len(SCORES)} scores; use the encoder her2_cnn, or aggregator abmil"
        )
    return TopScoresAggregator(
        target, options.top_scores, options.top_fraction, options.soft_argmax_beta
    )


def score_probabilities(logits: Tensor) -> Tensor:
    """Return the probabilities of the scores, (..., 4), from logits of exceeding them, (..., 3)."""
    above = torch.sigmoid(logits)
    ones, zeros = torch.ones_like(above[..., :1]), torch.zeros_like(above[..., :1])
    return torch.cat([ones, above], -1) - torch.cat([above, zeros], -1)
