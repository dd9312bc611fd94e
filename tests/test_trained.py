import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from hemera import trained
from hemera.errors import TrainingError


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
        trained.read_weights(evil)
    evil.write_bytes(pickle.dumps(Command(mark)))
    with pytest.raises(TrainingError, match=r"evil.pt: damaged, or not plain weights"):
        trained.read_weights(evil)
    assert not mark.exists()
    broken = tmp_path / "broken.safetensors"
    trained.write_weights(broken, {"a": torch.rand(50, 3)})
    broken.write_bytes(broken.read_bytes()[:-9])
    with pytest.raises(TrainingError, match=r"broken.safetensors: damaged"):
        trained.read_weights(broken)
    with pytest.raises(TrainingError, match=r"none.safetensors: no such file; run the stage"):
        trained.read_weights(tmp_path / "none.safetensors")


def test_weights_that_do_not_fit_name_the_layers():
    net = nn.Linear(2, 3)
    with pytest.raises(TrainingError, match=r"here: does not fit .*: bias is missing, extra is"):
        trained.load_into(net, {"weight": net.weight, "extra": net.weight}, "here")


def test_metadata_of_another_network_is_refused(tmp_path):
    path = tmp_path / "metadata.json"
    trained.write_metadata(path, {"network": "generation"})
    assert trained.read_metadata(path, "generation") == {"network": "generation"}
    with pytest.raises(TrainingError, match=r"does not describe a network for segmentation"):
        trained.read_metadata(path, "segmentation")
    path.write_text("{")
    with pytest.raises(TrainingError, match=r"not JSON"):
        trained.read_metadata(path, "generation")
