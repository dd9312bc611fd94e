import math

import numpy as np
import pytest
import torch
from skimage.color import rgb2hed, rgb_from_hed
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from hemera.config import TrainGenerationOptions
from hemera.networks import losses

WHITE = torch.ones(1, 3, 1, 1)


def one_by_one(image, levels):
    """The pyramid as it is defined: four times reflect and convolve, then every second pixel."""
    side = math.exp(-0.5) / (1 + 2 * math.exp(-0.5))
    taps = torch.tensor([side, 1 - 2 * side, side], dtype=image.dtype)
    kernel = torch.outer(taps, taps).expand(image.shape[1], 1, 3, 3)
    found = [image]
    for _ in range(levels - 1):
        for _ in range(4):
            padded = functional.pad(image, (1, 1, 1, 1), mode="reflect")
            image = functional.conv2d(padded, kernel, groups=image.shape[1])
        image = image[..., ::2, ::2]
        found.append(image)
    return found


def test_the_taps_are_those_of_the_reference():
    impulse = torch.zeros(1, 1, 24, 33)
    impulse[..., 10, 16] = 1
    _, coarser = losses.pyramid(impulse, 2)
    taps = np.array([0.27407, 0.45186, 0.27407])
    four = np.convolve(np.convolve(taps, taps), np.convolve(taps, taps))
    # Of nine taps those that every second pixel meets, its own among them.
    expected = torch.from_numpy(np.outer(four[::2], four[::2])).float()
    assert torch.allclose(coarser[0, 0, 3:8, 6:11], expected, atol=1e-5)
    assert float(coarser.sum()) == pytest.approx(float(expected.sum()), abs=1e-5)


@pytest.mark.parametrize(
    ("height", "width", "levels"), [(17, 23, 4), (2, 3, 2), (3, 2, 2), (64, 33, 5), (250, 131, 4)]
)
def test_the_pyramid_equals_its_definition_step_by_step(height, width, levels):
    torch.manual_seed(4)
    image = torch.rand(2, 3, height, width)
    found = losses.pyramid(image, levels)
    for ours, theirs in zip(found, one_by_one(image, levels), strict=True):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_pyramid_of_a_validation_leaves_the_next_training_whole(mode):
    """At a size no other test has: what is kept of it is made here."""
    image = torch.rand(1, 1, 38, 46)
    with mode():
        expected = losses.pyramid(image, 2)[1]
    own = image.clone().requires_grad_()
    found = losses.pyramid(own, 2)[1]
    found.sum().backward()
    assert torch.equal(found, expected)


def test_pyramid_l1_equals_two_weighted_pyramids_compared_image_by_image():
    torch.manual_seed(1)
    generated, real = torch.rand(2, 2, 3, 16, 24)
    weight = torch.rand(2, 1, 16, 24)
    pairs = zip(one_by_one(generated * weight, 4), one_by_one(real * weight, 4), strict=True)
    found = losses.pyramid_l1(generated, real, weight)
    for level, (a, b) in zip(found, pairs, strict=True):
        expected = [float((a[place] - b[place]).abs().mean()) for place in range(2)]
        assert level.tolist() == pytest.approx(expected, rel=1e-5)


def test_dab_density_equals_scikit_image():
    rng = np.random.default_rng(2)
    image = rng.integers(1, 256, (5, 9, 3)).astype(np.uint8)
    # A colour of pure DAB, so that the figure is known by hand: density 1.
    image[2, 3] = np.round(255 * 10 ** -np.array([0.27, 0.57, 0.78]))
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    density = losses.dab_density(tensor, WHITE)[0, 0].numpy()
    # rgb2hed divides by log(1e-6) where optical density has log(10), and clips at 0.
    expected = 6 * rgb2hed(image)[..., 2]
    assert np.allclose(np.maximum(density, 0), expected, atol=1e-4)
    assert density[2, 3] == pytest.approx(1, abs=0.02)
    assert density.shape == (5, 9)


def test_dab_density_is_that_over_the_background():
    """The same stain before a gray and before a white background."""
    gray = torch.tensor([179, 178, 174]).view(1, 3, 1, 1) / 255
    stain = torch.rand(1, 3, 4, 5) * 0.9 + 0.1
    over_white, over_gray = (
        losses.dab_density(stain * each, each) for each in (torch.ones(1, 3, 1, 1), gray)
    )
    assert torch.allclose(over_white, over_gray, atol=1e-5)
    assert float(losses.dab_density(gray, gray).abs().max()) < 1e-6


