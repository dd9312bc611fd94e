"""Metrics of status and score: against scikit-learn, published tables, and simulations."""

import numpy as np
import pytest

from hemera.evaluation import classification as own


@pytest.fixture
def ties():
    """200 cases whose probabilities have many ties."""
    draws = np.random.default_rng(7)
    truth = draws.random(200) < 0.4
    score = np.round(np.clip(0.35 * truth + draws.normal(0.4, 0.3, 200), 0, 1), 1)
    return truth, score


def ones(values):
    return np.ones((1, len(values)))


def test_metrics_are_scikit_learns_on_200_cases_with_ties(ties):
    metrics = pytest.importorskip("sklearn.metrics")
    truth, score = ties
    predicted = score >= 0.5
    found = own.status_metrics(
        truth, predicted, {"probability": score, "calibrated": score**2}, ones(truth), 0.9
    )
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        truth, predicted, average="weighted", zero_division=0
    )
    false, hit, _ = metrics.roc_curve(truth, score, drop_intermediate=False)
    expected = {
        "auc": metrics.roc_auc_score(truth, score),
        "average_precision": metrics.average_precision_score(truth, score),
        "accuracy": metrics.accuracy_score(truth, predicted),
        "balanced_accuracy": metrics.balanced_accuracy_score(truth, predicted),
        "sensitivity": metrics.recall_score(truth, predicted),
        "specificity": metrics.recall_score(~truth, ~predicted),
        "f1": metrics.f1_score(truth, predicted),
        "precision_weighted": precision,
        "recall_weighted": recall,
        "f1_weighted": f1,
        "brier": metrics.brier_score_loss(truth, score),
        "brier_calibrated": metrics.brier_score_loss(truth, score**2),
        "specificity_at_sensitivity": 1 - false[hit >= 0.9].min(),
    }
    assert {name: float(value[0]) for name, value in found.items()} == pytest.approx(expected)


def test_scores_are_scikit_learns(rng):
    metrics = pytest.importorskip("sklearn.metrics")
    truth = rng.integers(0, 4, 200)
    predicted = np.clip(truth + rng.integers(-1, 3, 200), 0, 3)
    found = own.ordinal(truth, predicted, ones(truth))
    assert float(found["accuracy"][0]) == pytest.approx(metrics.accuracy_score(truth, predicted))
    kappa = metrics.cohen_kappa_score(truth, predicted, weights="quadratic")
    assert float(found["qwk"][0]) == pytest.approx(kappa)
    error = metrics.mean_absolute_error(truth, predicted)
    assert float(found["mean_absolute_error"][0]) == pytest.approx(error)
    assert float(own.ordinal(truth, np.full(200, 2), ones(truth))["qwk"][0]) == pytest.approx(0)


def test_weights_are_repetitions(ties):
    truth, score = ties
    weights = np.random.default_rng(1).integers(0, 3, (1, 200)).astype(float)
    repeated = np.repeat(np.arange(200), weights[0].astype(int))
    values = {"probability": score, "calibrated": score}
    once = own.status_metrics(truth, score >= 0.5, values, weights, 0.9)
    many = own.status_metrics(
        truth[repeated], score[repeated] >= 0.5,
        {name: value[repeated] for name, value in values.items()}, ones(repeated), 0.9,
    )  # fmt: skip
    assert {name: float(value[0]) for name, value in once.items()} == pytest.approx(
        {name: float(value[0]) for name, value in many.items()}
    )


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        # Oliveira et al., Table 3: 8 cases of HER2SC, 54 of BRCA.
        ((5, 1, 0, 2), (0.833, 0.896, 0.875, 0.868)),
        ((14, 37, 0, 3), (0.5375, 0.812, 0.315, 0.215)),
    ],
)
def test_published_tables_are_support_weighted(counts, expected):
    tp, fp, fn, tn = counts
    truth = np.repeat([True, False, True, False], (tp, fp, fn, tn))
    predicted = np.repeat([True, True, False, False], (tp, fp, fn, tn))
    found = own.decisions(truth, predicted, ones(truth))
    names = ("balanced_accuracy", "precision_weighted", "recall_weighted", "f1_weighted")
    assert [float(found[name][0]) for name in names] == pytest.approx(expected, abs=6e-4)


