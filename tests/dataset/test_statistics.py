"""Statistics of a dataset, from tables small enough to work out by hand."""

from typing import Any

import pandas as pd
import pytest
from scipy import stats

from hemera import tables
from hemera.dataset import statistics
from hemera.dataset.statistics import Bias


def tiles(*rows: tuple[str, str, str | None, int]) -> pd.DataFrame:
    """As many tiles per data set, score and reason."""
    each = [row[:3] for row in rows for _ in range(row[3])]
    return pd.DataFrame(each, columns=["dataset", "score", "reason"])


def two_engines(**columns: list[Any]) -> pd.DataFrame:
    return pd.DataFrame({"dataset": ["bci"] * len(columns["tile"]), **columns})


def test_rejections_are_in_the_order_of_filters_and_scores() -> None:
    table = statistics.rejections(
        tiles(
            ("bci", "unknown", None, 1),
            ("bci", "3+", "blurred_he", 2), ("bci", "0", None, 3),
            ("bci", "0", "low_tissue", 4),
        )
    )  # fmt: skip
    assert list(table.columns) == ["accepted", "low_tissue", "blurred_he"]
    assert list(table.index) == [("bci", "0"), ("bci", "3+"), ("bci", "unknown")]
    assert table.to_numpy().tolist() == [[3, 4, 0], [0, 0, 2], [1, 0, 0]]
    assert statistics.rejections(tiles()).shape == (0, 1)


def test_selection_bias_names_one_score_and_its_reason() -> None:
    table = statistics.rejections(
        tiles(
            ("bci", "0", None, 90), ("bci", "0", "low_tissue", 10),
            ("bci", "1+", None, 88), ("bci", "1+", "low_tissue", 12),
            ("bci", "3+", None, 50), ("bci", "3+", "low_tissue", 10),
            ("bci", "3+", "blurred_her2", 40),
            ("acrobat", "3+", None, 1), ("acrobat", "3+", "low_tissue", 5),
        )
    )  # fmt: skip
    assert statistics.selection_bias(table) == [Bias("bci", "3+", 0.5, 0.89, "blurred_her2")]
    # One score is compared with nothing, whatever its number of tiles.
    alone = statistics.rejections(
        tiles(
            ("bci", "0", None, 90), ("bci", "1+", "low_tissue", 19), ("bci", "", None, 90),
            ("mist", "0", None, 20), ("mist", "1+", None, 20),
        )
    )  # fmt: skip
    assert set(statistics.comparable(alone).index) == {("mist", "0"), ("mist", "1+")}
    assert statistics.comparable(alone.loc[["bci"]]).empty
    assert statistics.selection_bias(alone.loc[["bci"]]) == []
    assert statistics.comparable(statistics.rejections(tiles())).empty


TWO_ENGINES: dict[str, list[Any]] = {
    "tile": ["t1", "t2", "t3", "t4"],
    "score": ["0", "3+", "3+", "3+"],
    "a_agreement_dice": [1.0, 0.9, 0.5, None],
    "a_agreement_sign": [None, 0.8, 0.3, None],
    "a_positive_fraction": [0.0, 0.4, 0.2, 0.3],
    "b_agreement_dice": [1.0, 0.9, 0.5, None],
    "b_agreement_sign": [None, 0.8, 0.3, None],
    "b_positive_fraction": [0.0, 0.5, 0.6, 0.3],
}


def test_agreement_is_a_mean_over_tiles_that_are_not_empty() -> None:
    tiles = two_engines(**TWO_ENGINES)
    found = statistics.agreement(tiles, ["a", "b"])
    assert found["tile"].tolist() == ["t3", "t2", "t1"], "least agreement first"
    assert found["verdict"].tolist() == ["unsuitable", "suitable", "suitable"]
    low, high = (statistics.agreement_summary(own) for _, own in found.groupby("score"))
    assert (low["tiles"], low["empty"], low["verdict"]) == (1, 1, "")
    assert (high["tiles"], high["empty"], high["verdict"]) == (2, 0, "doubtful")
    assert (high["dice"], high["sign"]) == (pytest.approx(0.7), pytest.approx(0.55))
    assert (high["suitable"], high["doubtful"], high["unsuitable"]) == (1, 0, 1)


def test_each_of_three_engines_is_compared_and_a_single_one_is_not() -> None:
    third = {"c_agreement_dice": [0.2, 0.9, 0.5, None], "c_agreement_sign": [None] * 4}
    tiles = two_engines(**TWO_ENGINES, **third, c_positive_fraction=[0.1, 0.4, 0.2, 0.0])
    found = statistics.agreement(tiles, ["a", "b", "c"])
    assert found["engine"].value_counts().to_dict() == {"a": 3, "b": 3, "c": 3}
    assert found.iloc[0][["tile", "engine", "dice", "empty"]].tolist() == ["t1", "c", 0.2, False]
    alone = tiles.assign(a_agreement_dice=None, a_agreement_sign=None)
    assert statistics.agreement(alone, ["a"]).empty


def test_the_cells_of_a_case_are_added_before_they_are_scored() -> None:
    """By tile: 3+, 0, none; the first two are one case, whose 6 of 100 strong cells are a 0."""
    tiles = two_engines(
        tile=["t1", "t2", "t3", "t4"],
        case=["c1", "c1", "c2", "c3"],
        score=["3+", "3+", "1+", ""],
        **{f"a_{name}": values for name, values in (
            ("cells", [20, 80, 0, 9]), ("weak_cells", [0, 0, 0, 9]),
            ("moderate_cells", [0, 0, 0, 0]), ("strong_cells", [6, 0, 0, 0]),
        )},
    )  # fmt: skip
    by_case = statistics.score_confusion(tiles, "a", "case")
    assert by_case.index.tolist() == ["1+", "3+"]
    assert by_case.to_numpy().tolist() == [[0, 0, 0, 0, 1], [1, 0, 0, 0, 0]]
    by_tile = statistics.score_confusion(tiles, "a", "tile")
    assert by_tile.to_numpy().tolist() == [[0, 0, 0, 0, 1], [1, 0, 0, 1, 0]]
    # 6 % strong cells are a 2+ by the guideline of 2018.
    by_case = statistics.score_confusion(tiles, "a", "case", 0.01)
    assert by_case.loc["3+"].tolist() == [0, 0, 1, 0, 0]


