import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hemera.errors import TrainingError
from hemera.networks import storage
from hemera.networks.generation import build_generator
from hemera.networks.segmentation import SegmentationNet


class Command:
    """What runs when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_loading_runs_no_code_and_says_what_is_damaged(tmp_path):
    mark = tmp_path / "ran"
    evil = tmp_path / "evil.pt"
    torch.save({"weight": Command(mark)}, evil)
    with pytest.raises(TrainingError, match=r"evil.pt: damaged, or not plain weights"):
        storage.read_weights(evil)
    evil.write_bytes(pickle.dumps(Command(mark)))
    with pytest.raises(TrainingError, match=r"evil.pt: damaged, or not plain weights"):
        storage.read_weights(evil)
    assert not mark.exists()
    broken = tmp_path / "broken.safetensors"
    storage.write_weights(broken, {"a": torch.rand(50, 3)})
    broken.write_bytes(broken.read_bytes()[:-9])
    with pytest.raises(TrainingError, match=r"broken.safetensors: damaged"):
        storage.read_weights(broken)
    with pytest.raises(TrainingError, match=r"none.safetensors: no such file; run the stage"):
        storage.read_weights(tmp_path / "none.safetensors")


@pytest.mark.parametrize("place", [0.3, 0.6, 0.97])
@pytest.mark.fault
def test_a_flipped_bit_in_weights_or_in_a_checkpoint_is_found(tmp_path, place, fault_seen):
    def flip(path):
        data = bytearray(path.read_bytes())
        data[int(place * len(data))] ^= 0x04
        path.write_bytes(data)

    model = {"generator": "unet_32", "base_width": 4}
    net = build_generator(**model)
    weights, metadata = tmp_path / "w.safetensors", tmp_path / "w.json"
    storage.write_weights(weights, net.state_dict())
    storage.write_metadata(metadata, {"network": "generation", "model": model}, weights)
    storage.load_generation(weights, metadata)
    flip(weights)
    with pytest.raises(TrainingError, match=r"w\.safetensors: differs from its SHA-256"):
        storage.load_generation(weights, metadata)
    # Records of several megabytes, so that the place is in one of them.
    checkpoint = tmp_path / "checkpoint.pt"
    torch.save({"a": torch.rand(1000, 500), "b": torch.rand(1000, 500)}, checkpoint)
    assert storage.read_weights(checkpoint)["b"].shape == (1000, 500)
    flip(checkpoint)
    with pytest.raises(TrainingError, match=r"checkpoint\.pt: damaged"):
        storage.read_weights(checkpoint)
    fault_seen(
        f"one bit flipped in weights or a checkpoint, at {place:.0%}",
        "the job fails: differs from its SHA-256",
    )


def test_weights_that_do_not_fit_name_the_layers():
    net = nn.Linear(2, 3)
    with pytest.raises(
        TrainingError, match=r"here: does not fit .*Missing key.*bias.*Unexpected key.*extra"
    ):
        storage.load_into(net, {"weight": net.weight, "extra": net.weight}, "here")


def test_metadata_of_another_network_is_refused(tmp_path):
    path = tmp_path / "metadata.json"
    storage.write_metadata(path, {"network": "generation"})
    assert storage.read_metadata(path, "generation") == {"network": "generation"}
    with pytest.raises(TrainingError, match=r"does not describe a network for segmentation"):
        storage.read_metadata(path, "segmentation")
    path.write_text("{")
    with pytest.raises(TrainingError, match=r"not JSON"):
        storage.read_metadata(path, "generation")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_random_and_corrupted_files_are_errors_of_one_line(tmp_path, suffix):
    """Random bytes, and a file of weights with four bytes changed: an error or a mapping."""
    rng = np.random.default_rng(1)
    whole, path = (tmp_path / f"{name}{suffix}" for name in ("whole", "broken"))
    weights = {"a": torch.rand(5, 3)}
    if suffix == ".pth":
        torch.save(weights, whole)
    else:
        storage.write_weights(whole, weights)
    good = whole.read_bytes()
    refused = 0
    for number in range(150):
        broken = bytearray(good if number % 2 else rng.bytes(rng.integers(0, 400)))
        for place in rng.integers(0, max(1, len(broken)), 4) if broken else ():
            broken[place] = rng.integers(256)
        path.write_bytes(broken)
        try:
            state = storage.read_weights(path)
        except TrainingError as error:
            refused += 1
            assert "\n" not in str(error)
            assert str(error).startswith(f"{path}: ")
        else:
            assert isinstance(state, dict)
    assert refused >= 75, "every random file"


def test_numbers_in_place_of_layers_and_a_lone_tensor_are_named(tmp_path):
    net = nn.Linear(2, 3)
    with pytest.raises(TrainingError, match=r"here: does not fit .*weight"):
        storage.load_into(net, {"weight": 3, "bias": net.bias}, "here")
    broken = {"weight": net.weight.detach().clone(), "bias": net.bias}
    broken["weight"][1, 0] = torch.nan
    with pytest.raises(TrainingError, match=r"here: weight contains values that are not finite"):
        storage.load_into(net, broken, "here")
    torch.save(torch.rand(3), tmp_path / "lone.pth")
    with pytest.raises(TrainingError, match=r"lone.pth: contains a Tensor, not the weights"):
        storage.read_weights(tmp_path / "lone.pth")


@pytest.mark.parametrize(
    "model", [None, [], {"generator": "unet_3"}, {"generator": "unet_32", "colour": "red"}], ids=str
)
def test_a_description_from_elsewhere_is_an_error_that_names_its_file(tmp_path, model):
    path = tmp_path / "metadata.json"
    weights = tmp_path / "network.safetensors"
    storage.write_metadata(path, {"network": "generation", "model": model})
    with pytest.raises(TrainingError, match=r"metadata.json: does not describe"):
        storage.load_generation(weights, path)
    storage.write_metadata(path, {"network": "segmentation", "model": {"decoder": model}})
    with pytest.raises(TrainingError, match=r"metadata.json: does not describe"):
        storage.load_segmentation(weights, path)


@pytest.mark.parametrize("branch", ["virtual_rgb_input", "decoder_maps"])
def test_a_network_from_its_file_gives_the_same_answers(branch, tmp_path):
    torch.manual_seed(1)
    generator = {"generator": "unet_32", "base_width": 4}
    model = {"base_width": 8, "branch": branch}
    net = SegmentationNet(build_generator(**generator), **model).eval()
    paths = (tmp_path / "segmenter.safetensors", tmp_path / "metadata.json")
    storage.write_weights(paths[0], net.state_dict())
    described = {"network": "segmentation", "model": model | {"generation": generator}}
    storage.write_metadata(paths[1], described)
    image = torch.rand(1, 3, 32, 64)
    with torch.no_grad():
        assert torch.equal(storage.load_segmentation(*paths)[0](image), net(image))


def test_weights_can_be_read_by_those_who_read_other_files(tmp_path):
    text, weights = tmp_path / "a.txt", tmp_path / "a.safetensors"
    text.touch()
    storage.write_weights(weights, {"a": torch.zeros(3)})
    assert weights.stat().st_mode == text.stat().st_mode
