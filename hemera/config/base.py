"""What every class of options is made of: declaring, checking, reading and writing of values.

`hemera.config` holds the classes themselves.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self, TypeVar

from hemera.errors import ConfigError

TOP = "config"
"""The section whose keys stand at the top of a configuration, without a name before them."""


def option(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple[str, ...] | None = None,
    paper: str | None = None,
) -> Any:
    """Declare one option: its default, one line of help, its bounds, and what the paper uses."""
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    return dataclasses.field(
        default=default,
        metadata={"help": help, "bounds": bounds, "choices": choices, "paper": paper},
    )


@dataclasses.dataclass(frozen=True)
class Options:
    """What all option classes share: their values are checked however they are made."""

    section: ClassVar[str]
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        faults = []
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            name = f"{self.section}.{field.name}"
            try:
                value = _convert(getattr(self, field.name), hints[field.name])
            except ValueError as error:
                faults.append(f"{_plain(name)}: {error}")
                continue
            object.__setattr__(self, field.name, value)
            fault = _fault(name, field, value)
            if fault:
                faults.append(fault)
        if faults:
            raise ConfigError("\n".join(faults))
        self.check()

    def check(self) -> None:
        """Raise ConfigError when two options cannot stand together."""

    def unread(self) -> frozenset[str]:
        """Return the options that the stage, as these are, does not read."""
        return frozenset()

    def effective(self) -> Self:
        """Return these options with what is not read as it would be if nobody had set it.

        Snakemake runs a stage again when its flags change: one that is not read must not change.
        """
        return self


OptionsT = TypeVar("OptionsT", bound=Options)


def from_mapping(cls: type[OptionsT], values: Mapping[str, Any]) -> OptionsT:
    """Make options from a config section.

    Nothing is converted but whole numbers to floats and lists to tuples.

    Raises:
        ConfigError: one line per unknown key, wrong type or impossible value.
    """
    fields: dict[str, dataclasses.Field[Any]] = {
        field.name: field for field in dataclasses.fields(cls)
    }
    prefix = _plain(f"{cls.section}.")
    faults = [
        f"{prefix}{key}: no such key{nearest(str(key), fields)}"
        for key in values
        if key not in fields
    ]
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            continue
        try:
            arguments[key] = _convert(value, hints[key])
        except ValueError as error:
            faults.append(f"{prefix}{key}: {error}")
            continue
        fault = _fault(f"{prefix}{key}", fields[key], arguments[key])
        if fault:
            faults.append(fault)
    if faults:
        raise ConfigError("\n".join(faults))
    return cls(**arguments)


def flags(options: Options) -> list[str]:
    """Return every option as command-line words, so that a job's command says all it does."""
    words: list[str] = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        name = "--" + field.name.replace("_", "-")
        if isinstance(value, tuple):
            words += [name, *map(_word, value)]
            continue
        word = _word(value)
        # What begins with a hyphen would be read as another flag.
        words += [f"{name}={word}"] if word.startswith("-") else [name, word]
    return words


def parse_word(word: str, annotation: Any) -> Any:
    """Read one word of the command line as a value of an option's type.

    Raises:
        ValueError: with the remedy, when the word is no such value.
    """
    inner, optional = _unwrap(annotation)
    if optional and word == "none":
        return None
    if inner is bool:
        if word not in ("true", "false"):
            raise ValueError(f"{word!r} is neither true nor false")
        return word == "true"
    if inner is int:
        try:
            return int(word)
        except ValueError:
            raise ValueError(f"{word!r} is not a whole number") from None
    if inner is float:
        try:
            return float(word)
        except ValueError:
            raise ValueError(f"{word!r} is not a number") from None
    return word


def item_type(annotation: Any) -> Any | None:
    """Return the type of a tuple's items, or None for an option that is no tuple."""
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is tuple else None


def _word(value: object) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def collect(faults: list[str], cls: type[OptionsT], values: Mapping[str, Any]) -> OptionsT | None:
    """Return options made from a config section, or None and another of the `faults`."""
    try:
        return from_mapping(cls, values)
    except ConfigError as error:
        faults.append(str(error))
        return None


def nearest(key: str, known: Iterable[str]) -> str:
    """Return the remedy for a key that is not known."""
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(sorted(known))}"


def _unwrap(annotation: Any) -> tuple[Any, bool]:
    """Split ``X | None`` into X and True."""
    if isinstance(annotation, types.UnionType):
        inner = [item for item in typing.get_args(annotation) if item is not type(None)]
        return inner[0], True
    return annotation, False


def _plain(name: str) -> str:
    """Return a key as it stands in a configuration."""
    return name.removeprefix(f"{TOP}.")


_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f]")
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _convert(value: Any, annotation: Any) -> Any:
    inner, optional = _unwrap(annotation)
    if value is None or (optional and value == "none"):
        if optional:
            return None
        raise ValueError(f"empty; give {_WORDS.get(inner, 'a list')}")
    item = item_type(inner)
    if item is not None:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{value!r} is not a list; write [a, b]")
        return tuple(_convert(element, item) for element in value)
    if inner is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if inner is float and isinstance(value, str):
        # YAML 1.1 reads 2e-4 as a text.
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"{value!r} is not a number; give a number") from None
    if type(value) is not inner:
        raise ValueError(f"{value!r} is not {_WORDS[inner]}; give {_WORDS[inner]}")
    if inner is str and _UNPRINTABLE.search(value):
        raise ValueError(f"{value!r} holds an unprintable character; give plain text")
    return value


def _fault(name: str, field: dataclasses.Field[Any], value: Any) -> str | None:
    """Return what is wrong with a value, or None."""
    name = _plain(name)
    for item in value if isinstance(value, tuple) else (value,):
        if item is None:
            continue
        choices = field.metadata["choices"]
        if choices and item not in choices:
            return f"{name}: {item!r} is not known; choose from {', '.join(choices)}"
        if isinstance(value, tuple) and isinstance(item, str) and item.startswith("-"):
            return f"{name}: {item!r} begins with a hyphen, as no name does; mend the name"
        if isinstance(item, float) and not math.isfinite(item):
            return f"{name}: {item} is no finite number; give a finite number"
        bounds = field.metadata["bounds"]
        words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
        holds = {
            "ge": lambda a, b: a >= b,
            "gt": lambda a, b: a > b,
            "le": lambda a, b: a <= b,
            "lt": lambda a, b: a < b,
        }
        stated = {key: bound for key, bound in bounds.items() if bound is not None}
        if any(not holds[key](item, bound) for key, bound in stated.items()):
            limits = " and ".join(f"{words[key]} {bound:g}" for key, bound in stated.items())
            return f"{name}: {item} is outside its bounds; give a value {limits}"
    return None
