"""What both training stages share: the session, batches, checkpoints, weights, history.

A run is determined by its options, its index and its torch threads. The order of tiles, crops and
flips follow from (seed, epoch, tile) alone, so neither the number of reading processes nor a break
and a resumption changes a result: on a CPU a resumed run equals an unbroken one bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import math
import pickle
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format
from torch.utils.data import DataLoader

from hemera import files, tables
from hemera.config import Options
from hemera.dataset import Order, TileDataset
from hemera.errors import TrainingError
from hemera.models.generation import GenerationNet
from hemera.models.segmentation import SegmentationNet

log = logging.getLogger(__name__)

UNDIGESTED = ("workers", "checkpoint_minutes")
"""Options that change no byte of the result, so that a run resumes when they change."""


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


@contextlib.contextmanager
def session(
    *, seed: int, threads: int, device: str, deterministic: bool = True
) -> Iterator[torch.device]:
    """Seed torch, set its threads and its deterministic mode, and put all back afterwards.

    Yields:
        The device to compute on.
    """
    place = find_device(device)
    before = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
    )
    with torch.random.fork_rng(enabled=True):
        try:
            torch.manual_seed(seed)
            torch.set_num_threads(threads)
            # Warn only: one kernel without a deterministic form must not end a long run.
            torch.use_deterministic_algorithms(deterministic, warn_only=True)
            torch.backends.cudnn.benchmark = not deterministic
            log.info("computing on %s, %d threads, seed %d", place, threads, seed)
            yield place
        finally:
            torch.set_num_threads(before[0])
            torch.use_deterministic_algorithms(before[1], warn_only=before[2])
            torch.backends.cudnn.benchmark = before[3]


def place(module: nn.Module, device: torch.device) -> None:
    """Move a network to `device` and lay its convolutions channels last, which is faster."""
    module.to(device)
    convert_conv2d_weight_memory_format(module, torch.channels_last)


# --- the index -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class IndexFacts:
    """What a run needs to know of its index beside the tiles."""

    fingerprint: str
    engine: str
    train: tuple[str, ...]
    val: tuple[str, ...]


def subset(index: Path, network: str, part: str) -> list[dict[str, str]]:
    """Return tile, case, dataset and score of a network's part, in the order of the index."""
    column = f"{network}_split"
    names = ["tile", "case", "dataset", "score"]
    table = tables.read(index, tables.index(()), [*names, column])
    return [{name: row[name] for name in names} for row in table.to_pylist() if row[column] == part]


def index_metadata(index: Path) -> dict[str, str]:
    """Return fingerprint and mask_target of an index.

    Raises:
        TrainingError: when the file is no index.
    """
    try:
        metadata = tables.read_metadata(index)
    except (FileNotFoundError, pq.lib.ArrowInvalid) as error:
        raise TrainingError(f"{index}: not an index ({error}); run the stage index") from error
    lacking = [key for key in ("fingerprint", "mask_target") if key not in metadata]
    if lacking:
        raise TrainingError(
            f"{index}: its metadata lacks {', '.join(lacking)}; run the stage index again"
        )
    return metadata


def index_facts(index: Path, network: str) -> IndexFacts:
    """Read fingerprint, mask engine and subsets of an index.

    Raises:
        TrainingError: when the training or the validation subset is empty.
    """
    metadata = index_metadata(index)
    parts = {}
    for part, purpose in (("train", "training"), ("val", "validation")):
        parts[part] = tuple(row["tile"] for row in subset(index, network, part))
        if not parts[part]:
            raise TrainingError(
                f"index: no tiles for {purpose} of {network}; at least one is needed; read the "
                f"funnel in the report, then loosen filter, add pairs, or check "
                f"index.{network}_datasets, index.val_fraction and the sheet's splits"
            )
    return IndexFacts(
        metadata["fingerprint"], metadata["mask_target"], parts["train"], parts["val"]
    )


def run_digest(options: Options, facts: IndexFacts, **more: str) -> str:
    """Return a short digest of everything that determines a run: the name of its checkpoints."""
    values = dataclasses.asdict(options)
    for name in UNDIGESTED:
        values.pop(name, None)
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


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        TrainingError: when it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise TrainingError(
            f"{path}: cannot be read ({error.strerror}); run the stage that makes it"
        ) from error


# --- tiles in their order ------------------------------------------------------------------------


