"""Why a job would run, in words: changed options, missing files, jobs that it follows."""

import ast
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from hemera.config import STAGES
from hemera.config.base import Options, keys, plain_words

_ITEM = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\[[^\]]*\]|[^\s,'"\[]+)"""
_ITEMS = rf"({_ITEM}(?:,{_ITEM})*|<nothing exclusive>)"
_PARAMS = re.compile(rf"before: {_ITEMS} now: {_ITEMS}")
"""Values, as Python writes them, that only one of the two runs has."""

_DIGEST = re.compile(r"[0-9a-f]{16}")
_PLAIN = {
    "Forced execution": "requested",
    "Set of input files has changed": "other input files",
    "Code has changed": "another command in the workflow",
    "Software environment definition has changed": "another environment",
}
_FILES = {
    "Missing output files: ": "missing",
    "Incomplete output files: ": "not finished",
    "Updated input files: ": "newer",
}
OF_FILES = tuple(f"{words}: " for words in _FILES.values())
"""Beginnings of the reasons that name a file."""

_FOLLOWS = "Input files updated by another job: "
_PARTS = re.compile(
    "; (?=" + "|".join(map(re.escape, (*_PLAIN, *_FILES, _FOLLOWS, "Params have changed"))) + ")"
)


def reasons(rule: str, reason: str, producers: Mapping[str, str]) -> list[str]:
    """Return the reasons of a job in words, from those of Snakemake.

    Args:
        producers: the rule that makes each file.
    """
    found: list[str] = []
    for part in _PARTS.split(reason):
        for text, words in _PLAIN.items():
            if part.startswith(text):
                found.append(words)
        for text, words in _FILES.items():
            if part.startswith(text):
                names = part.removeprefix(text).split(", ")
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                found.append(f"{words}: {min(names)}{more}")
        if part.startswith(_FOLLOWS):
            names = part.removeprefix(_FOLLOWS).split(", ")
            rules = dict.fromkeys(producers.get(name, name) for name in sorted(names))
            found.append(f"follows {', '.join(sorted(rules))}")
        if match := _PARAMS.search(part):
            found += _changes(rule, _values(match[1]), _values(match[2]))
    return found or [reason.strip()]


def _values(text: str) -> list[Any]:
    return [] if text.startswith("<") else list(ast.literal_eval(f"[{text}]"))


def _changes(rule: str, before: list[Any], now: list[Any]) -> Iterator[str]:
    """Yield what differs between the parameters of a rule; Snakemake's records lack their names."""
    stage = next((name for name in STAGES if rule in (name, f"{name}_cohort")), None)
    for is_kind, words in (
        (_is_flags, None),
        (_is_digest, "rows of the sheet"),
        (lambda value: isinstance(value, int), f"version of {stage or rule}"),
        (lambda value: True, "parameters"),
    ):
        old = [value for value in before if is_kind(value)]
        new = [value for value in now if is_kind(value)]
        before = [value for value in before if value not in old]
        now = [value for value in now if value not in new]
        if not old and not new:
            continue
        if words is None and stage is not None:
            yield from changed_options(STAGES[stage], *(" ".join(side) for side in (old, new)))
        elif words == "rows of the sheet":
            yield words
        else:
            yield f"{words or 'parameters'}: {_shown(old)} -> {_shown(new)}"


def _is_flags(value: Any) -> bool:
    return value == "" or (isinstance(value, str) and value.startswith("--"))


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _shown(values: list[Any]) -> str:
    return ", ".join(str(value) for value in values) or "none"


def changed_options(cls: type[Options], before: str, now: str) -> Iterator[str]:
    """Yield ``stage.key: before -> now`` for each option that differs between two texts of flags.

    A text has the options that differ from their defaults, as `hemera.config.base.flags` returns
    them; an option of which only one of them speaks has its default in the other.
    """
    old, new = _by_name(before), _by_name(now)
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            default = _default(cls, name)
            yield f"{cls.section}.{name}: {old.get(name, default)} -> {new.get(name, default)}"


def _by_name(text: str) -> dict[str, str]:
    """Return the values of flags, as words, by dotted name."""
    found: dict[str, list[str]] = {}
    name = ""
    for word in shlex.split(text):
        if word.startswith("--"):
            flag, _, value = word[2:].partition("=")
            name = flag.replace("-", "_")
            found[name] = [value] if value else []
        else:
            found.setdefault(name, []).append(word)
    return {name: " ".join(words) for name, words in found.items()}


def _default(cls: type[Options], dotted: str) -> str:
    """Return the default of an option as the words of its flag; none: it is not given."""
    *parents, name = dotted.split(".")
    if parents:
        nested = cls.nested().get(".".join(parents))
        if nested is None:
            return "none"
        cls = nested
    return plain_words(keys(cls)[name].default) if name in keys(cls) else "none"
