import json
import os
import shutil
import signal

import cv2
import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch.nn import functional

from hemera.config import TrainGenerationOptions
from hemera.errors import TrainingError
from hemera.evaluation import metrics
from hemera.networks import losses, storage
from hemera.networks.discriminator import PatchGAN
from hemera.stages import train_generation
from hemera.stages.train_generation import rate_factor, run
from hemera.training.checkpoint import TrainingState
from tests.small_index import draw_tile, write_index
from tests.small_networks import cpu_compute
from tests.small_training import history, interrupted, paths, run_command, same_bytes
from tests.small_weights import write_alexnet

OPTIONS = TrainGenerationOptions(
    network="unet_32", base_width=4, discriminator_width=4, crop_px=64, epochs=2,
    decay_from_epoch=1, learning_rate=2e-3, device="cpu", torch_threads=1, workers=0,
)  # fmt: skip

ASP = {
    "network": "resnet_6blocks", "norm": "instance", "discriminator_layers": 4, "gan_loss": "lsgan",
    "discriminator_input": "her2", "spectral_norm": True, "nce_weight": 3, "l1_weights": [1, 0, 2],
    "supervised_nce_weight": 5, "dice_source": "none",
}  # fmt: skip
MISALIGNED = {
    "norm": "instance", "discriminator_input": "her2", "spectral_norm": True, "gan_loss": "hinge",
    "l1_weights": [0], "dice_source": "none", "coarse_l1_weight": 2, "lpips_quarter_weight": 3,
    "lpips_half_weight": 0.5, "feature_matching_weight": 7, "dab_percentile_weight": 0.2,
    "r1_weight": 10, "crop_px": 128, "ema": 0.9,
}  # fmt: skip

