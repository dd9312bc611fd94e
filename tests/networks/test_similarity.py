import cv2
import numpy as np
import pytest
import torch

from hemera.evaluation import metrics
from hemera.networks import similarity

DAB = torch.tensor([0.27, 0.57, 0.78]).view(1, 3, 1, 1)


def draw(seed: int):
    rng = np.random.default_rng(seed)
    truth = cv2.GaussianBlur(rng.integers(0, 256, (41, 67, 3)).astype(np.uint8), (0, 0), 2)
    noise = rng.normal(0, 12, truth.shape)
    return np.clip(truth + noise, 0, 255).astype(np.uint8), truth


def tensor(image):
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255


def test_a_batch_scores_as_its_images_do_in_evaluation():
    pairs = [draw(seed) for seed in (1, 2)]
    # A bright, almost flat image, where single precision could lose the variance.
    flat = np.full((41, 67, 3), 244, np.uint8)
    flat[3:9, 5:30] = 246
    pairs.append((flat, np.full_like(flat, 245)))
    images, truths = (torch.stack([tensor(pair[i]) for pair in pairs]) for i in (0, 1))
    valid = np.ones((41, 67), np.bool_)
    valid[:12, 5:20] = False
    for ours, theirs, tolerance in (
        (similarity.psnr, metrics.psnr, 1e-3),
        (similarity.ssim, metrics.ssim, 1e-4),
    ):
        expected = [theirs(*pair, valid) for pair in pairs]
        given = torch.from_numpy(valid).expand(3, 1, -1, -1)
        assert ours(images, truths, given).tolist() == pytest.approx(expected, abs=tolerance)


def test_concordance_by_formula():
    rng = np.random.default_rng(0)
    x, y = rng.random((2, 500))
    sums = np.array([500, x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()])
    covariance = np.mean((x - x.mean()) * (y - y.mean()))
    expected = 2 * covariance / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)
    assert similarity.concordance(sums) == pytest.approx(expected)
    assert similarity.concordance(np.zeros(6)) == 0


def test_brown_is_summed_over_valid_pixels():
    brown = 10 ** -(torch.tensor([0.1, 0.4]).view(2, 1, 1, 1) * DAB).expand(2, 3, 4, 6)
    valid = torch.zeros(2, 1, 4, 6, dtype=torch.bool)
    valid[:, :, :2] = True
    sums = similarity.brown_sums(brown, brown.flip(0), torch.ones(2, 3, 1, 1), valid)
    assert sums.shape == (2, 6)
    expected = [12, 12 * 0.1, 12 * 0.4, 12 * 0.01, 12 * 0.16, 12 * 0.04]
    assert sums[0].tolist() == pytest.approx(expected, rel=1e-4)


def test_gray_is_not_brown_over_a_background_of_any_colour():
    """A background with more red than blue makes gray tissue redder than blue, and no browner."""
    background = torch.tensor([1.0, 0.9, 0.8]).view(1, 3, 1, 1)
    brown = background * (10 ** -(0.4 * DAB)).expand(1, 3, 4, 6)
    gray = background * torch.full((1, 3, 4, 6), 0.375)
    valid = torch.ones(1, 1, 4, 6, dtype=torch.bool)
    sums = similarity.brown_sums(gray, brown, background, valid)
    assert sums[0].tolist() == pytest.approx([24, 0, 24 * 0.4, 0, 24 * 0.16, 0], rel=1e-4)


def test_images_are_cut_off_as_they_are_stored():
    values = torch.tensor([-1.2, -1.0, -0.5, 0.0, 0.9999, 1.3]).view(1, 1, 1, 6)
    found = (similarity.as_stored(values) * 255).round().flatten().tolist()
    # (x + 1) / 2 * 255 = 63.75, 127.5, 254.98 lose their fractions.
    assert found == [0, 0, 63, 127, 254, 255]
