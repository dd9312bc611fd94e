"""Local quality between and beyond its squares, and as columns of a table."""

import math

import numpy as np
import pyarrow as pa
import pytest

from hemera import tables
from hemera.registration.local_quality import LocalQuality

LOCAL = LocalQuality(
    centres_um=np.array([[100.0, 200.0], [150.0, 200.0], [100.0, 250.0]]),
    ncc=np.array([0.5, 0.3, 0.1]),
    best_shifted=np.array([0.4, 0.4, 0.4]),
    residuals_um=np.array([[3.0, 4.0], [0.0, 10.0], [20.0, 0.0]]),
    side_um=100.0,
    step_um=50.0,
)
EMPTY = LocalQuality(np.zeros((0, 2)), np.zeros(0), np.zeros(0), np.zeros((0, 2)), 1.0, 1.0)


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
    assert found == pytest.approx({"error_um": error_um, "ncc": ncc, "margin": ncc - 0.4})


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
        return LocalQuality(centres, ncc, np.full(len(ncc), 0.4), residuals, 100.0, 50.0)

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
            assert found == pytest.approx({"error_um": 41, "ncc": 0.22, "margin": -0.18})
        assert local.at([(150, 300)])["error_um"] == pytest.approx(1)

    def test_single_squares_are_none(self):
        ok = np.random.default_rng(0).random((9, 12)) < 0.7
        assert not self.local(ok).regions.any()
        assert len(EMPTY.regions) == 0