GOLDEN = {
    4: {
        ("train", "total"): 7.7292,
        ("train", "discriminator"): 0.63528,
        ("train", "l1_1"): 0.08884,
        ("train", "l1_4"): 0.081128,
        ("train", "dice"): 0.71714,
        ("val", "reconstruction"): 6.8722,
        ("val", "psnr_db"): 7.7266,
        ("val", "ssim"): 0.43888,
    }
}
"""Values of the second epoch, by version: processors differ in the last bits, not in these."""


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return write_index(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def train(index):
    """Train with some options changed; return the history."""

    def trained(folder, **changes):
        run(index=index, options=OPTIONS.replace(**changes), **paths(folder))
        return history(folder)

    return trained


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(folder)
    return folder


def test_golden(finished):
    found = history(finished)
    expected = GOLDEN[TrainGenerationOptions.version]
    assert {key: found[2, *key] for key in expected} == pytest.approx(expected, rel=2e-3), (
        "the same options give other losses: raise TrainGenerationOptions.version"
    )


def test_outputs_describe_themselves(finished):
    described = json.loads((finished / "metadata.json").read_text())
    assert described["network"] == "generation"
    assert described["model"] == {
        "generator": "unet_32", "base_width": 4, "norm": "batch", "dropout": False,
    }  # fmt: skip
    assert (described["mpp"], described["mpp_max"], described["tile_px"]) == (0.5, 0.5, 64)
    assert described["index_fingerprint"] == "f" * 64
    assert described["tiles"] == {"train": 3, "val": 2}
    assert (described["epoch"], described["seed"]) == (2, OPTIONS.seed)
    net, _ = storage.load_generation(finished / "generator.safetensors", finished / "metadata.json")
    assert described["parameters"] == sum(p.numel() for p in net.parameters())
    found = history(finished)
    assert {key[0] for key in found} == {1, 2}
    assert found[1, "train", "learning_rate"] == 2e-3
    assert found[2, "train", "learning_rate"] == pytest.approx(1e-3)


def test_the_total_is_the_weighted_sum(train, tmp_path):
    """Three tiles in batches of two: the odd one makes no step, since it has no variance."""
    values = train(
        tmp_path, variance_weight=25.0, stain_color_weight=3.0, weight_map="none", epochs=1
    )
    found = {name: value for (_, split, name), value in values.items() if split == "train"}
    assert found["variance"] > 0
    total = found["adversarial"] + found["dice"] + 25 * found["variance"]
    total += 3 * found["stain_color"]
    total += sum(
        weight * found[f"l1_{level}"] for level, weight in enumerate(OPTIONS.l1_weights, 1)
    )
    assert found["total"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("options", [ASP, MISALIGNED], ids=["asp", "misaligned"])
def test_the_methods_of_presets_train(options, train, tmp_path):
    """With LPIPS, whose weights are named; the total is the weighted sum of the losses."""
    if options is MISALIGNED:
        options = {**options, "lpips_weights": str(write_alexnet(tmp_path / "alexnet.pth"))}
    values = train(tmp_path / "out", epochs=2, **options)
    found = {
        name: value for (e, split, name), value in values.items() if (e, split) == (2, "train")
    }
    total = found["adversarial"]
    for level, weight in enumerate(options["l1_weights"], 1):
        total += weight * found[f"l1_{level}"]
    names = [name.removesuffix("_weight") for name in options if name.endswith("_weight")]
    for name in names:
        assert found[name] > 0 or name == "r1", name
        total += options[f"{name}_weight"] * found[name] if name != "r1" else 0
    assert found["total"] == pytest.approx(total, rel=1e-4)
    # The penalty is taken on the first of every 16 steps.
    assert ("r1" in names) == (values.get((1, "train", "r1"), 0) > 0)
    assert found.get("r1", 0) == 0
    described = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert ("lpips_sha256" in described) == ("lpips_weights" in options)
    storage.load_generation(
        tmp_path / "out" / "generator.safetensors", tmp_path / "out" / "metadata.json"
    )


def test_lpips_is_left_out_without_its_weights_and_missing_weights_are_errors(
    train, tmp_path, caplog
):
    options = {"lpips_half_weight": 1, "crop_px": 128, "epochs": 1}
    assert (1, "train", "lpips_half") not in train(tmp_path, **options)
    assert "LPIPS is left out" in caplog.text
    missing = OPTIONS.replace(**options, lpips_weights="nowhere.pth")
    (fault,) = missing.requirements()
    assert "train_generation.lpips_weights: nowhere.pth does not exist; give a file" in fault
    with pytest.raises(TrainingError, match=r"nowhere.pth does not exist"):
        train(tmp_path, **options, lpips_weights="nowhere.pth")


def test_the_network_learns(train, tmp_path):
    found = train(tmp_path, epochs=25, decay_from_epoch=15, learning_rate=5e-3)
    assert found[25, "val", "reconstruction"] < 0.5 * found[1, "val", "reconstruction"]


def test_a_finished_run_is_not_trained_again(index, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(train_generation, "train_step", lambda *_: pytest.fail("trained again"))
    other = paths(tmp_path) | {"checkpoints": finished / "checkpoints"}
    run(index=index, options=OPTIONS, **other)
    assert same_bytes(tmp_path, finished)


def test_the_folder_of_a_run_has_weights_pictures_and_a_log(finished):
    (folder,) = (finished / "checkpoints").iterdir()
    final = (finished / "generator.safetensors").read_bytes()
    assert (folder / "last.safetensors").read_bytes() == final
    described = json.loads((folder / "last.json").read_text())
    assert described == json.loads((finished / "metadata.json").read_text())
    best = json.loads((folder / "best.json").read_text())
    assert best["epoch"] == best["best_epoch"] == described["best_epoch"]
    storage.load_generation(folder / "best.safetensors", folder / "best.json")
    assert {path.name for path in (folder / "samples").iterdir()} == {"0001.png", "0002.png"}
    # Two tiles downwards, each as H&E, HER2 and virtual HER2, cropped to 64 px.
    image = cv2.imread(str(folder / "samples" / "0002.png"))
    assert image.shape == (2 * 64 + 4, 3 * 64 + 2 * 4, 3)
    assert list(folder.glob("tensorboard/events*"))


def test_every_switch_trains(train, tmp_path):
    switches = {
        "epochs": 1, "decay_from_epoch": 0, "weight_map": "literal", "crop_px": None, "workers": 1,
        "mask_source": "her2_positive", "weight_adversarial": True, "renormalise_mean": True,
        "dice_source": "intensity", "select": "best", "shift_px": 2, "stain_color_weight": 1,
    }  # fmt: skip
    # Decaying from the first epoch on, to nothing after the last.
    assert train(tmp_path, **switches)[1, "train", "learning_rate"] == 1e-3
    described = json.loads((tmp_path / "metadata.json").read_text())
    assert described["weight_mean"] == pytest.approx(1), "renormalised"
    found = train(tmp_path / "still", **switches, lr_step="start")
    assert found[1, "train", "learning_rate"] == 0
    weights = [
        storage.read_weights(folder / "generator.safetensors")["down.0.0.weight"]
        for folder in (tmp_path, tmp_path / "still")
    ]
    assert (weights[0] - weights[1]).abs().max() > 5e-4, "one trains at its rate, the other at none"


@pytest.mark.parametrize(
    ("values", "epoch", "expected"),
    [
        ({}, 1, 1.0), ({}, 50, 1.0), ({}, 51, 50 / 51), ({}, 100, 1 / 51),
        ({"lr_step": "start"}, 49, 1.0), ({"lr_step": "start"}, 50, 50 / 51),
        ({"lr_step": "start"}, 100, 0.0), ({"epochs": 7, "decay_from_epoch": 7}, 7, 1.0),
    ],
)  # fmt: skip
def test_learning_rate_of_both_readings(values, epoch, expected):
    assert rate_factor(epoch, TrainGenerationOptions(**values)) == pytest.approx(expected, 1e-12)


def batch_of(tiles: int):
    torch.manual_seed(0)
    return {
        "tile": [str(number) for number in range(tiles)],
        "he": torch.randint(0, 256, (tiles, 3, 64, 96), dtype=torch.uint8),
        "her2": torch.randint(0, 256, (tiles, 3, 64, 96), dtype=torch.uint8),
        "weight": torch.rand(tiles, 1, 64, 96),
        "valid": torch.ones(tiles, 1, 64, 96, dtype=torch.bool),
        "her2_background": torch.ones(tiles, 3, 1, 1),
    }


def state_of(folder, options, rate=0.1, precision=torch.float32):
    torch.manual_seed(0)
    modules = {
        "generator": train_generation.build_generator("unet_32", 4, options.norm),
        "discriminator": PatchGAN(6, 4, 2, options.norm),
    }
    optimisers = {k: torch.optim.SGD(m.parameters(), rate) for k, m in modules.items()}
    compute = cpu_compute(precision)
    return TrainingState(folder, options, None, compute, modules, optimisers, {})


def gradients(state, name):
    return [parameter.grad.clone() for parameter in state.modules[name].parameters()]


def test_the_discriminator_learns_from_its_own_loss_alone(tmp_path):
    state, batch = state_of(tmp_path, OPTIONS, rate=0.0), batch_of(2)
    found = train_generation.train_step([batch], state, OPTIONS)
    net, discriminator = state.modules["generator"], state.modules["discriminator"]
    discriminator.requires_grad_(True)
    source, target = (batch[name].float() / 127.5 - 1 for name in ("he", "her2"))
    with torch.no_grad():
        generated = net(source)
    loss = 0.5 * functional.softplus(discriminator(torch.cat((source, generated), 1))).mean()
    loss = loss + 0.5 * functional.softplus(-discriminator(torch.cat((source, target), 1))).mean()
    expected = torch.autograd.grad(loss, list(discriminator.parameters()))
    assert found["discriminator"].item() == pytest.approx(loss.item(), rel=1e-4)
    for ours, theirs in zip(gradients(state, "discriminator"), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6)


def test_shifted_pairs_have_the_losses_of_matching_ones(tmp_path):
    """HER2 is the generated image, 2 px lower and 1 px to the left but for the border."""
    options = OPTIONS.replace(shift_px=2)
    batch = batch_of(1)
    net = state_of(tmp_path, options, rate=0.0).modules["generator"].train()
    with torch.no_grad():
        generated = ((net(batch["he"].float() / 255 * 2 - 1) + 1) * 127.5).round().byte()
    found = {}
    for name, (y, x) in {"equal": (0, 0), "near": (2, -1), "far": (5, -4)}.items():
        her2 = torch.roll(generated, (y, x), (2, 3))
        state = state_of(tmp_path, options, rate=0.0)
        step = train_generation.train_step([batch | {"her2": her2}], state, options)
        found[name] = step["l1_1"].item()
    assert found["equal"] < 1 / 255
    assert found["equal"] < found["near"] < 0.2 * found["far"]


@pytest.mark.parametrize("shift_px", [0, 3])
def test_excluded_pixels_change_no_loss_and_no_gradient(shift_px, tmp_path):
    """HER2 is replaced by noise where the mask excludes it."""
    options = OPTIONS.replace(shift_px=shift_px)
    batch = batch_of(2)
    batch["valid"][:, :, 20:50, 10:70] = False
    other = batch | {"her2": batch["her2"].clone()}
    other["her2"][:, :, 20:50, 10:70] = 7
    found = []
    for given in (batch, other):
        state = state_of(tmp_path, options, rate=0.0)
        step = train_generation.train_step([given], state, options)
        validated = train_generation.validate(
            state.modules["generator"], [given], state.compute, options
        )
        found.append((step, validated, gradients(state, "generator")))
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(found[0][2], found[1][2], strict=True))


def test_dice_is_that_over_the_background():
    """A gray background changes nothing, unless it is taken for white."""
    torch.manual_seed(0)
    images = 10 ** -(torch.rand(2, 1, 8, 8) * torch.tensor([0.27, 0.57, 0.78]).view(1, 3, 1, 1))
    white = torch.ones(1, 3, 1, 1)
    gray = torch.tensor([179, 178, 174]).view(1, 3, 1, 1) / 255

    def dice(shown, taken):
        generated, target = ((image * shown * 2 - 1) for image in images.split(1))
        weight = torch.ones(1, 1, 8, 8)
        found = train_generation.generator_losses(generated, target, weight, taken, OPTIONS)
        return found["dice"].item()

    assert dice(gray, gray) == pytest.approx(dice(white, white), rel=1e-3)
    assert dice(gray, white) != pytest.approx(dice(white, white), rel=0.05)


def test_the_adversarial_loss_may_be_weighted_as_well(tmp_path):
    """What the discriminator sees of the target is multiplied by the weights: here by 0."""
    batch = batch_of(2) | {"weight": torch.zeros(2, 1, 64, 96)}
    seen = []
    for weighted in (False, True):
        options = OPTIONS.replace(weight_adversarial=weighted)
        state = state_of(tmp_path, options, rate=0.0)
        state.modules["discriminator"].register_forward_pre_hook(
            lambda module, inputs: seen.append(inputs[0][:, 3:].abs().max().item())
        )
        train_generation.train_step([batch], state, options)
    assert min(seen[:3]) > 0
    assert seen[3:] == [0, 0, 0]


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    """Without batch statistics; the generator is trained against the discriminator of before."""
    options = OPTIONS.replace(norm="instance", batch_size=4)
    batch = batch_of(4)
    halves = [
        {name: value[part] for name, value in batch.items()} for part in (slice(0, 2), slice(2, 4))
    ]
    whole, parted = (state_of(tmp_path, options, rate=0.0) for _ in range(2))
    one = train_generation.train_step([batch], whole, options)
    two = train_generation.train_step(halves, parted, options)
    for name in ("generator", "discriminator"):
        for ours, theirs in zip(gradients(parted, name), gradients(whole, name), strict=True):
            assert torch.allclose(ours, theirs, rtol=2e-3, atol=2e-5)
    for name, value in one.items():
        assert two[name].item() == pytest.approx(value.item(), rel=1e-4), name


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision_gives_nearly_the_same_losses_and_float32_weights(precision, tmp_path):
    found = {}
    for kind in (torch.float32, precision):
        state = state_of(tmp_path, OPTIONS, precision=kind)
        before = [p.detach().clone() for p in state.modules["generator"].parameters()]
        found[kind] = train_generation.train_step([batch_of(3)], state, OPTIONS)
        # With fp16 the first steps only find the scale at which gradients do not overflow.
        for _ in range(12):
            after = list(state.modules["generator"].parameters())
            if any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)):
                break
            train_generation.train_step([batch_of(3)], state, OPTIONS)
        else:
            pytest.fail("no step was taken")
        assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in after)
    for name, value in found[torch.float32].items():
        assert found[precision][name].dtype == torch.float32
        assert found[precision][name].item() == pytest.approx(value.item(), rel=0.03), name


