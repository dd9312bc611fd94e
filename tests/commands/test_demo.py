"""hemera demo: the command writes what the library writes, where the sheet says."""

from pathlib import Path

import pytest

from hemera.__main__ import main
from hemera.demo import sheet_text
from hemera.sheet import read_sheet


def test_the_small_cohort(tmp_path: Path) -> None:
    assert main(["demo", "--folder", str(tmp_path / "demo"), "--size", "small"]) == 0
    sheet = tmp_path / "pairs.tsv"
    sheet.write_text(sheet_text("small"))
    (tmp_path / "demo" / "pairs.tsv").write_text(sheet_text("small"))
    pairs = read_sheet(tmp_path / "demo" / "pairs.tsv").pairs
    assert pairs
    for pair in pairs:
        for path in (*pair.images, *pair.landmarks):
            assert path.is_file(), path
    assert main(["sheet", "check", str(tmp_path / "demo" / "pairs.tsv")]) == 0


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["demo"], ["demo", "--folder", "x", "--size", "huge"]):
        with pytest.raises(SystemExit) as left:
            main(words)
        assert left.value.code == 2
    assert "choose from" in capsys.readouterr().err
