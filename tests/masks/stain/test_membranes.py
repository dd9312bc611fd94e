"""Which brown is a membrane, and how cells are measured."""

import dataclasses

import numpy as np
import pytest
from skimage.segmentation import expand_labels

from hemera.masks.stain.membranes import Membranes, find_membranes, measure_cells
from hemera.masks.stain.nuclei import Nuclei
from tests.small_cells import DAB, MEASURED, SHARED, draw, over, segment


def unstained(shape: tuple[int, ...]) -> Membranes:
    nothing = np.zeros(shape, np.float32)
    return Membranes(np.zeros(shape, np.uint8), nothing, nothing)


def test_faint_brown_beside_a_dark_nucleus_is_its_coloured_fringe() -> None:
    """The same rings of 0.12 around densities 0.9 and 0.3: a fringe reaches 0.19 of them."""
    y, x = np.mgrid[:80, :170].astype(float)
    separated = np.zeros((*y.shape, 3), np.float32)
    for cx, dark in ((40, 0.9), (125, 0.3)):
        radius = np.hypot(y - 40, x - cx)
        separated[..., 0] += dark * (radius < 8)
        separated[..., 1] += 0.12 * ((radius > 9) & (radius < 13))
    membrane = find_membranes(separated, 0.5, MEASURED, SHARED).classes
    for half, expected in ((slice(0, 80), False), (slice(90, 170), True)):
        assert (membrane[:, half] == 1).any() == expected


@pytest.mark.parametrize(("strength", "positive"), [(0.0, False), (0.25, True)])
def test_faint_brown_everywhere_is_background_and_a_faint_membrane_on_it_is_not(
    strength: float, positive: bool
) -> None:
    """Skin and stroma take up brown evenly: compared with its surroundings a ring is none."""
    stained = over(draw(np.full((3, 4), strength)).rgb, 0.08 * DAB)
    cells = segment(stained, 0.5, MEASURED).cells
    assert cells.positive.tolist() == [positive] * 12


@pytest.mark.parametrize(
    ("background_dab", "levels"), [(0.0, {1, 3}), (0.02, {1, 3}), (0.07, {0, 3}), (0.4, {0, 3})]
)
def test_weak_staining_must_exceed_the_background_of_the_slide_and_strong_need_not(
    background_dab: float, levels: set[int]
) -> None:
    slide = draw(np.array([[0.15, 0.15, 0.6], [0.6, 0.15, 0.15]]))
    stains = dataclasses.replace(MEASURED, background_dab=background_dab)
    found = segment(slide.rgb, 0.5, stains)
    assert set(found.cells.intensity.tolist()) == levels
    loose = SHARED.replace(dab_control=0.0)
    assert segment(slide.rgb, 0.5, stains, loose).cells.positive.all()


def test_strong_membranes_on_dark_cytoplasm_are_as_wide_as_their_half_maximum() -> None:
    """Lines 2 um wide of 1.4 on cytoplasm of 1.0, which was the same class as they were."""
    x = (np.arange(160) + 0.5) * 0.25
    line = np.abs(x % 10 - 5) < 1
    separated = np.zeros((100, 160, 3), np.float32)
    separated[..., 1] = np.where(line, 1.4, 1.0)
    strong = find_membranes(separated, 0.25, MEASURED, SHARED).classes == 3
    inner = strong[20:80, 16:-16]
    assert (inner == line[16:-16]).mean() > 0.9


def test_cells_grow_as_scikit_image_expands_labels() -> None:
    rng = np.random.default_rng(2)
    labels = np.zeros((90, 130), np.int32)
    y, x = rng.integers(5, 85, 12), rng.integers(5, 125, 12)
    for k in range(12):
        labels[y[k] - 2 : y[k] + 3, x[k] - 1 : x[k] + 4] = k + 1
    ours, _ = measure_cells(Nuclei.from_labels(labels), unstained(labels.shape), 0.5, SHARED)
    theirs = expand_labels(labels, SHARED.ring_um / 0.5)
    # OpenCV's distance is within 2 % of Euclid's; pixels in between may go to the other cell.
    assert (ours != theirs).mean() < 0.01
    np.testing.assert_array_equal(ours[labels > 0], theirs[labels > 0])


def test_without_nuclei_there_are_no_cells() -> None:
    nothing = np.zeros((40, 70), np.int32)
    membranes = dataclasses.replace(
        unstained(nothing.shape), classes=np.full(nothing.shape, 3, np.uint8)
    )
    grown, cells = measure_cells(Nuclei.from_labels(nothing), membranes, 0.5, SHARED)
    assert len(cells) == 0
    assert not grown.any()


@pytest.mark.parametrize("mpp", [0.46, 0.5, 0.92])
def test_densities_are_those_a_cell_was_drawn_with(mpp: float) -> None:
    """Half of a ring of 0.4 on a cell of 0.1, and a bare cell beside it.

    The ring covers half of the directions, 0.2 on average; blur adds up to one at each end, 0.033.
    """
    y, x = (np.mgrid[: round(40 / mpp), : round(90 / mpp)] + 0.5) * mpp
    left, right = (np.hypot(y - 20, x - centre) for centre in (22, 66))
    dab = np.where(left < 9, 0.1, 0.0)
    dab[(left > 5.5) & (left < 7.5) & (y < 20)] += 0.4
    separated = np.zeros((*y.shape, 3), np.float32)
    separated[..., 0] = 0.4 * ((left < 4) | (right < 4))
    separated[..., 1] = dab
    labels = np.where(left < 4, 1, np.where(right < 4, 2, 0)).astype(np.int32)
    membranes = find_membranes(separated, mpp, MEASURED, SHARED)
    _, cells = measure_cells(Nuclei.from_labels(labels), membranes, mpp, SHARED)
    assert 0.19 < cells.membrane_od[0] < 0.243
    assert cells.cytoplasm_od == pytest.approx([0.1, 0], abs=0.01)
    assert cells.nucleus_od == pytest.approx([0.1, 0], abs=0.001)
    assert cells.membrane_od[1] == 0


def test_diffuse_staining_is_cytoplasm_and_not_membrane() -> None:
    """Brown of 0.3 over a wide area, as strong as a moderate membrane."""
    stained = over(draw(np.zeros((3, 4))).rgb, 0.3 * DAB)
    cells = segment(stained, 0.5, MEASURED).cells
    assert cells.membrane_od.max() < 0.01
    assert cells.cytoplasm_od == pytest.approx(0.3, abs=0.03)
    assert cells.intensity.max() == 0
