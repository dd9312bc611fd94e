"""The layout of results: patterns, paths and the units in them."""

from pathlib import Path

import pytest

from hemera.files import layout


@pytest.mark.parametrize("pattern", [layout.DISPLACEMENT, layout.CERTIFICATE, layout.PAIRS])
@pytest.mark.parametrize("unit", ["slide_1", "bci.003"])
def test_the_unit_is_in_the_path_and_comes_back(pattern: str, unit: str) -> None:
    assert layout.path(pattern, unit=unit) == Path(pattern.format(unit=unit))
    found = layout.path(pattern, Path("else/where"), unit=unit)
    assert found.parent.parent == Path("else/where")
    assert layout.unit(found, pattern) == unit


def test_a_shard_is_named_by_its_stage() -> None:
    path = layout.path(layout.MASK_SHARD, Path("/x"), unit="bci.003")
    assert layout.member(path) == "mask/bci.003.tar"
