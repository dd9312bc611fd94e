import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hemera.errors import TrainingError
from hemera.networks import storage


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


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_a_file_of_anything_is_one_line(tmp_path, name):
    rng = np.random.default_rng(1)
    whole = tmp_path / f"whole{Path(name).suffix}"
    weights = {"a": torch.rand(5, 3)}
    if name.endswith("pth"):
        torch.save(weights, whole)
    else:
        storage.write_weights(whole, weights)
    good = whole.read_bytes()
    path = tmp_path / name
    for number in range(150):
        broken = bytearray(good if number % 2 else rng.bytes(rng.integers(0, 400)))
        for place in rng.integers(0, max(1, len(broken)), 4) if broken else ():
            broken[place] = rng.integers(256)
        path.write_bytes(broken)
        try:
            state = storage.read_weights(path)
        except TrainingError as error:
            assert "\n" not in str(error)
            assert str(error).startswith(f"{path}: ")
        else:
            assert isinstance(state, dict)


def test_numbers_in_place_of_layers_and_a_lone_tensor_are_named(tmp_path):
    net = nn.Linear(2, 3)
    with pytest.raises(TrainingError, match=r"here: does not fit .*weight"):
        storage.load_into(net, {"weight": 3, "bias": net.bias}, "here")
    torch.save(torch.rand(3), tmp_path / "lone.pth")
    with pytest.raises(TrainingError, match=r"lone.pth: contains a Tensor, not the weights"):
        storage.read_weights(tmp_path / "lone.pth")


@pytest.mark.parametrize(
    "model",
    [
        None, [], {}, {"generator": "unet_32", "base_width": "4"}, {"generator": ["unet_32"]},
        {"generator": "unet_32", "base_width": -4}, {"generator": "unet_32", "colour": "red"},
    ],
    ids=str,
)  # fmt: skip
def test_a_description_from_elsewhere_is_an_error_that_names_its_file(tmp_path, model):
    path = tmp_path / "metadata.json"
    described = {"network": "generation", "model": model}
    storage.write_metadata(path, described if model is not None else {"network": "generation"})
    with pytest.raises(TrainingError) as caught:
        storage.load_generation(tmp_path / "generator.safetensors", path)
    assert "metadata.json: does not describe" in str(caught.value) or model == {}
    segmentation = {"network": "segmentation", "model": {"generation": model, "base_width": 8}}
    if model is not None:
        storage.write_metadata(path, segmentation)
        with pytest.raises(TrainingError):
            storage.load_segmentation(tmp_path / "segmenter.safetensors", path)
