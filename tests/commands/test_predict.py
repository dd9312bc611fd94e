"""hemera predict: the same bytes as the library, errors of one line."""

import json
import logging

import numpy as np
import pytest
from PIL import Image

from hemera.__main__ import main
from hemera.inference.options import PredictOptions
from hemera.inference.whole_slide import predict
from tests.small_networks import write_segmenter_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_segmenter_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "case.png"
    pixels = np.random.default_rng(4).integers(90, 220, (64, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((270, 192)).save(path)
    return path


def test_command_and_library_write_the_same_bytes(tmp_path, model, image):
    words = [str(image), "--model", str(model), "--out", str(tmp_path / "a"), "--mpp", "0.4"]
    words += ["--threshold", "0.4", "--min-area-um2", "0", "--probability", "--batch-size", "3"]
    assert main(["predict", *words]) == 0
    predict(
        image,
        model,
        tmp_path / "b",
        PredictOptions(mpp=0.4, threshold=0.4, min_area_um2=0, probability=True),
    )
    names = sorted(path.name for path in (tmp_path / "a" / "case").iterdir())
    assert len(names) == 5
    for name in names:
        one, other = (tmp_path / folder / "case" / name for folder in "ab")
        assert one.read_bytes() == other.read_bytes(), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "case.png: no resolution in the file; give --mpp"),
        (["--mpp", "2"], "case.png: 2 um/px is coarser than the 0.5"),
        (["--mpp", "0.5", "--precision", "bf16", "--device", "cpu"], "--precision bf16: needs a"),
    ],
)
def test_errors_are_one_line(tmp_path, model, image, caplog, words, message):
    out = tmp_path / "out"
    assert main(["predict", str(image), "--model", str(model), "--out", str(out), *words]) == 1
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert line.startswith(message)
    assert "pairs.tsv" not in line
    assert not out.exists() or not list(out.iterdir())


def test_results_of_demo_networks_are_labelled(tmp_path, image, caplog):
    """In the terminal, in the JSON and in the picture, and those of wider ones are not."""
    pictures = {}
    for width in (16, 64):
        model = write_segmenter_folder(tmp_path / f"model_{width}", options={"base_width": width})
        words = [str(image), "--model", str(model), "--out", str(tmp_path / str(width))]
        caplog.clear()
        assert main(["predict", *words, "--mpp", "0.4"]) == 0
        facts = json.loads((tmp_path / str(width) / "case" / "case.json").read_text())
        assert facts["model"]["demo_sizes"] == (width == 16)
        assert ("a network of demo sizes; not meaningful" in caplog.text) == (width == 16)
        overlay = Image.open(tmp_path / str(width) / "case" / "case.overlay.png").convert("RGB")
        pictures[width] = np.asarray(overlay).astype(int)
    changed = np.abs(pictures[16] - pictures[64]).max(axis=2) > 0
    assert changed.any() and not changed[60:].any()
    red = pictures[16][..., 0] - pictures[16][..., 1] > 150
    assert red[changed].any() and not (pictures[64][..., 0] - pictures[64][..., 1] > 150).any()
