"""The base class of all options: declaration, validation and introspection."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from hemera.errors import ConfigError

TOP = "config"
"""Section of the keys at the top level of a configuration, which have no prefix in messages."""

Device = Literal["auto", "cpu", "cuda"]
Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Threads = Annotated[int, Field(ge=1, le=64)]


def paper(value: str) -> Any:
    """Return the annotation of an option with the value that the paper uses."""
    return Field(json_schema_extra={"paper": value})


class Options(BaseModel):
    """Options of one stage; their construction raises ConfigError with one line per fault.

    Types are strict, except that whole numbers are accepted as floats, lists as tuples, the text
    "null" or "none" as None, and a text such as ``2e-4``, which YAML 1.1 does not read as a number,
    as float. A contradiction between options is an after-validator that raises ValueError; its
    message begins with the name of the option.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    section: ClassVar[str]
    version: ClassVar[int] = 1

    @field_validator("*", mode="before")
    @classmethod
    def _convert(cls, value: Any, info: Any) -> Any:
        key = keys(cls)[info.field_name]
        if key.optional and value in ("null", "none"):
            return None
        if key.is_list and isinstance(value, list | tuple):
            return tuple(_number(item, key) for item in value)
        return _number(value, key)

    if not TYPE_CHECKING:  # The fields remain the signature.

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                faults: dict[Any, str] = {}
                for each in error.errors(include_url=False):
                    # Of several faults of an option, the first is the cause.
                    faults.setdefault(each["loc"][:1], _fault(type(self), each))
                raise ConfigError("\n".join(faults.values())) from None

    @classmethod
    def nested(cls) -> dict[str, type[Options]]:
        """Return the classes of the items of fields that are mappings, by dotted name."""
        return {}

    def requirements(self) -> list[str]:
        """Return what is missing on this machine to run with these options, with remedies."""
        return []

    def files(self) -> list[str]:
        """Return the files that the options name, whose content is an input of the stage."""
        return []

    def replace(self, **changes: Any) -> Self:
        """Return a validated copy in which the given options have other values."""
        return type(self)(**{**dict(self), **changes})


@dataclasses.dataclass(frozen=True)
class Key:
    """What is declared about one option."""

    name: str
    help: str
    default: Any
    paper: str
    type: Any
    """Python type of the value, or of the items of a list; a class of Options if nested."""
    is_list: bool
    optional: bool
    choices: tuple[str, ...]
    limits: dict[str, float]
    """Of ``ge``, ``gt``, ``le``, ``lt``, those that apply."""


def range_words(limits: Mapping[str, float]) -> str:
    """Return a valid range in words; empty without limits."""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return " and ".join(f"{words[kind]} {limit:g}" for kind, limit in limits.items())


@functools.cache
def keys(cls: type[Options]) -> dict[str, Key]:
    """Return the options of a class by name."""
    return {name: _key(name, field) for name, field in cls.model_fields.items()}


def _key(name: str, field: FieldInfo) -> Key:
    inner, metadata, optional, is_list = field.annotation, list(field.metadata), False, False
    if typing.get_origin(inner) in (typing.Union, types.UnionType):
        (inner,) = (item for item in typing.get_args(inner) if item is not type(None))
        optional = True
    if typing.get_origin(inner) in (tuple, dict):
        is_list = typing.get_origin(inner) is tuple
        inner = typing.get_args(inner)[0 if is_list else 1]
    if typing.get_origin(inner) is Annotated:
        metadata += typing.get_args(inner)[1].metadata
        inner = typing.get_args(inner)[0]
    choices = typing.get_args(inner) if typing.get_origin(inner) is Literal else ()
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    return Key(
        name=name,
        help=" ".join((field.description or "").split()).rstrip("."),
        default=_plain_items(field.get_default(call_default_factory=True)),
        paper=str(extra.get("paper", "")),
        type=str if choices else inner,
        is_list=is_list,
        optional=optional,
        choices=choices,
        limits={
            kind: getattr(limit, kind)
            for limit in metadata
            for kind in ("ge", "gt", "le", "lt")
            if hasattr(limit, kind)
        },
    )


def _number(value: Any, key: Key) -> Any:
    if key.type is float and isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _fault(cls: type[Options], details: ErrorDetails) -> str:
    """Return one line for one fault: key, value found, what is valid."""
    prefix = "" if cls.section == TOP else f"{cls.section}."
    if details["type"] == "value_error":
        return prefix + str(details["ctx"]["error"])
    option = str(details["loc"][0])
    if details["type"] == "extra_forbidden":
        return f"{prefix}{option}: no such key{nearest(option, cls.model_fields)}"
    if details["type"].startswith(("greater_than", "less_than")):
        valid = f"it should be {range_words(keys(cls)[option].limits)}"
    elif details["type"] in ("too_short", "too_long"):
        count, found = details["ctx"].get("min_length"), details["ctx"]["actual_length"]
        valid = f"it should have {count or details['ctx']['max_length']} values, and has {found}"
    else:
        valid = details["msg"].replace("Input ", "it ").replace("Tuple ", "the list ")
        valid = valid.replace("tuple", "list, such as [a, b]")
        valid = valid.replace("a valid boolean", "true or false")
    if details["input"] is None:
        return f"{prefix}{option}: is empty; {valid}"
    return f"{prefix}{option}: {_shown(details['input'])} is not valid; {valid}"


def _shown(value: Any) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)


def flags(options: Options, prefix: str = "--") -> list[str]:
    """Return the options that differ from the defaults of their class as command-line words."""
    words: list[str] = []
    for key in keys(type(options)).values():
        value = getattr(options, key.name)
        if _plain_items(value) == key.default:
            continue
        name = prefix + key.name.replace("_", "-")
        if isinstance(value, Mapping):
            for item, nested in value.items():
                words += flags(nested, f"{name}.{item}.") or [f"{name}.{item}", "{}"]
        elif isinstance(value, tuple):
            words += [name, *map(_word, value)]
        else:
            word = _word(value)
            # A word that begins with a hyphen would be read as another flag.
            words += [f"{name}={word}"] if word.startswith("-") else [name, word]
    return words


def plain_words(value: Any) -> str:
    """Return the value of an option as the words of its flag."""
    return " ".join(map(_word, value)) if isinstance(value, tuple | list) else _word(value)


def plain(options: Options) -> dict[str, Any]:
    """Return options as plain values for YAML and JSON: lists for tuples, nested mappings."""
    return options.model_dump(mode="json")


def _plain_items(value: Any) -> Any:
    """Return a mapping to options as plain values, anything else unchanged."""
    if not isinstance(value, Mapping):
        return value
    return {name: plain(item) for name, item in value.items()}


def _word(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def nearest(key: str, known: Iterable[str]) -> str:
    """Return the remedy for an unknown name: the most similar known one, or the known ones."""
    names = sorted(known)
    close = difflib.get_close_matches(key, names, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known are {', '.join(names[:60])}{', ...' if len(names) > 60 else ''}"
