import dataclasses
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from torch import nn

from hemera.config import TrainGenerationOptions
from hemera.dataset.index import TrainingTiles
from hemera.errors import ShardError, TrainingError
from hemera.networks import storage
from hemera.stages import train_generation
from hemera.training.checkpoint import Progress, TrainingState, run_digest
from tests.small_index import write_index
from tests.small_networks import cpu_compute
from tests.small_training import paths

ROOT = Path(__file__).parents[2]

OPTIONS = TrainGenerationOptions(
    network="unet_32", base_width=4, discriminator_width=4, crop_px=64, epochs=3,
    decay_from_epoch=1, device="cpu", torch_threads=1, workers=0, checkpoint_minutes=1e-9,
)  # fmt: skip

TILES = TrainingTiles("f", "stain", ("a", "b"), ("c",), 0.5, 0.5, 512)


def make_state(folder: Path, width: int = 3, **changes: float) -> TrainingState:
    net = nn.Sequential(nn.Conv2d(2, width, 1), nn.BatchNorm2d(width))
    optimisers = {"net": torch.optim.Adam(net.parameters())}
    options = OPTIONS.replace(checkpoint_minutes=60, **changes)
    return TrainingState(folder, options, TILES, cpu_compute(), {"net": net}, optimisers, {})


def test_progress_weighs_losses_by_tiles():
    progress = Progress()
    progress.add({"total": 1.0}, 2)
    progress.add({"total": 4.0}, 1)
    assert progress.step == 2
    values = progress.close_epoch(0.1, {"f1": 0.5})
    assert progress.history == [
        (1, "train", "total", 2.0), (1, "train", "learning_rate", 0.1), (1, "val", "f1", 0.5),
    ]  # fmt: skip
    assert values == {"train/total": 2.0, "train/learning_rate": 0.1, "val/f1": 0.5}
    assert (progress.epoch, progress.step, progress.seen, progress.sums) == (2, 0, 0, {})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_the_tiles_of_its_step(value, tmp_path):
    """Losses are read some steps later; the step that is named is the one that failed."""
    state = make_state(tmp_path)
    state.progress.epoch, state.progress.step = 3, 4
    good = {"adversarial": torch.tensor(1.0), "dice": torch.tensor(0.5)}
    state.add_step(good, ["x", "y"])
    state.add_step(good | {"dice": torch.tensor(value)}, ["a", "b"])
    state.add_step(good, ["x", "y"])
    fault = r"epoch 3, step 6: loss dice is \w+ on the tiles a, b;"
    with pytest.raises(TrainingError, match=fault):
        state.settle(9, threading.Event())


def test_losses_are_read_at_fixed_steps_and_before_a_checkpoint(tmp_path):
    state, stop = make_state(tmp_path), threading.Event()
    due = []
    for _ in range(40):
        state.add_step({"total": torch.tensor(1.0)}, ["x"])
        due.append(state.must_settle(40, stop))
        if due[-1]:
            assert state.settle(40, stop) == {"total": 1.0}
    assert [step for step, now in enumerate(due, 1) if now] == [32, 40]
    assert not state.path.exists()
    state.progress.close_epoch(0.1, {})
    state.add_step({"total": torch.tensor(1.0)}, ["x"])
    stop.set()
    assert state.must_settle(40, stop)
    with pytest.raises(TrainingError, match="stopped at epoch 2, step 1 of 40"):
        state.settle(40, stop)
    assert state.path.exists()


def test_the_best_epoch_is_kept_and_survives_a_checkpoint(tmp_path):
    state = make_state(tmp_path)
    weight = state.modules["net"][0].weight
    for epoch, value in enumerate((0.2, 0.7, 0.5), 1):
        nn.init.constant_(weight, epoch)
        state.end_epoch(0.1, {"f1": value}, value)
        assert (storage.read_weights(tmp_path / "last.safetensors")["0.weight"] == epoch).all()
    assert state.progress.best_epoch == 2
    assert (storage.read_weights(tmp_path / "best.safetensors")["0.weight"] == 2).all()
    state.save()
    other = make_state(tmp_path)
    other.resume()
    assert (other.best["0.weight"] == 2).all()
    assert (other.modules["net"][0].weight == 3).all()
    assert other.progress == state.progress


