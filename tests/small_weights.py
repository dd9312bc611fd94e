"""Files of weights of published networks: random, and small on disk."""

import io
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision.models import alexnet


class Bare(FeatureExtractorInceptionV3):
    """The network with the weights it was made with: its constructor requires a file of them."""

    def load_state_dict(self, state):
        pass


def bare_inception() -> FeatureExtractorInceptionV3:
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    return Bare("inception", ["2048"], nothing)


def write_inception(path: Path) -> Path:
    """Write weights of InceptionV3 whose 24 million numbers are views of 65,536."""
    net = bare_inception()
    drawn = torch.randn(1 << 16, generator=torch.Generator().manual_seed(1))
    state = {}
    for name, value in net.state_dict().items():
        if name.endswith(("conv.weight", "fc.weight")):
            state[name] = torch.as_strided(drawn, value.shape, (1, 3, 7, 11)[: value.ndim])
        elif name.endswith("running_var"):
            # As wide as what the convolution before it makes of random weights.
            layer = net.get_submodule(name.rsplit(".", 2)[0])
            state[name] = torch.full((1,), float(layer.conv.weight[0].numel())).expand(value.shape)
        else:
            state[name] = value if value.ndim == 0 else value[:1].clone().expand(value.shape)
    torch.save(state, path)
    return path


def write_alexnet(path: Path) -> Path:
    """Write the convolutions of torchvision's AlexNet, in half precision."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        state = alexnet(weights=None).state_dict()
    torch.save({name: v.half() for name, v in state.items() if name.startswith("features")}, path)
    return path


SMALL_VIT: dict[str, Any] = {
    "architecture": "vit_tiny_patch16_224",
    "model_args": {
        "img_size": 56, "patch_size": 14, "embed_dim": 24, "depth": 6, "num_heads": 2,
        "reg_tokens": 2, "init_values": 1e-5,
    },
    "pretrained_cfg": {"mean": [0.7, 0.57, 0.7], "std": [0.21, 0.23, 0.18]},
}  # fmt: skip
"""The config.json of a small vision transformer, in the form of the Hugging Face Hub."""


def small_vit(**changes: int) -> torch.nn.Module:
    """Return the vision transformer, untrained."""
    arguments = {**SMALL_VIT["model_args"], "num_classes": 0, **changes}
    return timm.create_model(SMALL_VIT["architecture"], **arguments)


def write_small_vit(folder: Path) -> Path:
    """Write the weights of a small vision transformer, with its config.json beside them."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        state = small_vit().state_dict()
    path = folder / "model.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(state, path)
    (folder / "config.json").write_text(json.dumps(SMALL_VIT))
    return path
