"""Numbers as people type them, and what is no such number."""

import argparse

import pytest

from hemera.commands import flags


def test_numbers():
    assert flags.positive("0.25") == 0.25
    assert (flags.quality("1"), flags.quality("100"), flags.workers("256")) == (1, 100, 256)


@pytest.mark.parametrize("word", ["0", "-1", "nan", "inf", "", "ten"])
def test_what_is_not_positive(word):
    with pytest.raises(argparse.ArgumentTypeError, match="not a positive number"):
        flags.positive(word)


@pytest.mark.parametrize("word", ["0", "101", "1.5", "-3", "", "²"])
def test_what_is_no_quality(word):
    with pytest.raises(argparse.ArgumentTypeError, match="from 1 to 100"):
        flags.quality(word)
