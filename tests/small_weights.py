"""Files of weights for the perceptual metrics: random, and small on disk."""

import io
from pathlib import Path

import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision.models import alexnet


class Bare(FeatureExtractorInceptionV3):
    """The network with the weights it was made with: its own asks for a file of them."""

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