def test_an_image_of_one_colour_does_not_satisfy_dice():
    """Strong membranes, 3 of 12 px: with the former slope of 20 the mean colour had a low loss."""
    options = TrainGenerationOptions()
    vector = torch.tensor([0.27, 0.57, 0.78]).view(1, 3, 1, 1)
    stained = (torch.arange(96) % 12 < 3).float().expand(1, 1, 96, 96)
    for density in (0.25, 0.5):
        real = 10 ** -(density * stained * vector + 0.05)
        uniform = real.mean((2, 3), keepdim=True).expand_as(real)

        def loss(slope, real=real, uniform=uniform):
            pair = [
                losses.soft_dab(each, WHITE, slope, options.dice_threshold)
                for each in (uniform, real)
            ]
            return float(losses.balanced_dice(*pair))

        assert loss(options.dice_slope) >= 0.35 > loss(20)


def test_soft_dab_is_half_at_the_threshold_and_has_a_gradient():
    brown = torch.tensor([10**-0.27, 10**-0.57, 10**-0.78]).view(1, 3, 1, 1)
    assert float(losses.soft_dab(brown, WHITE, 20, 1.0)) == pytest.approx(0.5, abs=1e-4)
    assert float(losses.soft_dab(brown, WHITE, 20, 0.9)) == pytest.approx(
        1 / (1 + math.exp(-2)), abs=1e-4
    )
    image = torch.full((1, 3, 2, 3), 0.5, requires_grad=True)
    losses.soft_dab(image, WHITE, 20, 0.2).sum().backward()
    assert torch.isfinite(image.grad).all() and float(image.grad.abs().sum()) > 0
    black = torch.zeros(1, 3, 2, 3, requires_grad=True)
    losses.soft_dab(black, WHITE, 20, 0.2).sum().backward()
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


@pytest.mark.parametrize(
    ("mode", "logits", "real", "expected"),
    [
        ("vanilla", (0.0, math.log(3)), True, (math.log(2) + math.log(4 / 3)) / 2),
        ("vanilla", (0.0, math.log(3)), False, (math.log(2) + math.log(4)) / 2),
        ("lsgan", (0.5, -2.0), True, (0.25 + 9) / 2),
        ("lsgan", (0.5, -2.0), False, (0.25 + 4) / 2),
    ],
)
def test_adversarial_loss_by_hand(mode, logits, real, expected):
    found = losses.adversarial(torch.tensor([logits]), real, mode)
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_variance_penalty_by_hand():
    real = torch.tensor([[1.0, 4, 0], [3, 4, 1]]).view(2, 1, 1, 3)
    generated = torch.tensor([[0.0, 2, 5], [0, 6, 2]]).view(2, 1, 1, 3)
    # Of two values the unbiased variance is (a - b)^2 / 2: 2, 0, .5 against 0, 8, 4.5.
    assert float(losses.variance_penalty(generated, real)) == pytest.approx((2 + 8 + 4) / 3)
    # The biased one is (a - b)^2 / 4.
    found = losses.variance_penalty(generated, real, unbiased=False)
    assert float(found) == pytest.approx((2 + 8 + 4) / 6)


def test_segmentation_loss_by_hand():
    logits = torch.tensor([math.log(3), 0, 0, -math.log(3)]).view(1, 1, 1, 4)
    target = torch.tensor([1.0, 1, 1, 0]).view(1, 1, 1, 4)
    total, first, second = losses.segmentation_loss(logits, target, torch.ones_like(target), 0.3)
    # The truth has probabilities 3/4 1/2 1/2 3/4; TP 1.75, FN 1.25, FP 0.25.
    cross_entropy = (2 * math.log(4 / 3) + 2 * math.log(2)) / 4
    dice = 2 * 1.75 / (2 * 1.75 + 1.25 + 0.25)
    assert float(first) == pytest.approx(cross_entropy, abs=1e-6)
    assert float(second) == pytest.approx(1 - dice, abs=1e-6)
    assert float(total) == pytest.approx(0.3 * cross_entropy + 0.7 * (1 - dice), abs=1e-6)
    alone, first, _ = losses.segmentation_loss(logits, target, torch.ones_like(target), 1)
    assert float(alone) == float(first)
    empty = torch.full((2, 1, 3, 5), -100.0)
    valid = torch.ones(2, 1, 3, 5)
    _, _, overlap = losses.segmentation_loss(empty, torch.zeros(2, 1, 3, 5), valid, 0.5)
    assert float(overlap) == pytest.approx(0, abs=1e-6)


