"""The table of criteria against stage filter's options, the tables' columns and worked tiles."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from hemera import tables
from hemera.config import FilterOptions
from hemera.dataset import criteria

LIMITS: dict[str, Any] = FilterOptions().model_dump()
ARTEFACT_LIMITS = ("pen_max", "fold_max", "edge_max", "dust_max", "other_max", "blur_max")
GOOD = {
    "tissue_fraction": 0.9,
    "her2_coverage_fraction": 1.0,
    "folding_fraction": 0.0,
    "registration_error_um": 10.0,
    "registration_margin": 0.2,
    "he_sharpness": 100.0,
    "her2_sharpness": 100.0,
    "histogram_similarity": 0.6,
    "dataset": "bci",
    "registration": "pass",
    "size_px": 512,
    "mpp": 0.5,
    **dict.fromkeys((c.column for c in criteria.CRITERIA if c.option in ARTEFACT_LIMITS), 0.0),
}


def test_every_criterion_names_an_option_and_a_column_that_exist() -> None:
    for criterion in criteria.CRITERIA:
        assert criterion.option in LIMITS
        assert criterion.column in {None, "agreement", "excluded", "nuclei", *tables.TILE.names}
    assert set(criteria.MEASURES) <= set(tables.TILE.names)
    assert list(criteria.REASONS) == list(dict.fromkeys(c.reason for c in criteria.CRITERIA))


@pytest.mark.parametrize("criterion", [c for c in criteria.CRITERIA if c.column in GOOD])
def test_a_value_at_the_bound_is_accepted_and_one_beyond_it_or_none_is_not(
    criterion: criteria.Criterion,
) -> None:
    limit = LIMITS[criterion.option]
    beyond = limit + (-1e-6 if criterion.direction == ">=" else 1e-6)
    table = pa.Table.from_pylist([{**GOOD, criterion.column: v} for v in (limit, beyond, None)])
    assert criteria.refusals(table, LIMITS).tolist() == ["", criterion.reason, criterion.reason]
    if criterion.reason == "misregistered":
        off = {**LIMITS, "registration_error_max_um": None, "registration_margin_min": None}
        assert criteria.refusals(table, off).tolist() == ["", "", ""]


def first_reasons(*rows: dict[str, Any], **limits: Any) -> list[str]:
    table = pa.Table.from_pylist([{**GOOD, **row} for row in rows])
    return criteria.refusals(table, {**LIMITS, **limits}).tolist()


def test_no_similarity_is_unlike_in_the_named_data_sets_alone() -> None:
    """Of a flat image there is no correlation."""
    rows = [{"dataset": name, "histogram_similarity": None} for name in ("bci", "acrobat")]
    assert first_reasons(*rows) == ["unlike_histograms", ""]
    assert first_reasons(*rows, histogram_datasets=("acrobat", "x")) == ["", "unlike_histograms"]
    assert first_reasons(*rows, histogram_datasets=()) == ["", ""]


def test_the_first_reason_counts() -> None:
    """Tissue comes before sharpness: the noise of an empty tile is sharp."""
    faults: dict[str, dict[str, Any]] = {
        "registration_review": {"registration": "review"},
        "low_tissue": {"tissue_fraction": 0.1},
        "outside_her2": {"her2_coverage_fraction": 0.5},
        "folded": {"folding_fraction": 0.5},
        "misregistered": {"registration_error_um": 500.0, "registration_margin": 0.1},
        "pen": {"her2_pen_fraction": 0.1},
        "edge": {"he_edge_fraction": 0.1},
        "partly_blurred": {"her2_blur_fraction": 0.5},
        "tissue_fold": {"he_fold_fraction": 0.1},
        "dust": {"her2_dust_fraction": 0.1},
        "other_artefact": {"he_other_fraction": 0.1},
        "blurred_he": {"he_sharpness": 1.0},
        "blurred_her2": {"her2_sharpness": 1.0},
        "unlike_histograms": {"histogram_similarity": -0.5},
    }
    rows: list[dict[str, Any]] = []
    for fault in reversed(faults.values()):
        rows.insert(0, {**(rows[0] if rows else {}), **fault})
    assert first_reasons(*rows) == list(faults)


@pytest.mark.parametrize(
    ("registration", "accept_review", "reason"),
    [
        ("registered", False, ""),
        ("pass", False, "misregistered"),
        ("accepted", False, ""),
        ("review", False, "registration_review"),
        ("review", True, "misregistered"),
    ],
)
def test_where_nothing_was_measured_the_registration_decides(
    registration: str, accept_review: bool, reason: str
) -> None:
    row = {"registration": registration, "registration_error_um": None, "registration_margin": None}
    assert first_reasons(row, accept_review=accept_review) == [reason]


@pytest.mark.parametrize("engines", [("a", "b"), ("a", "b", "c")])
def test_the_least_agreement_of_any_two_engines_counts(engines: tuple[str, ...]) -> None:
    """The lower of Dice and sign; where no cell matched, Dice; null Dice and sign: none."""
    dice = [0.9, 0.9, 0.4, 0.9, None, 0.5, 0.8, None]
    sign = [0.9, 0.4, 0.9, None, 0.9, 0.5, 0.8, None]
    columns: dict[str, list[Any]] = {name: [value] * 8 for name, value in GOOD.items()}
    for engine in engines:
        # The row of an engine holds its least agreement: only one of three disagrees with both.
        mild = engine == "b" and len(engines) == 3
        columns[f"{engine}_excluded_fraction"] = [0.0] * 8
        columns[f"{engine}_cells"] = [100] * 8
        columns[f"{engine}_agreement_dice"] = [0.9] * 7 + [None] if mild else dice
        columns[f"{engine}_agreement_sign"] = [0.9] * 7 + [None] if mild else sign
    table = pa.table(columns)
    assert not criteria.refusals(table, LIMITS, engines).any()
    found = criteria.refusals(table, {**LIMITS, "require_agreement": 0.5}, engines)
    kept = [True, False, False, True, True, True, True, False]
    np.testing.assert_array_equal(found == "", kept)
    assert set(found[found != ""]) == {"disputed_mask"}


def test_a_tile_with_too_few_nuclei_by_every_engine_is_refused() -> None:
    """50 per mm^2 are 3.3 on 256 um, and 1.6 where half of the tile is excluded."""
    columns = {
        "size_px": [512] * 5,
        "mpp": [0.5] * 5,
        "a_cells": [4, 3, 3, 2, 0],
        "a_excluded_fraction": [0.0, 0.0, 0.0, 0.5, 1.0],
        "b_cells": [0, 4, 3, 0, 0],
        "b_excluded_fraction": [0.0, 0.0, 0.0, 0.5, 1.0],
    }
    table = pa.table({name: [value] * 5 for name, value in GOOD.items()} | columns)
    limits = {**LIMITS, "excluded_max": 1.0}
    found = criteria.refusals(table, limits, ("a", "b")).tolist()
    assert found == ["", "", "few_nuclei", "", ""]
    assert criteria.refusals(table, limits, ("a",)).tolist()[1] == "few_nuclei"
    assert not criteria.refusals(table, {**limits, "nuclei_min_per_mm2": 0}, ("a",)).any()


def test_a_tile_is_refused_by_the_engine_that_excludes_most_of_it() -> None:
    excluded = {"a_excluded_fraction": [0.5, 0.51, 0.0], "b_excluded_fraction": [0.1, 0.1, 0.7]}
    excluded |= {"a_cells": [100] * 3, "b_cells": [100] * 3}
    table = pa.table({name: [value] * 3 for name, value in GOOD.items()} | excluded)
    assert criteria.refusals(table, LIMITS, ("a", "b")).tolist() == ["", "artefact", "artefact"]
    assert criteria.refusals(table, LIMITS, ("a",)).tolist() == ["", "artefact", ""]
