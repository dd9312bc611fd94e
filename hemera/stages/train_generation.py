"""Train GenerationNet, which translates H&E to HER2 (HEMERA paper, 3.1 and 4.1)."""

import functools
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
from hemera.dataset.index import TileIndex, training_tiles
from hemera.dataset.torch_dataset import TileDataset, tile_weight
from hemera.errors import TrainingError
from hemera.evaluation import metrics
from hemera.evaluation.perceptual import Lpips
from hemera.networks import losses, similarity
from hemera.networks.generation import (
    PatchProjection,
    ResidualGenerationNet,
    build_generator,
    initialise,
)
from hemera.training import objectives
from hemera.training.batches import prefetch_to_device
from hemera.training.checkpoint import TrainingState, run_digest
from hemera.training.epochs import Routine, train_epochs
from hemera.training.logging import image_grid
from hemera.training.session import Compute, seed_per_rank, training_session

log = logging.getLogger(__name__)

ADAM_BETAS = (0.5, 0.999)
"""Of both optimisers (HEMERA paper, 4.1)."""

WEIGHT_TILES = 64
"""Training tiles of which the mean of the weight map is logged."""


def run(
    *,
    index: Path,
    checkpoints: Path,
    generator: Path,
    metadata: Path,
    history: Path,
    options: TrainGenerationOptions,
) -> None:
    """Train GenerationNet; resume from a checkpoint where there is one.

    Args:
        index: the index; its column generation_split names the tiles.
        checkpoints: folder in which every run has a folder of its own.
        generator: written: weights of the generator, safetensors.
        metadata: written: JSON with options, versions, fingerprint and counts.
        history: written: table with one row per epoch, split and quantity.
    """
    opened = TileIndex(index)
    tiles = training_tiles(opened, "generation", options.crop_px)
    model: dict[str, Any] = {
        "generator": options.network,
        "base_width": options.base_width,
        "norm": options.norm,
        "dropout": options.dropout,
    }
    with training_session(options) as compute:
        train, val = (_tiles(opened, split, options) for split in ("train", "val"))
        weight_mean = mean_weight(_tiles(opened, "train", options, images=("weight",)))
        log.info("mean of the weight map: %.3f", weight_mean)
        generator_net = build_generator(**model)
        modules: dict[str, nn.Module] = {
            "generator": generator_net,
            "discriminator": objectives.discriminator_for(options),
        }
        if options.contrastive:
            assert isinstance(generator_net, ResidualGenerationNet)
            modules["projection"] = PatchProjection(generator_net.encoder_widths)
        lpips = _lpips(options, compute)
        for module in modules.values():
            initialise(module)
            compute.prepare(module)
        seed_per_rank(compute.ranks, options.seed)
        optimisers: dict[str, torch.optim.Optimizer] = {
            name: torch.optim.Adam(
                module.parameters(),
                lr=compute.learning_rate(options.learning_rate),
                betas=ADAM_BETAS,
                fused=True,
                capturable=compute.graphed,
            )
            for name, module in modules.items()
        }
        described: dict[str, Any] = {
            "network": "generation", "model": model, "weight_mean": weight_mean
        }  # fmt: skip
        digests = {} if lpips is None else {"lpips_sha256": lpips.sha256}
        described |= digests
        folder = checkpoints / run_digest(options, tiles, **digests)
        state = TrainingState(folder, options, tiles, compute, modules, optimisers, described)
        state.resume()
        if state.progress.epoch <= options.epochs:
            routine = Routine(
                step=lambda micro_batches: train_step(micro_batches, state, options, lpips),
                validate=lambda net, batches: validate(net, batches, compute, options),
                score=selection_score,
                draw=lambda net, examples: draw_samples(net, examples, compute),
                rate=lambda epoch: options.learning_rate * rate_factor(epoch, options),
                variant=lambda: objectives.r1_due(state.progress.updates, options),
            )
            train_epochs(state, train, val, routine)
        state.write_results(weights=generator, metadata=metadata, table=history)


def _lpips(options: TrainGenerationOptions, compute: Compute) -> Lpips | None:
    """Return the network of LPIPS if it is a loss and its weights are named."""
    if not options.perceptual:
        return None
    if options.lpips_weights is None:
        log.warning("LPIPS is left out; its weights are the option train_generation.lpips_weights")
        return None
    if missing := options.requirements():
        raise TrainingError("\n".join(missing))
    return Lpips(Path(options.lpips_weights), compute.device)


