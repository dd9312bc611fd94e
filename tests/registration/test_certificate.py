"""Right maps pass, wrong ones fail, and each signal says what it is said to say."""

import dataclasses
import math

import numpy as np
import pytest

from hemera.config import RegisterOptions
from hemera.registration import displacement as dp
from hemera.registration.local_quality import LocalQuality
from hemera.registration.signals import Signals, tissue
from hemera.registration.signals import measure as measured
from hemera.registration.verdict import judge, prefer_rigid
from tests.small_sections import FIXED_PX, FIXED_UM, MOVING_UM, MPP, sections, to_moving

LIMITS = RegisterOptions()
GOOD = Signals(
    LocalQuality(np.zeros((0, 2)), np.zeros(0), np.zeros(0), np.zeros((0, 2)), 1.0, 1.0),
    tile_ok=0.9,
    lncc=0.3,
    ncc=0.7,
    ncc_margin=0.2,
    rotation_deg=3.0,
    scale=1.01,
    anisotropy=1.02,
    determinant=1.02,
    folding_fraction=0.0,
    coverage_fraction=1.0,
    displacement_median_um=80.0,
)


def made(function, mpp=MPP):
    grid = dp.identity(*FIXED_UM, mpp)
    nodes = dp.node_points(grid)
    return dp.Displacement((function(nodes) - nodes).astype(np.float32), mpp)


@pytest.fixture(scope="module")
def pair():
    return sections()


def measure(pair, d, moving=None, **more):
    fixed, own = pair
    return measured(
        fixed,
        own if moving is None else moving,
        d,
        fixed_mpp=MPP,
        moving_mpp=MPP,
        fixed_size_um=FIXED_UM,
        moving_size_um=MOVING_UM,
        **more,
    )


def judged(signals, **more):
    return judge(signals, LIMITS, **{"match_count": 200, "match_fraction": 0.9} | more)


def verdict(signals, **more):
    found = judged(signals, **more)
    return found.verdict, found.reason


