"""The command line: derived from run() and Options, called by the rules with the same names."""

import importlib
import inspect
import logging
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hemera.__main__ import COMMANDS, _flags, main
from hemera.config import STAGES, load

ROOT = Path(__file__).parents[1]
RULES = ROOT / "workflow" / "rules"


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that succeeds; return its output with single spaces."""
    assert main(words) == 0
    return " ".join(capsys.readouterr().out.replace("\u2502", " ").split())


def test_help_lists_commands_before_stages(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "--help")
    places = [text.index(f" {name} ") for name in (*COMMANDS, *STAGES)]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("tiel",), "did you mean tile?"),
        (("--bogus",), "no such command"),
        (("sheet", "bco", "x"), "bci"),
        (("sheet", "bci", "x", "--mmp", "3"), "--mpp"),
        (("tile", "--size-px", "64"), "--sheet is required; see `hemera tile --help`"),
        (("predict", "x.svs", "--model", "m", "--threshold", "3"), "--threshold. Must be < 1"),
        (("predict", "x.svs", "--model", "m", "--precision", "int8"), "bf16"),
        (("export", "webdataset", "out", "--shard-mb", "nan"), "nan"),
    ],
)
def test_wrong_usage(caplog: pytest.LogCaptureFixture, words: tuple[str, ...], said: str) -> None:
    assert main(words) == 2
    (record,) = caplog.records
    assert said in record.getMessage()


@pytest.mark.parametrize("stage", STAGES)
def test_help_of_a_stage_is_derived(
    stage: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # else long flags are wrapped
    text = shown(capsys, stage, "--help")
    names = set(inspect.signature(importlib.import_module(f"hemera.stages.{stage}").run).parameters)
    names = (names - {"options"}) | set(_flags(STAGES[stage]))
    assert set(re.findall(r" --([a-z0-9.-]+)", text)) == {name.replace("_", "-") for name in names}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_the_words_of_the_docstring(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Markdown, which fills the lines anew, takes *word* for emphasis outside of code."""
    monkeypatch.setenv("COLUMNS", "300")
    own = name.replace("-", "_")
    module = importlib.import_module(f"hemera.commands.{own}")
    for function in COMMANDS[name] or (own,):
        words = [name] if not COMMANDS[name] else [name, function.replace("_", "-")]
        text = shown(capsys, *words, "--help").split()
        doc = re.sub(
            r"^ +\w+: |^ +(Args|Raises):$", "", getattr(module, function).__doc__, flags=re.M
        )
        missing = set(doc.partition("Raises:")[0].replace("`", "").split()) - set(text)
        assert missing <= {""}, f"{words}: {missing}"


@pytest.mark.parametrize("words", ["--help", "predict --help", "sheet --help", "sheet bci --help"])
def test_help_of_commands_imports_no_heavy_library(words: str) -> None:
    words = f"from hemera.__main__ import main; import sys; main({words.split()});"
    words += "assert not {'torch', 'numpy', 'cv2', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", words], cwd=ROOT, check=True, capture_output=True)


INTERRUPTED_AT = """
import os, runpy, signal, sys

class Finder:
    def find_spec(self, name, path, target=None):
        if name == {name!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
sys.argv = ["hemera", "tile", "--help"]
runpy.run_module("hemera", run_name="__main__")
"""


@pytest.mark.parametrize("name", ["ctypes", "pydantic", "cyclopts", "hemera.stages.tile", "cv2"])
def test_an_interrupted_import_is_one_line(name: str) -> None:
    code = INTERRUPTED_AT.format(name=name)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        # The tests may have been started where SIGINT is ignored, which processes inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (done.returncode, done.stderr) == (130, "ERROR hemera: interrupted\n")


def shell_of(stage: str) -> str:
    """The shell command of a stage's (first) rule, its string literals put together."""
    text = (RULES / f"{stage}.smk").read_text()
    block = re.findall(r"^    shell:\n((?:        .*\n)+)", text, re.MULTILINE)[0]
    command = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', block))
    if f'launcher=launcher("{stage}")' in text:
        # hemera, or torchrun that starts it several times.
        command = command.replace("{params.launcher}", "hemera", 1)
    assert command.startswith(f"hemera {stage} ")
    return command


