"""Published results, from ``published.yaml``, shown next to what is measured here."""

import functools
from pathlib import Path
from typing import Any

import yaml

METRICS = {
    "generation": ("psnr_db", "ssim", "fid"),
    "segmentation": ("precision", "recall", "f1", "iou"),
}
"""Metrics of the published results, by network."""


@functools.cache
def results(network: str) -> tuple[dict[str, str], ...]:
    """Return the published results of ``generation`` or ``segmentation``.

    Each has ``method``, ``source``, ``comparable`` (how far it may be compared) and the metrics
    that the source reports, as the source prints them.
    """
    path = Path(__file__).with_suffix(".yaml")
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return tuple(found[network])
