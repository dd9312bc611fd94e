"""What tests of both training stages share: paths, histories, interruptions, the command line."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from hemera import tables
from hemera.config.base import flags
from hemera.training.checkpoint import TrainingState
from tests.command_line import words


def paths(folder: Path, network: str = "generator") -> dict[str, Path]:
    """Return the outputs of a training stage by the names of its arguments."""
    return {
        "checkpoints": folder / "checkpoints",
        network: folder / f"{network}.safetensors",
        "metadata": folder / "metadata.json",
        "history": folder / "history.parquet",
    }


def history(folder: Path) -> dict[tuple[int, str, str], float]:
    """Return the values of a history by (epoch, part, quantity)."""
    rows = tables.read(folder / "history.parquet", tables.HISTORY).to_pylist()
    return {(row["epoch"], row["part"], row["quantity"]): row["value"] for row in rows}


def same_bytes(one: Path, other: Path) -> bool:
    """Compare weights, metadata and history of two runs."""
    names = sorted(path.name for path in one.iterdir() if path.is_file())
    assert len(names) == 3
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


@contextlib.contextmanager
def interrupted(epoch: int, step: int):
    """Interrupt a run after its checkpoint of a step."""
    save = TrainingState.save

    def save_and_stop(state):
        save(state)
        if (state.progress.epoch, state.progress.step) == (epoch, step):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingState, "save", save_and_stop)
        yield


def run_command(stage: str, places: dict[str, Path], options: object) -> None:
    """Run a stage's command in a process of its own."""
    code = "import sys; from hemera.__main__ import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, stage, *words(places), *flags(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
