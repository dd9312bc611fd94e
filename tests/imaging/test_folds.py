"""Folds: several layers of one tissue, and what is dense and no fold."""

import cv2
import numpy as np
import pytest

from hemera.imaging.folds import find_folds
from tests.small_cells import DAB, HAEMATOXYLIN

EOSIN = np.array([0.07, 0.94, 0.33])
HEIGHT, WIDTH = 120, 150
"""At 2 um/px: 240 x 300 um."""

Y, X = (np.mgrid[:HEIGHT, :WIDTH] + 0.5) * 2
BESIDE = (X - 150) * 0.8 + (Y - 110) * 0.6
"""Distance from an oblique line, um."""


def layer(seed: int, stain: str) -> np.ndarray:
    """Densities (H, W, 3) of a layer: nuclei of 8 um at random, in eosin or in pale cytoplasm."""
    rng = np.random.default_rng(seed)
    nuclei = np.zeros((HEIGHT, WIDTH), np.float32)
    for x, y in rng.uniform((0, 0), (2 * WIDTH, 2 * HEIGHT), (230, 2)):
        nuclei[np.hypot(X - x, Y - y) < 4] = 0.4
    fibres = cv2.GaussianBlur(rng.normal(size=nuclei.shape), (0, 0), 3)
    ground = (0.15 if stain == "he" else 0.06) * (1 + 0.6 * fibres / fibres.std()).clip(0.4)
    colour = EOSIN if stain == "he" else HAEMATOXYLIN
    dense = cv2.GaussianBlur(nuclei, (0, 0), 0.6)[..., None] * HAEMATOXYLIN
    return (dense + ground[..., None] * colour).astype(np.float32)


def typical(density: np.ndarray) -> float:
    coarse = cv2.resize(density, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
    return float(np.percentile(coarse.mean(axis=2), 75))


@pytest.mark.parametrize("stain", ["he", "her2"])
@pytest.mark.parametrize("angle", [37, 131])
def test_three_layers_are_a_fold_where_they_are(stain: str, angle: int) -> None:
    """A band of 50 um, oblique, off the centre; its edge is right to 10 um."""
    turn = np.radians(angle)
    distance = np.abs((X - 130) * np.cos(turn) + (Y - 105) * np.sin(turn))
    flat = layer(1, stain)
    more = layer(2, stain) + layer(3, stain)
    folded = flat + more * (distance < 25)[..., None]
    found = find_folds(folded, 2.0, typical(flat))
    assert found[distance < 15].mean() > 0.8
    assert not found[distance > 35].any()
    assert not find_folds(flat, 2.0, typical(flat)).any()


def test_a_band_is_a_fold_on_a_dense_slide_and_one_edge_is_none() -> None:
    """Paler than most of its slide; beyond one edge alone the same density is other tissue."""
    flat, more = layer(1, "he"), layer(2, "he") + layer(3, "he")
    for inside, is_fold in ((np.abs(BESIDE) < 25, True), (BESIDE > 0, False)):
        folded = flat + more * inside[..., None]
        found = find_folds(folded, 2.0, 3 * typical(folded))
        assert found.any() == is_fold
        if is_fold:
            assert found[np.abs(BESIDE) < 15].mean() > 0.7
            assert not found[np.abs(BESIDE) > 40].any()


def test_a_band_of_another_colour_is_no_fold() -> None:
    """A strip of stained cells of twice the density of its sides."""
    flat = layer(1, "her2")
    mean = flat.mean(axis=2, keepdims=True)
    for dye, is_fold in ((DAB, False), (flat / mean, True)):
        strip = flat + 1.5 * mean * dye / np.mean(dye) * (np.abs(BESIDE) < 25)[..., None]
        found = find_folds(strip.astype(np.float32), 2.0, 3 * typical(flat))
        assert found.any() == is_fold


def test_nuclei_side_by_side_are_no_fold() -> None:
    """Thrice the nuclei beyond a straight line, in the same eosin."""
    flat = layer(1, "he")
    nuclei = (layer(2, "he") + layer(3, "he")) * (1 - EOSIN / np.linalg.norm(EOSIN))
    eosin_free = np.maximum(nuclei - nuclei.min(axis=(0, 1)), 0)
    nest = flat + eosin_free * (BESIDE > 0)[..., None]
    assert nest[BESIDE > 0].mean() > 1.5 * flat.mean()
    assert not find_folds(nest.astype(np.float32), 2.0, typical(flat)).any()


def test_stained_tumour_is_no_fold_for_its_colour() -> None:
    """DAB everywhere beyond a straight line; the same density without its colour is a fold."""
    flat = layer(1, "her2")
    mean = flat.mean(axis=2, keepdims=True)
    for dye, is_fold in ((DAB, False), (flat / mean, True)):
        dense = flat + 2.5 * mean * dye / np.mean(dye) * (BESIDE > 0)[..., None]
        found = find_folds(dense.astype(np.float32), 2.0, typical(flat))
        assert found.any() == is_fold


def test_tissue_beside_background_is_no_fold() -> None:
    tissue = layer(1, "he") * (BESIDE > 0)[..., None]
    assert not find_folds(tissue.astype(np.float32), 2.0, typical(layer(1, "he")) / 3).any()


def test_no_fold_is_found_without_a_slide_to_compare_with_or_on_an_overview() -> None:
    flat = layer(1, "he")
    folded = flat + 2 * flat * (np.abs(BESIDE) < 25)[..., None]
    assert find_folds(folded, 2.0, typical(flat)).any()
    assert not find_folds(folded, 2.0, float("inf")).any()
    assert not find_folds(folded, 8.0, typical(flat)).any()
