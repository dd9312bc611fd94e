"""Outputs of networks, copied to the processor while a GPU computes the next ones."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def copied(output: Tensor) -> Callable[[], Tensor]:
    """Start to copy an output to the processor; what is returned waits for the copy.

    On a GPU the copy follows the kernels of this output, and those started later do not delay it.
    """
    if output.device.type == "cpu":
        return lambda: output
    host = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)
    host.copy_(output, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def wait() -> Tensor:
        done.synchronize()
        return host

    return wait


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """Yield each item after the next one has been made: two batches are in flight."""
    waiting: list[T] = []
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting
