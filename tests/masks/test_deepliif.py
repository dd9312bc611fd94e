"""DeepLIIF through its own package, with a small model of random weights made on the spot."""

import argparse
import contextlib
import hashlib
import io
import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from hemera.config import MaskOptions
from hemera.errors import EngineError
from hemera.masks import deepliif, label_format
from hemera.masks.stain import stains as stain
from hemera.masks.stain.membranes import dab_classes
from hemera.masks.stain.segmentation import segment

WIDTH = 4
NETWORKS = ["G1", "G2", "G3", "G4", "G51", "G52", "G53", "G54", "G55"]


def options(folder: Path | None, **changes: object) -> MaskOptions:
    return MaskOptions(
        engines=("deepliif",),
        deepliif_model=None if folder is None else str(folder),
        **{"device": "cpu", "torch_threads": 1, **changes},
    )


@pytest.fixture(scope="session")
def raw_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a training directory of DeepLIIF: what its `save_options` and `define_G` make.

    The last layer of a segmentation is shifted to where cells are (little green, some red or
    blue), so that random weights give cells of both signs.
    """
    deepliif._package()
    from deepliif.models import networks
    from deepliif.options import save_options

    folder = tmp_path_factory.mktemp("models") / "raw"
    folder.mkdir()
    values = argparse.Namespace(
        checkpoints_dir=str(folder.parent),
        name=folder.name,
        phase="train",
        model="DeepLIIF",
        modalities_no=4,
        seg_gen=True,
        seg_no=1,
        input_no=1,
        input_nc=3,
        output_nc=3,
        ngf=WIDTH,
        netG="resnet_6blocks",
        net_gs="unet_64",
        norm="batch",
        no_dropout=True,
        init_type="normal",
        init_gain=0.02,
        padding="zero",
        upsample="convtranspose",
        gpu_ids=(),
        epoch="latest",
        load_iter=0,
        verbose=False,
        preprocess="none",
        remote_transfer_cmd=None,
        scale_size=512,
        continue_train=False,
    )
    torch.manual_seed(11)
    with contextlib.redirect_stdout(io.StringIO()):
        save_options(values)
        for name in NETWORKS:
            segments = len(name) == 3
            network = networks.define_G(
                3,
                3,
                WIDTH,
                values.net_gs if segments else values.netG,
                "batch",
                False,
                padding_type="reflect" if segments else "zero",
            )
            last = [m for m in network.modules() if isinstance(m, torch.nn.modules.conv._ConvNd)]
            outer = [m for m in last if m.out_channels == 3][-1]
            with torch.no_grad():
                outer.weight *= 60.0
                outer.bias.copy_(torch.tensor([-0.6, -1.5, -0.6] if segments else [0.0] * 3))
            torch.save(network.state_dict(), folder / f"latest_net_{name}.pth")
    return folder


@pytest.fixture(scope="session")
def model(raw_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same model as DeepLIIF's own `serialize` writes it."""
    import cli

    folder = tmp_path_factory.mktemp("serialized") / "model"
    original = cli.Options

    def small(*given: object, **named: object) -> object:
        # the package sets 64 whatever was trained
        made = original(*given, **named)
        made.ngf = WIDTH
        return made

    cli.Options = small
    try:
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            cli.serialize.callback(
                model_dir=str(raw_model),
                output_dir=str(folder),
                device="cpu",
                epoch="latest",
                verbose=0,
            )
    finally:
        cli.Options = original
    return folder


