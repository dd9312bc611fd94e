"""Local quality between and beyond its squares, and as columns of a table."""

import math

import numpy as np
import pyarrow as pa
import pytest

from hemera import tables
from hemera.registration.local_quality import LocalQuality, expected_distance
from tests.small_registration import plain_errors

LOCAL = LocalQuality(
    centres_um=np.array([[100.0, 200.0], [150.0, 200.0], [100.0, 250.0]]),
    ncc=np.array([0.5, 0.3, 0.1]),
    best_shifted=np.array([0.4, 0.4, 0.4]),
    residuals_um=np.array([[3.0, 4.0], [0.0, 10.0], [20.0, 0.0]]),
    spread_um=np.array([1.0, 2.0, 3.0]),
    side_um=100.0,
    step_um=50.0,
)
EMPTY = LocalQuality(
    np.zeros((0, 2)), np.zeros(0), np.zeros(0), np.zeros((0, 2)), np.zeros(0), 1.0, 1.0
)


@pytest.fixture(autouse=True)
def _plain(monkeypatch):
    plain_errors(monkeypatch)


@pytest.mark.parametrize(
    ("point", "error_um", "ncc"),
    [
        # On a centre; a quarter of the way between two; with one of four missing.
        ((100, 200), 5, 0.5),
        ((112.5, 200), 0.75 * 5 + 0.25 * 10, 0.45),
        ((125, 225), (5 + 10 + 20) / 3, 0.3),
        # 45 um left of a centre, within its square, where there is no neighbour.
        ((51, 200), 5, 0.5),
        ((190, 160), 10, 0.3),
    ],
)
def test_it_is_bilinear_and_reaches_to_the_edge_of_the_squares(point, error_um, ncc):
    found = {name: values[0] for name, values in LOCAL.at([point]).items()}
    errors = {"error_um": error_um, "error_low_um": error_um / 4, "error_high_um": 2 * error_um}
    assert found == pytest.approx({**errors, "ncc": ncc, "margin": ncc - 0.4})


def test_beyond_every_square_there_is_no_value():
    for local in (LOCAL, EMPTY):
        assert all(math.isnan(values[0]) for values in local.at([[400.0, 200.0]]).values())


@pytest.mark.parametrize("local", [LOCAL, EMPTY])
def test_a_table_holds_it(local, tmp_path):
    path = tmp_path / "quality.parquet"
    tables.write(path, pa.table(local.to_columns("p1")), tables.QUALITY)
    table = tables.read(path, tables.QUALITY)
    assert set(table.column("pair").to_pylist()) <= {"p1"}
    again = LocalQuality.from_columns(table.to_pydict())
    for name, values in vars(local).items():
        np.testing.assert_array_equal(getattr(again, name), values)


class TestRegions:
    """A grid of 12 x 9 squares, 50 um apart, with a number in each that decides where it is ok."""

    def local(self, ok):
        rows, columns = np.nonzero(np.ones_like(ok))
        centres = np.stack([columns, rows], axis=-1) * 50.0 + 100
        ncc = np.where(ok[rows, columns], 0.6, 0.3 - 0.01 * rows)
        residuals = np.stack([np.where(ok[rows, columns], 1.0, 30.0 + columns), 0 * ncc], axis=-1)
        best = np.full(len(ncc), 0.4)
        return LocalQuality(centres, ncc, best, residuals, 0 * ncc, 100.0, 50.0)

    def test_neighbours_that_fail_together_are_one(self):
        ok = np.ones((9, 12), bool)
        ok[:, 7:] = False
        # One of them matches by chance.
        ok[4, 10] = True
        local = self.local(ok)
        regions = local.regions.reshape(9, 12)
        assert set(np.unique(regions)) == {0, 1}
        assert (regions[:, 7:] == 1).all()
        assert (regions[:, :6] == 0).all()
        # The tile on that square, and one at the edge, have the worst values of the region.
        for point in ((600, 300), (475, 300)):
            found = {name: values[0] for name, values in local.at([point]).items()}
            # The least residual is that of the square that matches.
            errors = {"error_um": 41, "error_low_um": 0.25, "error_high_um": 82}
            assert found == pytest.approx({**errors, "ncc": 0.22, "margin": -0.18})
        assert local.at([(150, 300)])["error_um"] == pytest.approx(1)

    def test_single_squares_are_none(self):
        ok = np.random.default_rng(0).random((9, 12)) < 0.7
        assert not self.local(ok).regions.any()
        assert len(EMPTY.regions) == 0

    def failing(self, x, y):
        centres = np.stack([np.ravel(axis) for axis in np.meshgrid(x, y)], axis=-1) * 1.0
        count = len(centres)
        ncc, best, residuals = np.full(count, 0.1), np.full(count, 0.4), np.full((count, 2), 20.0)
        return LocalQuality(centres, ncc, best, residuals, ncc, 100.0, 50.0)

    def test_pieces_with_a_gap_between_them_are_no_neighbours(self):
        """Three squares that fail on each of two pieces of tissue."""
        assert (self.failing([100, 150], [100, 150, 200]).regions == 1).all()
        assert not self.failing([100, 550], [100, 150, 200]).regions.any()

    def test_the_last_squares_of_an_axis_are_their_own(self):
        """They are at the end of the image, 15 um from the ones before."""
        assert (self.failing([150, 165], [100, 150]).regions == 1).all()


class TestExpectedDistance:
    """On shifts of -5 to 5 by -3 to 3."""

    LENGTHS = np.hypot(*np.meshgrid(np.arange(-5, 6), np.arange(-3, 4)))

    def correlations(self, *peaks, height=0.9):
        found = np.zeros((7, 11))
        for dx, dy in peaks:
            found[3 + dy, 5 + dx] = height
        return found

    def test_a_peak_is_where_it_is(self):
        assert expected_distance(self.correlations((0, 0)), self.LENGTHS) < 1e-6
        assert expected_distance(self.correlations((3, -2)), self.LENGTHS) == pytest.approx(13**0.5)

    def test_equal_peaks_are_averaged(self):
        found = expected_distance(self.correlations((0, 0), (4, 3)), self.LENGTHS)
        assert found == pytest.approx(2.5)

    def test_without_a_peak_any_shift_is_as_probable(self):
        # Negative correlations are no matches.
        for flat in (0 * self.LENGTHS, np.full_like(self.LENGTHS, -0.5)):
            assert expected_distance(flat, self.LENGTHS) == pytest.approx(self.LENGTHS.mean())

    def test_the_likelihood_is_that_of_80_values(self):
        # One peak of .2 in place: (1 - .04)^-40 times as probable as each of the others.
        factor = 0.96**-40
        expected = self.LENGTHS.sum() / (76 + factor)
        found = expected_distance(self.correlations((0, 0), height=0.2), self.LENGTHS)
        assert found == pytest.approx(expected)
