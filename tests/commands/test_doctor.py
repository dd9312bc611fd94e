"""hemera doctor: one line per fact, an exit code that says whether the configured graph can run."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hemera.__main__ import main
from hemera.commands import doctor
from hemera.config import Config, MaskOptions, load
from hemera.masks.deepliif import model_files


def marks(text: str) -> dict[str, str]:
    """The mark of each line by what stands before the first colon or digit."""
    found = {}
    for line in text.splitlines():
        mark, words = line.split(maxsplit=1)
        assert mark in ("ok", "absent", "missing"), line
        found[words] = mark
    return found


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("preset: demo\n")
    return path


def test_the_demo_can_run_here(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--configfile", str(demo)]) == 0
    found = marks(capsys.readouterr().out)
    assert "missing" not in found.values()
    assert found["mask engine stain"] == "ok"
    assert not any("deepliif" in line for line in found), "the config does not use it"
    assert any(line.startswith("Python 3.11") for line in found)


def engine_line(config: Config, name: str) -> tuple[str, str]:
    (fact,) = [fact for fact in doctor.facts(config) if fact[1].startswith(f"mask engine {name}")]
    return fact


def test_deepliif_without_its_model_is_missing_where_it_is_configured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("preset: hemera\n")
    assert main(["doctor", "--configfile", str(path)]) == 1
    found = capsys.readouterr().out
    assert "missing mask engine deepliif: mask.engines.deepliif.model: not given" in found


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


def test_a_whole_model_is_shown_with_its_digest(model: Path) -> None:
    def line(**options: object) -> tuple[str, str]:
        engines = {"deepliif": {"model": str(model), **options}}
        return engine_line(load({"mask": {"engines": engines}}), "deepliif")

    digest = model_files.digest(model)
    assert line() == ("ok", f"mask engine deepliif deepliif_sha256 {digest}")
    assert line(sha256=digest) == line()
    mark, text = line(sha256="0" * 64)
    assert mark == "missing"
    assert digest in text


def test_a_file_that_is_no_model_of_nuclei_is_missing(tmp_path: Path) -> None:
    for name, reason in (
        ("other.safetensors", "cannot be read"),
        ("other.pt", "not a TorchScript model"),
    ):
        path = tmp_path / name
        path.write_bytes(b"not a model")
        engines = {"stain": {"nuclei": str(path)}}
        config = load({"mask": {"engines": engines}, "index": {"target": "stain"}})
        mark, text = engine_line(config, "stain")
        assert mark == "missing"
        # InstanSeg is an extra.
        assert reason in text or "instanseg" in text
        assert config.options(MaskOptions).files() == [str(path)]
    assert load({}).options(MaskOptions).files() == []


def test_what_cannot_be_imported_is_missing_without_a_traceback(demo: Path) -> None:
    """In a process of its own, where nothing has imported it."""
    code = (
        "import sys; sys.modules['torch'] = None; from hemera.__main__ import main;"
        f"sys.exit(main(['doctor', '--configfile', {str(demo)!r}]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    lines = [line for line in found.stdout.splitlines() if line.startswith("missing")]
    assert any("torch" in line and "install requirements.lock" in line for line in lines)


@pytest.mark.parametrize("given", ["imagenet", "own.pth"])
def test_weights_of_the_encoder_are_missing_until_their_file_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    files = {
        "imagenet": tmp_path / "hub" / "checkpoints" / "resnet34-b627a593.pth",
        "own.pth": tmp_path / "own.pth",
    }
    weights = "imagenet" if given == "imagenet" else str(files[given])
    config = load({"train_segmentation": {"encoder_weights": weights}})

    def missing() -> bool:
        return any(str(files[given]) in line for mark, line in doctor.facts(config) if mark != "ok")

    assert missing()
    files[given].parent.mkdir(parents=True, exist_ok=True)
    files[given].write_bytes(b"x")
    assert not missing()