def tile(height: int = 200, width: int = 280, seed: int = 4) -> npt.NDArray[np.uint8]:
    """Return a tile with blobs of blue and brown on white."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    density = np.zeros((height, width, 3))
    for _ in range(40):
        cy, cx = rng.uniform(0, height), rng.uniform(0, width)
        dye = np.array(stain.HAEMATOXYLIN if rng.random() < 0.5 else stain.DAB)
        density += 0.6 * (np.hypot(y - cy, x - cx) < rng.uniform(5, 12))[..., None] * dye
    noise = rng.normal(0, 2, density.shape)
    return (245 * 10**-density + noise).round().clip(0, 255).astype(np.uint8)


STAINS = stain.Stains((245, 245, 245))


@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.92])
def test_labels_are_those_of_the_package(model: Path, mpp: float) -> None:
    from deepliif.models import infer_modalities
    from PIL import Image

    rgb = tile()
    loaded = deepliif.Model(options(model))
    found = loaded.segment(rgb, mpp, STAINS)
    with contextlib.redirect_stdout(io.StringIO()):
        images, scoring = infer_modalities(
            Image.fromarray(rgb), deepliif.tile_size(mpp), str(model), seg_weights=[0.2] * 5
        )
    refined = np.asarray(images["SegRefined"])
    classes = label_format.classes(found.mask)
    assert found.mask.shape == rgb.shape[:2]
    np.testing.assert_array_equal(classes == label_format.POSITIVE, refined[..., 0] == 255)
    np.testing.assert_array_equal(classes == label_format.NEGATIVE, refined[..., 2] == 255)
    # theirs is drawn three pixels wide, ours is the pixel around the cell
    assert ((refined[..., 1] == 255) | (classes != label_format.BOUNDARY)).all()
    assert len(found.cells) == scoring["num_total"] > 3
    assert found.cells.positive.sum() == scoring["num_pos"]
    np.testing.assert_array_equal(label_format.nuclei(found.mask), (classes == 1) | (classes == 2))


def test_both_signs_occur_and_cells_stand_where_the_mask_says(model: Path) -> None:
    found = deepliif.Model(options(model)).segment(tile(), 0.25, STAINS)
    classes = label_format.classes(found.mask)
    assert 0 < found.cells.positive.sum() < len(found.cells)
    from scipy import ndimage

    for sign, positive in ((label_format.POSITIVE, True), (label_format.NEGATIVE, False)):
        kept = (classes == sign) | (classes == label_format.BOUNDARY)
        pieces, count = ndimage.label(classes == sign, np.ones((3, 3)))
        centres = np.array(ndimage.center_of_mass(classes == sign, pieces, range(1, count + 1)))
        own = found.cells.positive == positive
        at = np.column_stack([found.cells.y_px[own], found.cells.x_px[own]]) - 0.5
        distance = np.hypot(*(at[:, None] - centres[None]).transpose(2, 0, 1)).min(axis=1)
        # the package makes a cell's first pixel boundary, which moves a centroid a little
        assert np.median(distance) < 0.5
        assert kept.any()


def test_intensity_is_that_of_the_membrane_engine(model: Path) -> None:
    rgb = tile()
    chosen = options(model)
    found = deepliif.Model(chosen).segment(rgb, 0.5, STAINS)
    classes, _ = dab_classes(stain.separate(rgb, STAINS), 0.5, STAINS, chosen)
    np.testing.assert_array_equal(label_format.intensity(found.mask), classes)
    assert len(np.unique(label_format.intensity(found.mask))) > 2


def test_raw_networks_answer_as_serialized_ones(raw_model: Path, model: Path) -> None:
    rgb = tile()
    raw, _ = deepliif.Model(options(raw_model)).infer(rgb, 0.25)
    serialized, _ = deepliif.Model(options(model)).infer(rgb, 0.25)
    assert np.abs(raw.astype(int) - serialized).max() <= 1
    assert raw.std() > 5


def batch(count: int, side: int = 128) -> torch.Tensor:
    """Return windows of very different brightness, as the networks take them."""
    from deepliif.data import transform
    from PIL import Image

    made = []
    for k in range(count):
        dimmed = (tile(side, side, seed=20 + k) * (1 - 0.3 * k)).astype(np.uint8)
        made.append(transform(Image.fromarray(dimmed)))
    return torch.cat(made)


def test_instance_normalisation_in_a_batch_is_batch_norm_one_by_one(raw_model: Path) -> None:
    """Every network, to 1e-4 of outputs from -1 to 1; BatchNorm on the batch is far from that."""
    single = deepliif.Model(options(raw_model))._networks
    together = deepliif.Model(options(raw_model, deepliif_batch=3))._networks
    seen = batch(3)
    assert sorted(single) == sorted(together) == NETWORKS
    mixed = []
    with torch.no_grad():
        for name in NETWORKS:
            kinds = {type(module).__name__ for module in together[name].modules()}
            assert "InstanceNorm2d" in kinds
            assert "BatchNorm2d" not in kinds
            one_by_one = torch.cat([single[name](seen[k : k + 1]) for k in range(3)])
            torch.testing.assert_close(together[name](seen), one_by_one, rtol=0, atol=1e-4)
            mixed.append(float((single[name](seen) - one_by_one).abs().max()))
            assert one_by_one.std() > 0.01
    assert min(mixed) > 0.02, mixed


def test_the_weights_of_batch_norm_are_kept() -> None:
    """Weights and offsets that are not one and zero, a network in a list, none without weights."""
    torch.manual_seed(3)
    norm, plain = torch.nn.BatchNorm2d(5), torch.nn.BatchNorm2d(5, eps=0.1, affine=False)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.uniform_(-1, 1)
    inner = torch.nn.Sequential(norm, torch.nn.ReLU(), plain)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), inner).train()
    seen = torch.rand(4, 3, 12, 17)
    expected = torch.cat([network(seen[k : k + 1]) for k in range(4)])
    deepliif.by_instance(network)
    torch.testing.assert_close(network(seen), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [2, 3])
def test_a_batch_gives_the_labels_of_one_by_one(raw_model: Path, size: int) -> None:
    """Four windows, of which one holds nothing: images to one gray level, and every cell."""
    rgb = tile(300, 470)
    rgb[:278, :278] = 240
    single = deepliif.Model(options(raw_model))
    together = deepliif.Model(options(raw_model, deepliif_batch=size))
    for first, second in zip(single.infer(rgb, 0.46), together.infer(rgb, 0.46), strict=True):
        assert first is not None
        assert second is not None
        assert np.abs(first.astype(int) - second).max() <= 1
    one, many = (model.segment(rgb, 0.46, STAINS) for model in (single, together))
    assert (one.mask != many.mask).mean() < 1e-3
    assert len(one.cells) == len(many.cells) > 3


def test_serialized_networks_are_never_batched(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rgb = tile(200, 300)
    asked = deepliif.Model(options(model, deepliif_batch=4))
    assert asked._batch == 1
    assert "serialized networks, which are never batched" in caplog.text
    expected = deepliif.Model(options(model)).infer(rgb, 0.46)
    for first, second in zip(asked.infer(rgb, 0.46), expected, strict=True):
        np.testing.assert_array_equal(first, second)


def test_no_window_is_looked_at_twice_and_the_images_are_those_of_the_package(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tile of 512 px at 0.46 um/px: the package comes to nine windows, which are four."""
    from deepliif.models import inference
    from PIL import Image

    rgb = tile(512, 512)
    loaded = deepliif.Model(options(model))
    size = deepliif.tile_size(0.46)
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = inference(
            Image.fromarray(rgb), size, size // 16, str(model), seg_only=True, seg_weights=[0.2] * 5
        )
    calls = []
    real = loaded._package.run_wrapper

    def counted(*given: object, **named: object) -> object:
        calls.append(given)
        return real(*given, **named)

    monkeypatch.setattr(loaded._package, "run_wrapper", counted)
    seg, marker = loaded.infer(rgb, 0.46)
    assert len(calls) == 4
    np.testing.assert_array_equal(seg, np.asarray(theirs["Seg"]))
    (name,) = (key for key in theirs if key.endswith("Marker"))
    assert marker is not None
    np.testing.assert_array_equal(marker, np.asarray(theirs[name]))


