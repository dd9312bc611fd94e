"""HEMERA: from pairs of H&E and HER2 images to a verified training set, and two networks.

============ =====================================================================================
config       options of every stage, presets
files        atomic writes, layout of results, GeoJSON
imaging      slides, JPEG decoding, colour, tissue, artefacts, quality, geometry, label images
registration displacement, verdict, warping, landmarks, transfer of annotations
networks     architectures, losses, weight files
masks        label format, mask engines, nuclei and membranes, HER2 score from cells
graph        Snakemake's graph: what would run and why, records, live state and summary of runs
dataset      tiles, shards, index, splits, filter criteria, PyTorch dataset
training     session, checkpoints of a run, batches, logs; the loops are in stages.train_*
evaluation   metrics of images and masks, FID, published results
inference    a trained network applied to a whole slide
interop      exports for other software, dataset card
reports      HTML pages
demo         synthetic tissue and cohorts
stages       one module per stage of the graph
view         local web application: inspect pairs and tiles, decide
commands     commands for users
============ =====================================================================================

The names below are imported on first use, and load no engine and no PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_MODULES = {
    **dict.fromkeys(("Config", "load", "load_file"), "hemera.config"),
    "HemeraError": "hemera.errors",
    **dict.fromkeys(("Pair", "Sheet", "read_sheet", "units"), "hemera.sheet"),
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'hemera' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
