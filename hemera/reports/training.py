"""What pages show about the training of a network: facts, options, curves, differences."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from hemera.evaluation.image_quality import IMAGE_METRICS, SEGMENTER
from hemera.evaluation.metrics import SEGMENTATION_METRICS
from hemera.reports import charts
from hemera.reports.data import NETWORKS, option_rows

FACTS = {
    "parameters": "parameters",
    "parameters_trained": "of these, trained",
    "epoch": "epoch kept",
    "best_epoch": "best epoch on validation tiles",
    "mask_engine": "mask engine",
    "seed": "seed",
}
"""Keys of the metadata of a network that the page shows."""


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A trained network: the name of its rows in the tables, its metadata and its history."""

    name: str
    network: str
    """generation or segmentation."""
    metadata: Mapping[str, Any]
    """The JSON beside the weights."""
    history: pa.Table
    """`tables.HISTORY`."""

    @property
    def label(self) -> str:
        """Name on the page."""
        return NETWORKS[self.network] if self.name == SEGMENTER else self.name


def summary(trained: Trained) -> dict[str, Any]:
    """Return the facts, options and curves of a training."""
    described = trained.metadata
    facts = [
        (words, described[key]) for key, words in FACTS.items() if described.get(key) is not None
    ]
    facts += [(f"tiles, {split}", n) for split, n in dict(described.get("tiles", {})).items()]
    facts += dict(described.get("model", {})).items()
    stage = f"train_{trained.network}"
    return {
        "name": trained.label,
        "stage": stage,
        "facts": [
            (words, value if isinstance(value, str) else json.dumps(value))
            for words, value in facts
        ],
        "options": option_rows(stage, described.get("options", {})),
        "versions": dict(described.get("versions", {})),
        "curves": _curves(trained),
    }


def _curves(trained: Trained) -> list[dict[str, Any]]:
    """Return a chart of each quantity of a history: losses, metrics, learning rates."""
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in trained.history.to_pylist():
        series = lines.setdefault(row["quantity"], {}).setdefault(row["part"], [])
        series.append((row["epoch"], row["value"]))
    kept = trained.metadata.get("epoch")

    def order(quantity: str) -> tuple[bool, bool, str]:
        return "rate" in quantity, quantity in (*IMAGE_METRICS, *SEGMENTATION_METRICS), quantity

    return [
        {
            "quantity": quantity,
            "chart": charts.curves(
                f"{quantity} by epoch",
                lines[quantity],
                mark=None if kept is None else ("kept", float(kept)),
            ),
        }
        for quantity in sorted(lines, key=order)
    ]


def differences(trained: Sequence[Trained]) -> list[dict[str, Any]]:
    """Return the options in which the trainings of generators differ, with the values of each."""
    generators = [each for each in trained if each.network == "generation"]
    options = [dict(each.metadata.get("options", {})) for each in generators]
    rows = [
        {"name": name, "values": [json.dumps(each.get(name)) for each in options]}
        for name in dict.fromkeys(name for each in options for name in each)
    ]
    return [row for row in rows if len(set(row["values"])) > 1]
