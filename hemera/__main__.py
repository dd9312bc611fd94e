"""The command line: ``hemera STAGE ...`` derived from each stage's `run` and its Options.

The one stage that is asked for is imported, and nothing of the others.
"""

from __future__ import annotations

import argparse
import errno
import functools
import importlib
import inspect
import logging
import re
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hemera import __version__
from hemera.config import STAGES
from hemera.config.base import Key, Options, keys
from hemera.errors import ConfigError, HemeraError

COMMANDS = {
    "demo": "write the synthetic cohort with known truth",
    "sheet": "write a sheet from a release, or check one",
    "warp": "carry points, annotations, labels or a whole slide to the other slide of a pair",
    "predict": "draw a HER2 map from an H&E slide alone",
    "export": "write the accepted tiles for WebDataset, Hugging Face or pix2pix",
    "config": "print the configuration in force",
    "doctor": "say what can run on this machine and what is missing",
}
"""What is no stage: ``hemera/commands/{name}.py`` has `arguments(parser)`, `main(namespace)`."""

log = logging.getLogger("hemera")

_REMEDIES = {
    errno.ENOSPC: "free some room and run the same command again; nothing half-written is left",
    errno.EDQUOT: "free some of your quota and run the same command again; nothing half-written "
    "is left",
    errno.EROFS: "choose a folder that can be written",
    errno.ENOENT: "name a place that is there",
    errno.ENOTDIR: "name a folder",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EACCES: "give yourself the right to it, or choose another folder",
}
"""What to do about a fault of the disk, which is nobody's bug."""


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; return 0, 1 for an error that is the input's, 2 for wrong usage."""
    logging.basicConfig(
        level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    given = list(sys.argv[1:] if words is None else words)
    try:
        parser, run = _command(given)
        namespace = parser.parse_args(given[1:])
        return run(namespace)
    except HemeraError as error:
        for line in str(error).splitlines():
            log.error("%s", line)
        return 1
    except BrokenPipeError:
        return 1
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0)
        if remedy is None:
            raise
        place = f"{error.filename}: " if error.filename else ""
        log.error("%s%s; %s", place, error.strerror, remedy)
        return 1


def _command(words: Sequence[str]) -> tuple[argparse.ArgumentParser, Callable[[Any], int]]:
    """Choose the command by its first word and build its parser."""
    name = words[0] if words else ""
    if name in STAGES:
        return _stage(name)
    if name in COMMANDS:
        module = importlib.import_module(f"hemera.commands.{name}")
        parser = argparse.ArgumentParser(
            f"hemera {name}", description=COMMANDS[name], allow_abbrev=False
        )
        module.arguments(parser)
        return parser, module.main
    parser = argparse.ArgumentParser(
        "hemera",
        description="From pairs of H&E and HER2 images to a training set and two networks.",
        epilog="Each command answers to --help.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hemera {__version__}")
    groups = parser.add_subparsers(title="stages and commands", metavar="COMMAND", required=True)
    for stage, cls in STAGES.items():
        groups.add_parser(stage, help=_first_line(cls.__doc__))
    for command, help in COMMANDS.items():
        groups.add_parser(command, help=help)
    parser.parse_args(list(words[:1]))
    raise AssertionError("argparse has left by now")


def _stage(name: str) -> tuple[argparse.ArgumentParser, Callable[[Any], int]]:
    """Build the parser of a stage from the signature of its `run` and its Options."""
    module = importlib.import_module(f"hemera.stages.{name}")
    parser = argparse.ArgumentParser(
        f"hemera {name}",
        description=_first_line(module.__doc__),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    files = parser.add_argument_group("files and unit")
    hints = typing.get_type_hints(module.run)
    names = []
    for parameter in inspect.signature(module.run).parameters.values():
        if parameter.name == "options":
            continue
        names.append(parameter.name)
        required = parameter.default is inspect.Parameter.empty
        annotation = hints[parameter.name]
        kind = _path_or(annotation)
        files.add_argument(
            _flag(parameter.name),
            dest=parameter.name,
            required=required,
            type=kind,
            metavar=kind.__name__.upper(),
            nargs="*" if _item(annotation) else None,
        )
    group = parser.add_argument_group("options (config.yaml holds the same keys)")
    cls = STAGES[name]
    _add_options(group, cls)

    def run(namespace: argparse.Namespace) -> int:
        values = vars(namespace)
        arguments = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in values.items()
            if key in names
        }
        module.run(**arguments, options=_options(cls, values))
        return 0

    return parser, run


def _add_options(group: argparse._ArgumentGroup, cls: type[Options]) -> None:
    for key in keys(cls).values():
        known = f"one of {', '.join(key.choices)}; " if key.choices else ""
        shown = " ".join(map(str, key.default)) if key.is_list else key.default
        paper = f"; paper: {key.paper}" if key.paper else ""
        group.add_argument(
            _flag(key.name),
            dest=f"option {key.name}",
            type=functools.partial(_word, key),
            nargs="*" if key.is_list else None,
            metavar=key.name.rsplit("_", 1)[-1].upper(),
            help=f"{key.help} ({known}default {shown}{paper})".replace("%", "%%"),
        )


def _options(cls: type[Options], values: dict[str, Any]) -> Options:
    given = {
        key.removeprefix("option "): tuple(value) if isinstance(value, list) else value
        for key, value in values.items()
        if key.startswith("option ")
    }
    try:
        return cls(**given)
    except ConfigError as error:
        flags = re.sub(
            rf"\b{cls.section}\.(\w+)", lambda found: _flag(found[1]), str(error), flags=re.ASCII
        )
        raise ConfigError(flags) from None


def _word(key: Key, word: str) -> Any:
    """Return a word of the command line as the value that YAML would give."""
    if key.type is bool:
        return {"true": True, "false": False}.get(word, word)
    if key.type is int and re.fullmatch(r"-?[0-9]+", word, re.ASCII):
        return int(word)
    return word


def _item(annotation: Any) -> Any | None:
    """Return the type of a tuple's items, or None."""
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is tuple else None


def _path_or(annotation: Any) -> type:
    inner = _item(annotation) or annotation
    for kind in (int, str):
        if inner in (kind, kind | None):
            return kind
    return Path


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _first_line(text: str | None) -> str:
    return (text or "").strip().split("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
