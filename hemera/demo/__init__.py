"""Synthetic cohorts with known ground truth.

`plan` lists the content of a cohort and makes its sheet (no imaging package needed); `tissue` and
`cells` generate the tissue, `render` stains it, `scanner` images it, `cohort` writes the files.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hemera.demo.plan import SEED, outputs, sheet_text
from hemera.errors import ConfigError

if TYPE_CHECKING:
    from hemera.demo.cohort import Truth

__all__ = ["SEED", "load_truth", "outputs", "sheet_text", "write_cohort"]


def write_cohort(
    folder: Path,
    size: str = "full",
    *,
    seed: int = SEED,
    visibility: float = 1.0,
    variant: str = "signal",
    workers: int = 2,
) -> None:
    """Write the demo cohort into `folder`: images, ACROBAT's tables, sheet, truth.

    The same size and seed give the same bytes, for any number of workers.

    Args:
        folder: made if it is not there; files of the same names are replaced.
        size: ``full`` (four whole-slide cases, 28 image pairs), ``small`` (one and four),
            ``tiles`` (56 image pairs) or ``status`` (64 cases for the HER2 status).
        seed: what grows from it; the sheet stays the same.
        visibility: how far the look of tumour cells in H&E depends on their HER2, 0 to 1.
        variant: of size status, see `hemera.demo.status.VARIANTS`.
        workers: processes that render.

    Raises:
        ConfigError: there is no such size, visibility or variant.
    """
    from hemera.demo import cohort, status

    if size == "status":
        return status.write_cohort(Path(folder), variant, seed=seed, workers=workers)
    if not 0 <= visibility <= 1:
        raise ConfigError(f"visibility: {visibility}; give 0 to 1")
    cohort.write_cohort(folder, size, seed=seed, visibility=visibility, workers=workers)


def load_truth(folder: Path, pair: str) -> Truth:
    """Read the truth of one pair of the cohort in `folder`; see `hemera.demo.cohort.Truth`."""
    from hemera.demo import cohort

    return cohort.load_truth(folder, pair)
