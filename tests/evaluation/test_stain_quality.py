import numpy as np
import pytest

from hemera.config import MaskOptions
from hemera.evaluation import stain_quality
from hemera.evaluation.stain_quality import FIGURES, tile_sums
from tests.small_index import draw_tile

DAB = np.array([0.27, 0.57, 0.78])
EVERYWHERE = np.ones((64, 96), np.bool_)


def stained(density):
    """DAB of a density (H, W) over white; the transmission of its vector in each channel."""
    return np.rint(255 * 10 ** (-np.asarray(density)[..., None] * DAB)).astype(np.uint8)


def bars(shift=0, density=0.5):
    """Bars of 6 px every 48, moved to the right."""
    columns = (np.arange(96) - shift) % 48
    return stained(np.broadcast_to(np.where(columns < 6, density, 0.0), (64, 96)))


def figures(image, real, positive=EVERYWHERE, valid=EVERYWHERE):
    sums = tile_sums(image, real, positive, valid)
    return {name: float(figure(sums)) for name, figure in FIGURES.items()}


def test_an_equal_image_has_every_figure_of_the_real_one():
    found = figures(bars(), bars())
    ones = ("dab_r", "dab_concordance", "dab_ratio", "brown_dice", "brown_recall")
    assert {name: found[name] for name in ones} == pytest.approx(dict.fromkeys(ones, 1), abs=1e-6)
    assert found["dab_kl"] == 0


def test_brown_pixels_count_within_a_distance():
    """Bars of 6 px are 4 px apart, so that 2 of 6 coincide; of 20 px apart, none."""
    near, far = figures(bars(4), bars()), figures(bars(20), bars())
    assert near["brown_recall"] == near["brown_dice"] == pytest.approx(2 / 6)
    assert near["brown_recall_8"] == near["brown_dice_8"] == 1
    assert far["brown_recall"] == far["brown_recall_8"] == 0
    assert far["brown_recall_32"] == far["brown_dice_32"] == 1


def test_precision_differs_from_recall_and_distances_end_where_stated():
    """Of two bars 48 px apart one is real. Shifted by 13 px, one of 6 columns is 8 px away."""
    one = bars()
    one[:, 24:] = stained(np.zeros((64, 72)))
    found = figures(bars(), one)
    assert (found["brown_recall_8"], found["brown_dice_8"]) == pytest.approx((1, 2 / 3))
    assert (found["brown_precision"], found["brown_precision_8"]) == (0.5, 0.5)
    found = figures(one, bars())
    assert (found["brown_precision"], found["brown_recall"]) == (1, 0.5)
    found = figures(bars(13), bars())
    assert found["brown_recall_8"] == found["brown_dice_8"] == pytest.approx(1 / 6)
    assert (found["brown_precision"], found["brown_precision_8"]) == pytest.approx((0, 1 / 6))


def test_divergence_of_the_generated_from_the_real_histogram_by_formula():
    """Half of the real pixels have DAB and a quarter of the generated ones; half added to bins."""
    rows = [np.where(np.arange(96) < width, 0.5, 0.0) for width in (24, 48)]
    generated, real_image = (stained(np.broadcast_to(row, (64, 96))) for row in rows)
    found = figures(generated, real_image)["dab_kl"]
    count, total = 64 * 96, 64 * 96 + stain_quality.BINS / 2
    real = (count / 2 + 0.5) / total
    with_dab, without = ((count * part + 0.5) / total for part in (0.25, 0.75))
    expected = real * np.log(real / with_dab) + real * np.log(real / without)
    assert found == pytest.approx(expected, rel=1e-6)


def test_figures_of_density_by_formula():
    """Half the density in the same places: r is 1, the ratio a half, the concordance lower."""
    found = figures(bars(density=0.25), bars())
    assert found["dab_r"] == pytest.approx(1, abs=1e-3)
    assert (found["dab_ratio"], found["brown_ratio"]) == pytest.approx((0.5, 0.5), abs=0.01)
    # Of a fraction f of the pixels: var = f (1 - f) d^2, means f d; here d is 1/2 and 1/4.
    f = 1 / 8
    spread = f * (1 - f)
    expected = 2 * spread / 8 / (spread * (1 / 4 + 1 / 16) + (f / 4) ** 2)
    assert found["dab_concordance"] == pytest.approx(expected, abs=0.01)


