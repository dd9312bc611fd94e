"""Print where the workflow is."""

import sys
from pathlib import Path


def workflow() -> None:
    """Print the path of the Snakefile, as in snakemake --snakefile "$(hemera workflow)"."""
    sys.stdout.write(f"{snakefile()}\n")


def snakefile() -> Path:
    """Return the path of the Snakefile."""
    package = Path(__file__).parents[1]
    # In a wheel the workflow is inside the package, in a checkout beside it.
    shipped = package / "workflow" / "Snakefile"
    return shipped if shipped.is_file() else package.parent / "Snakefile"
