"""Outlines of a mask: exact in area and place, whatever touches whatever."""

import numpy as np
import pytest
import shapely
import skimage.measure

from hemera.imaging import outlines
from hemera.imaging.outlines import reduction, trace


def corners(ring):
    assert ring.coords[0] == ring.coords[-1]
    return set(ring.coords)


def box(x0, y0, x1, y1):
    return {(x0, y0), (x1, y0), (x1, y1), (x0, y1)}


def test_a_rectangle_with_a_hole_is_eight_corners():
    mask = np.zeros((40, 60), bool)
    mask[5:31, 10:50] = True
    mask[12:20, 30:37] = False
    (region,) = trace(mask)
    (hole,) = region.interiors
    assert corners(region.exterior) == box(10, 5, 50, 31)
    assert corners(hole) == box(30, 12, 37, 20)
    assert len(region.exterior.coords) == len(hole.coords) == 5
    assert region.area == 26 * 40 - 8 * 7


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.5, 0.62, 0.9, 1.0])
def test_regions_drawn_back_are_the_mask_and_each_is_one_piece(fraction):
    """In noise everything occurs: single pixels, corners that touch, islands in holes."""
    rng = np.random.default_rng(int(fraction * 100))
    mask = rng.random((43, 31)) < fraction
    regions = trace(mask)
    x, y = np.meshgrid(np.arange(31) + 0.5, np.arange(43) + 0.5)
    total = np.zeros(mask.shape, int)
    for region in regions:
        assert region.geom_type == "Polygon"
        assert region.is_valid
        own = shapely.contains_xy(region, x, y)
        assert own.sum() == region.area
        assert skimage.measure.label(own, connectivity=1).max() == 1
        total += own
        for ring in (region.exterior, *region.interiors):
            along_axis = (np.diff(np.array(ring.coords), axis=0) == 0).sum(axis=1)
            assert (along_axis == 1).all(), "every edge runs along an axis"
    assert (total == mask).all()
    assert len(regions) == skimage.measure.label(mask, connectivity=1).max()


def test_an_island_in_a_hole_is_a_region_of_its_own():
    mask = np.ones((30, 37), bool)
    mask[5:25, 5:30] = False
    mask[10:18, 9:20] = True
    mask[12:15, 12:17] = False
    large, small = trace(mask)
    assert (large.area, small.area) == (30 * 37 - 20 * 25, 8 * 11 - 3 * 5)
    assert len(large.interiors) == len(small.interiors) == 1


@pytest.mark.parametrize("shape", [(1, 1), (9, 1), (1, 9), (5, 3)])
def test_full_and_empty(shape):
    (region,) = trace(np.ones(shape, bool))
    assert corners(region.exterior) == box(0, 0, shape[1], shape[0])
    assert trace(np.zeros(shape, bool)) == []


def test_large_masks_are_reduced_by_powers_of_two(monkeypatch):
    assert [reduction(size) for size in ((10_000, 10_000), (10_001, 10_000))] == [1, 2]
    assert reduction((100_000, 80_000)) == 16
    monkeypatch.setattr(outlines, "PIXELS_MAX", 12)
    assert [reduction(size) for size in ((4, 3), (5, 3), (9, 8))] == [1, 2, 4]