def test_a_model_that_names_no_marker_has_cells_and_no_marker_threshold(
    model: Path, tmp_path: Path
) -> None:
    """Newer training writes an empty list of names unless told otherwise."""
    folder = copied(model, tmp_path)
    with (folder / "train_opt.txt").open("a") as file:
        file.write("\n            modalities_names: []\n")
    loaded = deepliif.Model(options(folder))
    expected = deepliif.Model(options(model)).segment(tile(), 0.5, STAINS)
    np.testing.assert_array_equal(loaded.segment(tile(), 0.5, STAINS).mask, expected.mask)
    with pytest.raises(EngineError, match=r"deepliif_marker: 30, and .* names no modality Marker"):
        deepliif.Model(options(folder, deepliif_marker=30))


def test_weights_and_thresholds_reach_the_package(model: Path) -> None:
    rgb = tile()
    default = deepliif.Model(options(model))
    seg, _ = default.infer(rgb, 0.25)
    weighted = deepliif.Model(options(model, deepliif_seg_weights=(0.5, 0.0, 0.0, 0.0, 0.5)))
    assert (weighted.infer(rgb, 0.25)[0] != seg).any()
    base = default.segment(rgb, 0.25, STAINS)
    strict = deepliif.Model(options(model, deepliif_threshold=200, deepliif_size_px=0))
    loose = deepliif.Model(options(model, deepliif_threshold=120, deepliif_size_px=0))
    fewer, more = (label_format.nuclei(m.segment(rgb, 0.25, STAINS).mask) for m in (strict, loose))
    assert 0 < fewer.sum() < more.sum()
    large = deepliif.Model(options(model, deepliif_size_px=400)).segment(rgb, 0.25, STAINS)
    assert 0 < len(large.cells) < len(base.cells)
    assert large.cells.area_px.min() > 400 >= base.cells.area_px.min()
    every = deepliif.Model(options(model, deepliif_marker=0)).segment(rgb, 0.25, STAINS)
    assert every.cells.positive.all()


