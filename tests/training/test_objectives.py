import pytest
import torch

from hemera.config import TrainGenerationOptions
from hemera.networks import losses
from hemera.networks.generation import PatchProjection, build_generator, draw_places
from hemera.training import objectives
from tests.small_networks import cpu_compute

OPTIONS = TrainGenerationOptions(
    network="resnet_6blocks", base_width=4, norm="instance", discriminator_width=4,
    discriminator_layers=2, crop_px=64, epochs=4, decay_from_epoch=2,
)  # fmt: skip
IMAGES = torch.rand(3, 2, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1


def discriminator_of(**changes):
    torch.manual_seed(2)
    options = OPTIONS.replace(**changes)
    return objectives.discriminator_for(options), options


def test_a_discriminator_of_her2_alone_does_not_see_he():
    source, fake, real = IMAGES
    found = {}
    for given in ("her2", "pair"):
        net, options = discriminator_of(discriminator_input=given, feature_matching_weight=1)
        found[given] = []
        for he in (source, -source):
            own = objectives.discriminator_losses(net, he, fake, real, 1, cpu_compute(), options)
            own |= objectives.adversarial_losses(net, he, fake, real, cpu_compute(), options)
            found[given].append({name: value.item() for name, value in own.items()})
    assert found["her2"][0] == found["her2"][1]
    assert found["pair"][0] != found["pair"][1]


def test_r1_is_taken_on_every_sixteenth_step_at_real_images():
    source, fake, real = IMAGES
    net, options = discriminator_of(discriminator_input="her2", r1_weight=10)
    expected = losses.gradient_penalty(net, real).item()
    for step in (0, 1, 15, 16, 32):
        own = objectives.discriminator_losses(net, source, fake, real, step, cpu_compute(), options)
        assert own["r1"].item() == (pytest.approx(expected) if step % 16 == 0 else 0)


def test_feature_matching_is_that_of_all_maps_and_moves_the_generated_image_alone():
    source, fake, real = IMAGES
    net, options = discriminator_of(discriminator_input="her2", feature_matching_weight=1)
    net.requires_grad_(False)
    generated = fake.clone().requires_grad_()
    found = objectives.adversarial_losses(net, source, generated, real, cpu_compute(), options)
    pairs = zip(net.features(fake), net.features(real), strict=True)
    expected = [(own - other).abs().mean().item() for own, other in pairs]
    assert len(expected) == 4
    assert found["feature_matching"].item() == pytest.approx(sum(expected) / 4, rel=1e-5)
    assert found["adversarial"].item() == pytest.approx(
        torch.nn.functional.softplus(-net(fake)).mean().item(), rel=1e-5
    )
    found["feature_matching"].backward()
    assert float(generated.grad.abs().sum()) > 0


def test_contrastive_losses_compare_generated_images_with_he_and_with_real_ones():
    torch.manual_seed(3)
    net = build_generator("resnet_6blocks", 4, "instance")
    projection = PatchProjection(net.encoder_widths, 8)
    source, generated, target = IMAGES

    def found(epoch, images, **changes):
        torch.manual_seed(5)
        options = OPTIONS.replace(**changes)
        own = objectives.contrastive_losses(net, projection, images, epoch, cpu_compute(), options)
        return {name: value.item() for name, value in own.items()}

    def expected(other, supervision):
        torch.manual_seed(5)
        maps = net.encode(generated)
        places = draw_places(maps)
        queries, keys = projection(maps, places), projection(net.encode(other), places)
        terms = [losses.patch_nce(q, k, supervision) for q, k in zip(queries, keys, strict=True)]
        return pytest.approx(sum(terms).item() / 5, rel=1e-5)

    images = (source, generated, target)
    assert found(1, images, nce_weight=1) == {"nce": expected(source, None)}
    # Of four epochs, two decay: in the last one g is 1 / 2.
    assert found(4, images, supervised_nce_weight=1)["supervised_nce"] == expected(target, 0.5)
    uniform = found(4, images, supervised_nce_weight=1, adaptive_nce=False)
    assert uniform == {"supervised_nce": expected(target, None)}
    both = found(1, images, nce_weight=1, supervised_nce_weight=1)
    assert set(both) == {"nce", "supervised_nce"}
