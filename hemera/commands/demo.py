"""Write the synthetic cohort with known ground truth."""

from pathlib import Path
from typing import Literal

from hemera.commands import Workers


def demo(*, folder: Path, size: Literal["full", "small"] = "full", workers: Workers = 2) -> None:
    """Write the synthetic cohort with known ground truth.

    Args:
        folder: where the cohort is written.
        size: small: the cohort of the tests.
        workers: processes; any number writes the same bytes.
    """
    from hemera.demo import write_cohort

    write_cohort(folder, size, workers=workers)
