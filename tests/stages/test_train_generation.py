import json
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from hemera import tables
from hemera.config import TrainGenerationOptions
from hemera.config.base import flags
from hemera.errors import ConfigError, TrainingError
from hemera.evaluation import metrics
from hemera.networks import losses, storage
from hemera.stages import train_generation
from hemera.stages.train_generation import fit_threshold, rate_factor, run
from hemera.training import session
from hemera.training.checkpoint import TrainingState
from tests.small_index import write_index
from tests.small_networks import cpu_compute

OPTIONS = TrainGenerationOptions(
    network="unet_32", base_width=4, discriminator_width=4, crop_px=64, epochs=2,
    decay_from_epoch=1, learning_rate=2e-3, device="cpu", torch_threads=1, workers=0,
)  # fmt: skip

GOLDEN = {
    2: {
        ("train", "total"): 6.4581,
        ("train", "discriminator"): 0.66725,
        ("train", "l1_1"): 0.076075,
        ("train", "l1_4"): 0.068041,
        ("train", "dice"): 0.4655,
        ("val", "reconstruction"): 5.7898,
        ("val", "psnr_db"): 8.8546,
        ("val", "ssim"): 0.4578,
    }
}
"""What the second epoch gives, by version: processors differ in the last bits, not in these."""


def paths(folder: Path) -> dict[str, Path]:
    return {
        "checkpoints": folder / "checkpoints",
        "generator": folder / "generator.safetensors",
        "metadata": folder / "metadata.json",
        "history": folder / "history.parquet",
    }


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return write_index(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def finished(index, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run(index=index, options=OPTIONS, **paths(folder))
    return folder


def history(folder):
    rows = tables.read(folder / "history.parquet", tables.HISTORY).to_pylist()
    return {(row["epoch"], row["part"], row["quantity"]): row["value"] for row in rows}


def test_golden(finished):
    found = history(finished)
    expected = GOLDEN[TrainGenerationOptions.version]
    assert {key: found[2, *key] for key in expected} == pytest.approx(expected, rel=2e-3), (
        "the same options give other losses: raise TrainGenerationOptions.version"
    )


def test_outputs_describe_themselves(finished, index):
    described = json.loads((finished / "metadata.json").read_text())
    assert described["network"] == "generation"
    assert described["model"] == {
        "generator": "unet_32", "base_width": 4, "norm": "batch", "dropout": False,
    }  # fmt: skip
    assert (described["mpp"], described["mpp_max"], described["tile_px"]) == (0.5, 0.5, 64)
    assert described["index_fingerprint"] == "f" * 64
    assert described["tiles"] == {"train": 3, "val": 2}
    assert described["options"]["weight_map"] == "inside"
    assert described["epoch"] == 2
    assert described["seed"] == OPTIONS.seed
    assert set(described["versions"]) >= {"torch", "hemera", "python"}
    net, _ = storage.load_generation(finished / "generator.safetensors", finished / "metadata.json")
    assert described["parameters"] == sum(p.numel() for p in net.parameters())
    assert not net.training
    found = history(finished)
    assert {key[0] for key in found} == {1, 2}
    assert found[1, "train", "learning_rate"] == 2e-3
    assert found[2, "train", "learning_rate"] == pytest.approx(1e-3)
    total = found[1, "train", "adversarial"] + found[1, "train", "dice"]
    total += sum(
        weight * found[1, "train", f"l1_{level}"]
        for level, weight in enumerate(OPTIONS.l1_weights, 1)
    )
    assert found[1, "train", "total"] == pytest.approx(total, rel=1e-5)


def test_the_network_learns(index, tmp_path):
    options = OPTIONS.replace(epochs=25, decay_from_epoch=15, learning_rate=5e-3)
    run(index=index, options=options, **paths(tmp_path))
    found = history(tmp_path)
    assert found[25, "val", "reconstruction"] < 0.5 * found[1, "val", "reconstruction"]


def test_a_finished_run_is_not_trained_again(index, finished, tmp_path, monkeypatch):
    other = paths(tmp_path) | {"checkpoints": finished / "checkpoints"}

    def refuse(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(train_generation, "train_step", refuse)
    run(index=index, options=OPTIONS, **other)
    for name in ("generator.safetensors", "metadata.json", "history.parquet"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_every_switch_trains(index, tmp_path):
    options = OPTIONS.replace(
        epochs=1, decay_from_epoch=0, weight_map="literal", mask_source="her2_positive",
        weight_adversarial=True, renormalise_mean=True, dice_source="intensity", select="best",
        crop_px=None, workers=1,
    )  # fmt: skip
    run(index=index, options=options, **paths(tmp_path))
    # Falling from the first epoch on, to nothing after the last.
    assert history(tmp_path)[1, "train", "learning_rate"] == 1e-3
    assert json.loads((tmp_path / "metadata.json").read_text())["dice_threshold"] is None
    still = options.replace(lr_step="start")
    run(index=index, options=still, **paths(tmp_path / "still"))
    assert history(tmp_path / "still")[1, "train", "learning_rate"] == 0
    weights = [
        storage.read_weights(folder / "generator.safetensors")["down.0.0.weight"]
        for folder in (tmp_path, tmp_path / "still")
    ]
    moved = (weights[0] - weights[1]).abs().max()
    assert moved > 5e-4, "one trains at its rate, the other at none"


def test_the_adversarial_loss_may_be_weighted_as_well(tmp_path):
    """What the discriminator sees of the target is multiplied by the weights: here by 0."""
    batch = batch_of(2) | {"weight": torch.zeros(2, 1, 64, 96)}
    seen = []
    for weighted in (False, True):
        options = OPTIONS.replace(weight_adversarial=weighted)
        course = course_of(tmp_path, options, rate=0.0)
        course.modules["discriminator"].register_forward_pre_hook(
            lambda module, inputs: seen.append(inputs[0][:, 3:].abs().max().item())
        )
        train_generation.train_step([batch], course, options, 0.2)
    assert min(seen[:3]) > 0
    assert seen[3:] == [0, 0, 0]


def test_an_empty_subset_is_one_line_with_a_remedy(tmp_path):
    index = write_index(tmp_path, train=0)
    with pytest.raises(
        TrainingError, match=r"no tiles for training of generation; .*loosen filter"
    ):
        run(index=index, options=OPTIONS, **paths(tmp_path))
    assert not (tmp_path / "generator.safetensors").exists()


def test_tiles_that_the_network_cannot_halve_are_refused(index, tmp_path):
    options = OPTIONS.replace(network="unet_256", crop_px=None)
    with pytest.raises(TrainingError, match="unet_256: height 128 px is not a multiple of 256"):
        run(index=index, options=options, **paths(tmp_path))


def test_a_loss_that_is_not_finite_stops_with_the_tiles(index, tmp_path):
    options = OPTIONS.replace(learning_rate=1e30, epochs=5)
    with pytest.raises(
        TrainingError, match=r"epoch \d, step \d: loss \w+ is \w+ on the tiles pair"
    ):
        run(index=index, options=options, **paths(tmp_path))


def test_impossible_sizes_are_refused_when_parsed():
    with pytest.raises(ConfigError, match=r"l1_weights: all are 0"):
        TrainGenerationOptions(l1_weights=(0, 0, 0, 0))
    with pytest.raises(ConfigError, match=r"crop_px: 256 is not a multiple of 512"):
        TrainGenerationOptions(crop_px=256)
    with pytest.raises(ConfigError, match=r"discriminator_layers: 5 need crops"):
        TrainGenerationOptions(network="unet_32", crop_px=64, discriminator_layers=5)


@pytest.mark.parametrize(
    ("step", "epoch", "expected"),
    [
        ("end", 1, 1.0), ("end", 50, 1.0), ("end", 51, 50 / 51), ("end", 100, 1 / 51),
        ("start", 49, 1.0), ("start", 50, 50 / 51), ("start", 100, 0.0),
    ],
)  # fmt: skip
def test_learning_rate_of_both_readings(step, epoch, expected):
    options = TrainGenerationOptions(lr_step=step)
    assert rate_factor(epoch, options) == pytest.approx(expected, abs=1e-12)


def test_the_rate_never_falls_when_decay_begins_at_the_end():
    options = TrainGenerationOptions(epochs=7, decay_from_epoch=7)
    assert [rate_factor(epoch, options) for epoch in range(1, 8)] == [1] * 7


class Brown:
    """Two tiles whose left third is stained: densities of 0.6 on 0.03."""

    def __len__(self):
        return 2

    def stored(self, position, images):
        assert images == ["her2"]
        density = np.full((40, 60, 1), 0.03)
        density[:, :20] = 0.6
        rng = np.random.default_rng(position)
        density = density + rng.normal(0, 0.01, density.shape)
        image = 255 * 10 ** (-density * np.array([0.27, 0.57, 0.78]))
        return {"her2": np.round(image).astype(np.uint8)}


def test_the_threshold_parts_stained_from_unstained():
    assert 0.2 < fit_threshold(Brown()) < 0.5


class White:
    """One tile without a stain."""

    def __len__(self):
        return 1

    def stored(self, position, images):
        return {"her2": np.full((8, 12, 3), 255, np.uint8)}


def test_a_flat_tile_gives_the_least_threshold():
    assert fit_threshold(White()) == train_generation.THRESHOLD_MIN


def test_the_discriminator_learns_from_its_own_loss_alone(index, tmp_path):
    torch.manual_seed(0)
    net = train_generation.build_generator("unet_32", 4)
    critic = train_generation.PatchGAN(6, 4, 2)
    course = TrainingState(
        tmp_path, {"generator": net, "discriminator": critic},
        {
            "generator": torch.optim.SGD(net.parameters(), 0.0),
            "discriminator": torch.optim.SGD(critic.parameters(), 0.0),
        },
        "generator", 60, cpu_compute(),
    )  # fmt: skip
    batch = {
        "he": torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8),
        "her2": torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8),
        "weight": torch.rand(2, 1, 64, 96),
    }
    found = train_generation.train_step([batch], course, OPTIONS, 0.2)
    gradient = [parameter.grad.clone() for parameter in critic.parameters()]
    critic.requires_grad_(True)
    source, target = (
        session.to_unit(batch[k], torch.device("cpu")) * 2 - 1 for k in ("he", "her2")
    )
    with torch.no_grad():
        generated = net(source)
    loss = 0.5 * torch.nn.functional.softplus(critic(torch.cat((source, generated), 1))).mean()
    loss = loss + 0.5 * torch.nn.functional.softplus(-critic(torch.cat((source, target), 1))).mean()
    expected = torch.autograd.grad(loss, list(critic.parameters()))
    assert found["discriminator"].item() == pytest.approx(loss.item(), rel=1e-4)
    for ours, theirs in zip(gradient, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6)


def test_validation_is_the_mean_over_tiles():
    """Batches of two and one: each tile counts alike."""
    images = torch.randint(0, 256, (2, 3, 3, 16, 24), dtype=torch.uint8)
    batch = {"he": images[0], "her2": images[1], "weight": torch.rand(3, 1, 16, 24)}
    batches = [{k: v[part] for k, v in batch.items()} for part in (slice(0, 2), slice(2, 3))]
    # A network that paints H&E itself.
    found = train_generation.validate(torch.nn.Identity(), batches, cpu_compute(), OPTIONS)
    distances, noise, alike = [], [], []
    for he, her2, weight in zip(*batch.values(), strict=True):
        error = (he.float() - her2.float()) / 127.5 * weight
        levels = losses.pyramid(error[None], 4)
        distances.append(
            sum(
                w * level.abs().mean().item()
                for w, level in zip((1, 25, 25, 25), levels, strict=True)
            )
        )
        pair = [image.permute(1, 2, 0).numpy() for image in (he, her2)]
        noise.append(metrics.psnr(*pair))
        alike.append(metrics.ssim(*pair))
    assert found["reconstruction"] == pytest.approx(np.mean(distances), rel=1e-4)
    # 8 bits that went to [-1, 1] and back may come out one lower.
    assert found["psnr_db"] == pytest.approx(np.mean(noise), abs=0.05)
    assert found["ssim"] == pytest.approx(np.mean(alike), abs=0.005)


def batch_of(tiles: int, seed: int = 0):
    torch.manual_seed(seed)
    return {
        "tile": [str(number) for number in range(tiles)],
        "he": torch.randint(0, 256, (tiles, 3, 64, 96), dtype=torch.uint8),
        "her2": torch.randint(0, 256, (tiles, 3, 64, 96), dtype=torch.uint8),
        "weight": torch.rand(tiles, 1, 64, 96),
    }


def course_of(folder, options, rate=0.1, precision=torch.float32):
    torch.manual_seed(0)
    modules = {
        "generator": train_generation.build_generator("unet_32", 4, options.norm),
        "discriminator": train_generation.PatchGAN(6, 4, 2, options.norm),
    }
    optimisers = {k: torch.optim.SGD(m.parameters(), rate) for k, m in modules.items()}
    return TrainingState(folder, modules, optimisers, "generator", 60, cpu_compute(precision))


def gradients(course, name):
    return [parameter.grad.clone() for parameter in course.modules[name].parameters()]


def test_a_step_in_parts_has_the_gradients_of_the_whole(tmp_path):
    """Without batch statistics; the generator meets the discriminator of before the step."""
    options = OPTIONS.replace(norm="instance", batch_size=4)
    batch = batch_of(4)
    halves = [
        {name: value[part] for name, value in batch.items()} for part in (slice(0, 2), slice(2, 4))
    ]
    whole, parted = (course_of(tmp_path, options, rate=0.0) for _ in range(2))
    one = train_generation.train_step([batch], whole, options, 0.2)
    two = train_generation.train_step(halves, parted, options, 0.2)
    for name in ("generator", "discriminator"):
        for ours, theirs in zip(gradients(parted, name), gradients(whole, name), strict=True):
            assert torch.allclose(ours, theirs, rtol=2e-3, atol=2e-5)
    for name, value in one.items():
        assert two[name].item() == pytest.approx(value.item(), rel=1e-4), name


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision_computes_nearly_the_same_losses_and_keeps_float32_weights(
    precision, tmp_path
):
    options = OPTIONS.replace(batch_size=3)
    found = {}
    for kind in (torch.float32, precision):
        course = course_of(tmp_path, options, precision=kind)
        before = [p.detach().clone() for p in course.modules["generator"].parameters()]
        found[kind] = train_generation.train_step([batch_of(3)], course, options, 0.2)
        # With fp16 the first steps only find the scale at which gradients do not overflow.
        for _ in range(12):
            after = list(course.modules["generator"].parameters())
            if any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)):
                break
            train_generation.train_step([batch_of(3)], course, options, 0.2)
        else:
            pytest.fail("no step was taken")
        assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in after)
    for name, value in found[torch.float32].items():
        assert found[precision][name].dtype == torch.float32
        assert found[precision][name].item() == pytest.approx(value.item(), rel=0.03), name