def test_one_class_gives_undefined_values_and_no_crash():
    truth = np.ones(5, bool)
    score = np.linspace(0, 1, 5)
    values = {"probability": score, "calibrated": score}
    found = own.status_metrics(truth, score > 0.5, values, ones(truth), 0.9)
    assert np.isnan(found["auc"][0]) and np.isnan(found["balanced_accuracy"][0])
    assert np.isnan(found["specificity_at_sensitivity"][0])
    assert own.interval(found["auc"], found["auc"], 0.95).value is None
    assert own.calibration_line(truth, score) == (None, None)


def test_a_calibrated_logit_has_slope_1_and_no_error(rng):
    logit = rng.normal(0, 2, 40_000)
    probability = 1 / (1 + np.exp(-logit))
    truth = rng.random(40_000) < probability
    assert own.calibration_line(truth, logit) == pytest.approx((1, 0), abs=0.05)
    assert own.calibration_line(truth, 2 * logit + 1) == pytest.approx((0.5, -0.5), abs=0.05)
    assert own.calibration_error(truth, probability, 10) < 0.01
    assert own.calibration_error(truth, np.full(40_000, 0.9), 10) == pytest.approx(0.4, abs=0.02)


def test_separated_classes_have_no_calibration_line():
    truth = np.array([False, False, True, True])
    assert own.calibration_line(truth, np.array([-2.0, -1.0, 1.0, 3.0])) == (None, None)


def test_net_benefit_of_treating_all():
    truth = np.repeat([True, False], (30, 70))
    everyone = np.ones(100)
    assert own.net_benefit(truth, everyone, 0.2) == pytest.approx(0.3 - 0.7 * 0.25)
    assert own.net_benefit(truth, np.zeros(100), 0.2) == 0


def test_cramers_v():
    assert own.cramers_v(np.array([[10, 0], [0, 10]])) == pytest.approx(1)
    assert own.cramers_v(np.array([[10, 20], [5, 10]])) == pytest.approx(0)
    # chi^2 = 40 (24 * 14 - 1 * 1)^2 / (25 * 15 * 25 * 15)
    expected = (40 * (24 * 14 - 1) ** 2 / (25 * 15 * 25 * 15) / 40) ** 0.5
    assert own.cramers_v(np.array([[24, 1], [1, 14]])) == pytest.approx(expected)
    assert own.cramers_v(np.array([[10, 5]])) is None


def test_bootstrap_samples_keep_the_number_of_each_class(ties):
    truth, _ = ties
    weights = own.resample(truth, 50, 3)
    assert (weights[:, truth].sum(1) == truth.sum()).all()
    assert (weights[:, ~truth].sum(1) == (~truth).sum()).all()
    assert np.array_equal(weights, own.resample(truth, 50, 3))


@pytest.mark.slow
def test_intervals_cover_the_true_auc():
    """2,000 simulations of 60 positive and 90 negative cases, as HEROHE's test split has them."""
    draws = np.random.default_rng(11)
    truth = np.repeat([True, False], (60, 90))
    # Two normal distributions a distance d apart have an AUC of Phi(d / sqrt 2) = .75.
    distance = 0.674489750196 * 2**0.5
    inside = 0
    for repeat in range(2000):
        score = draws.normal(0, 1, 150) + distance * truth
        weights = own.resample(truth, 400, repeat)
        low, high = np.quantile(own.auc(truth, score, weights), (0.025, 0.975))
        inside += bool(low <= 0.75 <= high)
    assert 0.93 <= inside / 2000 <= 0.97


def test_auc_within_sites_by_hand():
    """Site a: 1 of 2 pairs in order; b: 3 of 3; c has no pair. Between sites all are wrong."""
    site = np.array(list("aaabbbbc"))
    truth = np.array([1, 0, 0, 1, 1, 1, 0, 1], bool)
    score = np.array([0.5, 0.4, 0.6, 0.2, 0.25, 0.3, 0.1, 0.0])
    weights = np.stack([np.ones(8), [1, 1, 1, 0, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1, 0, 1]])
    found = own.auc_within_sites(truth, score, weights, site)
    assert found[:2] == pytest.approx([4 / 5, 1 / 2])
    assert np.isnan(found[2])
