"""The command as a user calls it: a process that serves a folder until Ctrl-C."""

import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from hemera.__main__ import main
from tests.small_sheets import write_sheet

COMMAND = [sys.executable, "-m", "hemera", "view"]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    write_sheet(tmp_path, [{"pair": "a", "he": "a.tif", "her2": "b.tif"}], case="c", dataset="x")
    (tmp_path / "config.yaml").write_text("preset: no_weights\nsheet: pairs.tsv\n")
    return tmp_path


def test_it_serves_until_it_is_interrupted(study: Path, request: pytest.FixtureRequest) -> None:
    with subprocess.Popen(
        [*COMMAND, str(study), "--no-browser"], stderr=subprocess.PIPE, text=True
    ) as process:
        request.addfinalizer(process.kill)
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/([\w-]{32})/$", line.strip())
        assert found, line
        with urllib.request.urlopen(found[0], timeout=60) as answer:
            assert answer.status == 200 and b"HEMERA" in answer.read()
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"http://127.0.0.1:{found[1]}/", timeout=60)
        # The port is taken, which is one line.
        taken = subprocess.run(
            [*COMMAND, str(study), "--no-browser", "--port", found[1]],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert taken.returncode == 1 and f"--port {found[1]}: " in taken.stderr
        assert taken.stderr.count("\n") == 1
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 0 and "Traceback" not in rest


@pytest.mark.parametrize(
    ("folder", "words"), [("none", "no such folder"), (".", "work in the folder of a study")]
)
def test_a_wrong_folder_is_one_line(
    tmp_path: Path,
    folder: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["view", str(tmp_path / folder)]) == 1
    (record,) = caplog.records
    assert words in record.message
