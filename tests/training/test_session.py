import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from torch import nn

from hemera import tables
from hemera.config import TrainGenerationOptions
from hemera.dataset.torch_dataset import Order, TileDataset
from hemera.errors import ShardError, TrainingError
from hemera.networks import storage
from hemera.stages import train_generation
from hemera.training import session
from tests.small_index import write_index

OPTIONS = TrainGenerationOptions(
    network="unet_32", base_width=4, discriminator_width=4, crop_px=64, epochs=3,
    decay_from_epoch=1, device="cpu", torch_threads=1, workers=0, checkpoint_minutes=1e-9,
)  # fmt: skip


def paths(folder: Path) -> dict[str, Path]:
    return {
        "checkpoints": folder / "checkpoints",
        "generator": folder / "generator.safetensors",
        "metadata": folder / "metadata.json",
        "history": folder / "history.parquet",
    }


def test_batches_do_not_depend_on_the_number_of_workers(tmp_path):
    """Nor do they draw anything from the generator of the run."""
    index = write_index(tmp_path, train=5)
    tiles = TileDataset(
        index, network="generation", part="train", images=("he", "weight"), crop_px=64,
        flips=(0, 1), seed=3,
    )  # fmt: skip

    def run(workers):
        order = Order(5, 2, seed=3, epochs=2)
        batches = session.training_batches(tiles, order, workers)
        return [(batch["tile"], batch["he"], batch["weight"]) for batch in batches]

    torch.manual_seed(1)
    none = run(0)
    state = torch.get_rng_state()
    two = run(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert [batch[0] for batch in none] == [batch[0] for batch in two]
    for first, second in zip(none, two, strict=True):
        assert torch.equal(first[1], second[1])
        assert torch.equal(first[2], second[2])


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_sees_all_tiles_once_in_order_every_epoch(tmp_path, workers):
    index = write_index(tmp_path, val=5)
    tiles = TileDataset(
        index, network="segmentation", part="val", images=["he"], crop_px=64, flips=(0, 1), seed=3
    )
    batches = session.validation_batches(tiles, 2, workers)
    for _ in range(2):
        seen = [(tile, he) for batch in batches for tile, he in zip(*batch.values(), strict=True)]
        assert [tile for tile, _ in seen] == list(tiles.tiles)
        assert all(torch.equal(he, tiles[0, i]["he"]) for i, (_, he) in enumerate(seen))


def test_a_session_seeds_and_puts_everything_back():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    threads = torch.get_num_threads()
    drawn = []
    for seed in (5, 5, 6):
        with session.session(seed=seed, threads=1, device="cpu") as device:
            assert device.type == "cpu"
            assert torch.get_num_threads() == 1
            assert torch.are_deterministic_algorithms_enabled()
            drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named():
    with pytest.raises(TrainingError, match=r"torch sees no GPU; set device: auto or cpu"):
        session.find_device("cuda")
    assert session.find_device("auto").type == "cpu"


def test_progress_weighs_losses_by_tiles_and_writes_history():
    progress = session.Progress()
    progress.add({"total": 1.0}, 2)
    progress.add({"total": 4.0}, 1)
    assert progress.step == 2
    progress.close_epoch({"learning_rate": 0.1}, {"f1": 0.5})
    assert progress.rows() == [
        {"epoch": 1, "part": "train", "quantity": "total", "value": 2.0},
        {"epoch": 1, "part": "train", "quantity": "learning_rate", "value": 0.1},
        {"epoch": 1, "part": "val", "quantity": "f1", "value": 0.5},
    ]
    assert progress.of(1) == {"train/total": 2.0, "train/learning_rate": 0.1, "val/f1": 0.5}
    assert (progress.epoch, progress.step, progress.seen, progress.sums) == (2, 0, 0, {})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_the_tiles_of_its_step(value, tmp_path):
    """Losses are read some steps later; the step that is named is the one that failed."""
    run = make_run(tmp_path)
    run.progress.epoch, run.progress.step = 3, 4
    good = ({"adversarial": torch.tensor(1.0), "dice": torch.tensor(0.5)}, ["x", "y"])
    bad = ({"adversarial": torch.tensor(1.0), "dice": torch.tensor(value)}, ["a", "b"])
    with pytest.raises(
        TrainingError, match=r"epoch 3, step 6: loss dice is \w+ on the tiles a, b;"
    ):
        run.count([good, bad, good])


def make_run(folder: Path, width: int = 3) -> session.Run:
    net = nn.Sequential(nn.Conv2d(2, width, 1), nn.BatchNorm2d(width))
    return session.Run(
        folder, {"net": net}, {"net": torch.optim.Adam(net.parameters())}, "net", minutes=60
    )


def test_the_best_epoch_is_kept_and_survives_a_checkpoint(tmp_path):
    run = make_run(tmp_path)
    weight = run.modules["net"][0].weight
    for epoch, value in enumerate((0.2, 0.7, 0.5), 1):
        nn.init.constant_(weight, epoch)
        run.judge(value)
        run.progress.close_epoch({}, {})
    assert run.progress.best_epoch == 2
    run.save()
    other = make_run(tmp_path)
    assert other.resume()
    assert (other.best["0.weight"] == 2).all()
    assert (other.modules["net"][0].weight == 3).all()
    assert other.progress == run.progress
    assert not make_run(tmp_path / "elsewhere").resume()


def test_a_checkpoint_of_another_network_names_the_layers(tmp_path):
    make_run(tmp_path).save()
    with pytest.raises(TrainingError, match=r"0.weight is \(3, 2, 1, 1\), wanted \(5, 2, 1, 1\)"):
        make_run(tmp_path, 5).resume()


def test_an_empty_subset_says_so_with_a_remedy(tmp_path):
    index = write_index(tmp_path, train=0)
    with pytest.raises(TrainingError, match=r"index: no tiles for training of generation;.*loosen"):
        session.index_facts(index, "generation")
    index = write_index(tmp_path, val=0)
    with pytest.raises(TrainingError, match=r"no tiles for validation of segmentation"):
        session.index_facts(index, "segmentation")


def test_a_file_that_is_no_index_is_named(tmp_path):
    other = tmp_path / "other.parquet"
    tables.write(other, [], tables.HISTORY)
    with pytest.raises(TrainingError, match=r"other.parquet: its metadata lacks fingerprint"):
        session.index_facts(other, "generation")


@pytest.mark.parametrize("content", [None, b"", b"PAR1 cut off"])
def test_an_index_that_is_missing_or_damaged_is_named(tmp_path, content):
    index = tmp_path / "index.parquet"
    if content is not None:
        index.write_bytes(content)
    with pytest.raises(TrainingError, match=r"index.parquet: not an index .*run the stage index"):
        session.index_facts(index, "generation")


def test_checkpoints_are_named_by_what_determines_the_run():
    facts = session.IndexFacts("f", "stain", ("a", "b"), ("c",), 0.5, 0.5, 512)
    own = session.run_digest(OPTIONS, facts)
    same = OPTIONS.replace(workers=3, checkpoint_minutes=4, sample_tiles=0, select="best")
    assert session.run_digest(same, facts) == own
    others = [
        session.run_digest(OPTIONS.replace(seed=1), facts),
        session.run_digest(OPTIONS, dataclasses.replace(facts, fingerprint="g")),
        session.run_digest(OPTIONS, dataclasses.replace(facts, train=("a", "c"))),
        session.run_digest(OPTIONS, facts, generator="x"),
    ]
    assert len({own, *others}) == 5


SCRIPT = """
import os, signal, sys
from pathlib import Path
from hemera.training import session
from hemera.stages import train_generation
from tests.training.test_session import OPTIONS, paths

save = training.Run.save


def save_and_die(run):
    # Killed two steps after the last checkpoint, in the middle of the second of three epochs.
    if (run.progress.epoch, run.progress.step) == (2, 3):
        os.kill(os.getpid(), signal.SIGKILL)
    if (run.progress.epoch, run.progress.step) != (2, 2):
        save(run)


training.Run.save = save_and_die
train_generation.run(index=Path(sys.argv[1]), options=OPTIONS, **paths(Path(sys.argv[2])))
"""


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    index = write_index(tmp_path / "results", train=7)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_generation.run(index=index, options=OPTIONS, **paths(whole))

    command = [sys.executable, "-c", SCRIPT, str(index), str(broken)]
    killed = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True)
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_found_is_no_other_than_the_one_that_is_named():
    facts = session.IndexFacts("f", "stain", ("a", "b"), ("c",), 0.5, 0.5, 512)
    found = OPTIONS.replace(device="auto")
    assert session.run_digest(found, facts) == session.run_digest(OPTIONS, facts)


