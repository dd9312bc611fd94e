"""Stain vectors, densities and a slide's own references, on drawn slides of known staining."""

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage

from hemera.masks.stain.stains import Stains, estimate, separate
from tests.small_cells import BACKGROUND, DAB, HAEMATOXYLIN, STRENGTHS, draw, over, thirds


def unit(*vector: float) -> npt.NDArray[np.float64]:
    return np.array(vector) / np.linalg.norm(vector)


TRUE_H, TRUE_D = unit(0.74, 0.62, 0.25), unit(0.32, 0.55, 0.77)


def test_vectors_are_those_the_slide_was_stained_with() -> None:
    slide = draw(STRENGTHS, mpp=0.25, haematoxylin=TRUE_H, dab=TRUE_D, background=(190, 188, 184))
    stains = estimate(thirds(slide.rgb), 0.25)
    assert stains.estimated == ("haematoxylin", "dab")
    assert stains.note is None
    # The palest there is: background under the thin haze that is drawn everywhere.
    palest = np.array([190, 188, 184]) * 10 ** -(0.03 * TRUE_H + 0.01 * TRUE_D)
    assert stains.background == pytest.approx(palest, abs=2)
    for found, true, fixed in (
        (stains.haematoxylin, TRUE_H, HAEMATOXYLIN),
        (stains.dab, TRUE_D, DAB),
    ):
        assert found @ true > found @ fixed
        assert np.degrees(np.arccos(found @ true)) < 4


def test_vectors_are_measured_on_blocks_of_one_tile_and_never_on_a_fragment() -> None:
    slide = draw(np.tile(STRENGTHS, (2, 1)), mpp=0.25, dab=TRUE_D)
    found = estimate([slide.rgb], 0.25)
    assert "dab" in found.estimated
    assert np.degrees(np.arccos(found.dab @ TRUE_D)) < 4
    fragment = np.ascontiguousarray(slide.rgb[:30, :40])
    background = np.full((200, 310, 3), BACKGROUND, np.uint8)
    for seen in ([fragment], [fragment, background, background]):
        found = estimate(seen, 0.25)
        assert found.estimated == ()
        assert found.note is not None
        assert found.note.startswith("not measured: colour of haematoxylin, colour of DAB")
        np.testing.assert_allclose(found.vectors, [HAEMATOXYLIN, DAB])


@pytest.mark.parametrize(
    "ink",
    [(0.95, 0.5, 0.05), (0.8, 0.8, 0.75), (0.1, 0.7, 0.55), (0.45, 0.8, 0.15), (0.25, 0.5, 0.7)],
)
def test_a_stroke_on_one_tile_does_not_change_the_stains(ink: tuple[float, float, float]) -> None:
    """A stroke 9 um wide, too thin to be excluded, on one of four tiles."""
    tiles = [draw(np.roll(STRENGTHS, k, axis=1), mpp=0.25).rgb for k in range(4)]
    before = estimate(tiles, 0.25)
    tiles[2] = tiles[2].copy()
    tiles[2][100:136] = over(tiles[2][100:136], ink)
    after = estimate(tiles, 0.25)
    assert after.estimated == before.estimated
    assert after.nuclear_density == pytest.approx(before.nuclear_density, rel=0.05)
    np.testing.assert_allclose(after.vectors, before.vectors, atol=0.02)


def test_tiles_of_another_dye_do_not_count_when_others_agree() -> None:
    """Haematoxylin of two of four tiles is 17 degrees from the fixed vector, beyond the limit."""
    own = [draw(np.roll(STRENGTHS, k, axis=1), mpp=0.25, haematoxylin=TRUE_H).rgb for k in (0, 1)]
    other = unit(0.80, 0.46, 0.39)
    others = [draw(np.roll(STRENGTHS, k), mpp=0.25, haematoxylin=other).rgb for k in (0, 1)]
    stains = estimate([*own, *others], 0.25)
    assert "haematoxylin" in stains.estimated
    assert np.degrees(np.arccos(stains.haematoxylin @ TRUE_H)) < 1.5


def test_dark_brown_nuclei_do_not_set_the_scale_of_haematoxylin() -> None:
    """A third of the nuclei took up DAB until they are nearly black."""
    slide = draw(np.zeros((6, 9)), counterstain=0.3)
    pieces, count = ndimage.label(slide.nuclei)
    black = np.isin(pieces, np.arange(1, count + 1, 3))
    rgb = over(slide.rgb, 1.5 * black[..., None] * DAB)
    assert estimate(thirds(rgb), 0.5).nuclear_density == pytest.approx(0.3, rel=0.15)


def test_without_brown_the_vector_of_dab_is_the_fixed_one() -> None:
    stains = estimate(thirds(draw(np.zeros((3, 4)), mpp=0.25).rgb), 0.25)
    assert stains.estimated == ("haematoxylin",)
    np.testing.assert_allclose(stains.dab, DAB)


