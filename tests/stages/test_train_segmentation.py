import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torchvision

from hemera.config import TrainSegmentationOptions
from hemera.errors import TrainingError
from hemera.networks import storage
from hemera.networks.generation import build_generator
from hemera.networks.losses import segmentation_loss
from hemera.networks.segmentation import SegmentationNet
from hemera.stages import train_segmentation
from hemera.stages.train_segmentation import run
from tests import small_training
from tests.small_index import write_index
from tests.small_networks import MODEL, cpu_compute, write_generator
from tests.small_training import history, interrupted, run_command, same_bytes
from tests.small_weights import write_small_vit

OPTIONS = TrainSegmentationOptions(
    base_width=8, crop_px=128, epochs=2, batch_size=2, learning_rate=2e-3, device="cpu",
    torch_threads=1, workers=0, encoder_weights=None,
)  # fmt: skip

GOLDEN = {
    5: {
        ("train", "total"): 0.80877,
        ("train", "cross_entropy"): 0.84505,
        ("train", "dice"): 0.77249,
        ("val", "total"): 0.88219,
    }
}
"""What the second epoch gives, by version: processors differ in the last bits, not in these."""


def paths(folder: Path) -> dict[str, Path]:
    return small_training.paths(folder, "segmenter")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    return {
        "index": write_index(folder / "results"),
        **write_generator(folder, normalise_background=True),
    }


@pytest.fixture(scope="module")
def train(given):
    """Train with some inputs and options changed; return the history."""

    def trained(folder, inputs=None, **changes):
        inputs = given | (inputs or {})
        run(**inputs, options=OPTIONS.replace(**changes), **paths(folder))
        return history(folder)

    return trained


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(folder)
    return folder


def test_golden(finished):
    found = history(finished)
    expected = GOLDEN[TrainSegmentationOptions.version]
    assert {key: found[2, *key] for key in expected} == pytest.approx(expected, rel=2e-3), (
        "the same options give other losses: raise TrainSegmentationOptions.version"
    )


def test_outputs_predict_alone_and_the_branch_is_untouched(finished, given):
    net, described = storage.load_segmentation(
        finished / "segmenter.safetensors", finished / "metadata.json"
    )
    assert described["model"] == {
        "generation": MODEL, "generation_skips": False, "base_width": 8, "branch": "skip16",
        "decoder": "unet",
    }  # fmt: skip
    assert described["mpp"] == 0.5
    assert described["encoder_sha256"] == "none"
    assert described["tiles"] == {"train": 3, "val": 2}
    assert described["parameters"] - described["parameters_trained"] == sum(
        parameter.numel() for parameter in net.generation.parameters()
    )
    own = storage.read_weights(given["generator"])
    for name, tensor in net.generation.net.state_dict().items():
        assert torch.equal(tensor, own[name])
    found = history(finished)
    expected = 0.5 * found[1, "train", "cross_entropy"] + 0.5 * found[1, "train", "dice"]
    assert found[1, "train", "total"] == pytest.approx(expected, rel=1e-5)


def test_the_network_learns(train, tmp_path):
    found = train(tmp_path, epochs=20, learning_rate=5e-3, select="last")
    assert found[20, "train", "total"] < 0.7 * found[1, "train", "total"]
    assert json.loads((tmp_path / "metadata.json").read_text())["epoch"] == 20


def test_validation_is_the_mean_over_tiles_and_pools_their_pixels():
    """Batches of two and one: each tile counts alike, as each pixel does."""
    rng = torch.Generator().manual_seed(1)
    he = torch.randint(0, 256, (3, 1, 6, 10), dtype=torch.uint8, generator=rng)
    truth = torch.rand(3, 1, 6, 10, generator=rng) > 0.6
    truth[1] = False
    valid = torch.ones_like(truth)
    valid[2, :, :, :3] = False
    batches = [
        {"he": he[part], "positive": truth[part], "valid": valid[part]}
        for part in (slice(0, 2), slice(2, 3))
    ]
    net = torch.nn.Conv2d(1, 1, 1)
    torch.nn.init.constant_(net.weight, 4.0)
    torch.nn.init.constant_(net.bias, -2.0)
    found = train_segmentation.validate(net, batches, cpu_compute(), OPTIONS)
    logits = he / 255 * 4 - 2
    expected = [
        segmentation_loss(logits[k], truth[k], valid[k], OPTIONS.loss_lambda)[0].item()
        for k in range(3)
    ]
    assert found["total"] == pytest.approx(sum(expected) / 3, rel=1e-5)
    said, truth = (logits >= 0) & valid, truth & valid
    hit = (said & truth).sum().item()
    assert found["f1"] == pytest.approx(2 * hit / (said.sum() + truth.sum()).item(), rel=1e-6)


