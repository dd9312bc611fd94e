from itertools import pairwise

import pytest
import segmentation_models_pytorch as smp
import torch
import torchvision

from hemera.config import GENERATORS
from hemera.errors import TrainingError
from hemera.networks.encoders import extend_input, resnet34
from hemera.networks.generation import GenerationNet, build_generator
from hemera.networks.losses import segmentation_loss
from hemera.networks.segmentation import SegmentationNet

DECODERS = ("unet", "unetplusplus", "deeplabv3plus")


def counts(net: torch.nn.Module) -> tuple[int, int]:
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in net.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


@pytest.mark.parametrize(
    ("generator", "skips", "decoder", "trainable", "total"),
    [
        ("unet_512", False, 10_246_849, 31_531_521, 48_286_532),
        ("unet_256", False, 10_246_849, 31_531_521, 45_139_780),
        ("unet_512", True, 11_039_425, 32_324_097, 49_079_108),
    ],
)
def test_parameter_counts(generator, skips, decoder, trainable, total):
    with torch.device("meta"):
        net = SegmentationNet(GenerationNet(generator, 32), skips)
    assert sum(parameter.numel() for parameter in net.decoder.parameters()) == decoder
    assert counts(net) == (trainable, total)


def test_the_encoder_is_torchvisions_resnet34():
    """Drawn alike, too: the same generator gives the same convolutions."""
    torch.manual_seed(1)
    theirs = torchvision.models.resnet34(weights=None).eval()
    ours = resnet34().eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert missing == []
    assert unexpected == ["fc.weight", "fc.bias"]
    assert counts(ours)[1] == 21_284_672
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        x = theirs.relu(theirs.bn1(theirs.conv1(image)))
        expected = [x]
        x = theirs.maxpool(x)
        for layer in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
            x = layer(x)
            expected.append(x)
        found = ours(image)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    drawn = resnet34().layer4[0].conv1.weight.detach()
    assert float(drawn.std()) == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)


@pytest.fixture
def small() -> SegmentationNet:
    torch.manual_seed(2)
    return SegmentationNet(GenerationNet("unet_128", 4), True, 8)


def test_each_branch_is_normalised_on_its_own(small):
    seen = {}
    small.encoder.conv1.register_forward_hook(lambda _, given, __: seen.update(encoder=given[0]))
    small.generation.net.down[0].register_forward_hook(
        lambda _, given, __: seen.update(generation=given[0])
    )
    image = torch.rand(1, 3, 128, 256)
    small(image)
    assert torch.allclose(seen["generation"], (image - 0.5) / 0.5)
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    assert torch.allclose(seen["encoder"], (image - mean) / std, atol=1e-6)


def test_the_branch_reaches_the_output_and_the_ablation_has_none(small):
    image = torch.rand(1, 3, 128, 256)
    small.eval()
    with torch.no_grad():
        before = small(image)
        small.generation.net.down[4][0].weight.mul_(3)
        assert not torch.equal(small(image), before)
    ablation = SegmentationNet(None, False, 8)
    assert ablation.decoder.bottleneck[0].in_channels == 64
    assert ablation(torch.rand(2, 3, 32, 96)).shape == (2, 1, 32, 96)


def test_wrong_sides_are_refused(small):
    with pytest.raises(TrainingError, match="height 100 px is not a multiple of 32"):
        small(torch.rand(1, 3, 100, 128))
    with pytest.raises(TrainingError, match="unet_128: height 64 px is not a multiple of 128"):
        small(torch.rand(1, 3, 64, 128))


@pytest.mark.parametrize(
    ("generator", "branch"),
    [
        ("unet_32", "skip16"),
        ("resnet_9blocks", "skip16"),
        ("unet_512", "attention_unet_32_bottleneck"),
    ],
)
def test_what_does_not_fit_is_refused(generator, branch):
    net = build_generator(generator, 4)
    with pytest.raises(TrainingError, match=f"branch {branch}: .* the generator is {generator};"):
        SegmentationNet(net, base_width=8, branch=branch)


