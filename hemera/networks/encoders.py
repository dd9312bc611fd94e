"""Encoders of the library timm: ResNet34, and any other network with pretrained weights."""

import difflib
import importlib
import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from hemera.errors import TrainingError

STEM_WIDTH = 64
"""Channels of ResNet34's first map, for any width of its stages."""


def resnet34(base_width: int = 64, channels: int = 3) -> nn.Module:
    """Return an untrained ResNet34 without its classifier.

    It maps (B, channels, H, W) to a list of five maps at 1/2, 1/4, 1/8, 1/16 and 1/32 of the side,
    with `resnet34_widths` channels. At base width 64 it is torchvision's, names of the weights
    included, and its weights are drawn as torchvision draws them.
    """
    # timm takes seconds to import, and most commands do not need it.
    timm: Any = importlib.import_module("timm")
    encoder: nn.Module = timm.create_model(
        "resnet34",
        pretrained=False,
        features_only=True,
        num_classes=0,
        zero_init_last=False,
        channels=resnet34_widths(base_width)[1:],
        in_chans=channels,
    )
    return encoder


def extend_input(weight: Tensor, channels: int) -> Tensor:
    """Return the weight of a first convolution on RGB, (N, 3, K, K), for `channels` channels.

    As timm does: repeated for further images, and scaled so that the sum of N stays.
    """
    models: Any = importlib.import_module("timm.models")
    extended: Tensor = models.adapt_input_conv(channels, weight)
    return extended


def resnet34_widths(base_width: int) -> tuple[int, ...]:
    """Return the channels of the five maps of `resnet34`, finest first."""
    return (STEM_WIDTH, *(base_width * factor for factor in (1, 2, 4, 8)))


def describe_timm(
    name: str, config: Mapping[str, Any] | None = None, *, frozen: bool = False
) -> dict[str, Any]:
    """Return the arguments of `TimmEncoder` but for its width, plain values.

    Args:
        name: of a network of timm.
        config: content of the config.json beside its weights, as published on the Hugging Face
            Hub: `architecture`, `model_args`, and mean and std of the input in `pretrained_cfg`;
            None or missing values: timm's of this name.
        frozen: whether its weights are not trained.

    Raises:
        TrainingError: timm has no network of this name, or it does not take these arguments.
    """
    timm: Any = importlib.import_module("timm")
    config = config or {}
    if config.get("architecture", name) != name:
        raise TrainingError(
            f"encoder: timm:{name}, but config.json beside its weights is of "
            f"{config['architecture']}; set encoder: timm:{config['architecture']}"
        )
    if name not in (known := timm.list_models()):
        near = difflib.get_close_matches(name, known, 3)
        raise TrainingError(
            f"encoder: timm has no network {name!r}; "
            f"{'did you mean ' + ' or '.join(near) if near else 'choose one of timm.list_models()'}"
        )
    arguments = dict(config.get("model_args") or {})
    with torch.device("meta"):
        preset = timm_network(name, arguments).pretrained_cfg
    own = {**preset, **(config.get("pretrained_cfg") or {})}
    normalisation = {key: [float(each) for each in own[key]] for key in ("mean", "std")}
    return {"name": name, "arguments": arguments, **normalisation, "frozen": frozen}


def timm_network(name: str, arguments: Mapping[str, Any]) -> Any:
    """Return an untrained network of timm without its classifier; of any size if it is a ViT."""
    timm: Any = importlib.import_module("timm")
    given = {**arguments, "num_classes": 0}
    if timm.models.is_model_in_modules(name, ["vision_transformer", "eva"]):
        given["dynamic_img_size"] = True
    # JSON has the name of a class.
    if isinstance(layer := given.get("mlp_layer"), str):
        given["mlp_layer"] = getattr(timm.layers, layer, None)
    try:
        return timm.create_model(name, pretrained=False, **given)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise TrainingError(
            f"encoder: timm:{name} cannot be built with {dict(arguments)} ({error}); correct "
            "model_args in config.json beside its weights"
        ) from None


class TimmEncoder(nn.Module):
    """A network of timm as an encoder of five maps like those of `resnet34`.

    Four maps of the network, evenly spaced over its depth, are reduced to the channels of
    ResNet34's by 1x1 convolutions and interpolated to 1/4, 1/8, 1/16 and 1/32 of the side; all maps
    of a vision transformer have the size of its patches. The map at 1/2 is a convolution of the
    image. A transformer takes the image at the nearest size that is a multiple of its patches, so
    one with patches of 14 px takes 518 px of 512.
    """

    def __init__(
        self,
        name: str,
        arguments: Mapping[str, Any],
        mean: list[float],
        std: list[float],
        frozen: bool,
        base_width: int,
    ) -> None:
        """Build it untrained; see `describe_timm`."""
        super().__init__()
        self.mean, self.std, self.frozen = mean, std, frozen
        self.backbone = timm_network(name, arguments)
        self.backbone.requires_grad_(not frozen)
        known = self.backbone.feature_info
        count = len(known)
        self.indices = [math.ceil(count * quarter / 4) - 1 for quarter in (1, 2, 3, 4)]
        self.patch = max(known[index]["reduction"] for index in self.indices)
        finest, *widths = resnet34_widths(base_width)
        self.stem = nn.Sequential(
            nn.Conv2d(3, finest, 3, 2, 1, bias=False), nn.BatchNorm2d(finest), nn.ReLU(True)
        )
        self.reduce = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(known[index]["num_chs"], width, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(True),
            )
            for index, width in zip(self.indices, widths, strict=True)
        )
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Keep a frozen network in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return the maps of an image (B, 3, H, W), normalised by `mean` and `std`."""
        size = image.shape[-2:]
        fitted = [max(1, round(side / self.patch)) * self.patch for side in size]
        scaled = image
        if fitted != list(size):
            scaled = functional.interpolate(image, fitted, mode="bilinear", antialias=True)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.backbone.forward_intermediates(
                scaled, indices=self.indices, norm=True, output_fmt="NCHW", intermediates_only=True
            )
        found = [self.stem(image)]
        for level, (volume, reduce) in enumerate(zip(maps, self.reduce, strict=True), 2):
            target = [side >> level for side in size]
            volume = reduce(volume)
            if list(volume.shape[-2:]) != target:
                volume = functional.interpolate(volume, target, mode="bilinear")
            found.append(volume)
        return found


def published_weights(network: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return published weights of a network of timm by its names, without the classifier.

    Position embeddings of another size are interpolated; whatever timm raises where they cannot be
    passes.
    """
    module = importlib.import_module(type(network).__module__)
    renamed = getattr(module, "checkpoint_filter_fn", lambda state, model: state)
    classifier = network.pretrained_cfg.get("classifier") or "head"
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return {
        name: tensor
        for name, tensor in renamed(dict(state), network).items()
        if not name.startswith(tuple(f"{each}." for each in names))
    }