def test_the_moving_average_of_weights_is_what_is_written(tmp_path):
    """Weights w of each step and their average E, by hand: E becomes d E + (1 - d) w."""
    state = make_state(tmp_path, ema=0.25)
    net, average = state.modules["net"], state.result
    expected = None
    # d is (1 + n) / (10 + n) after n steps, at most 0.25: 2/11, 3/12, then 0.25.
    for n, value in enumerate((1.0, 5.0, -3.0, 8.0)):
        nn.init.constant_(net[0].weight, value)
        net[1].running_mean.fill_(2 * value)
        net[1].num_batches_tracked.fill_(n)
        state.add_step({"total": torch.tensor(0.0)}, ["x"])
        decay = (0, 2 / 11, 0.25, 0.25)[n]
        expected = value if expected is None else decay * expected + (1 - decay) * value
        assert average[0].weight.flatten().tolist() == pytest.approx([expected] * 6)
        assert average[1].running_mean.tolist() == pytest.approx([2 * expected] * 3)
        assert int(average[1].num_batches_tracked) == n
        if n == 1:
            # A resumed run continues with the same average.
            state.settle(9, threading.Event())
            state.save()
            state = make_state(tmp_path, ema=0.25)
            state.resume()
            net, average = state.modules["net"], state.result
    assert net[0].weight[0, 0].item() == 8
    state.end_epoch(0.1, {"f1": 0.5}, 0.5)
    for name in ("last", "best"):
        written = storage.read_weights(tmp_path / f"{name}.safetensors")
        assert written["0.weight"][0, 0].item() == pytest.approx(expected)
        assert len(written) == len(net.state_dict())


