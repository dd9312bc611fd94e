from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from hemera.config import GENERATORS
from hemera.errors import TrainingError
from hemera.networks.generation import (
    DEPTHS,
    GenerationNet,
    PatchProjection,
    build_generator,
    draw_places,
    initialise,
)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# Width 32 with batch norm, 64 with batch norm, 32 with instance norm, 64 with instance norm.
COUNTS = {
    "unet_32": (4_168_003, 16_659_075, 4_167_363, 16_657_795),
    "unet_128": (10_461_507, 41_828_995, 10_459_843, 41_825_667),
    "unet_256": (13_608_259, 54_413_955, 13_606_083, 54_409_603),
    "unet_512": (16_755_011, 66_998_915, 16_752_323, 66_993_539),
    "resnet_9blocks": (2_853_187, 11_383_427, 2_850_563, 11_378_179),
    "resnet_6blocks": (1_966_915, 7_841_411, 1_965_059, 7_837_699),
    "attention_unet_32": (None, 17_435_462, None, None),
}


@pytest.mark.parametrize("generator", COUNTS)
def test_parameter_counts_are_those_of_the_reference(generator):
    for norm, width, expected in zip(
        ("batch", "batch", "instance", "instance"), (32, 64) * 2, COUNTS[generator], strict=True
    ):
        if expected is None:
            continue
        with torch.device("meta"):
            assert count(build_generator(generator, width, norm)) == expected


def test_the_state_dict_of_the_default_keeps_its_names():
    """Old checkpoints load."""
    with torch.device("meta"):
        names = list(GenerationNet("unet_32", 4).state_dict())
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert names == [
        "down.0.0.weight",
        *(f"down.{level}.{name}" for level in (1, 2, 3)
          for name in ("0.weight", *(f"1.{part}" for part in norm))),
        "down.4.0.weight",
        "up.0.0.weight", "up.0.0.bias",
        *(f"up.{level}.{name}" for level in (1, 2, 3, 4)
          for name in ("0.weight", *(f"1.{part}" for part in norm))),
    ]  # fmt: skip


@pytest.mark.parametrize("generator", GENERATORS)
def test_every_generator_knows_its_name_its_step_and_keeps_the_shape(generator):
    step = {"unet_512": 512, "unet_256": 256, "unet_128": 128}.get(generator, 32)
    step = 4 if generator.startswith("resnet") else step
    with torch.device("meta"):
        net = build_generator(generator, 4)
        assert (net.generator, net.step) == (generator, step)
        for height, width in ((512, 1024), (max(step, 8), 3 * step)):
            assert net(torch.empty(2, 3, height, width)).shape == (2, 3, height, width)


def test_initialisation_has_the_reference_moments():
    torch.manual_seed(5)
    net = GenerationNet("unet_128", 16)
    initialise(net)
    kernels = torch.cat([m.weight.flatten() for m in net.modules() if hasattr(m, "kernel_size")])
    norms = torch.cat([m.weight for m in net.modules() if isinstance(m, nn.BatchNorm2d)])
    kernels, norms = kernels.detach(), norms.detach()
    assert kernels.std() == pytest.approx(0.02, rel=0.01)
    assert abs(float(kernels.mean())) < 1e-4
    assert norms.std() == pytest.approx(0.02, rel=0.1)
    assert norms.mean() == pytest.approx(1, abs=0.003)
    assert float(net.up[0][0].bias.detach().abs().sum()) == 0


@pytest.mark.parametrize(
    ("generator", "sides", "message"),
    [
        ("resnet_9blocks", (16, 18), "resnet_9blocks: width 18 px is not a multiple of 4; give"),
        ("attention_unet_32", (48, 64), "attention_unet_32: height 48 px is not a multiple of 32"),
        ("unet_128", (256, 192), "unet_128: width 192 px is not a multiple of 128; give"),
    ],
)
def test_sides_that_do_not_fit_are_refused_by_every_kind(generator, sides, message):
    with pytest.raises(TrainingError, match=message):
        build_generator(generator, 4)(torch.zeros(1, 3, *sides))


