"""Training of the network that finds nuclei."""

import dataclasses
import logging
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

from hemera.networks.nuclei import NucleusNet

log = logging.getLogger(__name__)

_WARM_UP_STEPS = 50
_GRADIENT_NORM_MAX = 2.0
_WEIGHT_DECAY = 1e-3
# Pixels that are added to both sides of the Dice coefficient, so that images without nuclei count.
_DICE_SMOOTHING = 20.0
_CENTRE_WEIGHT = 3.0


@dataclasses.dataclass(frozen=True)
class Batch:
    """Densities (N, 3, H, W), and (N, H, W) each: centres, insides, weights; float32."""

    densities: Tensor
    centre: Tensor
    nucleus: Tensor
    weight: Tensor


def train(batches: Iterator[Batch], steps: int, *, seed: int, rate: float) -> NucleusNet:
    """Train a network on the processor; the same batches and seed give the same weights.

    AdamW with a cosine schedule. The loss is the cross-entropy of centres and of insides, and half
    the Dice loss of insides.

    Args:
        batches: at least `steps`.
        steps: weight updates.
        seed: of the initial weights.
        rate: highest learning rate.
    """
    torch.manual_seed(seed)
    net = NucleusNet()
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(net.parameters(), rate, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / _WARM_UP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            + 0.003
        ),
    )
    net.train()
    total = torch.zeros(3)
    for step in tqdm(range(1, steps + 1), desc="train-nuclei", unit="step", disable=None):
        parts = _losses(net, next(batches))
        optimizer.zero_grad()
        (parts[0] + parts[1] + 0.5 * parts[2]).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), _GRADIENT_NORM_MAX)
        optimizer.step()
        schedule.step()
        total += parts.detach()
        if step % 200 == 0:
            centre, nucleus, dice = (total / 200).tolist()
            log.info("step %d: centre %.4f, inside %.4f, dice %.4f", step, centre, nucleus, dice)
            total.zero_()
    net.eval()
    return net


def _losses(net: NucleusNet, batch: Batch) -> Tensor:
    """Return the losses (3,) of centres, insides, and their overlap."""
    logits = net(batch.densities.contiguous(memory_format=torch.channels_last))
    weight = batch.weight
    centre = binary_cross_entropy_with_logits(logits[:, 0], batch.centre, reduction="none")
    centre = (centre * weight * (1 + _CENTRE_WEIGHT * batch.centre)).mean()
    nucleus = binary_cross_entropy_with_logits(logits[:, 1], batch.nucleus, reduction="none")
    inside = torch.sigmoid(logits[:, 1]) * weight
    true = batch.nucleus * weight
    both = (inside * true).sum((1, 2))
    either = inside.sum((1, 2)) + true.sum((1, 2))
    dice = 1 - (2 * both + _DICE_SMOOTHING) / (either + _DICE_SMOOTHING)
    return torch.stack([centre, (nucleus * weight).mean(), dice.mean()])
