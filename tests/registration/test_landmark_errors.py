"""Errors at landmarks worked out by hand: a known shift, and statistics of known numbers."""

import math

import numpy as np
import pytest

from hemera.registration.displacement import Displacement
from hemera.registration.landmark_errors import (
    cohort_figures,
    pair_figures,
    point_errors,
    predict,
)
from hemera.registration.landmarks import Landmarks
from tests.small_displacements import field_of

SHIFT = Displacement(np.full((40, 30, 2), (30.0, -40.0), np.float32), 50.0)
"""Every point moves by 50 um."""
SIZE_UM = (1500.0, 2000.0)
"""Its diagonal is 2500 um."""
NOWHERE = (math.nan, math.nan)


def mark(her2, *he, point="0"):
    """Return one row of a file; None: withheld."""
    return point, [NOWHERE if place is None else place for place in he], her2 or NOWHERE


def errors(*marks, d=SHIFT, size_um=SIZE_UM):
    names, he, her2 = zip(*marks, strict=True)
    landmarks = Landmarks(names, np.array(he, float), np.array(her2, float))
    return point_errors(landmarks, predict(d, landmarks.her2), d, size_um)


class TestTargetRegistrationError:
    def test_it_is_the_distance_on_her2(self):
        # (100, 200) is mapped to (130, 160); 3-4-5 beside it.
        other = mark((730, 860), (700, 900), point="1")
        first, second = errors(mark((133, 164), (100, 200)), other)
        assert first["error_um"] == pytest.approx(5)
        assert first["error_diagonal_fraction"] == pytest.approx(5 / 2500)
        assert first["initial_error_um"] == pytest.approx(math.hypot(33, 36))
        assert (first["he_x_um"], first["her2_y_um"]) == (100, 164)
        assert (second["point"], second["error_um"]) == ("1", pytest.approx(0, abs=1e-6))

    def test_a_withheld_side_has_no_error_and_is_predicted(self):
        (found,) = errors(mark((133, 164), None))
        assert (found["he_x_um"], found["error_um"], found["initial_error_um"]) == (None,) * 3
        assert found["official_error_um"] is None
        assert found["predicted_x_um"] == pytest.approx(103, abs=1e-3)
        (found,) = errors(mark(None, (1, 2)))
        assert (found["predicted_x_um"], found["error_um"]) == (None, None)


class TestOfficial:
    """The distance on H&E, from the predicted place of HER2's point to the marked one."""

    def test_where_the_map_scales_it_is_not_the_error_on_her2(self):
        # On HER2 (200, 400) and (206, 408) are 10 um apart; on H&E (100, 200), (103, 204): 5.
        (found,) = errors(mark((206, 408), (100, 200)), d=field_of(lambda p: p * 2, 30, 40, 50.0))
        assert found["error_um"] == pytest.approx(10, abs=1e-2)
        assert found["predicted_x_um"] == pytest.approx(103, abs=0.01)
        assert found["official_error_um"] == pytest.approx(5, abs=1e-2)
        assert found["official_initial_error_um"] == pytest.approx(math.hypot(106, 208))

    @pytest.mark.parametrize("in_columns", [True, False])
    def test_two_annotators_in_columns_or_rows(self, in_columns):
        # (130, 160) comes from (100, 200): 5 um from one mark, 10 from the other.
        marks = (103, 204), (100, 190)
        rows = [mark((130, 160), *marks)]
        if not in_columns:
            rows = [mark((130, 160), one) for one in marks]
        (found,) = errors(*rows)
        assert found["official_error_um"] == pytest.approx(7.5, abs=1e-3)
        assert found["error_um"] == pytest.approx(7.5, abs=1e-3)
        initial = (math.hypot(27, 44) + math.hypot(30, 30)) / 2
        assert found["official_initial_error_um"] == pytest.approx(initial)
        assert (found["he_x_um"], found["he_y_um"]) == (101.5, 197)

    def test_a_point_that_one_annotator_lacks_is_left_out(self):
        """As the official evaluation does; the target registration error uses what there is."""
        (found,) = errors(mark((130, 160), (103, 204), None))
        assert (found["official_error_um"], found["official_initial_error_um"]) == (None, None)
        assert found["error_um"] == pytest.approx(5, abs=1e-3)

    def test_what_is_outside_of_the_slide_is_moved_to_its_edge(self):
        # From (-20, 200) to (0, 200); from (1530, 2030) to (1500, 2000); a y of 1740 would be
        # outside if width and height were swapped.
        left, low, tall = errors(
            mark((10, 160), (0, 200)),
            mark((1560, 1990), (1497, 1996), point="1"),
            mark((130, 1700), (100, 1740), point="2"),
        )
        assert left["predicted_x_um"] == pytest.approx(-20, abs=1e-3), "kept as it is"
        assert left["official_error_um"] == pytest.approx(0, abs=1e-3)
        assert left["error_um"] == pytest.approx(20, abs=1e-3)
        assert low["official_error_um"] == pytest.approx(5, abs=1e-3)
        assert low["official_initial_error_um"] == pytest.approx(math.hypot(3, 6))
        assert tall["official_error_um"] == pytest.approx(0, abs=1e-3)

    def test_a_point_without_a_prediction_counts_unregistered(self):
        he, her2 = (
            np.array([[(637.0, 104.0)], [(200, 300)]]),
            np.array([(640.0, 100.0), (230, 260)]),
        )
        predicted = np.array([NOWHERE, (200.0, 300.0)])
        rows = point_errors(Landmarks(["0", "1"], he, her2), predicted, SHIFT, SIZE_UM)
        assert rows[0]["predicted_x_um"] is None
        assert rows[0]["official_error_um"] == pytest.approx(5)
        assert rows[0]["error_um"] == pytest.approx(math.hypot(27, 36))
        assert rows[1]["official_error_um"] == pytest.approx(0, abs=1e-6)


