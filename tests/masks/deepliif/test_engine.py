"""DeepLIIF through its own package, with a small model of random weights made on the spot."""

import contextlib
import io
import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from hemera.config import MaskOptions
from hemera.errors import EngineError
from hemera.masks import label_format
from hemera.masks.deepliif import Options, engine
from hemera.masks.deepliif.engine import DeepliifEngine
from hemera.masks.stain import stains
from hemera.masks.stain.membranes import find_membranes

SHARED = MaskOptions()
STAINS = stains.Stains((245, 245, 245))


def loaded(folder: Path, **changes: Any) -> DeepliifEngine:
    options = {"model": str(folder), "device": "cpu", "torch_threads": 1, **changes}
    return DeepliifEngine(Options(**options), SHARED)


@pytest.fixture(scope="module")
def serialized(model: Path) -> DeepliifEngine:
    return loaded(model)


@pytest.fixture(scope="module")
def raw(raw_model: Path) -> DeepliifEngine:
    return loaded(raw_model)


def copied(folder: Path, into: Path) -> Path:
    shutil.copytree(folder, into / "copy")
    return into / "copy"


def tile(height: int = 200, width: int = 280, seed: int = 4) -> npt.NDArray[np.uint8]:
    """Return a tile with blobs of blue and brown on white."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    density = np.zeros((height, width, 3))
    for _ in range(40):
        cy, cx = rng.uniform(0, height), rng.uniform(0, width)
        dye = np.array(stains.HAEMATOXYLIN if rng.random() < 0.5 else stains.DAB)
        density += 0.6 * (np.hypot(y - cy, x - cx) < rng.uniform(5, 12))[..., None] * dye
    noise = rng.normal(0, 2, density.shape)
    return (245 * 10**-density + noise).round().clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.92])
def test_labels_are_those_of_the_package(
    serialized: DeepliifEngine, model: Path, mpp: float
) -> None:
    from deepliif.models import infer_modalities
    from PIL import Image

    rgb = tile()
    found = serialized.segment(rgb, mpp, STAINS)
    with contextlib.redirect_stdout(io.StringIO()):
        images, scoring = infer_modalities(
            Image.fromarray(rgb), engine.window_px(mpp), str(model), seg_weights=[0.2] * 5
        )
    refined = np.asarray(images["SegRefined"])
    classes = label_format.classes(found.mask)
    assert found.mask.shape == rgb.shape[:2]
    np.testing.assert_array_equal(classes == label_format.POSITIVE, refined[..., 0] == 255)
    np.testing.assert_array_equal(classes == label_format.NEGATIVE, refined[..., 2] == 255)
    # Theirs is drawn three pixels wide, ours is the pixel around the cell.
    assert ((refined[..., 1] == 255) | (classes != label_format.BOUNDARY)).all()
    assert len(found.cells) == scoring["num_total"] > 3
    assert found.cells.positive.sum() == scoring["num_pos"]
    np.testing.assert_array_equal(label_format.nuclei(found.mask), (classes == 1) | (classes == 2))


def test_cells_of_both_signs_are_where_the_mask_has_them(serialized: DeepliifEngine) -> None:
    from scipy import ndimage

    found = serialized.segment(tile(), 0.25, STAINS)
    classes = label_format.classes(found.mask)
    assert 0 < found.cells.positive.sum() < len(found.cells)
    for sign, positive in ((label_format.POSITIVE, True), (label_format.NEGATIVE, False)):
        pieces, count = ndimage.label(classes == sign, np.ones((3, 3)))
        centres = np.array(ndimage.center_of_mass(classes == sign, pieces, range(1, count + 1)))
        own = found.cells.positive == positive
        at = np.column_stack([found.cells.y_px[own], found.cells.x_px[own]]) - 0.5
        distance = np.hypot(*(at[:, None] - centres[None]).transpose(2, 0, 1)).min(axis=1)
        # The package makes a cell's first pixel boundary, which moves a centroid a little.
        assert np.median(distance) < 0.5


def test_intensity_is_the_membrane_class_of_the_engine_stain(serialized: DeepliifEngine) -> None:
    rgb = tile()
    found = serialized.segment(rgb, 0.5, STAINS)
    classes = find_membranes(stains.separate(rgb, STAINS), 0.5, STAINS, SHARED).classes
    np.testing.assert_array_equal(label_format.intensity(found.mask), classes)
    assert len(np.unique(classes)) > 2


def test_raw_networks_infer_as_serialized_ones(
    raw: DeepliifEngine, serialized: DeepliifEngine
) -> None:
    first, second = (one.infer(tile(), 0.25)[0] for one in (raw, serialized))
    assert np.abs(first.astype(int) - second).max() <= 1
    assert first.std() > 5


def test_a_window_is_inferred_once_and_the_images_are_those_of_the_package(
    serialized: DeepliifEngine, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tile of 512 px at 0.46 um/px: the package infers nine windows, of which four differ."""
    from deepliif import models
    from PIL import Image

    rgb = tile(512, 512)
    size = engine.window_px(0.46)
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = models.inference(
            Image.fromarray(rgb), size, size // 16, str(model), seg_only=True, seg_weights=[0.2] * 5
        )
    calls, real = [], models.run_wrapper

    def counted(*given: object, **named: object) -> object:
        calls.append(given)
        return real(*given, **named)

    monkeypatch.setattr(models, "run_wrapper", counted)
    seg, marker = serialized.infer(rgb, 0.46)
    assert len(calls) == 4
    np.testing.assert_array_equal(seg, np.asarray(theirs["Seg"]))
    (name,) = (key for key in theirs if key.endswith("Marker"))
    assert marker is not None
    np.testing.assert_array_equal(marker, np.asarray(theirs[name]))


