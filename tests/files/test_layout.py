import pytest

from hemera.files import layout


@pytest.mark.parametrize(
    ("path", "unit"),
    [
        (layout.TILES.format(unit="p-1_a"), "p-1_a"),
        (layout.PAIRS.format(unit="bci.000"), "bci.000"),
        (layout.CELLS.format(unit="bci.000"), "bci.000"),
        (layout.GENERATOR.format(generator="hemera"), "hemera"),
        (layout.FEATURES.format(encoder="uni", unit="slide_1"), "uni/slide_1"),
        (layout.AGGREGATOR_METADATA.format(method="abmil"), "abmil"),
        (layout.LANDMARK_COHORT, ""),
        (layout.INDEX, ""),
        ("img/1.tif", ""),
    ],
)
def test_the_unit_of_an_output(path: str, unit: str) -> None:
    assert layout.unit(path) == unit