def training_batches(tiles: TileDataset, order: Order, workers: int) -> DataLoader[dict[str, Any]]:
    """Return the batches of a run as tensors; its processes start once, not once per epoch."""
    return DataLoader(
        tiles,
        batch_sampler=order,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        # Its own generator, so that the loader draws nothing from the run's.
        generator=torch.Generator(),
    )


def validation_batches(
    tiles: TileDataset, batch_size: int, workers: int
) -> DataLoader[dict[str, Any]]:
    """Return all tiles once, in order, as they are seen in validation; iterate it every epoch."""
    keys = [(0, position) for position in range(len(tiles))]
    batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
    workers = min(workers, 1)
    return DataLoader(
        tiles,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )


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

    def add(self, losses: Mapping[str, Tensor], tiles: Sequence[str]) -> None:
        """Count one step's losses, each a mean over the tiles of the step.

        Raises:
            TrainingError: when a loss is not finite; it names the tiles.
        """
        values = torch.stack([loss.detach().float() for loss in losses.values()]).tolist()
        for name, value in zip(losses, values, strict=True):
            if not math.isfinite(value):
                raise TrainingError(
                    f"epoch {self.epoch}, step {self.step + 1}: loss {name} is {value} on the "
                    f"tiles {', '.join(tiles)}; look at them in the report, or lower learning_rate"
                )
            self.sums[name] = self.sums.get(name, 0.0) + value * len(tiles)
        self.seen += len(tiles)
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

    def rows(self) -> list[dict[str, Any]]:
        """Return the history as rows of `hemera.tables.HISTORY`."""
        names = tables.HISTORY.names
        return [dict(zip(names, entry, strict=True)) for entry in self.history]


@dataclasses.dataclass
class Run:
    """The tensors of a run under names, and the folder of its checkpoints.

    `best` holds the weights of the best epoch so far, of the module named by `kept`.
    """

    folder: Path
    modules: dict[str, nn.Module]
    optimisers: dict[str, torch.optim.Optimizer]
    kept: str
    minutes: float
    progress: Progress = dataclasses.field(default_factory=Progress)
    best: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    _saved_at: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def path(self) -> Path:
        """Where the checkpoint lies."""
        return self.folder / "checkpoint.pt"

    def save(self, *, force: bool = False) -> None:
        """Write a checkpoint in one step, when it is time or `force` says so."""
        if not force and time.monotonic() - self._saved_at < self.minutes * 60:
            return
        state = {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimisers": {name: each.state_dict() for name, each in self.optimisers.items()},
            "progress": dataclasses.asdict(self.progress),
            "best": self.best,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        with files.replacing(self.path) as temporary:
            torch.save(state, temporary)
        self._saved_at = time.monotonic()

    def resume(self) -> bool:
        """Go back to the checkpoint, if there is one.

        Raises:
            TrainingError: when it is damaged or of other networks.
        """
        if not self.path.exists():
            return False
        state = read_weights(self.path)
        try:
            for name, module in self.modules.items():
                load_into(module, state["modules"][name], f"{self.path} ({name})")
            for name, optimiser in self.optimisers.items():
                optimiser.load_state_dict(state["optimisers"][name])
            progress = dict(state["progress"])
            progress["history"] = [tuple(entry) for entry in progress["history"]]
            self.progress = Progress(**progress)
            self.best = state["best"]
            torch.set_rng_state(state["random"])
            if state["random_cuda"] and torch.cuda.is_available():
                torch.cuda.set_rng_state_all(state["random_cuda"])
        except (KeyError, TypeError, ValueError) as error:
            raise TrainingError(
                f"{self.path}: not a checkpoint of this run ({error}); delete it to begin again"
            ) from error
        log.info("resumed at epoch %d, step %d", self.progress.epoch, self.progress.step)
        return True

    def judge(self, value: float) -> None:
        """Keep the weights of the epoch just run when `value` is the highest so far."""
        if value > self.progress.best_value:
            self.progress.best_value = value
            self.progress.best_epoch = self.progress.epoch
            self.best = {
                name: tensor.detach().cpu().clone()
                for name, tensor in self.modules[self.kept].state_dict().items()
            }


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
        f"{part} {name} {value:.4g}" for number, part, name, value in progress.history
        if number == epoch
    )  # fmt: skip
    left = (time.monotonic() - started) / (epoch - first + 1) * (epochs - epoch)
    log.info("epoch %d/%d: %s; about %.0f s left", epoch, epochs, shown, left)


