"""What both training stages share: the session, batches, checkpoints, weights, history.

A run is determined by its options, its index and its torch threads. The order of tiles, crops and
flips follow from (seed, epoch, tile) alone, so neither the number of reading processes nor a break
and a resumption changes a result: on a CPU a resumed run equals an unbroken one bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import shutil
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format
from torch.utils.data import DataLoader
from tqdm import tqdm

from hemera import tables
from hemera.config import TrainGenerationOptions, TrainingOptions, TrainSegmentationOptions
from hemera.config.base import Options
from hemera.dataset.torch_dataset import Order, TileDataset, turned
from hemera.errors import HemeraError, TableError, TrainingError
from hemera.io import atomic
from hemera.networks import storage
from hemera.training.logging import Journal
from hemera.training.ranks import Ranks, joined

log = logging.getLogger(__name__)

UNDIGESTED = ("workers", "checkpoint_minutes", "sample_tiles", "select")
"""Options that change no byte of what is trained, so that a run resumes when they change.

`select` chooses between weights that the checkpoint holds both.
"""

SETTLE_STEPS = 32
"""Steps after which losses are read: to read one makes the GPU wait."""


# --- the session ---------------------------------------------------------------------------------


def find_device(name: str) -> torch.device:
    """Return the device that an option names; auto takes a GPU where there is one.

    Raises:
        TrainingError: when a GPU is asked for and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainingError("device: cuda, and torch sees no GPU; set device: auto or cpu")
    return torch.device(name)


PRECISIONS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@contextlib.contextmanager
def session(
    *, seed: int, threads: int, device: str, deterministic: bool = True, tf32: bool = False
) -> Iterator[torch.device]:
    """Seed torch, set its threads and its deterministic mode, and put all back afterwards.

    Args:
        seed: of torch's generators.
        threads: of the processor.
        device: auto, cpu or cuda.
        deterministic: use no kernel whose result can differ, where there is a choice.
        tf32: let a GPU round what convolutions multiply in single precision to TF32.

    Yields:
        The device to compute on.
    """
    place = find_device(device)
    before = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
    )
    if deterministic and place.type == "cuda":
        # Read by cuBLAS when it starts; without it, some of its sums are in no fixed order.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    gpus = [torch.cuda.current_device()] if place.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        try:
            torch.manual_seed(seed)
            torch.set_num_threads(threads)
            # Warn only: one kernel without a deterministic form must not end a long run.
            torch.use_deterministic_algorithms(deterministic, warn_only=True)
            torch.backends.cudnn.benchmark = not deterministic
            torch.backends.cudnn.allow_tf32 = tf32
            # Losses are matrix products.
            torch.backends.cuda.matmul.allow_tf32 = False
            log.info("computing on %s, %d threads, seed %d", place, threads, seed)
            yield place
        finally:
            torch.set_num_threads(before[0])
            torch.use_deterministic_algorithms(before[1], warn_only=before[2])
            torch.backends.cudnn.benchmark = before[3]
            torch.backends.cudnn.allow_tf32 = before[4]
            torch.backends.cuda.matmul.allow_tf32 = before[5]


