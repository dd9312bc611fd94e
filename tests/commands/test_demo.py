"""hemera demo: the command passes its flags to the library, and the cohort's sheet is valid."""

from pathlib import Path

import pytest

from hemera.__main__ import main


def test_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []
    monkeypatch.setattr(
        "hemera.demo.write_cohort",
        lambda folder, size, *, workers: given.extend((folder, size, workers)),
    )
    assert main(["demo", "--folder", str(tmp_path), "--size", "small", "--workers", "3"]) == 0
    assert given == [tmp_path, "small", 3]
