"""One Options model per stage: config section, command-line flags and library argument.

A default is the paper's value where the paper gives one. A model has a `version`, incremented
whenever the same options give another output: Snakemake does not detect edits inside a package.
"""

from hemera.config.dataset import FilterOptions as FilterOptions
from hemera.config.dataset import IndexOptions as IndexOptions
from hemera.config.dataset import ReportOptions as ReportOptions
from hemera.config.encoders import HER2_CNN as HER2_CNN
from hemera.config.encoders import NETWORKS as NETWORKS
from hemera.config.encoders import OF_HER2 as OF_HER2
from hemera.config.encoders import OYELADE_NETWORKS as OYELADE_NETWORKS
from hemera.config.encoders import SEGMENTER as SEGMENTER
from hemera.config.encoders import STAIN as STAIN
from hemera.config.encoders import STAIN_MAP as STAIN_MAP
from hemera.config.encoders import STATISTICS as STATISTICS
from hemera.config.encoders import TUMOUR as TUMOUR
from hemera.config.encoders import EmbedOptions as EmbedOptions
from hemera.config.encoders import RestainOptions as RestainOptions
from hemera.config.encoders import TrainEncoderOptions as TrainEncoderOptions
from hemera.config.evaluation import EvaluateOptions as EvaluateOptions
from hemera.config.imaging import DescribeOptions as DescribeOptions
from hemera.config.imaging import TileOptions as TileOptions
from hemera.config.load import DEMO_SHEET as DEMO_SHEET
from hemera.config.load import DEMO_SHEETS as DEMO_SHEETS
from hemera.config.load import DEMO_VERSION as DEMO_VERSION
from hemera.config.load import PRESETS as PRESETS
from hemera.config.load import STAGES as STAGES
from hemera.config.load import CohortOptions as CohortOptions
from hemera.config.load import Config as Config
from hemera.config.load import check_datasets as check_datasets
from hemera.config.load import check_sheet_given as check_sheet_given
from hemera.config.load import has_demo_sizes as has_demo_sizes
from hemera.config.load import load as load
from hemera.config.load import load_file as load_file
from hemera.config.load import read_yaml as read_yaml
from hemera.config.masks import MaskOptions as MaskOptions
from hemera.config.registration import AT_LEAST as AT_LEAST
from hemera.config.registration import LandmarksOptions as LandmarksOptions
from hemera.config.registration import RegisterOptions as RegisterOptions
from hemera.config.status import CELLS as CELLS
from hemera.config.status import METHODS as METHODS
from hemera.config.status import OYELADE as OYELADE
from hemera.config.status import RULES as RULES
from hemera.config.status import VIRTUAL as VIRTUAL
from hemera.config.status import AggregateOptions as AggregateOptions
from hemera.config.status import CasesOptions as CasesOptions
from hemera.config.status import EvaluateStatusOptions as EvaluateStatusOptions
from hemera.config.training import GENERATORS as GENERATORS
from hemera.config.training import TrainGenerationOptions as TrainGenerationOptions
from hemera.config.training import TrainingOptions as TrainingOptions
from hemera.config.training import TrainSegmentationOptions as TrainSegmentationOptions