@dataclasses.dataclass
class Compute:
    """Where, in what numbers and with whom a training computes."""

    device: torch.device
    ranks: Ranks
    precision: torch.dtype
    scaler: torch.amp.GradScaler
    leaving: Tensor = dataclasses.field(
        default_factory=lambda: torch.zeros(1, dtype=torch.bool).share_memory_()
    )
    """Whether the run is over, for the processes that read tiles."""

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which networks and losses run."""
        return torch.autocast(
            self.device.type, self.precision, enabled=self.precision != torch.float32
        )

    def place(self, module: nn.Module, *, compiled: bool = False) -> None:
        """Move a network to the device; on a GPU its convolutions channels last, which is faster.

        Not on a processor, where PyTorch 2.13 then writes beyond its memory in the gradients of
        narrow networks on several threads.

        Raises:
            TrainingError: when it is to be compiled and there is no compiler.
        """
        if compiled and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
            raise TrainingError(
                "compile: true, and there is no C++ compiler; install g++ or set compile: false"
            )
        module.to(self.device)
        if self.device.type == "cuda":
            convert_conv2d_weight_memory_format(module, torch.channels_last)
        if compiled:
            # Once for each size: code for any size fails to compile in places, and is slower.
            module.compile(dynamic=False)

    def to_unit(self, images: Tensor) -> Tensor:
        """Turn uint8 images to floats in [0, 1] on the device, on a GPU channels last."""
        unit = to_unit(images, self.device)
        if self.device.type == "cuda":
            unit = unit.contiguous(memory_format=torch.channels_last)
        return unit

    def backward(self, loss: Tensor, parts: int) -> None:
        """Add the gradient of a loss that is the mean over one of so many equal parts."""
        self.scaler.scale(loss / parts if parts > 1 else loss).backward()

    def update(self, optimiser: torch.optim.Optimizer, module: nn.Module) -> None:
        """Average the gradients of a network over the processes and take the step."""
        self.ranks.average_gradients(module)
        self.scaler.step(optimiser)


@contextlib.contextmanager
def computing(options: TrainingOptions) -> Iterator[Compute]:
    """Open the session of a training, joined with the other processes that share it.

    Raises:
        TrainingError: a GPU that is not there or lacks the precision; another number of processes
            than the options say.
    """
    device = find_device(options.device)
    precision = PRECISIONS[options.precision]
    lacking = (
        device.type == "cuda"
        and precision == torch.bfloat16
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    )
    if lacking:
        raise TrainingError(
            f"{options.section}.precision: bf16, and {torch.cuda.get_device_name()} lacks it; "
            "set precision: fp16 or float32"
        )
    with (
        joined(options.gpus, device) as ranks,
        session(
            seed=options.seed,
            threads=options.torch_threads,
            device=options.device,
            deterministic=options.deterministic,
            tf32=options.precision == "tf32",
        ),
    ):
        scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
        compute = Compute(device, ranks, precision, scaler)
        try:
            yield compute
        finally:
            compute.leaving[0] = True


def part_ways(compute: Compute, seed: int) -> None:
    """Give each process numbers of its own, once all have drawn the same weights."""
    if compute.ranks.count > 1:
        torch.manual_seed(seed + 1 + compute.ranks.rank)


# --- the index -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class IndexFacts:
    """What a run needs to know of its index beside the tiles."""

    fingerprint: str
    engine: str
    train: tuple[str, ...]
    val: tuple[str, ...]
    mpp: float
    """The median over the training tiles."""
    mpp_max: float
    """The coarsest of them."""
    size_px: int
    """The smallest side of them."""


def subset(index: Path, network: str, part: str) -> list[dict[str, Any]]:
    """Return what tells the tiles of a network's part apart, in the order of the index.

    That is tile, case, dataset, score, mpp and size_px.
    """
    column = f"{network}_split"
    names = ["tile", "case", "dataset", "score", "mpp", "size_px"]
    table = tables.read(index, tables.index(()), [*names, column])
    return [{name: row[name] for name in names} for row in table.to_pylist() if row[column] == part]


def index_metadata(index: Path) -> dict[str, str]:
    """Return fingerprint and mask_target of an index.

    Raises:
        TrainingError: when the file is no index.
    """
    try:
        metadata = tables.read_metadata(index)
    except TableError as error:
        raise TrainingError(f"{index}: not an index ({error}); run the stage index") from error
    lacking = [key for key in ("fingerprint", "mask_target") if key not in metadata]
    if lacking:
        raise TrainingError(
            f"{index}: its metadata lacks {', '.join(lacking)}; run the stage index again"
        )
    return metadata


def index_facts(index: Path, network: str, crop_px: int | None = None) -> IndexFacts:
    """Read fingerprint, mask engine and subsets of an index.

    Raises:
        TrainingError: when the training or the validation subset is empty, or a tile smaller than
            the crop.
    """
    metadata = index_metadata(index)
    parts: dict[str, list[dict[str, Any]]] = {}
    for part, purpose in (("train", "training"), ("val", "validation")):
        parts[part] = subset(index, network, part)
        if not parts[part]:
            raise TrainingError(
                f"index: no tiles for {purpose} of {network}; at least one is needed; read the "
                f"funnel in the report, then loosen filter, add pairs, or check "
                f"index.{network}_datasets, index.val_fraction and the sheet's splits"
            )
    smallest = min((*parts["train"], *parts["val"]), key=lambda row: row["size_px"])
    if crop_px is not None and smallest["size_px"] < crop_px:
        raise TrainingError(
            f"{smallest['tile']}: {smallest['size_px']} px is smaller than crop_px {crop_px}; give "
            "a smaller crop or none"
        )
    return IndexFacts(
        metadata["fingerprint"],
        metadata["mask_target"],
        tuple(row["tile"] for row in parts["train"]),
        tuple(row["tile"] for row in parts["val"]),
        statistics.median(row["mpp"] for row in parts["train"]),
        max(row["mpp"] for row in parts["train"]),
        min(row["size_px"] for row in parts["train"]),
    )


def run_digest(options: TrainingOptions, facts: IndexFacts, **more: str) -> str:
    """Return a short digest of everything that determines a run: the name of its checkpoints."""
    values = options.model_dump()
    for name in UNDIGESTED:
        values.pop(name, None)
    # auto is what it finds; on a GPU the processor's threads add nothing up.
    values["device"] = find_device(options.device).type
    if values["device"] == "cuda":
        del values["torch_threads"]
    described = {
        "section": options.section,
        "version": options.version,
        "options": values,
        "fingerprint": facts.fingerprint,
        "engine": facts.engine,
        "train": facts.train,
        "val": facts.val,
        **more,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


# --- tiles in their order ------------------------------------------------------------------------


def training_batches(
    tiles: TileDataset, order: Order, workers: int, compute: Compute | None = None
) -> DataLoader[dict[str, Any]]:
    """Return the parts of batches of a run as tensors; its processes start once, not per epoch."""
    return DataLoader(
        tiles,
        batch_sampler=order,
        num_workers=workers,
        pin_memory=compute is not None and compute.device.type == "cuda",
        # Its own generator, so that the loader draws nothing from the run's.
        generator=torch.Generator(),
        worker_init_fn=None if compute is None else functools.partial(outlive, compute.leaving),
    )


def validation_batches(
    tiles: TileDataset, batch_size: int, workers: int, compute: Compute | None = None
) -> DataLoader[dict[str, Any]]:
    """Return this process's share of all tiles, in order, as they are seen in validation.

    It is iterated once for each validation.
    """
    ranks = Ranks() if compute is None else compute.ranks
    keys = [(0, position) for position in range(ranks.rank, len(tiles), ranks.count)]
    batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
    workers = -(-workers // 2)
    return DataLoader(
        tiles,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=compute is not None and compute.device.type == "cuda",
        generator=torch.Generator(),
        worker_init_fn=None if compute is None else functools.partial(outlive, compute.leaving),
    )


def outlive(leaving: Tensor, worker: int) -> None:
    """Let a reading process outlive a SIGTERM to the whole job, until the run leaves.

    A cluster signals every process of a job; a reading process that dies of it takes the run along
    before that has saved.
    """

    def told(number: int, frame: object) -> None:
        if bool(leaving[0]):
            os._exit(0)

    signal.signal(signal.SIGTERM, told)


def ahead(batches: Iterable[dict[str, Any]], device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield batches on the device, each flipped and turned there, the next on its way already."""

    def sent(batch: dict[str, Any]) -> dict[str, Any]:
        moved = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
        return turned(moved) if "view" in moved else moved

    waiting = None
    try:
        for batch in batches:
            if device.type == "cpu":
                yield batch
                continue
            following = sent(batch)
            if waiting is not None:
                yield waiting
            waiting = following
    except HemeraError as error:
        # From a reading process it comes with that process's traceback: the last line says it.
        said = str(error).strip().splitlines()[-1]
        name = f"{type(error).__module__}.{type(error).__name__}: "
        raise type(error)(said.removeprefix(name)) from None
    if waiting is not None:
        yield waiting


