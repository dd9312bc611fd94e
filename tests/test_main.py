"""The command line: derived from run() and Options, called by the rules with the same names."""

import errno
import importlib
import inspect
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hemera import __version__
from hemera.__main__ import COMMANDS, main
from hemera.config import STAGES, load

ROOT = Path(__file__).parents[1]
RULES = ROOT / "workflow" / "rules"
BUILT = [stage for stage in STAGES if (ROOT / "hemera" / "stages" / f"{stage}.py").is_file()]


def leave(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[object, str, str]:
    """Run a command that leaves by itself; return exit code, standard output and error."""
    with pytest.raises(SystemExit) as left:
        main(words)
    said = capsys.readouterr()
    return left.value.code, said.out, said.err


def test_help_lists_every_stage_and_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = leave(capsys, "--help")
    assert code == 0
    for name in (*STAGES, *COMMANDS):
        assert re.search(rf"^    {name}\s", text, re.MULTILINE), name


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert leave(capsys, "--version")[:2] == (0, f"hemera {__version__}\n")


@pytest.mark.parametrize("words", [(), ("bogus",), ("--bogus",), ("tile.", "--help"), ("--",)])
def test_wrong_usage(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    code, out, err = leave(capsys, *words)
    assert code == 2
    assert not out
    assert "usage: hemera" in err


@pytest.mark.parametrize("stage", BUILT)
def test_help_of_a_stage_is_derived(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = leave(capsys, stage, "--help")
    assert code == 0
    shown = set(re.findall(r"^\s+(--[a-z0-9_-]+)", text, re.MULTILINE))
    run = importlib.import_module(f"hemera.stages.{stage}").run
    parameters = {f"--{name.replace('_', '-')}" for name in inspect.signature(run).parameters}
    options = {f"--{name.replace('_', '-')}" for name in STAGES[stage].model_fields}
    assert shown == (parameters - {"--options"}) | options
    for name in shown:
        assert "_" not in name


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = leave(capsys, command, "--help")
    assert code == 0
    assert f"hemera {command}" in text


@pytest.mark.parametrize("stage", BUILT)
def test_run_takes_keywords_of_known_kinds(stage: str) -> None:
    run = importlib.import_module(f"hemera.stages.{stage}").run
    allowed = {
        *("Path", "Path | None", "tuple[Path, ...]", "tuple[str, ...]", "str", "str | None", "int")
    }
    parameters = inspect.signature(run).parameters
    for parameter in parameters.values():
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, parameter
        if parameter.name == "options":
            assert parameter.annotation == STAGES[stage].__name__
            assert parameter.default is inspect.Parameter.empty
        else:
            assert parameter.annotation in allowed, parameter
    assert "options" in parameters
    assert inspect.signature(run).return_annotation == "None"


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
def test_every_rule_hands_over_its_options(stage: str) -> None:
    text = (RULES / f"{stage}.smk").read_text()
    assert "{params.options}" in shell_of(stage)
    generator = "options=generator_flags"
    expected = generator if stage == "train_generation" else f'options=CONFIG.flags("{stage}")'
    assert expected in text
    assert f'version=CONFIG.stages["{stage}"].version' in text
    assert f"rule {stage}:" in text


@pytest.mark.parametrize("stage", BUILT)
def test_the_rule_calls_run_by_its_names(stage: str) -> None:
    """A required parameter is a flag of the rule; what the rule calls is a parameter."""
    text = (RULES / f"{stage}.smk").read_text()
    parameters = inspect.signature(importlib.import_module(f"hemera.stages.{stage}").run).parameters
    names = {
        name.replace("_", "-"): value for name, value in parameters.items() if name != "options"
    }
    always = re.findall(r"--([a-z0-9-]+)", shell_of(stage))
    assert len(set(always)) == len(always), "a flag stands twice"
    helpers = text[: text.index(f"rule {stage}:")]
    sometimes = re.findall(r"--([a-z0-9-]+)", helpers)
    assert set(always) | set(sometimes) <= set(names), "a flag that run() does not take"
    required = {name for name, value in names.items() if value.default is inspect.Parameter.empty}
    assert required <= set(always) | set(sometimes), "a parameter that the rule does not give"
    for name in sometimes:
        assert str(names[name].annotation).endswith(("None", "...]")), name


@pytest.mark.parametrize("stage", BUILT)
def test_the_rules_files_bear_the_parameters_names(stage: str) -> None:
    """`--tiles {output.tiles:q}`: the flag is the name of the rule's file."""
    for flag, _, name in re.findall(
        r"--([a-z0-9-]+) \{(input|output)\.([a-z0-9_]+):q\}", shell_of(stage)
    ):
        assert flag.replace("-", "_") == name


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
    assert record.getMessage().endswith("no such sheet; name one in config.yaml (sheet:)")
    assert record.exc_info is None
    caplog.clear()
    assert main([*words, "--seed", "-1", "--val-fraction", "x", "--allow-mixed-mpp", "yes"]) == 1
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert [line.split(":")[0] for line in said] == [
        "--seed", "--val-fraction", "--allow-mixed-mpp",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--see", "5"], "unrecognized arguments"),
        ([], "required: --sheet, --tiles, --engines, --index, --card"),
    ],
)
def test_a_wrong_flag(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], said: str
) -> None:
    names = ("sheet", "tiles", "engines", "index", "card")
    files = [word for name in names for word in (f"--{name}", "x")] if words else []
    code, _, err = leave(capsys, "index", *files, *words)
    assert code == 2
    assert said in err.replace("\n", " ")


def test_a_real_process_says_one_line_and_no_traceback(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("tile:\n  size: 512\n")
    done = subprocess.run(
        [sys.executable, "-m", "hemera", "config", "--configfile", str(config)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        f"ERROR hemera: {config}: tile.size: no such key; did you mean size_px?\n"
    )


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


@pytest.mark.parametrize(
    ("fault", "words"),
    [(errno.ENOSPC, "free some room"), (errno.EACCES, "give yourself the right")],
)
def test_a_fault_of_the_disk_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    fault: int,
    words: str,
) -> None:
    def write(*args: object, **kwargs: object) -> None:
        raise OSError(fault, os.strerror(fault), str(tmp_path / "full"))

    monkeypatch.setattr("hemera.commands.demo.write_cohort", write)
    assert main(["demo", "--folder", str(tmp_path), "--size", "small"]) == 1
    assert words in caplog.text
    assert "full: " in caplog.text
