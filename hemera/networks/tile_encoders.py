"""Encoders of tiles for the status of a slide: pretrained networks of timm, from a file."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hemera.errors import TrainingError
from hemera.networks import encoders, storage

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
BIOPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of the weights in a folder as published on the Hugging Face Hub."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a published encoder is built and used.

    Attributes:
        architecture: of timm, with its `arguments`.
        normalisation: mean and standard deviation of RGB, 0 to 1.
        resize_px: side to which a view is resized, of which the inner `input_px` are used.
        tokens: also the mean of the patch tokens, after the first so many registers; None: the
            network's own pooling.
        tcga: whether it was pretrained on TCGA.
    """

    architecture: str
    arguments: Mapping[str, Any]
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    input_px: int = 224
    resize_px: int = 224
    tokens: int | None = None
    tcga: str = "unknown"


_SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}

RECIPES: Mapping[str, Recipe] = {
    "uni": Recipe("vit_large_patch16_224", {"init_values": 1e-5}, tcga="no"),
    "uni2_h": Recipe(
        "vit_giant_patch14_224",
        {
            "img_size": 224,
            "patch_size": 14,
            "depth": 24,
            "num_heads": 24,
            "embed_dim": 1536,
            "mlp_ratio": 5.33334,
            "init_values": 1e-5,
            "no_embed_class": True,
            "reg_tokens": 8,
            **_SWIGLU,
        },
        tcga="no",
    ),
    "virchow2": Recipe(
        "vit_huge_patch14_224",
        {
            "img_size": 224,
            "init_values": 1e-5,
            "mlp_ratio": 5.3375,
            "reg_tokens": 4,
            "global_pool": "",
            **_SWIGLU,
        },
        tokens=4,
        tcga="no",
    ),
    "h_optimus_0": Recipe(
        "vit_giant_patch14_reg4_dinov2", {"img_size": 224, "init_values": 1e-5}, BIOPTIMUS
    ),
    "h_optimus_1": Recipe(
        "vit_giant_patch14_reg4_dinov2", {"img_size": 224, "init_values": 1e-5}, BIOPTIMUS
    ),
    "gigapath": Recipe(
        "vit_giant_patch14_dinov2",
        {
            "img_size": 224,
            "patch_size": 16,
            "embed_dim": 1536,
            "depth": 40,
            "num_heads": 24,
            "mlp_ratio": 5.33334,
            "init_values": 1e-5,
        },
        resize_px=256,
        tcga="no",
    ),
}
"""As the cards of the models state them; their weights are gated, or have terms of their own."""


def find_weights(path: Path) -> Path:
    """Return the file of weights that a path names: itself, or the one in a folder."""
    if not path.is_dir():
        return path
    found = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
    if not found:
        raise TrainingError(
            f"{path}: none of {', '.join(WEIGHT_FILES)} in it; give the folder of a published "
            "model, or the file"
        )
    return found[0]


def find_recipe(name: str, weights: Path) -> Recipe:
    """Return the recipe of an encoder: a known one, or that of config.json beside its weights."""
    if name in RECIPES:
        return RECIPES[name]
    config = storage.read_encoder_config(weights)
    if config is None or "architecture" not in config:
        raise TrainingError(
            f"encoder {name}: neither one of {', '.join(RECIPES)}, nor an architecture in "
            f"{weights.parent / 'config.json'}; give the config.json of timm beside the weights"
        )
    described = encoders.describe_timm(str(config["architecture"]), config)
    size = (config.get("pretrained_cfg") or {}).get("input_size") or (3, 224, 224)
    return Recipe(
        str(config["architecture"]),
        described["arguments"],
        (tuple(described["mean"]), tuple(described["std"])),
        int(size[-1]),
        int(size[-1]),
    )


class TileEncoder(nn.Module):
    """An untrained encoder by its recipe: views (B, 3, H, W), 0 to 1, to features (B, `width`)."""

    mean: Tensor
    std: Tensor

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.backbone = encoders.timm_network(recipe.architecture, recipe.arguments)
        for name, values in zip(("mean", "std"), recipe.normalisation, strict=True):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    @property
    def resize_px(self) -> int:
        """Side to which a view is resized."""
        return self.recipe.resize_px

    @property
    def width(self) -> int:
        """Features of a view."""
        return int(self.backbone.num_features) * (1 if self.recipe.tokens is None else 2)

    def forward(self, views: Tensor) -> Tensor:
        """Return the features of views."""
        side, inner = self.recipe.resize_px, self.recipe.input_px
        if views.shape[-2:] != (side, side):
            views = functional.interpolate(views, (side, side), mode="bicubic", antialias=True)
        start = (side - inner) // 2
        views = views[..., start : start + inner, start : start + inner].clamp(0, 1)
        found: Tensor = self.backbone((views - self.mean) / self.std)
        if self.recipe.tokens is None:
            return found
        patches = found[:, 1 + self.recipe.tokens :]
        return torch.cat([found[:, 0], patches.mean(1)], dim=-1)


class PositiveFraction(nn.Module):
    """SegmentationNet as an encoder: views (B, 3, H, W), 0 to 1, to the positive fraction (B, 1).

    A pixel is positive from a probability of 0.5 on. Views are not resized.
    """

    width = 1
    resize_px = None

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.eval().requires_grad_(False)

    def forward(self, views: Tensor) -> Tensor:
        """Return the fraction of positive pixels of each view."""
        logits: Tensor = self.net(views)
        return (logits > 0).float().mean((2, 3))


def load_tile_encoder(name: str, path: Path) -> tuple[TileEncoder, str]:
    """Return an encoder with its weights in evaluation mode, and the SHA-256 of the weights.

    Weights must fit exactly, but for a classifier. TrainingError where they are missing, damaged or
    of another network.
    """
    weights = find_weights(path)
    state = storage.read_weights(weights, missing="correct embed.weights", remedy="fetch it again")
    encoder = TileEncoder(find_recipe(name, weights))
    storage.load_published(encoder.backbone, state, f"{weights}, encoder {name}")
    return encoder.eval().requires_grad_(False), storage.file_digest(weights)
