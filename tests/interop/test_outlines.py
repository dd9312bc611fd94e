"""Outlines of a mask: drawn back they are the mask, however it is cut into bands."""

import tracemalloc

import numpy as np
import pytest
import skimage.measure

from hemera.interop.outlines import Outlines


def traced(mask, heights=(7,)):
    outlines, regions, top, turn = Outlines(mask.shape[1]), [], 0, 0
    while top < len(mask):
        height = heights[turn % len(heights)]
        regions += outlines.add(mask[top : top + height])
        top, turn = top + height, turn + 1
    return regions + outlines.close()


def drawn(region, shape):
    """Which pixels lie in a region, by the even-odd rule."""
    inside = np.zeros(shape, bool)
    for ring in region.rings:
        for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            assert (x0 == x1) != (y0 == y1), "every edge runs along an axis"
            if x0 == x1:
                inside[min(y0, y1) : max(y0, y1), :x0] ^= True
    return inside


def corners(ring):
    return {tuple(point) for point in ring.tolist()}


def test_a_rectangle_is_four_corners_and_a_hole_runs_the_other_way():
    mask = np.zeros((40, 60), bool)
    mask[5:31, 10:50] = True
    mask[12:20, 30:37] = False
    (region,) = traced(mask)
    outer, hole = region.rings
    assert corners(outer) == {(10, 5), (50, 5), (50, 31), (10, 31)}
    assert corners(hole) == {(30, 12), (37, 12), (37, 20), (30, 20)}
    assert len(outer) == len(hole) == 4
    assert region.area_px == 26 * 40 - 8 * 7
    # Clockwise as it is seen, y down: from the top left corner to the right.
    start = outer.tolist().index([10, 5])
    assert outer[(start + 1) % 4].tolist() == [50, 5]
    start = hole.tolist().index([30, 12])
    assert hole[(start + 1) % 4].tolist() == [30, 20]


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.62, 0.9, 1.0])
@pytest.mark.parametrize("heights", [(1,), (3, 1, 8), (64,)])
def test_regions_drawn_back_are_the_mask_and_each_is_one_piece(share, heights):
    rng = np.random.default_rng(int(share * 100))
    mask = rng.random((43, 31)) < share
    regions = traced(mask, heights)
    total = np.zeros(mask.shape, int)
    for region in regions:
        own = drawn(region, mask.shape)
        assert own.sum() == region.area_px
        assert skimage.measure.label(own, connectivity=1).max() == 1
        total += own
        for ring in region.rings:
            assert len(corners(ring)) == len(ring), "a ring comes to no point twice"
    assert (total == mask).all()
    assert len(regions) == skimage.measure.label(mask, connectivity=1).max()


def test_the_height_of_the_bands_changes_nothing():
    rng = np.random.default_rng(5)
    noise = rng.random((30, 25)).repeat(3, axis=0).repeat(2, axis=1) < 0.55

    def shown(regions):
        return sorted(
            [sorted(sorted(corners(ring)) for ring in region.rings) for region in regions]
        )

    assert shown(traced(noise, (1,))) == shown(traced(noise, (90,))) == shown(traced(noise, (13,)))


def test_what_touches_by_a_corner_is_two_regions_and_two_holes_are_two_rings():
    mask = np.zeros((4, 6), bool)
    mask[0, 1] = mask[1, 2] = True
    assert [region.area_px for region in traced(mask)] == [1, 1]
    (region,) = traced(~np.pad(mask, 1))
    assert len(region.rings) == 3
    assert region.area_px == 6 * 8 - 2


def test_a_comb_that_is_joined_at_its_last_row_is_one_region_and_an_island_another():
    mask = np.zeros((50, 41), bool)
    mask[:, ::8] = True
    mask[-1] = True
    mask[20:30, 3:6] = True
    regions = sorted(traced(mask, (4,)), key=lambda region: region.area_px)
    assert [region.area_px for region in regions] == [30, 6 * 50 + 35]


def test_an_island_in_a_hole_is_a_region_of_its_own():
    mask = np.ones((30, 37), bool)
    mask[5:25, 5:30] = False
    mask[10:18, 9:20] = True
    mask[12:15, 12:17] = False
    small, large = sorted(traced(mask), key=lambda region: region.area_px)
    assert small.area_px == 8 * 11 - 3 * 5
    assert large.area_px == 30 * 37 - 20 * 25
    assert [len(region.rings) for region in (small, large)] == [2, 2]


@pytest.mark.parametrize("shape", [(1, 1), (9, 1), (1, 9), (5, 3)])
def test_full_and_empty(shape):
    (region,) = traced(np.ones(shape, bool), (2,))
    assert region.area_px == shape[0] * shape[1]
    assert corners(region.rings[0]) == {(x, y) for x in (0, shape[1]) for y in (0, shape[0])}
    assert traced(np.zeros(shape, bool)) == []


def test_a_region_is_given_as_soon_as_it_ends():
    outlines = Outlines(6)
    band = np.zeros((3, 6), bool)
    band[1:, 2:4] = True
    assert outlines.add(band) == []
    (region,) = outlines.add(np.zeros((3, 6), bool))
    assert corners(region.rings[0]) == {(2, 1), (4, 1), (4, 3), (2, 3)}
    assert outlines.close() == []


def test_memory_does_not_grow_with_the_height():
    rng = np.random.default_rng(2)
    band = rng.random((64, 500)) < 0.02
    peaks = []
    for bands in (3, 30):
        outlines = Outlines(500)
        tracemalloc.start()
        for _ in range(bands):
            outlines.add(band)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
