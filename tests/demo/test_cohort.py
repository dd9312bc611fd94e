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
from hemera.demo.cells import EXPRESSION, TUMOUR
from hemera.demo.cohort import Truth
from hemera.demo.plan import LANDMARKS, META, plan
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


def test_image_pairs_alone_have_all_scores_in_both_splits() -> None:
    tiles = plan("tiles")
    assert not tiles.slides
    for part, least in (("train", 40), ("test", 16)):
        scores = [tile.score for tile in tiles.tiles if tile.part == part]
        assert len(scores) >= least and set(scores) == {"0", "1+", "2+", "3+"}
    assert "acrobat" not in sheet_text("tiles")


def test_an_unknown_size_or_visibility_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"size: 'huge' is unknown; choose from full, small"):
        sheet_text("huge")
    with pytest.raises(ConfigError, match=r"visibility: 1\.5; give 0 to 1"):
        write_cohort(tmp_path, "small", visibility=1.5)


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
    making._make(tmp_path / "same", 5, 1.0, slide)
    making._make(tmp_path / "other", 5, 1.0, dataclasses.replace(slide, other_tissue=True))
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
