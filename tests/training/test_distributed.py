import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hemera import tables
from hemera.config import TrainGenerationOptions
from hemera.errors import TrainingError
from hemera.stages import train_generation
from hemera.training.distributed import process_group
from tests.command_line import words
from tests.small_index import write_index
from tests.small_training import paths

ROOT = Path(__file__).parents[2]

EXCHANGE = """
import sys
import torch
from hemera.training.distributed import process_group

with process_group(2, torch.device("cpu")) as ranks:
    net = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.BatchNorm1d(1))
    for number, parameter in enumerate(net.parameters()):
        parameter.grad = torch.full_like(parameter, 10.0 * number + ranks.rank)
    net[0].bias.grad = None
    net[1].running_mean.fill_(4.0 * ranks.rank)
    frozen = torch.nn.BatchNorm1d(1).eval()
    frozen.running_mean.fill_(4.0 * ranks.rank)
    ranks.average_statistics(frozen)
    ranks.average_gradients(net)
    ranks.average_statistics(net)
    found = [
        ranks.count, ranks.first == (ranks.rank == 0),
        net[0].weight.grad.tolist(), net[0].bias.grad, net[1].bias.grad.tolist(),
        net[1].running_mean.item(), int(net[1].num_batches_tracked),
        frozen.running_mean.item() == 4.0 * ranks.rank,
        ranks.average(torch.tensor([1.0, ranks.rank])).tolist(),
        ranks.gather([f"{ranks.rank}a", f"{ranks.rank}b"]),
        ranks.any(ranks.rank == 1), ranks.any(False),
    ]
    open(f"{sys.argv[1]}/{ranks.rank}", "w").write(repr(found))
"""


def torchrun(*command: str) -> subprocess.CompletedProcess[str]:
    torchrun = Path(sys.executable).with_name("torchrun")
    start = [str(torchrun), "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*start, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_processes_exchange_means_and_lists(tmp_path):
    script = tmp_path / "exchange.py"
    script.write_text(EXCHANGE)
    done = torchrun(str(script), str(tmp_path))
    assert done.returncode == 0, done.stderr
    expected = [
        2, True, [[0.5, 0.5]], None, [30.5], 2.0, 0, True, [1.0, 0.5], ["0a", "0b", "1a", "1b"],
        True, False,
    ]  # fmt: skip
    for rank in "01":
        assert (tmp_path / rank).read_text() == repr(expected)


def test_another_number_of_processes_is_named_with_the_command():
    with (
        pytest.raises(
            TrainingError, match=r"gpus: 2, but processes started: 1; .*torchrun --standalone"
        ),
        process_group(2, torch.device("cpu")),
    ):
        pass


def options_of(**changes):
    """Without batch statistics, and with plain steps, two processes can do no other than one."""
    return dict(
        network="unet_32", base_width=4, discriminator_width=4, crop_px=64, epochs=2,
        decay_from_epoch=1, batch_size=2, norm="instance", device="cpu", torch_threads=1,
        workers=0, checkpoint_minutes=1e-9, ema=0.5, clip_norm=0.5,
    ) | changes  # fmt: skip


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path):
    index = write_index(tmp_path / "results", train=4, val=3)
    one, two = tmp_path / "one", tmp_path / "two"
    train_generation.run(index=index, options=TrainGenerationOptions(**options_of()), **paths(one))
    two.mkdir()
    places = words({"index": index} | paths(two))
    hemera = str(Path(sys.executable).with_name("hemera"))
    done = torchrun("--no-python", hemera, "train_generation", *places, *words(options_of(gpus=2)))
    assert done.returncode == 0, done.stderr
    histories = [
        tables.read(folder / "history.parquet", tables.HISTORY).to_pylist() for folder in (one, two)
    ]
    keys = [[(row["epoch"], row["part"], row["quantity"]) for row in rows] for rows in histories]
    assert keys[0] == keys[1]
    values = [[row["value"] for row in rows] for rows in histories]
    assert values[1] == pytest.approx(values[0], rel=5e-3)
    assert len(list(two.glob("checkpoints/*/samples/*.png"))) == 2, "one process writes"


STOPPED = """
import sys
from hemera.__main__ import main
from hemera.training.checkpoint import TrainingState

save = TrainingState.save


def save_and_stop(state):
    save(state)
    if (state.progress.epoch, state.progress.step) == (1, 3):
        sys.exit(9)


TrainingState.save = save_and_stop
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_resume_to_the_same_bits(tmp_path):
    """Stopped after an epoch's last step: the batch norms of each process saw other tiles."""
    index = write_index(tmp_path / "results", train=6, val=2)
    options = options_of(gpus=2, batch_size=2, norm="batch", epochs=2)
    hemera = str(Path(sys.executable).with_name("hemera"))
    script = tmp_path / "stopped.py"
    script.write_text(STOPPED)

    def start(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
        folder.mkdir(exist_ok=True)
        places = words({"index": index} | paths(folder))
        return torchrun(*command, "train_generation", *places, *words(options))

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(whole, "--no-python", hemera).returncode == 0
    assert start(broken, str(script)).returncode != 0
    assert list(broken.glob("checkpoints/*/checkpoint.pt"))
    assert not list(broken.glob("*.safetensors"))
    done = start(broken, "--no-python", hemera)
    assert done.returncode == 0, done.stderr
    for name in ("generator.safetensors", "metadata.json"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