@pytest.mark.parametrize("value", [0, 178, 255])
def test_a_tile_of_one_colour_is_blank(model: Path, value: int) -> None:
    found = deepliif.Model(options(model)).segment(
        np.full((60, 90, 3), value, np.uint8), 0.5, STAINS
    )
    assert found.note == "blank"
    assert not found.mask.any()
    assert found.mask.shape == (60, 90)
    assert len(found.cells) == 0


def test_blank_is_what_the_package_calls_empty() -> None:
    deepliif._package()
    from deepliif.models import is_empty
    from PIL import Image

    rng = np.random.default_rng(1)
    for spread in (0.5, 2.0, 2.9, 3.3, 6.0):
        rgb = (170 + rng.normal(0, spread, (70, 90, 1)) * np.ones(3)).round().astype(np.uint8)
        assert deepliif.is_blank(rgb) == is_empty(Image.fromarray(rgb)), spread


@pytest.mark.parametrize(
    ("mpp", "size", "name"),
    [(0.25, 512, "40x"), (0.5, 256, "20x"), (0.92, 139, "10x"), (1.0, 128, "10x")],
)
def test_tile_size_follows_the_magnification(mpp: float, size: int, name: str) -> None:
    assert deepliif.tile_size(mpp) == size
    assert deepliif.resolution(size) == name


def copied(folder: Path, into: Path) -> Path:
    target = into / "copy"
    shutil.copytree(folder, target)
    return target


def test_weights_are_held_to_their_digest_before_they_are_loaded(
    model: Path, tmp_path: Path
) -> None:
    """The digest is that of `sha256sum *.pt *_opt.txt | sha256sum`: networks, then options."""
    folder = copied(model, tmp_path / "a")
    names = [*sorted(path.name for path in folder.glob("*.pt")), "train_opt.txt"]
    lines = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    right = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert deepliif.digest(folder) == right
    deepliif.check_digest(folder, right.upper())
    assert deepliif.Model(options(folder, deepliif_sha256=right)).sha256 == right
    for name in (names[0], "train_opt.txt"):
        other = copied(folder, tmp_path / name)
        if name == "train_opt.txt":
            (other / name).write_text((other / name).read_text() + "\nepoch: other\n")
        else:
            shutil.copy(other / "G2.pt", other / name)
        with pytest.raises(EngineError, match=f"deepliif_sha256 is {right}; unpack Zenodo record"):
            deepliif.Model(options(other, deepliif_sha256=right))


def test_what_is_missing_is_named(model: Path, raw_model: Path, tmp_path: Path) -> None:
    folder = copied(model, tmp_path / "a")
    (folder / "G52.pt").unlink()
    (folder / "train_opt.txt").unlink()
    with pytest.raises(EngineError, match=r"lacks G52\.pt, train_opt\.txt; .*4751737"):
        deepliif.Model(options(folder))
    folder = copied(raw_model, tmp_path / "b")
    (folder / "latest_net_G3.pth").unlink()
    with pytest.raises(EngineError, match=r"lacks latest_net_G3\.pth; "):
        deepliif.Model(options(folder))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(EngineError, match=r"lacks G1\.pt, .*G55\.pt, train_opt\.txt"):
        deepliif.Model(options(empty))
    with pytest.raises(EngineError, match="nowhere is no directory"):
        deepliif.Model(options(tmp_path / "nowhere"))
    with pytest.raises(EngineError, match=r"not given; .*4751737.*index\.target stain"):
        deepliif.Model(options(None))


