"""hemera sheet: from releases as they are unpacked, in a folder made on the spot."""

import json
import logging
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from hemera.__main__ import main
from hemera.sheet import COLUMNS, Sheet, read_sheet, write_rows

ACROBAT_META = (
    "anon_id,set,stain,filename,vendor,model,mpp_lvl_0,mpp_lvl_1,magnification_lvl_0\n"
    "0,validation,HE,0_HE_val.tif,Hamamatsu,NanoZoomer XR,0.9123456789,1.82,10\n"
    "0,validation,HER2,0_HER2_val.tif,Hamamatsu,NanoZoomer S360,0.92,1.84,10\n"
    "0,train,HE,0_HE_train.tif,Hamamatsu,NanoZoomer XR,NaN,NaN,\n"
    "92,train,HE,92_HE_train.ndpi,Hamamatsu,NanoZoomer XR,0.91,NaN,10\n"
    "92,train,HER2,92_HER2_train.ndpi,Hamamatsu,NanoZoomer XR,nan,NaN,10\n"
)
BCI_TRAIN = ("00000_train_1+.png", "00001_train_0.png", "00002_train_3+.png")
LANDMARKS = (
    "anon_id,anon_filename_he,anon_filename_ihc,point_id,ihc_x,ihc_y,mpp_ihc_10X,mpp_he_10X,"
    "ihc_antibody,he_x,he_y\n"
    "0,0_HE_val.ndpi,0_HER2_val.ndpi,0,100.5,200.5,0.92,0.91,HER2,,\n"
    "1,1_HE_val.ndpi,1_KI67_val.ndpi,0,100.5,200.5,0.92,0.91,KI67,,\n"
)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def image(path: Path, kind: str, shade: int = 200) -> None:
    """A small image, of bytes that need not be what the suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(str(path.name).encode() + kind.encode()))
    pixels = np.full((40, 56, 3), shade, np.uint8)
    pixels[:20, :30] = rng.integers(0, 256, (20, 30, 1))
    pixels[-1, -1] = (255, 0, 0)  # a gray image is refused
    path.write_bytes(cv2.imencode(kind, pixels)[1].tobytes())


def errors(caplog: pytest.LogCaptureFixture, level: int = logging.ERROR) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return errors(caplog, logging.WARNING)


def made(kind: str, folder: Path, output: Path, *words: str) -> Sheet:
    assert main(["sheet", kind, str(folder), "--output", str(output), *words]) == 0
    return read_sheet(output)


def acrobat(folder: Path) -> Path:
    train = ("92_HE", "92_HER2", "92_ER", "0_HE", "0_HER2", "10_HE", "10_HER2", "7_HE", "7_KI67",
             "8_HER2")  # fmt: skip
    touch(folder, *(f"train/{name}_train.tif" for name in train))
    val = ("0_HE_val.tif", "0_HER2_val.tif", ".0_HE_val.tif.part", "0_HE_val.tif.md5")
    touch(folder, *(f"valid/{name}" for name in val))
    (folder / "df_acrobat_meta.csv").write_text(ACROBAT_META)
    (folder / "valid" / "landmarks.csv").write_text(LANDMARKS)
    return folder


def test_acrobat(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    sheet = made("acrobat", acrobat(tmp_path / "release"), tmp_path / "lists" / "pairs.tsv")
    rows = {pair.pair: pair for pair in sheet.pairs}
    names = [f"acrobat_{name}" for name in ("train_0", "train_10", "train_92", "val_0")]
    assert list(rows) == names, "by split and number"
    assert rows["acrobat_train_0"].case != rows["acrobat_val_0"].case, "anon_id repeats"
    assert {pair.dataset for pair in sheet.pairs} == {"acrobat"}
    assert {(pair.split, pair.score) for pair in sheet.pairs} == {("", "")}
    assert not any(pair.registered for pair in sheet.pairs)
    val = rows["acrobat_val_0"]
    assert (val.he_mpp, val.her2_mpp) == (0.9123456789, 0.92)
    assert [path.resolve() for path in val.landmarks] == [tmp_path / "release/valid/landmarks.csv"]
    assert val.he_landmarks == val.her2_landmarks
    assert val.he.resolve() == tmp_path / "release/valid/0_HE_val.tif"
    assert val.her2.resolve() == tmp_path / "release/valid/0_HER2_val.tif"
    assert rows["acrobat_train_0"].he_mpp is None, "NaN in the metadata is no resolution"
    assert rows["acrobat_train_0"].landmarks == ()
    assert (rows["acrobat_train_92"].he_mpp, rows["acrobat_train_92"].her2_mpp) == (0.91, None)
    assert "patients with H&E and HER2: 4 of 6" in caplog.text


@pytest.mark.parametrize(("meta", "mpps"), [(True, (0.9123456789, 0.92)), (False, (None, None))])
def test_acrobat_with_other_suffixes_or_without_metadata(
    tmp_path: Path, meta: bool, mpps: tuple[float | None, float | None]
) -> None:
    touch(tmp_path, "0_HE_val.TIFF", "0_her2_VAL.tif")
    if meta:
        (tmp_path / "df_acrobat_meta.csv").write_text(ACROBAT_META)
    (pair,) = made("acrobat", tmp_path, tmp_path / "pairs.tsv").pairs
    assert (pair.he_mpp, pair.her2_mpp) == mpps


@pytest.mark.parametrize(
    ("kind", "names", "said"),
    [
        ("acrobat", ("a/0_HE_val.tif", "a/0_HER2_val.tif", "b/0_HE_val.tif"), "same name"),
        ("acrobat", ("0_HE_val.tif", "1_HER2_val.tif"), "no patient with"),
        ("bci", ("a/HE/train/1_train_0.png", "b/HE/train/1_train_0.png"), "same name"),
        ("bci", ("HE/train/1_train_5+.png",), "no pair"),
        ("mist", ("HER2/TrainValAB/trainA/1_2_3.jpg",), "no pair"),
    ],
)
def test_releases_that_make_no_sheet(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, names: tuple[str, ...], said: str
) -> None:
    touch(tmp_path, *names)
    assert main(["sheet", kind, str(tmp_path / "none")]) == 1
    assert "no such directory" in errors(caplog)[0]
    caplog.clear()
    assert main(["sheet", kind, str(tmp_path), "--output", str(tmp_path / "pairs.tsv")]) == 1
    (line,) = errors(caplog)
    assert said in line
    assert ";" in line
    assert not (tmp_path / "pairs.tsv").exists()


def test_bci(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    release = tmp_path / "BCI_dataset"
    names = [f"train/{name}" for name in BCI_TRAIN] + ["test/00000_test_2+.png"]
    touch(release, *(f"{stain}/{name}" for stain in ("HE", "IHC") for name in names))
    touch(release, "HE/train/00009_train_1+.png", "HE/train/Thumbs.db", "README.txt")
    sheet = made("bci", release, tmp_path / "pairs.tsv")
    rows = {pair.pair: pair for pair in sheet.pairs}
    assert {name: (pair.split, pair.score) for name, pair in rows.items()} == {
        "bci_train_00000": ("", "1+"),
        "bci_train_00001": ("", "0"),
        "bci_train_00002": ("", "3+"),
        "bci_test_00000": ("test", "2+"),
    }
    for name, pair in rows.items():
        assert pair.case == name
        assert pair.in_block
        assert (pair.he_mpp, pair.her2_mpp) == (0.46, 0.46)
        assert pair.he.name == pair.her2.name
        assert all(path.is_file() for path in pair.images)
        assert (pair.he.parents[1].name, pair.her2.parents[1].name) == ("HE", "IHC")
    assert "00009_train_1+.png: no HER2 image" in warnings(caplog)[0]
    own = made("bci", release, tmp_path / "own.tsv", "--mpp", "0.5")
    assert {pair.he_mpp for pair in own.pairs} == {0.5}


def test_mist(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Slides stand on both sides of MIST's own split: one slide is one case."""
    release = tmp_path / "MIST"
    for stain in ("HER2", "ER"):
        root = f"{stain}/TrainValAB"
        for side in "AB":
            touch(
                release,
                f"{root}/train{side}/14M2102785_23_16.jpg",
                f"{root}/train{side}/14M2102785_7_2.jpg",
                f"{root}/train{side}/15M0001_1_1.jpg",
                f"{root}/val{side}/14M2102785_9_9.jpg",
            )
    touch(release, "HER2/TrainValAB/valA/15M0001_5_5.jpg")
    sheet = made("mist", release, tmp_path / "pairs.tsv")
    rows = {pair.pair: pair for pair in sheet.pairs}
    assert set(rows) == {
        "mist_train_14M2102785_23_16",
        "mist_train_14M2102785_7_2",
        "mist_train_15M0001_1_1",
        "mist_val_14M2102785_9_9",
    }
    assert {pair.case for pair in sheet.pairs} == {"mist_14M2102785", "mist_15M0001"}
    assert rows["mist_val_14M2102785_9_9"].case == rows["mist_train_14M2102785_23_16"].case
    assert {pair.split for pair in sheet.pairs} == {""}
    for pair in sheet.pairs:
        assert "HER2" in pair.he.parts
        assert (pair.he.parent.name[-1], pair.her2.parent.name[-1]) == ("A", "B")
        assert pair.in_block
        assert pair.he_mpp == 0.4661
    assert len(warnings(caplog)) == 1
    again = made("mist", release / "HER2" / "TrainValAB", tmp_path / "again.tsv")
    assert [pair.pair for pair in again.pairs] == [pair.pair for pair in sheet.pairs]


