"""Options of the stages of the HER2 status but for its encoders: cases to evaluate_status."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from hemera.config.base import (
    Count,
    Device,
    Fraction,
    NonNegative,
    Options,
    Positive,
    Seed,
    Threads,
)
from hemera.config.encoders import HER2_CNN, SEGMENTER, STAIN, STAIN_MAP, STATISTICS, TUMOUR

CELLS = "cells"
"""In place of an encoder: the cells of stage mask on real HER2; nothing is embedded."""
VIRTUAL = "virtual"
"""In place of an encoder: the cells of stage mask on HER2 that is generated from H&E."""
OYELADE = "oyelade"
"""In place of an encoder: the networks of Oyelade et al., whose answers are fused by a rule."""
RULES: Mapping[str, str] = {CELLS: "asco_cap", VIRTUAL: "asco_cap", OYELADE: "fused"}
"""The aggregators that train nothing, by what they read in place of one encoder."""

Method = Literal[
    "floor", "statistics_abmil", "foundation", "oliveira", "oyelade", "cells", "virtual",
    "segmentation",
]  # fmt: skip
METHODS: Mapping[str, Mapping[str, Any]] = {
    "floor": {"encoder": STATISTICS, "aggregator": "mean"},
    "statistics_abmil": {"encoder": STATISTICS, "aggregator": "abmil"},
    "foundation": {"aggregator": "abmil"},
    "oliveira": {
        "encoder": HER2_CNN,
        "aggregator": "top_scores",
        "standardise": False,
        "encoder_cases": "train_only",
    },
    "oyelade": {"encoder": OYELADE, "aggregator": "fused", "encoder_cases": "train_only"},
    "cells": {"encoder": CELLS, "aggregator": "asco_cap"},
    "virtual": {"encoder": VIRTUAL, "aggregator": "asco_cap", "encoder_cases": "train_only"},
    "segmentation": {"encoder": SEGMENTER, "aggregator": "mean", "encoder_cases": "train_only"},
}
"""The methods by name, with the options of `aggregate` that each fixes."""

METHOD_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "oliveira": {
        "epochs": 150,
        "learning_rate": 1e-5,
        "schedule": "constant",
        "weight_decay": 0.0,
        "bags_per_step": 1,
        "patience": 150,
        "select": "accuracy",
        "seeds": 1,
    },
}
"""Options of `aggregate` that a method has where the configuration does not set them."""


class CasesOptions(Options):
    """Labels, folds and H&E tiles of the cases whose HER2 status is determined; reads no pixel."""

    section: ClassVar[str] = "cases"
    version: ClassVar[int] = 2

    folds: Annotated[int, Field(ge=2, le=20)] = 5
    """Folds of cross-validation, into which the cases outside of the test split are divided."""
    equivocal: Literal["drop", "positive", "negative"] = "drop"
    """Status of a case with score 2+ and without a status in the sheet; drop: none."""
    min_tiles: Count = 4
    """Fewest H&E tiles of a case that is used."""
    seed: Seed = 20251
    """Seed of the folds."""
    tissue_fraction_min: Fraction = 0.5
    """Smallest tissue fraction of an H&E tile; these limits, as those of filter, need no HER2."""
    he_sharpness_min: NonNegative = 30.0
    """Smallest variance of the Laplacian of an H&E tile, at 0.5 um per pixel."""
    pen_max: Fraction = 0.01
    """Largest fraction of an H&E tile under pen."""
    fold_max: Fraction = 0.05
    """Largest fraction of an H&E tile in folds of the tissue."""
    edge_max: Fraction = 0.01
    """Largest fraction of an H&E tile under edges of bubbles and of the coverslip, and hairs."""
    dust_max: Fraction = 0.05
    """Largest fraction of an H&E tile under dust."""
    other_max: Fraction = 0.05
    """Largest fraction of an H&E tile under artefacts without a kind, in files that the sheet
    names."""
    blur_max: Fraction = 0.25
    """Largest fraction of 4 x 4 cells of an H&E tile that are out of focus."""


class AggregateOptions(Options):
    """Training of an aggregator, which combines the features of a case to a status and a score."""

    section: ClassVar[str] = "aggregate"
    version: ClassVar[int] = 4

    encoder: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")] = "uni2_h"
    """Encoder of the method foundation: statistics, one of known recipes (uni, uni2_h, virchow2,
    h_optimus_0, h_optimus_1, gigapath), or any name whose weights have a config.json of timm."""
    aggregator: Literal["mean", "abmil", "top_scores", "asco_cap", "fused"] = "abmil"
    """How features are combined, where the method does not fix it; mean: a linear function of their
    mean; abmil: gated attention; top_scores: dense layers over the highest scores of the views;
    asco_cap: the rule by which methods cells and virtual read a score; fused: that of oyelade."""
    encoder_cases: Literal["refuse", "train_only"] = "refuse"
    """Cases that the encoder was trained on; refuse: they are an error; train_only: they may train
    the aggregator, and are not predicted. The methods oliveira, oyelade, virtual and segmentation
    fix train_only."""
    top_fraction: Annotated[float, Field(gt=0, le=1)] = 0.15
    """Highest fraction of the scores of the views of a case from which top_scores selects."""
    top_scores: Annotated[int, Field(ge=2)] = 300
    """Scores that top_scores selects."""
    soft_argmax_beta: Positive = 1000.0
    """Factor of the logits in the soft-argmax by which top_scores gives each view a score."""
    standardise: bool = True
    """Give each feature mean 0 and deviation 1 over the training cases."""
    epochs: Count = 50
    """Epochs of abmil; of the method oliveira, where it is not set, 150."""
    learning_rate: Positive = 1e-4
    """Learning rate of AdamW at the first epoch; of the method oliveira, where not set, 1e-5."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate over the epochs; cosine: it falls to 0; of the method oliveira, where it is not
    set, constant."""
    weight_decay: NonNegative = 1e-5
    """Weight decay of AdamW; of the method oliveira, where it is not set, 0."""
    bags_per_step: Count = 8
    """Cases per step, drawn evenly from the classes; of oliveira, where it is not set, 1."""
    views_per_bag: Count = 1024
    """Most views of a case in a step of abmil, drawn anew each time; predictions are from all."""
    embed_width: Count = 512
    """Width of the first layer of abmil."""
    attention_width: Count = 384
    """Width of the attention of abmil."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Dropout of abmil."""
    patience: Count = 15
    """Epochs without a better validation after which training ends; of oliveira, where it is not
    set, 150."""
    select: Literal["loss", "accuracy"] = "loss"
    """What the epoch is chosen by on the inner cases; of the method oliveira, where it is not set,
    accuracy."""
    l2: Positive = 1.0
    """Penalty of the squared weights of mean, as the inverse of C of scikit-learn."""
    inner_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Fraction of the training cases of a fold that choose epoch, threshold and temperature."""
    threshold: Literal["inner", "half"] = "inner"
    """Probability from which a case is positive; inner: the best on these cases; half: 0.5."""
    seeds: Annotated[int, Field(ge=1, le=20)] = 3
    """Repetitions of abmil or top_scores with other initial weights, whose probabilities are
    averaged; of the method oliveira, where it is not set, 1."""
    cells_min: Count = 100
    """Fewest cells of a case that the methods cells and virtual read: of 100, a fraction of 10 %
    has a standard error of 3 %."""
    fusion: Literal["mean", "map", "class"] = "mean"
    """How oyelade scores a view; map: by the areas of stain_map; class: by stain; mean: of both."""
    rule: Literal["asco_cap", "paper_max"] = "asco_cap"
    """How oyelade scores a case; asco_cap: by the fractions of the cell area of its views;
    paper_max: the greatest score of a view, of which only 2+ and 3+ count."""
    tumour_min: Fraction = 0.5
    """Smallest probability of tumour of a view that oyelade counts; 0: all, without the network
    tumour, which needs annotations."""
    shuffles: Annotated[int, Field(ge=0, le=1000)] = 5
    """Repetitions of aggregator mean with labels permuted between cases: what chance gives."""
    memory_mb: Count = 8000
    """Features up to this size are read into memory at once; larger ones case by case."""
    seed: Seed = 20251
    """Seed of weights, order and inner cases."""
    device: Device = "auto"
    """Device of the training; auto: a GPU if there is one."""
    torch_threads: Threads = 2
    """CPU threads of PyTorch."""

    @model_validator(mode="after")
    def _rules_have_their_encoders(self) -> Self:
        if self.aggregator != RULES.get(self.encoder, self.aggregator) or (
            self.encoder not in RULES and self.aggregator in RULES.values()
        ):
            raise ValueError(
                f"encoder {self.encoder} with aggregator {self.aggregator}: asco_cap reads cells, "
                "fused the networks of Oyelade et al., and nothing else does; add cells or oyelade "
                "to evaluate_status.routes instead"
            )
        return self

    @property
    def encoders(self) -> tuple[str, ...]:
        """The encoders whose features are combined."""
        if self.encoder == OYELADE:
            needed = {TUMOUR: self.tumour_min > 0, STAIN: self.fusion != "map", STAIN_MAP: True}
            return tuple(name for name, used in needed.items() if used)
        return () if self.encoder in RULES else (self.encoder,)


class EvaluateStatusOptions(Options):
    """Metrics of all methods on cases that none of their networks has seen, and their page."""

    section: ClassVar[str] = "evaluate_status"
    version: ClassVar[int] = 7

    routes: tuple[Method, ...] = ("floor", "foundation")
    """Methods that are evaluated: floor (64 colour and texture features, linear), statistics_abmil
    (the same features, attention), foundation (the encoder of aggregate, attention), oliveira (a
    network trained on HER2 tiles, dense layers over its highest scores), oyelade (networks for the
    tumour and for the stain of registered H&E and HER2, fused by a rule), cells (the cells of real
    HER2 by the ASCO/CAP rule, which needs the masks and the index), virtual (the same on HER2 that
    GenerationNet makes of H&E), segmentation (the positive fraction of SegmentationNet)."""
    bootstrap_samples: Annotated[int, Field(ge=100, le=100000)] = 1000
    """Bootstrap samples of the cases for confidence intervals."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Level of the intervals."""
    calibration_bins: Annotated[int, Field(ge=2, le=100)] = 10
    """Bins of equally many cases of the calibration error."""
    net_benefit_max: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Largest threshold of the decision curve."""
    sensitivity: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Sensitivity at which the specificity is given."""
    confounding_max: Fraction = 0.3
    """Cramer's V of status and site from which the page warns."""
    seed: Seed = 20251
    """Seed of the bootstrap."""

    @model_validator(mode="after")
    def _routes_are_distinct(self) -> Self:
        if len(set(self.routes)) != len(self.routes):
            raise ValueError(f"routes: {list(self.routes)}; name each method once")
        return self

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods, of which floor is always the first."""
        return tuple(dict.fromkeys(("floor", *self.routes)))