@pytest.mark.parametrize("kind", ["raw", "serialized"])
def test_a_wrong_file_is_an_error(model: Path, raw_model: Path, tmp_path: Path, kind: str) -> None:
    folder = copied(raw_model if kind == "raw" else model, tmp_path)
    (folder / ("latest_net_G4.pth" if kind == "raw" else "G4.pt")).write_bytes(b"not a network")
    with pytest.raises(EngineError, match="not a DeepLIIF model that can be loaded"):
        deepliif.Model(options(folder))


def test_networks_that_load_and_cannot_be_run_are_an_error(model: Path, tmp_path: Path) -> None:
    """TorchScript of something else under the name of a network."""
    folder = copied(model, tmp_path)
    torch.jit.script(torch.nn.Sequential(torch.nn.Linear(7, 2))).save(folder / "G4.pt")
    loaded = deepliif.Model(options(folder))
    with pytest.raises(EngineError, match=r"cannot be run on a tile \(.+\); unpack Zenodo record"):
        loaded.segment(tile(), 0.5, STAINS)


def test_raw_weights_of_another_network_are_an_error(raw_model: Path, tmp_path: Path) -> None:
    folder = copied(raw_model, tmp_path)
    shutil.copy(folder / "latest_net_G51.pth", folder / "latest_net_G2.pth")
    with pytest.raises(EngineError, match="not a DeepLIIF model that can be loaded"):
        deepliif.Model(options(folder))


