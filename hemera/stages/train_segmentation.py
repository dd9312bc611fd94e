"""train_segmentation: SegmentationNet learns HER2-positive pixels from H&E (HEMERA paper, 3.2).

Reads the index, the tiles of the subset of SegmentationNet and the trained generator, which stays
frozen; writes the weights of the whole network, the frozen branch included, so that they predict
alone, a JSON beside them and the history.
"""

from __future__ import annotations

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
from hemera.dataset.torch_dataset import TileDataset
from hemera.errors import TrainingError
from hemera.evaluation import metrics
from hemera.networks import losses, storage
from hemera.networks.segmentation import SegmentationNet
from hemera.training import session
from hemera.training.logging import sheet

log = logging.getLogger(__name__)

IMAGENET = "resnet34-b627a593.pth"
"""Under which name torch keeps what torchvision downloads for ResNet34, IMAGENET1K_V1."""

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
    facts = session.index_facts(index, "segmentation", options.crop_px)
    with session.computing(options) as compute:
        parts = {
            part: TileDataset(
                index,
                network="segmentation",
                part=part,
                engine=facts.engine,
                images=("he", "positive"),
                crop_px=options.crop_px,
                flips=(0, 1) if options.flip else (),
                turns=options.turn,
                deferred=part == "train" and compute.device.type != "cpu",
                seed=options.seed,
            )
            for part in ("train", "val")
        }
        branch, described_branch = None, None
        if options.generation_branch != "none":
            branch, generation = storage.load_generation(generator, generator_metadata)
            storage.check_index("generation", generation, facts.fingerprint)
            described_branch = generation["model"]
        how: dict[str, Any] = {
            "generation_skips": options.generation_skips,
            "base_width": options.base_width,
            "branch": options.generation_branch,
            "decoder": options.decoder,
        }
        if branch is None:
            del how["branch"]
        net = SegmentationNet(branch, **how)
        started_from = "none"
        if options.encoder_weights is not None:
            weights = encoder_file(options.encoder_weights)
            key = "train_segmentation.encoder_weights"
            found = storage.read_weights(
                weights,
                missing=f"name one as {key}, or null to start untrained",
                remedy=f"name another as {key}, or null to start untrained",
            )
            started_from = storage.file_digest(weights)
            encoder = {
                name: tensor
                for name, tensor in found.items()
                # The head that classifies, which SegmentationNet has not.
                if not name.startswith("fc.")
            }
            storage.load_into(net.encoder, encoder, str(weights))
        compute.place(net, compiled=options.compile)
        session.part_ways(compute, options.seed)
        optimiser = torch.optim.AdamW(
            [parameter for parameter in net.parameters() if parameter.requires_grad],
            options.learning_rate,
            weight_decay=options.weight_decay,
            fused=True,
        )
        digest = session.run_digest(
            options,
            facts,
            generator="none" if branch is None else storage.file_digest(generator),
            encoder=started_from,
        )
        course = session.Run(
            checkpoints / digest,
            {"segmenter": net},
            {"segmenter": optimiser},
            kept="segmenter",
            minutes=options.checkpoint_minutes,
            ranks=compute.ranks,
            scaler=compute.scaler,
        )
        course.resume()
        validation = session.validation_batches(
            parts["val"], options.batch_size, options.workers, compute
        )
        examples = session.samples(parts["val"], options.sample_tiles)
        model = {"generation": described_branch, **how}

        def describe(epoch: int) -> dict[str, Any]:
            described = session.describe_run("segmentation", model, options, facts, course, epoch)
            return {**described, "encoder_sha256": started_from}

        session.train(
            course,
            compute,
            parts["train"],
            options,
            rate=lambda epoch: options.learning_rate,
            step=lambda batches: train_step(batches, course, compute, options),
            validate=lambda: validate(net, validation, compute, options),
            judged=lambda validated: validated["f1"],
            show=lambda: show(net, examples, compute),
            describe=describe,
        )
        session.write_results(
            course, options, describe, weights=segmenter, metadata=metadata, history=history
        )


def encoder_file(named: str) -> Path:
    """Return the file that ResNet34's weights lie in; see the option encoder_weights.

    Raises:
        TrainingError: when torch keeps no download of torchvision's weights.
    """
    if named != "imagenet":
        return Path(named)
    path = Path(torch.hub.get_dir()) / "checkpoints" / IMAGENET
    if not path.is_file():
        raise TrainingError(
            f"train_segmentation.encoder_weights: imagenet, and {path} is not there; download it "
            "once with `python -c 'from torchvision.models import resnet34 as r; "
            'r(weights="IMAGENET1K_V1")\'`, name a file of these weights, or set null to start '
            "untrained"
        )
    return path


def train_step(
    batches: Sequence[dict[str, Any]],
    course: session.Run,
    compute: session.Compute,
    options: TrainSegmentationOptions,
) -> dict[str, Tensor]:
    """Update encoder and decoder by the parts of a batch, and return the losses."""
    net, optimiser = course.modules["segmenter"], course.optimisers["segmenter"]
    net.train()
    optimiser.zero_grad()
    found = []
    for batch in batches:
        with compute.autocast():
            logits = net(compute.to_unit(batch["he"]))
        loss = judge(logits, batch["positive"].to(compute.device).float(), options)
        compute.backward(loss[0], len(batches))
        found.append(torch.stack(loss).detach())
    compute.update(optimiser, net)
    compute.scaler.update()
    means = torch.stack(found).mean(0)
    return dict(zip(("total", "cross_entropy", "dice"), means, strict=True))


def judge(
    logits: Tensor, truth: Tensor, options: TrainSegmentationOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss that the options say, and its two parts."""
    return losses.segmentation_loss(
        logits.float(),
        truth,
        options.loss_lambda,
        focal_gamma=options.focal_gamma,
        tversky_beta=options.tversky_beta,
    )


@torch.no_grad()
def validate(
    net: nn.Module,
    batches: DataLoader[dict[str, Any]],
    compute: session.Compute,
    options: TrainSegmentationOptions,
) -> dict[str, float]:
    """Return the loss and the four pooled metrics at 0.5 over the validation tiles."""
    net.eval()
    per_tile = torch.vmap(lambda logits, truth: judge(logits, truth, options)[0])
    judged: list[Tensor] = []
    counted: list[Tensor] = []
    for batch in session.ahead(batches, compute.device):
        with compute.autocast():
            logits = net(compute.to_unit(batch["he"])).float()
        truth = batch["positive"]
        predicted = torch.sigmoid(logits) >= THRESHOLD
        judged.append(per_tile(logits, truth.float()))
        counted.append(torch.stack(
            [(said & real).flatten(1).sum(1)
             for said in (predicted, ~predicted) for real in (truth, ~truth)], 1,
        ))  # fmt: skip
    rows: list[tuple[float, metrics.Confusion]] = []
    if judged:
        # Read once: each reading makes the GPU wait.
        counts = (metrics.Confusion(*row) for row in torch.cat(counted).tolist())
        rows += zip(torch.cat(judged).tolist(), counts, strict=True)
    totals, confusions = zip(*compute.ranks.gather(rows), strict=True)
    pooled = metrics.Confusion(*(sum(column) for column in zip(*confusions, strict=True)))
    return {"total": math.fsum(totals) / len(totals), **metrics.scores(pooled)}


@torch.no_grad()
def show(
    net: nn.Module, examples: Sequence[dict[str, Any]], compute: session.Compute
) -> npt.NDArray[np.uint8]:
    """Draw validation tiles: H&E, what is positive, and how likely it was held to be."""
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
    return sheet(rows)