def test_excluded_pixels_have_neither_loss_nor_gradient():
    """The loss of four pixels of which the last two are excluded is that of the first two."""
    logits = torch.tensor([0.7, -0.2, 3.0, -5.0]).view(1, 1, 1, 4).requires_grad_()
    target = torch.tensor([1.0, 0, 0, 1]).view(1, 1, 1, 4)
    valid = torch.tensor([1.0, 1, 0, 0]).view(1, 1, 1, 4)
    found = losses.segmentation_loss(logits, target, valid, 0.4)
    found[0].backward()
    half = (t.detach()[..., :2] for t in (logits, target, valid))
    assert [x.item() for x in found] == pytest.approx(
        [x.item() for x in losses.segmentation_loss(*half, 0.4)], rel=1e-6
    )
    assert logits.grad.flatten()[2:].tolist() == [0, 0]
    assert (logits.grad.flatten()[:2] != 0).all()
    nothing = losses.segmentation_loss(logits, target, torch.zeros_like(valid), 0.4)
    assert float(nothing[0]) == pytest.approx(0, abs=1e-6)


def every_loss(generated, real, weight, logits, target) -> dict[str, torch.Tensor]:
    """Each loss of a training step, of images in [0, 1]."""
    soft = [losses.soft_dab(images, WHITE, 20, 0.2) for images in (generated, real)]
    found = {
        f"l1 {level}, {given is not None}": value.mean()
        for given in (weight, None)
        for level, value in enumerate(losses.pyramid_l1(generated, real, given))
    }
    found["dab"] = losses.dab_density(generated, WHITE).mean()
    found["dice"] = losses.balanced_dice(*soft, weight)
    found["dice of intensities"] = losses.balanced_dice(generated, real)
    found["variance"] = losses.variance_penalty(generated, real)
    for mode in ("vanilla", "lsgan"):
        found[mode] = losses.adversarial(logits, True, mode)
    parts = losses.segmentation_loss(logits, target, torch.ones_like(target), 0.5)
    found |= dict(zip(("total", "cross-entropy", "overlap"), parts, strict=True))
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_are_computed_in_single(dtype):
    """At 512 px a sum of ones is past float16's largest number and bfloat16's precision."""
    torch.manual_seed(3)
    generated, real = torch.rand(2, 2, 3, 512, 640)
    weight = torch.rand(2, 1, 512, 640)
    logits = 8 * torch.randn(2, 1, 512, 640)
    target = (torch.rand(2, 1, 512, 640) > 0.3).float()
    halves = [part.to(dtype) for part in (generated, real, weight, logits, target)]
    found = every_loss(*halves)
    with torch.autocast("cpu", dtype):
        within = every_loss(*halves)
    expected = every_loss(generated, real, weight, logits, target)
    for name, value in expected.items():
        assert found[name].dtype == within[name].dtype == torch.float32, name
        # What the rounding of the inputs leaves; the sums add none of their own.
        assert float(found[name]) == pytest.approx(float(value), rel=5e-3), name
        assert float(within[name]) == pytest.approx(float(found[name]), rel=1e-5), name


@pytest.mark.parametrize("allowed", [True, False])
def test_losses_multiply_without_tf32_and_leave_the_setting_as_it_was(allowed):
    """The products of losses, and those of their gradients."""
    matmul = torch.backends.cuda.matmul
    seen = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.name() in ("aten::mm", "aten::bmm"):
                seen.append(matmul.allow_tf32)
            return function(*args, **(kwargs or {}))

    before = matmul.allow_tf32
    matmul.allow_tf32 = allowed
    try:
        with Products():
            images, query = torch.rand(2, 1, 8, 8), torch.rand(2, 3, 4)
            images.requires_grad_()
            query.requires_grad_()
            coarse = losses.pyramid(images, 2)[1].square().sum()
            forward = coarse + losses.patch_nce(query, torch.rand(2, 3, 4))
            products = len(seen)
            forward.backward()
        assert matmul.allow_tf32 == allowed
    finally:
        matmul.allow_tf32 = before
    assert 3 <= products < len(seen)
    assert not any(seen)


