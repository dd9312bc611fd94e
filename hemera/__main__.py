"""The command line: ``hemera COMMAND`` for users, ``hemera STAGE`` for the workflow.

A stage's flags are the parameters of its `run` and the options of its section. Only the requested
stage is imported.
"""

import contextlib
import os
import signal

with contextlib.suppress(ValueError):  # outside of the main thread
    # During the imports that follow, a KeyboardInterrupt would be a traceback.
    _HANDLER, _LINE = signal.getsignal(signal.SIGINT), b"ERROR hemera: interrupted\n"
    if _HANDLER is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130 if os.write(2, _LINE) else 1))

import ctypes
import dataclasses
import errno
import importlib
import inspect
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Group, Parameter

from hemera import __version__
from hemera.config import STAGES
from hemera.config.base import Key, Options, keys, nearest, range_words
from hemera.errors import INTERRUPTED, ConfigError, HemeraError

with contextlib.suppress(ValueError):
    signal.signal(signal.SIGINT, _HANDLER)

COMMANDS: dict[str, tuple[str, ...]] = {
    "new": (),
    "demo": (),
    "sheet": ("acrobat", "bci", "mist", "herohe", "her2sc", "check"),
    "doctor": (),
    "run": (),
    "view": (),
    "plan": (),
    "progress": (),
    "verify": (),
    "config": (),
    "warp": ("points", "annotations", "labels", "slide"),
    "predict": (),
    "status": (),
    "workflow": (),
    "train-nuclei": (),
    "export": ("webdataset", "huggingface", "aligned", "qupath", "spatialdata", "card"),
}
"""Commands and their subcommands: the functions of ``hemera/commands/{name}.py``, in which a hyphen
of the name is an underscore."""

EXTRAS = {
    "torch": "train",
    "torchvision": "train",
    "timm": "train",
    "segmentation_models_pytorch": "train",
    "safetensors": "train",
    "h5py": "train",
    "openpyxl": "excel",
    "starlette": "view",
    "uvicorn": "view",
    "tensorboard": "train",
    "lpips": "metrics",
    "torch_fidelity": "metrics",
    "snakemake": "workflow",
    "deeperhistreg": "registration",
    "deepliif": "deepliif",
    "instanseg": "instanseg",
    "wsidicom": "dicom",
}
"""Extra of the package that installs each optional library."""

ABOUT = "From pairs of H&E and HER2 images to a training set and two networks."
EXAMPLES = """\
Examples:
  hemera new study --he 'slides/*_HE.*' --her2 'slides/*_HER2.*'
  hemera sheet bci BCI_dataset --output pairs.tsv
  hemera config --template hemera > config.yaml
  hemera run data
  snakemake --cores 8
  hemera tile --help
"""

log = logging.getLogger("hemera")

_COMMANDS = Group("Commands for users", sort_key=1)
_STAGES = Group("Stages, called by the workflow", sort_key=2)
_FILES = Group("Files and unit", sort_key=1)
_OPTIONS = Group("Options, as in the section of config.yaml", sort_key=2)

