"""Write the synthetic cohort with known ground truth."""

from pathlib import Path
from typing import Literal

from hemera.commands import Fraction, Workers


def demo(
    *,
    folder: Path,
    size: Literal["full", "small", "tiles", "status"] = "full",
    visibility: Fraction = 1.0,
    variant: Literal["signal", "null", "confounded"] = "signal",
    workers: Workers = 2,
) -> None:
    """Write the synthetic cohort with known ground truth.

    Args:
        folder: where the cohort is written; its pairs.tsv is replaced only if it is the demo's.
        size: full: the cohort of the tutorial; small: one slide pair and four image pairs; tiles:
            56 image pairs; status: 64 cases, most of H&E alone, for the HER2 status.
        visibility: how far the look of tumour cells in H&E depends on their HER2; 1: as in the
            tutorial, 0: not at all.
        variant: of size status; signal: H&E shows the expression of HER2; null: it does not;
            confounded: it does not, and the site goes with the status.
        workers: processes; any number writes the same bytes.
    """
    from hemera.demo import write_cohort

    write_cohort(folder, size, visibility=visibility, variant=variant, workers=workers)
