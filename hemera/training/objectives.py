"""The adversarial losses of GenerationNet, and those that are off by default.

The latter are the methods of the presets `asp` and `misaligned`. Each loss that a function returns
under a name is multiplied with the option of that name, `..._weight`.
"""

import torch
from torch import Tensor, nn

from hemera.config import TrainGenerationOptions
from hemera.evaluation.perceptual import Lpips
from hemera.networks import losses
from hemera.networks.discriminator import PatchGAN
from hemera.networks.generation import PatchProjection, ResidualGenerationNet, draw_places
from hemera.training.session import Compute

R1_EVERY = 16
"""Steps between two R1 penalties."""

WEIGHTED = (
    *("dice", "variance", "coarse_l1", "dab_percentile", "stain_color"),
    *("lpips_half", "lpips_quarter"),
    *("feature_matching", "nce", "supervised_nce"),
)
"""The losses of the generator that are multiplied with an option."""


def discriminator_for(options: TrainGenerationOptions) -> PatchGAN:
    """Return the untrained discriminator."""
    return PatchGAN(
        6 if options.discriminator_input == "pair" else 3,
        options.discriminator_width,
        options.discriminator_layers,
        options.norm,
        options.spectral_norm,
    )


def r1_due(step: int, options: TrainGenerationOptions) -> bool:
    """Return whether the discriminator has an R1 penalty in a step, counted from 0."""
    return options.r1_weight > 0 and step % R1_EVERY == 0


def _discriminator_input(source: Tensor, image: Tensor, options: TrainGenerationOptions) -> Tensor:
    """Return what the discriminator sees of H&E and of a HER2 image."""
    if options.discriminator_input == "her2":
        return image
    return torch.cat((source, image), 1)


def discriminator_losses(
    discriminator: nn.Module,
    source: Tensor,
    fake: Tensor,
    real: Tensor,
    step: int,
    compute: Compute,
    options: TrainGenerationOptions,
) -> dict[str, Tensor]:
    """Return the losses of the discriminator: `discriminator`, and `r1` where it is an option.

    Images are in [-1, 1]. The R1 penalty is 0 but on every `R1_EVERY`th step, and computed in
    single precision by the network as it is, because compiled code has no second derivatives.
    """
    fake_input, real_input = (
        _discriminator_input(source, image, options) for image in (fake.detach(), real)
    )
    with compute.autocast():
        fake_logits = discriminator(fake_input)
        real_logits = discriminator(real_input)
    found = {
        "discriminator": 0.5
        * (
            losses.adversarial(fake_logits, False, options.gan_loss)
            + losses.adversarial(real_logits, True, options.gan_loss)
        )
    }
    if options.r1_weight > 0:
        found["r1"] = (
            losses.gradient_penalty(discriminator.forward, real_input)
            if r1_due(step, options)
            else torch.zeros((), device=compute.device)
        )
    return found


def adversarial_losses(
    discriminator: nn.Module,
    source: Tensor,
    fake: Tensor,
    real: Tensor,
    compute: Compute,
    options: TrainGenerationOptions,
) -> dict[str, Tensor]:
    """Return the generator's losses by the discriminator, which must not require gradients."""
    fake_input = _discriminator_input(source, fake, options)
    found = {}
    if options.feature_matching_weight > 0:
        assert isinstance(discriminator, PatchGAN)
        with compute.autocast():
            maps = discriminator.features(fake_input)
            with torch.no_grad():
                real_maps = discriminator.features(_discriminator_input(source, real, options))
        found["feature_matching"] = losses.feature_matching(maps, real_maps)
        logits = maps[-1]
    else:
        with compute.autocast():
            logits = discriminator(fake_input)
    found["adversarial"] = losses.adversarial(logits, True, options.gan_loss, generator=True)
    return found


def image_losses(
    generated: Tensor,
    target: Tensor,
    background: Tensor,
    options: TrainGenerationOptions,
    lpips: Lpips | None,
) -> dict[str, Tensor]:
    """Return the losses of generated images against real ones that are options.

    Images are in [-1, 1]; `background` (B, 3, 1, 1), the colour of that of HER2, is in [0, 1].
    """
    found = {}
    if options.coarse_l1_weight > 0:
        found["coarse_l1"] = losses.coarse_l1(generated, target)
    unit = (generated + 1) / 2, (target + 1) / 2
    if options.dab_percentile_weight > 0:
        found["dab_percentile"] = losses.dab_percentile(*unit, background)
    if options.stain_color_weight > 0:
        found["stain_color"] = losses.stain_color(*unit, background)
    if lpips is not None:
        weights = {"half": options.lpips_half_weight, "quarter": options.lpips_quarter_weight}
        for (name, weight), factor in zip(weights.items(), (2, 4), strict=True):
            if weight > 0:
                pair = (losses.reduced(image, factor) for image in (generated, target))
                found[f"lpips_{name}"] = lpips.distance(*pair).mean()
    return found


def contrastive_losses(
    generator: nn.Module,
    projection: nn.Module,
    images: tuple[Tensor, Tensor, Tensor],
    epoch: int,
    compute: Compute,
    options: TrainGenerationOptions,
) -> dict[str, Tensor]:
    """Return the contrastive losses of `images`: H&E, generated and real HER2, in [-1, 1].

    Features are those of the generator's encoder, also of HER2 images; each loss is the mean over
    its maps.
    """
    assert isinstance(generator, ResidualGenerationNet)
    assert isinstance(projection, PatchProjection)
    source, generated, target = images
    supervision = None
    if options.adaptive_nce:
        supervision = losses.supervision_weight(epoch, options.epochs, options.decay_from_epoch)
    with compute.autocast():
        maps = generator.encode(generated)
    compared = {
        "nce": (source, options.nce_weight, None),
        "supervised_nce": (target, options.supervised_nce_weight, supervision),
    }
    found = {}
    for name, (other, weight, certainty) in compared.items():
        if weight > 0:
            places = draw_places(maps)
            with compute.autocast():
                queries = projection(maps, places)
                with torch.no_grad():
                    keys = projection(generator.encode(other), places)
            terms = [losses.patch_nce(*pair, certainty) for pair in zip(queries, keys, strict=True)]
            found[name] = torch.stack(terms).mean()
    return found
