"""The batches of a training: their order, the processes that read them, the copy to the device."""

import functools
import math
import os
import signal
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from hemera.config import TrainingOptions
from hemera.dataset.torch_dataset import TileDataset
from hemera.errors import HemeraError, TrainingError
from hemera.training.distributed import SINGLE, Ranks
from hemera.training.session import Compute


class TrainingSampler(Sampler[list[tuple[int, int]]]):
    """The batches that a run has left: each epoch is one shuffle of all tiles.

    It is the `batch_sampler` of a loader; its keys are those of a `TileDataset`.
    """

    def __init__(
        self,
        count: int,
        options: TrainingOptions,
        ranks: Ranks = SINGLE,
        epoch: int = 1,
        step: int = 0,
    ) -> None:
        """Order `count` tiles, beginning with batch `step`, from 0, of `epoch`, from 1.

        Each micro-batch is divided among the ranks. An incomplete last batch is dropped where it
        cannot be divided, or where options.whole_batches.
        """
        self.count = count
        self.options = options
        self.epoch = epoch
        self.step = step
        self.ranks = ranks
        self.drop_last = bool(options.whole_batches) or options.accumulate * ranks.count > 1
        if self.drop_last and count < options.batch_size:
            raise TrainingError(
                f"batch_size: {options.batch_size} tiles make a step and there are {count}; give a "
                "smaller batch or more tiles"
            )

    @property
    def steps(self) -> int:
        """Batches per epoch."""
        batches = self.count / self.options.batch_size
        return math.floor(batches) if self.drop_last else math.ceil(batches)

    @property
    def steps_done(self) -> int:
        """Batches before the first one of these."""
        return (self.epoch - 1) * self.steps + self.step

    def __len__(self) -> int:
        """Number of micro-batches that remain."""
        return (self.options.epochs * self.steps - self.steps_done) * self.options.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield the keys of this rank of each micro-batch."""
        for epoch in range(self.epoch, self.options.epochs + 1):
            order = np.random.default_rng((0, self.options.seed, epoch)).permutation(self.count)
            for step in range(self.step if epoch == self.epoch else 0, self.steps):
                batch = order[step * self.options.batch_size : (step + 1) * self.options.batch_size]
                micro_batches = np.array_split(batch, self.options.accumulate * self.ranks.count)
                for own in micro_batches[self.ranks.rank :: self.ranks.count]:
                    yield [(epoch, int(position)) for position in own]


def training_loader(
    tiles: TileDataset, sampler: TrainingSampler, workers: int, compute: Compute
) -> DataLoader[dict[str, Any]]:
    """Return the loader of all batches of a run; its workers start once, not once per epoch."""
    return DataLoader(tiles, batch_sampler=sampler, num_workers=workers, **_settings(compute))


def validation_loader(
    tiles: TileDataset, batch_size: int, workers: int, compute: Compute
) -> DataLoader[dict[str, Any]]:
    """Return the loader of this rank's tiles, in order; it is iterated once per validation."""
    ranks = compute.ranks
    keys = [(0, position) for position in range(ranks.rank, len(tiles), ranks.count)]
    batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
    workers = math.ceil(workers / 2)
    return DataLoader(
        tiles,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        **_settings(compute),
    )


def _settings(compute: Compute) -> dict[str, Any]:
    return {
        "pin_memory": compute.device.type == "cuda",
        # Its own generator, so that the loader draws nothing from the run's.
        "generator": torch.Generator(),
        "worker_init_fn": functools.partial(_ignore_sigterm, compute.finished),
    }


def _ignore_sigterm(finished: Tensor, worker: int) -> None:
    """Ignore SIGTERM in a worker until the run is over: it must not end before the checkpoint."""

    def handle(number: int, frame: object) -> None:
        if bool(finished[0]):
            os._exit(0)

    signal.signal(signal.SIGTERM, handle)


def prefetch_to_device(
    batches: Iterable[dict[str, Any]], device: torch.device
) -> Iterator[dict[str, Any]]:
    """Yield batches on the device, while the next is being copied."""
    waiting = None
    try:
        for batch in batches:
            if device.type == "cpu":
                yield batch
                continue
            following = {
                name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                for name, value in batch.items()
            }
            if waiting is not None:
                yield waiting
            waiting = following
    except HemeraError as error:
        # From a worker process it comes with a traceback, whose last line is the message.
        message = str(error).strip().splitlines()[-1]
        name = f"{type(error).__module__}.{type(error).__name__}: "
        raise type(error)(message.removeprefix(name)) from None
    if waiting is not None:
        yield waiting