def test_staining_of_cases_by_hand() -> None:
    """Five tiles of 10 cells, 4 of them strong; a case of one tile without cells; one of a tile
    with a cell in each quarter, one strong, and a cell of another engine."""
    tiles = two_engines(
        tile=[f"t{k}" for k in range(7)], case=["c1"] * 5 + ["c2", "c3"],
        score=["3+"] * 5 + ["0", "1+"], size_px=[100] * 7, a_cells=[10] * 5 + [0, 4],
        a_weak_cells=[0] * 7, a_moderate_cells=[0] * 7, a_strong_cells=[4] * 5 + [0, 1],
        a_membrane_od=[0.125] * 5 + [None, 0.25], a_cytoplasm_od=[0.5] * 5 + [None, 0.0],
    )  # fmt: skip
    assert statistics.with_few_tiles(tiles)["tile"].tolist() == ["t5", "t6"]
    cells = pd.DataFrame(
        {
            "tile": "t6", "engine": ["a"] * 4 + ["b"], "x_px": [20, 70, 20, 70, 70],
            "y_px": [20, 20, 70, 70, 70], "intensity": [3, 0, 0, 0, 3],
            "membrane_od": [1.0, 0, 0, 0, 5],
        }
    )  # fmt: skip
    found = statistics.case_staining(tiles, "a", cells)
    assert found.columns.tolist() == tables.STAINING.names
    assert found["case"].tolist() == ["c2", "c3", "c1"]
    rows = found.set_index("case")
    first = rows.loc["c1"].to_dict()
    assert (first["tiles"], first["cells"], first["blocks"]) == (5, 50, "tiles")
    assert 0 < first["h_score_low"] < first["h_score"] == 120 < first["h_score_high"] < 300
    # The same in every tile, and yet as uncertain as the H-score, in proportion.
    relative = [first[f"h_score{end}"] / 120 for end in ("", "_low", "_high")]
    density = [first[f"membrane_od{end}"] / 0.125 for end in ("", "_low", "_high")]
    assert density == pytest.approx(relative)
    assert first["cytoplasm_od"] == 0.5
    assert first["probability_3"] > 0.99
    assert rows.loc["c2"][["h_score", "h_score_low", "membrane_od"]].isna().all()
    assert rows.loc["c2"]["blocks"] == ""
    third = rows.loc["c3"].to_dict()
    assert (third["h_score"], third["membrane_od"], third["blocks"]) == (75, 0.25, "quarters")
    # Four quarters of intensity 3, 0, 0, 0: variance of the mean 0.5625, times 2.2 / 0.6 for their
    # correlation; that of a cell is 1.6875, so they are worth 0.818 cells, and with Student's
    # quantile of three degrees of freedom 0.4. A quarter of each class is the prior.
    assert third["probability_3"] == pytest.approx(stats.beta.sf(0.1, 0.35, 1.05), abs=0.03)
    # The relative variance of the density is 0.229 / 0.0625, its logarithm's ln(4.67).
    assert third["membrane_od_low"] == pytest.approx(0.25 / 18.55, rel=0.01)


def test_mask_statistics_of_a_group() -> None:
    tiles = two_engines(
        tile=["t1", "t2", "t3"], score=["2+"] * 3, size_px=[100] * 3, mpp=[1.0, 2.0, 1.0],
        a_positive_fraction=[0.1, 0.3, None], a_excluded_fraction=[0.0, 0.5, None],
        a_cells=[10, 20, None], a_positive_cells=[3, 12, None],
        a_weak_cells=[3, 3, None], a_moderate_cells=[0, 9, None], a_strong_cells=[0, 0, None],
    )  # fmt: skip
    found = statistics.mask_statistics(tiles, "a").loc["bci", "2+"]
    expected = {"tiles": 2, "median": 0.2, "empty": 0, "cells_per_mm2": 30 / 0.05, "excluded": 0.25}
    expected |= {"positive": 0.5, "weak": 0.2, "moderate": 0.3, "strong": 0}
    assert found.to_dict() == pytest.approx(expected)


def test_split_counts() -> None:
    tiles = pd.DataFrame(
        {"tile": list("xyz"), "split": ["train", "train", "test"], "case": list("aab")}
    )
    assert statistics.split_counts(tiles).to_numpy().tolist() == [[2, 1], [0, 0], [1, 1]]


def test_samples_take_turns_and_depend_on_names_alone() -> None:
    names = [f"t{k}" for k in range(100)]
    groups = ["common"] * 95 + ["rare"] * 5
    chosen = statistics.sample(groups, names, 6, seed=3)
    assert [groups[place] for place in chosen] == ["common"] * 3 + ["rare"] * 3
    backwards = statistics.sample(groups[::-1], names[::-1], 6, seed=3)
    assert {names[::-1][place] for place in backwards} == {names[place] for place in chosen}
    assert statistics.sample(groups, names, 6, seed=4) != chosen
    assert statistics.sample(groups[:2], names[:2], 6, seed=3) in ([0, 1], [1, 0])
    assert statistics.sample([], [], 6, seed=3) == []
