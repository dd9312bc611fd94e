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
    parser.add_argument(
        "--workers", type=int, default=2, help="processes; any number writes the same bytes"
    )


def main(namespace: argparse.Namespace) -> int:
    """Write the cohort."""
    write_cohort(namespace.folder, namespace.size, workers=namespace.workers)
    return 0
