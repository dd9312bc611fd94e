"""The verdict on a map, and which verdict applies to a pair."""

import math

import pytest

from hemera.config import RegisterOptions
from hemera.config.registration import AT_LEAST, AT_MOST
from hemera.registration.verdict import SIGNALS, assess, effective_verdict, grade
from hemera.sheet import Pair

GOOD = {
    "match_count": 200, "match_fraction": 0.9, "mirrored": False, "tile_ok": 0.9, "lncc": 0.3,
    "ncc": 0.7, "ncc_margin": 0.2, "scale": 1.01, "anisotropy": 1.02, "determinant": 1.02,
    "folding_fraction": 0.0, "coverage_fraction": 1.0,
}  # fmt: skip


def assessed(change):
    how = {name: change[name] for name in ("rigid_kept", "contradicts_sheet") if name in change}
    return assess(GOOD | change, RegisterOptions(), **how)


@pytest.mark.parametrize(
    ("change", "expected", "words"),
    [
        ({}, "pass", None),
        ({"tile_ok": 0.5}, "review", "tile_ok 0.500, below 0.6"),
        ({"tile_ok": 0.29}, "fail", "tile_ok 0.290, below 0.3"),
        ({"lncc": math.nan}, "fail", "lncc nan, below 0.08"),
        ({"lncc": None}, "fail", "lncc unknown"),
        ({"ncc_margin": -0.01}, "fail", "ncc_margin -0.010, below 0"),
        ({"ncc": -0.9}, "pass", None),
        ({"scale": 1.5}, "fail", "log_scale 0.405, above 0.25"),
        ({"scale": 0.0}, "fail", "log_scale inf"),
        ({"anisotropy": 1.3}, "fail", "anisotropy 1.300, above 1.2"),
        ({"determinant": -1.0}, "fail", "mirrors"),
        ({"mirrored": True}, "fail", "does not mirror"),
        ({"folding_fraction": 0.01}, "review", "folding_fraction 0.0100, above 0.005"),
        ({"folding_fraction": 0.03}, "fail", "folding_fraction 0.0300, above 0.02"),
        ({"coverage_fraction": 0.5}, "pass", None),
        ({"coverage_fraction": 0.2}, "review", "coverage_fraction 0.200, below 0.25"),
        ({"misaligned_fraction": 0.2}, "pass", None),
        ({"misaligned_fraction": 0.3}, "review", "misaligned_fraction 0.300, above 0.2"),
        ({"keypoint_fraction": 0.4}, "review", "keypoint_fraction 0.400, below 0.5"),
        ({"keypoint_fraction": 0.2}, "fail", "keypoint_fraction 0.200, below 0.25"),
        ({"match_count": 0, "match_fraction": 1.0}, "fail", "returned the identity"),
        ({"match_fraction": None}, "fail", "no match"),
        ({"match_fraction": 0.2}, "fail", "match_fraction 0.200, below 0.25"),
        ({"match_count": None, "match_fraction": None}, "pass", None),
        ({"mirror_probe": 1.5}, "pass", None),
        ({"mirror_probe": 1.2}, "review", "mirror_probe 1.200, below 1.5"),
        ({"mirror_probe": 0.9}, "fail", "mirror_probe 0.900, below 1"),
        ({"rigid_kept": True}, "review", "rigid map was kept"),
        ({"contradicts_sheet": True}, "review", "mirrored in the sheet"),
        ({"tile_ok": 0.1, "lncc": 0.0}, "fail", "tile_ok 0.100, below 0.3; lncc 0.000, below 0.08"),
    ],
)
def test_each_quantity_has_its_limits(change, expected, words):
    verdict, reason, _ = assessed(change)
    assert verdict == expected
    assert reason is None if words is None else words in reason


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, False),
        ({"coverage_fraction": 0.2}, False),
        ({"contradicts_sheet": True}, False),
        # The slides matched well: another attempt would match the same.
        ({"rigid_kept": True}, False),
        ({"lncc": 0.1, "coverage_fraction": 0.2}, False),
        ({"match_fraction": 0.4}, True),
        ({"mirror_probe": 1.2}, True),
        ({"lncc": 0.05}, True),
    ],
)
def test_another_attempt_is_made_where_it_fails_or_matched_poorly(change, expected):
    assert assessed(change)[2] is expected


def test_every_signal_with_limits_is_shown():
    assert set(SIGNALS) >= {*AT_LEAST, *AT_MOST}


def test_limits_themselves_are_the_better_grade_and_others_have_none():
    limits = {"tile_ok": [0.6, 0.3]}
    assert [grade("tile_ok", value, limits) for value in (0.6, 0.3)] == ["pass", "review"]
    assert grade("rotation_deg", 170.0, limits) is None


def pair(**values):
    return Pair(pair="p1", case="c1", dataset="study", he="he.tif", her2="her2.tif", **values)


@pytest.mark.parametrize(
    ("values", "certificate", "verdict", "refusal"),
    [
        ({}, {"verdict": "pass", "reason": None}, "pass", None),
        ({}, {"verdict": "review", "reason": "little overlap"}, "review", None),
        ({}, {"verdict": "fail", "reason": "no match"}, "fail", "registration failed: no match"),
        ({}, None, "fail", "no certificate"),
        ({"registered": True}, None, "registered", None),
        ({"verdict": "accept"}, {"verdict": "fail", "reason": "no match"}, "accepted", None),
        ({"verdict": "refuse"}, {"verdict": "pass", "reason": None}, "refused", "by a person"),
        ({"verdict": "refuse", "registered": True}, None, "refused", "by a person"),
    ],
)
def test_the_manual_verdict_overrides_the_certificate(values, certificate, verdict, refusal):
    found, reason = effective_verdict(pair(**values), certificate)
    assert found == verdict
    assert (reason is None) == (refusal is None)
    assert refusal is None or refusal in reason
