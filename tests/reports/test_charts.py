"""Charts: areas and places follow the values; text is escaped."""

import collections
import re

import numpy as np
import pandas as pd
import pytest

from hemera.reports import charts


def areas(chart: str) -> dict[str, float]:
    """Areas of the filled shapes of a chart, by colour."""
    found: dict[str, float] = collections.Counter()
    for path, color in re.findall(r'<path d="([^"]+)" style="fill: (#\w+)', chart):
        x, y = np.array([float(n) for n in re.findall(r"[\d.]+", path)]).reshape(-1, 2).T
        found[color] += abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    return found


def test_histogram_draws_each_group_to_its_count() -> None:
    chart = charts.histogram(
        "a measure",
        [("in", "#111111", np.full(30, 0.25)), ("out", "#222222", np.full(10, 0.75))],
        limits=[("limit", 0.5)],
        span=(0.0, 1.0),
        bins=4,
    )
    found = areas(chart)
    assert found["#111111"] / found["#222222"] == pytest.approx(3)
    assert "limit" in chart


def test_bars_are_as_long_as_their_counts_or_of_one_length() -> None:
    rows = pd.DataFrame({"x": [30, 0], "y": [10, 0], "z": [0, 5]}, index=["a", "b"])
    colors = {"x": "#111111", "y": "#222222", "z": "#333333"}
    for relative, ratio in ((False, 8), (True, 1)):
        chart = charts.bars("t", rows, colors, ["", ""], relative=relative)
        found = areas(chart)
        assert found["#111111"] / found["#222222"] == pytest.approx(3)
        total = found["#111111"] + found["#222222"]
        assert total / found["#333333"] == pytest.approx(ratio)


def test_boxes_show_the_quartiles() -> None:
    chart = charts.boxes("spread", [("a", np.arange(101.0)), ("b", np.arange(51.0))])
    found = [float(path.split()[1]) for path in re.findall(r'd="([^"]+)"[^>]*#56b4e9', chart)]
    # Lower quartiles 25 and 12.5 on an axis from 0 to 1.02 times the largest 95th percentile.
    plot = charts.WIDTH_PX - 16
    expected = [6 + q / (1.02 * 95) * plot for q in (25, 12.5)]
    assert found == pytest.approx(expected, abs=0.2)
