import pytest
import torch
import torchvision

from hemera.errors import TrainingError
from hemera.models.generation import GenerationNet
from hemera.models.segmentation import ResNet34, SegmentationNet


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


def test_shapes_at_512_px():
    with torch.device("meta"):
        maps = ResNet34()(torch.empty(1, 3, 512, 256))
        net = SegmentationNet(GenerationNet("unet_512", 32))
        logits = net(torch.empty(2, 3, 512, 1024))
    assert [tuple(part.shape[1:]) for part in maps] == [
        (64, 256, 128), (64, 128, 64), (128, 64, 32), (256, 32, 16), (512, 16, 8),
    ]  # fmt: skip
    assert net.decoder.bottleneck[0].in_channels == 1024
    assert logits.shape == (2, 1, 512, 1024)


def test_the_encoder_is_torchvisions_resnet34():
    torch.manual_seed(1)
    theirs = torchvision.models.resnet34(weights=None).eval()
    ours = ResNet34().eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert missing == []
    assert unexpected == ["fc.weight", "fc.bias"]
    assert sum(parameter.numel() for parameter in ours.parameters()) == 21_284_672
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
        expected = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(x))))
        assert torch.equal(ours(image)[-1], expected)


@pytest.fixture
def small() -> SegmentationNet:
    torch.manual_seed(2)
    return SegmentationNet(GenerationNet("unet_128", 4), True, 8)


def test_a_parents_train_does_not_unfreeze_the_branch(small):
    small.train()
    assert small.training and small.encoder.training
    assert not any(module.training for module in small.generation.modules())
    before = {name: value.clone() for name, value in small.generation.state_dict().items()}
    optimiser = torch.optim.SGD([p for p in small.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        small(torch.rand(2, 3, 128, 256)).mean().backward()
        optimiser.step()
    after = small.generation.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in small.generation.parameters())
    assert all(p.grad is not None for p in small.decoder.parameters())


def test_each_branch_is_normalised_on_its_own(small):
    seen = {}
    small.encoder.conv1.register_forward_hook(lambda _, given, __: seen.update(encoder=given[0]))
    small.generation.net.down[0].register_forward_hook(
        lambda _, given, __: seen.update(generation=given[0])
    )
    image = torch.rand(1, 3, 128, 256)
    image[0, :, 5, 7] = torch.tensor([0.485, 0.456, 0.406])
    small(image)
    assert seen["generation"].amin() >= -1 and seen["generation"].amax() <= 1
    assert torch.allclose(seen["generation"], (image - 0.5) / 0.5)
    assert torch.allclose(seen["encoder"][0, :, 5, 7], torch.zeros(3), atol=1e-6)
    red = (image[0, 0, 0, 0] - 0.485) / 0.229
    assert seen["encoder"][0, 0, 0, 0] == pytest.approx(float(red), abs=1e-6)


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


def test_wrong_sides_and_impossible_branches_are_refused(small):
    with pytest.raises(TrainingError, match="height 100 px is not a multiple of 32"):
        small(torch.rand(1, 3, 100, 128))
    with pytest.raises(TrainingError, match="unet_128: height 64 px is not a multiple of 128"):
        small(torch.rand(1, 3, 64, 128))
    with pytest.raises(TrainingError, match="unet_32"):
        SegmentationNet(GenerationNet("unet_32", 4))
    with pytest.raises(TrainingError, match="one tile of 32 px leaves one value to normalise"):
        SegmentationNet(None, False, 8)(torch.rand(1, 3, 32, 32))
    with pytest.raises(TrainingError, match="generation_skips"):
        SegmentationNet(None, True)


def test_it_overfits_one_batch():
    torch.manual_seed(7)
    net = SegmentationNet(None, False, 8)
    image = torch.nn.functional.interpolate(torch.rand(2, 3, 4, 8), (32, 64))
    target = (image[:, :1] > 0.5).float()
    optimiser = torch.optim.AdamW(net.parameters(), 5e-3)
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(net(image), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