def test_gradients_of_products_are_those_of_autograd():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 10, 14, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tuple(losses.pyramid(x, 3)), (images,))
    query = torch.rand(2, 3, 4, requires_grad=True)
    key = torch.rand(2, 3, 4)
    (found,) = torch.autograd.grad(losses.patch_nce(query, key), query)
    similarity = torch.einsum("bnc,bmc->bnm", query, key) / losses.NCE_TEMPERATURE
    own = similarity.diagonal(dim1=1, dim2=2)
    (expected,) = torch.autograd.grad((similarity.logsumexp(2) - own).mean(), query)
    torch.testing.assert_close(found, expected)


# --- losses of presets, against their formulas in NumPy ------------------------------------------


def unit(values):
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def nce_by_hand(query, key, supervision):
    """Each place of each image: -log of its positive among all places of the image."""
    total, weights = 0.0, 0.0
    for image_query, image_key in zip(query, key, strict=True):
        for place, vector in enumerate(image_query):
            scores = [float(np.exp(vector @ other / 0.07)) for other in image_key]
            loss = -np.log(scores[place] / sum(scores))
            weight = 1.0
            if supervision is not None:
                own = max(0.0, float(vector @ image_key[place]))
                weight = supervision * 1.0 + (1 - supervision) * own
            total, weights = total + weight * loss, weights + weight
    return total / weights


@pytest.mark.parametrize("supervision", [None, 1.0, 0.3, 0.02])
def test_patch_nce_equals_its_formula(supervision):
    rng = np.random.default_rng(3)
    query = unit(rng.normal(size=(2, 5, 4)))
    # Some pairs are consistent, others are opposite, whose adaptive weight is the lowest.
    key = unit(query + rng.normal(size=query.shape))
    key[0, 1] = -query[0, 1]
    found = losses.patch_nce(torch.from_numpy(query), torch.from_numpy(key), supervision)
    expected = nce_by_hand(query, key, supervision)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    if supervision == 0.02:
        assert expected < 0.9 * nce_by_hand(query, key, None), "the opposite pair counts less"


def test_patch_nce_moves_the_query_alone():
    query, key = (torch.rand(1, 3, 4, requires_grad=True) for _ in range(2))
    losses.patch_nce(query, key, 0.5).backward()
    assert key.grad is None
    assert float(query.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("epoch", "expected"), [(1, 1.0), (30, 1.0), (31, 1.0), (32, 0.9), (36, 0.5), (40, 0.1)]
)
def test_supervision_decreases_with_the_learning_rate(epoch, expected):
    """ASP trains 30 and 10 epochs: with t = (epoch - 1) / 40, k = .75: (1 - t) / (1 - k)."""
    assert losses.supervision_weight(epoch, 40, 30) == pytest.approx(expected)
    assert losses.supervision_weight(epoch, 40, 40) == 1


def test_each_block_is_shifted_to_where_it_matches():
    """Two blocks of one image have different shifts, another image has none."""
    rng = np.random.default_rng(5)
    generated = torch.from_numpy(rng.random((2, 3, 150, 290), np.float32))
    real = generated.clone()
    real[0, :, 3:, :143] = generated[0, :, :-3, :143]
    real[0, :, :, 145:288] = generated[0, :, :, 147:]
    shifts = losses.best_shifts(generated, real, 4)
    assert shifts.tolist() == [[[[3, 0]], [[0, -2]]], [[[0, 0]], [[0, 0]]]]
    found = losses.shifted(real, shifts)
    assert found[1].equal(generated[1])
    assert found[0, :, 4:140, 4:140].equal(generated[0, :, 4:140, 4:140])
    assert found[0, :, 4:140, 150:286].equal(generated[0, :, 4:140, 150:286])
    within = losses.best_shifts(generated, real, 2)[0, 0, 0, 0].item()
    assert abs(within) <= 2, "not farther than allowed"
    flat = torch.full((1, 3, 130, 131), 0.5)
    assert losses.best_shifts(flat, flat, 3).tolist() == [[[[0]], [[0]]]], "the shortest of equals"


