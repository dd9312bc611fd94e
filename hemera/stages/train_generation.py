"""train_generation: GenerationNet learns to paint HER2 from H&E (HEMERA paper, 3.1 and 4.1).

Reads the index and, through it, the tiles of the subset of GenerationNet; writes the generator's
weights, a JSON beside them and the history. The discriminator lives in the checkpoint only.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hemera.config import TrainGenerationOptions
from hemera.dataset.torch_dataset import TileDataset, Weighting
from hemera.evaluation import metrics
from hemera.networks import losses, similarity
from hemera.networks.discriminator import PatchGAN
from hemera.networks.generation import build_generator, initialise
from hemera.training import session
from hemera.training.logging import sheet

log = logging.getLogger(__name__)

THRESHOLD_TILES = 64
"""Training tiles from which the DAB threshold of balanced Dice is fitted."""

THRESHOLD_MIN = 0.05
"""The lowest DAB density that fit may give: below it lies the noise of unstained tissue."""


def run(
    *,
    index: Path,
    checkpoints: Path,
    generator: Path,
    metadata: Path,
    history: Path,
    options: TrainGenerationOptions,
) -> None:
    """Train GenerationNet; go on from a checkpoint where there is one.

    Args:
        index: the index; its column generation_split names the tiles.
        checkpoints: folder in which every run has a folder of its own.
        generator: weights to write, safetensors.
        metadata: JSON beside them to write: options, versions, fingerprint, counts.
        history: table to write, one row per epoch, part and quantity.
        options: the options.

    Raises:
        TrainingError: an empty subset, a loss that is not finite, a checkpoint that does not fit.
    """
    facts = session.index_facts(index, "generation", options.crop_px)
    with session.computing(options) as compute:
        parts = {
            part: TileDataset(
                index,
                network="generation",
                part=part,
                engine=facts.engine,
                images=("he", "her2", "weight"),
                weighting=Weighting(
                    options.weight_map,
                    options.mask_source,
                    options.renormalise_mean,
                    options.registration_scale_um,
                ),
                crop_px=options.crop_px,
                flips=(1,) if options.flip else (),
                deferred=part == "train" and compute.device.type != "cpu",
                seed=options.seed,
            )
            for part in ("train", "val")
        }
        model: dict[str, Any] = {
            "generator": options.network,
            "base_width": options.base_width,
            "norm": options.norm,
            "dropout": options.dropout,
        }
        net = build_generator(**model)
        critic = PatchGAN(
            6, options.discriminator_width, options.discriminator_layers, options.norm
        )
        modules = {"generator": net, "discriminator": critic}
        for module in modules.values():
            initialise(module)
            compute.place(module, compiled=options.compile)
        session.part_ways(compute, options.seed)
        betas = (options.beta1, options.beta2)
        course = session.Run(
            checkpoints / session.run_digest(options, facts),
            modules,
            {
                name: torch.optim.Adam(
                    module.parameters(), options.learning_rate, betas, fused=True
                )
                for name, module in modules.items()
            },
            kept="generator",
            minutes=options.checkpoint_minutes,
            ranks=compute.ranks,
            scaler=compute.scaler,
        )
        course.resume()
        threshold = options.dice_threshold
        if threshold is None and options.dice_source == "dab":
            threshold = fit_threshold(parts["train"])
            log.info("balanced Dice: DAB density %.3f, fitted on training tiles", threshold)
        validation = session.validation_batches(
            parts["val"], options.batch_size, options.workers, compute
        )
        examples = session.samples(parts["val"], options.sample_tiles)

        def describe(epoch: int) -> dict[str, Any]:
            described = session.describe_run("generation", model, options, facts, course, epoch)
            return {**described, "dice_threshold": threshold}

        session.train(
            course,
            compute,
            parts["train"],
            options,
            rate=lambda epoch: options.learning_rate * rate_factor(epoch, options),
            step=lambda batches: train_step(batches, course, compute, options, threshold),
            validate=lambda: validate(net, validation, compute, options),
            judged=lambda validated: -validated["reconstruction"],
            show=lambda: show(net, examples, compute),
            describe=describe,
        )
        session.write_results(
            course, options, describe, weights=generator, metadata=metadata, history=history
        )


def rate_factor(epoch: int, options: TrainGenerationOptions) -> float:
    """Return what the learning rate is multiplied with in an epoch, from 1 (HEMERA paper, 4.1).

    Constant up to decay_from_epoch n, then falling to 1 / (nd + 1) in the last epoch, nd being the
    epochs that decay. With ``lr_step: start`` the fall comes one epoch earlier and the last epoch
    trains at rate 0, as in the public code, which steps its scheduler before an epoch.
    """
    n = options.decay_from_epoch
    shift = 1 if options.lr_step == "start" else 0
    return 1 - max(0, epoch + shift - n) / (options.epochs - n + 1)


def fit_threshold(tiles: TileDataset) -> float:
    """Return the DAB density that parts stained from unstained pixels of training tiles, by Otsu.

    Takes up to THRESHOLD_TILES tiles, spread evenly over the subset, and every fourth pixel of
    them each way; the result lies between THRESHOLD_MIN and 3.
    """
    positions = np.unique(np.linspace(0, len(tiles) - 1, THRESHOLD_TILES).round().astype(int))
    edges = np.linspace(0, 3, 601)
    histogram = np.zeros(600, np.int64)
    for position in positions:
        image = np.ascontiguousarray(
            tiles.stored(int(position), ["her2"])["her2"][::4, ::4].transpose(2, 0, 1)
        )
        density = losses.dab_density(torch.from_numpy(image)[None].float() / 255)
        histogram += np.histogram(density.clamp(0, 3).numpy(), edges)[0]
    if np.count_nonzero(histogram) < 2:
        return THRESHOLD_MIN
    centres = (edges[1:] + edges[:-1]) / 2
    below, total = np.cumsum(histogram[:-1]), histogram.sum()
    sum_below, whole = np.cumsum(histogram * centres)[:-1], float(histogram @ centres)
    # Otsu: the cut with the greatest variance between what lies below and what lies above.
    apart = np.square(whole * below - sum_below * total) / np.maximum(below * (total - below), 1.0)
    # Where nothing lies between the two, every cut is as good: take the middle one.
    best = np.flatnonzero(apart >= apart.max() * (1 - 1e-9))
    return float(np.clip(centres[best].mean(), THRESHOLD_MIN, 3))


def train_step(
    batches: Sequence[dict[str, Any]],
    course: session.Run,
    compute: session.Compute,
    options: TrainGenerationOptions,
    threshold: float | None,
) -> dict[str, Tensor]:
    """Update the discriminator, then the generator, and return the losses.

    Where a batch comes in parts, the gradients of both are taken part by part, with the weights of
    before the step; where it does not, the generator meets the discriminator that was updated.
    """
    net, critic = course.modules["generator"], course.modules["discriminator"]
    parts = len(batches)
    net.train()
    critic.train()
    for optimiser in course.optimisers.values():
        optimiser.zero_grad()
    found: list[dict[str, Tensor]] = []
    for batch in batches:
        source = compute.to_unit(batch["he"]) * 2 - 1
        target = compute.to_unit(batch["her2"]) * 2 - 1
        weight = batch["weight"].to(compute.device)
        with compute.autocast():
            generated = net(source)
        judged, real = generated.float(), target
        if options.weight_adversarial:
            judged, real = judged * weight, target * weight

        critic.requires_grad_(True)
        with compute.autocast():
            false = critic(torch.cat((source, judged.detach()), 1))
            true = critic(torch.cat((source, real), 1))
        critic_loss = 0.5 * (
            losses.adversarial(false, False, options.gan_loss)
            + losses.adversarial(true, True, options.gan_loss)
        )
        compute.backward(critic_loss, parts)
        if parts == 1:
            compute.update(course.optimisers["discriminator"], critic)

        # The generator's gradient passes through the discriminator, which does not learn from it.
        critic.requires_grad_(False)
        with compute.autocast():
            answer = critic(torch.cat((source, judged), 1))
        own = generator_losses(generated.float(), target, weight, options, threshold)
        own["adversarial"] = losses.adversarial(answer, True, options.gan_loss)
        total = own["adversarial"] + weigh_all(own, options)
        compute.backward(total, parts)
        found.append({"total": total, "discriminator": critic_loss, **own})
    if parts > 1:
        compute.update(course.optimisers["discriminator"], critic)
    compute.update(course.optimisers["generator"], net)
    compute.scaler.update()
    return {name: torch.stack([part[name].detach() for part in found]).mean() for name in found[0]}


def generator_losses(
    generated: Tensor,
    target: Tensor,
    weight: Tensor,
    options: TrainGenerationOptions,
    threshold: float | None,
) -> dict[str, Tensor]:
    """Return the losses of generated images beside real ones, by name, unweighed."""
    found = {
        f"l1_{level}": each.mean()
        for level, each in enumerate(
            losses.pyramid_l1(generated, target, weight, len(options.l1_weights)), 1
        )
    }
    if options.dice_source != "none":
        pair = [(generated + 1) / 2, (target + 1) / 2]
        if options.dice_source == "dab":
            assert threshold is not None
            pair = [losses.soft_dab(image, options.dice_slope, threshold) for image in pair]
        found["dice"] = losses.balanced_dice(pair[0], pair[1], weight)
    if options.variance_weight > 0:
        found["variance"] = losses.variance_penalty(
            generated, target, unbiased=options.variance_estimator == "unbiased"
        )
    return found


def weigh_all(found: Mapping[str, Tensor], options: TrainGenerationOptions) -> Tensor:
    """Return the weighted sum of what `generator_losses` found."""
    levels = [found[f"l1_{level}"] for level in range(1, len(options.l1_weights) + 1)]
    total = weigh(levels, options.l1_weights)
    if "dice" in found:
        total = total + options.dice_weight * found["dice"]
    if "variance" in found:
        total = total + options.variance_weight * found["variance"]
    return total


def weigh(levels: list[Tensor], weights: tuple[float, ...]) -> Tensor:
    """Return the weighted sum of a pyramid's levels, of each image or of all."""
    parts = [weight * level for weight, level in zip(weights, levels, strict=True)]
    return torch.stack(parts).sum(0)


