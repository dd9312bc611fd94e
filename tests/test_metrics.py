import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from hemera import metrics
from hemera.metrics import Confusion


@pytest.fixture
def pair():
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 256, (41, 67, 3)).astype(np.uint8)
    noisy = truth + rng.normal(0, 30, truth.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8), truth


def test_psnr_equals_scikit_image(pair):
    assert metrics.psnr(*pair) == pytest.approx(
        peak_signal_noise_ratio(pair[1], pair[0], data_range=255), abs=1e-9
    )


def test_psnr_by_hand():
    truth = np.zeros((4, 6, 3), np.uint8)
    assert metrics.psnr(truth + 255, truth) == 0
    assert metrics.psnr(truth + 1, truth) == pytest.approx(48.1308, abs=1e-4)
    assert metrics.psnr(truth, truth) == float("inf")


def test_ssim_equals_scikit_image(pair):
    expected = structural_similarity(pair[0], pair[1], channel_axis=-1, data_range=255)
    assert metrics.ssim(*pair) == pytest.approx(expected, abs=1e-9)
    per_channel = [
        structural_similarity(pair[0][..., c], pair[1][..., c], data_range=255) for c in range(3)
    ]
    assert metrics.ssim(*pair) == pytest.approx(np.mean(per_channel), abs=1e-9)


def test_gaussian_ssim_equals_scikit_image(pair):
    expected = structural_similarity(
        pair[0], pair[1], channel_axis=-1, data_range=255, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False,
    )  # fmt: skip
    assert metrics.ssim(*pair, gaussian=True) == pytest.approx(expected, abs=1e-9)


def test_ssim_refuses_what_has_no_window(pair):
    with pytest.raises(ValueError, match="equal shapes, 7 px or more"):
        metrics.ssim(pair[0][:6], pair[1][:6])
    with pytest.raises(ValueError, match="equal shapes"):
        metrics.ssim(pair[0][:20], pair[1])


def test_network_output_is_truncated_not_rounded():
    values = np.array([-1.0, 0.0, 1.0, 0.999, -2, 2, 200.9 / 127.5 - 1])
    assert metrics.to_uint8(values).tolist() == [0, 127, 255, 254, 0, 255, 200]


def test_confusion_counts_by_hand():
    predicted = np.array([[1, 1, 0], [0, 0, 1]], bool)
    truth = np.array([[1, 0, 0], [1, 0, 1]], bool)
    assert metrics.confusion(predicted, truth) == Confusion(2, 1, 1, 2)
    with pytest.raises(ValueError, match="differ"):
        metrics.confusion(predicted, truth.T)


def test_scores_by_hand_and_their_conventions():
    assert metrics.scores(Confusion(3, 1, 2, 10)) == pytest.approx(
        {"precision": 3 / 4, "recall": 3 / 5, "f1": 6 / 9, "iou": 3 / 6}
    )
    assert set(metrics.scores(Confusion(0, 0, 0, 9)).values()) == {1.0}
    assert set(metrics.scores(Confusion(0, 4, 0, 9)).values()) == {0.0}
    assert set(metrics.scores(Confusion(0, 0, 4, 9)).values()) == {0.0}


def test_three_aggregations_by_hand():
    counts = [Confusion(3, 1, 2, 10), Confusion(0, 0, 0, 16), Confusion(1, 0, 0, 15)]
    found = metrics.aggregate(counts)
    assert found["f1", "mean"].value == pytest.approx((6 / 9 + 1 + 1) / 3)
    assert found["f1", "mean"].deviation == pytest.approx(np.std([6 / 9, 1, 1]))
    assert found["f1", "mean_nonempty"].value == pytest.approx((6 / 9 + 1) / 2)
    assert found["f1", "mean_nonempty"].tiles == 2
    assert found["precision", "pooled"].value == pytest.approx(4 / 5)
    assert found["recall", "pooled"].value == pytest.approx(4 / 6)
    assert found["iou", "pooled"].value == pytest.approx(4 / 7)
    assert found["iou", "pooled"].tiles == 3


def test_identities_between_the_metrics():
    rng = np.random.default_rng(3)
    counts = [Confusion(*map(int, rng.integers(0, 50, 4))) for _ in range(40)]
    found = metrics.aggregate(counts)
    precision, recall = (
        found["precision", "pooled"].value,
        found["recall", "pooled"].value,
    )
    f1 = found["f1", "pooled"].value
    assert f1 == pytest.approx(2 * precision * recall / (precision + recall))
    assert found["iou", "pooled"].value == pytest.approx(f1 / (2 - f1))
    for aggregation in ("mean", "mean_nonempty"):
        mean_f1 = found["f1", aggregation].value
        assert found["iou", aggregation].value >= mean_f1 / (2 - mean_f1)


def test_nothing_to_aggregate_is_none_not_a_number():
    found = metrics.aggregate([])
    assert found["f1", "mean"] == (None, None, 0)
    assert found["f1", "pooled"] == (None, None, 0)
    assert metrics.aggregate([Confusion(0, 0, 0, 5)])["f1", "mean_nonempty"] == (
        None,
        None,
        0,
    )


def test_infinite_values_are_left_out_of_a_mean():
    assert metrics.summarise([20.0, float("inf"), 24.0]) == (22.0, 2.0, 2)
