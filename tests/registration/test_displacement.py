"""The answer is the field: every map is made from a formula and held against it."""

import math

import cv2
import numpy as np
import pytest

from hemera.errors import RegistrationError
from hemera.registration import displacement as dp
from tests.small_displacements import field_of

WIDTH, HEIGHT, MPP = 61, 43, 8.0


def similarity(points, *, angle_deg=137.0, scale=1.07, shift=(900.0, -250.0)):
    a = math.radians(angle_deg)
    matrix = scale * np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
    return points @ matrix.T + shift


def elastic(points):
    """A smooth bend whose wavelength is many nodes."""
    x, y = points[..., 0], points[..., 1]
    dx = 60 + 9 * np.sin(y / 90) + 4 * np.cos(x / 70)
    dy = -35 + 7 * np.sin(x / 80 + y / 150)
    return points + np.stack([dx, dy], axis=-1)


def made(function, width=WIDTH, height=HEIGHT):
    return field_of(function, width, height, MPP)


def inside(count=400, seed=3, margin=0.0):
    rng = np.random.default_rng(seed)
    low = np.full(2, margin)
    return rng.uniform(low, np.array([WIDTH * MPP, HEIGHT * MPP]) - low, (count, 2))


class TestDisplacement:
    @pytest.mark.parametrize(
        ("vectors", "mpp", "words"),
        [
            *(
                (np.zeros(shape, np.float32), 1.0, "shape")
                for shape in [(4, 5), (4, 5, 3), (0, 5, 2)]
            ),
            *((np.zeros((4, 5, 2), np.float32), mpp, "mpp") for mpp in (0.0, math.nan, math.inf)),
            (np.full((4, 5, 2), math.nan, np.float32), 1.0, "not finite"),
            (np.full((4, 5, 2), 1e30, np.float32), 1.0, "beyond any slide"),
        ],
    )
    def test_impossible_values_are_refused(self, vectors, mpp, words):
        with pytest.raises(RegistrationError, match=words):
            dp.Displacement(vectors, mpp)

    def test_registered_slides_meet_in_micrometres_and_alike_ones_in_pixels(self):
        sizes = (2000, 1400), (1100, 800)
        points_px = np.array([[0.0, 0.0], [2000.0, 1400.0], [310.5, 77.25]])
        d = dp.of_registered(sizes[0], 0.25, sizes[1], 0.5)
        np.testing.assert_allclose(dp.map_points(d, points_px * 0.25) / 0.5, points_px / 2)
        # 0.2501 and 0.25 is the same scanner: no drift of 0.8 px over the slide.
        d = dp.of_registered(sizes[0], 0.25, sizes[0], 0.2501)
        np.testing.assert_allclose(
            dp.map_points(d, points_px * 0.25) / 0.2501, points_px, atol=1e-4
        )

    def test_registered_and_mirrored(self):
        """Column x of H&E is column width - x of HER2, wherever H&E itself ends."""
        d = dp.of_registered((2000, 1400), 0.25, (1100, 800), 0.5, mirror=True)
        there = dp.map_points(d, np.array([[0.0, 30.0], [600.0, 1400.0]]) * 0.25) / 0.5
        np.testing.assert_allclose(there, [[1100.0, 15.0], [800.0, 700.0]], atol=1e-4)
        assert d.affine.determinant == pytest.approx(-1)