class TestMeasure:
    def test_the_true_map_passes(self, pair):
        signals = measure(pair, made(to_moving))
        assert signals.tile_ok > 0.95
        assert signals.lncc > 0.5
        assert signals.ncc > 0.8
        assert signals.ncc_margin > 0.3
        assert signals.rotation_deg == pytest.approx(11, abs=0.5)
        assert signals.scale == pytest.approx(1, abs=0.02)
        assert signals.determinant == pytest.approx(1, abs=0.03)
        assert signals.folding_fraction == 0
        assert signals.coverage_fraction == 1
        assert verdict(signals) == ("pass", None)

    @pytest.mark.parametrize(
        "wrong",
        [
            lambda p: p,
            lambda p: to_moving(p) + np.array([60, -45]),
            lambda p: to_moving(np.array(FIXED_UM) - p),
            lambda p: to_moving(p * (1, -1) + (0, FIXED_UM[1])),
        ],
        ids=["identity", "shifted", "turned over", "mirrored"],
    )
    def test_a_wrong_map_fails(self, pair, wrong):
        assert verdict(measure(pair, made(wrong)))[0] == "fail"

    def test_other_tissue_fails_under_the_map_of_the_right_one(self):
        signals = measure(sections(1, other_seed=2), made(to_moving))
        assert signals.tile_ok < 0.3
        assert verdict(signals)[0] == "fail"

    def test_a_small_shift_lowers_what_it_should(self, pair):
        right = measure(pair, made(to_moving))
        # Six pixels: more than a nucleus, less than the shifts a tile is held against.
        off = measure(pair, made(lambda p: to_moving(p) + np.array([24, 0])))
        assert off.lncc < right.lncc / 2
        assert off.ncc < right.ncc

    def test_a_blank_slide_has_nothing_in_common(self, pair):
        fixed, moving = pair
        blank = np.full_like(moving, 246)
        assert verdict(measure(pair, made(to_moving), blank))[0] == "fail"
        nothing = measure((np.full_like(fixed, 246), moving), made(to_moving))
        assert (nothing.tile_ok, nothing.lncc, nothing.coverage_fraction) == (None, None, None)
        assert verdict(nothing)[0] == "fail"
        assert "no tissue" in verdict(nothing)[1]

    def test_coverage_is_the_share_of_tissue_that_lands_on_the_slide(self, pair):
        def half(points):
            # Only the right half of the tissue lands at x >= 0.
            return points - (FIXED_UM[0] / 2, 0)

        signals = measure(pair, made(half))
        inside = tissue(pair[0], 1.0)
        expected = inside[:, FIXED_PX[0] // 2 :].sum() / inside.sum()
        assert signals.coverage_fraction == pytest.approx(expected, abs=0.01)

    def test_a_map_over_half_the_slide_covers_half(self, pair):
        whole = made(to_moving)
        half = dp.Displacement(np.ascontiguousarray(whole.vectors_um[:, : FIXED_PX[0] // 2]), MPP)
        signals = measure(pair, half)
        inside = tissue(pair[0], 1.0)
        expected = inside[:, : FIXED_PX[0] // 2].sum() / inside.sum()
        assert signals.coverage_fraction == pytest.approx(expected, abs=0.02)
        assert verdict(signals)[0] == "review"

    def test_a_right_map_onto_half_a_slide_is_review_for_its_coverage(self, pair):
        fixed, moving = pair
        half = moving.shape[1] // 2
        signals = measured(
            fixed,
            moving[:, :half],
            made(to_moving),
            fixed_mpp=MPP,
            moving_mpp=MPP,
            fixed_size_um=FIXED_UM,
            moving_size_um=(half * MPP, MOVING_UM[1]),
        )
        assert 0.3 < signals.coverage_fraction < 0.7
        found, reason = verdict(signals)
        assert found == "review"
        assert reason.startswith("coverage_fraction")
        assert ";" not in reason

    def test_a_map_that_leaves_the_slide_fails(self, pair):
        signals = measure(pair, made(lambda p: p + 9000.0))
        assert signals.coverage_fraction == 0
        assert verdict(signals)[0] == "fail"

    def test_a_fold_in_the_tissue_is_seen(self, pair):
        def fold(points):
            result = to_moving(points)
            near = np.hypot(*(points - np.array(FIXED_UM) / 2).transpose(2, 0, 1)) < 150
            result[near] = to_moving(np.array(FIXED_UM) / 2) - (result - result.mean((0, 1)))[near]
            result[..., 0] = np.where(near, -result[..., 0], result[..., 0])
            return result

        signals = measure(pair, made(fold))
        assert signals.folding_fraction > 0.02
        assert "folding_fraction" in verdict(signals)[1]

    def test_a_declared_mirror_is_judged_after_the_correction(self, pair):
        moving = pair[1]
        stored = np.ascontiguousarray(moving[:, ::-1])
        d = dp.mirrored(made(to_moving), MOVING_UM[0])
        signals = measure(pair, d, stored, mirrored=True)
        assert signals.determinant < 0
        assert signals.folding_fraction == 0
        assert verdict(signals, mirrored=True) == ("pass", None)
        assert "mirrors HER2, which is not mirrored" in verdict(signals)[1]

    def test_unequal_resolutions_give_the_same(self, pair):
        fixed, moving = pair
        double = np.repeat(np.repeat(moving, 2, axis=0), 2, axis=1)
        signals = measured(
            fixed,
            double,
            made(to_moving),
            fixed_mpp=MPP,
            moving_mpp=MPP / 2,
            fixed_size_um=FIXED_UM,
            moving_size_um=MOVING_UM,
        )
        assert signals.ncc == pytest.approx(measure(pair, made(to_moving)).ncc, abs=0.03)

    def test_the_local_map_shows_where_the_error_is(self, pair):
        def partly(points):
            result = to_moving(points)
            return result + np.where(points[..., :1] > FIXED_UM[0] / 2, (45.0, -20.0), 0.0)

        local = measure(pair, made(partly)).local
        # What lies within half a tile of the step has both.
        left = local.centres_um[:, 0] < FIXED_UM[0] / 2 - local.side_um
        right = local.centres_um[:, 0] > FIXED_UM[0] / 2 + local.side_um
        assert local.ok[left].mean() > 0.9
        assert local.ok[right].mean() < 0.4
        assert left.sum() > 10
        assert right.sum() > 10
        assert np.median(local.error_um[left]) < MPP
        assert np.median(local.error_um[right]) == pytest.approx(math.hypot(45, 20), abs=MPP)

    @pytest.mark.parametrize("shift", [(0.0, 0.0), (24.0, -10.0), (-6.0, 30.0)])
    def test_the_residual_is_how_far_the_map_leads_beside_the_truth(self, pair, shift):
        local = measure(pair, made(lambda p: to_moving(p + np.array(shift)))).local
        found = np.median(local.residuals_um, axis=0)
        assert found == pytest.approx(-np.array(shift), abs=MPP / 2)

    def test_the_certificate_sums_up_the_local_errors(self, pair):
        signals = measure(pair, made(to_moving))
        assert signals.error_median_um == np.median(signals.local.error_um)
        assert signals.error_p90_um == np.percentile(signals.local.error_um, 90)
        assert signals.error_p90_um < 2 * MPP

    def test_what_is_flat_matches_nowhere_and_is_as_bad_as_can_be(self, pair):
        """The right half of HER2 is blank glass: no place of it may look right."""
        moving = pair[1].copy()
        moving[:, moving.shape[1] // 2 :] = 246
        local = measure(pair, made(to_moving), moving).local
        blank = local.centres_um[:, 0] > FIXED_UM[0] / 2 + 1.5 * local.side_um
        reach = 0.035 * math.hypot(*FIXED_UM)
        assert blank.sum() > 10
        assert not local.ok[blank].any()
        assert local.error_um[blank] == pytest.approx(reach, rel=0.05)
        assert (local.ncc - local.best_shifted)[blank].max() <= -0.5

    def test_squares_reach_the_end_of_the_slide(self, pair):
        fixed, moving = (np.ascontiguousarray(image[80:230, 120:260]) for image in pair)
        local = measured(
            fixed, moving, dp.identity(560.0, 600.0, 4.0), fixed_mpp=4.0, moving_mpp=4.0,
            fixed_size_um=(560.0, 600.0), moving_size_um=(560.0, 600.0),
        ).local  # fmt: skip
        low, high = local.centres_um.min(axis=0), local.centres_um.max(axis=0)
        assert low - local.side_um / 2 == pytest.approx([0, 0], abs=4)
        assert high + local.side_um / 2 == pytest.approx([560, 600], abs=4)

    def test_tissue_too_narrow_for_a_square_is_said_to_be_that(self, pair):
        fixed = np.full_like(pair[0], 246)
        fixed[150:153, 60:300] = pair[0][150:153, 60:300] // 2
        found, reason = verdict(measure((fixed, pair[1]), made(to_moving)))
        assert found == "fail"
        assert "tile_ok unknown: no square of 8% of the diagonal" in reason


class TestAt:
    LOCAL = LocalQuality(
        centres_um=np.array([[100.0, 200.0], [150.0, 200.0], [100.0, 250.0]]),
        ncc=np.array([0.5, 0.3, 0.1]),
        best_shifted=np.array([0.4, 0.4, 0.4]),
        residuals_um=np.array([[3.0, 4.0], [0.0, 10.0], [20.0, 0.0]]),
        side_um=100.0,
        step_um=50.0,
    )

    def at(self, *point):
        return {name: values[0] for name, values in self.LOCAL.at([point]).items()}

    def test_on_a_centre_it_is_that_square(self):
        found = self.at(100, 200)
        assert found == pytest.approx({"error_um": 5, "ncc": 0.5, "margin": 0.1})

    def test_between_two_it_is_between_them(self):
        # A quarter of the way: 3/4 of the first, 1/4 of the second.
        found = self.at(112.5, 200)
        assert found["error_um"] == pytest.approx(0.75 * 5 + 0.25 * 10)
        assert found["ncc"] == pytest.approx(0.45)

    def test_where_one_of_four_is_missing_the_others_share_its_weight(self):
        found = self.at(125, 225)
        assert found["error_um"] == pytest.approx((5 + 10 + 20) / 3)

    def test_at_the_rim_the_square_that_holds_the_point_counts(self):
        # 45 um left of a centre, within the square, beyond the neighbour that is not there.
        assert self.at(51, 200)["error_um"] == pytest.approx(5)
        assert self.at(190, 160)["ncc"] == pytest.approx(0.3)

    def test_beyond_every_square_there_is_nothing(self):
        assert all(math.isnan(value) for value in self.at(400, 200).values())
        empty = dataclasses.replace(
            self.LOCAL,
            centres_um=np.zeros((0, 2)),
            ncc=np.zeros(0),
            best_shifted=np.zeros(0),
            residuals_um=np.zeros((0, 2)),
        )
        assert np.isnan(empty.at([[1.0, 2.0]])["error_um"]).all()


class TestJudge:
    @pytest.mark.parametrize(
        ("change", "expected", "words"),
        [
            ({}, "pass", None),
            ({"tile_ok": 0.5}, "review", "tile_ok 0.500, below 0.6"),
            ({"tile_ok": 0.29}, "fail", "tile_ok 0.290, below 0.3"),
            ({"lncc": 0.1}, "review", "lncc 0.100, below 0.15"),
            ({"lncc": 0.07}, "fail", "lncc 0.070, below 0.08"),
            ({"ncc_margin": 0.01}, "review", "ncc_margin 0.010, below 0.05"),
            ({"ncc_margin": -0.01}, "fail", "ncc_margin -0.010, below 0"),
            ({"ncc": -0.9}, "pass", None),
            ({"scale": 1.5}, "fail", "scale 1.500, outside 0.779 to 1.284"),
            ({"scale": 0.0}, "fail", "scale 0.000, outside"),
            ({"anisotropy": 1.3}, "fail", "anisotropy 1.300, above 1.2"),
            ({"determinant": -1.0}, "fail", "mirrors"),
            ({"folding_fraction": 0.01}, "review", "folding_fraction 0.0100, above 0.005"),
            ({"folding_fraction": 0.03}, "fail", "folding_fraction 0.0300, above 0.02"),
            ({"coverage_fraction": 0.5}, "review", "coverage_fraction 0.500, below 0.9"),
            ({"lncc": math.nan}, "fail", "lncc unknown"),
        ],
    )
    def test_each_quantity_has_its_bounds(self, change, expected, words):
        found, reason = verdict(dataclasses.replace(GOOD, **change))
        assert found == expected
        assert reason is None if words is None else words in reason

    @pytest.mark.parametrize(
        ("matches", "expected", "words"),
        [
            ({"match_count": 0, "match_fraction": None}, "fail", "returned the identity"),
            ({"match_count": 0, "match_fraction": 1.0}, "fail", "returned the identity"),
            ({"match_fraction": None}, "fail", "no match"),
            ({"match_fraction": 0.2}, "fail", "match_fraction 0.200, below 0.25"),
            ({"match_fraction": 0.4}, "review", "match_fraction 0.400, below 0.5"),
        ],
    )
    def test_matches_have_theirs(self, matches, expected, words):
        found, reason = verdict(GOOD, **matches)
        assert found == expected
        assert words in reason

    @pytest.mark.parametrize(
        ("probe", "expected"), [(None, "pass"), (1.5, "pass"), (1.2, "review"), (0.9, "fail")]
    )
    def test_the_mirror_probe_has_its(self, probe, expected):
        found, reason = verdict(GOOD, mirror_probe=probe)
        assert found == expected
        assert reason is None or "mirror_probe" in reason

    def test_another_try_cannot_mend_coverage_or_the_sheet(self):
        assert not judged(GOOD).retryable
        assert not judged(dataclasses.replace(GOOD, coverage_fraction=0.5)).retryable
        contradicted = judged(GOOD, contradicts_sheet=True)
        assert contradicted.verdict == "review"
        assert "the sheet says mirrored" in contradicted.reason
        assert not contradicted.retryable
        assert judged(GOOD, rigid_kept=True).retryable
        assert judged(dataclasses.replace(GOOD, lncc=0.1, coverage_fraction=0.5)).retryable

    def test_a_rigid_map_that_was_kept_is_never_a_pass(self):
        found, reason = verdict(GOOD, rigid_kept=True)
        assert found == "review"
        assert "rigid map was kept" in reason
        assert verdict(dataclasses.replace(GOOD, tile_ok=0.1), rigid_kept=True)[0] == "fail"

    def test_every_reason_is_named(self):
        _, reason = verdict(dataclasses.replace(GOOD, tile_ok=0.1, lncc=0.0), match_fraction=0.0)
        assert reason.count(";") == 2

    def test_a_map_that_should_mirror_and_does_not_fails(self):
        assert verdict(GOOD, mirrored=True)[0] == "fail"

    def test_the_limits_are_options(self):
        strict = LIMITS.replace(tile_ok_pass=0.95, tile_ok_fail=0.92)
        assert judge(GOOD, strict, match_count=9, match_fraction=1.0).verdict == "fail"


class TestPreferRigid:
    @pytest.mark.parametrize(
        ("nonrigid", "rigid", "expected"),
        [(0.5, 0.8, True), (0.79, 0.8, False), (0.9, 0.5, False), (None, 0.5, False)],
    )
    def test_the_rigid_map_is_kept_where_nonrigid_lowers_tile_ok(self, nonrigid, rigid, expected):
        a = dataclasses.replace(GOOD, tile_ok=nonrigid)
        b = dataclasses.replace(GOOD, tile_ok=rigid)
        assert prefer_rigid(a, b, 0.02) is expected
