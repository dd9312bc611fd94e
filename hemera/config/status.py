"""Options of the stages of the HER2 status, from cases to evaluate_status."""

import re
from collections.abc import Mapping
from pathlib import Path
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

STATISTICS = "statistics"
"""The encoder that needs no weights."""
CELLS = "cells"
"""In place of an encoder: the cells of stage mask on real HER2; nothing is embedded."""

HER2_CNN = "her2_cnn"
"""The encoder that stage train_encoder trains on tiles of HER2."""

NETWORKS = (HER2_CNN,)
"""The encoders that stage train_encoder trains."""

Method = Literal["floor", "statistics_abmil", "foundation", "oliveira", "cells"]
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
    "cells": {"encoder": CELLS, "aggregator": "asco_cap"},
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


class TrainEncoderOptions(Options):
    """Training of the encoder her2_cnn on HER2 tiles, each with the score of its case."""

    section: ClassVar[str] = "train_encoder"

    base_width: Count = 16
    """Channels of the first convolution; the others have 2, 4 and 8 times as many."""
    hidden: Annotated[int, Field(ge=4)] = 1024
    """Width of the first dense layer; the second has a quarter of it."""
    split: Annotated[int, Field(ge=1, le=16)] = 2
    """Each tile is cut into split x split views, as by embed.split, which has to be the same."""
    her2_tissue_fraction_min: Fraction = 0.25
    """Smallest tissue fraction of a HER2 tile; less than of H&E, because HER2 of a low score is
    pale. The limits of artefacts are those of cases."""
    her2_sharpness_min: NonNegative = 5.0
    """Smallest variance of the Laplacian of a HER2 tile, at 0.5 um per pixel."""
    min_view_tissue: Fraction = 0.25
    """Views with a smaller tissue fraction are not used."""
    views_per_class: Count | None = None
    """Most views of a score; of each score as many are drawn as the rarest has."""
    standardise: bool = False
    """Give the lightness mean 0 and deviation 1 over the views that are trained on. Without it,
    the first epochs change little, because the lightness of all views is near 0.9."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Fraction of the cases that choose the epoch, where the sheet has no cases of split val."""
    epochs: Count = 200
    """Passes over the views."""
    batch_size: Count = 128
    """Views per step."""
    learning_rate: Positive = 1e-5
    """Learning rate of Adam."""
    seed: Seed = 20251
    """Seed of weights, order, and the draws of cases and views."""
    device: Device = "auto"
    """Device of the training; auto: a GPU if there is one."""
    torch_threads: Threads = 2
    """CPU threads of PyTorch."""


class EmbedOptions(Options):
    """Features of H&E tiles by an encoder."""

    section: ClassVar[str] = "embed"
    version: ClassVar[int] = 2

    weights: tuple[str, ...] = ()
    """Weights of the encoders, each as NAME=PATH: a file, or a folder with the weights and the
    config.json of timm, as published on the Hugging Face Hub; the encoder statistics needs none."""
    split: Annotated[int, Field(ge=1, le=16)] = 2
    """Each tile is cut into split x split views, each of which has a row of features."""
    min_view_tissue: Fraction = 0.25
    """Views with a smaller tissue fraction have no features."""
    batch_size: Count = 64
    """Views per forward pass."""
    readers: Threads = 2
    """Threads that read and decode tiles."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Numeric precision of the encoder."""
    device: Device = "auto"
    """Device of the encoder; auto: a GPU if there is one."""
    torch_threads: Threads = 2
    """CPU threads of PyTorch."""

    @model_validator(mode="after")
    def _weights_have_names(self) -> Self:
        for entry in self.weights:
            name, _, path = entry.partition("=")
            if not re.fullmatch(r"[a-z0-9_]+", name) or not path:
                raise ValueError(
                    f"weights: {entry!r} is not NAME=PATH; give for example uni2_h=weights/UNI2-h, "
                    "a name of lower-case letters, digits and _"
                )
        names = [entry.partition("=")[0] for entry in self.weights]
        if own := [name for name in names if name in (STATISTICS, *NETWORKS)]:
            raise ValueError(
                f"weights: {', '.join(own)} is an encoder of the workflow itself; give yours "
                "another name"
            )
        if len(set(names)) != len(names):
            raise ValueError(f"weights: {names}; name each encoder once")
        return self

    def path(self, encoder: str) -> Path | None:
        """Return the weights of an encoder, None where none are named."""
        return next(
            (Path(path) for name, _, path in (entry.partition("=") for entry in self.weights)
             if name == encoder), None,
        )  # fmt: skip

    def missing(self, encoder: str) -> list[str]:
        """Return what an encoder lacks, with the remedy."""
        path = self.path(encoder)
        if encoder in (STATISTICS, *NETWORKS) or (path is not None and path.exists()):
            return []
        if path is not None:
            return [f"embed.weights: {path}, of encoder {encoder}, does not exist; correct it"]
        return [
            f"embed.weights: no weights of encoder {encoder}; set embed: {{weights: "
            f"[{encoder}=PATH]}}, or choose routes that need none: evaluate_status: {{routes: "
            "[floor, statistics_abmil]}"
        ]


class AggregateOptions(Options):
    """Training of an aggregator, which combines the features of a case to a status and a score."""

    section: ClassVar[str] = "aggregate"
    version: ClassVar[int] = 2

    encoder: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")] = "uni2_h"
    """Encoder of the method foundation: statistics, one of known recipes (uni, uni2_h, virchow2,
    h_optimus_0, h_optimus_1, gigapath), or any name whose weights have a config.json of timm."""
    aggregator: Literal["mean", "abmil", "top_scores", "asco_cap"] = "abmil"
    """How features are combined, where the method does not fix it; mean: a linear function of their
    mean; abmil: gated attention; top_scores: dense layers over the highest scores of the views;
    asco_cap: the rule by which method cells reads a score."""
    encoder_cases: Literal["refuse", "train_only"] = "refuse"
    """Cases that the encoder was trained on; refuse: they are an error; train_only: they may train
    the aggregator, and are not predicted. The method oliveira fixes train_only."""
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
    """Fewest cells of a case that method cells reads: of 100, a fraction of 10 % has a standard
    error of 3 %."""
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
    def _cells_have_one_rule(self) -> Self:
        if (self.encoder == CELLS) != (self.aggregator == "asco_cap"):
            raise ValueError(
                f"encoder {self.encoder} with aggregator {self.aggregator}: asco_cap reads cells, "
                "and nothing else does; add cells to evaluate_status.routes instead"
            )
        return self


class EvaluateStatusOptions(Options):
    """Metrics of all methods on cases that none of their networks has seen, and their page."""

    section: ClassVar[str] = "evaluate_status"
    version: ClassVar[int] = 3

    routes: tuple[Method, ...] = ("floor", "foundation")
    """Methods that are evaluated: floor (64 colour and texture features, linear), statistics_abmil
    (the same features, attention), foundation (the encoder of aggregate, attention), oliveira (a
    network trained on HER2 tiles, dense layers over its highest scores), cells (the cells of real
    HER2 by the ASCO/CAP rule, which needs the masks and the index)."""
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
