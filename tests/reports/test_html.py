"""Numbers as they are written on the pages."""

import pytest

from hemera.reports.html import DASH, fixed, number, percent, plural


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (number(0.12345), "0.123"),
        (number(1234567.0), "1\u202f234\u202f567"),
        (number(98765.4), "98\u202f765"),
        (number(-0.5), "−0.5"),
        (number(0.00012345), "0.000123"),
        (number(float("nan")), DASH),
        (number(None), DASH),
        (number(float("inf")), "∞"),
        (fixed(0.5), "0.500"),
        (fixed(-1.25, 1), "−1.2"),
        (percent(1.0), "100.0 %"),
        (percent(0.0), "0.0 %"),
        # Not all and not none must not read as all and none.
        (percent(0.99999), ">99.9 %"),
        (percent(0.00001), "<0.1 %"),
        (plural(1, "tile"), "1 tile"),
        (plural(0, "tile"), "0 tiles"),
    ],
)
def test_numbers_read_as_they_are(made: str, expected: str) -> None:
    assert made == expected