def to_unit(images: Tensor, device: torch.device) -> Tensor:
    """Turn uint8 images to floats in [0, 1] on `device`."""
    return images.to(device, non_blocking=True).float() / 255


# --- the course of a run -------------------------------------------------------------------------


@dataclasses.dataclass
class Progress:
    """How far a run is, and what it has seen: all that a checkpoint keeps beside the tensors."""

    epoch: int = 1
    step: int = 0  # steps done in this epoch
    sums: dict[str, float] = dataclasses.field(default_factory=dict)  # of this epoch, over tiles
    seen: int = 0  # tiles of this epoch
    history: list[tuple[int, str, str, float]] = dataclasses.field(default_factory=list)
    best_epoch: int = 0
    best_value: float = -math.inf

    def add(self, losses: Mapping[str, float], tiles: int) -> None:
        """Count one step's losses, each a mean over so many tiles."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * tiles
        self.seen += tiles
        self.step += 1

    def close_epoch(self, rates: Mapping[str, float], validation: Mapping[str, float]) -> None:
        """Write the epoch into the history and begin the next."""
        for name, total in self.sums.items():
            self.history.append((self.epoch, "train", name, total / self.seen))
        for name, value in rates.items():
            self.history.append((self.epoch, "train", name, value))
        for name, value in validation.items():
            self.history.append((self.epoch, "val", name, value))
        self.epoch += 1
        self.step = self.seen = 0
        self.sums = {}

    def of(self, epoch: int) -> dict[str, float]:
        """Return what is known of an epoch, as part/quantity."""
        return {
            f"{part}/{name}": value for number, part, name, value in self.history if number == epoch
        }

    def rows(self) -> list[dict[str, Any]]:
        """Return the history as rows of `hemera.tables.HISTORY`."""
        names = tables.HISTORY.names
        return [dict(zip(names, entry, strict=True)) for entry in self.history]


@dataclasses.dataclass
class Run:
    """The tensors of a run under names, and the folder of its checkpoints.

    `best` holds the weights of the best epoch so far, of the module named by `kept`. With several
    processes all call these methods, and the first one writes.
    """

    folder: Path
    modules: dict[str, nn.Module]
    optimisers: dict[str, torch.optim.Optimizer]
    kept: str
    minutes: float
    ranks: Ranks = dataclasses.field(default_factory=Ranks)
    scaler: torch.amp.GradScaler | None = None
    progress: Progress = dataclasses.field(default_factory=Progress)
    best: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    _saved_at: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def path(self) -> Path:
        """Where the checkpoint lies."""
        return self.folder / "checkpoint.pt"

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint, by this process's clock."""
        return time.monotonic() - self._saved_at >= self.minutes * 60

    def save(self) -> None:
        """Write a checkpoint in one step."""
        state = {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimisers": {name: each.state_dict() for name, each in self.optimisers.items()},
            "scaler": self.scaler.state_dict() if self.scaler is not None else {},
            "progress": dataclasses.asdict(self.progress),
            "best": self.best,
            # What each process draws from: its processor's state, then its GPU's.
            "random": self.ranks.gather([_random_state()]),
            # Within an epoch each has seen other tiles.
            "statistics": self.ranks.gather([self._statistics()]),
        }
        if self.ranks.first:
            with atomic.replacing(self.path) as temporary:
                torch.save(state, temporary)
        self._saved_at = time.monotonic()

    def resume(self) -> bool:
        """Go back to the checkpoint, if there is one.

        Raises:
            TrainingError: when it is damaged or of other networks.
        """
        if not self.path.exists():
            others = sum(path.is_dir() for path in self.folder.parent.glob("*"))
            log.info("a new run, %s; runs of other options beside it: %d", self.folder, others)
            return False
        state = storage.read_weights(self.path, remedy="delete it to begin this run again")
        try:
            for name, module in self.modules.items():
                storage.load_into(module, state["modules"][name], f"{self.path} ({name})")
            for name, optimiser in self.optimisers.items():
                optimiser.load_state_dict(state["optimisers"][name])
            if self.scaler is not None and state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
            progress = dict(state["progress"])
            progress["history"] = [tuple(entry) for entry in progress["history"]]
            self.progress = Progress(**progress)
            self.best = state["best"]
            for name, buffers in state["statistics"][self.ranks.rank].items():
                self.modules[name].load_state_dict(buffers, strict=False)
            own, *gpu = state["random"][self.ranks.rank]
            torch.set_rng_state(own)
            if gpu and torch.cuda.is_initialized():
                torch.cuda.set_rng_state(gpu[0])
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise TrainingError(
                f"{self.path}: not a checkpoint of this run ({error}); delete it to begin again"
            ) from error
        log.info("resumed at epoch %d, step %d", self.progress.epoch, self.progress.step)
        return True

    def _statistics(self) -> dict[str, dict[str, Tensor]]:
        """Return the buffers of every network, on the processor."""
        return {
            name: {key: buffer.cpu() for key, buffer in module.named_buffers()}
            for name, module in self.modules.items()
        }

    def judge(self, value: float) -> bool:
        """Keep the weights of the epoch just run when `value` is the highest so far."""
        if not value > self.progress.best_value:
            return False
        self.progress.best_value = value
        self.progress.best_epoch = self.progress.epoch
        self.best = {
            name: tensor.detach().cpu().clone()
            for name, tensor in self.modules[self.kept].state_dict().items()
        }
        return True

    def count(self, steps: Sequence[tuple[Mapping[str, Tensor], Sequence[str]]]) -> None:
        """Count steps that were taken, each with its losses and this process's tiles.

        Raises:
            TrainingError: when a loss is not finite; it names the tiles.
        """
        if not steps:
            return
        names = list(steps[0][0])
        values = torch.stack(
            [torch.stack([loss.detach().float() for loss in found.values()]) for found, _ in steps]
        )
        bad = [
            (number, name, value, ", ".join(tiles))
            for number, (row, (_, tiles)) in enumerate(zip(values.tolist(), steps, strict=True), 1)
            for name, value in zip(names, row, strict=True)
            if not math.isfinite(value)
        ]
        # The first of all processes: after it gradients are spoilt in every one.
        if found := self.ranks.gather(bad[:1]):
            number, name, value, named = min(found, key=lambda one: one[0])
            raise TrainingError(
                f"epoch {self.progress.epoch}, step {self.progress.step + number}: loss {name} is "
                f"{value} on the tiles {named}; look at them in the report, or lower learning_rate"
            )
        for row, (_, tiles) in zip(self.ranks.average(values).tolist(), steps, strict=True):
            self.progress.add(dict(zip(names, row, strict=True)), len(tiles) * self.ranks.count)