@pytest.mark.parametrize(
    ("branch", "generator", "width"),
    [
        ("skip16", "unet_512", 32),
        ("attention_unet_32_bottleneck", "attention_unet_32", 64),
        *(("virtual_rgb_encoder", generator, 32) for generator in GENERATORS),
    ],
)
def test_every_branch_gives_512_channels_at_1_32(branch, generator, width):
    with torch.device("meta"):
        net = SegmentationNet(build_generator(generator, width), branch=branch)
        seen = {}
        net.decoder.register_forward_pre_hook(lambda _, given: seen.update(fused=given[0]))
        assert net(torch.empty(2, 3, 512, 1024)).shape == (2, 1, 512, 1024)
    assert seen["fused"].shape == (2, 512 + 512, 16, 32)
    assert net.step == {"unet_512": 512, "unet_256": 256, "unet_128": 128}.get(generator, 32)


def test_the_features_of_the_other_branches():
    torch.manual_seed(3)
    image = torch.rand(2, 3, 64, 96)
    attention = build_generator("attention_unet_32", 4)
    net = SegmentationNet(attention, True, 8, "attention_unet_32_bottleneck").eval()
    seen = {}
    net.decoder.register_forward_pre_hook(
        lambda _, given: seen.update(fused=given[0], skips=given[1])
    )
    with torch.no_grad():
        net(image)
        # The innermost map, written out: five halvings, activated between.
        x, maps = image * 2 - 1, []
        for level, block in enumerate(attention.down):
            x = block(x if level == 0 else torch.where(x > 0, x, 0.2 * x))
            maps.append(x)
    assert torch.allclose(seen["fused"][:, 64:], maps[4], atol=1e-6)
    for skip, own, other in zip(seen["skips"], (64, 8, 16, 32), maps[:4], strict=True):
        assert torch.allclose(skip[:, own:], other, atol=1e-6)

    residual = build_generator("resnet_6blocks", 4)
    net = SegmentationNet(residual, False, 8, "virtual_rgb_encoder").eval()
    net.decoder.register_forward_pre_hook(lambda _, given: seen.update(fused=given[0]))
    with torch.no_grad():
        net(image)
        virtual = residual(image * 2 - 1)
        assert torch.equal(seen["fused"][:, 64:], net.virtual_encoder(virtual))
    assert seen["fused"].shape == (2, 64 + 64, 2, 3)


@pytest.mark.parametrize(
    "generator", ["unet_128", "unet_32", "attention_unet_32", "resnet_6blocks"]
)
def test_decoder_maps_are_those_of_the_generated_image(generator):
    """What the layers of the generator return while it draws; 1/8 is below a residual one."""
    torch.manual_seed(8)
    generation = build_generator(generator, 4)
    net = SegmentationNet(generation, False, 8, "decoder_maps").eval()
    layers = (
        list(generation.up[1:4])
        if "unet" in generator
        else [generation.model[18], generation.model[15]]
    )
    drawn, seen = {}, {}
    image = torch.rand(1, 3, 128, 256)
    with torch.no_grad():
        for level, layer in enumerate(layers):
            layer.register_forward_hook(
                lambda _, __, found, level=level: drawn.update({level: found.clone()})
            )
        generation(image * 2 - 1)
        expected = dict(drawn)
        net.decoder.register_forward_pre_hook(lambda _, given: seen.update(skips=given[1]))
        net(image)
    widths = (4, 8, 16) if "unet" in generator else (8, 16)
    for level, (skip, own) in enumerate(zip(seen["skips"], (64, 8, 16, 32), strict=True)):
        assert skip.shape[2:] == (64 >> level, 128 >> level)
        assert skip.shape[1] == own + (widths[level] if level < len(widths) else 0)
        if level < len(widths):
            assert torch.equal(skip[:, own:], expected[level])


def test_the_virtual_image_is_normalised_as_the_other_half_of_the_input():
    torch.manual_seed(9)
    generation = build_generator("resnet_6blocks", 4)
    net = SegmentationNet(generation, False, 8, "virtual_rgb_input").eval()
    seen = {}
    net.encoder.conv1.register_forward_hook(lambda _, given, __: seen.update(encoder=given[0]))
    image = torch.rand(1, 3, 32, 64)
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    with torch.no_grad():
        net(image)
        virtual = generation(image * 2 - 1) / 2 + 0.5
        both = [(half - mean) / std for half in (image, virtual)]
        assert torch.allclose(seen["encoder"], torch.cat(both, 1), atol=1e-5)
        # A HER2 image that is given takes the place of the virtual one.
        her2 = torch.rand(1, 3, 32, 64)
        net.fuse(image, net.branch(image, her2))
    assert torch.allclose(seen["encoder"][:, 3:], (her2 - mean) / std, atol=1e-5)


