"""Pictures and labels given by a formula, seen through a formula."""

import numpy as np
import pytest
import tifffile

from hemera.errors import SlideError
from hemera.imaging.background import Background
from hemera.imaging.slide import open_slide
from hemera.registration import warping
from hemera.registration.warping import read_displaced, warp_labels
from tests.small_displacements import field_of

MPP = 0.4
SIZE = 900, 640
GLASS = (238, 241, 236)


def picture(x_um, y_um):
    """Smooth, without symmetry."""
    red = 150 + 60 * np.sin(x_um / 13 + 0.5) * np.cos(y_um / 17)
    green = 130 + 50 * np.cos(x_um / 11 - y_um / 23)
    blue = 110 + 50 * np.sin(y_um / 9 + 1)
    return np.stack([red, green, blue], axis=-1)


def turned(points):
    """Turned, grown and bent."""
    x, y = points[..., 0], points[..., 1]
    column = 0.99 * x - 0.12 * y + 30 + 3 * np.sin(y / 40)
    row = 0.12 * x + 1.02 * y - 9 + 2 * np.cos(x / 55)
    return np.stack([column, row], axis=-1)


@pytest.fixture
def her2(tmp_path):
    x, y = np.meshgrid(*(np.arange(side) + 0.5 for side in SIZE))
    tifffile.imwrite(
        tmp_path / "her2.tif",
        np.rint(picture(x * MPP, y * MPP)).astype(np.uint8),
        tile=(128, 128),
        photometric="rgb",
        compression="deflate",
    )
    with open_slide(
        tmp_path / "her2.tif", mpp=MPP, background=Background(GLASS, measured=True)
    ) as slide:
        yield slide


def read(her2, field, x, y, **changes):
    return read_displaced(her2, field, x / 2, y / 2, **{"size_px": 96, "mpp": 0.5} | changes)


@pytest.mark.parametrize("mpp", [0.5, 0.4, 1.3])
def test_a_tile_shows_what_lies_where_the_map_leads(her2, mpp):
    """To a fiftieth of a pixel: half a pixel is the classic mistake."""
    pixels, coverage, corner, covered = read(her2, field_of(turned), 160, 120, mpp=mpp)
    assert coverage == 1
    assert covered is None
    assert corner == pytest.approx(tuple(turned(np.array([80.0, 60.0])) / MPP), abs=0.1)
    x, y = np.meshgrid(np.arange(96) + 0.5, np.arange(96) + 0.5)
    at = turned(np.stack([80 + x * mpp, 60 + y * mpp], axis=-1))
    expected = picture(at[..., 0], at[..., 1])
    residual = pixels - expected
    assert np.abs(residual).mean() < (0.5 if mpp < 1 else 0.8)
    # The shift, in pixels, that explains the residual best.
    slopes = np.stack(
        [(picture(at[..., 0] + d[0], at[..., 1] + d[1]) - expected) / 0.01 * mpp
         for d in ((0.01, 0), (0, 0.01))],
        axis=-1,
    )  # fmt: skip
    shift, *_ = np.linalg.lstsq(slopes.reshape(-1, 2), residual.reshape(-1), rcond=None)
    assert np.abs(shift).max() < 0.02


def test_beyond_her2_lies_its_glass(her2):
    """HER2 reaches to x = 360 um; the map is a plain shift by 200 um to the right."""
    field = field_of(lambda points: points + np.array([200.0, 0.0]))
    pixels, coverage, _, covered = read(her2, field, 300, 40)
    # 150 um + 200 um = 350 um: 10 um, 20 px are left.
    assert coverage == pytest.approx(20 / 96)
    assert (covered == (np.arange(96) < 20)).all()
    assert (pixels[:, 20:] == GLASS).all()
    assert not (pixels[:, :20] == GLASS).all(axis=-1).any()
    pixels, coverage, corner, covered = read(her2, field, 400, 40)
    assert coverage == 0
    assert not covered.any()
    assert corner == pytest.approx((1000.0, 50.0))
    assert (pixels == GLASS).all()


