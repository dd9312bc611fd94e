"""Verdicts on registrations: their names, and which one applies to a pair."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hemera.sheet import Pair

PASS, REVIEW, FAIL = "pass", "review", "fail"
"""Verdicts of a certificate."""
ACCEPTED, REFUSED, REGISTERED = "accepted", "refused", "registered"
"""Verdicts without a certificate: two manual ones, and that of a pair that comes registered."""


def effective_verdict(pair: Pair, certificate: Mapping[str, Any] | None) -> tuple[str, str | None]:
    """Return the verdict that applies to the registration of a pair.

    The manual verdict in the sheet overrides the certificate.

    Args:
        pair: the pair.
        certificate: its row of `tables.CERTIFICATE`; None: there is none.

    Returns:
        `accepted` or `refused` (manual), `registered`, `pass`, `review` or `fail`; and the reason
        when the registration must not be used, else None.
    """
    if pair.verdict == "refuse":
        return REFUSED, "refused by a person; see verdict in pairs.tsv"
    if pair.verdict == "accept":
        return ACCEPTED, None
    if pair.registered:
        return REGISTERED, None
    if certificate is None:
        return FAIL, "no certificate for the pair; run register"
    verdict = str(certificate["verdict"])
    if verdict == FAIL:
        return FAIL, f"registration failed: {certificate['reason'] or 'no reason given'}"
    return verdict, None
