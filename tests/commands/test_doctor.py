"""hemera doctor: one line per fact, an exit code that says whether the configured graph can run."""

import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from hemera.__main__ import main
from hemera.commands import doctor
from hemera.config import load


def marks(text: str) -> dict[str, str]:
    """The mark of each line by what stands before the first colon or digit."""
    found = {}
    for line in text.splitlines():
        mark, words = line.split(maxsplit=1)
        assert mark in ("ok", "absent", "missing"), line
        found[words] = mark
    return found


def test_the_demo_can_run_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("preset: demo\n")
    assert main(["doctor", "--configfile", str(path)]) == 0
    found = marks(capsys.readouterr().out)
    assert "missing" not in found.values()
    assert found["mask engine stain"] == "ok"
    assert any(line.startswith("mask engine deepliif:") for line in found)
    assert any(line.startswith("Python 3.11") for line in found)


def test_deepliif_without_its_model_is_missing_where_it_is_wanted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("preset: hemera\n")
    assert main(["doctor", "--configfile", str(path)]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing")]
    (line,) = [line for line in lines if "encoder_weights" not in line]
    assert "mask engine deepliif" in line
    assert "4751737" in line or "deepliif_model" in line, "where its weights come from"


def test_a_model_folder_that_is_incomplete(tmp_path: Path) -> None:
    config = load({"mask": {"deepliif_model": str(tmp_path)}})
    assert any(mark == "missing" and "deepliif" in line for mark, line in doctor.facts(config))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a folder that looks like a serialized model, which is all that is read of it."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("G1", "G2", "G3", "G4", "G51", "G52", "G53", "G54", "G55"):
        with zipfile.ZipFile(folder / f"{name}.pt", "w") as archive:
            archive.writestr("data", name)
    (folder / "train_opt.txt").write_text("model: DeepLIIF\nmodalities_no: 4\nngf: 64\n")
    return folder


def deepliif_lines(values: dict[str, Any] | None = None, **mask: object) -> list[tuple[str, str]]:
    config = load(values or {"mask": mask})
    return [fact for fact in doctor.facts(config) if "deepliif" in fact[1].split(" (")[0]][1:]


def test_a_whole_model_is_told_by_its_record_and_its_digest(model: Path) -> None:
    """The digest is what `sha256sum *.pt *_opt.txt | sha256sum` prints in the folder."""
    lines = "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in [*sorted(model.glob("*.pt")), model / "train_opt.txt"]
    )
    digest = hashlib.sha256(lines.encode()).hexdigest()
    first, second = deepliif_lines(deepliif_model=str(model))
    assert first[0] == second[0] == "ok"
    assert f"serialized networks in {model}" in first[1]
    assert "Zenodo record 4751737" in first[1]
    assert f"mask.deepliif_sha256: {digest} (not asked for" in second[1]
    asked = deepliif_lines(deepliif_model=str(model), deepliif_sha256=digest.upper())
    assert asked[1] == ("ok", f"mask.deepliif_sha256: {digest}, as asked for")
    shutil.copy(model / "G1.pt", model / "G3.pt")
    mark, line = deepliif_lines(deepliif_model=str(model), deepliif_sha256=digest)[1]
    assert mark == "missing"
    assert f"{digest} is asked for; unpack Zenodo record" in line


def test_an_incomplete_model_names_what_it_lacks(model: Path) -> None:
    (model / "G55.pt").unlink()
    ((mark, line),) = deepliif_lines(deepliif_model=str(model))
    assert mark == "missing"
    assert "lacks G55.pt" in line
    values = {"mask": {"deepliif_model": str(model), "engines": ["stain"]}}
    values["index"] = {"target": "stain"}
    ((mark, line),) = deepliif_lines(values)
    assert mark == "absent", "what is not wanted keeps nothing from running"


def test_a_package_that_cannot_be_imported_is_missing(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepliif", None)
    ((mark, line),) = deepliif_lines(deepliif_model=str(model))
    assert mark == "missing"
    assert "cannot be imported" in line


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("G52.pt", b"", "G52.pt is no network, or not whole"),
        ("G52.pt", b"PK\3\4 and then nothing", "G52.pt is no network, or not whole"),
        ("train_opt.txt", b"model: CycleGAN\nmodalities_no: 4\n", "kind CycleGAN"),
        ("train_opt.txt", b"model: DeepLIIF\nmodalities_no: 3\n", "a model of 3 modalities"),
        ("train_opt.txt", b"x: print('a' + 'b')\n", "the value of x is code"),
        ("train_opt.txt", b"\xff\xfe", "not a text file"),
    ],
)
def test_a_model_that_could_not_be_loaded_is_missing(
    model: Path, name: str, content: bytes, words: str
) -> None:
    (model / name).write_bytes(content)
    ((mark, line),) = deepliif_lines(deepliif_model=str(model))
    assert mark == "missing"
    assert words in line


@pytest.mark.parametrize("package", ["torch", "skimage"])
def test_what_cannot_be_imported_is_said_and_no_traceback(tmp_path: Path, package: str) -> None:
    """In a process of its own, where nothing has imported it."""
    path = tmp_path / "config.yaml"
    path.write_text("preset: demo\n")
    code = (
        f"import sys; sys.modules['{package}'] = None; from hemera.__main__ import main;"
        f"sys.exit(main(['doctor', '--configfile', {str(path)!r}]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    lines = [line for line in found.stdout.splitlines() if line.startswith("missing")]
    assert any(package in line and "install requirements.lock" in line for line in lines)


def test_a_gpu_that_is_asked_for_and_not_there(model: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    config = load({"mask": {"deepliif_model": str(model), "device": "cuda"}})
    assert ("missing", "mask.device: cuda, and PyTorch sees no GPU; set auto or cpu") in list(
        doctor.facts(config)
    )


def test_encoder_weights(tmp_path: Path) -> None:
    def found(weights: Path) -> str:
        config = load({"train_segmentation": {"encoder_weights": str(weights)}})
        (mark,) = [mark for mark, line in doctor.facts(config) if str(weights) in line]
        return mark

    (tmp_path / "resnet34.pth").write_bytes(b"x")
    assert found(tmp_path / "resnet34.pth") == "ok"
    assert found(tmp_path / "no.pth") == "missing"


def test_imagenet_is_looked_for_where_torch_keeps_what_it_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    config = load({"train_segmentation": {"encoder_weights": "imagenet"}})
    *_, (mark, line) = doctor.facts(config)
    assert mark == "missing"
    assert "resnet34" in line and "download it once" in line
    from hemera.stages.train_segmentation import IMAGENET

    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / IMAGENET).write_bytes(b"x")
    *_, (mark, line) = doctor.facts(config)
    assert (mark, IMAGENET in line) == ("ok", True)


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(package: str) -> str:
        if package == "deeperhistreg":
            raise importlib.metadata.PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    lines = dict((line, mark) for mark, line in doctor.facts(load({"preset": "demo"})))
    (line,) = [line for line, mark in lines.items() if mark == "missing"]
    assert line.startswith("deeperhistreg: not installed; ")


def test_a_faulty_config(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["doctor", "--configfile", str(tmp_path / "no.yaml")]) == 1
    assert "no such file" in caplog.text