def test_the_variance_is_penalised_and_a_single_tile_left_out(index, tmp_path):
    options = OPTIONS.replace(variance_weight=25.0, weight_map="none")
    run(index=index, options=options, **paths(tmp_path))
    found = history(tmp_path)
    # Three tiles in batches of two: the odd one makes no step, since its variance is none.
    assert found[1, "train", "variance"] > 0
    total = found[1, "train", "adversarial"] + found[1, "train", "dice"]
    total += 25 * found[1, "train", "variance"]
    total += sum(
        weight * found[1, "train", f"l1_{level}"]
        for level, weight in enumerate(options.l1_weights, 1)
    )
    assert found[1, "train", "total"] == pytest.approx(total, rel=1e-5)
    with pytest.raises(ConfigError, match=r"variance_weight: 25 needs at least two tiles"):
        TrainGenerationOptions(variance_weight=25.0, batch_size=1)
    with pytest.raises(ConfigError, match=r"variance_weight: 25 needs .* leaves one"):
        TrainGenerationOptions(variance_weight=25.0, batch_size=4, gpus=4)


def test_a_step_that_cannot_be_shared_out_is_refused_when_parsed():
    with pytest.raises(ConfigError, match=r"batch_size: 4 is not .* give a multiple of 6"):
        TrainGenerationOptions(batch_size=4, gpus=3, accumulate=2)


