from typing import Any

import pytest

from hemera.config.base import parse_word


@pytest.mark.parametrize(
    ("word", "annotation", "value"),
    [
        ("none", int | None, None),
        ("none", str, "none"),
        ("5", int, 5),
        ("-1e-05", float, -1e-5),
        ("true", bool, True),
        ("false", bool, False),
    ],
)
def test_words(word: str, annotation: Any, value: Any) -> None:
    assert parse_word(word, annotation) == value


@pytest.mark.parametrize(
    ("word", "annotation"),
    [("none", int), ("5.0", int), ("x", float), ("True", bool), ("1", bool), ("", int | None)],
)
def test_words_that_are_none(word: str, annotation: Any) -> None:
    with pytest.raises(ValueError, match="is n"):
        parse_word(word, annotation)