@pytest.mark.parametrize(
    "switches",
    [
        {"decoder": "unetplusplus", "generation_skips": True},
        {"decoder": "deeplabv3plus", "ema": 0.9, "clip_norm": 0.1},
        {"generation_branch": "virtual_rgb_encoder", "precision": "bf16"},
        {"generation_branch": "attention_unet_32_bottleneck", "flip": False},
        {"generation_branch": "virtual_rgb_input", "accumulate": 2},
        {"generation_branch": "decoder_maps", "decoder": "deeplabv3plus"},
        {"generation_branch": "none", "decoder": "unetplusplus", "accumulate": 2},
    ],
    ids=lambda switches: "-".join(str(value) for value in switches.values()),
)  # fmt: skip
def test_every_switch_trains_and_loads_alone(given, train, switches, tmp_path):
    generators = {
        "attention_unet_32_bottleneck": "attention_unet_32", "virtual_rgb_encoder": "resnet_6blocks"
    }  # fmt: skip
    branch = switches.get("generation_branch", "")
    inputs = {}
    if branch in generators:
        model = {"generator": generators[branch], "base_width": 4}
        inputs = write_generator(tmp_path / "generator", model=model, normalise_background=True)
    found = train(tmp_path, inputs, epochs=1, **switches)
    assert 0 < found[1, "train", "total"] < 2
    assert 0 < found[1, "val", "total"] < 9
    net, described = storage.load_segmentation(
        tmp_path / "segmenter.safetensors", tmp_path / "metadata.json"
    )
    assert (net.generation is None) == (branch == "none")
    if net.generation is not None:
        own = storage.read_weights((given | inputs)["generator"])
        frozen = net.generation.net.state_dict()
        assert all(torch.equal(frozen[key], own[key]) for key in own), "the branch is untouched"
    assert described["options"]["decoder"] == switches.get("decoder", OPTIONS.decoder)
    assert net(torch.rand(1, 3, 128, 256)).shape == (1, 1, 128, 256)


@pytest.mark.parametrize("frozen", [True, False])
def test_an_encoder_of_timm_starts_from_its_local_weights(frozen, train, tmp_path):
    """Patches of 14 px in crops of 128; the trained network loads without the file."""
    path = write_small_vit(tmp_path / "vit")
    options = {"encoder": "timm:vit_tiny_patch16_224", "encoder_frozen": frozen, "epochs": 1}
    found = train(tmp_path / "out", **options, encoder_weights=str(path), generation_branch="none")
    assert 0 < found[1, "val", "total"] < 9
    path.unlink()
    net, described = storage.load_segmentation(
        tmp_path / "out" / "segmenter.safetensors", tmp_path / "out" / "metadata.json"
    )
    assert described["model"]["encoder"]["mean"] == [0.7, 0.57, 0.7]
    assert (described["parameters_trained"] < described["parameters"]) == frozen
    assert net(torch.rand(1, 3, 96, 128)).shape == (1, 1, 96, 128)
    begun = write_small_vit(tmp_path / "vit")
    for name, tensor in storage.read_weights(begun).items():
        same = torch.equal(tensor, net.encoder.backbone.state_dict()[name])
        assert same == frozen, name


def test_an_interrupted_run_resumes_to_the_same_bits(train, finished, tmp_path):
    with interrupted(2, 1):
        train(tmp_path, checkpoint_minutes=1e-9)
    train(tmp_path)
    assert same_bytes(tmp_path, finished)


def test_another_generator_is_another_run(given, train, tmp_path):
    weights = storage.read_weights(given["generator"])
    other = tmp_path / "generator.safetensors"
    for factor, runs in ((1, 1), (1, 1), (2, 2)):
        weights["down.0.0.weight"] = weights["down.0.0.weight"] * factor
        storage.write_weights(other, weights)
        train(tmp_path, {"generator": other}, epochs=1)
        assert len(list((tmp_path / "checkpoints").iterdir())) == runs


