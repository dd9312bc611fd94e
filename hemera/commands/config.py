"""Print the effective configuration, or a config.yaml in which every option is explained."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hemera.config import (
    PRESETS,
    STAGES,
    CohortOptions,
    check_sheet_given,
    load,
    read_yaml,
)
from hemera.config.base import Key, Options, keys, plain
from hemera.errors import ConfigError


def config(
    *, configfile: Path = Path("config.yaml"), template: str | None = None, schema: bool = False
) -> None:
    """Print the effective configuration, in the form of config.yaml.

    Args:
        configfile: the file to read.
        template: print a config.yaml for this preset instead, with every option explained; demo,
            hemera, no_weights, pix2pix, pyramid_pix2pix or variance_penalized.
        schema: print the JSON schema of config.yaml instead, for editors.
    """
    if schema:
        sys.stdout.write(json.dumps(json_schema(), indent=1) + "\n")
    elif template is not None:
        sys.stdout.write(explained(template))
    else:
        given = read_yaml(configfile)
        effective = load(given, source=str(configfile))
        check_sheet_given(effective, given)
        values = plain(effective.cohort)
        values |= {name: plain(options) for name, options in effective.stages.items()}
        yaml.safe_dump(values, sys.stdout, sort_keys=False, allow_unicode=True)


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of config.yaml."""
    made = _schema(CohortOptions) | {"title": "HEMERA"}
    made["properties"] |= {name: _schema(cls) for name, cls in STAGES.items()}
    return made


def _schema(cls: type[Options]) -> dict[str, Any]:
    made = cls.model_json_schema()
    made.pop("$defs", None)
    for dotted, nested in cls.nested().items():
        key, name = dotted.split(".")
        section = made["properties"][key]
        section["additionalProperties"] = False
        section.setdefault("properties", {})[name] = _schema(nested)
    return made


def explained(preset: str) -> str:
    """Return a config.yaml with `preset` and every option with its default in a comment."""
    known = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    if preset not in known:
        raise ConfigError(f"--template {preset}: unknown; choose from {', '.join(known)}")
    changed = load({"preset": preset})
    lines = [
        "# The options of HEMERA. Every key is listed with its default; remove the # before a key",
        "# to change it. `hemera config` prints the effective configuration. Presets:",
        "#",
        "# no_weights: the paper's sizes; needs no downloaded weights.",
        "# hemera: the paper's method; needs DeepLIIF's and ImageNet's weights, and tests on BCI.",
        "# demo: toy sizes for the demo cohort, for two processors and ten minutes.",
        f"preset: {preset}",
        "",
    ]
    for key in keys(CohortOptions).values():
        if key.name != "preset":
            lines += _explained(key, changed.cohort, preset, indent="#")
    for name, cls in STAGES.items():
        lines += ["", f"# {(cls.__doc__ or '').strip()}", f"{name}:"]
        for key in keys(cls).values():
            if not isinstance(key.default, Mapping):
                lines += _explained(key, changed.stages[name], preset, indent="  #")
                continue
            in_force = getattr(changed.stages[name], key.name)
            notes = [key.help, f"paper: {key.paper}", f"preset {preset}: {', '.join(in_force)}"]
            lines.append(_commented(f"  #{key.name}:", notes))
            for dotted, nested in cls.nested().items():
                item = dotted.removeprefix(f"{key.name}.")
                lines.append(_commented(f"  #  {item}:", [(nested.__doc__ or "").strip()]))
                for inner in keys(nested).values():
                    options = in_force.get(item, nested())
                    lines += _explained(inner, options, preset, indent="  #    ")
    return "\n".join(lines) + "\n"


def _explained(key: Key, changed: Options, preset: str, indent: str) -> list[str]:
    """Return the line of one option: its key commented out, then its meaning."""
    notes = [key.help]
    if key.choices:
        notes.append(" | ".join(key.choices))
    if key.paper:
        notes.append(f"paper: {key.paper}")
    value = getattr(changed, key.name)
    if value != key.default:
        notes.append(f"preset {preset}: {_yaml(value)}")
    return [_commented(f"{indent}{key.name}: {_yaml(key.default)}", notes)]


def _commented(line: str, notes: list[str]) -> str:
    return f"{line:<43} # {'; '.join(notes)}"


def _yaml(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_yaml(item) for item in value)}]"
    return yaml.safe_dump(value, width=1000).removesuffix("...\n").strip()
