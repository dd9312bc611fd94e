"""What a model directory must contain, its digest, and its options, without loading anything."""

import hashlib
from pathlib import Path

import pytest

from hemera.errors import EngineError
from hemera.masks.deepliif import Options, model_files, requirements, versions
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
    assert missing.endswith("run without it: preset no_weights, with the engine stain")


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
            versions(Options(model=str(other), sha256=right))


def test_truncated_networks_are_refused(model: Path, tmp_path: Path) -> None:
    for length in (0, 500):
        folder = copied(model, tmp_path / str(length))
        (folder / "G51.pt").write_bytes((folder / "G51.pt").read_bytes()[:length])
        with pytest.raises(EngineError, match=r": G51\.pt is not a network, or truncated; "):
            model_files.check_model(str(folder))