def test_an_estimated_haematoxylin_has_little_of_dab() -> None:
    """Nuclei that took up brown have a mixed direction; the estimate is closer to the dye."""
    mixture = unit(*(0.8 * HAEMATOXYLIN + 0.2 * DAB))
    found = estimate(thirds(draw(STRENGTHS, mpp=0.25, haematoxylin=mixture).rgb), 0.25)
    assert "haematoxylin" in found.estimated
    assert found.haematoxylin @ HAEMATOXYLIN > mixture @ HAEMATOXYLIN + 0.003


def test_separation_inverts_the_law_of_beer_and_lambert() -> None:
    true = np.random.default_rng(8).uniform(0.05, 0.6, (20, 30, 2))
    stains = Stains((240, 235, 230))
    rgb = np.array(stains.background) * 10 ** -(true @ np.stack([HAEMATOXYLIN, DAB]))
    found = separate(rgb.round().astype(np.uint8), stains)
    np.testing.assert_allclose(found[..., :2], true, atol=0.03)
    np.testing.assert_allclose(found[..., 2], 0, atol=0.03)


@pytest.mark.parametrize("counterstain", [0.15, 0.5])
def test_nuclear_density_is_the_haematoxylin_of_the_nuclei(counterstain: float) -> None:
    slide = draw(np.zeros((7, 9)), counterstain=counterstain)
    found = estimate(thirds(slide.rgb), 0.5).nuclear_density
    assert found == pytest.approx(counterstain, rel=0.1)


@pytest.mark.parametrize(("counterstain", "used"), [(0.9, 0.93), (1.25, 1.0)])
def test_a_darker_counterstain_than_plausible_is_the_darkest_that_is(
    counterstain: float, used: float
) -> None:
    stains = estimate(thirds(draw(np.zeros((7, 9)), counterstain=counterstain).rgb), 0.5)
    assert stains.nuclear_density == pytest.approx(used, rel=0.05)
    assert ("1.00 is used" in stains.warning) == (counterstain > 1)


def test_background_dab_is_what_tissue_without_nuclei_takes_up() -> None:
    """Cells, brown bundles beside them, background: the first quartile of the bundles."""
    slide = draw(np.full((4, 5), 0.6))
    height, width = slide.nuclei.shape
    background = np.full((height, width, 3), BACKGROUND, np.uint8)
    y, x = np.mgrid[:height, : 2 * width]
    for brown in (0.05, 0.10):
        bundles = brown * (1 + 0.5 * np.sin(2 * np.pi * (x + 2 * y) / 60))
        pale = bundles[..., None] * DAB + 0.04 * HAEMATOXYLIN
        tissue = np.concatenate([slide.rgb, background], axis=1) * 10**-pale
        tile = np.concatenate([tissue.round().astype(np.uint8), background], axis=1)
        found = estimate([tile, tile[:, width:]], 0.5).background_dab
        # A quarter of a sine is below minus sin 45 degrees.
        assert found == pytest.approx(brown * (1 - 0.5 * np.sin(np.pi / 4)), abs=0.012)


def test_a_solid_tumour_has_no_background_dab() -> None:
    everywhere = draw(np.full((6, 9), 0.2))
    assert estimate([everywhere.rgb[40:-40, 40:-40]], 0.5).background_dab == 0
    assert estimate([], 0.5).background_dab == 0


def test_a_little_stroma_counts_in_proportion() -> None:
    """Tissue without nuclei is stroma only next to a few; beside solid tumour, there is little."""
    tumour = draw(np.full((6, 9), 0.2)).rgb[40:-40, 40:-40]
    slide = draw(np.full((1, 2), 0.6))
    height, width = slide.nuclei.shape
    pale = np.full((3 * height, 2 * width, 1), 0.10) * DAB + 0.04 * HAEMATOXYLIN
    stroma = np.full((3 * height, 2 * width, 3), BACKGROUND) * 10**-pale
    stroma[:height, :width] = slide.rgb
    stroma = stroma.round().astype(np.uint8)
    found = []
    for side in (1, 2, 3):
        beside = np.tile(tumour, (side, side, 1))
        found.append(estimate([stroma, beside, beside], 0.5, BACKGROUND).background_dab)
    assert found[0] > found[1] > found[2] > 0
    tissue = [stroma.size + 2 * k**2 * tumour.size for k in (1, 2, 3)]
    assert found[2] / found[1] == pytest.approx(tissue[1] / tissue[2], rel=0.05)


@pytest.mark.parametrize("factor", [0.8, 0.5])
def test_the_scale_of_a_pale_slide_is_in_proportion(factor: float) -> None:
    """All densities of a slide of pale nuclei times a factor."""
    slide = draw(np.zeros((7, 9)), counterstain=0.16)
    background = np.array(BACKGROUND)
    ratio = np.minimum(slide.rgb / background, 1)
    paler = (background * ratio**factor).round().astype(np.uint8)
    whole, pale = (estimate(thirds(rgb), 0.5) for rgb in (slide.rgb, paler))
    assert pale.nuclei_measured
    assert pale.nuclear_density == pytest.approx(factor * whole.nuclear_density, rel=0.1)
