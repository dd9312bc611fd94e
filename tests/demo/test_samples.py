"""Images of nuclei for training: the same bytes from one seed, and truth that fits the image."""

import dataclasses

import numpy as np
import pytest

from hemera.demo.blocks import BLOCK_UM, Block, grow_block, look_at, noise
from hemera.demo.samples import Sample, draw_sample
from hemera.demo.variants import PATTERNS, Variant, draw_variant
from hemera.imaging import color

MPP = 0.75
SIDE = 96


@pytest.fixture(scope="module")
def block() -> Block:
    return grow_block(np.random.default_rng(4))


def plain(variant: Variant, pattern: str) -> Variant:
    """Return a variant in focus, without debris and noise, of one staining pattern."""
    nothing = dict.fromkeys((f.name for f in dataclasses.fields(variant.debris)), 0)
    camera = dataclasses.replace(
        variant.camera,
        haematoxylin=np.array([0.65, 0.70, 0.29], np.float32),
        dab=np.array([0.27, 0.57, 0.78], np.float32),
        tint=np.zeros(3, np.float32),
        background=np.full(3, 245, np.float32),
        blur_um=0.3,
        sharpened=0.0,
        gamma=1.0,
        glare=0.0,
        noise=0.0,
        jpeg_quality=0,
        background_error=np.ones(3, np.float32),
        background_is_measured=False,
    )
    staining = dataclasses.replace(
        variant.staining, pattern=pattern, positive=1.0, nuclear=1.5, leak=0.0, unspecific=0.0
    )
    shape = dataclasses.replace(
        variant.shape, missing=0.0, pale=0.0, overlapping=0, defocused=0, irregular=0.05
    )
    return dataclasses.replace(
        variant,
        debris=dataclasses.replace(variant.debris, **nothing),
        camera=camera,
        staining=staining,
        shape=shape,
    )


def drawn(block: Block, seed: int, pattern: str | None = None) -> Sample:
    rng = np.random.default_rng(seed)
    variant = draw_variant(rng)
    if pattern is not None:
        variant = plain(variant, pattern)
    return draw_sample(rng, block, variant, SIDE, MPP)


def test_the_same_seed_gives_the_same_bytes(block: Block) -> None:
    again = grow_block(np.random.default_rng(4))
    np.testing.assert_array_equal(again.cell, block.cell)
    np.testing.assert_array_equal(again.maps, block.maps)
    for seed in range(12):
        one, two = drawn(block, seed), drawn(again, seed)
        assert one.background == two.background
        for name in ("rgb", "centre", "nucleus", "weight"):
            assert getattr(one, name).tobytes() == getattr(two, name).tobytes(), name


def test_truth_is_bounded_and_centres_are_inside_of_nuclei(block: Block) -> None:
    nuclei = 0.0
    for seed in range(30):
        sample = drawn(block, seed)
        assert sample.rgb.shape == (SIDE, SIDE, 3) and sample.rgb.dtype == np.uint8
        for layer in (sample.centre, sample.nucleus, sample.weight):
            assert layer.shape == (SIDE, SIDE) and layer.dtype == np.float32
            assert layer.min() >= 0 and layer.max() <= 1
        assert not sample.centre[sample.nucleus == 0].any()
        assert all(60 <= channel <= 255 for channel in sample.background)
        nuclei += float(sample.nucleus.mean())
    assert 0.03 < nuclei / 30 < 0.5


@pytest.mark.parametrize("pattern", PATTERNS)
def test_nuclei_are_where_the_truth_is(block: Block, pattern: str) -> None:
    """The stain of each pattern is denser where the truth says, in the mean of some images."""
    inside, outside, ring = [], [], []
    for seed in range(40, 52):
        sample = drawn(block, seed, pattern)
        vectors = np.array([[0.65, 0.70, 0.29], [0.27, 0.57, 0.78]])
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        density = color.optical_density(sample.rgb, sample.background)
        first, second = np.moveaxis(density @ color.unmixing_matrix(vectors), -1, 0)[:2]
        nucleus = sample.nucleus > 0
        if nucleus.sum() < 100:
            continue
        inside.append([first[nucleus].mean(), second[nucleus].mean()])
        outside.append([first[~nucleus].mean(), second[~nucleus].mean()])
        ring.append(second[~nucleus].max())
    (blue, brown), (blue_around, brown_around) = np.mean(inside, 0), np.mean(outside, 0)
    assert blue > blue_around
    if pattern == "nuclear":
        assert brown > 5 * brown_around
    if pattern == "none":
        assert max(brown, brown_around) < 0.02
    if pattern == "membrane":
        assert np.mean(ring) > brown + 0.1


def test_folds_are_not_weighted(block: Block) -> None:
    rng = np.random.default_rng(1)
    variant = plain(draw_variant(rng), "none")
    folded = dataclasses.replace(variant.debris, fold_um=20.0)
    sample = draw_sample(rng, block, dataclasses.replace(variant, debris=folded), SIDE, MPP)
    assert 0.05 < (sample.weight == 0).mean() < 0.6


def test_debris_is_never_a_nucleus(block: Block) -> None:
    for seed in range(6):
        truths = []
        for debris in ({}, {"specks": 9, "smear": 0.8, "haze": 0.4}):
            rng = np.random.default_rng(seed)
            variant = plain(draw_variant(rng), "none")
            variant = dataclasses.replace(
                variant, debris=dataclasses.replace(variant.debris, **debris)
            )
            truths.append(draw_sample(rng, block, variant, SIDE, MPP))
        np.testing.assert_array_equal(truths[0].nucleus, truths[1].nucleus)
        assert (truths[0].rgb != truths[1].rgb).any()


def test_scale_is_that_of_the_variant(block: Block) -> None:
    variant = draw_variant(np.random.default_rng(2))
    areas = []
    for scale in (0.8, 1.4):
        geometry = dataclasses.replace(variant.geometry, scale=scale, stretch=1.0, bends_um=())
        seen = look_at(np.random.default_rng(7), block, geometry, SIDE, MPP)
        areas.append(SIDE**2 / len(np.unique(seen.cell)))
    assert 2.2 < areas[1] / areas[0] < 4.2, "(1.4 / 0.8)^2 is 3.1"
    assert BLOCK_UM > SIDE * MPP


def test_noise_is_standard_and_of_the_detail_that_is_asked_for(block: Block) -> None:
    rng = np.random.default_rng(3)
    steps = []
    for sigma in (0.9, 3.0, 14.0):
        fields = np.stack([noise(rng, block, 128, MPP, sigma) for _ in range(20)])
        assert abs(fields.mean()) < 0.5
        steps.append(np.abs(np.diff(fields, axis=1)).mean())
    assert steps[0] > 1.5 * steps[1] > 3 * steps[2]
