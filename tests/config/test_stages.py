"""Options of one stage that exclude each other."""

import pytest

from hemera.config import STAGES
from hemera.errors import ConfigError

GENERATION, SEGMENTATION = "train_generation", "train_segmentation"


@pytest.mark.parametrize(
    ("stage", "values", "message"),
    [
        ("register", {"tile_ok": (0.3, 0.6)}, "register.tile_ok: 0.3 is less strict"),
        ("register", {"tile_ok": (0.3,)}, "register.tile_ok: .* 2 values, and has 1"),
        ("register", {"folding_fraction": (0.5, 0.1)}, "register.folding_fraction: 0.5 is less"),
        (GENERATION, {"variance_weight": 25, "batch_size": 1}, "batch_size: 1 leaves one tile"),
        (GENERATION, {"variance_weight": 25, "batch_size": 4, "gpus": 4}, "4 leaves one tile"),
        (GENERATION, {"batch_size": 4, "gpus": 3, "accumulate": 2}, "4 .* give a multiple of 6"),
        (GENERATION, {"cuda_graph": True, "batch_size": 4, "gpus": 4}, "and gpus: 4, .* gpus: 1"),
        (GENERATION, {"cuda_graph": True, "precision": "fp16"}, "and precision: fp16, .* another"),
        (
            GENERATION,
            {"cuda_graph": True, "network": "resnet_6blocks", "norm": "instance", "nce_weight": 1},
            "contrastive losses, which draw their places",
        ),
        (
            SEGMENTATION,
            {"decoder": "deeplabv3plus", "batch_size": 4, "gpus": 2, "accumulate": 2},
            "deeplabv3plus",
        ),
        (SEGMENTATION, {"generation_branch": "none", "generation_skips": True}, "generation_skips"),
        (SEGMENTATION, {"base_width": 32, "encoder_weights": "a.pth"}, "base_width 64, not"),
    ],
)
def test_impossible_options_are_refused_when_parsed(
    stage: str, values: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        STAGES[stage](**values)