def test_last_and_best_weights_lie_with_the_checkpoint(finished):
    (folder,) = (finished / "checkpoints").iterdir()
    final = (finished / "generator.safetensors").read_bytes()
    assert (folder / "last.safetensors").read_bytes() == final
    described = json.loads((folder / "last.json").read_text())
    assert described == json.loads((finished / "metadata.json").read_text())
    best = json.loads((folder / "best.json").read_text())
    assert best["epoch"] == best["best_epoch"] == described["best_epoch"]
    net, _ = storage.load_generation(folder / "best.safetensors", folder / "best.json")
    assert sum(p.numel() for p in net.parameters()) == described["parameters"]


def test_each_validation_leaves_a_picture_of_its_tiles(finished):
    pictures = sorted(finished.glob("checkpoints/*/samples/*.png"))
    assert [path.name for path in pictures] == ["0001.png", "0002.png"]
    image = cv2.imread(str(pictures[1]))
    # Two tiles below each other, each as H&E, HER2 and what was painted, cut to 64 px.
    assert image.shape == (2 * 64 + 4, 3 * 64 + 2 * 4, 3)
    assert list(finished.glob("checkpoints/*/tensorboard/events*"))


def test_validation_can_be_rarer_and_comes_after_the_last_epoch(index, tmp_path):
    options = OPTIONS.replace(epochs=5, validate_every=3, sample_tiles=0)
    run(index=index, options=options, **paths(tmp_path))
    found = history(tmp_path)
    assert {key[0] for key in found if key[1] == "val"} == {3, 5}
    assert not list(tmp_path.glob("checkpoints/*/samples"))


