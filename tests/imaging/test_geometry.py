import numpy as np
import pytest
import shapely

from hemera.imaging.geometry import (
    best_level,
    grid_positions,
    lattice_count,
    level_downsample,
    polygon_fraction,
    spread_lattice,
    tissue_fraction,
)


@pytest.mark.parametrize(
    ("full", "level", "expected"),
    [
        ((1164, 787), (582, 393), (2.0, 2.0)),  # a row dropped
        ((1164, 787), (146, 99), (8.0, 8.0)),  # padded
        ((1164, 787), (1164, 787), (1.0, 1.0)),
        ((1000, 601), (100, 75), (10.0, 601 / 75)),  # no whole factor explains both
        ((46000, 32914), (2875, 2057), (16.0, 16.0)),
    ],
)
def test_a_whole_factor_beats_the_ratio_of_sizes(full, level, expected):
    assert level_downsample(full, level) == pytest.approx(expected)


def test_best_level_is_the_next_finer():
    levels = [(1.0, 1.0), (2.0, 2.0), (8.0, 8.0)]
    assert [best_level(levels, scale) for scale in (0.5, 1, 1.99, 2, 7.9, 8, 30)] == [
        0, 0, 0, 1, 1, 2, 2,
    ]  # fmt: skip


def test_the_grid_drops_what_reaches_over_the_edge():
    corners = grid_positions(1300, 700, 300, 200)
    assert corners.tolist() == [
        [x, y] for y in (0, 200, 400) for x in (0, 200, 400, 600, 800, 1000)
    ]
    assert len(grid_positions(299, 700, 300, 300)) == 0


def test_fractional_sides_do_not_drift():
    side = 512 * 0.5 / 0.4603  # 556.16 level-0 pixels
    corners = grid_positions(20_000, 3_000, side, side)
    x = np.unique(corners[:, 0])
    assert len(x) == int(20_000 // side)
    assert np.abs(x - np.arange(len(x)) * side).max() <= 0.5
    assert (corners + side <= (20_000, 3_000)).all()


def test_tissue_fraction_is_an_exact_area(rng):
    outline = rng.random((13, 29)) < 0.4
    size = 29 * 7, 13 * 7
    corners = np.array([[0, 0], [3, 5], [100, 31], [170, 60], [190, 80]])
    side = 21.5
    # Each level-0 pixel cut in ten: what an exact area converges to.
    fine = np.kron(outline, np.ones((70, 70)))
    expected = []
    for x, y in corners:
        part = fine[y * 10 : int((y + side) * 10), x * 10 : int((x + side) * 10)]
        expected.append(part.sum() / (side * 10) ** 2)
    assert tissue_fraction(outline, size, corners, side) == pytest.approx(expected, abs=1e-9)


def lattice_of(function, step, size):
    nodes = (np.arange(lattice_count(step, size)) - 0.5) * step
    return function(*np.meshgrid(nodes, nodes))


def dense_of(function, size):
    centres = np.arange(size) + 0.5
    return function(*np.meshgrid(centres, centres))


def test_the_lattice_gives_an_affine_map_back_exactly():
    def affine(x, y):
        return 40 + 1.02 * x - 0.3 * y

    spread = spread_lattice(lattice_of(affine, 16, 200), 16, 200)
    assert np.abs(spread - dense_of(affine, 200)).max() < 1e-3


def test_the_lattice_follows_a_smooth_field_to_a_twentieth_of_a_pixel():
    # It stretches by up to a sixth, harder than what nonrigid registration gives.
    def along_x(x, y):
        return x + 25 * np.sin(x / 160 + y / 300)

    def along_y(x, y):
        return y + 20 * np.cos(x / 210 - y / 150)

    for bent in (along_x, along_y):
        spread = spread_lattice(lattice_of(bent, 16, 512), 16, 512)
        assert np.abs(spread - dense_of(bent, 512)).max() < 0.05


def test_polygon_fraction_is_an_exact_area_with_holes_and_overlaps():
    outer = [[0, 0], [100, 0], [100, 60], [0, 60]]
    holed = shapely.Polygon(outer, [[[20, 20], [40, 20], [40, 40], [20, 40]]])
    corners = np.array([[0, 0], [80, 40], [20, 20], [300, 300], [90, 0]])
    assert polygon_fraction([holed], corners, 40) == pytest.approx([0.75, 0.25, 0.75, 0, 0.25])
    # The same area twice is that area once.
    twice = [shapely.Polygon(outer)] * 2
    assert polygon_fraction(twice, corners, 40) == pytest.approx([1, 0.25, 1, 0, 0.25])


def test_a_ring_that_crosses_itself_encloses_both_its_loops():
    bow = shapely.Polygon([[0, 0], [40, 40], [40, 0], [0, 40]])
    assert polygon_fraction([bow], np.array([[0, 0]]), 40) == pytest.approx(0.5)
