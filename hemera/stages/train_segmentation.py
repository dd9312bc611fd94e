"""Train SegmentationNet, which predicts HER2-positive pixels from H&E (HEMERA paper, 3.2)."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hemera.config import TrainSegmentationOptions
from hemera.dataset.index import TileIndex, training_tiles
from hemera.dataset.torch_dataset import TileDataset
from hemera.errors import TrainingError
from hemera.evaluation import metrics
from hemera.networks import encoders, losses, storage
from hemera.networks.segmentation import SegmentationNet
from hemera.training.batches import prefetch_to_device
from hemera.training.checkpoint import TrainingState, run_digest
from hemera.training.epochs import Routine, train_epochs
from hemera.training.logging import image_grid
from hemera.training.session import Compute, seed_per_rank, training_session

log = logging.getLogger(__name__)


def run(
    *,
    index: Path,
    generator: Path,
    generator_metadata: Path,
    checkpoints: Path,
    segmenter: Path,
    metadata: Path,
    history: Path,
    options: TrainSegmentationOptions,
) -> None:
    """Train SegmentationNet; resume from a checkpoint where there is one.

    Args:
        index: the index; its column segmentation_split names the tiles.
        generator: weights of GenerationNet, which is frozen.
        generator_metadata: their JSON.
        checkpoints: folder in which every run has a folder of its own.
        segmenter: written: weights of the network and of the frozen generator, safetensors.
        metadata: written: JSON with options, versions, fingerprint and counts.
        history: written: table with one row per epoch, split and quantity.
    """
    opened = TileIndex(index)
    tiles = training_tiles(opened, "segmentation", options.crop_px)
    with training_session(options) as compute:
        train, val = (_tiles(opened, split, options) for split in ("train", "val"))
        net, model = _network(generator, generator_metadata, options, tiles.fingerprint)
        encoder_sha256 = "none"
        if options.encoder_weights is not None:
            if missing := options.requirements():
                raise TrainingError("\n".join(missing))
            encoder_sha256 = load_encoder(net, options.encoder_file)
        compute.prepare(net)
        seed_per_rank(compute.ranks, options.seed)
        optimiser = torch.optim.AdamW(
            [parameter for parameter in net.parameters() if parameter.requires_grad],
            compute.learning_rate(options.learning_rate),
            weight_decay=options.weight_decay,
            fused=True,
            capturable=compute.graphed,
        )
        generator_sha256 = "none" if net.generation is None else storage.file_digest(generator)
        folder = checkpoints / run_digest(
            options, tiles, generator=generator_sha256, encoder=encoder_sha256
        )
        described = {"network": "segmentation", "model": model, "encoder_sha256": encoder_sha256}
        state = TrainingState(
            folder, options, tiles, compute, {"segmenter": net}, {"segmenter": optimiser}, described
        )
        state.resume()
        if state.progress.epoch <= options.epochs:
            routine = Routine(
                step=lambda micro_batches: train_step(micro_batches, state, options),
                validate=lambda net, batches: validate(net, batches, compute, options),
                score=lambda validated: validated["f1"],
                draw=lambda net, examples: draw_samples(net, examples, compute),
                rate=lambda _: options.learning_rate,
            )
            train_epochs(state, train, val, routine)
        state.write_results(weights=segmenter, metadata=metadata, table=history)


def _network(
    weights: Path, metadata: Path, options: TrainSegmentationOptions, fingerprint: str
) -> tuple[SegmentationNet, dict[str, Any]]:
    """Build the network on a trained generator; return it and its arguments."""
    arguments: dict[str, Any] = {
        "generation_skips": options.generation_skips,
        "base_width": options.base_width,
        "decoder": options.decoder,
    }
    if options.encoder != "resnet34":
        name = options.encoder.removeprefix("timm:")
        config = None
        if options.encoder_weights is not None:
            config = storage.read_encoder_config(options.encoder_file)
        arguments["encoder"] = encoders.describe_timm(name, config, frozen=options.encoder_frozen)
    if options.generation_branch == "none":
        return SegmentationNet(None, **arguments), {"generation": None, **arguments}
    branch, described = storage.load_generation(weights, metadata)
    storage.check_index("generation", described, fingerprint)
    if storage.background_is_white(described) != options.normalise_background:
        raise TrainingError(
            f"{metadata}: the generator was trained with normalise_background: "
            f"{not options.normalise_background}, and SegmentationNet gives it images with "
            f"{options.normalise_background}; train it again, or change the option"
        )
    arguments["branch"] = options.generation_branch
    return SegmentationNet(branch, **arguments), {"generation": described["model"], **arguments}


def _tiles(index: TileIndex, split: str, options: TrainSegmentationOptions) -> TileDataset:
    return TileDataset(
        index,
        network="segmentation",
        split=split,
        images=("he", "positive", "valid"),
        crop_px=options.crop_px,
        flips=(0, 1) if options.flip else (),
        normalise_background=options.normalise_background,
        seed=options.seed,
    )


def load_encoder(net: SegmentationNet, path: Path) -> str:
    """Load the weights of ResNet34, or of the network of timm, and return the file's SHA-256.

    Raises:
        TrainingError: when the file is missing or does not fit.
    """
    remedy = "name {} as train_segmentation.encoder_weights, or null to start untrained"
    found = storage.read_weights(
        path, missing=remedy.format("a file"), remedy=remedy.format("another file")
    )
    if isinstance(net.encoder, encoders.TimmEncoder):
        storage.load_published(net.encoder.backbone, found, str(path))
        return storage.file_digest(path)
    # fc is the classifier, which SegmentationNet lacks.
    weights = {name: tensor for name, tensor in found.items() if not name.startswith("fc.")}
    if (first := weights.get("conv1.weight")) is not None:
        channels = net.encoder.get_parameter("conv1.weight").shape[1]
        weights["conv1.weight"] = encoders.extend_input(first, channels)
    storage.load_into(net.encoder, weights, str(path))
    return storage.file_digest(path)


def train_step(
    micro_batches: Sequence[dict[str, Any]], state: TrainingState, options: TrainSegmentationOptions
) -> dict[str, Tensor]:
    """Update encoder and decoder with the micro-batches of a step, and return the losses."""
    compute, net = state.compute, state.modules["segmenter"]
    optimiser = state.optimisers["segmenter"]
    net.train()
    optimiser.zero_grad()
    found = []
    for batch in micro_batches:
        with compute.autocast():
            logits = net(compute.to_unit(batch["he"]))
        truth, valid = (batch[name].to(compute.device) for name in ("positive", "valid"))
        loss = compute.compiled(losses.segmentation_loss)(logits, truth, valid, options.loss_lambda)
        compute.backward(loss[0], len(micro_batches))
        found.append(torch.stack(loss).detach())
    compute.update(optimiser, net, options.clip_norm)
    compute.scaler.update()
    means = torch.stack(found).mean(0)
    return dict(zip(("total", "cross_entropy", "dice"), means, strict=True))


@torch.no_grad()
def validate(
    net: nn.Module,
    batches: DataLoader[dict[str, Any]],
    compute: Compute,
    options: TrainSegmentationOptions,
) -> dict[str, float]:
    """Return the loss and the four pooled metrics at 0.5 over the validation tiles."""
    net.eval()

    def total(logits: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
        return losses.segmentation_loss(logits, truth, valid, options.loss_lambda)[0]

    per_tile = torch.vmap(total)
    totals: list[Tensor] = []
    counts: list[Tensor] = []
    for batch in prefetch_to_device(batches, compute.device):
        with compute.autocast():
            logits = net(compute.to_unit(batch["he"])).float()
        truth, valid = batch["positive"], batch["valid"]
        predicted = torch.sigmoid(logits) >= metrics.THRESHOLD
        totals.append(per_tile(logits, truth, valid))
        counts.append(torch.stack(
            [(own & real & valid).flatten(1).sum(1)
             for own in (predicted, ~predicted) for real in (truth, ~truth)], 1,
        ))  # fmt: skip
    # Read once: each reading makes the GPU wait.
    rows = (
        [*zip(torch.cat(totals).tolist(), torch.cat(counts).tolist(), strict=True)]
        if totals else []
    )  # fmt: skip
    all_totals, all_counts = zip(*compute.ranks.gather(rows), strict=True)
    pooled = metrics.Confusion(*(sum(column) for column in zip(*all_counts, strict=True)))
    return {"total": math.fsum(all_totals) / len(all_totals), **metrics.scores(pooled)}


@torch.no_grad()
def draw_samples(
    net: nn.Module, examples: Sequence[dict[str, Any]], compute: Compute
) -> npt.NDArray[np.uint8]:
    """Draw validation tiles, one tile a row: H&E, truth, predicted probability."""
    net.eval()
    rows = []
    for item in examples:
        with compute.autocast():
            logits = net(compute.to_unit(item["he"][None]))[0, 0].float()
        grays = (item["positive"][0].float(), torch.sigmoid(logits).cpu())
        rows.append(
            [
                item["he"].permute(1, 2, 0).numpy(),
                *(np.repeat((gray * 255).byte().numpy()[..., None], 3, 2) for gray in grays),
            ]
        )
    return image_grid(rows)
