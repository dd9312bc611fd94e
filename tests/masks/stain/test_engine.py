"""The engine `stain` as a whole on drawn cells, on the demo cohort and on real tiles."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from hemera.demo import load_truth
from hemera.masks import label_format
from hemera.masks.agreement import matched
from hemera.masks.stain.stains import NUCLEAR_DENSITY, Stains
from tests.small_cells import (
    BACKGROUND,
    DAB,
    HAEMATOXYLIN,
    MEASURED,
    RGB,
    STRENGTHS,
    draw,
    estimate,
    over,
    read,
    segment,
    thirds,
)


def labelled(rgb: RGB, mpp: float = 0.5, **options: Any) -> label_format.Labelled:
    return segment(rgb, mpp, estimate([rgb], mpp), **options)


def excluded_fraction(found: label_format.Labelled) -> float:
    return float(label_format.excluded(found.mask).mean())


@pytest.mark.parametrize("mpp", [0.25, 0.46, 0.92])
@pytest.mark.parametrize("background", [BACKGROUND, (180, 178, 175)])
def test_cells_are_found_and_graded_at_any_resolution_and_on_a_gray_background(
    mpp: float, background: tuple[int, int, int]
) -> None:
    slide = draw(STRENGTHS, mpp=mpp, background=background, counterstain=NUCLEAR_DENSITY)
    found = labelled(slide.rgb, mpp)
    at = slide.matched(found.cells)
    assert len(found.cells) == STRENGTHS.size
    assert (at >= 0).all()
    expected = np.searchsorted([0.07, 0.16, 0.36], STRENGTHS.ravel(), side="right")
    assert (found.cells.intensity[at] == expected).mean() >= 0.9
    np.testing.assert_array_equal(found.cells.positive[at], STRENGTHS.ravel() > 0)
    nuclei = label_format.nuclei(found.mask)
    assert (nuclei & slide.nuclei).sum() / (nuclei | slide.nuclei).sum() > 0.6
    assert found.mask.shape == slide.rgb.shape[:2]


@pytest.mark.parametrize("contrast", [1.3, 1.6])
def test_a_camera_of_higher_contrast_gives_the_same_classes(contrast: float) -> None:
    """Contrast multiplies the densities of both stains."""
    expected = np.searchsorted([0.07, 0.16, 0.36], STRENGTHS.ravel(), side="right")
    slide = draw(contrast * STRENGTHS, counterstain=contrast * NUCLEAR_DENSITY)
    cells = labelled(slide.rgb).cells
    assert (cells.intensity[slide.matched(cells)] == expected).mean() >= 0.9


def test_mask_and_cells_are_consistent() -> None:
    found = labelled(draw(STRENGTHS, mpp=0.46).rgb, 0.46)
    classes = label_format.classes(found.mask)
    at_centre = classes[found.cells.y_px.astype(int), found.cells.x_px.astype(int)]
    np.testing.assert_array_equal(at_centre == label_format.POSITIVE, found.cells.positive)
    assert set(np.unique(at_centre)) == {label_format.NEGATIVE, label_format.POSITIVE}
    assert label_format.nuclei(found.mask).sum() == found.cells.area_px.sum()
    # Every cell is enclosed: no inside touches the background by a side.
    inside = (classes == label_format.NEGATIVE) | (classes == label_format.POSITIVE)
    cross = ndimage.generate_binary_structure(2, 1)
    outside = ndimage.binary_dilation(classes == label_format.BACKGROUND, cross)
    assert not (outside & inside).any()


@pytest.mark.parametrize(("arc", "low", "high"), [(0.2, 0.1, 0.4), (1.0, 0.9, 1.01)])
def test_a_membrane_stained_on_one_side_is_not_positive(
    arc: float, low: float, high: float
) -> None:
    cells = labelled(draw(np.full((2, 3), 0.6), arc=arc).rgb).cells
    assert cells.positive.tolist() == [arc == 1.0] * 6
    assert ((cells.completeness > low) & (cells.completeness < high)).all()


def test_the_weakest_positive_intensity_is_an_option() -> None:
    slide = draw(STRENGTHS, counterstain=NUCLEAR_DENSITY)
    cells = labelled(slide.rgb, positive_intensity_min=3).cells
    np.testing.assert_array_equal(cells.positive[slide.matched(cells)], STRENGTHS.ravel() == 0.6)


@pytest.mark.parametrize("value", [255, 176, 0])
def test_a_tile_of_one_colour_or_of_gray_noise_has_no_cells(value: int) -> None:
    even = np.full((70, 110, 3), value, np.uint8)
    rng = np.random.default_rng(3)
    noise = rng.normal(value, 1.5, (200, 300, 1)) + rng.normal(0, 0.7, (200, 300, 3))
    for tile in (even, noise.round().clip(0, 255).astype(np.uint8)):
        for stains in (estimate([tile], 0.46), Stains((180, 180, 180)), estimate([], 0.46)):
            if value == 0 and tile is not even:
                continue  # noise at black is any colour
            found = segment(tile, 0.46, stains)
            assert len(found.cells) == 0
            assert not label_format.classes(found.mask).any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (3, 5), (17, 33), (101, 64)])
@pytest.mark.parametrize("mpp", [0.1, 0.46, 4.0])
def test_no_tile_is_too_small_or_too_dark(shape: tuple[int, int], mpp: float) -> None:
    """Noise, black, one blue that fills the tile: a mask of its size, and numbers in the table."""
    noise = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    for tile in (noise, noise * 0, np.full_like(noise, (90, 60, 120))):
        for stains in (estimate([tile], mpp), Stains((240, 240, 240))):
            found = segment(tile, mpp, stains)
            assert found.mask.shape == shape
            assert np.isfinite(found.cells.x_px).all()
            assert (found.cells.completeness <= 1).all()


def test_pigment_away_from_cells_makes_none_positive() -> None:
    slide = draw(np.zeros((3, 4)))
    stroke = slide.rgb.copy()
    # A brown thread between the first and the second row, 6 um from every nucleus.
    stroke[42:46] = over(np.full((4, stroke.shape[1], 3), BACKGROUND, np.uint8), 0.8 * DAB)
    after = segment(stroke, 0.5, estimate([slide.rgb], 0.5))
    assert len(after.cells) == 12
    assert not after.cells.positive.any()
    assert (label_format.intensity(after.mask)[43:45] == 3).all()


def test_nuclei_are_found_in_blue_haze_and_haze_is_none() -> None:
    """Stroma takes up haematoxylin, softly; a nucleus has an edge."""
    slide = draw(np.zeros((3, 5)), counterstain=0.4)
    x = np.arange(slide.rgb.shape[1]) / slide.rgb.shape[1]
    haze = 0.14 * np.sin(2 * np.pi * x) ** 2
    found = labelled(over(slide.rgb, haze[None, :, None] * HAEMATOXYLIN))
    assert (slide.matched(found.cells) >= 0).all()
    assert len(found.cells) == 15
    nuclei = label_format.nuclei(found.mask)
    assert (nuclei & slide.nuclei).sum() / (nuclei | slide.nuclei).sum() > 0.6


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.2])
def test_a_paler_slide_has_the_same_nuclei(factor: float) -> None:
    """All densities of a slide of pale nuclei times a factor."""
    slide = draw(np.zeros((7, 9)), counterstain=0.14)
    ratio = np.minimum(slide.rgb / np.array(BACKGROUND), 1)
    scaled = (np.array(BACKGROUND) * ratio**factor).round().astype(np.uint8)
    state = estimate(thirds(scaled), 0.5)
    assert state.nuclei_measured
    found = segment(scaled, 0.5, state)
    nuclei = label_format.nuclei(found.mask)
    assert abs(len(found.cells) - len(slide.x_px)) <= 0.05 * len(slide.x_px)
    assert 2 * (nuclei & slide.nuclei).sum() / (nuclei.sum() + slide.nuclei.sum()) > 0.85


INKS = {
    "red": (0.10, 0.70, 0.55),
    "green": (0.6, 0.25, 0.5),
    "blue": (0.95, 0.50, 0.05),
    "black": (0.80, 0.80, 0.75),
    "the counterstain": tuple(0.8 * HAEMATOXYLIN),
}


@pytest.mark.parametrize("colour", INKS)
def test_pen_is_excluded_and_the_rest_is_as_without_it(colour: str) -> None:
    slide = draw(np.zeros((4, 9)))
    before = segment(slide.rgb, 0.5, MEASURED)
    assert excluded_fraction(before) == 0
    inked = slide.rgb.copy()
    inked[:, 120:200] = over(inked[:, 120:200], INKS[colour])
    found = segment(inked, 0.5, MEASURED)
    fraction = 80 / inked.shape[1]
    assert 0.5 * fraction < excluded_fraction(found) < 1.5 * fraction
    assert found.cells.positive.sum() <= 1  # at the very edge
    np.testing.assert_array_equal(found.mask[:, 240:], before.mask[:, 240:])


def test_pen_of_the_counterstain_is_excluded_though_it_is_the_darkest_there_is() -> None:
    """Stains are estimated from the tile with pen, which is no nucleus."""
    inked = draw(np.zeros((4, 9))).rgb
    inked[:, 120:220] = over(inked[:, 120:220], 0.9 * HAEMATOXYLIN)
    assert estimate([inked], 0.5).nuclear_density == pytest.approx(0.5, abs=0.05)
    found = labelled(inked)
    assert excluded_fraction(found) > 0.7 * 100 / inked.shape[1]
    assert not label_format.nuclei(found.mask)[:, 125:215].any()


def test_a_fold_is_excluded_and_a_row_of_dark_nuclei_is_not() -> None:
    slide = draw(np.full((4, 9), 0.3), counterstain=1.2)
    assert excluded_fraction(segment(slide.rgb, 0.5, MEASURED)) == 0
    folded = slide.rgb.copy()
    folded[:, 150:190] = over(folded[:, 150:190], 0.6)
    found = segment(folded, 0.5, MEASURED)
    assert excluded_fraction(found) > 0.8 * 40 / folded.shape[1]
    assert not label_format.classes(found.mask[:, 155:185]).any()


@pytest.mark.parametrize("mpp", [0.46, 0.5, 0.92])
def test_a_gray_line_is_no_row_of_cells(mpp: float) -> None:
    """The edge of a coverslip on background: 3 um wide, bent, of varying density, of no colour."""
    y, x = (np.mgrid[:340, :410] + 0.5) * mpp
    apart = np.abs(x - 80 - 25 * np.sin(y / 60))
    density = (0.45 + 0.2 * np.sin(y / 11)) * np.exp(-((apart / 1.5) ** 2))
    noise = np.random.default_rng(4).normal(0, 1.5, (*y.shape, 3))
    rgb = (236 * 10 ** -density[..., None] + noise).round().clip(0, 255).astype(np.uint8)
    known = Stains((236, 236, 236), estimated=("haematoxylin", "dab"))
    for stains in (estimate([rgb], mpp), known):
        found = segment(rgb, mpp, stains)
        assert len(found.cells) == 0
        assert not label_format.classes(found.mask).any()
        assert 0.01 < excluded_fraction(found) < 0.15


def test_a_nuclear_marker_is_graded_in_the_nucleus() -> None:
    """Every other nucleus is brown; there are no membranes."""
    slide = draw(np.zeros((2, 3)))
    brown = np.arange(6) % 2 == 0
    y, x = np.mgrid[: slide.rgb.shape[0], : slide.rgb.shape[1]]
    density = np.zeros(slide.rgb.shape[:2])
    for cx, cy in zip(slide.x_px[brown], slide.y_px[brown], strict=True):
        density[np.hypot(y - cy, x - cx) < 8] = 0.5
    rgb = over(slide.rgb, density[..., None] * DAB)
    for compartment, positive in (("nucleus", brown), ("membrane", np.zeros(6, bool))):
        cells = segment(rgb, 0.5, MEASURED, compartment=compartment).cells
        assert len(cells) == 6
        np.testing.assert_array_equal(cells.positive[slide.matched(cells)], positive)


@pytest.mark.parametrize(("dark", "positive"), [(0.5, True), (2.0, False)])
def test_a_pale_brown_nucleus_is_positive_where_no_other_is_much_darker(
    dark: float, positive: bool
) -> None:
    """One nucleus of six has 0.18 of DAB, another `dark`: 0.12 of the darkest is the limit."""
    slide = draw(np.zeros((2, 3)), counterstain=0.3)
    y, x = np.mgrid[: slide.rgb.shape[0], : slide.rgb.shape[1]]
    density = np.zeros(slide.rgb.shape[:2])
    for k, strength in ((1, 0.18), (4, dark)):
        density[np.hypot(y - slide.y_px[k], x - slide.x_px[k]) < 8] = strength
    tiles = [over(slide.rgb, density[..., None] * DAB)] * 3
    of = estimate(tiles, 0.5)
    assert of.dark_dab == pytest.approx(dark, rel=0.2)
    cells = segment(tiles[0], 0.5, of, compartment="nucleus").cells
    assert cells.positive[slide.matched(cells)].tolist() == [
        False,
        positive,
        False,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("strength", [0.25, 0.5])
def test_diffuse_cytoplasm_is_no_membrane_and_a_membrane_around_it_is(strength: float) -> None:
    """Cytoplasm 4 to 11 um from the centre; a membrane in it must be darker than it."""
    slide = draw(np.array([[0.0, 0.6, 0.0], [0.6, 0.0, 0.6]]))
    y, x = np.mgrid[: slide.rgb.shape[0], : slide.rgb.shape[1]]
    cytoplasm = np.zeros(slide.rgb.shape[:2], bool)
    for cx, cy in zip(slide.x_px, slide.y_px, strict=True):
        radius = np.hypot(y - cy, x - cx)
        cytoplasm |= (radius > 8) & (radius < 22)
    cells = segment(over(slide.rgb, strength * cytoplasm[..., None] * DAB), 0.5, MEASURED).cells
    np.testing.assert_array_equal(cells.positive[slide.matched(cells)], np.arange(6) % 2 == 1)


def test_positive_cells_of_the_demo_are_found(cohort: Path) -> None:
    """Against truth, through the demo's own field: cells within 4 um, nearest to each other."""
    right = found_positive = true_positive = graded = matches = 0
    with (cohort / "pairs.tsv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file, delimiter="\t") if r["dataset"] == "bci"]
    for row in rows:
        truth = load_truth(cohort, row["pair"])
        assert truth.field is not None
        rgb, mpp = read(cohort / row["her2"]), float(row["her2_mpp"])
        height, width = rgb.shape[:2]
        corners = [(y, x) for y in range(0, height, 512) for x in range(0, width, 512)]
        tiles = [np.ascontiguousarray(rgb[y : y + 512, x : x + 512]) for y, x in corners]
        found = segment(rgb, mpp, estimate(tiles, mpp)).cells
        places = truth.field.to_moving(np.column_stack([truth.cells.x, truth.cells.y]))
        seen = ((places > 0) & (places < np.array([width, height]) * mpp)).all(axis=1)
        intensity = truth.cells.intensity[seen]
        at = matched(places[seen], np.column_stack([found.x_px, found.y_px]) * mpp, 4.0)
        stained = (at >= 0) & (intensity > 0)
        right += found.positive[at[stained]].sum()
        found_positive += found.positive.sum()
        true_positive += (intensity > 0).sum()
        graded += (found.intensity[at[stained]] == intensity[stained]).sum()
        matches += stained.sum()
    assert right > 300
    assert 2 * right / (found_positive + true_positive) >= 0.85
    assert graded / matches >= 0.85


def test_nuclei_of_real_tiles_with_truth(images: Path) -> None:
    strip = read(images / "deepliif/train/Bladder1.png")
    pairs = [(np.ascontiguousarray(strip[:, :512]), strip[:, -512:])]
    for name in ("22_2.png", "799_2.png"):
        folders = (images / "deepliif" / folder for folder in ("test_ihc", "test_groundtruth"))
        pairs.append(tuple(read(folder / name) for folder in folders))
    scores, agreements = [], []
    for tile, truth in pairs:
        found = labelled(tile, 0.25, compartment="nucleus")
        nuclei, true = label_format.nuclei(found.mask), truth.max(axis=2) > 128
        scores.append(2 * (nuclei & true).sum() / (nuclei.sum() + true.sum()))
        red, blue = truth[..., 0] > 128, truth[..., 2] > 128
        y, x = found.cells.y_px.astype(int), found.cells.x_px.astype(int)
        agreements.append((red[y, x] == found.cells.positive)[(red | blue)[y, x]].mean())
    assert np.mean(scores) >= 0.75
    assert min(scores) >= 0.60
    assert min(agreements) >= 0.85


def test_the_edge_of_a_real_coverslip_is_no_row_of_cells(images: Path) -> None:
    """Of up to 31 positive cells one remains, a bubble beside the edge."""
    tile = read(images / "qc_tiles/no-tissue-line.png")
    for mpp, allowed in ((0.25, 0), (0.46, 0), (0.5, 0), (0.92, 1)):
        found = labelled(tile, mpp)
        assert found.cells.positive.sum() <= allowed
        assert label_format.positive(found.mask).mean() < 0.001


def test_real_tiles_are_ordered_by_their_score(images: Path) -> None:
    """Not used, because they show no tumour: 00003 (3+) and 00004 (0); 00345 (0) is skin."""
    positive, strong = {}, {}
    for name in (
        "bci_ihc_only_1024/IHC/test/00000_test_1+.png",
        "bci_ihc_only_1024/IHC/test/00001_test_2+.png",
        "bci_ihc_only_1024/IHC/test/00002_test_2+.png",
        "bci_ihc_only_1024/IHC/test/00005_test_1+.png",
        "bci_pairs_1024/IHC/test/00820_test_2+.png",
        "bci_pairs_1024/IHC/test/00345_test_0.png",
    ):
        found = labelled(read(images / name), 0.46)
        positive[name] = float(found.cells.positive.mean())
        strong[name] = float((found.cells.intensity >= 2).mean())
        if "00005" in name:
            assert label_format.positive(found.mask).mean() < 0.001
    skin = "bci_pairs_1024/IHC/test/00345_test_0.png"
    assert min(value for name, value in positive.items() if "2+" in name) > 2 * positive[skin]
    for fractions in (positive, strong):
        high = [value for name, value in fractions.items() if "2+" in name]
        low = [value for name, value in fractions.items() if "1+" in name]
        assert min(high) > 2 * max(low), fractions