def test_validation_is_the_mean_over_tiles():
    """Batches of two and one: each tile counts alike."""
    batch = batch_of(3)
    batches = [{k: v[part] for k, v in batch.items()} for part in (slice(0, 2), slice(2, 3))]
    # A network that returns H&E itself.
    found = train_generation.validate(torch.nn.Identity(), batches, cpu_compute(), OPTIONS)
    expected = []
    for he, her2, weight in zip(*(batch[k] for k in ("he", "her2", "weight")), strict=True):
        error = (he.float() - her2.float()) / 127.5 * weight
        levels = zip((1, 25, 25, 25), losses.pyramid(error[None], 4), strict=True)
        pair = [image.permute(1, 2, 0).numpy() for image in (he, her2)]
        pair.append(np.ones(pair[0].shape[:2], np.bool_))
        distance = sum(w * level.abs().mean().item() for w, level in levels)
        expected.append((distance, metrics.psnr(*pair), metrics.ssim(*pair)))
    reconstruction, psnr_db, ssim = np.mean(expected, axis=0)
    assert found["reconstruction"] == pytest.approx(reconstruction, rel=1e-4)
    # 8 bits that went to [-1, 1] and back may come out one lower.
    assert found["psnr_db"] == pytest.approx(psnr_db, abs=0.05)
    assert found["ssim"] == pytest.approx(ssim, abs=0.005)


