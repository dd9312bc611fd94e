"""The epochs of the training of GenerationNet and SegmentationNet."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hemera.dataset.torch_dataset import TileDataset
from hemera.training.batches import (
    TrainingSampler,
    prefetch_to_device,
    training_loader,
    validation_loader,
)
from hemera.training.checkpoint import TrainingState, catch_sigterm
from hemera.training.cuda_graph import repeated_step
from hemera.training.logging import TrainingLog, sample_items

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Routine:
    """What differs between two trainings.

    Attributes:
        step: updates the networks with the micro-batches of a step, and returns the losses.
        validate: measures the result on the validation tiles, by name.
        score: of these measures; the epoch with the highest is the best.
        draw: draws items of the validation tiles, (H, W, 3).
        rate: learning rate of an epoch, from 1.
        variant: what else selects the kernels of the next step, for CUDA graphs.
    """

    step: Callable[[Sequence[Batch]], dict[str, Tensor]]
    validate: Callable[[nn.Module, DataLoader[Batch]], dict[str, float]]
    score: Callable[[Mapping[str, float]], float]
    draw: Callable[[nn.Module, Sequence[Batch]], npt.NDArray[np.uint8]]
    rate: Callable[[int], float]
    variant: Callable[[], Hashable] = lambda: None


def train_epochs(
    state: TrainingState, train: TileDataset, val: TileDataset, routine: Routine
) -> None:
    """Train from the state's epoch and step to the last epoch."""
    compute, progress, net, options = state.compute, state.progress, state.result, state.options
    sampler = TrainingSampler(len(train), options, compute.ranks, progress.epoch, progress.step)
    batches = prefetch_to_device(
        training_loader(train, sampler, options.workers, compute), compute.device
    )
    validation = validation_loader(val, options.batch_size, options.workers, compute)
    examples = sample_items(val)
    total, silent = options.epochs * sampler.steps, not compute.ranks.first
    take_step = repeated_step(routine.step, compute)
    with (
        TrainingLog(state.folder, sampler.steps_done, total, silent=silent) as run_log,
        catch_sigterm() as stop,
    ):
        for epoch in range(progress.epoch, options.epochs + 1):
            rate = routine.rate(epoch)
            state.set_learning_rate(rate)
            for _ in range(progress.step, sampler.steps):
                micro_batches = [next(batches) for _ in range(options.accumulate)]
                found = take_step(micro_batches, routine.variant())
                state.add_step(found, [tile for batch in micro_batches for tile in batch["tile"]])
                run_log.step()
                if state.must_settle(sampler.steps, stop):
                    run_log.losses(state.settle(sampler.steps, stop))
            state.average_statistics()
            validated = routine.validate(net, validation)
            if not silent:
                run_log.picture(epoch, routine.draw(net, examples))
            values = state.end_epoch(rate, validated, routine.score(validated))
            run_log.epoch(epoch, options.epochs, values)
    state.save()
