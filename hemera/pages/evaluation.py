"""The page about the networks: curves, metrics beside baselines and papers, pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hemera.config import EvaluateOptions

RGB = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One tile shown on the page, all images of one size (H, W).

    What a network was not asked about this tile is None.
    """

    tile: str
    case: str
    dataset: str
    score: str
    label: str
    """Why it is shown: best, median, worst, drawn by seed."""
    he: RGB
    """(H, W, 3)."""
    her2: RGB
    """(H, W, 3), the real one."""
    generated: RGB | None = None
    """(H, W, 3), GenerationNet's HER2."""
    truth: npt.NDArray[np.bool_] | None = None
    """(H, W), the positive mask."""
    probability: npt.NDArray[np.float32] | None = None
    """(H, W), SegmentationNet's, 0 to 1."""
    values: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    """Metrics of this tile by their names in METRICS: psnr_db, ssim, f1, iou."""


def evaluation_page(
    path: Path,
    *,
    preset: str,
    metrics: pa.Table,
    tiles: pa.Table,
    histories: Mapping[str, pa.Table],
    metadata: Mapping[str, Mapping[str, Any]],
    index_metadata: Mapping[str, str],
    examples: Sequence[Example],
    options: EvaluateOptions,
    report: str,
) -> None:
    """Write the page.

    Args:
        path: the page.
        preset: preset of the cohort; ``demo`` puts a banner on the page.
        metrics: `tables.METRICS`; no row where a network has no test tile.
        tiles: `tables.EVALUATION_TILES`.
        histories: `tables.HISTORY` of ``generation`` and of ``segmentation``.
        metadata: the JSON beside the weights of ``generation`` and of ``segmentation``.
        index_metadata: the key-value metadata of the index.
        examples: tiles shown, in this order.
        options: what evaluate ran with.
        report: relative link from the page to the page about the data.
    """
    raise NotImplementedError
