"""train_generation: GenerationNet learns to paint HER2 from H&E (HEMERA paper, 3.1 and 4.1).

Reads the index and, through it, the tiles of the subset of GenerationNet; writes the generator's
weights, a JSON beside them and the history. The discriminator lives in the checkpoint only.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from hemera import metrics, tables, training
from hemera.config import TrainGenerationOptions
from hemera.dataset import Order, TileDataset, Weighting
from hemera.models import losses
from hemera.models.discriminator import PatchGAN
from hemera.models.generation import GenerationNet, initialise

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
    facts = training.index_facts(index, "generation")
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
            seed=options.seed,
        )
        for part in ("train", "val")
    }
    with training.session(
        seed=options.seed,
        threads=options.torch_threads,
        device=options.device,
        deterministic=options.deterministic,
    ) as device:
        net = GenerationNet(options.network, options.base_width)
        critic = PatchGAN(6, options.discriminator_width, options.discriminator_layers)
        initialise(net)
        initialise(critic)
        for module in (net, critic):
            training.place(module, device)
        betas = (options.beta1, options.beta2)
        optimisers: dict[str, torch.optim.Optimizer] = {
            "generator": torch.optim.Adam(net.parameters(), options.learning_rate, betas),
            "discriminator": torch.optim.Adam(critic.parameters(), options.learning_rate, betas),
        }
        course = training.Run(
            checkpoints / training.run_digest(options, facts),
            {"generator": net, "discriminator": critic},
            optimisers,
            kept="generator",
            minutes=options.checkpoint_minutes,
        )
        course.resume()
        threshold = options.dice_threshold
        if threshold is None and options.dice_source == "dab":
            threshold = fit_threshold(parts["train"])
            log.info("balanced Dice: DAB density %.3f, fitted on training tiles", threshold)
        step = functools.partial(
            train_step, course=course, device=device, options=options, threshold=threshold
        )

        progress = course.progress
        order = Order(
            len(parts["train"]),
            options.batch_size,
            seed=options.seed,
            epochs=options.epochs,
            epoch=progress.epoch,
            step=progress.step,
        )
        batches = iter(training.training_batches(parts["train"], order, options.workers))
        validation = training.validation_batches(parts["val"], options.batch_size, options.workers)
        started, first = time.monotonic(), progress.epoch
        with tqdm(total=len(order), unit="step", disable=None) as bar:
            while progress.epoch <= options.epochs:
                rate = options.learning_rate * rate_factor(progress.epoch, options)
                for optimiser in optimisers.values():
                    for group in optimiser.param_groups:
                        group["lr"] = rate
                while progress.step < order.steps:
                    batch = next(batches)
                    progress.add(step(batch), batch["tile"])
                    bar.update()
                    course.save()
                validated = validate(net, validation, device, options)
                course.judge(-validated["reconstruction"])
                progress.close_epoch({"learning_rate": rate}, validated)
                training.log_epoch(progress, options.epochs, started, first)
        course.save(force=True)

        chosen = options.epochs if options.select == "last" else progress.best_epoch
        training.write_weights(
            generator, net.state_dict() if options.select == "last" else course.best
        )
        described = training.describe_run(
            "generation",
            {"generator": options.network, "base_width": options.base_width},
            options,
            facts,
            course,
            chosen,
        )
        described["dice_threshold"] = threshold
        training.write_metadata(metadata, described)
    tables.write(history, progress.rows(), tables.HISTORY)


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
    batch: dict[str, Any],
    *,
    course: training.Run,
    device: torch.device,
    options: TrainGenerationOptions,
    threshold: float | None,
) -> dict[str, Tensor]:
    """Update the discriminator, then the generator, and return the losses."""
    net, critic = course.modules["generator"], course.modules["discriminator"]
    source = training.to_unit(batch["he"], device) * 2 - 1
    target = training.to_unit(batch["her2"], device) * 2 - 1
    weight = batch["weight"].to(device)
    net.train()
    critic.train()
    generated = net(source)
    judged, real = generated, target
    if options.weight_adversarial:
        judged, real = generated * weight, target * weight

    critic.requires_grad_(True)
    course.optimisers["discriminator"].zero_grad()
    false = losses.adversarial(critic(torch.cat((source, judged.detach()), 1)), False)
    true = losses.adversarial(critic(torch.cat((source, real), 1)), True)
    critic_loss = 0.5 * (false + true)
    critic_loss.backward()
    course.optimisers["discriminator"].step()

    # The generator's gradient passes through the discriminator, which does not learn from it.
    critic.requires_grad_(False)
    course.optimisers["generator"].zero_grad()
    fooled = losses.adversarial(critic(torch.cat((source, judged), 1)), True)
    levels = losses.pyramid_l1(generated, target, weight, len(options.l1_weights))
    total = fooled + weigh(levels, options.l1_weights)
    found = {"discriminator": critic_loss, "adversarial": fooled}
    found |= {f"l1_{level}": value for level, value in enumerate(levels, 1)}
    if options.dice_source != "none":
        pair = [(generated + 1) / 2, (target + 1) / 2]
        if options.dice_source == "dab":
            assert threshold is not None
            pair = [losses.soft_dab(image, options.dice_slope, threshold) for image in pair]
        found["dice"] = losses.balanced_dice(pair[0], pair[1], weight)
        total = total + options.dice_weight * found["dice"]
    total.backward()
    course.optimisers["generator"].step()
    return {"total": total, **found}


def weigh(levels: list[Tensor], weights: tuple[float, ...]) -> Tensor:
    """Return the weighted sum of a pyramid's levels."""
    return torch.stack(
        [weight * level for weight, level in zip(weights, levels, strict=True)]
    ).sum()


@torch.no_grad()
def validate(
    net: torch.nn.Module,
    batches: DataLoader[dict[str, Any]],
    device: torch.device,
    options: TrainGenerationOptions,
) -> dict[str, float]:
    """Return the weighted reconstruction loss, PSNR and SSIM over the validation tiles.

    The generator is in evaluation mode: its batch norms use their running statistics.
    """
    net.eval()
    reconstruction: list[float] = []
    noise: list[float] = []
    similarity: list[float] = []
    for batch in batches:
        generated = net(training.to_unit(batch["he"], device) * 2 - 1)
        target = training.to_unit(batch["her2"], device) * 2 - 1
        weight = batch["weight"].to(device)
        for place in range(len(generated)):
            one = slice(place, place + 1)
            levels = losses.pyramid_l1(
                generated[one], target[one], weight[one], len(options.l1_weights)
            )
            reconstruction.append(float(weigh(levels, options.l1_weights)))
            painted = metrics.to_uint8(generated[place].permute(1, 2, 0).cpu().numpy())
            truth = batch["her2"][place].permute(1, 2, 0).numpy()
            noise.append(metrics.psnr(painted, truth))
            similarity.append(metrics.ssim(painted, truth))
    return {
        "reconstruction": math.fsum(reconstruction) / len(reconstruction),
        "psnr_db": training.mean_of(noise),
        "ssim": training.mean_of(similarity),
    }
