import json

import pytest

from hemera.files.json_text import NESTING_MAX, loads


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def test_what_json_reads() -> None:
    text = '{"a\\"[[": [1, {"b": "]]]} \\u00e9"}], "c": null}'
    assert loads(text) == json.loads(text)
    assert loads("3") == 3


def test_the_limit_of_nesting() -> None:
    assert loads(nested(NESTING_MAX)) == json.loads(nested(NESTING_MAX))
    for depth in (NESTING_MAX + 1, 100_000):
        with pytest.raises(ValueError, match=f"nested {depth} levels"):
            loads(nested(depth))
    # Brackets in texts neither add to the depth nor hide it.
    assert loads(json.dumps("[" * 1000)) == "[" * 1000
    with pytest.raises(ValueError, match="nested"):
        loads(f'["{"]" * 1000}", {nested(200)}]')


@pytest.mark.parametrize("text", ["", "{", '"\\', "[1,", "nul"])
def test_not_json(text: str) -> None:
    with pytest.raises(ValueError):
        loads(text)
