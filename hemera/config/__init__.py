"""One Options model per stage: config section, command-line flags and library argument.

A default is the paper's value where the paper gives one; `hemera/presets/` contains the values that
a preset changes. A model has a `version`, incremented whenever the
same options give another output: Snakemake does not detect edits inside a package.
"""

from hemera.config.dataset import FilterOptions, IndexOptions, ReportOptions
from hemera.config.evaluation import EvaluateOptions
from hemera.config.imaging import DescribeOptions, TileOptions
from hemera.config.load import (
    DEMO_SHEET,
    DEMO_VERSION,
    PRESETS,
    STAGES,
    CohortOptions,
    Config,
    check_datasets,
    load,
    load_file,
    read_yaml,
)
from hemera.config.masks import MaskOptions
from hemera.config.registration import AT_LEAST, LandmarksOptions, RegisterOptions
from hemera.config.training import (
    GENERATORS,
    TrainGenerationOptions,
    TrainingOptions,
    TrainSegmentationOptions,
)

__all__ = [
    "AT_LEAST",
    "DEMO_SHEET",
    "DEMO_VERSION",
    "GENERATORS",
    "PRESETS",
    "STAGES",
    "CohortOptions",
    "Config",
    "DescribeOptions",
    "EvaluateOptions",
    "FilterOptions",
    "IndexOptions",
    "LandmarksOptions",
    "MaskOptions",
    "RegisterOptions",
    "ReportOptions",
    "TileOptions",
    "TrainGenerationOptions",
    "TrainSegmentationOptions",
    "TrainingOptions",
    "check_datasets",
    "load",
    "load_file",
    "read_yaml",
]
