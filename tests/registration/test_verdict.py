"""The verdict on a map, and which verdict applies to a pair."""

import pytest

from hemera.registration.verdict import effective_verdict
from hemera.sheet import Pair


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