def test_a_package_that_cannot_be_imported_is_an_error(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepliif", None)
    with pytest.raises(EngineError, match=r"deepliif: the package cannot be imported .*\[stain\]"):
        deepliif.Model(options(model))


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("environment", [None, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def test_a_pickle_that_wants_to_run_code_does_not(
    raw_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    if environment is not None:
        monkeypatch.setenv(environment, "1")
    before = dict(os.environ)
    folder = copied(raw_model, tmp_path)
    with (folder / "latest_net_G1.pth").open("wb") as file:
        pickle.dump(Payload(), file)
    with pytest.raises(EngineError, match="not a DeepLIIF model that can be loaded"):
        deepliif.Model(options(folder))
    assert not (tmp_path / "ran").exists()
    assert dict(os.environ) == before


HOSTILE = [
    "__import__('os').mkdir('ran')",
    '\'__import__("os").mkdir("ran")\'',
    "[x for x in (1, 2)]",
    "__imp[default: no]ort__('os').mkdir('ran')",
    # Strings that Python joins, or adds, before the package evaluates them once more.
    "'__import__(\"os\")' '.mkdir(\"ran\")'",
    "'__import__(\"os\").' + 'mkdir(\"ran\")'",
    'b\'__import__("os").mkdir("ran")\'',
    # No default value to the package, which looks for the first bracket.
    "[0,[default for default in [__import__('os').mkdir('ran')]]]",
    # These part lines for `str.splitlines`, and are space or nothing to Python.
    *(f"__import__{line}('os').mkdir('ran')" for line in "\x0c"),
    *(f"[0,{line}__import__('os').mkdir('ran')]" for line in "\x0c"),
    *(f"'{line}' + str(__import__('os').mkdir('ran'))" for line in "\x0b\x1c\x85\u2028"),
    "-" * 100_000 + "1",
]


@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
def test_options_that_want_to_run_code_do_not(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    """They are refused; and were one not seen, nothing would evaluate it."""
    monkeypatch.chdir(tmp_path)
    folder = copied(model, tmp_path)
    with (folder / "train_opt.txt").open("a", encoding="utf-8") as file:
        file.write(f"\n            sneaky: {value}\n")
    with pytest.raises(EngineError, match="the value of sneaky is code"):
        deepliif.Model(options(folder))
    monkeypatch.setattr(deepliif, "_is_plain", lambda value: True)
    monkeypatch.setattr(deepliif, "_VALUE_LENGTH", 10**6)
    deepliif._package_options(deepliif._package()[0], folder)
    assert not (tmp_path / "ran").exists()


def test_options_are_read_as_the_package_writes_and_reads_them(model: Path, tmp_path: Path) -> None:
    """Plain values of every kind, with and without the default that training notes beside them."""
    from deepliif.options import read_model_params

    folder = copied(model, tmp_path)
    (folder / "train_opt.txt").write_text(
        "----- Options -----\nmodel: DeepLIIF   \t[default: SDG]\nlr: 0.0002\nngf:64\n"
        "gpu_ids: (0, 1)\nflag: True\nnothing: None\nwhere: a/b.c [default: [x]\nbeta1: -1e-4\n"
        "dataroot: C:\\data: two (copy)\nempty: \nnames: ['IHC', 'Marker']\nmodalities_no: 4\r\n"
    )
    found = deepliif.read_options(folder)
    theirs = read_model_params(folder / "train_opt.txt")
    assert found == theirs
    assert found["gpu_ids"] == (0, 1)
    assert found["model"] == "DeepLIIF"
    assert found["dataroot"] == "C:\\data: two (copy)"
    made = deepliif._package_options(deepliif._package()[0], model)
    plain = deepliif._package()[0].get_opt.__wrapped__(str(model))
    differing = {name for name in vars(plain) if getattr(made, name) != getattr(plain, name)}
    assert differing == {"ngf"}, "which the package sets to 64 whatever was trained"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("modalities_names: ['Marker', 'IHC', 'Hema', 'DAPI', 'Lap2']", "Marker is not the last"),
        ("modalities_names: ['IHC', 'Hema', 'Marker', 'DAPI']", "Marker is not the last"),
        ("modalities_names: {'Marker': 1}", "no list of names"),
        ("modalities_names: None", "no list of names"),
        ("epoch: ../other/latest", "epoch is no name of a file"),
        ("ngf: 0", "ngf is 0"),
        ("ngf: 99999999999", "ngf is 99999999999"),
        ("modalities_no: 4.0", r"a model of 4\.0 modalities"),
        ("input_no: 2", "more images than one"),
        ("seg_gen: False", "without DeepLIIF's segmentation"),
    ],
)
def test_options_of_no_published_model_are_refused_before_anything_is_loaded(
    raw_model: Path, tmp_path: Path, line: str, reason: str
) -> None:
    folder = copied(raw_model, tmp_path)
    with (folder / "train_opt.txt").open("a") as file:
        file.write(f"\n{line}\n")
    with pytest.raises(EngineError, match=reason):
        deepliif.check_model(folder)


def test_what_is_no_file_or_not_whole_is_refused_before_anything_is_loaded(
    model: Path, raw_model: Path, tmp_path: Path
) -> None:
    cut = copied(model, tmp_path / "cut")
    (cut / "G51.pt").write_bytes((cut / "G51.pt").read_bytes()[:-500])
    empty = copied(model, tmp_path / "empty")
    (empty / "G51.pt").write_bytes(b"")
    other = copied(raw_model, tmp_path / "other")
    (other / "latest_net_G51.pth").unlink()
    (other / "latest_net_G51.pth").mkdir()
    for folder in (cut, empty, other):
        with pytest.raises(EngineError, match=r"\(\w*G51\.pth? is no network, or not whole\); "):
            deepliif.check_model(folder)
        with pytest.raises(EngineError, match="is no network"):
            deepliif.Model(options(folder, deepliif_sha256="0" * 64))


class Two(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 3, 1)

    def forward(self, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return seen, self.layer(seen)


class Cut(Two):
    def forward(self, seen: torch.Tensor) -> torch.Tensor:
        return self.layer(seen)[:, :, :7, :9]


@pytest.mark.parametrize("name", ["G4", "G51", "G55"])
@pytest.mark.parametrize("kind", [Two, Cut])
def test_a_network_that_answers_with_no_image_is_an_error(
    model: Path, tmp_path: Path, name: str, kind: type[torch.nn.Module]
) -> None:
    folder = copied(model, tmp_path)
    torch.jit.script(kind()).save(folder / f"{name}.pt")
    with pytest.raises(EngineError, match=f"{name} does not answer with an image of the size"):
        deepliif.Model(options(folder)).infer(tile(), 0.5)


def test_a_network_without_weights_is_an_error(model: Path, tmp_path: Path) -> None:
    folder = copied(model, tmp_path)
    torch.jit.script(torch.nn.ReLU()).save(folder / "G3.pt")
    with pytest.raises(EngineError, match=r"\(G3 has no weights\); unpack"):
        deepliif.Model(options(folder))


@pytest.mark.parametrize("batched", [1, 3])
def test_weights_that_are_no_numbers_are_an_error_and_no_empty_mask(
    raw_model: Path, tmp_path: Path, batched: int
) -> None:
    folder = copied(raw_model, tmp_path)
    path = folder / "latest_net_G51.pth"
    state = torch.load(path)
    state = {k: v * float("nan") if v.is_floating_point() else v for k, v in state.items()}
    torch.save(state, path)
    loaded = deepliif.Model(options(folder, deepliif_batch=batched))
    with pytest.raises(EngineError, match="G51 answers with values that are no numbers"):
        loaded.segment(tile(), 0.5, STAINS)


def test_a_model_of_another_kind_is_refused(model: Path, tmp_path: Path) -> None:
    folder = copied(model, tmp_path)
    path = folder / "train_opt.txt"
    path.write_text(path.read_text().replace("model: DeepLIIF ", "model: CycleGAN "))
    with pytest.raises(EngineError, match="kind CycleGAN"):
        deepliif.Model(options(folder))


def test_a_gpu_that_is_not_there_is_an_error(model: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(EngineError, match=r"mask\.device: cuda"):
        deepliif.Model(options(model, device="cuda"))


@pytest.fixture
def other_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DEEPLIIF_MODEL_DIR", "/nowhere")
    yield


@pytest.mark.usefixtures("other_folder")
def test_the_environment_does_not_choose_the_model(model: Path) -> None:
    assert len(deepliif.Model(options(model)).segment(tile(), 0.5, STAINS).cells)


def test_the_stage_runs_every_engine_in_the_order_of_the_options(
    model: Path, tmp_path: Path
) -> None:
    from hemera import tables
    from hemera.dataset import shards
    from hemera.imaging import codecs
    from hemera.stages import mask

    rows = []
    pictures = {"t_1": tile(seed=1), "t_2": np.full((64, 90, 3), 230, np.uint8)}
    with shards.ShardWriter(tmp_path / "tiles.tar") as writer:
        for name, rgb in pictures.items():
            offset, length = writer.add(f"{name}.her2.png", codecs.encode(rgb, "png"))
            row: dict[str, object] = {field.name: 0 for field in tables.TILE}
            row |= {"tile": name, "pair": "t", "mpp": 0.5, "shard": "tile/tiles.tar"}
            row |= {"he_sha256": "", "her2_sha256": ""}
            rows.append(row | {"her2_offset": offset, "her2_length": length})
    tables.write(tmp_path / "tiles.parquet", rows, tables.TILE)
    chosen = options(model).replace(engines=("stain", "deepliif"))
    mask.run(
        tiles=tmp_path / "tiles.parquet",
        tile_shard=tmp_path / "tiles.tar",
        shard=tmp_path / "mask.tar",
        masks=tmp_path / "mask.parquet",
        cells=tmp_path / "cells.parquet",
        options=chosen,
    )
    found = tables.read(tmp_path / "mask.parquet", tables.MASK).to_pylist()
    assert [(row["tile"], row["engine"], row["note"]) for row in found] == [
        ("t_1", "stain", None),
        ("t_1", "deepliif", None),
        ("t_2", "stain", None),
        ("t_2", "deepliif", "blank"),
    ]
    stains = stain.estimate(list(pictures.values()), 0.5)
    expected = deepliif.Model(chosen).segment(pictures["t_1"], 0.5, stains)
    image = codecs.decode_mask(
        shards.read_member(tmp_path / "mask.tar", found[1]["offset"], found[1]["length"])
    )
    np.testing.assert_array_equal(image, expected.mask)
    assert found[1]["cells"] == len(expected.cells) > 0
    other = segment(pictures["t_1"], 0.5, stains, chosen)
    first, second = label_format.positive(other.mask), label_format.positive(expected.mask)
    for row in found[:2]:
        overlap = 2 * (first & second).sum() / (first.sum() + second.sum())
        assert row["agreement_dice"] == pytest.approx(overlap)
        assert 0 <= row["agreement_cells"] <= min(len(other.cells), len(expected.cells))
        assert (row["agreement_sign"] is None) == (row["agreement_cells"] == 0)
    for row in found[2:]:
        assert row["agreement_cells"] == 0, "a blank tile has no cell to match"
    assert tables.read_metadata(tmp_path / "mask.parquet")["deepliif_sha256"] == deepliif.digest(
        model
    ), "a table says which weights made it"
    cells = tables.read(tmp_path / "cells.parquet", tables.CELLS).to_pylist()
    assert sum(row["engine"] == "deepliif" for row in cells) == len(expected.cells)
