"""hemera doctor: one line per fact, an exit code that says whether the configured graph can run."""

import importlib.metadata
from pathlib import Path

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
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing")]
    assert "mask engine deepliif" in line
    assert "4751737" in line or "deepliif_model" in line, "where its weights come from"


def test_a_model_folder_that_is_incomplete(tmp_path: Path) -> None:
    config = load({"mask": {"deepliif_model": str(tmp_path)}})
    assert any(mark == "missing" and "deepliif" in line for mark, line in doctor.facts(config))


def test_encoder_weights(tmp_path: Path) -> None:
    def found(weights: Path) -> str:
        config = load({"train_segmentation": {"encoder_weights": str(weights)}})
        (mark,) = [mark for mark, line in doctor.facts(config) if str(weights) in line]
        return mark

    (tmp_path / "resnet34.pth").write_bytes(b"x")
    assert found(tmp_path / "resnet34.pth") == "ok"
    assert found(tmp_path / "no.pth") == "missing"


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
