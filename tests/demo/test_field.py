"""The deformation between the sections of the demo: exact, without folds, and its inverse."""

import dataclasses

import numpy as np
import pytest

from hemera.demo.field import Field, make_field
from hemera.demo.plan import plan


def slide_field() -> Field:
    return make_field(
        np.random.default_rng(3),
        angle_deg=118.0,
        shift_um=(21.0, -34.0),
        elastic_um=18.0,
        fixed_um=(920.0, 552.0),
        moving_um=(700.0, 950.0),
    )


def test_the_field_leads_there_and_back() -> None:
    field = slide_field()
    points = np.random.default_rng(1).uniform((0, 0), (920, 552), (400, 2))
    moved = field.to_moving(points)
    assert np.abs(field.to_fixed(moved) - points).max() < 1e-6
    # Without deformation: a rotation by hand. (1, 0) turned by 118 degrees, y down.
    still = dataclasses.replace(field, amplitudes=np.zeros_like(field.amplitudes))
    step = still.to_moving(field.fixed_centre + np.array([1.0, 0.0])) - field.moving_centre
    assert step == pytest.approx([np.cos(np.radians(118)), np.sin(np.radians(118))])
    assert field.moving_centre == pytest.approx([350 + 21, 475 - 34])
    wave = field.elastic(points)
    assert 5 < np.sqrt((wave**2).sum(axis=1).mean()) < 40


def test_the_field_has_no_fold() -> None:
    for slide in plan("full").slides:
        width, height = slide.he_size_px
        field = make_field(
            np.random.default_rng(slide.number),
            angle_deg=slide.angle_deg,
            shift_um=slide.shift_um,
            elastic_um=slide.elastic_um,
            fixed_um=(width * slide.he_mpp, height * slide.he_mpp),
            moving_um=(3000.0, 2800.0),
        )
        x, y = np.meshgrid(np.arange(0, width, 40.0), np.arange(0, height, 40.0))
        moved = field.to_moving(np.stack([x, y], axis=-1))
        dx, dy = np.gradient(moved, axis=1), np.gradient(moved, axis=0)
        area = (dx[..., 0] * dy[..., 1] - dx[..., 1] * dy[..., 0]) / 1600
        assert area.min() > 0.5 and area.max() < 1.8


def test_blobs_land_exactly_where_the_field_says() -> None:
    field = slide_field()
    fixed_mpp, moving_mpp = 0.92, 0.8
    width, height = 1000, 600
    # Centres (x, y) in um with pixel edges at integers, nowhere near a pixel's own centre.
    centres = np.array([[203.3, 151.7], [611.13, 171.9], [402.77, 381.31], [702.2, 437.4]])
    y, x = np.mgrid[0:height, 0:width]
    image = np.zeros((height, width))
    for cx, cy in centres / fixed_mpp:
        image += 220 * np.exp(-((x + 0.5 - cx) ** 2 + (y + 0.5 - cy) ** 2) / (2 * 4.0**2))
    rgb = np.repeat(np.rint(image).astype(np.uint8)[..., None], 3, axis=2)
    warped = field.warp(rgb, fixed_mpp, (875, 1188), moving_mpp, (0, 0, 0))
    assert warped.shape == (1188, 875, 3)
    for centre in centres:
        expected = field.to_moving(centre) / moving_mpp
        j, i = (int(value) for value in expected)
        part = warped[i - 20 : i + 21, j - 20 : j + 21, 1].astype(float)
        rows, columns = np.mgrid[i - 20 : i + 21, j - 20 : j + 21]
        found = [
            (part * (columns + 0.5)).sum() / part.sum(),
            (part * (rows + 0.5)).sum() / part.sum(),
        ]
        # Twice the blob's own shear by the second derivative of the field: 0.05 px.
        assert found == pytest.approx(expected, abs=0.05)


def test_outside_the_section_her2_shows_glass() -> None:
    field = slide_field()
    rgb = np.full((600, 1000, 3), 90, np.uint8)
    warped = field.warp(rgb, 0.92, (875, 1188), 0.8, (250, 240, 230))
    assert tuple(warped[0, 0]) == (250, 240, 230)
    assert tuple(warped[600, 470]) == (90, 90, 90)