def _tiles(
    index: TileIndex,
    split: str,
    options: TrainGenerationOptions,
    images: Sequence[str] = ("he", "her2", "weight", "valid", "her2_background"),
) -> TileDataset:
    return TileDataset(
        index,
        network="generation",
        split=split,
        images=images,
        weighting=functools.partial(
            tile_weight,
            mode=options.weight_map,
            source=options.mask_source,
            renormalise_mean=options.renormalise_mean,
        ),
        crop_px=options.crop_px,
        flips=(1,) if options.flip else (),
        normalise_background=options.normalise_background,
        seed=options.seed,
    )


def mean_weight(tiles: TileDataset) -> float:
    """Return the mean of the weight map over `WEIGHT_TILES` evenly spaced tiles.

    L1 is multiplied by it: the paper's map is normalised by its maximum, so that its mean is far
    below 1, and differs between tiles.
    """
    places = np.linspace(0, len(tiles) - 1, min(WEIGHT_TILES, len(tiles))).round()
    return float(np.mean([float(tiles[0, int(place)]["weight"].mean()) for place in places]))


def selection_score(validated: Mapping[str, float]) -> float:
    """Return the score by which an epoch is the best: SSIM plus the concordance of brown."""
    return validated["ssim"] + validated["brown_concordance"]


def rate_factor(epoch: int, options: TrainGenerationOptions) -> float:
    """Return what the learning rate is multiplied with in an epoch, from 1 (HEMERA paper, 4.1).

    Constant up to decay_from_epoch n, then falling to 1 / (nd + 1) in the last epoch, nd being the
    epochs that decay. With ``lr_step: start`` the fall comes one epoch earlier and the last epoch
    trains at rate 0, as in the public code, which steps its scheduler before an epoch.
    """
    n = options.decay_from_epoch
    shift = 1 if options.lr_step == "start" else 0
    return 1 - max(0, epoch + shift - n) / (options.epochs - n + 1)


def train_step(
    micro_batches: Sequence[dict[str, Any]],
    state: TrainingState,
    options: TrainGenerationOptions,
    lpips: Lpips | None = None,
) -> dict[str, Tensor]:
    """Update the discriminator, then the generator, and return the losses.

    Where gradients are accumulated over several micro-batches, those of both networks are
    computed with the weights of before the step. With one micro-batch, the generator is
    updated against the discriminator that was updated just before.
    """
    compute, progress = state.compute, state.progress
    generator, discriminator = state.modules["generator"], state.modules["discriminator"]
    projection = state.modules.get("projection")

    def update(name: str) -> None:
        compute.update(state.optimisers[name], state.modules[name], options.clip_norm)

    for name, optimiser in state.optimisers.items():
        state.modules[name].train()
        optimiser.zero_grad()
    found: list[dict[str, Tensor]] = []
    for batch in micro_batches:
        source = compute.to_unit(batch["he"]) * 2 - 1
        target = compute.to_unit(batch["her2"]) * 2 - 1
        weight, valid = (batch[name].to(compute.device) for name in ("weight", "valid"))
        with compute.autocast():
            generated = generator(source)
        generated, target = (_without_excluded(x, valid) for x in (generated, target))
        if options.shift_px > 0:
            generated, target, weight = _shifted(generated, target, weight, valid, options)
        fake, real = generated, target
        if options.weight_adversarial:
            fake, real = fake * weight, target * weight

        discriminator.requires_grad_(True)
        by_discriminator = objectives.discriminator_losses(
            discriminator, source, fake, real, progress.updates, compute, options
        )
        penalty = options.r1_weight * by_discriminator["r1"] if "r1" in by_discriminator else 0
        compute.backward(by_discriminator["discriminator"] + penalty, len(micro_batches))
        if len(micro_batches) == 1:
            update("discriminator")

        # The generator's gradient passes through the discriminator, which is not updated by it.
        discriminator.requires_grad_(False)
        background = batch["her2_background"].to(compute.device)
        own = {
            **compute.compiled(generator_losses)(generated, target, weight, background, options),
            **compute.compiled(objectives.image_losses)(
                generated, target, background, options, lpips
            ),
            **objectives.adversarial_losses(discriminator, source, fake, real, compute, options),
        }
        if projection is not None:
            own |= objectives.contrastive_losses(
                generator, projection, (source, generated, target), progress.epoch, compute, options
            )
        total = own["adversarial"] + weigh_all(own, options)
        compute.backward(total, len(micro_batches))
        found.append({"total": total, **by_discriminator, **own})
    for name in state.optimisers:
        if name != "discriminator" or len(micro_batches) > 1:
            update(name)
    compute.scaler.update()
    return {name: torch.stack([each[name].detach() for each in found]).mean() for name in found[0]}


