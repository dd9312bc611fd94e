"""Nuclei in drawn densities, and on real tiles."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage

from hemera.masks.stain import Options
from hemera.masks.stain.nuclei import Limits, Tile, _convex, dark_pixels, find_nuclei, outlined
from hemera.masks.stain.stains import Stains, estimate, separate
from tests.small_cells import read

OPTIONS = Options()


def labels_of(
    density: npt.NDArray[np.floating],
    mpp: float = 0.5,
    nuclear_density: float = 0.5,
    excluded: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.int32]:
    stains = Stains((255, 255, 255), nuclear_density=nuclear_density)
    rgb = np.full((*density.shape, 3), 255, np.uint8)
    tile = Tile(rgb, mpp, stains, density.astype(np.float32), excluded)
    return find_nuclei(tile, OPTIONS).labels


def pieces(labels: npt.NDArray[np.int32]) -> list[int]:
    """The number of pieces of every nucleus."""
    return [
        ndimage.label(labels[place] == k, np.ones((3, 3)))[1]
        for k, place in enumerate(ndimage.find_objects(labels), start=1)
    ]


def test_touching_nuclei_are_cut() -> None:
    y, x = np.mgrid[:80, :120].astype(float)
    labels = labels_of(0.5 * ((np.hypot(y - 40, x - 42) < 10) | (np.hypot(y - 38, x - 60) < 10)))
    assert labels.max() == 2
    assert labels[40, 40] != labels[38, 62]


def test_a_nucleus_with_a_slight_waist_is_one() -> None:
    """Two discs of radius 10 px, 24 px apart, connected over 0.93 or 0.5 of their width."""
    y, x = np.mgrid[:80, :120].astype(float)
    discs = (np.hypot(y - 40, x - 48) < 10) | (np.hypot(y - 40, x - 72) < 10)
    for half_width, count in ((9.3, 1), (5.0, 2)):
        waist = (abs(y - 40) < half_width) & (abs(x - 60) < 12)
        assert labels_of(0.5 * (discs | waist)).max() == count


@pytest.mark.parametrize("mpp", [0.25, 0.4999, 0.5001])
def test_the_outline_of_a_ball_is_its_edge_whatever_the_resolution(mpp: float) -> None:
    """A nucleus is thinner towards its edge: the density of a ball of 4.5 um follows its depth."""
    y, x = (np.mgrid[: round(30 / mpp), : round(37 / mpp)] + 0.5) * mpp
    radius = np.hypot(y - 14, x - 17) / 4.5
    labels = labels_of(0.03 + 0.5 * np.sqrt(np.maximum(1 - radius**2, 0)), mpp)
    assert labels.max() == 1
    assert (labels > 0).sum() * mpp**2 == pytest.approx(np.pi * 4.5**2, rel=0.1)


def test_the_pale_middle_of_a_nucleus_is_filled_and_the_middle_of_a_ring_is_not() -> None:
    """Holes of 5 and 20 um^2 in discs; what is filled is up to 8 um^2."""
    y, x = np.mgrid[:90, :160].astype(float)
    density = np.zeros(y.shape)
    for cx, outer, inner in ((40, 10, 2.5), (110, 17, 5.5)):
        radius = np.hypot(y - 45, x - cx)
        density += 0.6 * ((radius < outer) & (radius >= inner))
    labels = labels_of(density, nuclear_density=0.6)
    assert labels[45, 40] > 0
    assert labels[45, 110] == 0
    assert labels[45, 98] > 0


@pytest.mark.parametrize("mpp", [0.25, 0.5])
def test_a_nucleus_is_darker_than_two_um_around_it_whatever_the_resolution(mpp: float) -> None:
    """A cone: over 0.5 um its surroundings are paler by 0.09, over 2 um by 0.13 of 1.1."""
    y, x = (np.mgrid[: round(25 / mpp), : round(31 / mpp)] + 0.5) * mpp
    for slope, expected in ((0.4 / 7.5, 1), (0.4 / 14, 0)):
        cone = np.maximum(0.4 - slope * np.hypot(y - 12, x - 15), 0)
        assert labels_of(cone, mpp, 1.1).max() == expected


def test_what_is_much_paler_than_the_nuclei_of_its_tile_is_no_nucleus() -> None:
    """Eight discs of radius 4 um; their density and that of a ninth.

    The limit is two thirds of the usual product of density and diameter, and at most 0.2 um.
    """
    y, x = np.mgrid[:90, :260].astype(float)
    for eight, ninth, expected in ((0.1, 0.1, 9), (0.1, 0.02, 8), (0.02, 0.02, 9), (0.4, 0.05, 9)):
        density = np.zeros(y.shape)
        for k in range(9):
            disc = np.hypot(y - (25 if k % 2 else 62), x - 25 - 26 * k) < 8
            density += (ninth if k == 4 else eight) * disc
        options = Options(nucleus_density_min=0.01, nucleus_contrast=0.05, compartment="nucleus")
        stains = Stains((255, 255, 255), nuclear_density=min(eight, 0.2))
        rgb = np.full((*y.shape, 3), 255, np.uint8)
        found = find_nuclei(Tile(rgb, 0.5, stains, density.astype(np.float32)), options)
        assert found.labels.max() == expected, (eight, ninth)


def test_a_piece_is_outlined_where_it_is_dark_and_one_in_a_pale_hole_is_removed() -> None:
    """A disc found from its upper half, and the pale middle of a ring: 0.5 um/px."""
    y, x = np.mgrid[:80, :160].astype(float)
    disc, ring = np.hypot(y - 40, x - 40), np.hypot(y - 40, x - 110)
    density = 0.5 * ((disc < 10) | ((ring >= 12) & (ring < 18)))
    stains = Stains((255, 255, 255), nuclear_density=0.5)
    rgb = np.full((*y.shape, 3), 255, np.uint8)
    tile = Tile(rgb, 0.5, stains, density.astype(np.float32))
    pieces = np.where((disc < 9) & (y < 38), 1, np.where(ring < 9, 2, 0)).astype(np.int32)
    limits = Limits(
        12, 600, edge_min=0.0, evidence_min_um=0.5, core_um=0, grow_um=8, without_pale=False
    )
    labels = outlined(tile, dark_pixels(tile, OPTIONS), pieces, limits).labels
    assert labels.max() == 1
    assert labels[40, 110] == 0
    assert (labels > 0).sum() == pytest.approx(np.pi * 10**2, rel=0.1)
    assert not labels[disc > 13].any()


def test_threads_without_a_core_belong_to_no_nucleus() -> None:
    """Two nuclei; threads too thin to be one, 15 and 40 um from them."""
    y, x = np.mgrid[:90, :200].astype(float)
    drawn = (np.hypot(y - 40, x - 22) < 9) | (np.hypot(y - 30, x - 60) < 9)
    threads = ((abs(x - 95) < 1) | (abs(x - 140) < 1)) & (y > 12) & (y < 70)
    for seen in (drawn, drawn | threads):
        labels = labels_of(0.5 * seen)
        assert pieces(labels) == [1, 1]
        assert not labels[:, 80:].any()
        assert np.abs(np.bincount(labels.ravel())[1:] - np.pi * 81).max() < 75


def test_every_nucleus_is_one_piece_on_crowded_ragged_tiles() -> None:
    """Overlapping discs with gaps of a pixel, which a cut at half the resolution crosses."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[:211, :263].astype(float)
    for _ in range(4):
        drawn = np.zeros(y.shape, bool)
        for cy, cx, radius in rng.uniform((0, 0, 4), (211, 263, 11), (150, 3)):
            drawn |= np.hypot(y - cy, x - cx) < radius
        drawn &= (x + 2 * y) % 23 >= 1.5
        drawn[(y - 2 * x) % 31 < 1.5] = False
        for excluded in (None, np.hypot(y - 100, x - 130) < 30):
            labels = labels_of(0.6 * drawn, 1.0, 0.6, excluded)
            assert labels.max() > 20
            assert set(pieces(labels)) == {1}
            assert excluded is None or not labels[excluded].any()


