"""The ranks of one training, one process per GPU, and what they exchange.

`torchrun` starts the processes. Every rank has a copy of the networks, uses its fraction of each
batch, and averages its gradients with the other ranks before an update. Batch norms use the tiles
of their own rank; their running statistics are averaged before they are used.
"""

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
"""Longest wait for another rank, which may be writing or validating."""


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process's rank, and the number of ranks; a single process by default."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes."""
        return self.rank == 0

    def average_gradients(self, module: nn.Module) -> None:
        """Replace the gradients of a network by their mean over the ranks."""
        if self.count > 1:
            self._average(p.grad for p in module.parameters() if p.grad is not None)

    def average_statistics(self, module: nn.Module) -> None:
        """Replace the running statistics of a network by their mean over the ranks.

        Modules in evaluation mode are frozen and equal on all ranks: their bits stay.
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
        """Return the mean over the ranks."""
        values = values.clone()
        if self.count > 1:
            self._average([values])
        return values

    def any(self, own: bool) -> bool:
        """Return whether it is true on any rank."""
        return own if self.count == 1 else any(self.gather([own]))

    def gather(self, items: list[T]) -> list[T]:
        """Return the items of all ranks, in the order of the ranks."""
        if self.count == 1:
            return items
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, items)
        return [item for part in found for item in part]

    def _average(self, tensors: Iterable[Tensor]) -> None:
        """Average in one exchange: many small ones would each wait for the slowest rank."""
        own = list(tensors)
        if not own:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in own])
        dist.all_reduce(flat)
        flat /= self.count
        for tensor, mean in zip(own, flat.split([t.numel() for t in own]), strict=True):
            tensor.copy_(mean.view_as(tensor))


SINGLE = Ranks()
"""A process alone."""


@contextlib.contextmanager
def process_group(wanted: int, device: torch.device) -> Iterator[Ranks]:
    """Join the processes that torchrun started, `wanted` of them, and leave the group afterwards.

    On cuda they exchange by NCCL, and each takes the GPU of its local rank; on cpu by Gloo.
    """
    started = dist.is_torchelastic_launched()
    if started:
        if device.type == "cuda":
            local = dist.get_node_local_rank(fallback_rank=0)
            if local >= torch.cuda.device_count():
                raise TrainingError(
                    f"gpus: local rank {local}, but PyTorch finds {torch.cuda.device_count()} GPUs;"
                    " set gpus to at most that, or request more GPUs from the cluster"
                )
            torch.cuda.set_device(local)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    count = dist.get_world_size() if started else 1
    if count != wanted:
        raise TrainingError(
            f"gpus: {wanted}, but processes started: {count}; start it with `torchrun --standalone "
            f"--nproc-per-node {wanted} --no-python hemera ...`, as the rule does, or set gpus: "
            f"{count}"
        )
    yield Ranks(dist.get_rank(), count) if started else Ranks()
    # Not after an error: leaving waits for the other ranks, which wait for this one. torchrun ends
    # them.
    if started:
        dist.destroy_process_group()
