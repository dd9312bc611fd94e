"""The cases whose HER2 status is determined: labels, exclusion, folds."""

import collections
import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hemera.config import CasesOptions
from hemera.dataset.splits import assign_folds
from hemera.errors import LeakageError, SheetError
from hemera.sheet import Pair

log = logging.getLogger(__name__)

NEGATIVE, POSITIVE = STATUSES = ("negative", "positive")
EQUIVOCAL = "2+"
USED, UNLABELLED, NO_TILES, TOO_FEW = "used", "unlabelled", "no_tiles", "too_few"
OOF, TEST, SITE_OUT, SHUFFLED = PARTS = ("oof", "test", "site_out", "shuffled")
"""Predictions by cross-validation, of the test split, of a site that was left out, and with labels
that were permuted before."""


@dataclasses.dataclass(frozen=True)
class Label:
    """What is known of the HER2 of a case; empty texts are unknown."""

    score: str
    status: str
    source: str


def label(pairs: Sequence[Pair], equivocal: str) -> Label:
    """Return the label of a case from the rows of the sheet.

    A status of the sheet goes before its score; score 2+ alone gives the status `equivocal`, none
    for drop. SheetError where rows contradict each other.
    """
    found: dict[str, str] = {}
    for column in ("score", "status"):
        values = sorted({getattr(pair, column) for pair in pairs} - {""})
        if len(values) > 1:
            raise SheetError(
                f"case {pairs[0].case}: {column} {' and '.join(values)}; give all its rows the same"
            )
        found[column] = values[0] if values else ""
    score, status = found["score"], found["status"]
    if status:
        if score not in ("", EQUIVOCAL) and (score == "3+") != (status == POSITIVE):
            log.warning(
                "case %s: status %s and score %s contradict each other; the status is used",
                pairs[0].case, status, score,
            )  # fmt: skip
        return Label(score, status, "status")
    if score == EQUIVOCAL:
        return Label(score, *(("", "") if equivocal == "drop" else (equivocal, "score")))
    if score:
        return Label(score, POSITIVE if score == "3+" else NEGATIVE, "score")
    return Label("", "", "")


def build(
    pairs: Iterable[Pair], accepted: Mapping[str, int], options: CasesOptions
) -> list[dict[str, Any]]:
    """Return the rows of `tables.STATUS_CASES`, by name.

    Args:
        pairs: rows of the sheet.
        accepted: number of accepted H&E tiles by pair; pairs without tiles may be missing.
    """
    by_case: dict[str, list[Pair]] = collections.defaultdict(list)
    for pair in pairs:
        by_case[pair.case].append(pair)
    rows: list[dict[str, Any]] = []
    for case in sorted(by_case):
        own = by_case[case]
        known = label(own, options.equivocal)
        tiles = sum(accepted.get(pair.pair, 0) for pair in own)
        state, reason = _state(known, tiles, options)
        rows.append(
            {
                "case": case,
                "dataset": own[0].dataset,
                "site": _site(own),
                "split": own[0].split,
                "score": known.score or None,
                "status": known.status or None,
                "label_source": known.source or None,
                "pairs": len(own),
                "he_tiles": tiles,
                "state": state,
                "reason": reason,
            }
        )
    folds = assign_folds(strata(divided(rows)), options.folds, seed=options.seed)
    return [{**row, "fold": folds.get(row["case"])} for row in rows]


def divided(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the cases that are divided into folds: with tiles and a label, and not of the test."""
    return [
        row
        for row in rows
        if row["split"] != TEST
        and row["state"] not in (NO_TILES, TOO_FEW)
        and (row["status"] or row["score"])
    ]


def judged(rows: Iterable[Mapping[str, Any]], target: str) -> list[Mapping[str, Any]]:
    """Return the cases that each method is to predict: of a fold or the test split.

    They have H&E tiles and a label, `target`: status or score.
    """
    return [
        row
        for row in rows
        if row[target] and row["he_tiles"] and (row["fold"] is not None or row["split"] == TEST)
    ]


def strata(rows: Iterable[Mapping[str, Any]], target: str | None = None) -> dict[str, str]:
    """Return data set, site and label of each case, in equal fractions of which folds are drawn.

    `target`: the label, status or score; None: both.
    """
    names = ("dataset", "site", *((target,) if target else ("status", "score")))
    return {row["case"]: "/".join(str(row[name] or "") for name in names) for row in rows}


def fingerprint(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the SHA-256 of names, labels and folds of the cases."""
    names = ("case", "dataset", "split", "fold", "score", "status", "label_source", "state")
    listed = sorted([row[name] for name in names] for row in rows)
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def digest(cases: Iterable[str]) -> str:
    """Return the SHA-256 of a list of cases, in any order."""
    return hashlib.sha256(json.dumps(sorted(cases)).encode()).hexdigest()


def check_images(digests: Iterable[tuple[str, str, str]]) -> None:
    """Check that no image and no tile is of two cases; LeakageError otherwise.

    `digests` are (digest, case, name of the image or tile).
    """
    owners: dict[str, tuple[str, str]] = {}
    for key, case, name in digests:
        first, other = owners.setdefault(key, (case, name))
        if first != case:
            raise LeakageError(
                f"{name} of case {case} is the image {other} of case {first}; give both "
                "rows of the sheet the same case, or remove one"
            )


def _state(known: Label, tiles: int, options: CasesOptions) -> tuple[str, str | None]:
    if not tiles:
        return NO_TILES, "no H&E tile is accepted"
    if tiles < options.min_tiles:
        return TOO_FEW, f"{tiles} H&E tiles, and cases.min_tiles is {options.min_tiles}"
    if known.status:
        return USED, None
    if known.score:
        return "equivocal", f"score {known.score} without a status; see cases.equivocal"
    return UNLABELLED, "neither status nor score in the sheet"


def _site(pairs: Sequence[Pair]) -> str | None:
    """Return the site of a case, those of several joined."""
    return "+".join(sorted({pair.site for pair in pairs} - {""})) or None