@pytest.mark.parametrize("named", ["file", "imagenet"])
def test_encoder_weights_come_from_a_file_or_the_cache_of_torch(named, tmp_path, monkeypatch):
    """Nothing is downloaded: where the weights are missing, the error says how to get them."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert torch.hub.get_dir() == str(tmp_path / "hub")
    url = torchvision.models.ResNet34_Weights.IMAGENET1K_V1.url
    path = tmp_path / "hub" / "checkpoints" / url.rsplit("/")[-1]
    missing = OPTIONS.replace(base_width=64, encoder_weights="imagenet").requirements()
    assert str(path) in missing[0] and "download it" in missing[0] and "null" in missing[0]
    path.parent.mkdir(parents=True)
    torch.manual_seed(3)
    theirs = torchvision.models.resnet34(weights=None).state_dict()
    torch.save(theirs, path)
    net = SegmentationNet(None)
    options = OPTIONS.replace(
        base_width=64, encoder_weights="imagenet" if named == "imagenet" else str(path)
    )
    given = options.encoder_file
    assert given == path and not options.requirements()
    assert train_segmentation.load_encoder(net, given) == storage.file_digest(path)
    own = net.encoder.state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    # With the virtual image beside H&E, half of each weight is for either.
    beside = SegmentationNet(build_generator("resnet_6blocks", 4), branch="virtual_rgb_input")
    train_segmentation.load_encoder(beside, given)
    halves = beside.encoder.conv1.weight.detach().chunk(2, 1)
    assert all(torch.equal(half, theirs["conv1.weight"] / 2) for half in halves)
    assert torch.equal(beside.encoder.layer4[0].conv1.weight, theirs["layer4.0.conv1.weight"])
    with pytest.raises(TrainingError, match=r"none.pth: no such file; name a file as train_seg"):
        train_segmentation.load_encoder(net, tmp_path / "none.pth")


def test_training_starts_from_the_weights_of_the_encoder(train, tmp_path):
    torch.manual_seed(3)
    theirs = torchvision.models.resnet34(weights=None).state_dict()
    torch.save(theirs, tmp_path / "resnet34.pth")
    found = train(
        tmp_path, generation_branch="none", base_width=64, epochs=1, learning_rate=1e-12,
        encoder_weights=str(tmp_path / "resnet34.pth"), loss_lambda=1.0, weight_decay=0.0,
        crop_px=64,
    )  # fmt: skip
    net, described = storage.load_segmentation(
        tmp_path / "segmenter.safetensors", tmp_path / "metadata.json"
    )
    assert net.generation is None
    assert described["parameters"] == described["parameters_trained"]
    assert described["encoder_sha256"] == storage.file_digest(tmp_path / "resnet34.pth")
    assert torch.allclose(net.encoder.layer3[2].conv1.weight, theirs["layer3.2.conv1.weight"])
    assert found[1, "train", "total"] == found[1, "train", "cross_entropy"]


def test_a_generator_that_does_not_fit_is_refused(given, train, tmp_path):
    other = tmp_path / "other.json"
    model = {"generator": "unet_128", "base_width": 8}
    storage.write_metadata(other, {"network": "generation", "model": model})
    foreign = write_generator(tmp_path / "other", fingerprint="e" * 64, normalise_background=True)
    branch = "attention_unet_32_bottleneck"
    for match, inputs, changes in (
        ("metadata.json: damaged, or not plain", {"generator": given["generator_metadata"]}, {}),
        ("does not fit the network .*size mismatch", {"generator_metadata": other}, {}),
        ("trained on the index eeeeeeeeeeee, and this one is fff", foreign, {}),
        (f"{branch}.*unet_128", {}, {"generation_branch": branch}),
        ("trained with normalise_background: True", {}, {"normalise_background": False}),
    ):
        with pytest.raises(TrainingError, match=match):
            train(tmp_path, inputs, **changes)


def test_pictures_show_truth_and_probability(finished):
    pictures = sorted(finished.glob("checkpoints/*/samples/*.png"))
    assert [path.name for path in pictures] == ["0001.png", "0002.png"]
    image = cv2.imread(str(pictures[0]))
    # Two tiles cropped to 128 px; the first has no positive cell, the second some.
    assert image.shape == (2 * 128 + 4, 3 * 128 + 2 * 4, 3)
    assert not image[:128, 132:260].any()
    assert set(np.unique(image[132:, 132:260])) == {0, 255}


@pytest.mark.slow
def test_narrow_networks_train_on_two_threads(tmp_path):
    """Channels last, PyTorch's gradients of such networks wrote beyond their memory on processors.

    In a process of its own, which that ended.
    """
    given = {"index": write_index(tmp_path / "results", train=103)}
    given |= write_generator(
        tmp_path, model={"generator": "unet_32", "base_width": 4}, normalise_background=True
    )
    options = OPTIONS.replace(
        batch_size=16, crop_px=64, torch_threads=2, epochs=1,
        generation_branch="virtual_rgb_encoder",
    )  # fmt: skip
    run_command("train_segmentation", given | paths(tmp_path / "run"), options)