@pytest.mark.parametrize(
    ("name", "mpp"),
    [
        ("bci_pairs_1024/IHC/test/00820_test_2+.png", 0.46),
        ("bci_ihc_only_1024/IHC/test/00003_test_3+.png", 0.46),
        ("deepliif/test_ihc/22_2.png", 0.5),
    ],
)
def test_every_nucleus_of_a_real_tile_is_one_piece_around_its_centre(
    images: Path, name: str, mpp: float
) -> None:
    tile = read(images / name)
    stains = estimate([tile], mpp)
    labels = labels_of(separate(tile, stains)[..., 0], mpp, stains.nuclear_density)
    assert len(pieces(labels)) > 100
    assert set(pieces(labels)) == {1}
    centres = ndimage.center_of_mass(labels > 0, labels, range(1, labels.max() + 1))
    y, x = np.array(centres).round().astype(int).T
    # The centre of a sickle is outside it.
    assert (ndimage.distance_transform_edt(labels == 0)[y, x] * mpp).max() < 2


def test_solidity_is_the_area_over_that_of_the_convex_hull() -> None:
    """A rectangle fills its hull; five squares as a plus 5 of 7, three as an L 3 of 3.5."""
    pieces = np.zeros((120, 200), np.int32)
    pieces[10:31, 10:51] = 1
    pieces[20:80, 120:140] = pieces[40:60, 100:160] = 2
    pieces[90:110, 10:50] = pieces[70:90, 10:30] = 3
    area = np.bincount(pieces.ravel())
    chosen = np.array([False, True, True, True])
    solidity = np.array([1, 5 / 7, 3 / 3.5])
    for limit in (0.65, 0.78, 0.9):
        assert _convex(pieces, area, chosen, limit) == list(solidity >= limit)
    assert _convex(pieces, area, np.array([False, False, True, True]), 0.78) == [False, True]
