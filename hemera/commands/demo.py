"""Write the synthetic cohort with known truth."""

from __future__ import annotations

import argparse
from pathlib import Path

from hemera.demo import write_cohort


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--folder", type=Path, required=True, help="where the cohort is written")
    parser.add_argument(
        "--size", choices=("full", "small"), default="full", help="small: what the tests use"
    )


def main(namespace: argparse.Namespace) -> int:
    """Write the cohort."""
    write_cohort(namespace.folder, namespace.size)
    return 0