def test_a_checkpoint_that_does_not_fit_is_an_error_that_names_it(tmp_path):
    make_state(tmp_path).save()
    fault = r"does not fit the network .*size mismatch for 0.weight"
    with pytest.raises(TrainingError, match=fault):
        make_state(tmp_path, 5).resume()
    torch.save({"modules": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(TrainingError, match=r"checkpoint.pt: not a checkpoint .*; delete it"):
        make_state(tmp_path).resume()


def test_checkpoints_are_named_by_what_determines_the_run():
    own = run_digest(OPTIONS, TILES)
    same = {"workers": 3, "checkpoint_minutes": 4, "select": "best"}
    assert run_digest(OPTIONS.replace(**same), TILES) == own
    if not torch.cuda.is_available():
        assert run_digest(OPTIONS.replace(device="auto"), TILES) == own
    others = [
        run_digest(OPTIONS.replace(seed=1), TILES),
        run_digest(OPTIONS, dataclasses.replace(TILES, fingerprint="g")),
        run_digest(OPTIONS, dataclasses.replace(TILES, train=("a", "c"))),
        run_digest(OPTIONS, TILES, generator="x"),
    ]
    assert len({own, *others}) == 5


KILLED = """
import os, signal, sys
from pathlib import Path
from hemera.stages import train_generation
from hemera.training.checkpoint import TrainingState
from tests.small_training import paths
from tests.training.test_checkpoint import OPTIONS

save = TrainingState.save


def save_and_die(state):
    # Killed two steps after the last checkpoint, in the middle of the second of three epochs.
    if (state.progress.epoch, state.progress.step) == (2, 3):
        os.kill(os.getpid(), signal.SIGKILL)
    if (state.progress.epoch, state.progress.step) != (2, 2):
        save(state)


TrainingState.save = save_and_die
train_generation.run(index=Path(sys.argv[1]), options=OPTIONS, **paths(Path(sys.argv[2])))
"""


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    index = write_index(tmp_path / "results", train=7)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_generation.run(index=index, options=OPTIONS, **paths(whole))

    command = [sys.executable, "-c", KILLED, str(index), str(broken)]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (broken / "generator.safetensors").exists()
    (checkpoint,) = broken.glob("checkpoints/*/checkpoint.pt")
    progress = storage.read_weights(checkpoint)["progress"]
    assert (progress["epoch"], progress["step"]) == (2, 1)

    train_generation.run(index=index, options=OPTIONS, **paths(broken))
    for name in ("generator.safetensors", "metadata.json"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()
    first, second = (pq.read_table(folder / "history.parquet") for folder in (whole, broken))
    assert first.equals(second)
    weights = safetensors.torch.load_file(whole / "generator.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


TERMINATED = """
import sys, time
from pathlib import Path
from hemera.stages import train_generation
from tests.small_training import paths
from tests.training.test_checkpoint import OPTIONS

step = train_generation.train_step


def slow(*arguments):
    print("step", flush=True)
    time.sleep(0.3)
    return step(*arguments)


train_generation.train_step = slow
options = OPTIONS.replace(workers=2, checkpoint_minutes=60, epochs=30)
train_generation.run(index=Path(sys.argv[1]), options=options, **paths(Path(sys.argv[2])))
"""


@pytest.mark.slow
def test_sigterm_to_every_process_of_a_job_leaves_a_checkpoint(tmp_path):
    """A cluster signals the worker processes too."""
    index = write_index(tmp_path / "results", train=7)
    job = subprocess.Popen(
        [sys.executable, "-c", TERMINATED, str(index), str(tmp_path)],
        cwd=ROOT, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    for _ in range(3):
        assert job.stdout.readline() == "step\n"
    os.killpg(job.pid, signal.SIGTERM)
    _, printed = job.communicate(timeout=60)
    assert "stopped at epoch 1" in printed.splitlines()[-1]
    (checkpoint,) = tmp_path.glob("checkpoints/*/checkpoint.pt")
    assert storage.read_weights(checkpoint)["progress"]["step"] >= 3


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train_generation", "train_segmentation"])
def test_the_log_of_a_terminated_job_has_the_last_message(tmp_path, stage):
    """As the rule pipes it; all processes of the job get the signal."""
    rule = (ROOT / "workflow" / "rules" / f"{stage}.smk").read_text()
    (pipe,) = re.findall(r'^ +"( 2>&1 .*)"$', rule, re.MULTILINE)
    index, log = write_index(tmp_path / "results", train=7), tmp_path / "log"
    (tmp_path / "job.py").write_text(TERMINATED)
    words = shlex.join([sys.executable, *map(str, (tmp_path / "job.py", index, tmp_path))])
    job = subprocess.Popen(
        ["bash", "-c", f"set -euo pipefail; {words}{pipe.replace('{log:q}', str(log))}"],
        cwd=ROOT, start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )  # fmt: skip
    while not log.exists() or log.read_text().count("step\n") < 3:
        time.sleep(0.1)
        assert job.poll() is None
    os.killpg(job.pid, signal.SIGTERM)
    job.communicate(timeout=60)
    assert "the checkpoint is written: run the stage again to resume" in log.read_text()


def test_a_validation_without_a_number_ends_the_run(tmp_path, monkeypatch):
    index = write_index(tmp_path / "results")
    lost = {"reconstruction": float("nan"), "psnr_db": 20.0, "ssim": 0.5,
            "brown_concordance": 0.1}  # fmt: skip
    monkeypatch.setattr(train_generation, "validate", lambda *_: lost)
    with pytest.raises(TrainingError, match=r"epoch 1: .* not a number for reconstruction; lower"):
        train_generation.run(index=index, options=OPTIONS, **paths(tmp_path))
    assert not (tmp_path / "generator.safetensors").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_process_is_one_line(tmp_path, workers):
    index = write_index(tmp_path / "results", train=7)
    shard = tmp_path / "results" / "tile" / "unit.tar"
    shard.write_bytes(shard.read_bytes()[:4000])
    options = OPTIONS.replace(workers=workers, dice_threshold=0.2)
    with pytest.raises(ShardError) as caught:
        train_generation.run(index=index, options=options, **paths(tmp_path))
    assert len(str(caught.value).splitlines()) == 1
    assert "unit.tar" in str(caught.value)
    assert "hemera.errors" not in str(caught.value)