def test_the_colour_of_the_strongest_staining_by_formula():
    rng = np.random.default_rng(6)
    images = rng.uniform(0.1, 1, (2, 1, 3, 20, 30)).astype(np.float32)
    means = []
    for (image,) in images:
        density = -np.log10(image.transpose(1, 2, 0)).reshape(-1, 3)
        stain = density @ np.linalg.inv(rgb_from_hed)[:, 2]
        means.append(density[np.argsort(-stain)[:60]].mean(0))
    found = losses.stain_color(*torch.from_numpy(images), torch.ones(1, 3, 1, 1)).item()
    assert found == pytest.approx(np.abs(means[0] - means[1]).mean(), rel=1e-4)
    moved = torch.from_numpy(images[0]).flip(-1)
    same = losses.stain_color(moved, torch.from_numpy(images[0]), torch.ones(1, 3, 1, 1)).item()
    assert same == pytest.approx(0, abs=1e-6), "where it is does not matter"


def test_the_strongest_staining_equals_its_percentiles():
    rng = np.random.default_rng(4)
    images = rng.uniform(0.05, 1, (2, 2, 3, 17, 31)).astype(np.float32)
    background = torch.full((2, 3, 1, 1), 0.9)
    found = losses.dab_percentile(*torch.from_numpy(images), background).item()
    scores = []
    for pair in images:
        for image in pair:
            density = losses.dab_density(torch.from_numpy(image)[None], background[:1])
            values = density.numpy().ravel().astype(np.float64)
            values = np.minimum(values, np.quantile(values, 0.99))
            scores.append(values[values >= np.quantile(values, 0.9)].mean())
    expected = np.mean([abs(scores[0] - scores[2]), abs(scores[1] - scores[3])])
    assert found == pytest.approx(expected, rel=1e-4)
    # Where it is does not matter.
    moved = np.roll(images[0], (5, 11), (-2, -1)).copy()
    same = losses.dab_percentile(torch.from_numpy(moved), torch.from_numpy(images[0]), background)
    assert same.item() == pytest.approx(0, abs=1e-6)


def test_the_coarse_difference_is_that_of_the_means_of_blocks():
    rng = np.random.default_rng(5)
    images = rng.uniform(size=(2, 1, 3, 16, 24)).astype(np.float32)
    means = images.reshape(2, 1, 3, 2, 8, 3, 8).mean((4, 6))
    expected = np.abs(means[0] - means[1]).mean()
    assert losses.coarse_l1(*torch.from_numpy(images)).item() == pytest.approx(expected, rel=1e-5)


def test_feature_matching_is_the_mean_over_maps():
    """Two maps of different size with mean differences .5 and 2: 1.25."""
    real = [torch.zeros(1, 2, 4, 4, requires_grad=True), torch.zeros(1, 8, 2, 2)]
    generated = [torch.full((1, 2, 4, 4), 0.5), torch.full((1, 8, 2, 2), -2.0).requires_grad_()]
    found = losses.feature_matching(generated, real)
    assert found.item() == 1.25
    found.backward()
    assert real[0].grad is None


def test_r1_is_the_mean_squared_gradient_and_has_a_gradient_itself():
    """Of D(x) = sum of a x^2 it is 2 a x: the mean of 4 a^2 x^2, whose derivative is 8 a x^2."""
    factor = torch.tensor(1.5, requires_grad=True)
    real = torch.tensor([1.0, -2.0, 0.0, 3.0]).view(1, 1, 2, 2)
    found = losses.gradient_penalty(lambda x: factor * x.square(), real)
    assert found.item() == pytest.approx(4 * 1.5**2 * 14 / 4)
    found.backward()
    assert factor.grad.item() == pytest.approx(8 * 1.5 * 14 / 4)


def test_the_hinge_loss_by_hand():
    logits = torch.tensor([2.0, 0.5, -3.0])
    assert losses.adversarial(logits, True, "hinge").item() == pytest.approx((0 + 0.5 + 4) / 3)
    assert losses.adversarial(logits, False, "hinge").item() == pytest.approx((3 + 1.5 + 0) / 3)
    own = losses.adversarial(logits, True, "hinge", generator=True)
    assert own.item() == pytest.approx(0.5 / 3)