# --- weights on disk -----------------------------------------------------------------------------


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write weights as safetensors, in one step."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with files.replacing(path) as temporary:
        safetensors.torch.save_file(state, temporary, metadata={"format": "pt"})


def read_weights(path: Path) -> dict[str, Any]:
    """Read a safetensors file, or a torch file from which nothing but tensors and numbers is read.

    Raises:
        TrainingError: when it cannot be read, is damaged, or would run code.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state
    except FileNotFoundError:
        raise TrainingError(f"{path}: no such file; run the stage that makes it") from None
    except (
        safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError,
    ) as error:  # fmt: skip
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TrainingError(
            f"{path}: damaged, or not plain weights ({reason}); delete it and make it again"
        ) from error


def load_into(module: nn.Module, weights: Mapping[str, Tensor], subject: str) -> None:
    """Load weights that must fit exactly.

    Raises:
        TrainingError: naming the layers that differ.
    """
    own = module.state_dict()
    faults = [f"{name} is missing" for name in own if name not in weights]
    faults += [f"{name} is not known" for name in weights if name not in own]
    faults += [
        f"{name} is {tuple(weights[name].shape)}, wanted {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise TrainingError(
            f"{subject}: does not fit the network: {', '.join(faults[:5])}{more}; "
            "use the options it was made with"
        )
    module.load_state_dict(dict(weights))


def versions() -> dict[str, str]:
    """Return the versions of what computed the weights."""
    packages = ("torch", "torchvision", "numpy", "safetensors")
    try:
        own = importlib.metadata.version("hemera")
    except importlib.metadata.PackageNotFoundError:
        own = "not installed"
    return {
        "hemera": own,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


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
        "options": dataclasses.asdict(options),
        "options_version": options.version,
        "seed": dataclasses.asdict(options)["seed"],
        "index_fingerprint": facts.fingerprint,
        "mask_engine": facts.engine,
        "tiles": {"train": len(facts.train), "val": len(facts.val)},
        "epoch": epoch,
        "best_epoch": run.progress.best_epoch,
        "versions": versions(),
    }


def check_index(network: str, described: Mapping[str, Any], fingerprint: str) -> None:
    """Hold that a network was trained on this index: another one may hold its test tiles.

    Raises:
        TrainingError: naming both indexes.
    """
    own = str(described.get("index_fingerprint"))
    if own != fingerprint:
        raise TrainingError(
            f"{network}: trained on the index {own[:12]}, and this one is {fingerprint[:12]}, so "
            "its test tiles may be training tiles; train on this index, or name the other one"
        )


def write_metadata(path: Path, metadata: Mapping[str, Any]) -> None:
    """Write the JSON beside the weights, in one step."""
    files.write_text(path, json.dumps(metadata, indent=2, sort_keys=True) + "\n")


def read_metadata(path: Path, network: str) -> dict[str, Any]:
    """Read the JSON beside the weights of `network`.

    Raises:
        TrainingError: when it is missing, damaged, or of another network.
    """
    try:
        metadata = json.loads(path.read_text())
    except FileNotFoundError:
        raise TrainingError(f"{path}: no such file; it lies beside the weights") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path}: not JSON ({error}); train again") from error
    if not isinstance(metadata, dict) or metadata.get("network") != network:
        raise TrainingError(f"{path}: does not describe a network for {network}; name its own file")
    return metadata


def load_generation(weights: Path, metadata: Path) -> tuple[GenerationNet, dict[str, Any]]:
    """Return a trained GenerationNet in evaluation mode, and its metadata."""
    described = read_metadata(metadata, "generation")
    net = GenerationNet(**_model(described, metadata))
    load_into(net, read_weights(weights), str(weights))
    return net.eval(), described


def load_segmentation(weights: Path, metadata: Path) -> tuple[SegmentationNet, dict[str, Any]]:
    """Return a trained SegmentationNet, its frozen branch included, and its metadata."""
    described = read_metadata(metadata, "segmentation")
    model = _model(described, metadata)
    branch = model.pop("generation", None)
    net = SegmentationNet(None if branch is None else GenerationNet(**branch), **model)
    load_into(net, read_weights(weights), str(weights))
    return net.eval(), described


def _model(described: Mapping[str, Any], path: Path) -> dict[str, Any]:
    model = described.get("model")
    if not isinstance(model, Mapping):
        raise TrainingError(f"{path}: does not say how its network is built; train again")
    return dict(model)


def mean_of(values: Iterable[float]) -> float:
    """Return the mean of the finite values; 0 where there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else 0.0
