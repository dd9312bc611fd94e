"""Aggregators: from the features of the views of a case to one number, with exact contributions.

The number is linear in pooled features, so it is the sum of one contribution per view and a bias.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hemera.errors import TrainingError


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


class Aggregator(nn.Module):
    """Base of both aggregators: features are first shifted and scaled, see `fit_scale`."""

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

    def forward(self, views: Tensor) -> Pooled:
        """Return the logits of one case from the features of its views (N, D), N at least 1."""
        raise NotImplementedError


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


def build_aggregator(
    name: str,
    features: int,
    target: str,
    *,
    embed_width: int,
    attention_width: int,
    dropout: float,
) -> Aggregator:
    """Return an untrained aggregator, mean or abmil, for target status or score."""
    if name == "mean":
        return MeanAggregator(features, target)
    if name == "abmil":
        return AbmilAggregator(features, target, embed_width, attention_width, dropout)
    raise TrainingError(f"aggregator {name}: unknown; choose mean or abmil")


def score_probabilities(logits: Tensor) -> Tensor:
    """Return the probabilities of the scores, (..., 4), from logits of exceeding them, (..., 3)."""
    above = torch.sigmoid(logits)
    ones, zeros = torch.ones_like(above[..., :1]), torch.zeros_like(above[..., :1])
    return torch.cat([ones, above], -1) - torch.cat([above, zeros], -1)
