"""Tissue of the demo: cells, their classes, and the stain that they are drawn with."""

import dataclasses

import numpy as np
import pytest

from hemera.demo.cells import EXPRESSION, SPINDLE, TUMOUR, staining_class
from hemera.demo.render import DAB, Appearance, Renderer, rasterise
from hemera.demo.scanner import defocus, photograph
from hemera.demo.tissue import grow
from hemera.imaging.quality import sharpness


def test_another_seed_grows_other_tissue() -> None:
    tissues = [
        grow(np.random.default_rng(seed), (300.0, 200.0), "2+", whole=False) for seed in (1, 2, 1)
    ]
    assert np.array_equal(tissues[0].cells.x, tissues[2].cells.x)
    assert not np.array_equal(tissues[0].outline, tissues[1].outline) or not np.array_equal(
        tissues[0].cells.x, tissues[1].cells.x
    )


def test_a_section_lies_on_glass_and_a_tile_of_one_may_be_empty() -> None:
    rng = np.random.default_rng(12)
    whole = grow(rng, (1500.0, 1100.0), "3+", whole=True)
    inside = whole.outline > 0
    assert 0.3 < inside.mean() < 0.9
    assert not inside[:8].any() and not inside[:, -8:].any()
    empty = grow(rng, (470.0, 470.0), "1+", whole=False, empty=True)
    assert 0.005 < (empty.outline > 0).mean() < 0.25
    # Nuclei lie in tissue, and not in a lumen.
    i = (whole.cells.y / 3).astype(int)
    j = (whole.cells.x / 3).astype(int)
    assert (whole.outline[i, j] > 0).mean() > 0.99 and (whole.lumen[i, j] < 3).all()


def test_ultralow_is_faint_staining_of_at_most_a_tenth_of_the_tumour_cells() -> None:
    for score in EXPRESSION:
        cells = grow(np.random.default_rng(3), (600.0, 400.0), score, whole=False).cells
        assert staining_class(cells) == score
        stained = cells.intensity[cells.kind == TUMOUR] > 0
        assert (0 < stained.mean() <= 0.1) == (score == "ultralow")
    few = (0.995, 0.005, 0.0, 0.0)
    rare = grow(np.random.default_rng(3), (600.0, 400.0), "0", whole=False, expression=few)
    assert staining_class(rare.cells) == "ultralow"
    benign = dataclasses.replace(rare.cells, kind=np.full_like(rare.cells.kind, SPINDLE))
    assert staining_class(benign) == ""


def test_visibility_is_how_far_nuclei_show_the_expression() -> None:
    """Nuclei of strong cells are 1.6 times as wide; at 0.5 half of that; at 0 all look alike."""
    ratios = {}
    for visibility in (1.0, 0.5, 0.0):
        rng = np.random.default_rng(5)
        tissue = grow(rng, (600.0, 420.0), "3+", whole=False, visibility=visibility)
        cells = tissue.cells
        radius = np.sqrt(cells.long_radius * cells.short_radius)
        means = [
            radius[(cells.kind == TUMOUR) & (cells.intensity == intensity)].mean()
            for intensity in (0, 3)
        ]
        ratios[visibility] = means[1] / means[0]
        # HER2 itself stays.
        assert staining_class(cells) == "3+"
    assert ratios[1.0] > 1.4
    assert 1.1 < ratios[0.5] < ratios[1.0] - 0.1
    assert abs(ratios[0.0] - 1) < 0.03


def test_true_densities_are_the_stain_that_cells_were_drawn_with() -> None:
    """Against the amounts of `Renderer`: cytoplasm 0.035 to 0.30, membranes up to 1.3 units."""
    rng = np.random.default_rng(6)
    tissue = grow(rng, (300.0, 230.0), "3+", whole=False)
    renderer = Renderer(tissue, rasterise(tissue, 0.5, (600, 460)), rng)
    unit = float(np.linalg.norm(DAB)) / np.log(10)
    found = renderer.densities(Appearance((250, 250, 250)))
    cells = tissue.cells
    inner = (np.abs(cells.x - 150) < 130) & (np.abs(cells.y - 115) < 95) & (cells.kind == TUMOUR)
    for intensity, (strength, blush) in enumerate(
        ((0, 0.035), (0.27, 0.085), (0.62, 0.15), (1.3, 0.3))
    ):
        own = inner & (cells.intensity == intensity)
        assert np.nanmedian(found.cytoplasm[own]) == pytest.approx(blush * unit, rel=0.15)
        assert np.nanmedian(found.nucleus[own]) < np.nanmedian(found.cytoplasm[own])
        # Texture adds up to 0.6 to the largest value of a direction; holes and gaps have none.
        assert 0.4 * strength * unit <= found.membrane[own].mean() <= 1.4 * strength * unit
    twice = renderer.densities(Appearance((250, 250, 250), second=2.0))
    assert twice.membrane == pytest.approx(2 * found.membrane)


def test_the_blurred_region_is_blurred_and_marked_slides_differ() -> None:
    rng = np.random.default_rng(8)
    tissue = grow(rng, (460.0, 322.0), "1+", whole=False)
    look = Appearance((230, 220, 225))
    drawing = Renderer(tissue, rasterise(tissue, 0.92, (500, 350)), rng).draw("he", look)
    spoilt = defocus(drawing, (350.0, 175.0), (110.0, 120.0))
    assert np.array_equal(spoilt[:, :200], drawing[:, :200])
    sharp, blurred = (
        sharpness(np.ascontiguousarray(photograph(x, look, rng)[125:225, 300:400]), 0.92)
        for x in (drawing, spoilt)
    )
    assert sharp >= 60 and blurred < 15
