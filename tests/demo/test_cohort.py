"""The demo cohort: same bytes, real layouts, and a truth that is true."""

import csv
import dataclasses
import hashlib
import itertools
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import tifffile
import tiffslide

from hemera.demo import load_truth, outputs, sheet_text, write_cohort
from hemera.demo.cells import EXPRESSION, SPINDLE, TUMOUR, staining_class
from hemera.demo.cohort import Truth
from hemera.demo.field import Field, make_field
from hemera.demo.plan import LANDMARKS, META, plan
from hemera.demo.render import DAB, Appearance, Renderer, rasterise
from hemera.demo.scanner import defocus, photograph
from hemera.demo.tissue import grow
from hemera.errors import ConfigError, HemeraError
from hemera.imaging.quality import histogram_similarity, sharpness
from hemera.registration.displacement import Displacement, map_points
from hemera.sheet import read_sheet

ROOT = Path(__file__).parents[2]


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read_rgb(path: Path) -> np.ndarray:
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)


def slide_field() -> Field:
    return make_field(
        np.random.default_rng(3),
        angle_deg=118.0,
        shift_um=(21.0, -34.0),
        elastic_um=18.0,
        fixed_um=(920.0, 552.0),
        moving_um=(700.0, 950.0),
    )


def test_the_same_bytes_come_twice_whatever_the_number_of_workers(
    cohort: Path, tmp_path: Path
) -> None:
    # The demo's sheet is committed: it is not touched where it already says the same.
    sheet = tmp_path / "pairs.tsv"
    sheet.write_text(sheet_text("small"))
    before = sheet.stat().st_mtime_ns
    write_cohort(tmp_path, "small", workers=2)
    assert sheet.stat().st_mtime_ns == before
    first, second = digests(cohort), digests(tmp_path)
    assert first == second
    assert sorted(first) == sorted(outputs("small"))


def test_another_seed_grows_other_tissue() -> None:
    tissues = [
        grow(np.random.default_rng(seed), (300.0, 200.0), "2+", whole=False) for seed in (1, 2, 1)
    ]
    assert np.array_equal(tissues[0].cells.x, tissues[2].cells.x)
    assert not np.array_equal(tissues[0].outline, tissues[1].outline) or not np.array_equal(
        tissues[0].cells.x, tissues[1].cells.x
    )


def test_the_committed_sheet_is_that_of_the_demo() -> None:
    assert (ROOT / "demo" / "pairs.tsv").read_text() == sheet_text("full")


def test_the_full_cohort_holds_what_it_promises() -> None:
    full = plan("full")
    assert len(full.slides) == 4
    assert sum(not slide.other_tissue for slide in full.slides) == 3
    assert sum(slide.artefacts for slide in full.slides) == 1
    assert len(full.tiles) >= 24
    for part in ("train", "test"):
        scores = {tile.score for tile in full.tiles if tile.part == part}
        assert scores == {"0", "1+", "2+", "3+"}
    assert any(tile.gray for tile in full.tiles) and any(tile.empty for tile in full.tiles)
    for slide in full.slides:
        assert slide.he_size_px != slide.her2_size_px
        assert slide.he_size_px[0] != slide.he_size_px[1]
    # Id 0 stands for two patients, as in ACROBAT, and one good case is kept for the test.
    assert sorted(slide.number for slide in full.slides) == [0, 0, 1, 2]
    good = [slide.split for slide in full.slides if not slide.other_tissue]
    assert good.count("train") == 2 and good.count("test") == 1
    names = outputs("full")
    assert len(set(names)) == len(names)


def test_the_sheet_is_valid_and_its_files_are_there(cohort: Path) -> None:
    sheet = read_sheet(cohort / "pairs.tsv")
    assert [pair.pair for pair in sheet.pairs] == [
        *("acrobat_train_0", "bci_train_00000", "bci_train_00001"),
        *("bci_test_00000", "bci_test_00001"),
    ]
    assert {pair.score for pair in sheet.pairs if pair.dataset == "bci"} == {"0", "1+", "2+", "3+"}
    for pair in sheet.pairs:
        assert pair.he.is_file() and pair.her2.is_file()
        assert pair.registered == (pair.dataset == "bci")
    first = sheet.pairs[0]
    assert first.he_landmarks == first.her2_landmarks == cohort / LANDMARKS


def test_an_unknown_size_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"size: 'huge' is unknown; choose from full, small"):
        sheet_text("huge")