def test_far_from_the_nodes_nothing_counts_as_covered(her2):
    field = field_of(lambda points: points, width=20, height=60)
    # 20 nodes of 4 um end at 80 um, and one more counts: a tile over 72 to 120 um.
    assert read(her2, field, 144, 40)[1] == pytest.approx((84 - 72) / 48)


def test_a_tile_torn_apart_is_refused(her2):
    field = field_of(lambda points: points * (40.0, 1.0))
    with pytest.raises(SlideError, match=r"the displacement spreads the tile at 0, 20 um"):
        read(her2, field, 0, 40, size_px=24)


# Labels


def pattern(x_um, y_um):
    """Labels as a function of the place: 20 um wide, without symmetry, 0 among them."""
    return ((x_um // 20 + 3 * (y_um // 14)) % 251).astype(np.uint16) * 257 % 65521


def label_image(width, height, pixel_um):
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    return pattern(x * pixel_um[0], y * pixel_um[1])


def at_1_um(labels, back, size_px, lattice_px):
    um = {"pixel_um": (1.0, 1.0), "label_um": (1.0, 1.0)}
    return warp_labels(labels, back, 0, 0, size_px=size_px, lattice_px=lattice_px, **um)


@pytest.mark.parametrize("lattice", [1, 8])
def test_each_pixel_gets_the_label_where_the_map_leads(lattice):
    """Seen at whole tiles and at one that reaches over both edges of the labels."""
    label_um = 0.8, 0.9
    labels = label_image(400, 260, label_um)
    pixel_um = 0.61, 0.59
    for x_px, y_px in ((100, 60), (430, 300), (-40, -30)):
        tile = warp_labels(
            labels, turned, x_px, y_px, size_px=96, pixel_um=pixel_um, label_um=label_um,
            lattice_px=lattice,
        )  # fmt: skip
        assert tile.shape == (96, 96)
        assert tile.dtype == np.uint16
        x, y = np.meshgrid(np.arange(96) + 0.5, np.arange(96) + 0.5)
        at = turned(np.stack([(x_px + x) * pixel_um[0], (y_px + y) * pixel_um[1]], axis=-1))
        # The label's own pixel, whose centre decides what it is.
        column, row = (np.floor(at[..., axis] / label_um[axis]) for axis in (0, 1))
        expected = pattern((column + 0.5) * label_um[0], (row + 0.5) * label_um[1])
        inside = (column >= 0) & (column < 400) & (row >= 0) & (row < 260)
        expected[~inside] = 0
        bound = 0.002 if lattice == 1 else 0.01
        assert (tile != expected).mean() < bound
        assert 0 < inside.mean() <= 1
        assert inside.all() == ((x_px, y_px) == (100, 60))


def test_a_place_without_partner_costs_only_itself():
    labels = np.full((200, 300), 7, np.int32)

    def back(points):
        away = np.hypot(points[:, 0] - 51.0, points[:, 1] - 33.0) < 6
        return np.where(away[:, None], np.nan, points)

    tile = at_1_um(labels, back, 96, lattice_px=4)
    x, y = np.meshgrid(np.arange(96) + 0.5, np.arange(96) + 0.5)
    np.testing.assert_array_equal(tile, np.where(np.hypot(x - 51, y - 33) < 6, 0, 7))
    assert not at_1_um(labels, lambda points: points * np.nan, 32, lattice_px=16).any()


def test_a_slide_without_levels_is_averaged_in_strips_as_in_one(her2, monkeypatch):
    whole, *_ = read(her2, field_of(turned), 0, 0, mpp=3.3, size_px=64)
    monkeypatch.setattr(warping, "_STRIP_PX", 7 * 300 * 64)
    strips, *_ = read(her2, field_of(turned), 0, 0, mpp=3.3, size_px=64)
    np.testing.assert_array_equal(whole, strips)