@torch.no_grad()
def validate(
    net: nn.Module,
    batches: DataLoader[dict[str, Any]],
    compute: session.Compute,
    options: TrainGenerationOptions,
) -> dict[str, float]:
    """Return the weighted reconstruction loss, PSNR and SSIM over the validation tiles.

    The generator is in evaluation mode: its batch norms use their running statistics.
    """
    net.eval()
    found: list[Tensor] = []
    for batch in session.ahead(batches, compute.device):
        with compute.autocast():
            generated = net(compute.to_unit(batch["he"]) * 2 - 1).float()
        real = compute.to_unit(batch["her2"])
        levels = losses.pyramid_l1(
            generated, real * 2 - 1, batch["weight"], len(options.l1_weights)
        )
        painted = similarity.as_stored(generated)
        reconstruction = weigh(levels, options.l1_weights)
        found.append(
            torch.stack(
                (reconstruction, similarity.psnr(painted, real), similarity.ssim(painted, real)), 1
            )
        )
    # Read once: each reading makes the GPU wait.
    rows = torch.cat(found).tolist() if found else []
    # An exact sum: the same in whatever order processes bring their tiles.
    distances, noise, alike = zip(*compute.ranks.gather(rows), strict=True)
    return {
        "reconstruction": math.fsum(distances) / len(distances),
        "psnr_db": session.mean_of(noise),
        "ssim": session.mean_of(alike),
    }


@torch.no_grad()
def show(
    net: nn.Module, examples: Sequence[dict[str, Any]], compute: session.Compute
) -> npt.NDArray[np.uint8]:
    """Draw validation tiles: H&E, HER2, and HER2 as painted, one tile a row."""
    net.eval()
    rows = []
    for item in examples:
        with compute.autocast():
            painted = net(compute.to_unit(item["he"][None]) * 2 - 1)[0].float()
        images = [item[name].permute(1, 2, 0).numpy() for name in ("he", "her2")]
        rows.append([*images, metrics.to_uint8(painted.permute(1, 2, 0).cpu().numpy())])
    return sheet(rows)
