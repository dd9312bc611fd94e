import cv2
import numpy as np
import pytest
from PIL import Image
from skimage.color import rgb2hed

from hemera.imaging import color
from hemera.imaging.color import DENSITY_STEP


@pytest.fixture
def rng():
    return np.random.default_rng(20251)


def texture(rng, height, width, sigma):
    """Tissue-like: gray noise with structures of a size."""
    noise = cv2.GaussianBlur(rng.normal(size=(height, width)).astype(np.float32), (0, 0), sigma)
    noise = 128 + 40 * noise / noise.std()
    return np.repeat(np.clip(noise, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def tissue(rng, height=90, width=130):
    """H&E colours all over, from pale eosin to dark nuclei."""
    share = cv2.GaussianBlur(rng.random((height, width)).astype(np.float32), (0, 0), 3)
    share = (share - share.min()) / np.ptp(share)
    eosin, nucleus = np.array([235, 190, 215]), np.array([95, 60, 140])
    return np.rint(eosin + share[..., None] * (nucleus - eosin)).astype(np.uint8)


def test_stains_equal_scikit_image(rng):
    rgb = rng.integers(0, 256, (37, 53, 3), dtype=np.uint8)
    rgb[0, :4] = [[0, 0, 0], [255, 255, 255], [1, 255, 0], [255, 0, 1]]
    reference = rgb2hed(rgb)
    assert np.abs(color.separate_stains(rgb) - reference).max() < 1e-6
    assert np.abs(color.haematoxylin(rgb) - reference[..., 0]).max() < 1e-6


def test_optical_density_by_hand():
    rgb = np.array([[[255, 25, 0], [200, 100, 50]]], np.uint8)
    density = color.optical_density(rgb, (250, 250, 200))
    assert density[0, 0] == pytest.approx([0.0, 1.0, np.log10(200)], abs=1e-5)
    assert density[0, 1] == pytest.approx(np.log10([250 / 200, 2.5, 4]), abs=1e-5)


def test_sharpness_at_half_a_micrometre_is_the_plain_variance(rng):
    rgb = rng.integers(0, 256, (61, 97, 3), dtype=np.uint8)
    gray = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    reference = cv2.Laplacian(gray, cv2.CV_64F).var()
    assert color.sharpness(rgb, 0.5) == pytest.approx(reference, rel=1e-9)
    assert color.sharpness(np.full((40, 30, 3), 200, np.uint8), 0.5) == 0


@pytest.mark.parametrize("sigma", [3.0, 4.0, 6.0])
def test_sharpness_is_comparable_between_resolutions(rng, sigma):
    fine = texture(rng, 800, 1200, sigma)
    at = {
        0.25 * factor: cv2.resize(
            fine, (1200 // factor, 800 // factor), interpolation=cv2.INTER_AREA
        )
        for factor in (1, 2, 4)
    }
    half = color.sharpness(at[0.5], 0.5)
    # Finer is measured after averaging: the same picture.
    assert color.sharpness(at[0.25], 0.25) == pytest.approx(half, rel=1e-6)
    # Coarser is extrapolated: right to a factor of three where unscaled values are up to 16 apart.
    raw = cv2.Laplacian(cv2.cvtColor(at[1.0], cv2.COLOR_RGB2GRAY), cv2.CV_64F).var()
    assert 1 / 3 < color.sharpness(at[1.0], 1.0) / half < 3.5
    assert abs(np.log(color.sharpness(at[1.0], 1.0) / half)) < abs(np.log(raw / half))


def test_blur_lowers_sharpness(rng):
    sharp = texture(rng, 200, 300, 1.0)
    assert color.sharpness(cv2.GaussianBlur(sharp, (0, 0), 2), 0.5) < 0.2 * color.sharpness(
        sharp, 0.5
    )


def test_saturation_is_none_in_gray_and_in_the_dark():
    rgb = np.array([[[180, 180, 180], [20, 0, 10], [200, 80, 150]]], np.uint8)
    assert color.saturation(rgb).tolist() == [[0, 0, 153]]


def test_gray_haze_is_glass_and_a_pale_counterstain_is_not():
    haze, pale = (176, 175, 172), (168, 172, 172)
    rgb = np.array([[haze, pale, (255, 255, 255)]], np.uint8)
    density = color.density(rgb, haze) * DENSITY_STEP
    assert density[0, 0] == 0
    assert density[0, 1] == pytest.approx(np.log10(176 / 168), abs=DENSITY_STEP)
    assert density[0, 2] == 0


def test_the_threshold_lies_between_two_modes_and_within_its_bounds(rng):
    glass = rng.normal(4, 1.5, (50, 80))
    stained = rng.normal(60, 10, (50, 80))
    both = np.clip(np.hstack([glass, stained]), 0, 255).astype(np.uint8)
    assert 10 < color.tissue_threshold(both, 0, 255) < 45
    assert color.tissue_threshold(both, 0, 12) == 12
    # Glass alone, tissue alone: Otsu splits noise, the bounds do not let it.
    only_glass = np.clip(glass, 0, 255).astype(np.uint8)
    assert (only_glass > color.tissue_threshold(only_glass, 13, 25)).mean() == 0
    only_tissue = np.clip(stained, 0, 255).astype(np.uint8)
    assert (only_tissue > color.tissue_threshold(only_tissue, 13, 25)).mean() > 0.99


def test_outline_fills_holes_and_drops_specks():
    mask = np.zeros((40, 60), bool)
    mask[5:30, 10:50] = True
    mask[10:13, 20:24] = False  # a hole of 12
    mask[20:26, 30:40] = False  # a hole of 60
    mask[35:37, 2:4] = True  # a speck of 4
    result = color.outline(mask, hole_px=20, speck_px=10)
    assert result[10:13, 20:24].all()
    assert not result[20:26, 30:40].any()
    assert not result[35:37, 2:4].any()
    assert result.sum() == 25 * 40 - 60


def test_outline_leaves_glass_at_the_edge_alone():
    mask = np.ones((20, 31), bool)
    mask[0:3, 4:6] = False
    assert not color.outline(mask, hole_px=100, speck_px=0)[0:3, 4:6].any()
    empty = np.zeros((9, 7), bool)
    assert not color.outline(empty, hole_px=10, speck_px=10).any()


def test_glass_is_the_brightest_gray_not_the_commonest_colour(rng):
    rgb = tissue(rng, 100, 140)
    rgb[:20] = np.clip(rng.normal((241, 240, 238), 1.0, (20, 140, 3)), 0, 255)
    assert np.abs(np.subtract(color.glass_colour(rgb), (241, 240, 238))).max() <= 1
    # As in BCI: gray glass, and a little of it.
    rgb[:20] = tissue(rng, 20, 140)
    rgb[:20, :60] = np.clip(rng.normal((178, 178, 175), 1.0, (20, 60, 3)), 0, 255)
    assert np.abs(np.subtract(color.glass_colour(rgb), (178, 178, 175))).max() <= 2


def test_without_glass_the_brightest_colour_stands_in(rng):
    rgb = tissue(rng)
    colour = color.glass_colour(rgb)
    assert np.abs(np.subtract(colour, rgb.reshape(-1, 3).max(axis=0))).max() < 25


def test_similarity_ignores_brightness_and_contrast_and_knows_shape(rng):
    he = tissue(rng)
    assert color.histogram_similarity(he, he) == pytest.approx(1.0)
    paler = np.rint(255 - (255 - he.astype(float)) * 0.6).astype(np.uint8)
    assert color.histogram_similarity(he, paler) > 0.8
    two = np.full_like(he, 230)
    two[:, : two.shape[1] // 2] = (90, 60, 150)
    assert color.histogram_similarity(he, two) < 0.3
    assert color.histogram_similarity(he, np.full_like(he, 200)) is None


def test_similarity_equals_its_definition(rng):
    he, her2 = tissue(rng), tissue(rng)[::-1] // 2 + 90
    histograms = []
    for rgb in (he, her2):
        stain = rgb2hed(rgb)[..., 0]
        scaled = (stain - np.median(stain)) / stain.std()
        histograms.append(np.histogram(scaled, 64, (-4, 4))[0])
    reference = np.corrcoef(*histograms)[0, 1]
    assert color.histogram_similarity(he, her2) == pytest.approx(reference, abs=0.02)


def test_half_the_resolution_is_the_mean_of_four_pixels():
    rgb = np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3)
    small = color.halved(rgb)
    assert small.shape == (2, 3, 3)
    mean = rgb[:4].astype(float).reshape(2, 2, 3, 2, 3).mean(axis=(1, 3))
    assert np.abs(small - mean).max() <= 0.5


def test_colour_at_half_the_resolution_is_that_of_all_pixels_on_real_tiles(images):
    """Tissue within 2 % of a tile, similarity within 0.05 of what scikit-image's rgb2hed gives."""
    seen = 0
    for name in ("00345_test_0.png", "00820_test_2+.png"):
        he, her2 = (
            np.asarray(Image.open(images / "bci_pairs_1024" / stain / "test" / name))
            for stain in ("HE", "IHC")
        )
        for y in (0, 512):
            for x in (0, 512):
                pair = [np.ascontiguousarray(rgb[y : y + 512, x : x + 512]) for rgb in (he, her2)]
                small = [color.halved(rgb) for rgb in pair]
                for measure, limit in (
                    (color.saturation, 15),
                    (lambda rgb: color.density(rgb, (240, 240, 240)), 15),
                ):
                    for whole, half in zip(pair, small, strict=True):
                        share = (measure(whole) > limit).mean()
                        assert (measure(half) > limit).mean() == pytest.approx(share, abs=0.02)
                if (color.saturation(pair[0]) > 15).mean() < 0.5:
                    # Nearly all glass: where its heap falls among the bins decides.
                    continue
                seen += 1
                counts = []
                for rgb in pair:
                    stain = rgb2hed(rgb)[..., 0]
                    scaled = (stain - np.median(stain)) / stain.std()
                    counts.append(np.histogram(scaled, 64, (-4, 4))[0])
                reference = np.corrcoef(*counts)[0, 1]
                found = color.histogram_similarity(*small)
                assert found == pytest.approx(reference, abs=0.05)
    assert seen >= 6


@pytest.mark.parametrize(
    ("left", "top", "step_x", "step_y"),
    [(0.0, 0.0, 1.5, 1.5), (3.25, 1.75, 2.3, 2.3), (2.0, 4.0, 3.0, 2.0), (0.4, 0.6, 1.0, 1.0)],
)
def test_area_resampling_is_the_mean_over_each_pixel(rng, left, top, step_x, step_y):
    rgb = rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)
    width, height = 9, 6
    result = color.area_resample(rgb, left, top, step_x, step_y, width, height)
    # Each source pixel cut in 200 x 200.
    fine = 200
    x = (left + (np.arange(width * fine) + 0.5) / fine * step_x).astype(int)
    y = (top + (np.arange(height * fine) + 0.5) / fine * step_y).astype(int)
    brute = rgb[y][:, x].reshape(height, fine, width, fine, 3).mean(axis=(1, 3))
    assert np.abs(result - brute).max() < 1.5
    assert np.abs(result - brute).mean() < 0.5


def test_area_resampling_keeps_a_ramp_in_place():
    ramp = np.repeat(np.arange(0, 200, 2, dtype=np.uint8)[None, :, None], 40, axis=0)
    rgb = np.repeat(ramp, 3, axis=2)
    result = color.area_resample(rgb, 7.3, 2.0, 1.7, 1.7, 20, 10)
    # The value at a continuous place x is 2 (x - 0.5).
    centres = 7.3 + (np.arange(20) + 0.5) * 1.7
    assert np.abs(result[0, :, 0] - 2 * (centres - 0.5)).max() <= 0.51


def test_enlarging_keeps_a_ramp_in_place():
    ramp = np.repeat(np.arange(0, 200, 2, dtype=np.uint8)[None, :, None], 40, axis=0)
    rgb = np.repeat(ramp, 3, axis=2)
    result = color.shift_resample(rgb, 7.3, 2.0, 0.4, 0.4, 30, 10)
    centres = 7.3 + (np.arange(30) + 0.5) * 0.4
    assert np.abs(result[3, :, 0] - 2 * (centres - 0.5)).max() <= 0.6


def test_remap_samples_at_pixel_centres(rng):
    rgb = rng.integers(0, 256, (20, 33, 3), dtype=np.uint8)
    x, y = np.meshgrid(np.arange(3, 13, dtype=np.float32), np.arange(2, 9, dtype=np.float32))
    for cubic in (False, True):
        assert (color.remap(rgb, x, y, cubic=cubic) == rgb[2:9, 3:13]).all()


def test_real_tiles(images):
    def read(name):
        return np.asarray(Image.open(images / name).convert("RGB"))

    def share(rgb):
        return (color.saturation(rgb) > 0.1 * 255).mean()

    assert share(read("qc_tiles/no-tissue.png")) < 0.01
    assert share(read("qc_tiles/no-tissue-line.png")) < 0.05
    assert share(read("qc_tiles/almost-white-2.png")) < 0.25
    assert share(read("qc_tiles/tissue-level0-4302-10273-4814-10785.png")) > 0.5
    nearly_blank = read("bci_ihc_only_1024/IHC/test/00005_test_1+.png")
    strong = read("bci_ihc_only_1024/IHC/test/00002_test_2+.png")
    dense = [
        (color.density(rgb, color.glass_colour(rgb)) > 0.05 / DENSITY_STEP).mean()
        for rgb in (nearly_blank, strong)
    ]
    assert dense[0] < 0.1 < 0.4 < dense[1]


def test_real_pairs_are_alike(images):
    for name in ("00345_test_0.png", "00820_test_2+.png"):
        he, her2 = (
            np.asarray(Image.open(images / "bci_pairs_1024" / stain / "test" / name))
            for stain in ("HE", "IHC")
        )
        for y in (0, 512):
            for x in (0, 512):
                part = np.s_[y : y + 512, x : x + 512]
                assert 0.3 < color.histogram_similarity(he[part], her2[part]) < 0.9
