import pytest
import torch
from torch.nn import functional

from hemera.networks.discriminator import PatchGAN
from hemera.networks.generation import initialise


@pytest.mark.parametrize(
    ("channels", "width", "layers", "norm", "expected"),
    [
        (6, 32, 3, "batch", 696_225),
        (6, 64, 3, "batch", 2_768_705),
        (3, 64, 3, "instance", 2_764_737),
        (6, 32, 4, "batch", 1_745_313),
    ],
)
def test_parameter_counts_are_those_of_the_reference(channels, width, layers, norm, expected):
    with torch.device("meta"):
        net = PatchGAN(channels, width, layers, norm)
    assert sum(parameter.numel() for parameter in net.parameters()) == expected


@pytest.mark.parametrize(
    ("layers", "given", "patches"),
    [
        (3, (512, 1024), (62, 126)),
        (4, (512, 256), (30, 14)),
    ],
)
def test_output_shapes(layers, given, patches):
    with torch.device("meta"):
        logits = PatchGAN(6, 8, layers)(torch.empty(2, 6, *given))
    assert logits.shape == (2, 1, *patches)


def test_the_layers_unrolled_by_hand():
    """conv4 s2 + LReLU, conv4 s2 BN LReLU, conv4 s1 BN LReLU, conv4 s1 to one channel."""
    torch.manual_seed(1)
    net = PatchGAN(6, 4, 2).eval()
    initialise(net)
    first, second, third, last = (m for m in net.modules() if isinstance(m, torch.nn.Conv2d))
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert [m.out_channels for m in (first, second, third, last)] == [4, 8, 16, 1]
    pair = torch.randn(2, 6, 32, 48)
    x = functional.conv2d(pair, first.weight, first.bias, 2, 1)
    for layer, norm, stride in ((second, norms[0], 2), (third, norms[1], 1)):
        assert layer.bias is None
        x = functional.conv2d(functional.leaky_relu(x, 0.2), layer.weight, None, stride, 1)
        # Fresh running statistics: mean 0, variance 1.
        scale = norm.weight / (1 + 1e-5) ** 0.5
        x = x * scale.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)
    x = functional.conv2d(functional.leaky_relu(x, 0.2), last.weight, last.bias, 1, 1)
    assert torch.allclose(net(pair), x, atol=1e-6)


def test_spectral_norms_are_one_and_weights_are_drawn_all_the_same():
    torch.manual_seed(2)
    net = PatchGAN(3, 8, 3, "instance", True)
    initialise(net)
    originals = [
        layer.parametrizations.weight.original
        for layer in net.modules()
        if isinstance(layer, torch.nn.Conv2d)
    ]
    assert len(originals) == 5
    assert originals[-2].std().item() == pytest.approx(0.02, rel=0.02)
    for _ in range(60):
        net(torch.rand(1, 3, 32, 32))
    for layer in net.eval().modules():
        if isinstance(layer, torch.nn.Conv2d):
            norm = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
            assert norm.item() == pytest.approx(1, abs=0.02)


def test_features_are_activated_and_end_with_the_logits():
    torch.manual_seed(2)
    net = PatchGAN(3, 4, 2).eval()
    image = torch.rand(2, 3, 32, 48)
    maps = net.features(image)
    assert [tuple(each.shape[1:]) for each in maps] == [
        (4, 16, 24), (8, 8, 12), (16, 7, 11), (1, 6, 10),
    ]  # fmt: skip
    first = functional.conv2d(image, net.model[0].weight, net.model[0].bias, 2, 1)
    assert torch.allclose(maps[0], torch.where(first > 0, first, 0.2 * first), atol=1e-6)
    assert torch.equal(maps[-1], net(image))
