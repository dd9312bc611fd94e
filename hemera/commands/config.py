"""Print the configuration in force, or a config.yaml in which every option is explained."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

from hemera.config import (
    STAGES,
    CohortOptions,
    Config,
    load,
    load_file,
)
from hemera.config.base import Key, Options, keys, plain


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--configfile", type=Path, default=Path("config.yaml"), help="the file")
    parser.add_argument(
        "--template", metavar="PRESET", help="print a config.yaml for this preset instead"
    )


def main(namespace: argparse.Namespace) -> int:
    """Print the configuration as YAML that could itself be a config.yaml."""
    if namespace.template is not None:
        sys.stdout.write(template(namespace.template))
    else:
        sys.stdout.write(text(load_file(namespace.configfile)))
    return 0


def text(config: Config) -> str:
    """Return the whole configuration as YAML."""
    values = plain(config.cohort)
    for name, options in config.stages.items():
        values[name] = plain(options)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def template(preset: str) -> str:
    """Return a config.yaml that names `preset` and holds every option as a comment.

    Beside each key stands its default, what the paper uses and what the preset changes.
    """
    changed = load({"preset": preset})
    lines = [
        "# What HEMERA does, and with which numbers. Every key is listed with its default;",
        "# take the # away to change it. `hemera config` prints what is in force.",
        "#",
        "# preset hemera: the paper's values, which are the defaults.",
        "# preset demo: toy sizes for the demo cohort, for two processors and ten minutes.",
        f"preset: {preset}",
        "",
    ]
    for key in keys(CohortOptions).values():
        if key.name != "preset":
            lines += _explained(key, changed.cohort, indent="")
    for name, cls in STAGES.items():
        lines += ["", f"# {(cls.__doc__ or '').strip()}", f"{name}:"]
        for key in keys(cls).values():
            lines += _explained(key, changed.stages[name], indent="  ")
    return "\n".join(lines) + "\n"


def _explained(key: Key, changed: Options, indent: str) -> list[str]:
    """Return the line of one option: its key commented out, what it means behind it."""
    notes = [key.help]
    if key.choices:
        notes.append(" | ".join(key.choices))
    if key.paper:
        notes.append(f"paper: {key.paper}")
    value = getattr(changed, key.name)
    if value != key.default:
        notes.append(f"this preset: {_yaml(value)}")
    line = f"{indent}# {key.name}: {_yaml(key.default)}"
    return [f"{line:<43} # {'; '.join(notes)}"]


def _yaml(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_yaml(item) for item in value)}]"
    return yaml.safe_dump(value, width=1000).removesuffix("...\n").strip()