TELL = """
import os, signal, sys, threading, time
from pathlib import Path
from hemera.__main__ import main
from hemera.stages import train_generation

step = train_generation.train_step
taken = []


def tell(*arguments):
    taken.append(1)
    if len(taken) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(*arguments)


train_generation.train_step = tell
sys.exit(main(sys.argv[1:]))
"""


def test_a_run_that_is_told_to_end_keeps_what_it_trained(index, finished, tmp_path):
    """As a cluster does before it kills: SIGTERM in the second epoch, in its first step."""
    places = {"index": index} | paths(tmp_path)
    words = [word for name, path in places.items() for word in (f"--{name}", str(path))]
    command = [sys.executable, "-c", TELL, "train_generation", *words, *flags(OPTIONS)]
    root = Path(__file__).parents[2]
    told = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert told.returncode == 1, told.stderr
    assert "stopped at epoch 2, step 1 of 2; the checkpoint is written: run" in told.stderr
    assert not (tmp_path / "generator.safetensors").exists()
    run(index=index, options=OPTIONS, **paths(tmp_path))
    for name in ("generator.safetensors", "metadata.json"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_dropout_resumes_to_the_same_bits(index, tmp_path, monkeypatch):
    """What dropout draws goes on where the checkpoint stood."""
    options = OPTIONS.replace(network="resnet_6blocks", dropout=True, checkpoint_minutes=1e-9)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(index=index, options=options, **paths(whole))
    save = TrainingState.save

    def save_and_stop(course):
        save(course)
        if (course.progress.epoch, course.progress.step) == (2, 1):
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingState, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run(index=index, options=options, **paths(broken))
    monkeypatch.setattr(TrainingState, "save", save)
    run(index=index, options=options, **paths(broken))
    weights = [(folder / "generator.safetensors").read_bytes() for folder in (whole, broken)]
    assert weights[0] == weights[1]


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_compiled_networks_learn_the_same(index, finished, tmp_path):
    options = OPTIONS.replace(compile=True, epochs=1, decay_from_epoch=1)
    run(index=index, options=options, **paths(tmp_path))
    found, expected = history(tmp_path), history(finished)
    for key, value in found.items():
        assert value == pytest.approx(expected[key], rel=1e-3), key
    plain, _ = storage.load_generation(
        tmp_path / "generator.safetensors", tmp_path / "metadata.json"
    )
    assert not plain.training


def test_compiling_without_a_compiler_says_what_is_missing(index, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(TrainingError, match=r"compile: true, .* install g\+\+ or set"):
        run(index=index, options=OPTIONS.replace(compile=True), **paths(tmp_path))
