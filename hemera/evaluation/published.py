"""Published results, from ``published.yaml``, shown next to what is measured here."""

import functools
from pathlib import Path
from typing import Any

import yaml

METRICS = {
    "generation": ("psnr_db", "ssim", "fid", "kid", "dab_r", "dab_kl"),
    "segmentation": ("precision", "recall", "f1", "iou"),
}
"""Metrics of the published results, by network."""


@functools.cache
def results(network: str) -> tuple[dict[str, str], ...]:
    """Return method, source, comparability and metrics, as printed, of the published results."""
    found: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
    return tuple(found[network])
