"""The whole step of a training as one CUDA graph.

A step of a small network has hundreds of kernels that run for less time than their start takes. A
graph starts them all at once, with the same memory and the same arguments.
"""

import contextlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hemera.errors import TrainingError
from hemera.training.session import Compute

WARM_UP = 3
"""Steps before one is captured: in them libraries choose kernels and matrices are cached."""

Batch = dict[str, Any]
Losses = dict[str, Tensor]


class Step(Protocol):
    """A training step, see `GraphedStep`."""

    def __call__(self, batches: Sequence[Batch], variant: Hashable = None) -> Losses:
        """Take the step."""


class Recorder(Protocol):
    """What captures the kernels of a function."""

    def warm_up(self) -> contextlib.AbstractContextManager[object]:
        """Return the context of the steps before the capture."""

    def capture(self, run: Callable[[], Losses]) -> tuple[Callable[[], None], Losses]:
        """Return what repeats a run, and the tensors that each repetition writes.

        The run is captured, not executed: what it does without a kernel is done once, here.
        """


class CudaRecorder:
    """Captures what runs on the current GPU."""

    @contextlib.contextmanager
    def warm_up(self) -> Any:
        """Run on another stream than the default one, as torch.cuda.graph does."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)

    def capture(self, run: Callable[[], Losses]) -> tuple[Callable[[], None], Losses]:
        """Capture a run; raise TrainingError where it does what a graph cannot repeat."""
        graph = torch.cuda.CUDAGraph()
        try:
            # Threads that copy batches to pinned memory call CUDA meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                found = run()
        except RuntimeError as error:
            raise TrainingError(
                f"cuda_graph: true, but the step could not be captured ({error}); "
                "set cuda_graph: false"
            ) from error
        return graph.replay, found


class GraphedStep:
    """A training step that is captured after `WARM_UP` steps and then repeated as a graph.

    The graph reads its batch from the same memory each time, into which a batch is copied first.
    There is a graph for each shape of the batches and each variant.
    """

    def __init__(
        self, step: Callable[[Sequence[Batch]], Losses], recorder: Recorder | None = None
    ) -> None:
        """Store the step; it must not depend on anything that changes but tensors in place."""
        self._step = step
        self._recorder: Recorder = recorder or CudaRecorder()
        self._counts: dict[Hashable, int] = {}
        self._graphs: dict[Hashable, tuple[Callable[[], None], list[Batch], Losses]] = {}

    def __call__(self, batches: Sequence[Batch], variant: Hashable = None) -> Losses:
        """Take a step and return its losses.

        Args:
            batches: the micro-batches, on the device.
            variant: what else selects the kernels of this step.
        """
        given = [_tensors(batch) for batch in batches]
        key = (variant, *((name, x.shape, x.dtype) for each in given for name, x in each.items()))
        count = self._counts[key] = self._counts.get(key, 0) + 1
        if count <= WARM_UP:
            with self._recorder.warm_up():
                return self._step(batches)
        if key not in self._graphs:
            own = [{name: x.clone() for name, x in each.items()} for each in given]
            replay, found = self._recorder.capture(lambda: self._step(own))
            self._graphs[key] = replay, own, found
        replay, own, found = self._graphs[key]
        for each, new in zip(own, given, strict=True):
            for name, x in new.items():
                each[name].copy_(x)
        replay()
        # The next repetition writes to the same memory.
        return {name: value.clone() for name, value in found.items()}


def repeated_step(step: Callable[[Sequence[Batch]], Losses], compute: Compute) -> Step:
    """Return a step as `GraphedStep` if the session repeats steps as graphs, else as it is."""
    if compute.graphed:
        return GraphedStep(step)

    def plain(batches: Sequence[Batch], variant: Hashable = None) -> Losses:
        return step(batches)

    return plain


def _tensors(batch: Mapping[str, Any]) -> Batch:
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)}