def test_the_plan_is_light() -> None:
    code = (
        "import sys; from hemera.demo import sheet_text, outputs; sheet_text(); outputs()\n"
        "heavy = {'numpy', 'cv2', 'scipy', 'tifffile', 'torch'} & set(sys.modules)\n"
        "sys.exit(' '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_missing_truth_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(HemeraError, match=r"none_9\.npz: no such file; write the demo cohort"):
        load_truth(tmp_path, "none_9")


def test_openslide_and_tiffslide_read_the_slides(cohort: Path) -> None:
    slide = plan("small").slides[0]
    for name, size, mpp in (
        (slide.he, slide.he_size_px, slide.he_mpp),
        (slide.her2, slide.her2_size_px, slide.her2_mpp),
    ):
        expected = [(size[0] >> level, size[1] >> level) for level in range(3)]
        with openslide.OpenSlide(cohort / name) as opened:
            assert opened.dimensions == size
            assert list(opened.level_dimensions) == expected
            assert float(opened.properties["openslide.mpp-x"]) == pytest.approx(mpp, rel=1e-5)
            assert float(opened.properties["openslide.mpp-y"]) == pytest.approx(mpp, rel=1e-5)
            crop = np.asarray(opened.read_region((700, 500), 0, (200, 90)))[..., :3]
        with tiffslide.TiffSlide(cohort / name) as opened:
            assert opened.dimensions == size
            assert list(opened.level_dimensions) == expected
            assert opened.properties["tiffslide.mpp-x"] == pytest.approx(mpp, rel=1e-5)
            other = np.asarray(opened.read_region((700, 500), 0, (200, 90)))[..., :3]
        # Two decoders of one JPEG: equal but for how they enlarge the chroma.
        assert np.abs(crop.astype(int) - other).mean() < 3
    # Level 1 is level 0 at half its size, not shifted.
    pages = [tifffile.imread(cohort / slide.he, key=level) for level in (0, 1)]
    half = cv2.resize(pages[0], pages[1].shape[1::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(half.astype(int) - pages[1]).mean() < 3


def test_images_look_like_their_stains(cohort: Path) -> None:
    slide = plan("small").slides[0]
    for name in (slide.he, slide.her2):
        image = tifffile.imread(cohort / name, key=0).astype(float)
        glass = np.median(image[:12].reshape(-1, 3), axis=0)
        assert glass.min() > 215 and np.ptp(glass) < 16
    he, her2 = (
        tifffile.imread(cohort / name, key=0).reshape(-1, 3).astype(float)
        for name in (slide.he, slide.her2)
    )
    stained = he[he.min(axis=1) < 150]
    # Haematoxylin and eosin: green is absorbed most. DAB: blue is.
    assert stained[:, 1].mean() < stained[:, 0].mean() - 30
    assert stained[:, 1].mean() < stained[:, 2].mean() - 30
    brown = her2[(her2[:, 0] - her2[:, 2]) > 40]
    assert len(brown) > 0.01 * len(her2)


def test_jpeg_bytes_lie_under_some_png_names(cohort: Path) -> None:
    starts = {
        tile.pair: {(cohort / name).read_bytes()[:4] for name in (tile.he, tile.her2)}
        for tile in plan("small").tiles
    }
    kinds = {pair: {start[1:4] == b"PNG" for start in own} for pair, own in starts.items()}
    assert kinds["bci_train_00001"] == {True}
    assert kinds["bci_train_00000"] == {False}
    assert all(start[:2] == b"\xff\xd8" for start in starts["bci_train_00000"])
    for tile in plan("small").tiles:
        assert read_rgb(cohort / tile.he).shape == read_rgb(cohort / tile.her2).shape
        assert read_rgb(cohort / tile.he).shape == (1024, 1024, 3)


def test_some_her2_tiles_have_a_gray_background(cohort: Path) -> None:
    for tile in plan("small").tiles:
        bright = np.percentile(cv2.cvtColor(read_rgb(cohort / tile.her2), cv2.COLOR_RGB2GRAY), 99)
        # Real tiles: 176 to 183 on gray, 250 and more on white.
        assert (170 < bright < 188) if tile.gray else bright > 240


def test_metadata_is_acrobats(cohort: Path) -> None:
    with open(cohort / META, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["anon_id"], row["set"], row["stain"], row["filename"]) for row in rows] == [
        ("0", "train", "HE", "0_HE_train.tif"),
        ("0", "train", "HER2", "0_HER2_train.tif"),
    ]
    assert float(rows[0]["mpp_lvl_0"]) == 0.92 and float(rows[0]["mpp_lvl_2"]) == 3.68
    assert rows[0]["mpp_lvl_3"] == ""


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


def test_the_sampled_truth_is_the_field(cohort: Path) -> None:
    truth = load_truth(cohort, "acrobat_train_0")
    assert truth.field is not None
    slide = plan("small").slides[0]
    height, width = truth.vectors_um.shape[:2]
    assert width == int(np.ceil(slide.he_size_px[0] * slide.he_mpp / truth.mpp))
    assert height == int(np.ceil(slide.he_size_px[1] * slide.he_mpp / truth.mpp))
    node = np.array([(17 + 0.5) * truth.mpp, (101 + 0.5) * truth.mpp])
    assert truth.vectors_um[101, 17] == pytest.approx(truth.field.to_moving(node) - node, abs=1e-3)
    points = np.stack([truth.cells.x, truth.cells.y], axis=-1).astype(np.float64)
    mapped = map_points(Displacement(truth.vectors_um, truth.mpp), points)
    assert np.abs(mapped - truth.field.to_moving(points)).max() < 0.02


def test_landmarks_are_acrobats_and_true(cohort: Path) -> None:
    truth = load_truth(cohort, "acrobat_train_0")
    assert truth.field is not None
    with open(cohort / LANDMARKS, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 40
    assert {row["anon_filename_he"] for row in rows} == {"0_HE_train.ndpi"}
    assert {row["anon_filename_ihc"] for row in rows} == {"0_HER2_train.ndpi"}
    he = np.array([[float(row["he_x"]), float(row["he_y"])] for row in rows])
    ihc = np.array([[float(row["ihc_x"]), float(row["ihc_y"])] for row in rows])
    assert np.abs(truth.field.to_moving(he) - ihc).max() < 1e-3
    slide = plan("small").slides[0]
    assert (ihc < np.array(slide.her2_size_px) * slide.her2_mpp).all() and (ihc > 0).all()


def haematoxylin_at(image: np.ndarray, points_px: np.ndarray) -> np.ndarray:
    """Darkness of red, which haematoxylin absorbs and eosin does not, at points (x, y)."""
    red = cv2.GaussianBlur(255.0 - image[..., 0], (0, 0), 1.0)
    i, j = points_px[:, 1].astype(int), points_px[:, 0].astype(int)
    return red[i, j]


@pytest.mark.parametrize("stain", ["he", "her2"])
def test_nuclei_are_dark_at_their_true_place(cohort: Path, stain: str) -> None:
    truth = load_truth(cohort, "acrobat_train_0")
    assert truth.field is not None
    slide = plan("small").slides[0]
    points = np.stack([truth.cells.x, truth.cells.y], axis=-1).astype(np.float64)
    if stain == "he":
        image, where = tifffile.imread(cohort / slide.he, key=0), points / slide.he_mpp
    else:
        image = tifffile.imread(cohort / slide.her2, key=0)
        where = truth.field.to_moving(points) / slide.her2_mpp
    size = np.array(image.shape[1::-1])
    inside = (where > 15).all(axis=1) & (where < size - 15).all(axis=1)
    # Large nuclei, alone: the mean over many falls when all are sought to one side.
    where = where[inside & (truth.cells.short_radius > 2.4)]
    right = haematoxylin_at(image, where).mean()
    for shift in ((6, 0), (-6, 0), (0, 6), (0, -6)):
        assert right > haematoxylin_at(image, where + shift).mean() + 8


def test_registered_pairs_are_a_few_pixels_off(cohort: Path) -> None:
    for tile in plan("small").tiles:
        truth = load_truth(cohort, tile.pair)
        offset = np.hypot(*np.moveaxis(truth.vectors_um, -1, 0)) / 0.46
        assert 0.5 < np.median(offset) < 6
    tile = plan("small").tiles[1]
    truth = load_truth(cohort, tile.pair)
    assert truth.field is not None
    points = np.stack([truth.cells.x, truth.cells.y], axis=-1).astype(np.float64)
    where = truth.field.to_moving(points) / 0.46
    where = where[((where > 25) & (where < 999)).all(axis=1)]
    image = read_rgb(cohort / tile.her2)
    right = haematoxylin_at(image, where).mean()
    for shift in ((10, 0), (-10, 0), (0, 10), (0, -10)):
        assert right > haematoxylin_at(image, where + shift).mean() + 8


def brown(image: np.ndarray) -> np.ndarray:
    """How much more blue is absorbed than red, optical density: DAB, and not haematoxylin."""
    density = -np.log((image.astype(float) + 1) / 256)
    return density[..., 2] - density[..., 0]


def test_labels_lie_on_what_is_stained(cohort: Path) -> None:
    """The labels stand on the H&E grid; HER2 of an image pair is a pixel or four away."""
    tile = next(tile for tile in plan("small").tiles if tile.score == "3+")
    truth = load_truth(cohort, tile.pair)
    labels = truth.labels
    assert labels.shape == (1024, 1024)
    classes, intensity = labels & 3, labels >> 3 & 3
    assert set(np.unique(classes)) == {0, 1, 2}
    assert ((intensity > 0) == (classes == 2)).all()
    dab = brown(read_rgb(cohort / tile.her2))
    inner = cv2.erode((classes == 2).astype(np.uint8), np.ones((9, 9))) > 0
    means = [dab[(intensity == grade) & inner].mean() for grade in (1, 2, 3)]
    assert means[0] < means[1] < means[2]
    assert means[0] > dab[classes == 1].mean() + 0.02
    nuclei = (labels & 4) > 0
    he = read_rgb(cohort / tile.he)
    assert he[nuclei & (classes > 0), 0].mean() < he[~nuclei & (classes > 0), 0].mean() - 25


def test_the_positive_fraction_rises_with_the_score(cohort: Path) -> None:
    truths = {truth.score: truth for truth in _bci(cohort)}
    shares = [truths[score].positive_fraction for score in ("0", "1+", "2+", "3+")]
    assert shares[0] == 0
    assert all(a < b for a, b in itertools.pairwise(shares))
    for score, truth in truths.items():
        tumour = truth.cells.kind == TUMOUR
        counts = np.bincount(truth.cells.intensity[tumour], minlength=4) / tumour.sum()
        assert counts == pytest.approx(EXPRESSION[score], abs=0.02)


def test_what_is_positive_shows_in_the_shape_of_nuclei(cohort: Path) -> None:
    """A rule on H&E's nuclei alone tells positive cells from negative ones, not perfectly."""
    for truth in (load_truth(cohort, "acrobat_train_0"), load_truth(cohort, "bci_test_00000")):
        cells = truth.cells
        tumour = cells.kind == TUMOUR
        area = (cells.long_radius * cells.short_radius)[tumour]
        positive = cells.intensity[tumour] > 0
        order = np.argsort(np.argsort(area))
        below = order[positive].sum() - positive.sum() * (positive.sum() - 1) / 2
        auc = below / (positive.sum() * (~positive).sum())
        assert 0.8 < auc < 0.999


def _bci(cohort: Path) -> list[Truth]:
    return [load_truth(cohort, tile.pair) for tile in plan("small").tiles]


def test_tiles_pass_the_filters_of_the_paper(cohort: Path) -> None:
    kept = 0
    for tile in plan("small").tiles:
        he, her2 = read_rgb(cohort / tile.he), read_rgb(cohort / tile.her2)
        for i, j in ((0, 0), (0, 512), (512, 0), (512, 512)):
            parts = [np.ascontiguousarray(x[i : i + 512, j : j + 512]) for x in (he, her2)]
            similarity = histogram_similarity(*parts)
            kept += (
                sharpness(parts[0], 0.46) >= 30
                and sharpness(parts[1], 0.46) >= 5
                and similarity is not None
                and similarity >= 0.2
            )
    assert kept >= 14


def test_a_slide_of_another_tissue_has_no_truth_and_other_cells(tmp_path: Path) -> None:
    from hemera.demo import cohort as making

    slide = dataclasses.replace(
        plan("small").slides[0], he_size_px=(800, 620), her2_size_px=(840, 700), landmarks=False
    )
    making._make(tmp_path / "same", 5, slide)
    making._make(tmp_path / "other", 5, dataclasses.replace(slide, other_tissue=True))
    same = load_truth(tmp_path / "same", slide.pair)
    other = load_truth(tmp_path / "other", slide.pair)
    assert other.field is None and other.vectors_um.shape == (0, 0, 2)
    assert same.field is not None
    # H&E is the same slide; at its nuclei, HER2 is dark only where it is of the same tissue.
    he = [tifffile.imread(tmp_path / name / slide.he, key=0) for name in ("same", "other")]
    assert np.array_equal(he[0], he[1])
    points = np.stack([same.cells.x, same.cells.y], axis=-1).astype(np.float64)
    where = same.field.to_moving(points) / slide.her2_mpp
    where = where[((where > 5) & (where < np.array(slide.her2_size_px) - 5)).all(axis=1)]
    excess = []
    for name in ("same", "other"):
        image = tifffile.imread(tmp_path / name / slide.her2, key=0)
        around = 255.0 - image[image.min(axis=2) < 225][:, 0].astype(float)
        excess.append(haematoxylin_at(image, where).mean() - around.mean())
    assert excess[0] > excess[1] + 20


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
