"""The session in which networks compute: device, precision, determinism, ranks.

The order of tiles, crops and flips follow from (seed, epoch, tile) alone, so on a CPU neither the
number of worker processes nor a resumption changes a bit of the result.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.utils.deterministic
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from hemera.config import TrainingOptions
from hemera.errors import TrainingError
from hemera.training.distributed import Ranks, process_group

log = logging.getLogger(__name__)

DETERMINISM: Any = torch.utils.deterministic
"""Module whose attributes have no type stubs."""

Function = TypeVar("Function", bound=Callable[..., Any])

PRECISIONS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def find_device(name: str) -> torch.device:
    """Return the device that an option names; raise TrainingError for cuda without a GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainingError("device: cuda, but PyTorch finds no GPU; set device: auto or cpu")
    return torch.device(name)


@contextlib.contextmanager
def session(
    *, seed: int, threads: int, device: str, deterministic: bool = True, tf32: bool = False
) -> Iterator[torch.device]:
    """Set torch's seed, threads and deterministic mode, and restore all of them afterwards."""
    place = find_device(device)
    if deterministic and place.type == "cuda":
        # Read by cuBLAS when it starts; without it, some of its sums have no fixed order.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    gpus = [torch.cuda.current_device()] if place.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus), _restored_settings():
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        # Warn only: one kernel without a deterministic form must not end a long run.
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        # A fifth of the kernels of a step would fill memory that is overwritten at once.
        DETERMINISM.fill_uninitialized_memory = False
        torch.backends.cudnn.benchmark = not deterministic
        # Losses are computed without, see `hemera.networks.losses.single_precision`.
        torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        log.info("computing on %s, %d threads, seed %d", place, threads, seed)
        yield place


@contextlib.contextmanager
def _restored_settings() -> Iterator[None]:
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    flags = [
        (DETERMINISM, "fill_uninitialized_memory"),
        (torch.backends.cudnn, "benchmark"),
        (torch.backends.cudnn, "allow_tf32"),
        (torch.backends.cuda.matmul, "allow_tf32"),
    ]
    values = [getattr(owner, name) for owner, name in flags]
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        for (owner, name), value in zip(flags, values, strict=True):
            setattr(owner, name, value)


def to_unit(images: Tensor, device: torch.device) -> Tensor:
    """Turn uint8 images to floats in [0, 1] on `device`."""
    return images.to(device, non_blocking=True).float() / 255


@dataclasses.dataclass
class Compute:
    """The device, precision and ranks of a training."""

    device: torch.device
    ranks: Ranks = dataclasses.field(default_factory=Ranks)
    precision: torch.dtype = torch.float32
    compile: bool = False
    graphed: bool = False
    """Whether the whole step is repeated as a CUDA graph."""
    finished: Tensor = dataclasses.field(
        default_factory=lambda: torch.zeros(1, dtype=torch.bool).share_memory_()
    )
    """Whether the run is over; worker processes read it."""

    def __post_init__(self) -> None:
        """Make the scaler of gradients, which only fp16 uses."""
        fp16 = self.precision == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which networks and losses run."""
        return torch.autocast(
            self.device.type, self.precision, enabled=self.precision != torch.float32
        )

    def prepare(self, module: nn.Module) -> None:
        """Move a network to the device; on a GPU its convolutions channels last, which is faster.

        On a processor PyTorch 2.13 then writes beyond its memory in gradients of narrow networks.
        """
        if self.compile and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
            raise TrainingError(
                "compile: true, but there is no C++ compiler; install g++ or set compile: false"
            )
        module.to(self.device)
        if self.device.type == "cuda":
            convert_conv2d_weight_memory_format(module, torch.channels_last)
        if self.compile:
            # Once for each size: code for any size fails to compile in places, and is slower.
            module.compile(dynamic=False)

    def compiled(self, function: Function) -> Function:
        """Return a function of tensors, compiled where networks are."""
        return _compiled(function) if self.compile else function

    def learning_rate(self, rate: float) -> float | Tensor:
        """Return a learning rate for an optimiser; a tensor where a graph of the GPU reads it."""
        return torch.tensor(rate, device=self.device) if self.graphed else rate

    def to_unit(self, images: Tensor) -> Tensor:
        """Turn uint8 images to floats in [0, 1] on the device, on a GPU channels last."""
        unit = to_unit(images, self.device)
        if self.device.type == "cuda":
            unit = unit.contiguous(memory_format=torch.channels_last)
        return unit

    def backward(self, loss: Tensor, count: int) -> None:
        """Accumulate the gradient of the mean loss of one of `count` equal micro-batches."""
        self.scaler.scale(loss / count if count > 1 else loss).backward()

    def update(
        self, optimiser: torch.optim.Optimizer, module: nn.Module, clip_norm: float = 0.0
    ) -> None:
        """Average the gradients of a network over the ranks and take the optimiser's step.

        If `clip_norm` is above 0, a gradient whose Euclidean norm is larger is scaled to it.
        """
        self.ranks.average_gradients(module)
        if clip_norm > 0:
            self.scaler.unscale_(optimiser)
            nn.utils.clip_grad_norm_(module.parameters(), clip_norm)
        self.scaler.step(optimiser)


@functools.cache
def _compiled(function: Function) -> Function:
    return torch.compile(function, dynamic=False)  # type: ignore[return-value]


@contextlib.contextmanager
def training_session(options: TrainingOptions) -> Iterator[Compute]:
    """Open the session of a training, joined with the other ranks, or raise TrainingError."""
    device = find_device(options.device)
    precision = PRECISIONS[options.precision]
    if (
        device.type == "cuda"
        and precision == torch.bfloat16
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise TrainingError(
            f"{options.section}.precision: bf16, but {torch.cuda.get_device_name()} lacks it; "
            "set precision: fp16 or float32"
        )
    with (
        process_group(options.gpus, device) as ranks,
        session(
            seed=options.seed,
            threads=options.torch_threads,
            device=options.device,
            deterministic=options.deterministic,
            tf32=options.precision == "tf32",
        ),
    ):
        graphed = options.cuda_graph and device.type == "cuda"
        compute = Compute(device, ranks, precision, options.compile, graphed)
        try:
            yield compute
        finally:
            compute.finished[0] = True


def seed_per_rank(ranks: Ranks, seed: int) -> None:
    """Seed each rank differently, once all have drawn the same weights."""
    if ranks.count > 1:
        torch.manual_seed(seed + 1 + ranks.rank)