class Constant(torch.nn.Module):
    """A generator that returns one image (H, W, 3), uint8."""

    def __init__(self, image):
        super().__init__()
        # Half a step more, so that it is stored as this image.
        unit = (torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() + 0.5) / 255
        self.image = unit * 2 - 1

    def forward(self, source):
        return self.image


def test_gray_with_a_high_ssim_loses_against_stain_that_is_off_by_pixels():
    """Both values by their definitions; gray is the real image without its colour."""
    he, real, _ = draw_tile(3)
    gray = np.repeat(cv2.cvtColor(real, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    stained = np.roll(real, 2, axis=1)
    batch = {
        "he": torch.from_numpy(he).permute(2, 0, 1)[None],
        "her2": torch.from_numpy(real).permute(2, 0, 1)[None],
        "weight": torch.ones(1, 1, *real.shape[:2]),
        "valid": torch.ones(1, 1, *real.shape[:2], dtype=torch.bool),
        "her2_background": torch.ones(1, 3, 1, 1),
    }
    vector = np.linalg.inv([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])[:, 2]

    def brown(image):
        density = (-np.log10(image.clip(1) / 255) @ vector).clip(0)
        return density * (image[..., 0] > image[..., 2])

    scores = {}
    for name, image in (("gray", gray), ("stained", stained)):
        found = train_generation.validate(Constant(image), [batch], cpu_compute(), OPTIONS)
        ssim = structural_similarity(real, image, channel_axis=-1, data_range=255)
        x, y = brown(image), brown(real)
        covariance = np.mean((x - x.mean()) * (y - y.mean()))
        agreement = 2 * covariance / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)
        assert found["ssim"] == pytest.approx(ssim, abs=2e-3)
        assert found["brown_concordance"] == pytest.approx(agreement, abs=2e-3)
        scores[name] = ssim, train_generation.selection_score(found)
        assert scores[name][1] == pytest.approx(ssim + agreement, abs=4e-3)
    assert scores["gray"][0] > scores["stained"][0] + 0.1
    assert scores["gray"][1] < scores["stained"][1] - 0.1


def test_the_best_epoch_has_the_highest_sum_of_ssim_and_brown(train, tmp_path, monkeypatch):
    """The first is gray, of the highest SSIM; the last has the most brown in wrong places."""
    validated = [
        {"reconstruction": 1.0, "psnr_db": 30.0, "ssim": 0.75, "brown_concordance": 0.0},
        {"reconstruction": 2.0, "psnr_db": 20.0, "ssim": 0.5, "brown_concordance": 0.5},
        {"reconstruction": 3.0, "psnr_db": 10.0, "ssim": 0.25, "brown_concordance": 0.625},
    ]
    epochs, kept = iter(validated), []

    def validate(net, *_):
        kept.append({name: tensor.clone() for name, tensor in net.state_dict().items()})
        return next(epochs)

    monkeypatch.setattr(train_generation, "validate", validate)
    train(tmp_path, epochs=3, select="best")
    described = json.loads((tmp_path / "metadata.json").read_text())
    assert (described["epoch"], described["best_epoch"]) == (2, 2)
    written = storage.read_weights(tmp_path / "generator.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in kept[1].items())
    assert not all(torch.equal(written[name], tensor) for name, tensor in kept[2].items())


def test_sigterm_leaves_a_checkpoint_from_which_the_run_resumes(
    train, finished, tmp_path, monkeypatch
):
    """As a cluster sends it before it kills: in the first step of the second epoch."""
    step, taken = train_generation.train_step, []

    def terminated(*arguments):
        taken.append(1)
        if len(taken) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr(train_generation, "train_step", terminated)
    with pytest.raises(TrainingError, match="stopped at epoch 2, step 1 of 2; the checkpoint is"):
        train(tmp_path)
    assert not (tmp_path / "generator.safetensors").exists()
    train(tmp_path)
    assert len(taken) == 4
    assert same_bytes(tmp_path, finished)


@pytest.mark.parametrize(
    "options",
    [
        {"network": "resnet_6blocks", "dropout": True},
        {"ema": 0.9, "clip_norm": 0.1},
        ASP,
    ],
)
def test_an_interrupted_run_resumes_to_the_same_bits(options, train, finished, tmp_path):
    """The random state and the moving average are restored from the checkpoint."""
    options = {**options, "checkpoint_minutes": 1e-9}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(whole, **options)
    with interrupted(2, 1):
        train(broken, **options)
    train(broken, **options)
    assert same_bytes(whole, broken)
    values = [history(folder)[2, "val", "ssim"] for folder in (whole, finished)]
    assert values[0] != pytest.approx(values[1], rel=1e-4), "the option has no effect"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_compiled_networks_learn_the_same(train, finished, tmp_path):
    found = train(tmp_path, compile=True, epochs=1, decay_from_epoch=1)
    expected = history(finished)
    for key, value in found.items():
        assert value == pytest.approx(expected[key], rel=1e-3), key
    storage.load_generation(tmp_path / "generator.safetensors", tmp_path / "metadata.json")


@pytest.mark.slow
def test_the_command_line_gives_the_same_bytes(index, finished, tmp_path):
    run_command("train_generation", {"index": index} | paths(tmp_path), OPTIONS)
    assert same_bytes(tmp_path, finished)
