import pytest
import torch
from torch import nn
from torch.nn import functional

from hemera.errors import TrainingError
from hemera.models.generation import GenerationNet, initialise


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("generator", "width", "norm", "expected"),
    [
        ("unet_32", 32, "batch", 4_168_003),
        ("unet_32", 64, "batch", 16_659_075),
        ("unet_32", 32, "instance", 4_167_363),
        ("unet_128", 32, "batch", 10_461_507),
        ("unet_128", 64, "instance", 41_825_667),
        ("unet_256", 32, "batch", 13_608_259),
        ("unet_256", 64, "batch", 54_413_955),
        ("unet_512", 32, "batch", 16_755_011),
        ("unet_512", 64, "batch", 66_998_915),
        ("unet_512", 32, "instance", 16_752_323),
    ],
)
def test_parameter_counts_are_those_of_the_reference(generator, width, norm, expected):
    with torch.device("meta"):
        assert count(GenerationNet(generator, width, norm)) == expected


def test_shapes_of_every_level_at_512_px():
    with torch.device("meta"):
        net = GenerationNet("unet_512", 32)
        inputs, outputs = {}, {}
        for level, block in enumerate(net.down):
            block.register_forward_hook(
                lambda _, __, out, level=level: outputs.update({level: tuple(out.shape[1:])})
            )
        for level, block in enumerate(net.up):
            block.register_forward_hook(
                lambda _, given, out, level=level: inputs.update(
                    {level: (tuple(given[0].shape[1:]), tuple(out.shape[1:]))}
                )
            )
        assert net(torch.empty(2, 3, 512, 1024)).shape == (2, 3, 512, 1024)
        net(torch.empty(1, 3, 512, 512))
        maps, volume = net.features(torch.empty(1, 3, 512, 512))
    assert list(outputs.values()) == [
        (32, 256, 256), (64, 128, 128), (128, 64, 64), (256, 32, 32), (256, 16, 16),
        (256, 8, 8), (256, 4, 4), (256, 2, 2), (256, 1, 1),
    ]  # fmt: skip
    assert inputs[4] == ((512, 16, 16), (256, 32, 32))
    assert inputs[3] == ((512, 32, 32), (128, 64, 64))
    assert inputs[2] == ((256, 64, 64), (64, 128, 128))
    assert inputs[1] == ((128, 128, 128), (32, 256, 256))
    assert inputs[0] == ((64, 256, 256), (3, 512, 512))
    assert volume.shape == (1, 512, 16, 16)
    assert net.feature_width == 512
    assert [tuple(part.shape[1:]) for part in maps] == [
        (32, 256, 256), (64, 128, 128), (128, 64, 64), (256, 32, 32),
    ]  # fmt: skip


def reference(net: GenerationNet, image: torch.Tensor, level: int = 0) -> torch.Tensor:
    """The U-Net as a recursion with in-place activations, as the public code has it."""
    x = net.down[level](image) if level == 0 else None
    if level == 0:
        return net.up[0](functional.relu(reference(net, x, 1)))
    skip = image
    functional.leaky_relu(skip, 0.2, inplace=True)
    x = net.down[level](skip)
    if level < net.depth - 1:
        x = reference(net, x, level + 1)
    x = net.up[level](functional.relu(x, inplace=True))
    return torch.cat((skip, x), 1)


@pytest.mark.parametrize("training", [True, False])
def test_output_equals_the_recursive_reference_with_in_place_activations(training):
    torch.manual_seed(3)
    net = GenerationNet("unet_32", 4).train(training)
    initialise(net)
    image = torch.randn(2, 3, 64, 96)
    expected = reference(net, image)
    assert torch.equal(net(image), expected)


def test_the_skips_carry_activated_maps():
    torch.manual_seed(4)
    net = GenerationNet("unet_128", 4).eval()
    image = torch.randn(1, 3, 128, 256)
    with torch.no_grad():
        maps, volume = net.features(image)
        first = net.down[0](image)
        second = net.down[1](functional.leaky_relu(first, 0.2))
    # A map that is not activated would hold values five times as negative.
    assert torch.equal(maps[0], torch.where(first > 0, first, 0.2 * first))
    assert torch.equal(maps[1], torch.where(second > 0, second, 0.2 * second))
    assert volume.shape == (1, 64, 4, 8)
    assert (volume[:, :32] < 0).any()


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


def test_a_side_that_does_not_halve_names_side_bound_and_remedy():
    net = GenerationNet("unet_128", 4)
    with pytest.raises(
        TrainingError, match=r"unet_128: width 192 px is not a multiple of 128; cut"
    ):
        net(torch.zeros(1, 3, 256, 192))
    with pytest.raises(TrainingError, match=r"unet_512: height 256 px is not a multiple of 512"):
        GenerationNet("unet_512", 4)(torch.zeros(1, 3, 256, 512))


def test_a_shallow_generator_has_no_feature_volume():
    with pytest.raises(TrainingError, match=r"unet_32: its 5 levels end at 1/32.*unet_128"):
        GenerationNet("unet_32", 4).features(torch.zeros(1, 3, 64, 96))


def test_unknown_names_are_refused():
    with pytest.raises(TrainingError, match="choose from unet_512"):
        GenerationNet("unet_64")
    with pytest.raises(TrainingError, match="choose from batch, instance"):
        GenerationNet(norm="layer")


def test_it_overfits_one_pair():
    torch.manual_seed(6)
    net = GenerationNet("unet_32", 8)
    initialise(net)
    image = torch.nn.functional.interpolate(torch.rand(2, 3, 4, 8), (32, 64)) * 2 - 1
    target = image.flip(1) * 0.8
    optimiser = torch.optim.Adam(net.parameters(), 5e-3, (0.5, 0.999))
    losses = []
    for _ in range(150):
        loss = (net(image) - target).abs().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]
