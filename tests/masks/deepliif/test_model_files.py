"""What a model directory must contain, its digest, and its options, without loading anything."""

import hashlib
import shutil
from pathlib import Path

import pytest

from hemera.errors import EngineError
from hemera.masks.deepliif import Options, model_files, requirements, versions
from hemera.masks.deepliif.engine import import_deepliif
from tests.masks.deepliif.test_engine import copied


def test_a_complete_model_lacks_nothing(model: Path, raw_model: Path) -> None:
    for folder, raw in ((model, False), (raw_model, True)):
        assert requirements(Options(model=str(folder))) == []
        assert model_files.check_model(str(folder)) == (folder, raw)


def test_missing_files_are_named_with_their_source(
    model: Path, raw_model: Path, tmp_path: Path
) -> None:
    incomplete = copied(model, tmp_path / "a")
    (incomplete / "G52.pt").unlink()
    (incomplete / "train_opt.txt").unlink()
    raw = copied(raw_model, tmp_path / "b")
    (raw / "latest_net_G3.pth").unlink()
    (tmp_path / "empty").mkdir()
    for folder, words in (
        (incomplete, "lacks G52.pt, train_opt.txt; unpack Zenodo record 4751737"),
        (raw, "lacks latest_net_G3.pth; "),
        (tmp_path / "empty", "lacks G1.pt, G2.pt"),
        (tmp_path / "nowhere", "nowhere is not a directory; unpack"),
    ):
        (missing,) = requirements(Options(model=str(folder)))
        assert words in missing
    (missing,) = requirements(Options())
    assert missing.startswith("mask.engines.deepliif.model: not given; download Zenodo record")
    assert missing.endswith("run without it: mask.engines {stain: {}} and index.target stain")


def test_the_digest_is_that_of_sha256sum(model: Path, tmp_path: Path) -> None:
    """`sha256sum *.pt *_opt.txt | sha256sum`: networks, then options."""
    names = [*sorted(path.name for path in model.glob("*.pt")), "train_opt.txt"]
    lines = [f"{hashlib.sha256((model / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    right = hashlib.sha256("".join(lines).encode()).hexdigest()
    options = Options(model=str(model), sha256=right.upper())
    assert versions(options) == {"deepliif_sha256": right}
    for name in (names[0], "train_opt.txt"):
        other = copied(model, tmp_path / name)
        with (other / name).open("ab") as file:
            file.write(b"\n")
        with pytest.raises(EngineError, match=f"sha256 is {right}; unpack Zenodo record"):
            model_files.check_digest(other, right)


def test_options_are_read_as_the_package_reads_them(tmp_path: Path) -> None:
    """Plain values of every kind, with and without the default that training notes beside them."""
    import_deepliif()
    from deepliif.options import read_model_params

    (tmp_path / "train_opt.txt").write_text(
        "----- Options -----\nmodel: DeepLIIF   \t[default: SDG]\nlr: 0.0002\nngf:64\n"
        "gpu_ids: (0, 1)\nflag: True\nnothing: None\nwhere: a/b.c [default: [x]\nbeta1: -1e-4\n"
        "dataroot: C:\\data: two (copy)\nempty: \nnames: ['IHC', 'Marker']\nmodalities_no: 4\r\n"
    )
    found = model_files.read_options(tmp_path)
    assert found == read_model_params(tmp_path / "train_opt.txt")
    assert found["gpu_ids"] == (0, 1)
    assert found["model"] == "DeepLIIF"
    assert found["dataroot"] == "C:\\data: two (copy)"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("modalities_names: ['Marker', 'IHC', 'Hema', 'DAPI', 'Lap2']", "Marker is not the last"),
        ("modalities_names: {'Marker': 1}", "not a list of names"),
        ("modalities_names: None", "not a list of names"),
        ("epoch: ../other/latest", "epoch is not valid in a file name"),
        ("modalities_no: 3", r"has 3 modalities"),
        ("input_no: 2", "more than one input image"),
        ("seg_gen: False", "has no segmentation"),
        ("model: CycleGAN", "its kind is CycleGAN"),
    ],
)
def test_options_of_another_model_are_refused(
    raw_model: Path, tmp_path: Path, line: str, reason: str
) -> None:
    folder = copied(raw_model, tmp_path)
    with (folder / "train_opt.txt").open("a") as file:
        file.write(f"\n{line}\n")
    with pytest.raises(EngineError, match=reason):
        model_files.check_model(str(folder))


def test_files_that_are_no_networks_or_not_whole_are_refused(
    model: Path, raw_model: Path, tmp_path: Path
) -> None:
    cut, empty, other = (
        copied(folder, tmp_path / str(k)) for k, folder in enumerate((model, model, raw_model))
    )
    (cut / "G51.pt").write_bytes((cut / "G51.pt").read_bytes()[:-500])
    (empty / "G51.pt").write_bytes(b"")
    (other / "latest_net_G51.pth").unlink()
    shutil.copytree(tmp_path / "0", other / "latest_net_G51.pth")
    for folder in (cut, empty, other):
        with pytest.raises(EngineError, match=r"\(\w*G51\.pth? is not a network, or truncated\); "):
            model_files.check_model(str(folder))


def test_an_options_file_that_is_no_text_is_refused(model: Path, tmp_path: Path) -> None:
    folder = copied(model, tmp_path)
    (folder / "train_opt.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(EngineError, match="not a text file"):
        model_files.check_model(str(folder))
