"""The state of a training: its progress, checkpoints and outputs."""

import contextlib
import copy
import dataclasses
import hashlib
import json
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hemera import tables
from hemera.config import TrainingOptions
from hemera.dataset.index import TrainingTiles
from hemera.errors import TrainingError
from hemera.files import atomic
from hemera.files.faults import translated
from hemera.networks import storage
from hemera.training.session import Compute, find_device

log = logging.getLogger(__name__)

UNDIGESTED = ("workers", "checkpoint_minutes", "select")
"""Options without effect on the trained weights: a run resumes when they change."""
SETTLE_STEPS = 32
"""Steps after which losses are read: each reading makes the GPU wait."""
AVERAGE = "average"
"""Name of the moving average among the modules of a run."""


def run_digest(options: TrainingOptions, tiles: TrainingTiles, **more: str) -> str:
    """Return a short digest of everything that determines a run: the name of its checkpoints."""
    values = options.model_dump()
    for name in UNDIGESTED:
        values.pop(name, None)
    # auto is the device it finds; on a GPU the CPU threads have no effect on sums.
    values["device"] = find_device(options.device).type
    if values["device"] == "cuda":
        del values["torch_threads"]
    described = {
        "section": options.section,
        "version": options.version,
        "options": values,
        "fingerprint": tiles.fingerprint,
        "engine": tiles.engine,
        "train": tiles.train,
        "val": tiles.val,
        **more,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


@dataclasses.dataclass
class Progress:
    """The progress and history of a run: what a checkpoint stores beside the tensors."""

    epoch: int = 1
    step: int = 0  # steps done in this epoch
    sums: dict[str, float] = dataclasses.field(default_factory=dict)  # of this epoch, over tiles
    seen: int = 0  # tiles of this epoch
    history: list[tuple[int, str, str, float]] = dataclasses.field(default_factory=list)
    best_epoch: int = 0
    best_value: float = -math.inf
    updates: int = 0  # steps done in all epochs

    def add(self, losses: Mapping[str, float], tiles: int) -> None:
        """Add one step's losses, each a mean over so many tiles."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * tiles
        self.seen += tiles
        self.step += 1

    def close_epoch(self, rate: float, validated: Mapping[str, float]) -> dict[str, float]:
        """Append the epoch to the history, begin the next, and return its values by split/name."""
        means = {name: total / self.seen for name, total in self.sums.items()}
        values = {"train": {**means, "learning_rate": rate}, "val": validated}
        rows = [(split, name, each) for split in values for name, each in values[split].items()]
        self.history += [(self.epoch, *row) for row in rows]
        self.epoch += 1
        self.step = self.seen = 0
        self.sums = {}
        return {f"{split}/{name}": value for split, name, value in rows}


@dataclasses.dataclass
class TrainingState:
    """A run: its folder, networks and optimisers by name, and progress.

    The first network is the result, or with the option `ema` its moving average, which becomes the
    module `AVERAGE`; `best` are the weights of its best epoch so far. `described` are entries of
    the JSON beside the weights. With several ranks all call these methods, and the first one
    writes.
    """

    folder: Path
    options: TrainingOptions
    tiles: TrainingTiles
    compute: Compute
    modules: dict[str, nn.Module]
    optimisers: dict[str, torch.optim.Optimizer]
    described: dict[str, Any]
    progress: Progress = dataclasses.field(default_factory=Progress)
    best: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    _pending: list[tuple[dict[str, Tensor], list[str]]] = dataclasses.field(default_factory=list)
    _saved_at: float = dataclasses.field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        """Begin the moving average with the first network, on the same device."""
        if self.options.ema:
            net = next(iter(self.modules.values()))
            self.modules = {**self.modules, AVERAGE: copy.deepcopy(net)}

    @property
    def result(self) -> nn.Module:
        """The network that is validated and written."""
        return self.modules[AVERAGE if self.options.ema else next(iter(self.modules))]

    @property
    def path(self) -> Path:
        """File of the checkpoint."""
        return self.folder / "checkpoint.pt"

    def save(self) -> None:
        """Write a checkpoint atomically."""
        ranks = self.compute.ranks
        random = [torch.get_rng_state()]
        if torch.cuda.is_initialized():
            random.append(torch.cuda.get_rng_state())
        state = {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimisers": {name: each.state_dict() for name, each in self.optimisers.items()},
            "scaler": self.compute.scaler.state_dict(),
            "progress": dataclasses.asdict(self.progress),
            "best": self.best,
            # The random states of each rank: its processor's, then its GPU's.
            "random": ranks.gather([random]),
            # Within an epoch each rank has other tiles.
            "statistics": ranks.gather(
                [
                    {
                        name: {key: buffer.cpu() for key, buffer in module.named_buffers()}
                        for name, module in self.modules.items()
                    }
                ]
            ),
        }
        if ranks.first:
            with atomic.replacing(self.path) as temporary:
                torch.save(state, temporary)
        self._saved_at = time.monotonic()

    def resume(self) -> None:
        """Load the checkpoint, if there is one; raise TrainingError when it does not fit."""
        if not self.path.exists():
            log.info("a new run, %s", self.folder)
            return
        state = storage.read_weights(self.path, remedy="delete it to begin this run again")
        with translated(
            TrainingError,
            f"{self.path}: not a checkpoint of this run ({{error}}); delete it to begin again",
        ):
            for name, module in self.modules.items():
                storage.load_into(module, state["modules"][name], f"{self.path} ({name})")
            for name, optimiser in self.optimisers.items():
                optimiser.load_state_dict(state["optimisers"][name])
                for group in optimiser.param_groups:
                    group["lr"] = self.compute.learning_rate(float(group["lr"]))
            if state["scaler"]:
                self.compute.scaler.load_state_dict(state["scaler"])
            history = [tuple(entry) for entry in state["progress"]["history"]]
            self.progress = Progress(**{**state["progress"], "history": history})
            self.best = state["best"]
            rank = self.compute.ranks.rank
            for name, buffers in state["statistics"][rank].items():
                self.modules[name].load_state_dict(buffers, strict=False)
            own, *gpu = state["random"][rank]
            torch.set_rng_state(own)
            if gpu and torch.cuda.is_initialized():
                torch.cuda.set_rng_state(gpu[0])
        log.info("resumed at epoch %d, step %d", self.progress.epoch, self.progress.step)

    def add_step(self, losses: dict[str, Tensor], tiles: list[str]) -> None:
        """Count a step, average the weights, and add its losses, which are read by `settle`.

        Losses are means over this rank's tiles.
        """
        self._pending.append((losses, tiles))
        if self.options.ema:
            self._average_weights()
        self.progress.updates += 1

    @torch.no_grad()
    def _average_weights(self) -> None:
        """Move the average towards the weights, and running statistics alike.

        After the first step it equals the network; before, it has been nothing else. In the first
        steps the decay is that of TensorFlow's moving average, (1 + n) / (10 + n), since a long
        average would consist of the initial weights.
        """
        average, net = self.result, next(iter(self.modules.values()))
        # Validation sets evaluation mode; statistics are averaged over the ranks in this one.
        average.train()
        n = self.progress.updates
        decay = min(self.options.ema, (1 + n) / (10 + n)) if n else 0.0
        means: tuple[list[Tensor], list[Tensor]] = ([], [])
        current = net.state_dict()
        for name, own in average.state_dict().items():
            if own.is_floating_point():
                means[0].append(own)
                means[1].append(current[name])
            else:
                own.copy_(current[name])
        torch._foreach_lerp_(*means, 1 - decay)

    def must_settle(self, steps: int, stop: threading.Event) -> bool:
        """Return whether losses are to be read now: often enough, and before a checkpoint.

        Several ranks, which then wait for each other, do so at fixed steps only.
        """
        count = len(self._pending)
        if count == SETTLE_STEPS or self.progress.step + count == steps:
            return True
        return self.compute.ranks.count == 1 and (self._checkpoint_due() or stop.is_set())

    def settle(self, steps: int, stop: threading.Event) -> dict[str, float]:
        """Return this rank's mean losses since the last call; write a checkpoint when it is due.

        Raises:
            TrainingError: when a loss is not finite; when a stop was requested, after a checkpoint.
        """
        names = list(self._pending[0][0])
        values = torch.stack(
            [torch.stack([loss.detach().float() for loss in found.values()])
             for found, _ in self._pending]
        )  # fmt: skip
        self._check_finite(names, values)
        ranks = self.compute.ranks
        for row, (_, tiles) in zip(ranks.average(values).tolist(), self._pending, strict=True):
            self.progress.add(dict(zip(names, row, strict=True)), len(tiles) * ranks.count)
        self._pending = []
        if ranks.any(stop.is_set()):
            self.save()
            raise TrainingError(
                f"stopped at epoch {self.progress.epoch}, step {self.progress.step} of {steps}; "
                "the checkpoint is written: run the stage again to resume"
            )
        if ranks.any(self._checkpoint_due()):
            self.save()
        return dict(zip(names, values.mean(0).tolist(), strict=True))

    def _checkpoint_due(self) -> bool:
        return time.monotonic() - self._saved_at >= self.options.checkpoint_minutes * 60

    def _check_finite(self, names: list[str], values: Tensor) -> None:
        bad = [
            (number, name, value, ", ".join(tiles))
            for number, (row, (_, tiles)) in enumerate(
                zip(values.tolist(), self._pending, strict=True), self.progress.step + 1
            )
            for name, value in zip(names, row, strict=True)
            if not math.isfinite(value)
        ]
        # The first of all ranks: after it the gradients of every rank are not finite.
        if found := self.compute.ranks.gather(bad[:1]):
            number, name, value, tiles = min(found, key=lambda one: one[0])
            raise TrainingError(
                f"epoch {self.progress.epoch}, step {number}: loss {name} is {value} on the tiles "
                f"{tiles}; inspect them in the report, or lower learning_rate"
            )

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of all optimisers."""
        for optimiser in self.optimisers.values():
            for group in optimiser.param_groups:
                if isinstance(group["lr"], Tensor):
                    # A captured step reads this memory.
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    def average_statistics(self) -> None:
        """Average the running statistics of all networks over the ranks."""
        for module in self.modules.values():
            self.compute.ranks.average_statistics(module)

    def end_epoch(self, rate: float, validated: dict[str, float], score: float) -> dict[str, float]:
        """Store the weights of the last epoch and return its values by split/name.

        It is the best epoch so far if its `score` is the highest; `rate` is its learning rate. A
        validation measure that is not a number is a TrainingError.
        """
        progress = self.progress
        if wrong := [name for name, each in validated.items() if math.isnan(each)]:
            raise TrainingError(
                f"epoch {progress.epoch}: validation is not a number for {', '.join(wrong)}; lower "
                "learning_rate, or set precision: float32"
            )
        state = self.result.state_dict()
        names = ["last"]
        if score > progress.best_value:
            names.append("best")
            progress.best_value, progress.best_epoch = score, progress.epoch
            self.best = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
        if self.compute.ranks.first:
            for name in names:
                weights = self.folder / f"{name}.safetensors"
                storage.write_weights(weights, state)
                metadata = self.folder / f"{name}.json"
                storage.write_metadata(metadata, self.describe(progress.epoch), weights)
        return progress.close_epoch(rate, validated)

    def write_results(self, *, weights: Path, metadata: Path, table: Path) -> None:
        """Write the outputs of the stage: the weights of the selected epoch, JSON and history."""
        if not self.compute.ranks.first:
            return
        state, epoch = self.result.state_dict(), self.progress.epoch - 1
        if self.options.select == "best":
            state, epoch = self.best, self.progress.best_epoch
        storage.write_weights(weights, state)
        storage.write_metadata(metadata, self.describe(epoch), weights)
        names = tables.HISTORY.names
        rows = [dict(zip(names, entry, strict=True)) for entry in self.progress.history]
        tables.write(table, rows, tables.HISTORY)

    def describe(self, epoch: int) -> dict[str, Any]:
        """Return the JSON beside the weights of an epoch; it contains no time and no path."""
        options, tiles = self.options, self.tiles
        parameters = list(self.result.parameters())
        return {
            "parameters": sum(parameter.numel() for parameter in parameters),
            "parameters_trained": sum(p.numel() for p in parameters if p.requires_grad),
            "options": options.model_dump(),
            "options_version": options.version,
            "seed": options.seed,
            "index_fingerprint": tiles.fingerprint,
            "mask_engine": tiles.engine,
            "mpp": tiles.mpp,
            "mpp_max": tiles.mpp_max,
            "tile_px": options.crop_px or tiles.size_px,
            "tiles": {"train": len(tiles.train), "val": len(tiles.val)},
            "epoch": epoch,
            "best_epoch": self.progress.best_epoch,
            "versions": storage.versions(),
            **self.described,
        }


@contextlib.contextmanager
def catch_sigterm() -> Iterator[threading.Event]:
    """Set an event on SIGTERM, which a cluster sends before it kills, instead of ending."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
