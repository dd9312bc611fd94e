"""hemera train-nuclei: weights with their provenance, the same bytes twice, and less loss."""

import json
import logging
import re
from pathlib import Path

import pytest
import safetensors
import torch

from hemera import __version__
from hemera.__main__ import main
from hemera.networks.nuclei import NucleusNet
from hemera.networks.storage import load_into, read_weights


@pytest.fixture
def threads() -> object:
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def described(path: Path) -> dict[str, object]:
    with safetensors.safe_open(path, "pt") as file:
        return json.loads(file.metadata()["hemera"])


def test_a_name_that_the_option_would_take_for_another_model_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["train-nuclei", "--weights", str(tmp_path / "nuclei.pt"), "--steps", "1"]) == 1
    assert "name it nuclei.safetensors" in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_and_the_file_states_its_origin(
    tmp_path: Path, threads: int
) -> None:
    files = [tmp_path / f"{name}.safetensors" for name in ("one", "two", "other")]
    for path, seed in zip(files, ("3", "3", "4"), strict=True):
        assert main(["train-nuclei", "--weights", str(path), "--steps", "2", "--seed", seed]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].stat().st_size < 3e6
    origin, other = described(files[0]), described(files[2])
    assert origin["command"] == "hemera train-nuclei --steps 2 --seed 3"
    assert (origin["seed"], origin["steps"], origin["images"]) == (3, 2, 24)
    assert origin["hemera"] == __version__
    assert re.fullmatch("[0-9a-f]{64}", str(origin["images_sha256"]))
    assert origin["images_sha256"] != other["images_sha256"]
    load_into(NucleusNet(), read_weights(files[0]), "weights")


@pytest.mark.slow
def test_the_loss_falls(tmp_path: Path, threads: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hemera.training.nuclei")
    weights = tmp_path / "nuclei.safetensors"
    assert main(["train-nuclei", "--weights", str(weights), "--steps", "400"]) == 0
    first, last = (
        float(re.search(r"dice ([\d.]+)", record.getMessage())[1])  # type: ignore[index]
        for record in caplog.records
        if record.name == "hemera.training.nuclei"
    )
    assert last < 0.8 * first
