"""The layout of results: patterns and paths."""

from pathlib import Path

import pytest

from hemera.files import layout


@pytest.mark.parametrize("unit", ["slide_1", "bci.003"])
def test_a_path_is_in_the_folder_of_results(unit: str) -> None:
    found = layout.path(layout.DISPLACEMENT, unit=unit)
    assert found == Path(layout.DISPLACEMENT.format(unit=unit))
    found = layout.path(layout.DISPLACEMENT, Path("else/where"), unit=unit)
    assert found == Path("else/where/register") / f"{unit}.displacement.npz"
