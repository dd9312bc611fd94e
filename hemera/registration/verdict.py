"""Verdicts on registrations: limits of the signals, the certificate's and manual verdicts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from hemera.config import RegisterOptions
from hemera.registration import local_quality
from hemera.registration.signals import Signals
from hemera.sheet import Pair

PASS, REVIEW, FAIL = VERDICTS = ("pass", "review", "fail")
"""Verdicts of a certificate, best first."""
ACCEPTED, REFUSED, REGISTERED = "accepted", "refused", "registered"
"""Verdicts without a certificate: two manual ones, and that of a pair that comes registered."""


@dataclasses.dataclass(frozen=True)
class Signal:
    """A column of the certificate, or a value computed from one, and its limits."""

    label: str
    passes: str | None = None
    """Option of `register` that limits `pass`; None: no limit."""
    fails: str | None = None
    """Option beyond which the verdict is `fail`."""
    at_least: bool = True
    """Whether larger is better."""
    is_fraction: bool = False
    """Whether it is shown in percent."""

    def grade(self, value: float, limits: Mapping[str, Any]) -> str | None:
        """Return pass, review or fail.

        Args:
            value: of the signal; NaN fails.
            limits: options of `register` by name.

        Returns:
            None where `limits` does not contain the signal's.
        """

        def within(limit: float) -> bool:
            return value >= limit if self.at_least else value <= limit

        good, bad = (limits.get(name) if name else None for name in (self.passes, self.fails))
        if bad is not None and not within(bad):
            return FAIL
        if good is None:
            return None
        return PASS if within(good) else REVIEW


SIGNALS = {
    "tile_ok": Signal(
        "tissue fields that match best in place", "tile_ok_pass", "tile_ok_fail", is_fraction=True
    ),
    "lncc": Signal("median local correlation of haematoxylin", "lncc_pass", "lncc_fail"),
    "ncc_margin": Signal(
        "correlation above the best of 36 shifts", "ncc_margin_pass", "ncc_margin_fail"
    ),
    "match_fraction": Signal(
        "matches near the similarity fitted to them",
        "match_fraction_pass",
        "match_fraction_fail",
        is_fraction=True,
    ),
    "match_count": Signal("matches"),
    "mirror_probe": Signal(
        "matches over those of the mirror image", "mirror_probe_pass", "mirror_probe_fail"
    ),
    "coverage_fraction": Signal("H&E tissue that HER2 covers", "coverage_pass", is_fraction=True),
    "folding_fraction": Signal(
        "folded tissue", "folding_pass", "folding_fail", at_least=False, is_fraction=True
    ),
    "anisotropy": Signal(
        "ratio of the two scales", "anisotropy_max", "anisotropy_max", at_least=False
    ),
    "log_scale": Signal(
        "|log| of the scale of the affine part", "log_scale_max", "log_scale_max", at_least=False
    ),
    "rotation_deg": Signal("rotation, degrees"),
    "displacement_median_um": Signal("median displacement, µm"),
    "error_median_um": Signal("estimated error, median, µm"),
    "error_p90_um": Signal("estimated error, 90th percentile, µm"),
}
"""What a certificate shows, in this order. `log_scale` is computed from the column `scale`."""

NO_SQUARE = (
    f"no square of {local_quality.SIDE:.0%} of the diagonal that tissue fills to "
    f"{local_quality.TISSUE_MIN:.0%}"
)
"""Why `tile_ok` may be unknown."""


def log_scale(scale: float | None) -> float | None:
    """Return the signal `log_scale` from the column `scale`."""
    if scale is None:
        return None
    return abs(math.log(scale)) if scale > 0 else math.inf


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The verdict of a certificate."""

    verdict: str
    """pass, review or fail."""
    reason: str | None
    """Why it is not better: each signal with its value and its limit; None for pass."""
    retryable: bool
    """Whether another attempt may give a better verdict: not for a pass, nor where HER2 does not
    cover the tissue or the sheet is contradicted."""

    @property
    def rank(self) -> int:
        """0 for pass, 1 for review, 2 for fail."""
        return VERDICTS.index(self.verdict)