def test_gray_is_not_brown_and_one_colour_has_no_correlation():
    gray = np.full((64, 96, 3), 100, np.uint8)
    found = figures(gray, bars())
    assert np.isnan(found["dab_r"]) and found["dab_concordance"] == pytest.approx(0, abs=1e-9)
    assert found["brown_recall_32"] == found["brown_dice"] == found["brown_ratio"] == 0
    assert np.isnan(found["brown_precision"]) and np.isnan(found["brown_precision_32"])
    assert found["dab_ratio"] > 1, "gray has a DAB density"
    assert found["dab_kl"] > 1


def test_red_minus_blue_on_and_off_the_positive_pixels_that_count():
    image = np.zeros((64, 96, 3), np.uint8)
    image[:, :48], image[:, 48:] = (90, 0, 40), (10, 0, 30)
    positive, valid = np.arange(96) < 48, np.arange(96) >= 24
    found = figures(image, bars(), *(np.broadcast_to(each, (64, 96)) for each in (positive, valid)))
    assert (found["red_positive"], found["red_other"]) == (50, -20)
    assert tile_sums(image, bars(), ~EVERYWHERE, EVERYWHERE)[-2 * stain_quality.BINS :].sum() == (
        2 * EVERYWHERE.size
    )


def test_tiles_are_pooled_and_correlated_by_their_means():
    rng = np.random.default_rng(0)
    pairs = [
        [stained(np.full((64, 96), level) + rng.random((64, 96)) * 0.1) for level in levels]
        for levels in ((0.1, 0.2), (0.4, 0.3), (0.2, 0.5))
    ]
    sums = np.stack([tile_sums(*pair, EVERYWHERE, EVERYWHERE) for pair in pairs])
    vector = np.linalg.inv([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], DAB])[:, 2]
    x, y = (
        np.stack([(-np.log10(pair[i] / 255) @ vector).clip(0) for pair in pairs]) for i in (0, 1)
    )
    assert FIGURES["dab_r"](sums.sum(0)) == pytest.approx(
        np.corrcoef(x.ravel(), y.ravel())[0, 1], abs=1e-5
    )
    r = stain_quality.correlation(stain_quality.tile_moments(sums).sum(0))
    expected = np.corrcoef(x.mean((1, 2)), y.mean((1, 2)))[0, 1]
    assert r == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"engines": {"deepliif": {}}}])
def test_cells_of_an_equal_image_are_equal_and_an_unstained_one_has_none(options):
    _, real, _ = draw_tile(3)
    cells = stain_quality.CellComparison(
        {"case": ["tile"]},
        lambda tile: (real, np.ones(real.shape[:2], np.bool_)),
        MaskOptions(**options),
    )
    _, unstained, _ = draw_tile(4)
    unstained[(unstained[..., 0] > unstained[..., 2].astype(int))] = (236, 232, 230)
    valid = np.ones(real.shape[:2], np.bool_)
    found = cells.compare({"same": real, "none": unstained}, real, valid, "case", 0.5)
    same, none = found["same"], found["none"]
    assert same["cells"] == same["cells_real"] and same["positive_cells"] >= 5
    assert same["matched_cells"] == same["positive_cells"] == same["positive_cells_real"]
    assert none["positive_cells"] == none["matched_cells"] == 0 < sum(none["cells"])
    assert cells.compare({}, real, valid, "case", 0.5) == {}


def test_cells_are_found_with_the_options_of_the_cohort():
    """No membrane has an optical density of 2, so that no cell is positive."""
    _, real, _ = draw_tile(3)
    valid = np.ones(real.shape[:2], np.bool_)
    counts = []
    for options in (MaskOptions(), MaskOptions(dab_weak=2.0, dab_moderate=2.1, dab_strong=2.2)):
        cells = stain_quality.CellComparison(
            {"case": ["tile"]}, lambda tile: (real, valid), options
        )
        counts.append(cells.compare({"x": real}, real, valid, "case", 0.5)["x"]["positive_cells"])
    assert counts[0] >= 5 and counts[1] == 0
