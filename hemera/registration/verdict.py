"""Verdicts on registrations: the certificate's by the limits of its signals, and manual ones."""

import math
from collections.abc import Mapping
from typing import Any

from hemera.config import AT_LEAST, RegisterOptions
from hemera.registration import local_quality
from hemera.sheet import Pair

PASS, REVIEW, FAIL = VERDICTS = ("pass", "review", "fail")
"""Verdicts of a certificate, best first."""
ACCEPTED, REFUSED, REGISTERED = "accepted", "refused", "registered"
"""Verdicts without a certificate: two manual ones, and that of a pair that comes registered."""
HE_ONLY = "he_only"
"""In the place of a verdict: H&E alone."""

SIGNALS = {
    "tile_ok": "tissue squares that match best in place",
    "misaligned_fraction": "tissue squares in regions where few match in place",
    "lncc": "median local correlation of haematoxylin",
    "ncc_margin": "correlation above the best of 36 shifts",
    "match_fraction": "matches near the similarity fitted to them",
    "keypoint_fraction": "matches near the final map, which was not fitted to them",
    "keypoint_error_um": "their median distance, µm: an estimate of the error",
    "keypoint_error_low_um": "a twentieth of them is nearer, µm",
    "keypoint_error_high_um": "a twentieth of them is farther, µm",
    "match_count": "matches",
    "mirror_probe": "matches over those of the mirror image",
    "coverage_fraction": "H&E tissue that HER2 covers",
    "folding_fraction": "folded tissue",
    "anisotropy": "ratio of the two scales",
    "log_scale": "|log| of the scale of the affine part",
    "rotation_deg": "rotation, degrees",
    "displacement_median_um": "median displacement, µm",
    "error_median_um": "local estimate of the error, median, µm",
    "error_p90_um": "local estimate of the error, 90th percentile, µm",
}
"""What a certificate shows, in this order. `log_scale` is computed from the column `scale`."""

RIGID_TOLERANCE = 0.02
"""The nonrigid displacement may lower `tile_ok` by this much."""

_REQUIRED = {
    "tile_ok": f"no square of {local_quality.SIDE:.0%} of the diagonal that tissue fills to "
    f"{local_quality.TISSUE_MIN:.0%}",
    "lncc": "no tissue to measure it on",
    "ncc_margin": "no tissue to measure it on",
}
"""Signals without which a displacement fails, and why they may be unknown."""


def log_scale(scale: float | None) -> float | None:
    """Return the signal `log_scale` from the column `scale`."""
    if scale is None:
        return None
    return abs(math.log(scale)) if scale > 0 else math.inf


def grade(name: str, value: float, limits: Mapping[str, Any]) -> str | None:
    """Return pass, review or fail for a signal, NaN fails; None where `limits` has none for it."""
    if name not in limits:
        return None
    good, bad = (value >= at if name in AT_LEAST else value <= at for at in limits[name])
    if not bad:
        return FAIL
    return PASS if good else REVIEW


def assess(
    row: Mapping[str, Any],
    options: RegisterOptions,
    *,
    rigid_kept: bool = False,
    contradicts_sheet: bool = False,
) -> tuple[str, str | None, bool]:
    """Return the verdict on a displacement, from the columns of `tables.CERTIFICATE`.

    Args:
        rigid_kept: the displacement is the rigid one, because the nonrigid one was worse.
        contradicts_sheet: the sheet declares a mirror image, and HER2 matched better as stored.

    Returns:
        pass, review or fail; why it is not better, None for pass; and whether another attempt may
        be better: where it fails or the slides matched poorly, because attempts differ in matching.
    """
    reasons: dict[str, list[str]] = {FAIL: [], REVIEW: []}

    def compare(name: str) -> None:
        value = log_scale(row.get("scale")) if name == "log_scale" else row.get(name)
        if value is None:
            if name in _REQUIRED:
                reasons[FAIL].append(f"{name} unknown: {_REQUIRED[name]}")
            return
        graded = grade(name, value, vars(options))
        if graded in (FAIL, REVIEW):
            limit = getattr(options, name)[graded == FAIL]
            digits = 4 if name == "folding_fraction" else 3
            side = "below" if name in AT_LEAST else "above"
            reasons[graded].append(f"{name} {value:.{digits}f}, {side} {limit:g}")

    # Without matches, the displacement was made elsewhere.
    match_count = row.get("match_count")
    if match_count == 0:
        reasons[FAIL].append(
            "the engine found no match between the slides and returned the identity"
        )
    elif match_count is not None and row["match_fraction"] is None:
        reasons[FAIL].append(
            "match_fraction unknown: no match could be made between the mapped slides"
        )
    else:
        compare("match_fraction")
    compare("mirror_probe")
    matched = not any(reasons.values())
    for name in ("keypoint_fraction", "tile_ok", "lncc", "ncc_margin", "misaligned_fraction"):
        compare(name)
    determinant = row.get("determinant")
    if determinant is not None and (determinant < 0) != row["mirrored"]:
        reasons[FAIL].append(
            "the map mirrors HER2, which is not mirrored"
            if determinant < 0
            else "the map does not mirror HER2, which is mirrored"
        )
    for name in ("log_scale", "anisotropy", "folding_fraction"):
        compare(name)
    if rigid_kept:
        reasons[REVIEW].append("the rigid map was kept, because the nonrigid one lowered tile_ok")
    retryable = bool(reasons[FAIL]) or not matched
    compare("coverage_fraction")
    if contradicts_sheet:
        reasons[REVIEW].append("mirrored in the sheet, but HER2 matches better as it is stored")
    verdict = next((grade for grade in (FAIL, REVIEW) if reasons[grade]), PASS)
    return verdict, "; ".join(reasons.get(verdict, ())) or None, retryable


def effective_verdict(pair: Pair, certificate: Mapping[str, Any] | None) -> tuple[str, str | None]:
    """Return the verdict that applies to a pair, and the reason where it must not be used."""
    if pair.verdict == "refuse":
        return REFUSED, "refused by a person; see verdict in the sheet"
    if pair.her2 is None:
        return HE_ONLY, None
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
