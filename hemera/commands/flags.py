"""Words of the command line that several commands take: checked as argparse reads them."""

from __future__ import annotations

import argparse
import math


def positive(word: str) -> float:
    """Return a positive number."""
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{word!r} is not a positive number")
    return value


def quality(word: str) -> int:
    """Return a quality of JPEG, 1 to 100."""
    return _whole(word, 100)


def workers(word: str) -> int:
    """Return a number of threads, 1 to 256."""
    return _whole(word, 256)


def _whole(word: str, most: int) -> int:
    if not (word.isascii() and word.isdigit() and 1 <= int(word) <= most):
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number from 1 to {most}")
    return int(word)