def _shifted(
    generated: Tensor,
    target: Tensor,
    weight: Tensor,
    valid: Tensor,
    options: TrainGenerationOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return generated images, and the real ones and weights shifted to where they match these."""
    shifts = losses.best_shifts(generated, target, options.shift_px)
    target, weight = (losses.shifted(images, shifts) for images in (target, weight))
    valid = valid & losses.shifted(valid, shifts)
    return _without_excluded(generated, valid), _without_excluded(target, valid), weight


def _without_excluded(images: Tensor, valid: Tensor) -> Tensor:
    """Return images in [-1, 1] that are white, without gradient, where the mask excludes pixels."""
    return torch.where(valid, images.float(), 1.0)


def generator_losses(
    generated: Tensor,
    target: Tensor,
    weight: Tensor,
    background: Tensor,
    options: TrainGenerationOptions,
) -> dict[str, Tensor]:
    """Return the losses of generated images against real ones, by name, not weighted.

    Images are in [-1, 1]; `background` (B, 3, 1, 1), the colour of that of HER2, is in [0, 1].
    """
    found = {
        f"l1_{level}": each.mean()
        for level, each in enumerate(
            losses.pyramid_l1(generated, target, weight, len(options.l1_weights)), 1
        )
    }
    if options.dice_source != "none":
        pair = [(generated + 1) / 2, (target + 1) / 2]
        if options.dice_source == "dab":
            pair = [
                losses.soft_dab(image, background, options.dice_slope, options.dice_threshold)
                for image in pair
            ]
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
    for name in objectives.WEIGHTED:
        if name in found:
            total = total + getattr(options, f"{name}_weight") * found[name]
    return total


def weigh(levels: list[Tensor], weights: tuple[float, ...]) -> Tensor:
    """Return the weighted sum of a pyramid's levels, of each image or of all."""
    terms = [weight * level for weight, level in zip(weights, levels, strict=True)]
    return torch.stack(terms).sum(0)


@torch.no_grad()
def validate(
    net: nn.Module,
    batches: DataLoader[dict[str, Any]],
    compute: Compute,
    options: TrainGenerationOptions,
) -> dict[str, float]:
    """Return the measures of generated images over the validation tiles.

    They are the weighted reconstruction loss, PSNR, SSIM and the concordance of brown, see
    `hemera.networks.similarity`. The generator is in evaluation mode: its batch norms
    use their running statistics.
    """
    net.eval()
    found: list[Tensor] = []
    for batch in prefetch_to_device(batches, compute.device):
        with compute.autocast():
            generated = net(compute.to_unit(batch["he"]) * 2 - 1).float()
        real, valid = compute.to_unit(batch["her2"]), batch["valid"]
        pair = [_without_excluded(images, valid) for images in (generated, real * 2 - 1)]
        levels = losses.pyramid_l1(pair[0], pair[1], batch["weight"], len(options.l1_weights))
        stored = similarity.as_stored(generated)
        measured = (
            weigh(levels, options.l1_weights),
            similarity.psnr(stored, real, valid),
            similarity.ssim(stored, real, valid),
        )
        brown = similarity.brown_sums(stored, real, batch["her2_background"], valid)
        found.append(torch.cat((torch.stack(measured, 1).double(), brown), 1))
    # Read once: each reading makes the GPU wait.
    rows = torch.cat(found).tolist() if found else []
    reconstruction, psnr_db, ssim, *sums = zip(*compute.ranks.gather(rows), strict=True)
    pooled = np.array([math.fsum(column) for column in sums])
    return {
        # An exact sum, independent of the order of the ranks.
        "reconstruction": math.fsum(reconstruction) / len(reconstruction),
        "psnr_db": finite_mean(psnr_db),
        "ssim": finite_mean(ssim),
        "brown_concordance": float(similarity.concordance(pooled)),
    }


def finite_mean(values: Sequence[float]) -> float:
    """Return the mean of the values that are not infinite; 0 without any."""
    finite = [value for value in values if not math.isinf(value)]
    return sum(finite) / len(finite) if finite else 0.0


@torch.no_grad()
def draw_samples(
    net: nn.Module, examples: Sequence[dict[str, Any]], compute: Compute
) -> npt.NDArray[np.uint8]:
    """Draw validation tiles, one tile a row: H&E, HER2, virtual HER2."""
    net.eval()
    rows = []
    for item in examples:
        with compute.autocast():
            virtual = net(compute.to_unit(item["he"][None]) * 2 - 1)[0].float()
        images = [item[name].permute(1, 2, 0).numpy() for name in ("he", "her2")]
        rows.append([*images, metrics.to_uint8(virtual.permute(1, 2, 0).cpu().numpy())])
    return image_grid(rows)
