import math

import numpy as np
import pytest
import torch
from skimage.color import rgb2hed

from hemera.models import losses


def test_the_taps_are_those_of_the_reference():
    impulse = torch.zeros(1, 1, 7, 9)
    impulse[..., 3, 4] = 1
    blurred = losses.blur(impulse)[0, 0]
    taps = torch.tensor([0.27407, 0.45186, 0.27407])
    assert torch.allclose(blurred[2:5, 3:6], torch.outer(taps, taps), atol=1e-5)
    assert float(blurred.sum()) == pytest.approx(1, abs=1e-6)


def test_blur_reflects_at_the_border_without_repeating_it():
    row = torch.tensor([10.0, 20, 40, 80, 160]).view(1, 1, 1, 5).expand(1, 1, 4, 5)
    blurred = losses.blur(row)[0, 0]
    # Left of the first pixel lies the second.
    assert float(blurred[0, 0]) == pytest.approx(0.45186 * 10 + 2 * 0.27407 * 20, abs=1e-3)
    assert float(blurred[2, 1]) == pytest.approx(0.45186 * 20 + 0.27407 * 50, abs=1e-3)


def test_pyramid_levels_take_every_second_pixel_after_four_blurs():
    image = torch.rand(2, 3, 16, 24)
    levels = losses.pyramid(image, 4)
    assert [tuple(level.shape[-2:]) for level in levels] == [
        (16, 24),
        (8, 12),
        (4, 6),
        (2, 3),
    ]
    expected = losses.blur(losses.blur(losses.blur(losses.blur(image))))[..., ::2, ::2]
    assert torch.equal(levels[1], expected)


def test_pyramid_l1_of_a_constant_difference_is_that_constant_on_every_level():
    real = torch.rand(2, 3, 16, 24)
    found = losses.pyramid_l1(real + 0.25, real)
    assert [float(value) for value in found] == pytest.approx([0.25] * 4, abs=1e-6)


def test_pyramid_l1_equals_two_weighted_pyramids_compared():
    torch.manual_seed(1)
    generated, real = torch.rand(2, 2, 3, 16, 24)
    weight = torch.rand(2, 1, 16, 24)
    pairs = zip(
        losses.pyramid(generated * weight, 4),
        losses.pyramid(real * weight, 4),
        strict=True,
    )
    expected = [float((a - b).abs().mean()) for a, b in pairs]
    found = losses.pyramid_l1(generated, real, weight)
    assert [float(value) for value in found] == pytest.approx(expected, rel=1e-5)


def test_a_checkerboard_error_vanishes_on_the_coarser_levels():
    board = (
        ((torch.arange(16)[:, None] + torch.arange(24)) % 2 * 2 - 1).float().expand(1, 3, 16, 24)
    )
    found = [float(value) for value in losses.pyramid_l1(board, torch.zeros_like(board))]
    assert found[0] == 1
    # One blur leaves (0.45186 - 2 * 0.27407)^2 of a checkerboard, four leave its fourth power.
    assert found[1] == pytest.approx((0.45186 - 0.54814) ** 8, rel=0.01)


def test_dab_density_equals_scikit_image():
    rng = np.random.default_rng(2)
    image = rng.integers(1, 256, (5, 9, 3)).astype(np.uint8)
    # A colour of pure DAB, so that the figure is known by hand: density 1.
    image[2, 3] = np.round(255 * 10 ** -np.array([0.27, 0.57, 0.78]))
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    density = losses.dab_density(tensor)[0, 0].numpy()
    # rgb2hed divides by log(1e-6) where optical density has log(10), and clips at 0.
    expected = 6 * rgb2hed(image)[..., 2]
    assert np.allclose(np.maximum(density, 0), expected, atol=1e-4)
    assert density[2, 3] == pytest.approx(1, abs=0.02)
    assert density.shape == (5, 9)