class TestMapPoints:
    def test_between_nodes_it_is_bilinear(self):
        vectors = np.zeros((2, 2, 2), np.float32)
        vectors[0, 1, 0], vectors[1, 0, 1], vectors[1, 1, 0] = 8, 16, 4
        d = dp.Displacement(vectors, 10.0)
        # A quarter along x, a half along y: by hand.
        np.testing.assert_allclose(
            dp.map_points(d, [[7.5, 10.0]]),
            [[7.5 + 0.5 * 0.25 * 8 + 0.5 * 0.25 * 4, 10.0 + 6.0]],
        )

    def test_an_affine_map_is_exact_up_to_the_edge_of_the_slide_and_beyond(self):
        d = made(similarity)
        corners = [[0, 0], [WIDTH * MPP, 0], [0, HEIGHT * MPP], [WIDTH * MPP, HEIGHT * MPP]]
        points = np.concatenate([inside(), np.array(corners), [[-300.0, 900.0]]])
        np.testing.assert_allclose(dp.map_points(d, points), similarity(points), atol=2e-3)

    def test_a_bent_map_is_exact_to_what_bilinear_interpolation_can(self):
        points = inside(margin=MPP / 2)
        # The second derivative bounds it: 9 / 90**2 + ... um per um^2, times MPP**2 / 8.
        bound = MPP**2 / 8 * (9 / 90**2 + 4 / 70**2 + 7 / 80**2 * 3)
        error = np.abs(dp.map_points(made(elastic), points) - elastic(points)).max()
        assert error < bound

    def test_a_grid_is_mapped_as_its_points_are(self):
        d = made(elastic)
        grid = dp.map_grid(d, 13.0, -7.0, 2.5, 31, 17)
        x = 13.0 + (np.arange(31) + 0.5) * 2.5
        y = -7.0 + (np.arange(17) + 0.5) * 2.5
        assert grid.shape == (17, 31, 2)
        points = np.stack(np.meshgrid(x, y), axis=-1)
        expected = dp.map_points(d, points.reshape(-1, 2)).reshape(points.shape)
        np.testing.assert_allclose(grid, expected, atol=1e-9)

    @pytest.mark.parametrize("corner", [(40.0, 60.0), (-31.0, -17.0), (1e4, 2e4)])
    def test_a_tile_is_mapped_exactly_however_rough_the_map(self, corner):
        """An engine's field is rough from node to node: nothing may be interpolated over that."""
        rng = np.random.default_rng(4)
        rough = rng.normal(5e4, 30, (57, 73, 2)).astype(np.float32)
        d = dp.Displacement(rough, 4.0)
        origin, found = dp.map_tile(d, *corner, 0.92, 128)
        x, y = (low + (np.arange(128) + 0.5) * 0.92 for low in corner)
        points = np.stack(np.meshgrid(x, y), axis=-1)
        expected = dp.map_points(d, points.reshape(-1, 2)).reshape(points.shape)
        assert found.dtype == np.float32
        assert np.abs(origin + found - expected).max() < 1e-3

    @pytest.mark.parametrize("shape", [(1, 1, 2), (1, 7, 2), (7, 1, 2)])
    def test_a_grid_of_one_row_or_column_is_a_shift_across_it(self, shape):
        d = dp.Displacement(np.full(shape, (3.0, -2.0), np.float32), 5.0)
        np.testing.assert_allclose(dp.map_points(d, [[100.0, -40.0]]), [[103.0, -42.0]])


class TestInverse:
    @pytest.mark.parametrize("mirror", [False, True])
    @pytest.mark.parametrize("function", [similarity, elastic, lambda p: elastic(similarity(p))])
    def test_forth_and_back_ends_where_it_began(self, function, mirror):
        d = dp.mirrored(made(function), 700.0) if mirror else made(function)
        points = inside()
        back = dp.inverse_points(d, dp.map_points(d, points), tolerance_um=0.008)
        # 0.1 px of the finest slides there are is 0.02 um.
        assert np.abs(back - points).max() < 0.02

    def test_a_point_without_a_partner_is_not_invented(self):
        # The map folds back on itself: nothing lands right of x = 300.
        def fold(points):
            result = points.copy()
            result[..., 0] = 300 - np.abs(points[..., 0] - 240)
            return result

        d = made(fold)
        # Beyond the grid the affine part goes on for ever, so only the far side is out of reach.
        d.__dict__["affine"] = dp.Affine(np.eye(2), np.zeros(2))
        found = dp.inverse_points(d, [[290.0, 100.0], [320.0, 100.0]], tolerance_um=0.01)
        assert np.isfinite(found[0]).all()
        assert not 0 <= found[1, 0] <= WIDTH * MPP

    def test_every_point_of_the_slide_is_found_again_where_the_map_folds(self):
        rng = np.random.default_rng(0)
        rough = cv2.GaussianBlur(rng.normal(size=(60, 80, 2)).astype(np.float32), (0, 0), 4)
        d = dp.Displacement(rough * np.float32(3 * MPP) / rough.std() + np.float32(30), MPP)
        assert 0.003 < dp.folding_fraction(d) < 0.05, "or the test shows nothing"
        partners = dp.map_points(d, rng.uniform(0, 1, (20_000, 2)) * (80 * MPP, 60 * MPP))
        back = dp.inverse_points(d, partners, tolerance_um=0.01)
        assert np.linalg.norm(dp.map_points(d, back) - partners, axis=1).max() <= 0.01

    def test_a_flat_map_is_refused(self):
        d = made(lambda p: np.stack([p[..., 0], np.zeros_like(p[..., 0])], axis=-1))
        with pytest.raises(RegistrationError, match="cannot be inverted"):
            dp.inverse_points(d, [[1.0, 1.0]], tolerance_um=0.01)


