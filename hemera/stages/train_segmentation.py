"""train_segmentation: SegmentationNet learns HER2-positive pixels from H&E (HEMERA paper, 3.2).

Reads the index, the tiles of the subset of SegmentationNet and the trained generator, which stays
frozen; writes the weights of the whole network, the frozen branch included, so that they predict
alone, a JSON beside them and the history.
"""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from hemera import metrics, tables, training
from hemera.config import TrainSegmentationOptions
from hemera.dataset import Order, TileDataset
from hemera.models import losses
from hemera.models.segmentation import SegmentationNet

log = logging.getLogger(__name__)

THRESHOLD = 0.5
"""Probability from which a pixel counts as positive in validation; never tuned."""


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
    """Train SegmentationNet; go on from a checkpoint where there is one.

    Args:
        index: the index; its column segmentation_split names the tiles.
        generator: weights of GenerationNet.
        generator_metadata: the JSON beside them.
        checkpoints: folder in which every run has a folder of its own.
        segmenter: weights to write, safetensors.
        metadata: JSON beside them to write.
        history: table to write, one row per epoch, part and quantity.
        options: the options.

    Raises:
        TrainingError: an empty subset, a loss that is not finite, weights or a checkpoint that do
            not fit, a GenerationNet of another index.
    """
    facts = training.index_facts(index, "segmentation")
    parts = {
        part: TileDataset(
            index,
            network="segmentation",
            part=part,
            engine=facts.engine,
            images=("he", "positive"),
            crop_px=options.crop_px,
            flips=(0, 1) if options.flip else (),
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
        branch, described_branch = None, None
        if options.generation_branch != "none":
            branch, generation = training.load_generation(generator, generator_metadata)
            training.check_index("generation", generation, facts.fingerprint)
            described_branch = generation["model"]
        net = SegmentationNet(branch, options.generation_skips, options.base_width)
        weights_digest = "none"
        if options.encoder_weights is not None:
            weights = Path(options.encoder_weights)
            weights_digest = training.file_digest(weights)
            encoder = {
                name: tensor
                for name, tensor in training.read_weights(weights).items()
                # The head that classifies, which SegmentationNet has not.
                if not name.startswith("fc.")
            }
            training.load_into(net.encoder, encoder, str(weights))
        training.place(net, device)
        optimiser = torch.optim.AdamW(
            [parameter for parameter in net.parameters() if parameter.requires_grad],
            options.learning_rate,
            weight_decay=options.weight_decay,
        )
        digest = training.run_digest(
            options,
            facts,
            generator="none" if branch is None else training.file_digest(generator),
            encoder=weights_digest,
        )
        course = training.Run(
            checkpoints / digest,
            {"segmenter": net},
            {"segmenter": optimiser},
            kept="segmenter",
            minutes=options.checkpoint_minutes,
        )
        course.resume()

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
                while progress.step < order.steps:
                    batch = next(batches)
                    found = train_step(batch, net, optimiser, device, options.loss_lambda)
                    progress.add(found, batch["tile"])
                    bar.update()
                    course.save()
                validated = validate(net, validation, device, options.loss_lambda)
                course.judge(validated["f1"])
                progress.close_epoch({"learning_rate": options.learning_rate}, validated)
                training.log_epoch(progress, options.epochs, started, first)
        course.save(force=True)

        chosen = options.epochs if options.select == "last" else progress.best_epoch
        training.write_weights(
            segmenter, net.state_dict() if options.select == "last" else course.best
        )
        model = {
            "generation": described_branch,
            "generation_skips": options.generation_skips,
            "base_width": options.base_width,
        }
        described = training.describe_run("segmentation", model, options, facts, course, chosen)
        training.write_metadata(metadata, described)
    tables.write(history, progress.rows(), tables.HISTORY)


def train_step(
    batch: dict[str, Any],
    net: SegmentationNet,
    optimiser: torch.optim.Optimizer,
    device: torch.device,
    share: float,
) -> dict[str, Tensor]:
    """Update encoder and decoder, and return the losses."""
    net.train()
    logits = net(training.to_unit(batch["he"], device))
    total, cross_entropy, dice = losses.segmentation_loss(
        logits, batch["positive"].to(device).float(), share
    )
    optimiser.zero_grad()
    total.backward()
    optimiser.step()
    return {"total": total, "cross_entropy": cross_entropy, "dice": dice}


@torch.no_grad()
def validate(
    net: SegmentationNet, batches: DataLoader[dict[str, Any]], device: torch.device, share: float
) -> dict[str, float]:
    """Return the loss and the four pooled metrics at 0.5 over the validation tiles."""
    net.eval()
    totals: list[float] = []
    counts = []
    for batch in batches:
        logits = net(training.to_unit(batch["he"], device))
        for place, truth in enumerate(batch["positive"]):
            one = slice(place, place + 1)
            total, _, _ = losses.segmentation_loss(
                logits[one], truth[None].to(device).float(), share
            )
            totals.append(float(total))
            predicted = (torch.sigmoid(logits[place]) >= THRESHOLD).cpu().numpy()
            counts.append(metrics.confusion(predicted, truth.numpy()))
    return {
        "total": math.fsum(totals) / len(totals),
        **metrics.scores(metrics.pool(counts)),
    }