@pytest.mark.parametrize("channels", [3, 6])
def test_an_extended_convolution_gives_the_same_for_the_image_twice(channels):
    convolution = torch.nn.Conv2d(3, 5, 7, bias=False)
    wider = torch.nn.Conv2d(channels, 5, 7, bias=False)
    wider.weight.data = extend_input(convolution.weight.data, channels)
    image = torch.rand(1, 3, 12, 16)
    again = torch.cat([image] * (channels // 3), 1)
    assert torch.allclose(wider(again), convolution(image), atol=1e-6)


def test_the_counts_of_the_other_fusions():
    """Against the network without a branch: 64 further filters of 3 x 7 x 7, and wider merges."""
    with torch.device("meta"):
        alone = counts(SegmentationNet(None))[0]
        beside = SegmentationNet(GenerationNet("unet_128", 32), branch="virtual_rgb_input")
        decoded = SegmentationNet(GenerationNet("unet_128", 32), branch="decoder_maps")
        residual = SegmentationNet(build_generator("resnet_9blocks"), branch="decoder_maps")
    assert counts(beside)[0] == alone + 64 * 3 * 7 * 7
    # Merges at 1/2, 1/4, 1/8 have 64, 128, 256 channels, and 3 x 3 filters.
    assert counts(decoded)[0] == alone + 9 * (32 * 64 + 64 * 64 + 128 * 128)
    assert counts(residual)[0] == alone + 9 * (64 * 64 + 128 * 64)


def test_the_virtual_encoder_has_its_count():
    """3x3 convolutions 3-64-64-128-256-512 without bias, each with two numbers of its norm."""
    widths = (3, 64, 64, 128, 256, 512)
    own = sum(9 * above * width for above, width in pairwise(widths)) + 2 * sum(widths[1:])
    with torch.device("meta"):
        net = SegmentationNet(build_generator("resnet_9blocks"), branch="virtual_rgb_encoder")
    assert counts(net.virtual_encoder) == (own, own)
    # The rest is the specification's count for skip16; the generator as a whole is frozen.
    assert counts(net) == (31_531_521 + own, 31_531_521 + own + 2_853_187)


@pytest.mark.parametrize(
    ("branch", "generator"),
    [
        ("skip16", "unet_128"),
        ("attention_unet_32_bottleneck", "attention_unet_32"),
        ("virtual_rgb_encoder", "resnet_6blocks"),
        ("virtual_rgb_input", "unet_128"),
        ("decoder_maps", "resnet_6blocks"),
    ],
)
def test_the_generator_alone_is_frozen(branch, generator):
    """Dropout rests too, and batch norms keep their statistics."""
    torch.manual_seed(4)
    net = SegmentationNet(build_generator(generator, 4, dropout=True), False, 8, branch)
    parent = torch.nn.Sequential(net).train()
    assert net.encoder.training and net.decoder.training
    assert not any(module.training for module in net.generation.modules())
    before = {name: value.clone() for name, value in net.generation.state_dict().items()}
    trained = [parameter for parameter in parent.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, 0.01)
    image = torch.rand(2, 3, 128, 128)
    with torch.no_grad():
        first, again = (list(net.generation(image).values()) for _ in range(2))
    assert all(map(torch.equal, first, again)) and not any(one.requires_grad for one in first)
    parent(image).mean().backward()
    optimiser.step()
    after = net.generation.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    own = set(net.generation.parameters())
    for name, parameter in net.named_parameters():
        assert (parameter.grad is None) == (parameter in own), name
        assert parameter.requires_grad == (parameter not in own), name


def test_the_names_of_the_weights_stay():
    """Weight files of earlier versions load."""
    with torch.device("meta"):
        names = set(SegmentationNet(GenerationNet("unet_128", 4), False, 8).state_dict())
    assert {".".join(name.split(".")[:2]) for name in names} == {
        "encoder.conv1", "encoder.bn1", *(f"encoder.layer{level}" for level in (1, 2, 3, 4)),
        "decoder.bottleneck", "decoder.up", "decoder.merge", "decoder.head", "generation.net",
    }  # fmt: skip
    assert {
        "encoder.layer2.0.downsample.1.running_var", "decoder.bottleneck.3.weight",
        "decoder.up.4.bias", "decoder.merge.4.4.running_var", "generation.net.up.0.0.bias",
    } <= names  # fmt: skip


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_gives_logits_at_full_size_and_uses_its_inputs(decoder):
    torch.manual_seed(5)
    with torch.device("meta"):
        net = SegmentationNet(GenerationNet("unet_128", 8), True, 64, decoder=decoder)
        assert net(torch.empty(2, 3, 256, 512)).shape == (2, 1, 256, 512)
    net = SegmentationNet(GenerationNet("unet_128", 4), True, 8, decoder=decoder)
    net.decoder.eval()
    skips = [
        torch.randn(2, width, 64 // 2**level, 96 // 2**level, requires_grad=True)
        for level, width in enumerate((64 + 4, 8 + 8, 16 + 16, 32 + 32))
    ]
    fused = torch.randn(2, 64 + 64, 4, 6, requires_grad=True)
    logits = net.decoder(fused, skips)
    logits.square().sum().backward()
    assert fused.grad.abs().sum() > 0
    # Of these DeepLabV3+ takes the map at 1/4, the others take all four.
    reached = [skip.grad is not None and bool(skip.grad.abs().sum() > 0) for skip in skips]
    assert reached == ([False, True, False, False] if decoder == "deeplabv3plus" else [True] * 4)


@pytest.mark.parametrize("decoder", ["unetplusplus", "deeplabv3plus"])
def test_the_decoders_of_the_library_are_its_own(decoder):
    """Without a generator, decoder and head are those of the library's network on a ResNet34."""
    with torch.device("meta"):
        theirs = smp.create_model(decoder, "resnet34", None)
        ours = SegmentationNet(None, decoder=decoder).decoder
    assert counts(ours)[1] == counts(theirs.decoder)[1] + counts(theirs.segmentation_head)[1]


@pytest.mark.slow
@pytest.mark.parametrize("decoder", DECODERS)
def test_it_compiles_as_one_graph_and_allows_channels_last(decoder):
    torch.manual_seed(6)
    net = SegmentationNet(GenerationNet("unet_128", 4), True, 8, decoder=decoder).eval()
    image = torch.rand(2, 3, 128, 256)
    with torch.no_grad():
        expected = net(image)
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(image), expected, atol=1e-5)
        last = net.to(memory_format=torch.channels_last)
        found = last(image.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("decoder", "branch", "generator"),
    [
        pytest.param("unetplusplus", None, None, marks=pytest.mark.slow),
        ("deeplabv3plus", None, None),
        ("unet", "attention_unet_32_bottleneck", "attention_unet_32"),
        ("unet", "virtual_rgb_encoder", "resnet_6blocks"),
    ],
)
def test_it_overfits_one_batch(decoder, branch, generator):
    """Pooled F1 at probability 0.5 passes 0.95, in evaluation mode."""
    torch.manual_seed(7)
    how = {} if branch is None else {"branch": branch}
    generation = None if generator is None else build_generator(generator, 4)
    net = SegmentationNet(generation, False, 8, decoder=decoder, **how)
    image = torch.nn.functional.interpolate(torch.rand(3, 3, 4, 4), (64, 64), mode="nearest")
    target = (image[:, :1] > 0.5).float()
    optimiser = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 5e-3)
    for _ in range(60):
        loss, _, _ = segmentation_loss(net(image), target, torch.ones_like(target), 0.5)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    # Running statistics of the last weights, as a longer training would have them.
    with torch.no_grad():
        for _ in range(20):
            net(image)
        predicted = net.eval()(image) > 0
    true = target > 0.5
    right = int((predicted & true).sum())
    assert 2 * right / int(predicted.sum() + true.sum()) > 0.95
