"""Training of a network that gives each HER2 view the score of its case."""

import copy
import dataclasses
import logging
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from hemera.config import TrainEncoderOptions
from hemera.errors import TrainingError
from hemera.networks.her2_cnn import Her2Cnn, network_input

log = logging.getLogger(__name__)

Places = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class ScoredViews:
    """Views with the score of their case.

    Attributes:
        pixels: RGB (N, S, S, 3); may be a file that is mapped into memory.
        scores: 0 to 3, (N,).
    """

    pixels: npt.NDArray[np.uint8]
    scores: npt.NDArray[np.int64]

    def batches(self, places: Places, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield RGB (B, 3, S, S), 0 to 1, and scores (B,) of these views in order."""
        for start in range(0, len(places), size):
            own = places[start : start + size]
            images = torch.from_numpy(np.ascontiguousarray(self.pixels[own]))
            yield images.permute(0, 3, 1, 2).float() / 255, torch.from_numpy(self.scores[own])


@dataclasses.dataclass(frozen=True)
class Trained:
    """A network with the weights of its best epoch, and the history of all.

    Attributes:
        epoch: the best, from 1.
        history: rows of epoch, part, quantity and value.
    """

    net: Her2Cnn
    epoch: int
    history: list[tuple[int, str, str, float]]


def train(
    views: ScoredViews,
    fitted: Places,
    validation: Places,
    options: TrainEncoderOptions,
    device: torch.device,
) -> Trained:
    """Train a network with cross-entropy by Adam, and keep the epoch of the best validation.

    The best has the greatest accuracy on the views for validation, of equal ones the least loss;
    without such views the last epoch is kept.

    Args:
        views: all of them.
        fitted: places of the views that are trained on.
        validation: places of those that choose the epoch.

    Raises:
        TrainingError: when a loss is not finite.
    """
    torch.manual_seed(options.seed)
    net = Her2Cnn(options.base_width, options.hidden).to(device)
    if options.standardise:
        net.fit_scale(*_lightness(views, fitted, options.batch_size))
    optimiser = torch.optim.Adam(net.parameters(), options.learning_rate)
    history: list[tuple[int, str, str, float]] = []
    best: tuple[tuple[float, float], int, dict[str, Tensor]] = ((-math.inf, -math.inf), 0, {})
    for epoch in tqdm(range(1, options.epochs + 1), "train_encoder", unit="epoch", disable=None):
        order = np.random.default_rng([options.seed, epoch]).permutation(fitted)
        net.train()
        total = torch.zeros((), dtype=torch.float64, device=device)
        for images, scores in views.batches(order, options.batch_size):
            logits = net(network_input(images.to(device)))
            loss = functional.cross_entropy(logits, scores.to(device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.detach() * len(scores)
        mean = float(total) / len(fitted)
        if not math.isfinite(mean):
            raise TrainingError(
                f"epoch {epoch}: the loss is {mean}; lower train_encoder.learning_rate"
            )
        history.append((epoch, "train", "loss", mean))
        value = (0.0, float(epoch))
        if len(validation):
            accuracy, lost = evaluate(net, views, validation, options.batch_size, device)
            history += [(epoch, "val", "accuracy", accuracy), (epoch, "val", "loss", lost)]
            value = (accuracy, -lost)
        if value > best[0]:
            best = value, epoch, copy.deepcopy(net.state_dict())
    net.load_state_dict(best[2])
    return Trained(net.eval(), best[1], history)


def _lightness(views: ScoredViews, places: Places, batch_size: int) -> tuple[float, float]:
    """Return mean and deviation of the lightness of views."""
    moments = torch.zeros(2, dtype=torch.float64)
    for images, scores in views.batches(places, batch_size):
        found = network_input(images).double()
        moments += torch.stack([found.mean(), found.square().mean()]) * len(scores)
    mean, square = (moments / len(places)).tolist()
    return mean, math.sqrt(max(square - mean**2, 0))


@torch.inference_mode()
def evaluate(
    net: Her2Cnn, views: ScoredViews, places: Places, batch_size: int, device: torch.device
) -> tuple[float, float]:
    """Return accuracy and mean cross-entropy of a network on views."""
    net.eval()
    hits, total = 0, 0.0
    for images, scores in views.batches(places, batch_size):
        known = scores.to(device)
        logits = net(network_input(images.to(device)))
        hits += int((logits.argmax(1) == known).sum())
        total += float(functional.cross_entropy(logits, known, reduction="sum"))
    return hits / len(places), total / len(places)