def assess(
    signals: Signals,
    options: RegisterOptions,
    *,
    match_count: int | None,
    match_fraction: float | None,
    mirror_probe: float | None = None,
    rigid_kept: bool = False,
    mirrored: bool = False,
    matched: bool = True,
    contradicts_sheet: bool = False,
) -> Verdict:
    """Return the verdict on a displacement.

    Args:
        signals: measured on the displacement.
        options: with the limits of pass, review and fail.
        match_count: matches behind the rigid displacement; 0: the engine returned the identity.
        match_fraction: fraction of the matches that agree with the rigid displacement; None: no
            matches.
        mirror_probe: matches of HER2 over those of its mirror image; None: not probed.
        rigid_kept: the displacement is the rigid one, because the nonrigid one was worse.
        mirrored: the displacement is meant to mirror.
        matched: it comes from matches; False for one that was made elsewhere.
        contradicts_sheet: the sheet declares a mirror image, and HER2 matched better as stored.
    """
    reasons: dict[str, list[str]] = {FAIL: [], REVIEW: []}

    def compare(name: str, value: float | None, *, required: bool = False) -> None:
        if required and (value is None or not math.isfinite(value)):
            why = NO_SQUARE if name == "tile_ok" else "no tissue to measure it on"
            reasons[FAIL].append(f"{name} unknown: {why}")
        elif value is not None:
            signal = SIGNALS[name]
            grade = signal.grade(value, vars(options))
            if grade in (FAIL, REVIEW):
                limit = getattr(options, str(signal.fails if grade == FAIL else signal.passes))
                digits = 4 if name == "folding_fraction" else 3
                side = "below" if signal.at_least else "above"
                reasons[grade].append(f"{name} {value:.{digits}f}, {side} {limit:g}")

    if matched and match_count == 0:
        reasons[FAIL].append(
            "the engine found no match between the slides and returned the identity"
        )
    elif matched and (match_count is None or match_fraction is None):
        reasons[FAIL].append(
            "match_fraction unknown: no match could be made between the mapped slides"
        )
    elif matched:
        compare("match_fraction", match_fraction, required=True)
    for name in ("tile_ok", "lncc", "ncc_margin"):
        compare(name, getattr(signals, name), required=True)
    compare("mirror_probe", mirror_probe)
    if signals.determinant is not None and (signals.determinant < 0) != mirrored:
        reasons[FAIL].append(
            "the map mirrors HER2, which is not mirrored"
            if signals.determinant < 0
            else "the map does not mirror HER2, which is mirrored"
        )
    size = log_scale(signals.scale)
    if size is not None and not size <= options.log_scale_max:
        # The scale is easier to read than its logarithm.
        low, high = (math.exp(sign * options.log_scale_max) for sign in (-1, 1))
        reasons[FAIL].append(f"scale {signals.scale:.3f}, outside {low:.3f} to {high:.3f}")
    compare("anisotropy", signals.anisotropy)
    compare("folding_fraction", signals.folding_fraction)
    if rigid_kept:
        reasons[REVIEW].append("the rigid map was kept, because the nonrigid one lowered tile_ok")
    retryable = any(reasons.values())
    compare("coverage_fraction", signals.coverage_fraction)
    if contradicts_sheet:
        reasons[REVIEW].append("mirrored in the sheet, but HER2 matches better as it is stored")
    verdict = next((grade for grade in (FAIL, REVIEW) if reasons[grade]), PASS)
    return Verdict(verdict, "; ".join(reasons.get(verdict, ())) or None, retryable)


def prefer_rigid(nonrigid: Signals, rigid: Signals, tolerance: float) -> bool:
    """Return whether the nonrigid stage lowered `tile_ok`, so that the rigid result is kept.

    Args:
        nonrigid: measured on the final displacement.
        rigid: measured on the displacement before the nonrigid stage.
        tolerance: by how much `tile_ok` may fall.
    """
    if nonrigid.tile_ok is None or rigid.tile_ok is None:
        return False
    return nonrigid.tile_ok < rigid.tile_ok - tolerance


def effective_verdict(pair: Pair, certificate: Mapping[str, Any] | None) -> tuple[str, str | None]:
    """Return the verdict that applies to the registration of a pair.

    The manual verdict in the sheet overrides the certificate.

    Args:
        pair: the pair.
        certificate: its row of `tables.CERTIFICATE`, if any.

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
