"""What pages show about the training of a network."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from hemera.dataset.statistics import Frame
from hemera.evaluation.image_quality import IMAGE_METRICS, SEGMENTER
from hemera.evaluation.metrics import SEGMENTATION_METRICS
from hemera.reports import charts
from hemera.reports.data import NETWORKS


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A trained network: the name of its rows, generation or segmentation, JSON and history."""

    name: str
    network: str
    metadata: Mapping[str, Any]
    history: Frame

    @property
    def label(self) -> str:
        """Name on the page."""
        return NETWORKS[self.network] if self.name == SEGMENTER else self.name

    def curves(self) -> list[tuple[str, Markup]]:
        """Return a chart of each quantity of the history: losses, metrics, learning rates."""

        def order(quantity: str) -> tuple[bool, bool, str]:
            return "rate" in quantity, quantity in (*IMAGE_METRICS, *SEGMENTATION_METRICS), quantity

        kept = self.metadata.get("epoch")
        charted = []
        for quantity in sorted(self.history["quantity"].unique(), key=order):
            rows = self.history[self.history["quantity"] == quantity]
            series = rows.pivot(index="epoch", columns="part", values="value")
            series = series[rows["part"].unique()]
            charted.append((quantity, charts.curves(f"{quantity} by epoch", series, kept)))
        return charted
