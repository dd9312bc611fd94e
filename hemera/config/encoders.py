"""Options of the encoders of tiles: their training, their features, generated HER2."""

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
HER2_CNN = "her2_cnn"
"""The network of Oliveira et al., trained on tiles of HER2 and applied to H&E."""
TUMOUR, STAIN, STAIN_MAP = OYELADE_NETWORKS = ("tumour", "stain", "stain_map")
"""The networks of Oyelade et al.: tumour on H&E; class and map of the stain on HER2."""
NETWORKS = (HER2_CNN, *OYELADE_NETWORKS)
"""The encoders that stage train_encoder trains."""
OF_HER2 = (STAIN, STAIN_MAP)
"""Encoders whose input is HER2, so that only units with HER2 have their features."""
SEGMENTER = "segmenter"
"""SegmentationNet as an encoder: the positive fraction that it predicts from H&E."""

_FINE_TUNED = {"weight_decay": 0.01, "schedule": "linear", "balance": False, "augment": True}
NETWORK_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    TUMOUR: {"epochs": 20, "batch_size": 16, "learning_rate": 2e-4, **_FINE_TUNED},
    STAIN: {"epochs": 20, "batch_size": 16, "learning_rate": 2e-4, **_FINE_TUNED},
    STAIN_MAP: {"epochs": 50, "batch_size": 2, "learning_rate": 5e-5, **_FINE_TUNED},
}
"""Options of `train_encoder` that a network has where the configuration does not set them."""


class _Weights(Options):
    """Options with weights of networks, each as NAME=PATH."""

    weights: tuple[str, ...] = ()
    """Weights, each as NAME=PATH."""

    @model_validator(mode="after")
    def _weights_have_names(self) -> Self:
        for entry in self.weights:
            name, _, path = entry.partition("=")
            if not re.fullmatch(r"[a-z0-9_]+", name) or not path:
                raise ValueError(
                    f"weights: {entry!r} is not NAME=PATH; give for example {self._example}, "
                    "a name of lower-case letters, digits and _"
                )
        names = [entry.partition("=")[0] for entry in self.weights]
        if len(set(names)) != len(names):
            raise ValueError(f"weights: {names}; name each encoder once")
        return self

    _example: ClassVar[str]

    def path(self, encoder: str) -> Path | None:
        """Return the weights of an encoder, None where none are named."""
        return next(
            (Path(path) for name, _, path in (entry.partition("=") for entry in self.weights)
             if name == encoder), None,
        )  # fmt: skip


