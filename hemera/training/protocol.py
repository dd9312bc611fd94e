"""The protocol of stage aggregate: which models are trained on which cases, and predict which."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hemera.config import AggregateOptions
from hemera.dataset import cases as labelled
from hemera.dataset.cases import OOF, SHUFFLED, SITE_OUT
from hemera.dataset.splits import assign_folds, draw_inner
from hemera.sheet import SCORES

TARGETS = ("status", "score")
CLASSES = {"status": labelled.STATUSES, "score": SCORES}

Case = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """Models that are trained on the same cases.

    Attributes:
        part: of `dataset.cases.PARTS`; the models of `OOF` also predict the test split.
        train, inner: cases that they are trained on, and that choose epoch, threshold and
            temperature.
        judged: cases that they predict.
        labels: index in `CLASSES` of all cases; permuted for `SHUFFLED`.
    """

    part: str
    target: str
    fold: int | None
    left_out: str | None
    repeat: int
    train: list[str]
    inner: list[str]
    judged: list[str]
    labels: Mapping[str, int]

    @property
    def name(self) -> str:
        """A name within a method."""
        place = self.fold if self.left_out is None else self.left_out
        return f"{self.part}.{self.target}.{self.repeat}.{place}"

    @property
    def seen(self) -> list[str]:
        """All cases that the models have seen."""
        return sorted([*self.train, *self.inner])


def plan(
    rows: Sequence[Case], folds: int, options: AggregateOptions, seen: Collection[str] = ()
) -> Iterator[Run]:
    """Yield the runs of a method.

    Args:
        rows: of `tables.STATUS_CASES`.
        folds: number of folds that the cases were divided into, for permuted labels.
        options: of which `shuffles` counts for the aggregator mean alone, the cheapest.
        seen: cases that the encoder was trained on: they may be trained on, and are not judged.
    """
    for run in _plan(rows, folds, options):
        judged = [case for case in run.judged if case not in seen]
        # The models of cross-validation also predict the test split.
        if judged or run.part == OOF:
            yield dataclasses.replace(run, judged=judged)


def _plan(rows: Sequence[Case], folds: int, options: AggregateOptions) -> Iterator[Run]:
    for target in TARGETS:
        known = [row for row in rows if row["fold"] is not None and row[target]]
        own = {row["case"]: row["fold"] for row in known}
        yield from _folds(known, target, OOF, 0, own, options)
    known = [row for row in rows if row["fold"] is not None and row["status"]]
    sites = sorted({row["site"] for row in known if row["site"]})
    if len(sites) > 1:
        for site in sites:
            train = [row for row in known if row["site"] and row["site"] != site]
            judged = [row["case"] for row in known if row["site"] == site]
            yield _run(train, judged, known, "status", SITE_OUT, None, site, 0, options)
    if options.aggregator == "mean":
        for repeat in range(options.shuffles):
            permuted = permute(known, repeat, options.seed)
            drawn = assign_folds(
                labelled.strata(permuted, "status"), folds, seed=options.seed + repeat
            )
            yield from _folds(permuted, "status", SHUFFLED, repeat, drawn, options)


def permute(rows: Sequence[Case], repeat: int, seed: int) -> list[Case]:
    """Return cases with their status permuted between those of a data set and site."""
    draws = np.random.default_rng([seed, repeat])
    groups: dict[tuple[Any, Any], list[Case]] = {}
    for row in sorted(rows, key=lambda row: str(row["case"])):
        groups.setdefault((row["dataset"], row["site"]), []).append(row)
    found: list[Case] = []
    for own in groups.values():
        order = draws.permutation(len(own)).tolist()
        found += [
            {**row, "status": own[place]["status"]} for row, place in zip(own, order, strict=True)
        ]
    return found


def _folds(
    rows: Sequence[Case],
    target: str,
    part: str,
    repeat: int,
    folds: Mapping[str, int],
    options: AggregateOptions,
) -> Iterator[Run]:
    for fold in sorted(set(folds.values())):
        train = [row for row in rows if folds[row["case"]] != fold]
        judged = [row["case"] for row in rows if folds[row["case"]] == fold]
        yield _run(train, judged, rows, target, part, fold, None, repeat, options)


def _run(
    train: Sequence[Case],
    judged: list[str],
    rows: Sequence[Case],
    target: str,
    part: str,
    fold: int | None,
    left_out: str | None,
    repeat: int,
    options: AggregateOptions,
) -> Run:
    groups = labelled.strata(train, target)
    fitted, inner = draw_inner(groups, options.inner_fraction, seed=options.seed)
    labels = {row["case"]: CLASSES[target].index(row[target]) for row in rows}
    return Run(part, target, fold, left_out, repeat, fitted, inner, judged, labels)
