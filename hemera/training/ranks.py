"""The processes that one training is spread over, one per GPU: who they are, what they exchange.

`torchrun` starts them and says so in the environment of each. Every process holds the whole
networks, sees its share of each batch, and averages its gradients with the others' before it
updates: equal gradients on equal weights, so that the weights stay equal. Batch norms see the tiles
of their own process; their running statistics are averaged where they are used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from hemera.errors import TrainingError

T = TypeVar("T")

TIMEOUT = datetime.timedelta(hours=2)
"""How long a process waits for another, which may be writing or measuring alone."""


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many; alone unless `joined` says otherwise."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def average_gradients(self, module: nn.Module) -> None:
        """Replace the gradients of a network by their mean over the processes."""
        if self.count > 1:
            self._average(p.grad for p in module.parameters() if p.grad is not None)

    def average_statistics(self, module: nn.Module) -> None:
        """Replace the running statistics of a network by their mean over the processes.

        What is not in training mode is frozen and the same everywhere: it stays to the bit.
        """
        if self.count > 1:
            self._average(
                buffer
                for part in module.modules()
                if part.training
                for buffer in part.buffers(recurse=False)
                if buffer.is_floating_point()
            )

    def average(self, values: Tensor) -> Tensor:
        """Return the mean of `values` over the processes."""
        values = values.clone()
        if self.count > 1:
            self._average([values])
        return values

    def any(self, own: bool) -> bool:
        """Return whether it holds for any of the processes."""
        return own if self.count == 1 else any(self.gather([own]))

    def gather(self, items: list[T]) -> list[T]:
        """Return the items of all processes, process by process."""
        if self.count == 1:
            return items
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, items)
        return [item for part in found for item in part]

    def _average(self, tensors: Iterable[Tensor]) -> None:
        """Average in one exchange: many small ones would each wait for the slowest process."""
        held = list(tensors)
        if not held:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in held])
        dist.all_reduce(flat)
        flat /= self.count
        for tensor, part in zip(held, flat.split([t.numel() for t in held]), strict=True):
            tensor.copy_(part.view_as(tensor))


@contextlib.contextmanager
def joined(wanted: int, device: torch.device) -> Iterator[Ranks]:
    """Join the processes that torchrun started, and leave them afterwards.

    Args:
        wanted: number of processes that the options ask for.
        device: where this process computes: cuda exchanges by NCCL, cpu by Gloo. On cuda the
            process takes the GPU of its own number.

    Raises:
        TrainingError: when another number was started.
    """
    started = dist.is_torchelastic_launched()
    if started:
        if device.type == "cuda":
            _take_gpu(wanted)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    count = dist.get_world_size() if started else 1
    if count != wanted:
        remedy = (
            f"start it with `torchrun --standalone --nproc-per-node {wanted} --no-python "
            "hemera ...`, as the rule does, or set gpus: 1"
            if wanted > count
            else f"set gpus: {count}, or start fewer"
        )
        raise TrainingError(f"gpus: {wanted}, and processes started: {count}; {remedy}")
    yield Ranks(dist.get_rank(), count) if started else Ranks()
    # Not after an error: to take leave is to wait for the others, who wait for this one. They are
    # ended by torchrun.
    if started:
        dist.destroy_process_group()


def _take_gpu(wanted: int) -> None:
    local = dist.get_node_local_rank(fallback_rank=0)
    if local >= torch.cuda.device_count():
        raise TrainingError(
            f"gpus: {wanted}, and torch sees {torch.cuda.device_count()}; set gpus to at most "
            "that, or ask the cluster for more"
        )
    torch.cuda.set_device(local)
