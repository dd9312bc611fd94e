"""Everything that is not a stage: functions whose signature and docstring are the command line."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from hemera.errors import ConfigError

ConfigFile = Annotated[Path, Parameter(name="--configfile")]
Fraction = Annotated[float, Parameter(validator=Number(gte=0, lte=1))]
Positive = Annotated[float, Parameter(validator=Number(gt=0, lt=math.inf))]
Quality = Annotated[int, Parameter(validator=Number(gte=1, lte=100))]
Seed = Annotated[int, Parameter(validator=Number(gte=0, lt=2**63))]
Steps = Annotated[int, Parameter(validator=Number(gte=1))]
Workers = Annotated[int, Parameter(validator=Number(gte=1, lte=256))]


def check_new(path: Path) -> None:
    """Raise ConfigError where there is a file already: commands never replace one."""
    if path.exists():
        raise ConfigError(f"{path}: exists; name another file, or remove it first")


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as lines of text, its columns separated by two spaces."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in (header, *rows)
    )
    return "".join(line.rstrip() + "\n" for line in lines)
