import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hemera import tables, training
from hemera.config import TrainGenerationOptions
from hemera.errors import ConfigError, TrainingError
from hemera.stages import train_generation
from hemera.stages.train_generation import fit_threshold, rate_factor, run
from tests.small_index import write_index
from tests.small_networks import plain_compute

OPTIONS = TrainGenerationOptions(
    network="unet_32", base_width=4, discriminator_width=4, crop_px=64, epochs=2,
    decay_from_epoch=1, learning_rate=2e-3, device="cpu", torch_threads=1, workers=0,
)  # fmt: skip

GOLDEN = {
    1: {
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
def trained(index, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run(index=index, options=OPTIONS, **paths(folder))
    return folder


def history(folder):
    rows = tables.read(folder / "history.parquet", tables.HISTORY).to_pylist()
    return {(row["epoch"], row["part"], row["quantity"]): row["value"] for row in rows}


def test_golden(trained):
    found = history(trained)
    expected = GOLDEN[TrainGenerationOptions.version]
    assert {key: found[2, *key] for key in expected} == pytest.approx(expected, rel=2e-3), (
        "the same options give other losses: raise TrainGenerationOptions.version"
    )


def test_outputs_describe_themselves(trained, index):
    described = json.loads((trained / "metadata.json").read_text())
    assert described["network"] == "generation"
    assert described["model"] == {
        "generator": "unet_32", "base_width": 4, "norm": "batch", "dropout": False,
    }  # fmt: skip
    assert described["mpp"] == 0.5
    assert described["index_fingerprint"] == "f" * 64
    assert described["tiles"] == {"train": 3, "val": 2}
    assert described["options"]["weight_map"] == "inside"
    assert described["epoch"] == 2
    assert described["seed"] == OPTIONS.seed
    assert set(described["versions"]) >= {"torch", "hemera", "python"}
    net, _ = training.load_generation(trained / "generator.safetensors", trained / "metadata.json")
    assert described["parameters"] == sum(p.numel() for p in net.parameters())
    assert not net.training
    found = history(trained)
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
    options = dataclasses.replace(OPTIONS, epochs=25, decay_from_epoch=15, learning_rate=5e-3)
    run(index=index, options=options, **paths(tmp_path))
    found = history(tmp_path)
    assert found[25, "val", "reconstruction"] < 0.5 * found[1, "val", "reconstruction"]


def test_a_finished_run_is_not_trained_again(index, trained, tmp_path, monkeypatch):
    other = paths(tmp_path) | {"checkpoints": trained / "checkpoints"}

    def refuse(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(train_generation, "train_step", refuse)
    run(index=index, options=OPTIONS, **other)
    for name in ("generator.safetensors", "metadata.json", "history.parquet"):
        assert (tmp_path / name).read_bytes() == (trained / name).read_bytes()


def test_every_switch_trains(index, tmp_path):
    options = dataclasses.replace(
        OPTIONS, epochs=1, decay_from_epoch=0, weight_map="literal", mask_source="her2_positive",
        weight_adversarial=True, renormalise_mean=True, dice_source="intensity", select="best",
        crop_px=None, workers=1, lr_step="start",
    )  # fmt: skip
    run(index=index, options=options, **paths(tmp_path))
    assert history(tmp_path)[1, "train", "learning_rate"] == 0
    assert json.loads((tmp_path / "metadata.json").read_text())["dice_threshold"] is None


def test_an_empty_subset_is_one_line_with_a_remedy(tmp_path):
    index = write_index(tmp_path, train=0)
    with pytest.raises(
        TrainingError, match=r"no tiles for training of generation; .*loosen filter"
    ):
        run(index=index, options=OPTIONS, **paths(tmp_path))
    assert not (tmp_path / "generator.safetensors").exists()


def test_tiles_that_the_network_cannot_halve_are_refused(index, tmp_path):
    options = dataclasses.replace(OPTIONS, network="unet_256", crop_px=None)
    with pytest.raises(TrainingError, match="unet_256: height 128 px is not a multiple of 256"):
        run(index=index, options=options, **paths(tmp_path))


def test_a_loss_that_is_not_finite_stops_with_the_tiles(index, tmp_path):
    options = dataclasses.replace(OPTIONS, learning_rate=1e30, epochs=5)
    with pytest.raises(
        TrainingError, match=r"epoch \d, step \d: loss \w+ is \w+ on the tiles pair"
    ):
        run(index=index, options=options, **paths(tmp_path))


def test_impossible_sizes_are_refused_when_parsed():
    with pytest.raises(ConfigError, match=r"crop_px: 256 is not a multiple of 512"):
        TrainGenerationOptions(crop_px=256)
    with pytest.raises(ConfigError, match=r"discriminator_layers: 5 need a crop"):
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
    course = training.Run(
        tmp_path, {"generator": net, "discriminator": critic},
        {
            "generator": torch.optim.SGD(net.parameters(), 0.0),
            "discriminator": torch.optim.SGD(critic.parameters(), 0.0),
        },
        "generator", 60,
    )  # fmt: skip
    batch = {
        "he": torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8),
        "her2": torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8),
        "weight": torch.rand(2, 1, 64, 96),
    }
    found = train_generation.train_step([batch], course, plain_compute(), OPTIONS, 0.2)
    gradient = [parameter.grad.clone() for parameter in critic.parameters()]
    critic.requires_grad_(True)
    source, target = (
        training.to_unit(batch[k], torch.device("cpu")) * 2 - 1 for k in ("he", "her2")
    )
    with torch.no_grad():
        generated = net(source)
    loss = 0.5 * torch.nn.functional.softplus(critic(torch.cat((source, generated), 1))).mean()
    loss = loss + 0.5 * torch.nn.functional.softplus(-critic(torch.cat((source, target), 1))).mean()
    expected = torch.autograd.grad(loss, list(critic.parameters()))
    assert found["discriminator"].item() == pytest.approx(loss.item(), rel=1e-4)
    for ours, theirs in zip(gradient, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6)