def test_a_mirrored_map_leads_to_the_mirrored_place_and_keeps_the_angle():
    points = inside()
    d = dp.mirrored(made(similarity), 700.0)
    expected = similarity(points) * (-1, 1) + (700.0, 0)
    np.testing.assert_allclose(dp.map_points(d, points), expected, atol=2e-3)
    assert d.affine.determinant == pytest.approx(-(1.07**2), rel=1e-4)
    assert d.affine.rotation_deg == pytest.approx(137, abs=0.01)


class TestCoarsen:
    def test_it_is_coarsened_as_far_as_the_tolerance_allows(self):
        d = made(elastic)
        points = dp.node_points(d).reshape(-1, 2)
        coarse = dp.coarsen(d, 0.5)
        assert coarse.mpp > d.mpp
        moved = dp.map_points(coarse, points) - dp.map_points(d, points)
        assert np.abs(moved).max() <= 0.5
        assert dp.coarsen(d, 1e-6) is d

    def test_an_affine_map_is_coarsened_all_the_way(self):
        coarse = dp.coarsen(made(similarity, width=200, height=130), 0.01)
        assert coarse.mpp == MPP * 32
        np.testing.assert_allclose(dp.map_points(coarse, inside()), similarity(inside()), atol=0.01)


class TestJacobian:
    def test_the_folded_share_is_counted(self):
        # x turns back between 160 and 240 um: nodes 20 to 29 of 61.
        def fold(points):
            result = points.copy()
            x = points[..., 0]
            result[..., 0] = np.where(x < 160, x, np.where(x < 240, 320 - x, x - 160))
            return result

        d = made(fold)
        determinant = dp.jacobian_determinant(d)
        assert determinant[5, 25] == pytest.approx(-1)
        assert dp.folding_fraction(d) == pytest.approx(10 / WIDTH, abs=2 / WIDTH)
        mask = np.zeros((HEIGHT, WIDTH), bool)
        mask[:, 40:] = True
        assert dp.folding_fraction(d, mask) == 0.0

    def test_a_box_counts_as_the_whole_does_there(self):
        rng = np.random.default_rng(5)
        d = dp.Displacement(rng.normal(0, 9, (HEIGHT, WIDTH, 2)).astype(np.float32), MPP)
        folded = dp.jacobian_determinant(d) <= 0
        box = (11 * MPP, 7 * MPP, 29 * MPP, 33 * MPP)
        expected = folded[6:34, 10:30].mean()
        assert dp.folding_fraction_in(d, box) == pytest.approx(expected)
        assert 0 < expected < 1


class TestAffine:
    def test_a_similarity_is_recognised(self):
        stretched = made(lambda p: p * (1.5, 0.9)).affine
        assert stretched.anisotropy == pytest.approx(1.5 / 0.9, rel=1e-4)
        affine = made(similarity).affine
        assert affine.scale == pytest.approx(1.07, rel=1e-4)
        assert affine.rotation_deg == pytest.approx(137, abs=0.01)
        assert affine.anisotropy == pytest.approx(1, abs=1e-3)
        assert affine.determinant > 0
        np.testing.assert_allclose(affine.offset_um, (900, -250), atol=0.05)

    def test_only_the_mask_counts(self):
        vectors = made(similarity).vectors_um.copy()
        vectors[:, :20] = 999
        mask = np.zeros(vectors.shape[:2], bool)
        mask[:, 20:] = True
        affine = dp.fit_affine(dp.Displacement(vectors, MPP), mask)
        assert affine.rotation_deg == pytest.approx(137, abs=0.01)


def test_the_field_of_an_engine_maps_as_the_formula_does():
    """Two unequal slides, each padded to a common canvas of 413 x 330 px."""
    x, y = np.meshgrid(np.arange(413) + 0.5, np.arange(330) + 0.5)
    canvas = np.stack([x, y], axis=-1)
    partner = similarity((canvas - (5, 21)) * 0.92) / 0.92 + (26, 0)
    field = (partner - canvas).transpose(2, 0, 1).astype(np.float32)
    d = dp.from_engine_field(
        field, fixed_size=(403, 288), fixed_pad=(5, 21), moving_pad=(26, 0), mpp=0.92
    )
    assert d.vectors_um.shape == (288, 403, 2)
    assert d.mpp == 0.92
    points = dp.node_points(d)
    np.testing.assert_allclose(points + d.vectors_um, similarity(points), atol=1e-3)
