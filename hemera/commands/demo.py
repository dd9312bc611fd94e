"""Write the synthetic cohort with known ground truth."""

from pathlib import Path
from typing import Literal

from hemera.commands import Workers


def demo(*, folder: Path, size: Literal["full", "small"] = "full", workers: Workers = 2) -> None:
    """Write the synthetic cohort with known ground truth.

    Args:
        folder: where the cohort is written; its pairs.tsv is replaced only if it is the demo's.
        size: full: the cohort of the tutorial; small: one slide pair and four image pairs.
        workers: processes; any number writes the same bytes.
    """
    from hemera.demo import write_cohort

    write_cohort(folder, size, workers=workers)
