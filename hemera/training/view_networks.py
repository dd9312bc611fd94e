"""Training of the encoders of stage train_encoder: networks that label views of tiles."""

import copy
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from hemera.config import HER2_CNN, STAIN, STAIN_MAP, TUMOUR, TrainEncoderOptions
from hemera.dataset.labelled_views import UNKNOWN
from hemera.errors import TrainingError
from hemera.networks.her2_cnn import Her2Cnn, network_input
from hemera.networks.view_classifiers import (
    MAP_CLASSES,
    TUMOUR_CLASSES,
    build_classifier,
    load_pretrained,
)
from hemera.sheet import SCORES

Places = npt.NDArray[np.int64]
Confusion = npt.NDArray[np.int64]

CLASSES = {
    HER2_CNN: len(SCORES),
    TUMOUR: TUMOUR_CLASSES,
    STAIN: len(SCORES),
    STAIN_MAP: MAP_CLASSES,
}
SELECTED_BY = {HER2_CNN: "accuracy", TUMOUR: "f1", STAIN: "f1", STAIN_MAP: "iou"}
"""What chooses the epoch of each network, on the views for validation."""


@dataclasses.dataclass(frozen=True)
class LabelledViews:
    """Views with their labels; both may be files that are mapped into memory.

    Attributes:
        pixels: RGB (N, S, S, 3).
        labels: of views (N,), or of their pixels (N, S, S), of which some may be `UNKNOWN`.
    """

    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]

    def batches(self, places: Places, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield RGB (B, 3, S, S), 0 to 1, and labels (B, ...) of these views in order."""
        for start in range(0, len(places), size):
            own = places[start : start + size]
            images = torch.from_numpy(np.ascontiguousarray(self.pixels[own]))
            labels = torch.from_numpy(np.ascontiguousarray(self.labels[own])).long()
            yield images.permute(0, 3, 1, 2).float() / 255, labels


@dataclasses.dataclass(frozen=True)
class Trained:
    """A network with the weights of its best epoch, and the history of all.

    Attributes:
        model: arguments that build the network.
        pretrained_sha256: of the weights that it started from; None: from random ones.
        epoch: the best, from 1.
        history: rows of epoch, part, quantity and value.
    """

    net: nn.Module
    model: dict[str, Any]
    pretrained_sha256: str | None
    epoch: int
    history: list[tuple[int, str, str, float]]


def build(
    network: str, options: TrainEncoderOptions
) -> tuple[nn.Module, dict[str, Any], str | None]:
    """Return an untrained network, or with the weights that the options name.

    Also its arguments, and the SHA-256 of these weights.
    """
    model: dict[str, Any]
    if network == HER2_CNN:
        model = {"base_width": options.base_width, "hidden": options.hidden}
        return Her2Cnn(**model), model, None
    if network == STAIN_MAP:
        model = {"encoder": options.map_encoder, "input_px": options.map_px}
    else:
        model = {
            "classes": CLASSES[network],
            "architecture": options.architecture,
            "input_px": options.input_px,
        }
    net = build_classifier(network, model)
    path = options.path(network)
    return net, model, None if path is None else load_pretrained(net, path)


def train(
    network: str,
    views: LabelledViews,
    fitted: Places,
    validation: Places,
    options: TrainEncoderOptions,
    device: torch.device,
) -> Trained:
    """Train a network with cross-entropy by AdamW, and keep the epoch of the best validation.

    The best has the greatest value of `SELECTED_BY` on the views for validation, of equal ones the
    least loss; without such views the last epoch is kept.

    Args:
        network: her2_cnn, tumour, stain or stain_map.
        views: all of them.
        fitted: places of the views that are trained on.
        validation: places of those that choose the epoch.

    Raises:
        TrainingError: when a loss is not finite.
    """
    torch.manual_seed(options.seed)
    net, model, pretrained = build(network, options)
    net.to(device)
    if options.standardise and isinstance(net, Her2Cnn):
        net.fit_scale(*_lightness(views, fitted, options.batch_size))
    optimiser = torch.optim.AdamW(
        net.parameters(), options.learning_rate, weight_decay=options.weight_decay
    )
    steps = options.epochs * math.ceil(len(fitted) / options.batch_size)
    end = 0.0 if options.schedule == "linear" else 1.0
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, end, total_iters=steps)
    history: list[tuple[int, str, str, float]] = []
    best: tuple[tuple[float, float], int, dict[str, Tensor]] = ((-math.inf, -math.inf), 0, {})
    for epoch in tqdm(range(1, options.epochs + 1), network, unit="epoch", disable=None):
        draws = np.random.default_rng([options.seed, epoch])
        net.train()
        total = torch.zeros((), dtype=torch.float64, device=device)
        for images, labels in views.batches(draws.permutation(fitted), options.batch_size):
            if options.augment:
                images, labels = _turned(images, labels, draws)
            logits = _logits(net, images.to(device))
            loss = functional.cross_entropy(logits, labels.to(device), ignore_index=UNKNOWN)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.detach() * len(labels)
        mean = float(total) / len(fitted)
        if not math.isfinite(mean):
            raise TrainingError(
                f"{network}, epoch {epoch}: the loss is {mean}; lower train_encoder.learning_rate"
            )
        history.append((epoch, "train", "loss", mean))
        value = (0.0, float(epoch))
        if len(validation):
            found, lost = evaluate(net, views, validation, options.batch_size, device)
            quality = quality_of(found)[SELECTED_BY[network]]
            history += [(epoch, "val", SELECTED_BY[network], quality), (epoch, "val", "loss", lost)]
            value = (quality, -lost)
        if value > best[0]:
            best = value, epoch, copy.deepcopy(net.state_dict())
    net.load_state_dict(best[2])
    return Trained(net.eval(), model, pretrained, best[1], history)


def _logits(net: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = net(network_input(images) if isinstance(net, Her2Cnn) else images)
    return logits


def _turned(images: Tensor, labels: Tensor, draws: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Flip and turn each view by quarters at random, with the labels of its pixels."""
    flips, turns = draws.integers(2, size=len(images)), draws.integers(4, size=len(images))
    found = []
    for values in (images, labels) if labels.ndim > 1 else (images,):
        each = [
            torch.rot90(one.flip(-1) if flip else one, int(turn), (-2, -1))
            for one, flip, turn in zip(values, flips, turns, strict=True)
        ]
        found.append(torch.stack(each))
    return (found[0], found[1]) if len(found) > 1 else (found[0], labels)


def _lightness(views: LabelledViews, places: Places, batch_size: int) -> tuple[float, float]:
    """Return mean and deviation of the lightness of views."""
    moments = torch.zeros(2, dtype=torch.float64)
    for images, labels in views.batches(places, batch_size):
        found = network_input(images).double()
        moments += torch.stack([found.mean(), found.square().mean()]) * len(labels)
    mean, square = (moments / len(places)).tolist()
    return mean, math.sqrt(max(square - mean**2, 0))


@torch.inference_mode()
def evaluate(
    net: nn.Module, views: LabelledViews, places: Places, batch_size: int, device: torch.device
) -> tuple[Confusion, float]:
    """Return how often a label (row) is answered by a class (column), and the mean loss."""
    net.eval()
    counts: Any = 0
    total = 0.0
    for images, labels in views.batches(places, batch_size):
        logits = _logits(net, images.to(device)).cpu()
        classes = logits.shape[1]
        known = labels != UNKNOWN
        pairs = classes * labels[known] + logits.argmax(1)[known]
        counts = counts + torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)
        total += float(functional.cross_entropy(logits, labels, ignore_index=UNKNOWN)) * len(labels)
    return counts.numpy(), total / len(places)


def quality_of(counts: Confusion) -> dict[str, float]:
    """Return accuracy, macro F1 and mean intersection over union of a confusion matrix.

    Classes that are neither labelled nor answered are left out of both means.
    """
    hits = np.diag(counts).astype(float)
    both = counts.sum(0) + counts.sum(1)
    present = both > 0
    hits_present, both_present = hits[present], both[present]
    return {
        "accuracy": float(hits.sum() / counts.sum()),
        "f1": float((2 * hits_present / both_present).mean()),
        "iou": float((hits_present / (both_present - hits_present)).mean()),
    }