def _random_state() -> list[Tensor]:
    own = [torch.get_rng_state()]
    return [*own, torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else own


def train(
    run: Run,
    compute: Compute,
    tiles: TileDataset,
    options: TrainGenerationOptions | TrainSegmentationOptions,
    *,
    rate: Callable[[int], float],
    step: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    validate: Callable[[], dict[str, float]],
    judged: Callable[[Mapping[str, float]], float],
    show: Callable[[], npt.NDArray[np.uint8]],
    describe: Callable[[int], dict[str, Any]],
) -> None:
    """Train from where the run stands to the last epoch; both networks are trained by this.

    Beside the checkpoint it leaves, in the run's folder, the weights of the last and of the best
    validated epoch with their JSON, TensorBoard's log and pictures.

    Args:
        run: networks, optimisers, progress.
        compute: where it computes.
        tiles: training tiles.
        options: of the network.
        rate: learning rate of an epoch, from 1.
        step: takes one step on the parts of a batch and returns its losses, means over the tiles.
        validate: measures the validation tiles.
        judged: what of that measure is best when it is highest.
        show: draws validation tiles, (H, W, 3).
        describe: what stands beside the weights of an epoch.

    Raises:
        TrainingError: a loss that is not finite; a run that was told to end, after a checkpoint.
    """
    progress, ranks = run.progress, compute.ranks
    order = Order(
        len(tiles),
        options.batch_size,
        seed=options.seed,
        epochs=options.epochs,
        epoch=progress.epoch,
        step=progress.step,
        whole=options.whole_batches,
        parts=options.accumulate,
        rank=ranks.rank,
        ranks=ranks.count,
    )
    if progress.epoch > options.epochs:
        log.info("all %d epochs are trained already", options.epochs)
        return
    batches = ahead(training_batches(tiles, order, options.workers, compute), compute.device)
    started, first = time.monotonic(), progress.epoch
    done = (progress.epoch - 1) * order.steps + progress.step
    with (
        Journal(run.folder, done, silent=not ranks.first) as journal,
        told_to_end() as told,
        tqdm(total=order.steps_left, unit="step", disable=None if ranks.first else True) as bar,
    ):
        while progress.epoch <= options.epochs:
            epoch = progress.epoch
            for optimiser in run.optimisers.values():
                for group in optimiser.param_groups:
                    group["lr"] = rate(epoch)
            pending: list[tuple[dict[str, Tensor], list[str]]] = []
            for number in range(progress.step, order.steps):
                parts = [next(batches) for _ in range(options.accumulate)]
                pending.append((step(parts), [tile for part in parts for tile in part["tile"]]))
                bar.update()
                full = len(pending) == SETTLE_STEPS or number + 1 == order.steps
                # Several processes ask each other only now and then.
                if not full and (ranks.count > 1 or not (run.due or told.is_set())):
                    continue
                run.count(pending)
                journal.losses((epoch - 1) * order.steps + number + 1, pending)
                pending = []
                if ranks.any(told.is_set()):
                    run.save()
                    raise TrainingError(
                        f"told to end at epoch {epoch}, step {progress.step} of {order.steps}; "
                        "what was trained is kept: run the stage again to go on"
                    )
                if ranks.any(run.due):
                    run.save()
            for module in run.modules.values():
                ranks.average_statistics(module)
            validated: dict[str, float] = {}
            better = False
            if epoch % options.validate_every == 0 or epoch == options.epochs:
                validated = validate()
                if wrong := [name for name, value in validated.items() if math.isnan(value)]:
                    raise TrainingError(
                        f"epoch {epoch}: validation gives no number for {', '.join(wrong)}; lower "
                        "learning_rate, or set precision: float32"
                    )
                better = run.judge(judged(validated))
            progress.close_epoch({"learning_rate": rate(epoch)}, validated)
            if ranks.first and validated:
                state = run.modules[run.kept].state_dict()
                for name in ["last", "best"] if better else ["last"]:
                    storage.write_weights(run.folder / f"{name}.safetensors", state)
                    storage.write_metadata(run.folder / f"{name}.json", describe(epoch))
                if options.sample_tiles:
                    journal.picture(epoch, epoch * order.steps, show())
            journal.epoch(epoch * order.steps, progress.of(epoch))
            if ranks.first:
                log_epoch(progress, options.epochs, started, first)
    run.save()


def write_results(
    run: Run,
    options: TrainGenerationOptions | TrainSegmentationOptions,
    describe: Callable[[int], dict[str, Any]],
    *,
    weights: Path,
    metadata: Path,
    history: Path,
) -> None:
    """Write what the stage promises, once, by the first process: weights, JSON, history.

    Args:
        run: a finished run.
        options: its `select` says whether the last or the best epoch's weights are written.
        describe: what stands beside the weights of an epoch.
        weights: written, safetensors.
        metadata: written, JSON.
        history: written, a table.
    """
    if not run.ranks.first:
        return
    last = options.select == "last"
    storage.write_weights(weights, run.modules[run.kept].state_dict() if last else run.best)
    storage.write_metadata(metadata, describe(options.epochs if last else run.progress.best_epoch))
    tables.write(history, run.progress.rows(), tables.HISTORY)


@contextlib.contextmanager
def told_to_end() -> Iterator[threading.Event]:
    """Note a SIGTERM, which a cluster sends before it kills, in place of dying of it."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.set())
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)


def log_epoch(progress: Progress, epochs: int, started: float, first: int) -> None:
    """Write one line about the epoch that was closed last.

    Args:
        progress: of the run.
        epochs: epochs in all.
        started: `time.monotonic()` when this process began to train.
        first: the epoch it began with.
    """
    epoch = progress.epoch - 1
    shown = ", ".join(
        f"{name.replace('/', ' ')} {value:.4g}" for name, value in progress.of(epoch).items()
    )
    left = (time.monotonic() - started) / (epoch - first + 1) * (epochs - epoch)
    log.info("epoch %d/%d: %s; about %.0f s left", epoch, epochs, shown, left)


def samples(tiles: TileDataset, wanted: int) -> list[dict[str, Any]]:
    """Return items of a few tiles, spread evenly, as they are seen in validation."""
    places = np.linspace(0, len(tiles) - 1, min(wanted, len(tiles))).round().astype(int)
    return [tiles[0, int(place)] for place in np.unique(places)]


def describe_run(
    network: str,
    model: Mapping[str, Any],
    options: Options,
    facts: IndexFacts,
    run: Run,
    epoch: int,
) -> dict[str, Any]:
    """Return what stands in the JSON beside the weights; it holds no time and no path."""
    module = run.modules[run.kept]
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
    return {
        "network": network,
        "model": dict(model),
        "parameters": sum(size for size, _ in sizes),
        "parameters_trained": sum(size for size, trained in sizes if trained),
        "options": options.model_dump(),
        "options_version": options.version,
        "seed": options.model_dump()["seed"],
        "index_fingerprint": facts.fingerprint,
        "mask_engine": facts.engine,
        "mpp": facts.mpp,
        "mpp_max": facts.mpp_max,
        "tile_px": options.model_dump()["crop_px"] or facts.size_px,
        "tiles": {"train": len(facts.train), "val": len(facts.val)},
        "epoch": epoch,
        "best_epoch": run.progress.best_epoch,
        "versions": storage.versions(),
    }


def mean_of(values: Iterable[float]) -> float:
    """Return the mean of the values that are not infinite; 0 where there is none."""
    bounded = [value for value in values if not math.isinf(value)]
    return sum(bounded) / len(bounded) if bounded else 0.0
