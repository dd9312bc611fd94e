import functools

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from hemera.evaluation import metrics
from hemera.evaluation.metrics import Bootstrap, Confusion

ALL = np.ones((41, 67), np.bool_)


@pytest.fixture
def pair():
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 256, (41, 67, 3)).astype(np.uint8)
    noisy = truth + rng.normal(0, 30, truth.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8), truth


def test_psnr_equals_scikit_image(pair):
    expected = peak_signal_noise_ratio(pair[1], pair[0], data_range=255)
    assert metrics.psnr(*pair, ALL) == pytest.approx(expected, abs=1e-9)
    assert metrics.psnr(pair[0], pair[0], ALL) == float("inf")


@pytest.mark.parametrize("gaussian", [False, True])
def test_ssim_equals_scikit_image(pair, gaussian):
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = structural_similarity(
        *pair, channel_axis=-1, data_range=255, **settings if gaussian else {}
    )
    assert metrics.ssim(*pair, ALL, gaussian=gaussian) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("gaussian", [False, True])
def test_excluded_pixels_do_not_count(pair, gaussian):
    """Rows from 20 on are excluded: every metric is that of the first 20 rows."""
    valid = ALL.copy()
    valid[20:] = False
    rows = pair[0][:20], pair[1][:20], ALL[:20]
    for metric in (metrics.psnr, functools.partial(metrics.ssim, gaussian=gaussian)):
        assert metric(*pair, valid) == pytest.approx(metric(*rows), abs=1e-9)
    assert np.isnan(metrics.ssim(*pair, ~ALL, gaussian=gaussian))


def test_network_output_is_truncated_not_rounded():
    values = np.array([-1.0, 0.0, 1.0, 0.999, -2, 2, 200.9 / 127.5 - 1])
    assert metrics.to_uint8(values).tolist() == [0, 127, 255, 254, 0, 255, 200]


def test_confusion_counts_by_hand():
    predicted = np.array([[1, 1, 0], [0, 0, 1]], bool)
    truth = np.array([[1, 0, 0], [1, 0, 1]], bool)
    valid = np.ones((2, 3), np.bool_)
    assert metrics.confusion(predicted, truth, valid) == Confusion(2, 1, 1, 2)
    valid[:, 1:] = False
    assert metrics.confusion(predicted, truth, valid) == Confusion(1, 0, 1, 0)


def test_rates_by_hand_and_their_conventions():
    """Of four tiles: one with all kinds of pixels, an empty one, and two without a hit."""
    counts = np.array([(3, 1, 2, 10), (0, 0, 0, 9), (0, 4, 0, 9), (0, 0, 4, 9)])
    found = metrics.rates(counts)
    expected = {"precision": 3 / 4, "recall": 3 / 5, "f1": 6 / 9, "iou": 3 / 6}
    for name, value in expected.items():
        assert found[name] == pytest.approx([value, 1, 0, 0])


def test_three_aggregations_by_hand():
    counts = [Confusion(3, 1, 2, 10), Confusion(0, 0, 0, 16), Confusion(1, 0, 0, 15)]
    found = metrics.aggregate(np.array(counts), bootstrap("aaa"))
    assert found["f1", "mean"].value == pytest.approx((6 / 9 + 1 + 1) / 3)
    assert found["f1", "mean"].deviation == pytest.approx(np.std([6 / 9, 1, 1]))
    assert found["f1", "mean_nonempty"].value == pytest.approx((6 / 9 + 1) / 2)
    assert found["f1", "mean_nonempty"].tiles == 2
    assert found["precision", "pooled"].value == pytest.approx(4 / 5)
    assert found["recall", "pooled"].value == pytest.approx(4 / 6)
    assert found["iou", "pooled"].value == pytest.approx(4 / 7)
    assert found["iou", "pooled"].tiles == 3


# --- intervals -----------------------------------------------------------------------------------


def bootstrap(cases, samples=4000, confidence=0.9, seed=3):
    return Bootstrap(cases, samples=samples, confidence=confidence, seed=seed)


def test_the_interval_of_two_cases_is_between_them():
    """Of cases a and b a draw is aa, ab, ba or bb: a quarter each end, half in the middle."""
    cases = ["a", "b", "b"]
    found = metrics.summarise([1.0, 4.0, 10.0], bootstrap(cases))
    assert found.value == 5
    assert (found.low, found.high) == (1, 7), "a alone, b alone; never one tile of b alone"
    found = metrics.summarise([1.0, 4.0, 10.0], bootstrap(cases, confidence=0.4))
    assert (found.low, found.high) == (5, 5), "the middle half is a and b together"


def test_the_intervals_of_masks_by_hand():
    """Draws of two cases: a twice, b twice, or both; their pooled counts are added up here."""
    counts = [Confusion(3, 1, 2, 10), Confusion(1, 0, 4, 11), Confusion(0, 0, 0, 16)]
    found = metrics.aggregate(np.array(counts), bootstrap(["a", "b", "b"]))
    f1 = {"a": 6 / 9, "b": 2 / 6}
    assert found["f1", "pooled"].value == pytest.approx(8 / 15)
    assert (found["f1", "pooled"].low, found["f1", "pooled"].high) == pytest.approx(
        (f1["b"], f1["a"])
    )
    mean = found["f1", "mean"]
    assert (mean.low, mean.high) == pytest.approx((6 / 9, (2 / 6 + 1) / 2))
    nonempty = found["iou", "mean_nonempty"]
    assert (nonempty.low, nonempty.high) == pytest.approx((1 / 5, 3 / 6))


def test_a_draw_without_a_tile_that_counts_is_left_out():
    counts = [Confusion(3, 1, 2, 10), Confusion(0, 0, 0, 16)]
    found = metrics.aggregate(np.array(counts), bootstrap(["a", "b"]))["f1", "mean_nonempty"]
    assert (found.low, found.high) == pytest.approx((6 / 9, 6 / 9))
    found = metrics.summarise([20.0, float("inf")], bootstrap(["a", "b"]))
    assert (found.low, found.high) == (20, 20)


@pytest.mark.parametrize(("cases", "samples"), [(["a", "a"], 1000), (["a", "b"], 0)])
def test_no_interval_where_nothing_is_drawn(cases, samples):
    given = bootstrap(cases, samples=samples)
    assert metrics.summarise([1.0] * len(cases), given)[3:] == (None, None)
    counts = [Confusion(1, 2, 3, 4)] * len(cases)
    assert metrics.aggregate(np.array(counts), given)["f1", "pooled"][3:] == (None, None)
