"""The epochs of a training, whichever network is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.data import DataLoader

from hemera.config import TrainGenerationOptions, TrainSegmentationOptions
from hemera.dataset.torch_dataset import TileDataset
from hemera.training.batches import (
    TrainingSampler,
    prefetch_to_device,
    training_loader,
    validation_loader,
)
from hemera.training.checkpoint import TrainingState, catch_sigterm
from hemera.training.logging import TrainingLog, sample_items

Batch = dict[str, Any]


def run_epochs(
    state: TrainingState,
    train: TileDataset,
    val: TileDataset,
    options: TrainGenerationOptions | TrainSegmentationOptions,
    *,
    rate: Callable[[int], float],
    step: Callable[[Sequence[Batch]], dict[str, Tensor]],
    validate: Callable[[DataLoader[Batch]], dict[str, float]],
    score: Callable[[Mapping[str, float]], float],
    draw: Callable[[Sequence[Batch]], npt.NDArray[np.uint8]],
    describe: Callable[[int], dict[str, Any]],
) -> None:
    """Train from the state's epoch and step to the last epoch.

    Args:
        state: networks, optimisers and progress.
        train: tiles to train on.
        val: tiles to validate on.
        options: of the stage.
        rate: learning rate of an epoch, from 1.
        step: updates the networks with the micro-batches of a step; returns the losses.
        validate: returns the measures over the validation tiles.
        score: of these measures; the epoch with the highest is the best.
        draw: returns a picture (H, W, 3) of validation tiles.
        describe: returns the JSON beside the weights of an epoch.
    """
    if state.progress.epoch > options.epochs:
        return
    compute = state.compute
    sampler = TrainingSampler.of_run(len(train), options, state)
    batches = prefetch_to_device(
        training_loader(train, sampler, options.workers, compute), compute.device
    )
    validation = validation_loader(val, options.batch_size, options.workers, compute)
    examples = sample_items(val, options.sample_tiles)
    with TrainingLog.of_run(state, sampler) as run_log, catch_sigterm() as stop:
        for epoch in range(state.progress.epoch, options.epochs + 1):
            state.set_learning_rate(rate(epoch))
            for _ in range(state.progress.step, sampler.steps):
                micro_batches = [next(batches) for _ in range(options.accumulate)]
                found = step(micro_batches)
                state.add_step(found, [tile for batch in micro_batches for tile in batch["tile"]])
                run_log.step()
                if state.must_settle(sampler.steps, stop):
                    run_log.losses(state.settle(sampler.steps, stop))
            state.average_statistics()
            validated: dict[str, float] = {}
            if epoch % options.validate_every == 0 or epoch == options.epochs:
                validated = validate(validation)
                best = state.update_best(score(validated), validated)
                state.write_weights(["last", "best"] if best else ["last"], describe(epoch))
                if options.sample_tiles and not run_log.silent:
                    run_log.picture(epoch, draw(examples))
            state.progress.close_epoch(rate(epoch), validated)
            run_log.epoch(epoch, options.epochs, state.progress.of(epoch))
    state.save()
