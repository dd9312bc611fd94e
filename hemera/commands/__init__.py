"""Everything that is not a stage: functions whose signature and docstring are the command line."""

import math
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

ConfigFile = Annotated[Path, Parameter(name="--configfile")]
Positive = Annotated[float, Parameter(validator=Number(gt=0, lt=math.inf))]
Quality = Annotated[int, Parameter(validator=Number(gte=1, lte=100))]
Blocks = Annotated[int, Parameter(validator=Number(gte=1, lte=4096))]
Workers = Annotated[int, Parameter(validator=Number(gte=1, lte=256))]
