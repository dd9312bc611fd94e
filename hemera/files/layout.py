"""The layout of ``results/``: which stage writes which file of which unit.

A pattern is relative to the working directory of the workflow; ``{unit}`` is a unit of the sheet,
for whole slides the name of the pair, ``{generator}`` a preset, ``{network}``, ``{encoder}`` and
``{method}`` those of the HER2 status. Light on purpose: the rules
import this module.
"""

import functools
import re
from pathlib import Path

RESULTS = "results"

IMAGES_TABLE = "results/describe/{unit}.parquet"

DISPLACEMENT = "results/register/{unit}.displacement.npz"
CERTIFICATE = "results/register/{unit}.parquet"
QUALITY = "results/register/{unit}.quality.parquet"

LANDMARK_ERRORS = "results/landmarks/{unit}.parquet"
LANDMARK_PREDICTIONS = "results/landmarks/{unit}.csv"
LANDMARK_COHORT = "results/landmarks/cohort.errors.parquet"
LANDMARK_COHORT_PREDICTIONS = "results/landmarks/cohort.predictions.csv"

TILE_SHARD = "results/tile/{unit}.tar"
TILES = "results/tile/{unit}.parquet"
PAIRS = "results/tile/{unit}.pairs.parquet"

MASK_SHARD = "results/mask/{unit}.tar"
MASKS = "results/mask/{unit}.parquet"
CELLS = "results/mask/{unit}.cells.parquet"

FILTERED = "results/filter/tiles.parquet"

INDEX = "results/index/index.parquet"
CARD = "results/index/card.md"

REPORT = "results/report/report.html"
PAIR_PAGES = "results/report/pairs"
CASES = "results/report/cases.parquet"

GENERATOR = "results/train_generation/{generator}/generator.safetensors"
GENERATOR_METADATA = "results/train_generation/{generator}/metadata.json"
GENERATION_HISTORY = "results/train_generation/{generator}/history.parquet"

SEGMENTER = "results/train_segmentation/segmenter.safetensors"
SEGMENTER_METADATA = "results/train_segmentation/metadata.json"
SEGMENTATION_HISTORY = "results/train_segmentation/history.parquet"

STATUS_CASES = "results/cases/cases.parquet"
STATUS_TILES = "results/cases/tiles.parquet"

ENCODER = "results/train_encoder/{network}/weights.safetensors"
ENCODER_METADATA = "results/train_encoder/{network}/metadata.json"
ENCODER_HISTORY = "results/train_encoder/{network}/history.parquet"

FEATURES = "results/embed/{encoder}/{unit}.h5"

AGGREGATOR = "results/aggregate/{method}/weights.safetensors"
AGGREGATOR_METADATA = "results/aggregate/{method}/metadata.json"
AGGREGATOR_HISTORY = "results/aggregate/{method}/history.parquet"
STATUS_PREDICTIONS = "results/aggregate/{method}/predictions.parquet"
CONTRIBUTIONS = "results/aggregate/{method}/contributions.parquet"

VIRTUAL_SHARD = "results/restain/{unit}.tar"
VIRTUAL_TILES = "results/restain/{unit}.parquet"
VIRTUAL_MASK_SHARD = "results/restain_mask/{unit}.tar"
VIRTUAL_MASKS = "results/restain_mask/{unit}.parquet"
VIRTUAL_CELLS = "results/restain_mask/{unit}.cells.parquet"

STATUS_METRICS = "results/evaluate_status/metrics.parquet"
STATUS_PAGE = "results/evaluate_status/status.html"

EVALUATED_TILES = "results/evaluate/tiles.parquet"
METRICS = "results/evaluate/metrics.parquet"
EVALUATION = "results/evaluate/evaluate.html"


def path(pattern: str, results: Path = Path(RESULTS), **wildcards: str) -> Path:
    """Return the path of an output: a pattern of this module with its names in braces replaced."""
    return results / pattern.removeprefix(f"{RESULTS}/").format(**wildcards)


def unit(path: str) -> str:
    """Return the values of an output's wildcards, with a slash between two; empty without any."""
    for pattern in _patterns():
        if found := pattern.fullmatch(path):
            return "/".join(found.groups())
    return ""


@functools.cache
def _patterns() -> list[re.Pattern[str]]:
    # A dot is only before a block's number, see workflow/rules/common.smk.
    kinds = {"unit": r"([A-Za-z0-9_-]+(?:\.[0-9]+)?)"}
    return [
        re.compile(
            "".join(
                kinds.get(part[1:-1], "([A-Za-z0-9_-]+)")
                if part.startswith("{")
                else re.escape(part)
                for part in re.split(r"(\{\w+\})", text)
            )
        )
        for text in globals().values()
        if isinstance(text, str) and text.startswith(RESULTS) and "{" in text
    ]