def test_trainings_on_several_gpus_are_started_by_torchrun() -> None:
    """By the very function of the rules, with their configuration in its place."""
    text = (RULES / "common.smk").read_text()
    start = text.index("def training_threads(stage):")
    end = text.index("\n\n\n", text.index("def launcher(stage):"))
    for count, begins in ((1, "hemera"), (4, "torchrun --standalone --nproc-per-node 4 ")):
        section = {"gpus": count, "batch_size": 4, "workers": 3, "torch_threads": 2}
        scope: dict[str, Any] = {
            "CONFIG": load({"train_generation": section}), "megabytes": lambda base: base,
        }  # fmt: skip
        exec(text[start:end], scope)
        command = scope["launcher"]("train_generation")
        assert command.startswith(begins)
        assert command.endswith("hemera")
        assert scope["training_threads"]("train_generation") == 5 * count
        assert scope["training_mb"]("train_generation", 16000) >= 16000


@pytest.mark.parametrize("stage", STAGES)
def test_the_rule_calls_run_by_its_names(stage: str) -> None:
    """A required parameter is a flag of the rule; what the rule calls is a parameter."""
    text = (RULES / f"{stage}.smk").read_text()
    parameters = inspect.signature(importlib.import_module(f"hemera.stages.{stage}").run).parameters
    names = {
        name.replace("_", "-"): value for name, value in parameters.items() if name != "options"
    }
    always = re.findall(r"--([a-z0-9-]+)", shell_of(stage))
    assert len(set(always)) == len(always), "a flag occurs twice"
    helpers = text[: text.index(f"rule {stage}:")]
    sometimes = re.findall(r"--([a-z0-9-]+)", helpers)
    assert set(always) | set(sometimes) <= set(names), "a flag that run() does not take"
    required = {name for name, value in names.items() if value.default is inspect.Parameter.empty}
    assert required <= set(always) | set(sometimes), "a parameter that the rule does not give"
    for name in sometimes:
        assert str(names[name].annotation).endswith(("None", "...]")), name


def test_an_error_of_the_input_is_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = [
        "index",
        *("--sheet", str(tmp_path / "no.tsv")),
        *("--tiles", str(tmp_path / "tiles.parquet")),
        *("--engines", "deepliif"),
        *("--index", str(tmp_path / "index.parquet")),
        *("--card", str(tmp_path / "card.md")),
    ]
    assert main(words) == 1
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.getMessage().endswith("no.tsv: no such file; give the path of a sheet of pairs")
    assert record.exc_info is None
    caplog.clear()
    assert main([*words, "--seed", "-1", "--val-fraction", "x"]) == 1
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert [line.split(":")[0] for line in said] == ["--seed", "--val-fraction"]


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    done = subprocess.run(
        f"set -o pipefail; {sys.executable} -m hemera config --template hemera | head -n 1",
        shell=True,
        executable="/bin/bash",
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("#")
    assert "Traceback" not in done.stderr


def test_a_fault_of_the_file_system_is_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["demo", "--folder", str(tmp_path / "file"), "--size", "small"]) == 1
    (record,) = caplog.records
    assert record.getMessage().endswith("Not a directory")
    assert record.exc_info is None


@pytest.mark.parametrize(
    ("words", "name"),
    [(("demo", "--size", "small", "--folder"), "pairs.tsv"), (("train-nuclei", "--weights"), "")],
)
def test_a_file_of_the_user_is_never_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, words: tuple[str, ...], name: str
) -> None:
    path = tmp_path / (name or "weights.safetensors")
    path.write_text("mine")
    assert main([*words, str(tmp_path if name else path)]) == 1
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]
    assert str(path) in caplog.text


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has this option")
def test_memory_of_freed_images_is_reused() -> None:
    """Six images of 2 MiB are 3,072 pages, which glibc returns to the system by default."""
    program = """if True:
        import resource
        import numpy as np
        from hemera.__main__ import main
        main(["--version"])
        faults = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            images = [np.ones(1 << 21, np.uint8) for _ in range(6)]
            del images
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        assert max(faults[1:]) < 100, faults
    """
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
