"""Score of cases from the features of the networks of Oyelade et al.: method oyelade."""

import collections
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hemera import tables
from hemera.config import STAIN, STAIN_MAP, TUMOUR, AggregateOptions
from hemera.dataset import criteria
from hemera.dataset.bags import Bags
from hemera.dataset.readings import SEEN
from hemera.files import layout
from hemera.masks.view_scores import Graded, grade

Key = tuple[str, int, int]
"""A view: its tile, and its place on H&E."""


class FusedReadings:
    """The score of each case with HER2, from what three networks answer of the same views.

    Attributes:
        features: numbers per view.
        fingerprint: of the weights of the networks.
        trained_on: cases that any of them has seen, sorted.
        engine: names of the networks.
        graded: what the views of each case give.
    """

    def __init__(
        self,
        results: Path,
        tiles: Sequence[Mapping[str, Any]],
        limits: Mapping[str, Any],
        options: AggregateOptions,
    ) -> None:
        """Read the features and grade the cases.

        Args:
            results: folder of results, with tables of stage tile, and features of stage embed.
            tiles: rows of `tables.STATUS_TILES`.
            limits: options of stage cases, whose limits of artefacts also apply to HER2.
            options: gate, fusion and rule.

        Raises:
            TableError: when features are missing or damaged, or of different weights.
        """
        units = sorted({row["unit"] for row in tiles})
        placed: dict[str, bool] = {}
        for unit in units:
            placed |= _placed(layout.path(layout.TILES, results, unit=unit), limits)
        with_her2 = sorted({row["unit"] for row in tiles if row["tile"] in placed})
        bags = {}
        for name in options.encoders:
            path = functools.partial(layout.path, layout.FEATURES, results, encoder=name)
            files = {unit: path(unit=unit) for unit in with_her2}
            bags[name] = Bags(files, tiles, options.memory_mb)
        self.features = sum(each.width for each in bags.values())
        digests = json.dumps({name: each.encoder_sha256 for name, each in bags.items()})
        self.fingerprint = hashlib.sha256(digests.encode()).hexdigest()
        self.trained_on: Sequence[str] = sorted(
            {case for each in bags.values() for case in each.trained_on}
        )
        self.engine = f"networks {', '.join(bags)}"
        maps = bags[STAIN_MAP]
        self.graded: dict[str, Graded] = {
            case: _graded(case, bags, placed, options) for case in sorted(maps.views)
        }
        self._rule = options.rule

    def refusal(self, case: str) -> str:
        """Return why a case has no score; empty: it has one."""
        if case in self.trained_on:
            return SEEN
        if case not in self.graded:
            return "no view with HER2: H&E alone, or its registration was refused"
        found = self.graded[case]
        if found.score:
            return ""
        if not found.tumour:
            return "no view is tumour"
        if not found.voting:
            lost = "whose stains are in register" if found.unplaced else "with a cell"
            return f"no view of tumour {lost}"
        return f"no view of 2+ or 3+, which alone count by {self._rule}"

    def score(self, case: str) -> str:
        """Return the score of a case that is not refused."""
        return self.graded[case].score

    def probabilities(self, case: str) -> list[float]:
        """Return the probabilities of the scores of a case that is not refused."""
        return [*self.graded[case].probabilities]

    def facts(self, cases: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Return fractions and numbers of views of cases with HER2 that no network has seen."""
        found = {}
        for case in sorted({*cases} & {*self.graded} - {*self.trained_on}):
            own = self.graded[case]
            # JSON has no NaN.
            kept = {"fractions": own.fractions.tolist() if own.voting else None,
                    "positive": own.positive_fraction if own.voting else None}  # fmt: skip
            views = {name: getattr(own, name) for name in ("tumour", "voting", "unplaced")}
            found[case] = {"score": own.score, **kept, **views}
        return found


def _placed(path: Path, limits: Mapping[str, Any]) -> dict[str, bool]:
    """Return, of each tile with HER2, whether its two stains show the same place.

    That is: its registration error, where it is measured, is at most half its side, and its HER2
    has no artefact beyond the limits.
    """
    table = tables.read(path, tables.TILE)
    own = {**limits, "tissue_fraction_min": 0.0}
    refused = criteria.stain_refusals(table, own, "her2").tolist()
    found = {}
    for row, reason in zip(table.to_pylist(), refused, strict=True):
        if row["her2_offset"] is not None:
            error = row["registration_error_um"]
            near = error is None or error <= row["size_px"] * row["mpp"] / 2
            found[row["tile"]] = near and not reason
    return found


def _graded(
    case: str, bags: Mapping[str, Bags], placed: Mapping[str, bool], options: AggregateOptions
) -> Graded:
    """Grade a case by the views that have a stain map."""
    features: dict[str, dict[Key, Any]] = collections.defaultdict(dict)
    for name, each in bags.items():
        values = each.load(case).numpy()
        for view, row in zip(each.views.get(case, ()), values, strict=True):
            features[name][view.tile, view.x_px, view.y_px] = row
    keys = list(features[STAIN_MAP])
    areas = np.stack([features[STAIN_MAP][key] for key in keys]).astype(float)
    classes = areas
    if STAIN in bags:
        classes = np.stack([features[STAIN][key] for key in keys]).astype(float)
    tumour = np.ones(len(keys))
    if TUMOUR in bags:
        tumour = np.array([features[TUMOUR][key][1] for key in keys], float)
    return grade(
        tumour, areas, classes, np.array([placed[tile] for tile, _, _ in keys]),
        fusion=options.fusion, rule=options.rule, tumour_min=options.tumour_min,
    )  # fmt: skip