def test_soft_dab_is_half_at_the_threshold_and_has_a_gradient():
    brown = torch.tensor([10**-0.27, 10**-0.57, 10**-0.78]).view(1, 3, 1, 1)
    assert float(losses.soft_dab(brown, 20, 1.0)) == pytest.approx(0.5, abs=1e-4)
    assert float(losses.soft_dab(brown, 20, 0.9)) == pytest.approx(1 / (1 + math.exp(-2)), abs=1e-4)
    image = torch.full((1, 3, 2, 3), 0.5, requires_grad=True)
    losses.soft_dab(image, 20, 0.2).sum().backward()
    assert torch.isfinite(image.grad).all() and float(image.grad.abs().sum()) > 0
    black = torch.zeros(1, 3, 2, 3, requires_grad=True)
    losses.soft_dab(black, 20, 0.2).sum().backward()
    assert torch.isfinite(black.grad).all()


def test_balanced_dice_by_hand():
    generated = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0]]).view(1, 1, 2, 4)
    real = torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 0]]).view(1, 1, 2, 4)
    # Foreground 2*1/(2+2) = 1/2, background 2*5/(6+6) = 5/6; mean 2/3.
    assert float(losses.balanced_dice(generated, real)) == pytest.approx(1 / 3, abs=1e-6)
    assert float(losses.balanced_dice(real, real)) == pytest.approx(0, abs=1e-6)
    soft = torch.full((2, 1, 3, 5), 0.018)
    assert float(losses.balanced_dice(soft, soft)) == pytest.approx(0, abs=1e-6)
    # Both empty: foreground Dice is 1.
    assert float(losses.balanced_dice(0 * soft, 0 * soft)) == pytest.approx(0, abs=1e-6)


def test_weights_of_balanced_dice_multiply_both_maps():
    generated = torch.tensor([1.0, 0, 0, 1]).view(1, 1, 1, 4)
    real = torch.tensor([1.0, 1, 0, 0]).view(1, 1, 1, 4)
    weight = torch.tensor([1.0, 0.5, 1, 0]).view(1, 1, 1, 4)
    # Foreground: maps 1,0,0,0 and 1,.5,0,0: 2*1/(1+1.25).
    # Background: maps 0,.5,1,0 and 0,0,1,0: 2*1/(1.25+1).
    expected = 1 - 2 / 2.25
    found = losses.balanced_dice(generated, real, weight)
    assert float(found) == pytest.approx(expected, abs=1e-5)


def test_balanced_dice_is_taken_per_image():
    real = torch.zeros(2, 1, 2, 3)
    real[1] = 1
    generated = torch.zeros(2, 1, 2, 3)
    # First image: 0. Second: foreground 0, background 0, so 1.
    assert float(losses.balanced_dice(generated, real)) == pytest.approx(0.5, abs=1e-5)


def test_adversarial_loss_by_hand():
    logits = torch.tensor([[0.0, math.log(3)]])
    expected = (math.log(2) + math.log(4 / 3)) / 2
    assert float(losses.adversarial(logits, True)) == pytest.approx(expected, abs=1e-6)
    expected = (math.log(2) + math.log(4)) / 2
    assert float(losses.adversarial(logits, False)) == pytest.approx(expected, abs=1e-6)


def test_segmentation_loss_by_hand():
    logits = torch.tensor([math.log(3), 0, 0, -math.log(3)]).view(1, 1, 1, 4)
    target = torch.tensor([1.0, 1, 0, 0]).view(1, 1, 1, 4)
    cross_entropy = (2 * math.log(4 / 3) + 2 * math.log(2)) / 4
    dice = 2 * 1.25 / (2 + 2)
    total, first, second = losses.segmentation_loss(logits, target, 0.25)
    assert float(first) == pytest.approx(cross_entropy, abs=1e-6)
    assert float(second) == pytest.approx(1 - dice, abs=1e-6)
    assert float(total) == pytest.approx(0.25 * cross_entropy + 0.75 * (1 - dice), abs=1e-6)
    alone, first, _ = losses.segmentation_loss(logits, target, 1)
    assert float(alone) == float(first)


def test_tversky_loss_of_nothing_against_nothing_is_zero():
    logits = torch.full((2, 1, 3, 5), -100.0)
    assert float(losses.tversky_loss(logits, torch.zeros(2, 1, 3, 5))) == pytest.approx(0, abs=1e-6)