class TrainEncoderOptions(_Weights):
    """Training of the encoders of the routes oliveira and oyelade, on tiles of known cases."""

    section: ClassVar[str] = "train_encoder"
    version: ClassVar[int] = 3
    _example: ClassVar[str] = "tumour=weights/vit_small"

    base_width: Count = 16
    """Channels of the first convolution of her2_cnn; the others have 2, 4 and 8 times as many."""
    hidden: Annotated[int, Field(ge=4)] = 1024
    """Width of the first dense layer of her2_cnn; the second has a quarter of it."""
    architecture: Annotated[str, Field(pattern=r"^[a-z0-9_.]+$")] = "vit_small_patch16_224"
    """Vision transformer of tumour and stain, a name of timm."""
    input_px: Annotated[int, Field(ge=16, le=1024)] = 224
    """Side to which views are resized for tumour and stain."""
    map_encoder: Literal["mit_b0", "mit_b1", "mit_b2", "mit_b3", "mit_b4", "mit_b5"] = "mit_b0"
    """Encoder of stain_map, a SegFormer."""
    map_px: Annotated[int, Field(ge=32, le=2048, multiple_of=32)] | None = None
    """Side to which views are resized for stain_map; its answer has the size of the view again;
    null: that of the view, which has to be a multiple of 32."""
    weights: tuple[str, ...] = ()
    """Weights of ImageNet that tumour, stain (of timm) and stain_map (of its encoder) start from,
    each as NAME=PATH; a network without is trained from random weights."""
    split: Annotated[int, Field(ge=1, le=16)] = 2
    """Each tile is cut into split x split views, as by embed.split, which has to be the same."""
    her2_tissue_fraction_min: Fraction = 0.25
    """Smallest tissue fraction of a HER2 tile; less than of H&E, because HER2 of a low score is
    pale. The limits of artefacts, and of H&E for tumour, are those of cases."""
    her2_sharpness_min: NonNegative = 5.0
    """Smallest variance of the Laplacian of a HER2 tile, at 0.5 um per pixel."""
    min_view_tissue: Fraction = 0.25
    """Views with a smaller tissue fraction are not used."""
    labels: Literal["cells", "slide"] = "cells"
    """Label of a view for stain; cells: the ASCO/CAP score of its own cells from index.target;
    slide: the score of its case."""
    cells_min: Count = 20
    """Fewest cells of a view that has a label from cells."""
    tumour_classes: tuple[str, ...] = ("Tumor", "Tumour", "Invasive")
    """Classes of the sheet's annotations that are tumour; a view of which half is annotated with
    these is tumour, and one of which half is annotated with other classes is not."""
    held_out_folds: Annotated[int, Field(ge=0)] = 0
    """Folds of cases, the first ones, that no network is trained on, so that they can be predicted
    beside the test split."""
    views_per_class: Count | None = None
    """Most views of a class; with balance of each class as many are drawn as the rarest has."""
    balance: bool = True
    """Draw equally many views of each class; of tumour and stain, where not set, false."""
    standardise: bool = False
    """Give the lightness of her2_cnn mean 0 and deviation 1 over the views that are trained on.
    Without it, the first epochs change little, because that of all views is near 0.9."""
    augment: bool = False
    """Flip and turn views by quarters at random; of tumour, stain and stain_map, where not set,
    true."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Fraction of the cases of each score that choose the epoch, where the sheet has no cases of
    split val; at least one where there are two."""
    epochs: Count = 200
    """Passes over the views; where not set, of tumour and stain 20, of stain_map 50."""
    batch_size: Count = 128
    """Views per step; where not set, of tumour and stain 16, of stain_map 2."""
    learning_rate: Positive = 1e-5
    """Learning rate of AdamW; where not set, of tumour and stain 2e-4, of stain_map 5e-5."""
    weight_decay: NonNegative = 0.0
    """Weight decay of AdamW; of tumour, stain and stain_map, where not set, 0.01."""
    schedule: Literal["constant", "linear"] = "constant"
    """Learning rate over the epochs; linear: it falls to 0; of tumour, stain and stain_map, where
    not set, linear."""
    seed: Seed = 20251
    """Seed of weights, order, and the draws of cases and views."""
    device: Device = "auto"
    """Device of the training; auto: a GPU if there is one."""
    torch_threads: Threads = 2
    """CPU threads of PyTorch."""

    @model_validator(mode="after")
    def _weights_are_of_networks_that_have_some(self) -> Self:
        names = [entry.partition("=")[0] for entry in self.weights]
        if other := [name for name in names if name not in OYELADE_NETWORKS]:
            raise ValueError(
                f"weights: {', '.join(other)} starts from random weights; name weights of "
                f"{', '.join(OYELADE_NETWORKS)}"
            )
        return self

    def of_network(self, name: str) -> Self:
        """Return the options of a network: its own values where the configuration sets none."""
        own = NETWORK_DEFAULTS.get(name, {})
        return self.replace(**{key: own[key] for key in own if key not in self.model_fields_set})

    def missing(self, network: str) -> list[str]:
        """Return what a network lacks, with the remedy."""
        path = self.path(network)
        if path is None or path.exists():
            return []
        return [f"train_encoder.weights: {path}, of {network}, does not exist; correct it"]


class EmbedOptions(_Weights):
    """Features of tiles by an encoder."""

    section: ClassVar[str] = "embed"
    version: ClassVar[int] = 2
    _example: ClassVar[str] = "uni2_h=weights/UNI2-h"

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
    def _weights_are_of_other_encoders(self) -> Self:
        names = [entry.partition("=")[0] for entry in self.weights]
        if own := [name for name in names if name in (STATISTICS, SEGMENTER, *NETWORKS)]:
            raise ValueError(
                f"weights: {', '.join(own)} is an encoder of the workflow itself; give yours "
                "another name"
            )
        return self

    def missing(self, encoder: str) -> list[str]:
        """Return what an encoder lacks, with the remedy."""
        path = self.path(encoder)
        if encoder in (STATISTICS, SEGMENTER, *NETWORKS) or (path is not None and path.exists()):
            return []
        if path is not None:
            return [f"embed.weights: {path}, of encoder {encoder}, does not exist; correct it"]
        return [
            f"embed.weights: no weights of encoder {encoder}; set embed: {{weights: "
            f"[{encoder}=PATH]}}, or choose routes that need none: evaluate_status: {{routes: "
            "[floor, statistics_abmil]}"
        ]


class RestainOptions(Options):
    """Virtual HER2 of H&E tiles, by the configured generator, of cases that it has not seen."""

    section: ClassVar[str] = "restain"

    codec: Literal["jpeg", "png"] = "jpeg"
    """Image format of the generated tiles; png is lossless."""
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    """JPEG quality."""
    batch_size: Count = 4
    """Tiles per forward pass."""
    device: Device = "auto"
    """Device of the generator; auto: a GPU if there is one."""
    torch_threads: Threads = 2
    """CPU threads of PyTorch."""
