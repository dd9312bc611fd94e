"""Right maps pass, wrong ones fail, and each signal measures what it is defined to."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from hemera.config import FilterOptions, RegisterOptions
from hemera.registration import displacement as dp
from hemera.registration.signals import match_keypoints, measure, tissue
from hemera.registration.verdict import assess
from tests.small_registration import made
from tests.small_sections import FIXED_PX, FIXED_UM, MOVING_PX, MOVING_UM, MPP, sections, to_moving


@pytest.fixture(scope="module")
def pair():
    return sections()


def measured(pair, d, moving=None, **changes):
    arguments = {"mpp": MPP, "fixed_size_um": FIXED_UM, "moving_size_um": MOVING_UM} | changes
    signals, local = measure(pair[0], pair[1] if moving is None else moving, d, **arguments)
    return SimpleNamespace(**signals, local=local)


def verdict(signals, mirrored=False):
    row = {**vars(signals), "match_count": 200, "match_fraction": 0.9, "mirrored": mirrored}
    return assess(row, RegisterOptions())[:2]


def test_the_true_map_passes(pair):
    signals = measured(pair, made(to_moving))
    assert signals.tile_ok > 0.95
    assert signals.lncc > 0.5
    assert signals.ncc > 0.8
    assert signals.ncc_margin > 0.3
    assert signals.rotation_deg == pytest.approx(11, abs=0.5)
    assert signals.scale == pytest.approx(1, abs=0.02)
    assert signals.determinant == pytest.approx(1, abs=0.03)
    assert (signals.folding_fraction, signals.coverage_fraction) == (0, 1)
    assert signals.error_median_um == np.median(signals.local.error_um)
    assert signals.error_p90_um == np.percentile(signals.local.error_um, 90) < 2 * MPP
    assert verdict(signals) == ("pass", None)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda p: p,
        lambda p: to_moving(p) + np.array([60, -45]),
        lambda p: to_moving(p * (1, -1) + (0, FIXED_UM[1])),
        lambda p: p + 9000.0,
    ],
    ids=["identity", "shifted", "mirrored", "off the slide"],
)
def test_a_wrong_map_fails(pair, wrong):
    assert verdict(measured(pair, made(wrong)))[0] == "fail"


def test_other_tissue_fails_under_the_map_of_the_right_one():
    signals = measured(sections(1, other_seed=2), made(to_moving))
    assert signals.tile_ok < 0.3
    assert verdict(signals)[0] == "fail"


def test_blank_slides_fail(pair):
    fixed, moving = pair
    assert verdict(measured(pair, made(to_moving), np.full_like(moving, 246)))[0] == "fail"
    nothing = measured((np.full_like(fixed, 246), moving), made(to_moving))
    assert not {"tile_ok", "lncc", "coverage_fraction"} & set(vars(nothing))
    found, reason = verdict(nothing)
    assert found == "fail"
    assert "tile_ok unknown: no square of 8% of the diagonal" in reason


@pytest.mark.parametrize("third", ["left", "right", "top"])
@pytest.mark.parametrize("error_px", [8, 20])
def test_a_map_that_is_wrong_over_a_third_does_not_pass(pair, third, error_px):
    axis, from_end = {"left": (0, False), "right": (0, True), "top": (1, False)}[third]

    def wrong(points):
        # The tissue is in the middle 70 % of the slide; the map is continuous.
        place = points[..., axis, None] / FIXED_UM[axis]
        beyond = (place - 0.62 if from_end else 0.38 - place) / 0.04
        return to_moving(points) + beyond.clip(0, 1) * (error_px * MPP, -error_px * MPP / 2)

    signals = measured(pair, made(wrong))
    assert signals.misaligned_fraction > 0.2
    assert verdict(signals)[0] in ("review", "fail")
    assert "misaligned_fraction" in verdict(signals)[1] or verdict(signals)[0] == "fail"
    # No tile of that third is accepted, at the default limits of the filter. Squares that are
    # partly right do not count.
    x, y = np.meshgrid(np.arange(20, FIXED_UM[0], 30), np.arange(20, FIXED_UM[1], 30))
    points = np.stack([x, y], axis=-1).reshape(-1, 2)
    inner = points + (-1 if from_end else 1) * np.eye(2)[axis] * signals.local.side_um / 2
    bad = np.linalg.norm(wrong(inner) - to_moving(inner), axis=1) > 0.9 * error_px * MPP
    found = signals.local.at(points[bad])
    limits = FilterOptions()
    refused = found["margin"] < limits.registration_margin_min
    refused |= found["error_um"] > limits.registration_error_max_um
    known = np.isfinite(found["margin"])
    assert known.sum() > 50
    assert refused[known].all()


def test_the_distance_of_the_nodes_changes_no_signal(pair):
    """One map, smooth but for a fold, on grids of three distances."""

    def folded(points):
        result = to_moving(points)
        away = (points - np.array(FIXED_UM) / 2)[..., :1] / 60
        return result - 100 * away * np.exp(-(away**2)) * (1, 0.2)

    fine, *others = (vars(measured(pair, made(folded, MPP * factor))) for factor in (0.5, 1.0, 2.0))
    assert fine["folding_fraction"] > 0.02
    for other in others:
        for name in set(fine) - {"local"}:
            assert other[name] == pytest.approx(fine[name], rel=0.03, abs=0.01), name


def test_the_part_that_is_covered_is_judged(pair):
    """Half of HER2 is cut off: the map is right where there is HER2."""
    moving = np.ascontiguousarray(pair[1][:, : MOVING_PX[0] // 2])
    size = MOVING_UM[0] / 2, MOVING_UM[1]
    signals = measured(pair, made(to_moving), moving, moving_size_um=size)
    assert 0.3 < signals.coverage_fraction < 0.7
    assert verdict(signals) == ("pass", None)
    wrong = made(lambda p: to_moving(p) + np.array([60, -45]))
    assert verdict(measured(pair, wrong, moving, moving_size_um=size))[0] == "fail"


def test_keypoints_near_the_map_are_counted():
    here = np.random.default_rng(3).uniform(200, 1000, (200, 2))
    # 0, 0.25 to 49.75 um in all directions.
    length, angle = np.arange(200) / 4, np.arange(200) * 2.4
    beside = length[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    pairs = np.stack([here, to_moving(here) + beside], axis=1)
    # Within 2 % of 1,010 um: up to 20.2 um.
    found = match_keypoints(made(to_moving), pairs, 1010.0)
    assert found == pytest.approx(
        {"keypoint_fraction": 81 / 200, "keypoint_error_um": 24.875,
         "keypoint_error_low_um": 2.4875, "keypoint_error_high_um": 47.2625}, abs=0.06
    )  # fmt: skip


def test_coverage_is_the_fraction_of_tissue_that_maps_onto_the_slide(pair):
    # Only the right half of the tissue maps to x >= 0.
    signals = measured(pair, made(lambda p: p - (FIXED_UM[0] / 2, 0)))
    inside = tissue(pair[0], 1.0)
    expected = inside[:, FIXED_PX[0] // 2 :].sum() / inside.sum()
    assert signals.coverage_fraction == pytest.approx(expected, abs=0.01)


def test_a_fold_in_the_tissue_is_measured(pair):
    def fold(points):
        result = to_moving(points)
        near = np.hypot(*(points - np.array(FIXED_UM) / 2).transpose(2, 0, 1)) < 150
        centre = to_moving(np.array(FIXED_UM) / 2)
        result[near, 0] = 2 * centre[0] - result[near, 0]
        return result

    signals = measured(pair, made(fold))
    assert signals.folding_fraction > 0.02
    assert "folding_fraction" in verdict(signals)[1]


def test_a_declared_mirror_is_judged_after_the_correction(pair):
    stored = np.ascontiguousarray(pair[1][:, ::-1])
    d = dp.mirrored(made(to_moving), MOVING_UM[0])
    signals = measured(pair, d, stored, mirrored=True)
    assert signals.determinant < 0
    assert signals.folding_fraction == 0
    assert verdict(signals, mirrored=True) == ("pass", None)
    assert "mirrors HER2, which is not mirrored" in verdict(signals)[1]


class TestLocal:
    def test_it_shows_where_the_error_is(self, pair):
        def partly(points):
            result = to_moving(points)
            return result + np.where(points[..., :1] > FIXED_UM[0] / 2, (45.0, -20.0), 0.0)

        local = measured(pair, made(partly)).local
        # Squares within half a side of the step contain both.
        left = local.centres_um[:, 0] < FIXED_UM[0] / 2 - local.side_um
        right = local.centres_um[:, 0] > FIXED_UM[0] / 2 + local.side_um
        assert min(left.sum(), right.sum()) > 10
        assert local.ok[left].mean() > 0.9
        assert local.ok[right].mean() < 0.4
        lengths = np.hypot(*local.residuals_um.T)
        assert np.median(lengths[left]) < MPP
        assert np.median(lengths[right]) == pytest.approx(math.hypot(45, 20), abs=MPP)
        assert (local.error_um[left] < MPP).mean() > 0.9
        low, high = (np.median(values[right]) for values in local.errors_um[1:])
        assert low < math.hypot(45, 20) < high

    @pytest.mark.parametrize("shift", [(0.0, 0.0), (24.0, -10.0), (-6.0, 30.0)])
    def test_the_residual_is_the_error_of_the_map(self, pair, shift):
        local = measured(pair, made(lambda p: to_moving(p + np.array(shift)))).local
        found = np.median(local.residuals_um, axis=0)
        assert found == pytest.approx(-np.array(shift), abs=MPP / 2)

    def test_flat_squares_have_the_worst_values(self, pair):
        """The right half of HER2 is background: no square of it may seem right."""
        moving = pair[1].copy()
        moving[:, moving.shape[1] // 2 :] = 246
        local = measured(pair, made(to_moving), moving).local
        blank = local.centres_um[:, 0] > FIXED_UM[0] / 2 + 1.5 * local.side_um
        assert blank.sum() > 10
        assert not local.ok[blank].any()
        reach = 0.035 * math.hypot(*FIXED_UM)
        assert np.hypot(*local.residuals_um[blank].T) == pytest.approx(reach, rel=0.05)
        assert (local.errors_um.max(axis=1) == local.errors_um[:, blank].T).all()
        assert (local.ncc - local.best_shifted)[blank].max() <= -0.5

    def test_squares_reach_the_end_of_the_slide(self, pair):
        fixed, moving = (np.ascontiguousarray(image[80:230, 120:260]) for image in pair)
        size = (560.0, 600.0)
        d = dp.identity(*size, 4.0)
        local = measured((fixed, moving), d, fixed_size_um=size, moving_size_um=size).local
        low, high = local.centres_um.min(axis=0), local.centres_um.max(axis=0)
        assert low - local.side_um / 2 == pytest.approx([0, 0], abs=4)
        assert high + local.side_um / 2 == pytest.approx([560, 600], abs=4)