def test_a_model_that_names_no_marker_has_cells_and_no_marker_threshold(
    serialized: DeepliifEngine, model: Path, tmp_path: Path
) -> None:
    """Newer training writes an empty list of names by default."""
    folder = copied(model, tmp_path)
    with (folder / "train_opt.txt").open("a") as file:
        file.write("\n            modalities_names: []\n")
    expected = serialized.segment(tile(), 0.5, STAINS)
    np.testing.assert_array_equal(loaded(folder).segment(tile(), 0.5, STAINS).mask, expected.mask)
    with pytest.raises(EngineError, match=r"deepliif\.marker: 30, but .* has no modality Marker"):
        loaded(folder, marker=30)


def test_weights_and_thresholds_reach_the_package(serialized: DeepliifEngine, model: Path) -> None:
    rgb = tile()
    seg, _ = serialized.infer(rgb, 0.25)
    weighted = loaded(model, seg_weights=(0.5, 0.0, 0.0, 0.0, 0.5))
    assert (weighted.infer(rgb, 0.25)[0] != seg).any()
    fewer, more, base, large, every = (
        loaded(model, **options).segment(rgb, 0.25, STAINS)
        for options in (
            {"threshold": 200, "size_px": 0},
            {"threshold": 120, "size_px": 0},
            {},
            {"size_px": 400},
            {"marker": 0},
        )
    )
    assert 0 < label_format.nuclei(fewer.mask).sum() < label_format.nuclei(more.mask).sum()
    assert 0 < len(large.cells) < len(base.cells)
    assert large.cells.area_px.min() > 400 >= base.cells.area_px.min()
    assert every.cells.positive.all()


@pytest.mark.parametrize("value", [0, 178, 255])
def test_a_tile_of_one_colour_is_blank(serialized: DeepliifEngine, value: int) -> None:
    found = serialized.segment(np.full((60, 90, 3), value, np.uint8), 0.5, STAINS)
    assert found.note == "blank"
    assert not found.mask.any()
    assert found.mask.shape == (60, 90)
    assert len(found.cells) == 0


@pytest.mark.parametrize(
    ("mpp", "size", "name"),
    [(0.25, 512, "40x"), (0.5, 256, "20x"), (0.92, 139, "10x"), (1.0, 128, "10x")],
)
def test_the_window_follows_the_magnification(mpp: float, size: int, name: str) -> None:
    assert engine.window_px(mpp) == size
    assert engine.magnification(size) == name


def test_weights_that_are_not_finite_are_an_error_and_no_empty_mask(
    raw_model: Path, tmp_path: Path
) -> None:
    folder = copied(raw_model, tmp_path)
    path = folder / "latest_net_G51.pth"
    state = {
        name: value * float("nan") if value.is_floating_point() else value
        for name, value in torch.load(path).items()
    }
    torch.save(state, path)
    with pytest.raises(EngineError, match="cannot be run on a tile"):
        loaded(folder).segment(tile(), 0.5, STAINS)


def test_a_package_that_cannot_be_imported_is_an_error(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepliif", None)
    with pytest.raises(EngineError, match=r"deepliif: the package cannot be imported .*no_weights"):
        loaded(model)


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("ran",)


def test_a_pickle_that_wants_to_run_code_does_not(
    raw_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = copied(raw_model, tmp_path)
    with (folder / "latest_net_G1.pth").open("wb") as file:
        pickle.dump(Payload(), file)
    with pytest.raises(EngineError, match="not a DeepLIIF model that can be loaded"):
        loaded(folder)
    assert not (tmp_path / "ran").exists()


HOSTILE = [
    "__import__('os').mkdir('ran')",
    '\'__import__("os").mkdir("ran")\'',
    "[__import__('os').mkdir(x) for x in ('ran',)]",
    "__imp[default: no]ort__('os').mkdir('ran')",
    # Strings that Python joins, or adds, before the package evaluates them once more.
    "'__import__(\"os\")' '.mkdir(\"ran\")'",
    "'__import__(\"os\").' + 'mkdir(\"ran\")'",
    'b\'__import__("os").mkdir("ran")\'',
    # No default value to the package, which looks for the first bracket.
    "[0,[default for default in [__import__('os').mkdir('ran')]]]",
    # These split lines for `str.splitlines`, and are space or nothing to Python.
    "__import__\x0c('os').mkdir('ran')",
    *(f"'{line}' + str(__import__('os').mkdir('ran'))" for line in "\x0b\x1c\x85\u2028"),
    "-" * 100_000 + "1",
]


def test_options_that_want_to_run_code_do_not(
    serialized: DeepliifEngine, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = copied(model, tmp_path)
    with (folder / "train_opt.txt").open("a", encoding="utf-8") as file:
        for number, value in enumerate(HOSTILE):
            file.write(f"\n            sneaky{number}: {value}\n")
    found = loaded(folder).infer(tile(), 0.5)[0]
    np.testing.assert_array_equal(found, serialized.infer(tile(), 0.5)[0])
    assert not (tmp_path / "ran").exists()


def test_the_environment_does_not_choose_the_model(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPLIIF_MODEL_DIR", "/nowhere")
    assert len(loaded(model).segment(tile(), 0.5, STAINS).cells)


def test_a_gpu_that_does_not_exist_is_an_error(model: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(EngineError, match=r"mask\.engines\.deepliif\.device: cuda"):
        loaded(model, device="cuda")