def normed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Batch norm while training, by its formula."""
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    shape = (1, -1, 1, 1)
    return (x - mean) / (variance + 1e-5).sqrt() * weight.view(shape) + bias.view(shape)


def test_the_unet_unrolled_by_hand():
    """Five levels written out, each from the weights alone.

    A ReLU follows every skip, so that the image is the same whether the skip is activated or raw;
    the outputs of `features` and the inputs of a gate are not.
    """
    torch.manual_seed(7)
    net = GenerationNet("unet_32", 3)
    initialise(net)
    own = {name: value.detach() for name, value in net.named_parameters()}
    image = torch.randn(2, 3, 64, 96)

    def down(level: int, x: torch.Tensor) -> torch.Tensor:
        x = functional.conv2d(x, own[f"down.{level}.0.weight"], None, stride=2, padding=1)
        if level in (1, 2, 3):
            x = normed(x, own[f"down.{level}.1.weight"], own[f"down.{level}.1.bias"])
        return x

    def up(level: int, x: torch.Tensor) -> torch.Tensor:
        x = torch.where(x > 0, x, torch.zeros(()))
        bias = own.get(f"up.{level}.0.bias")
        x = functional.conv_transpose2d(x, own[f"up.{level}.0.weight"], bias, stride=2, padding=1)
        if level == 0:
            return torch.tanh(x)
        return normed(x, own[f"up.{level}.1.weight"], own[f"up.{level}.1.bias"])

    def leaky(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, x, 0.2 * x)

    def unrolled(skip: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        one = down(0, image)
        two = down(1, leaky(one))
        three = down(2, leaky(two))
        four = down(3, leaky(three))
        x = up(4, down(4, leaky(four)))
        x = up(3, torch.cat((skip(four), x), 1))
        x = up(2, torch.cat((skip(three), x), 1))
        x = up(1, torch.cat((skip(two), x), 1))
        return up(0, torch.cat((skip(one), x), 1))

    found = net(image).detach()
    assert found.std() > 0.01
    assert torch.allclose(found, unrolled(leaky), atol=1e-5)
    assert torch.allclose(found, unrolled(lambda x: x), atol=1e-5)


def test_features_are_activated_maps_and_the_volume_at_1_32():
    torch.manual_seed(4)
    net = GenerationNet("unet_128", 4).eval()
    with torch.no_grad():
        image = torch.randn(1, 3, 128, 256)
        maps, volume = net.features(image)
        x = net.down[0](image)
        for level in range(4):
            # A map that is not activated would have values five times as negative.
            x = torch.where(x > 0, x, 0.2 * x)
            assert torch.equal(maps[level], x)
            x = net.down[level + 1](x)
    assert torch.equal(volume[:, :32], torch.where(x > 0, x, 0.2 * x))
    assert volume.shape == (1, 64, 4, 8)


def mirrored(x: torch.Tensor, by: int) -> torch.Tensor:
    """Reflection by taking indices: ... 2 1 | 0 1 2 ... without the edge repeated."""
    for axis in (-2, -1):
        side = x.shape[axis]
        places = [abs(place) for place in range(-by, side + by)]
        places = [place if place < side else 2 * (side - 1) - place for place in places]
        x = x.index_select(axis, torch.tensor(places))
    return x


@pytest.mark.parametrize(("generator", "blocks"), [("resnet_6blocks", 6), ("resnet_9blocks", 9)])
def test_the_residual_generator_unrolled_by_hand(generator, blocks):
    torch.manual_seed(8)
    net = build_generator(generator, 3)
    initialise(net)
    weights = iter(list(net.parameters()))
    image = torch.randn(2, 3, 12, 20)

    def norm_relu(x: torch.Tensor) -> torch.Tensor:
        return normed(x, next(weights), next(weights)).clamp(min=0)

    with torch.no_grad():
        x = norm_relu(functional.conv2d(mirrored(image, 3), next(weights)))
        x = norm_relu(functional.conv2d(x, next(weights), stride=2, padding=1))
        x = norm_relu(functional.conv2d(x, next(weights), stride=2, padding=1))
        assert x.shape == (2, 12, 3, 5)
        for _ in range(blocks):
            inside = norm_relu(functional.conv2d(mirrored(x, 1), next(weights)))
            inside = functional.conv2d(mirrored(inside, 1), next(weights))
            x = x + normed(inside, next(weights), next(weights))
        for _ in range(2):
            x = functional.conv_transpose2d(x, next(weights), stride=2, padding=1, output_padding=1)
            x = norm_relu(x)
        x = torch.tanh(functional.conv2d(mirrored(x, 3), next(weights), next(weights)))
        assert next(weights, None) is None
        assert torch.allclose(net(image), x, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_attention_unet_equals_its_recursive_definition(training):
    """Each level goes down for its gate and again for itself, as the public code does."""
    torch.manual_seed(9)
    net = build_generator("attention_unet_32", 3).train(training)
    for gate in net.gates:
        # Strong enough to see what they look at.
        nn.init.normal_(gate.phi.weight, 0, 9)
    image = torch.randn(2, 3, 64, 96)

    def below(level: int, x: torch.Tensor, slope: float) -> torch.Tensor:
        if level == 4:
            inner = net.up[4](net.down[4](functional.leaky_relu(x, 0.2)).clamp(min=0))
            return torch.cat((functional.leaky_relu(x, slope), inner), 1)
        gating = below(level + 1, net.down[level](functional.leaky_relu(x, 0.2)), slope)
        raised = below(level + 1, net.down[level](functional.leaky_relu(x, 0.2)), slope)
        gate = net.gates[level - 1]
        attention = torch.sigmoid(gate.psi((gate.theta(x) + gate.phi(gating)).clamp(min=0)))
        attention = functional.interpolate(attention, size=x.shape[2:], mode="bilinear")
        skip = gate.out(attention.expand_as(x) * x)
        return torch.cat((skip, net.up[level](raised.clamp(min=0))), 1)

    with torch.no_grad():
        # The innermost skip is activated, in place; all others are raw.
        expected = net.up[0](below(1, net.down[0](image), 0.2).clamp(min=0))
        raw = net.up[0](below(1, net.down[0](image), 1.0).clamp(min=0))
        assert torch.allclose(net(image), expected, atol=1e-6)
        assert not torch.allclose(raw, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("generator", "places"),
    [
        # The levels between two of the full width, which the reference builds with it.
        ("unet_512", 4), ("unet_256", 3), ("unet_128", 2), ("unet_32", 0),
        ("resnet_9blocks", 9), ("resnet_6blocks", 6), ("attention_unet_32", 0),
    ],
)  # fmt: skip
def test_dropout_is_where_the_reference_has_it(generator, places):
    net = build_generator(generator, 4, dropout=True)
    found = [m for m in net.modules() if isinstance(m, nn.Dropout)]
    assert [m.p for m in found] == [0.5] * places
    if generator in DEPTHS:
        levels = [level for level, up in enumerate(net.up) if isinstance(up[-1], nn.Dropout)]
        assert levels == list(range(4, 4 + places))
    assert not any(isinstance(m, nn.Dropout) for m in build_generator(generator, 4).modules())


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["unet_128", "resnet_6blocks", "attention_unet_32"])
def test_it_compiles_as_one_graph_and_likes_channels_last(generator):
    torch.manual_seed(12)
    net = build_generator(generator, 4)
    initialise(net)
    net.eval()
    image = torch.randn(2, 3, 128, 256)
    with torch.no_grad():
        expected = net(image)
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        assert torch.equal(compiled(image), expected)
        last = net.to(memory_format=torch.channels_last)
        found = last(image.contiguous(memory_format=torch.channels_last))
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("network", ["resnet_6blocks", "resnet_9blocks"])
def test_the_encoder_of_a_residual_generator(network):
    """The padded image, both halving convolutions, the first and the fifth block, as in CUT."""
    torch.manual_seed(3)
    net = build_generator(network, 4, "instance")
    image = torch.rand(2, 3, 32, 48)
    maps = net.encode(image)
    shapes = [(3, 38, 54), (8, 16, 24), (16, 8, 12), (16, 8, 12), (16, 8, 12)]
    assert [tuple(each.shape[1:]) for each in maps] == shapes
    assert net.encoder_widths == tuple(shape[0] for shape in shapes)
    assert torch.equal(maps[0], functional.pad(image, (3, 3, 3, 3), mode="reflect"))
    convolutions = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    x = functional.relu(functional.instance_norm(convolutions[0](maps[0])))
    assert torch.allclose(maps[1], convolutions[1](x), atol=1e-5)
    x = functional.relu(functional.instance_norm(maps[1]))
    assert torch.allclose(maps[2], convolutions[2](x), atol=1e-5)


def test_projected_features_are_those_of_the_drawn_places():
    torch.manual_seed(4)
    projection = PatchProjection((2, 3), 5)
    maps = [torch.rand(2, 2, 4, 6), torch.rand(2, 3, 2, 2)]
    places = draw_places(maps, 7)
    assert [len(set(each.tolist())) for each in places] == [7, 4]
    found = projection(maps, places)
    assert [tuple(each.shape) for each in found] == [(2, 7, 5), (2, 4, 5)]
    row, column = divmod(int(places[0][2]), 6)
    expected = projection.heads[0](maps[0][1, :, row, column])
    assert torch.allclose(found[0][1, 2], expected / expected.norm(), atol=1e-6)
