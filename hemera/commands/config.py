"""Print the configuration in force: every option of every stage, after preset and defaults."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import yaml

from hemera.config import Config, load_file


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--configfile", type=Path, default=Path("config.yaml"), help="the file")


def main(namespace: argparse.Namespace) -> int:
    """Print the configuration as YAML that could itself be a config.yaml."""
    sys.stdout.write(text(load_file(namespace.configfile)))
    return 0


def text(config: Config) -> str:
    """Return the whole configuration as YAML."""
    values: dict[str, object] = dict(dataclasses.asdict(config.cohort))
    for name, options in config.stages.items():
        values[name] = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(options).items()
        }
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