_HELP = {
    "sheet": "sheet of pairs.",
    "unit": "pair of whole slides, or block of image pairs.",
    "block_count": "number of blocks into which image pairs are divided.",
    "images_table": "table of stage describe.",
    "tiles": "table of tiles.",
    "tile_shard": "shard of tiles, tar.",
    "shard": "written: shard of images, tar.",
    "pairs": "written: table with one row per pair.",
    "masks": "written: table with one row per tile and engine.",
    "cells": "written: table with one row per cell.",
    "certificate": "written: table with signals and verdict of the registration.",
    "quality": "written: table of the registration quality by position.",
    "registration_quality": "table of the registration quality by position.",
    "errors": "written: table of landmark errors.",
    "engines": "mask engines whose statistics are included.",
    "index": "written: the index of all tiles.",
    "page": "written: the page, HTML.",
    "results": "folder of results.",
    "card": "written: the dataset card, Markdown.",
    "preset": "preset of the configuration.",
}
"""Flags of stages that their `run` does not describe."""


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; return 0, 1 for an error of the input, 2 for wrong usage, 130 for Ctrl-C."""
    keep_freed_memory()
    logging.basicConfig(
        level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    # Its messages about a damaged file come before an error that names the file.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    given = list(sys.argv[1:] if words is None else words) or ["--help"]
    wanted, known = given[0], [*COMMANDS, *STAGES]
    if wanted not in (*known, "--help", "-h", "--version"):
        log.error("%r: no such command%s", wanted, nearest(wanted, known))
        return 2
    try:
        result = _app(wanted)(
            given, exit_on_error=False, print_error=False, result_action="return_value"
        )
    except CycloptsError as error:
        fault = " ".join(str(error).split()).rstrip(".")
        fault = re.sub(
            r'^Command ".*" parameter (.*) requires an argument', r"\1 is required", fault
        )
        log.error("%s; see `hemera %s --help`", fault, " ".join(error.command_chain or ()))
        return 2
    except HemeraError as error:
        for line in str(error).splitlines():
            log.error("%s", line)
        return 1
    except ModuleNotFoundError as error:
        library = (error.name or "").split(".")[0]
        if library not in EXTRAS:
            raise
        log.error("%s is not installed; run `pip install hemera[%s]`", library, EXTRAS[library])
        return 1
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        log.error("interrupted")
        return INTERRUPTED
    except OSError as error:
        # Of the file system: its own message names the cause.
        if error.errno is None:
            raise
        log.error("%s", _file_system_fault(error.errno, error.filename))
        return 1
    return result if isinstance(result, int) else 0


def _file_system_fault(number: int, filename: object) -> str:
    """Return what the system says about a file, and the remedy where there is one.

    A full disk is not attributed to a file: it may be that of the temporary files.
    """
    cause = os.strerror(number)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{filename or Path.cwd()}: {cause}; free space there and in {tempfile.gettempdir()}, "
            "then run the same command again"
        )
    remedy = "; correct the permissions" if number in (errno.EACCES, errno.EROFS) else ""
    return f"{filename or Path.cwd()}: {cause}{remedy}"


def keep_freed_memory() -> None:
    """Let glibc reuse the memory of freed images instead of returning it to the system.

    Otherwise every temporary image of a tile is mapped and cleared again, page by page, which is a
    quarter of the time of stage mask. Larger blocks than these, and other C libraries, are as they
    are by default.
    """
    # Of malloc.h; 32 MiB is the largest that is accepted.
    trim_threshold, mmap_threshold, mebibyte = -1, -3, 1 << 20
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 32 * mebibyte)
        mallopt(trim_threshold, 128 * mebibyte)


def _app(wanted: str) -> App:
    """Return the application: the wanted stage, or all commands and the names of all stages."""
    app = App(
        "hemera",
        help=ABOUT,
        help_format="plaintext",
        version=__version__,
        suppress_keyboard_interrupt=False,
    )
    if wanted in STAGES:
        app.command(_stage(wanted), name=wanted, help_format="markdown")
        return app
    app.help_epilogue = EXAMPLES
    for flag in ("--help", "--version"):
        app[flag].group = _COMMANDS
    for number, (name, functions) in enumerate(COMMANDS.items()):
        own = name.replace("-", "_")
        module = importlib.import_module(f"hemera.commands.{own}")
        kind: dict[str, Any] = {
            "group": _COMMANDS,
            "sort_key": number,
            "help_epilogue": "",
            "help_format": "markdown",
        }
        if not functions:
            app.command(getattr(module, own), name=name, **kind)
            continue
        group = App(name, help=module.__doc__, **kind)
        for function in functions:
            group.command(getattr(module, function))
        app.command(group)
    for number, (name, cls) in enumerate(STAGES.items()):
        path = f"hemera.stages.{name}:run"
        app.command(path, name=name, group=_STAGES, sort_key=number, help=cls.__doc__)
    return app


def _stage(name: str) -> Callable[..., None]:
    """Return a function with the flags of a stage that runs it."""
    run, cls = importlib.import_module(f"hemera.stages.{name}").run, STAGES[name]
    kind = Parameter(group=_FILES, consume_multiple=True, negative=(), show_default=False)
    files = []
    for parameter in inspect.signature(run, eval_str=True).parameters.values():
        own = [kind]
        if parameter.name in _HELP and f"  {parameter.name}: " not in run.__doc__:
            own.append(Parameter(help=_HELP[parameter.name]))
        if parameter.name != "options":
            files.append(parameter.replace(annotation=Annotated[parameter.annotation, *own]))
    declared = _flags(cls)
    options = {f"option_{key.replace('.', '_')}": key for key in declared}

    def stage(**values: Any) -> None:
        words = {options[name]: values.pop(name) for name in set(values) & set(options)}
        run(**values, options=_options(cls, {key: words[key] for key in declared if key in words}))

    stage.__doc__ = run.__doc__
    stage.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        files + [_option(ident, key, declared[key]) for ident, key in options.items()]
    )
    return stage


def _option(ident: str, name: str, key: Key) -> inspect.Parameter:
    """Return the parameter of one option; its words are converted and checked by its class."""
    shown = " ".join(map(str, key.default)) if key.is_list else key.default
    notes = [
        f"one of {', '.join(key.choices)}" if key.choices else range_words(key.limits),
        f"default {'null' if shown is None else str(shown).lower() if key.type is bool else shown}",
        f"paper: {key.paper}" if key.paper else "",
    ]
    return inspect.Parameter(
        ident,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            tuple[str, ...] | None if key.is_list else str | None,
            Parameter(
                name=_flag(name),
                help=f"{key.help} ({'; '.join(filter(None, notes))})",
                group=_OPTIONS,
                metavar=key.type.__name__ + ("..." if key.is_list else ""),
                consume_multiple=True,
                negative=(),
                show_default=False,
            ),
        ],
    )


def _flags(cls: type[Options], prefix: str = "") -> dict[str, Key]:
    """Return the declarations of all options, those of nested models by dotted names."""
    found: dict[str, Key] = {}
    for key in keys(cls).values():
        if not issubclass(key.type, Options):
            found[prefix + key.name] = key
            continue
        for name, member in cls.nested().items():
            help = f"{{}}: run the engine {name.rsplit('.', 1)[-1]} with its defaults"
            found[prefix + name] = dataclasses.replace(key, help=help, default="none", type=dict)
            found |= _flags(member, f"{prefix}{name}.")
    return found


def _options(cls: type[Options], words: dict[str, Any]) -> Options:
    """Return the options given as words of the command line; faults name the flags."""
    values: dict[str, Any] = {}
    for name, key in _flags(cls).items():
        if name not in words:
            continue
        *parents, last = name.split(".")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
        given = words[name]
        place[last] = [_value(key, word) for word in given] if key.is_list else _value(key, given)
    try:
        return cls(**values)
    except ConfigError as error:
        pattern = re.compile(rf"^{cls.section}\.([\w.]+)", re.MULTILINE | re.ASCII)
        raise ConfigError(pattern.sub(lambda found: _flag(found[1]), str(error))) from None


def _value(key: Key, word: str) -> Any:
    """Return a word of the command line as the value that YAML would give."""
    if key.optional and word in ("", "null"):
        return None
    if key.type is bool:
        return {"true": True, "false": False}.get(word, word)
    if key.type is int and re.fullmatch(r"-?[0-9]+", word, re.ASCII):
        return int(word)
    return {} if key.type is dict and word == "{}" else word


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


if __name__ == "__main__":
    sys.exit(main())