TOLD = """
import sys, time
from pathlib import Path
import dataclasses
from hemera.stages import train_generation
from tests.training.test_session import OPTIONS, paths

step = train_generation.train_step


def slow(*arguments):
    print("step", flush=True)
    time.sleep(0.3)
    return step(*arguments)


train_generation.train_step = slow
options = OPTIONS.replace(workers=2, checkpoint_minutes=60, epochs=30)
train_generation.run(index=Path(sys.argv[1]), options=options, **paths(Path(sys.argv[2])))
"""


def test_a_whole_job_that_is_told_to_end_keeps_what_it_trained(tmp_path):
    """A cluster signals every process of a job, those that read tiles too."""
    index = write_index(tmp_path / "results", train=7)
    job = subprocess.Popen(
        [sys.executable, "-c", TOLD, str(index), str(tmp_path)],
        cwd=Path(__file__).parents[2], start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    for _ in range(3):
        assert job.stdout.readline() == "step\n"
    os.killpg(job.pid, signal.SIGTERM)
    _, said = job.communicate(timeout=60)
    assert "told to end at epoch 1" in said.splitlines()[-1]
    (checkpoint,) = tmp_path.glob("checkpoints/*/checkpoint.pt")
    assert storage.read_weights(checkpoint)["progress"]["step"] >= 3


def test_a_validation_without_a_number_ends_the_run(tmp_path, monkeypatch):
    index = write_index(tmp_path / "results")
    lost = {"reconstruction": float("nan"), "psnr_db": 20.0, "ssim": 0.5}
    monkeypatch.setattr(train_generation, "validate", lambda *_: lost)
    with pytest.raises(TrainingError, match=r"epoch 1: .* no number for reconstruction; lower"):
        train_generation.run(index=index, options=OPTIONS, **paths(tmp_path))
    assert not (tmp_path / "generator.safetensors").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_reading_process_meets_is_one_line(tmp_path, workers):
    index = write_index(tmp_path / "results", train=7)
    shard = tmp_path / "results" / "tile" / "unit.tar"
    shard.write_bytes(shard.read_bytes()[:4000])
    options = OPTIONS.replace(workers=workers, dice_threshold=0.2, sample_tiles=0)
    with pytest.raises(ShardError) as caught:
        train_generation.run(index=index, options=options, **paths(tmp_path))
    assert len(str(caught.value).splitlines()) == 1
    assert "unit.tar" in str(caught.value)
    assert "hemera.errors" not in str(caught.value)


def test_tiles_smaller_than_the_crop_are_refused_before_the_first_step(tmp_path):
    index = write_index(tmp_path / "results")
    with pytest.raises(TrainingError, match=r"pair0_.*: 256 px is smaller than crop_px 512"):
        session.index_facts(index, "generation", crop_px=512)
