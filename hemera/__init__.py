"""HEMERA: from pairs of H&E and HER2 images to a verified training set, and two networks.

The stages are functions: ``from hemera.stages import tile; tile.run(...)``. What is listed here is
light; it loads no engine and no PyTorch.
"""

from hemera.config import Config, load, load_file
from hemera.errors import HemeraError
from hemera.sheet import Pair, Sheet, read_sheet, units

__all__ = [
    "Config",
    "HemeraError",
    "Pair",
    "Sheet",
    "__version__",
    "load",
    "load_file",
    "read_sheet",
    "units",
]
__version__ = "0.1.0"