def test_relative_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    acrobat(tmp_path / "data" / "release")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for output in ("pairs.tsv", "lists/deep/pairs.tsv", "../pairs.tsv"):
        sheet = made("acrobat", Path("../data/release"), Path(output))
        for pair in sheet.pairs:
            assert all(path.is_file() for path in (*pair.images, *pair.landmarks)), output
    text = (tmp_path / "pairs.tsv").read_text()
    assert "data/release/valid/0_HE_val.tif" in text
    assert str(tmp_path) not in text, "relative in, relative out: the folder may move"


def test_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    touch(tmp_path, "r/HE/train/1_train_0.png", "r/IHC/train/1_train_0.png")
    monkeypatch.chdir(tmp_path)
    assert main(["sheet", "bci", "r"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split("\t") == list(COLUMNS)
    assert "r/HE/train/1_train_0.png" in row.split("\t")


def release_of_images(folder: Path) -> Path:
    for name in BCI_TRAIN:
        image(folder / "HE" / "train" / name, ".jpg")
        image(folder / "IHC" / "train" / name, ".png", 180)
    return folder


def give(sheet: Path, *cells: dict[str, str]) -> None:
    """Change cells of the first rows of a sheet."""
    header, *lines = sheet.read_text().splitlines()
    rows = [dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines]
    for row, changed in zip(rows, cells, strict=False):
        row |= changed
    sheet.write_text(write_rows(rows))


def assert_faults(lines: list[str], pairs: list[str], words: tuple[str, ...]) -> None:
    for line, pair, word in zip(lines, pairs, words, strict=True):
        assert line.startswith(f"pairs.tsv {pair}: "), line
        assert word in line
        assert ";" in line


def test_check_lists_all_faults_of_the_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    release = release_of_images(tmp_path / "bci")
    points = {"he_landmarks": "points.csv", "her2_landmarks": "points.csv"}
    sheet = made("bci", release, tmp_path / "pairs.tsv")
    give(tmp_path / "pairs.tsv", points | {"roi": "roi.geojson"})
    sheet.pairs[0].her2.unlink()
    sheet.pairs[1].he.write_bytes(b"")
    whole = sheet.pairs[2].her2.read_bytes()
    sheet.pairs[2].her2.write_bytes(whole[:20])
    assert main(["sheet", "check", str(tmp_path / "pairs.tsv")]) == 1
    names = [pair.pair for pair in sheet.pairs]
    words = ("her2", "points.csv", "roi.geojson", "00001_train_0.png", "00002_train_3+.png")
    assert_faults(errors(caplog), [names[0], *names[:1] * 2, *names[1:]], words)


def test_check_reads_what_stands_beside_the_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sheet = made("bci", release_of_images(tmp_path / "bci"), tmp_path / "pairs.tsv")
    give(
        tmp_path / "pairs.tsv",
        {"he_landmarks": "he.csv", "her2_landmarks": "her2.csv"},
        {"roi": "roi.geojson", "her2_artefacts": "mask.png"},
        {"displacement": "own.npz", "registered": ""},
    )
    cv2.imwrite(str(tmp_path / "mask.png"), np.zeros((20, 28), np.uint8))
    ring = [[0, 0], [40, 0], [40, 30]]
    (tmp_path / "he.csv").write_text("X,Y\n1,2\n")
    (tmp_path / "her2.csv").write_text("X,Y\n3,4\n")
    (tmp_path / "roi.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    np.savez(tmp_path / "own.npz", vectors_um=np.zeros((4, 5, 2), np.float32), mpp=6.0)
    assert main(["sheet", "check", str(tmp_path / "pairs.tsv")]) == 0, errors(caplog)
    (tmp_path / "her2.csv").write_text("X,Y\n3,400\n")
    assert main(["sheet", "check", str(tmp_path / "pairs.tsv")]) == 1
    (line,) = errors(caplog)
    assert (
        f"1 of 1 landmarks are outside {sheet.pairs[0].her2.name}, 56 x 40 px (first: line 2); give"
        in line
    )
    (tmp_path / "her2.csv").write_text("X,Y\n3,four\n")
    (tmp_path / "roi.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": ring}))
    cv2.imwrite(str(tmp_path / "mask.png"), np.zeros((20, 40), np.uint8))
    (tmp_path / "own.npz").write_bytes((tmp_path / "own.npz").read_bytes()[:-40])
    caplog.clear()
    assert main(["sheet", "check", str(tmp_path / "pairs.tsv")]) == 1
    words = (
        "'four' is no coordinate",
        "roi.geojson: not GeoJSON",
        "not the proportions",
        "own.npz",
    )
    names = [pair.pair for pair in sheet.pairs]
    assert_faults(errors(caplog), [*names[:2], *names[1:]], words)


def test_check_lists_faults_of_cells_and_of_files_together(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sheet = made("bci", release_of_images(tmp_path / "bci"), tmp_path / "pairs.tsv")
    give(tmp_path / "pairs.tsv", {"case": "c 1"}, {}, {"registered": ""})
    sheet.pairs[1].he.unlink()
    assert main(["sheet", "check", str(tmp_path / "pairs.tsv")]) == 1
    first, second = errors(caplog)
    assert first.startswith("pairs.tsv row 2: case is 'c 1'; give")
    assert second.startswith("pairs.tsv bci_train_00001: he ")
    assert any("pair bci_train_00002: plain images" in line for line in warnings(caplog))
    caplog.clear()
    assert main(["sheet", "check", str(tmp_path / "none.tsv")]) == 1
    assert len(errors(caplog)) == 1


def tissue_image(path: Path, stain: str, seed: int) -> None:
    """H&E or IHC tissue of demo's stain vectors, 200 x 260 px."""
    from hemera.imaging.color import RGB_FROM_HED

    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.random((200, 260)).astype(np.float32), (0, 0), 3)
    nuclei = (noise > np.quantile(noise, 0.7))[..., None] * 0.5 * RGB_FROM_HED[0]
    other = RGB_FROM_HED[1 if stain == "he" else 2] * 0.3 * (np.arange(260) > 60)[:, None]
    rgb = np.rint(245 * 10 ** -(nuclei + other)).astype(np.uint8)
    cv2.imwrite(str(path), rgb[..., ::-1])


def test_check_finds_wrong_pairs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for seed in (1, 2):
        tissue_image(tmp_path / f"{seed}.he.png", "he", seed)
        tissue_image(tmp_path / f"{seed}.her2.png", "her2", seed + 9)
    (tmp_path / "renamed.he.png").write_bytes((tmp_path / "1.he.png").read_bytes())
    small = cv2.resize(cv2.imread(str(tmp_path / "1.he.png")), None, fx=0.7, fy=0.7)
    cv2.imwrite(str(tmp_path / "small.he.jpg"), small)

    def checked(*rows: tuple[str, str, str, str]) -> list[str]:
        common = {"dataset": "d", "registered": "true", "he_mpp": "0.5", "her2_mpp": "0.5"}
        cells = [dict(zip(("case", "he", "her2", "verdict"), row, strict=True)) for row in rows]
        named = [{"pair": f"p{n}", **common, **row} for n, row in enumerate(cells)]
        (tmp_path / "pairs.tsv").write_text(write_rows(named))
        caplog.clear()
        assert main(["sheet", "check", str(tmp_path / "pairs.tsv")]) == (1 if errors(caplog) else 0)
        return errors(caplog)

    good = ("a", "1.he.png", "1.her2.png", "")
    assert checked(good, ("b", "2.he.png", "2.her2.png", "")) == []
    for copy in ("1.he.png", "renamed.he.png", "small.he.jpg"):
        (line,) = checked(("a", "1.he.png", copy, "accept"))
        assert "the same image twice; correct" in line
    (line,) = checked(("a", "1.her2.png", "1.he.png", ""))
    assert line.count("by its colours") == 2
    assert "swap he and her2" in line
    assert checked(("a", "1.her2.png", "1.he.png", "accept")) == []
    (line,) = checked(("a", "1.he.png", "2.he.png", ""))
    assert "her2 2.he.png has eosin" in line
    gray = cv2.imread(str(tmp_path / "1.he.png"), cv2.IMREAD_GRAYSCALE)
    cv2.imwrite(str(tmp_path / "gray.png"), cv2.cvtColor(gray, cv2.COLOR_GRAY2BGR))
    (line,) = checked(("a", "1.he.png", "gray.png", ""))
    assert "her2 gray.png is gray and shows no stain; give the image in colour" in line
    assert checked(("a", "1.he.png", "gray.png", "accept")) == []
    (line,) = checked(good, ("b", "renamed.he.png", "2.her2.png", ""))
    assert "renamed.he.png is the image of pair p0, he, case a" in line
    assert line.endswith("correct one of the two paths, or give both pairs the same case")
    cv2.imwrite(str(tmp_path / "again.he.jpg"), cv2.imread(str(tmp_path / "1.he.png")))
    (line,) = checked(good, ("b", "again.he.jpg", "2.her2.png", ""))
    assert "again.he.jpg is the image of pair p0, he, case a, compressed or scaled anew; " in line
    assert checked(good, ("a", "again.he.jpg", "2.her2.png", "")) == []
    # The same structure in the colours of another stain is another image.
    tissue_image(tmp_path / "stained.her2.png", "her2", 1)
    assert checked(good, ("b", "2.he.png", "stained.her2.png", "")) == []
    (line,) = checked(good, ("a", "2.he.png", "1.he.png", "accept"))
    # One image in both columns of a case.
    assert line.endswith(
        "her2 1.he.png is the image of pair p0, he, case a; correct one of the two paths"
    )
    assert checked(good, ("a", "renamed.he.png", "2.her2.png", "")) == []
    half = cv2.imread(str(tmp_path / "2.her2.png"))[:, :100]
    cv2.imwrite(str(tmp_path / "half.her2.png"), half)
    (line,) = checked(("a", "1.he.png", "half.her2.png", "accept"))
    assert "um, yet registered" in line


def test_landmarks_of_swapped_slides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("0_HE_val.tif", "0_HER2_val.tif"):
        image(tmp_path / name, ".png")
    (tmp_path / "points.csv").write_text(LANDMARKS)
    row = {"pair": "p", "case": "c", "dataset": "d", "he": "0_HER2_val.tif", "her2": "0_HE_val.tif"}
    row |= {"he_mpp": "0.9", "her2_mpp": "0.9"}
    row |= dict.fromkeys(("he_landmarks", "her2_landmarks"), "points.csv")
    (tmp_path / "pairs.tsv").write_text(write_rows([row]))
    assert main(["sheet", "check", str(tmp_path / "pairs.tsv")]) == 1
    assert "no landmarks of 0_HER2_val.tif and 0_HE_val.tif" in caplog.text


def test_an_existing_sheet_is_never_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sheet = tmp_path / "pairs.tsv"
    sheet.write_text("decisions")
    assert main(["sheet", "bci", str(tmp_path), "--output", str(sheet)]) == 1
    assert sheet.read_text() == "decisions"
    assert "pairs.tsv: exists" in caplog.text


def test_real_pairs(images: Path, tmp_path: Path) -> None:
    sheet = made("bci", images / "bci_pairs_1024", tmp_path / "pairs.tsv")
    scores = {pair.pair: pair.score for pair in sheet.pairs}
    assert scores == {"bci_test_00345": "0", "bci_test_00820": "2+"}
    assert main(["sheet", "check", str(tmp_path / "pairs.tsv")]) == 0


def test_a_file_name_that_is_not_utf_8_is_an_error_of_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for side in ("trainA", "trainB"):
        (tmp_path / side).mkdir()
        Path(os.fsdecode(bytes(tmp_path / side) + b"/s1_\xff.jpg")).touch()
    assert main(["sheet", "mist", str(tmp_path)]) == 1
    assert "the name of a file is not UTF-8; rename the file" in caplog.text