def columns(errors, initial, official=None, official_initial=None):
    return {
        "error_um": errors,
        "error_diagonal_fraction": [None if error is None else error / 2000 for error in errors],
        "initial_error_um": initial,
        "official_error_um": errors if official is None else official,
        "official_initial_error_um": initial if official_initial is None else official_initial,
    }


class TestFigures:
    def test_of_a_pair(self):
        """Of 1, 2, 3, 10: the median is 2.5; the 90th percentile is 0.7 of the way 3 to 10."""
        found = pair_figures(columns([10, 1, 3, 2], [20, 40, 60, 80], [8, 4, 2, 6], [9, 9, 9, 9]))
        assert found == pytest.approx(
            {
                "pairs": 1, "unregistered": 0, "points": 4,
                "error_median_um": 2.5, "error_p90_um": 7.9,
                "error_median_diagonal_fraction": 2.5 / 2000,
                "error_p90_diagonal_fraction": 7.9 / 2000,
                "initial_error_median_um": 50, "initial_error_p90_um": 74,
                "official_error_p90_um": 7.4, "official_error_mean_um": 5,
                "official_initial_error_p90_um": 9, "official_initial_error_mean_um": 9,
            }
        )  # fmt: skip

    def test_of_the_cohort(self):
        """90th percentiles 2, 8, 20: median 8, mean 10, deviation sqrt(56) with n below."""
        # Of 0, 0, 10, at rank 1.8: 8; its mean is 10/3.
        pairs = [([2], [100]), ([20, 20, 20], [300] * 3), ([0, 0, 10], [200] * 3)]
        rows = [pair_figures(columns(*pair)) for pair in pairs]
        median, mean, std = cohort_figures(rows)
        assert [row["aggregation"] for row in (median, mean, std)] == ["median", "mean", "std"]
        assert median["official_error_p90_um"] == pytest.approx(8), "ranking of 2022"
        assert mean["official_error_p90_um"] == pytest.approx(10), "ranking of 2023"
        assert std["official_error_p90_um"] == pytest.approx(math.sqrt((64 + 4 + 100) / 3))
        assert mean["official_error_mean_um"] == pytest.approx((2 + 10 / 3 + 20) / 3)
        assert median["official_initial_error_p90_um"] == pytest.approx(200)
        assert median["error_median_um"] == pytest.approx(2)
        assert (median["pairs"], median["points"]) == (3, 7)

    def test_a_pair_without_a_map_counts_unregistered(self):
        """In ACROBAT's figures; in the others, where it has no error, not at all."""
        lost = pair_figures(columns([None] * 2, [70, 70], [60, 60], [60, 60]))
        assert (lost["pairs"], lost["unregistered"], lost["points"]) == (1, 1, 2)
        assert lost["error_p90_um"] is None
        assert lost["official_error_p90_um"] == lost["official_initial_error_p90_um"] == 60
        mean = cohort_figures([pair_figures(columns([4, 4], [50, 50])), lost])[1]
        assert (mean["pairs"], mean["unregistered"]) == (2, 1)
        assert mean["official_error_p90_um"] == pytest.approx(32)
        assert mean["error_p90_um"] == pytest.approx(4)
