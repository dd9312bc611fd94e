"""hemera new: a study from patterns, tables and releases."""

import logging
from pathlib import Path

import cv2
import numpy as np
import openpyxl
import pytest

from hemera.__main__ import main
from hemera.sheet import Sheet, read_sheet
from tests.small_workflow import snakemake

WHITE = np.full((40, 56, 3), 240, np.uint8)


def image(path: Path, pixels: np.ndarray = WHITE) -> Path:
    """A small image, different from any other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = pixels.copy()
    pixels[:20, :30] = np.random.default_rng(list(path.name.encode())).integers(0, 256, (20, 30, 1))
    path.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    return path


def made(study: Path, *words: object) -> Sheet:
    assert main(["new", str(study), *map(str, words)]) == 0
    return read_sheet(study / "pairs.tsv")


def refused(study: Path, caplog: pytest.LogCaptureFixture, *words: object) -> str:
    """The message of a study that is not created."""
    caplog.clear()
    assert main(["new", str(study), *map(str, words)]) == 1
    assert not study.exists() or not any(study.iterdir())
    return caplog.text


def test_pairs_are_files_with_equal_wildcards(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for name in ("S.1_HE.png", "S 1_HE.png", "s-1_HE.png", "3_HE.png", "4_HE.png"):
        image(tmp_path / "he" / "a" / name)
    for name in ("S.1_HER2.tiff", "S 1_HER2.png", "s-1_HER2.png", "3_HER2.png", "5_HER2.png"):
        image(tmp_path / "her2" / "a" / name)
    sheet = made(
        tmp_path / "my study", "--he", tmp_path / "he" / "**/*_HE.*",
        "--her2", tmp_path / "her2/**/*_HER2.*", "--mpp", 0.5,
    )  # fmt: skip
    # Snakemake's names: letters, digits, - and _, different on every file system.
    assert {pair.pair: (pair.he.name, pair.her2_image.name) for pair in sheet.pairs} == {
        "a_3": ("3_HE.png", "3_HER2.png"),
        "a_S-1": ("S 1_HE.png", "S 1_HER2.png"),
        "a_S-1-2": ("S.1_HE.png", "S.1_HER2.tiff"),
        "a_s-1-3": ("s-1_HE.png", "s-1_HER2.png"),
    }
    assert {(pair.case, pair.dataset, pair.he_mpp) for pair in sheet.pairs} == {
        (pair.pair, "my-study", 0.5) for pair in sheet.pairs
    }
    assert "'a_S.1' is a_S-1-2" in caplog.text
    assert (
        f"left out, without partner: 1 files: {tmp_path / 'he' / 'a' / '4_HE.png'}" in caplog.text
    )
    assert (
        f"left out, without partner: 1 files: {tmp_path / 'her2' / 'a' / '5_HER2.png'}"
        in caplog.text
    )


def test_patterns_without_a_pair(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image(tmp_path / "1_HE.png")
    image(tmp_path / "2_HER2.png")
    (tmp_path / "1_HER2.png").mkdir()
    study, he, her2 = tmp_path / "study", tmp_path / "*_HE.png", tmp_path / "*_HER2.png"
    text = refused(study, caplog, "--he", he, "--her2", her2)
    assert "no pair of files with equal wildcards" in text
    assert f"{he}: 1 files: {tmp_path / '1_HE.png'}; {her2}: 1 files" in text
    image(tmp_path / "1_HE.tif")
    text = refused(study, caplog, "--he", tmp_path / "*_HE.*", "--her2", her2)
    assert "1_HE.tif" in text and "1_HE.png matches" in text and "keep one of both" in text


def test_one_source_of_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    study = tmp_path / "study"
    assert "no option; give either" in refused(study, caplog)
    assert "--he and --her2; give either" in refused(study, caplog, "--he", "*")
    text = refused(study, caplog, "--sheet", "a.csv", "--release", "bci", tmp_path)
    assert "--sheet, --release; give either" in text
    assert "no such file" in refused(study, caplog, "--sheet", tmp_path / "a.csv")
    text = refused(study, caplog, "--release", "herohe", tmp_path)
    assert "--labels belongs to --release herohe and her2sc" in text
    text = refused(study, caplog, "--release", "bci", tmp_path, "--labels", "a.csv")
    assert "give both or neither" in text
    assert "no pair HE/train" in refused(study, caplog, "--release", "bci", tmp_path)


def test_an_existing_folder_is_never_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image(tmp_path / "1_HE.png")
    image(tmp_path / "1_HER2.png")
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "pairs.tsv").write_text("decisions")
    words = ["--he", tmp_path / "*_HE.png", "--her2", tmp_path / "*_HER2.png", "--mpp", 0.5]
    assert main(["new", str(tmp_path / "study"), *map(str, words)]) == 1
    assert "study: is not empty; name a new folder" in caplog.text
    assert [path.name for path in (tmp_path / "study").iterdir()] == ["pairs.tsv"]
    assert (tmp_path / "study" / "pairs.tsv").read_text() == "decisions"


def test_missing_resolutions_and_registered_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from PIL import Image

    for name, dpi in (("1", 25_400 / 0.5), ("2", 25_400 / 0.25), ("3", 25_400 / 0.25), ("4", 72)):
        for stain in ("HE", "HER2"):
            path = image(tmp_path / f"{name}_{stain}.png")
            if stain == "HE":
                with Image.open(path) as opened:
                    opened.copy().save(path, dpi=(dpi, dpi))
    cv2.imwrite(str(tmp_path / "3_HER2.png"), WHITE[:30])
    he, her2 = tmp_path / "*_HE.png", tmp_path / "*_HER2.png"
    # 72 dpi is no resolution of a microscope; HER2 has none at all.
    text = refused(tmp_path / "study", caplog, "--he", he, "--her2", her2)
    assert "he_mpp: 0.25, the median of the other files, for 1 that state none" in text
    assert "no file states a resolution (her2_mpp: 1, 2, 3, 4); give --mpp" in text
    caplog.clear()
    sheet = made(tmp_path / "other", "--he", he, "--her2", her2, "--mpp", 0.4)
    assert [pair.he_mpp for pair in sheet.pairs] == [None, None, None, 0.4]
    assert [pair.her2_mpp for pair in sheet.pairs] == [0.4] * 4
    assert [pair.registered for pair in sheet.pairs] == [True, True, False, True]
    assert "registered: true for 3 pairs of plain images of equal size" in caplog.text


def test_tables(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.he.png", "a.her2.png", "b.he.png", "b.her2.png"):
        image(tmp_path / "images" / name)
    lines = [
        ["He", "HER2", "case", "Note", "he_mpp", "her2_mpp"],
        ["images/a.he.png", "images/a.her2.png", "patient 1", "x; y", "0.5", "0.5"],
        ["images/b.he.png", "images/b.her2.png", "patient 1", "", "0.5", "0.5"],
        ["", "", "", "", "", ""],
    ]
    for separator, name in ((";", "a.csv"), (",", "b.csv"), ("\t", "c.tsv")):
        text = "\r\n".join(separator.join(f'"{cell}"' for cell in line) for line in lines)
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
    book = openpyxl.Workbook()
    for line in lines:
        book.active.append([cell or None for cell in line])
    book.save(tmp_path / "d.xlsx")
    sheets = [
        made(tmp_path / f"study_{name[0]}", "--sheet", tmp_path / name)
        for name in ("a.csv", "b.csv", "c.tsv", "d.xlsx")
    ]
    rows = [[(p.pair, p.case, p.he, p.her2, p.he_mpp) for p in sheet.pairs] for sheet in sheets]
    images = tmp_path / "images"
    assert rows[0] == [
        ("a-he", "patient-1", images / "a.he.png", images / "a.her2.png", 0.5),
        ("b-he", "patient-1", images / "b.he.png", images / "b.her2.png", 0.5),
    ]
    assert rows[1:] == [rows[0]] * 3
    assert "columns that are not used: note" in caplog.text
    (tmp_path / "e.csv").write_text("he\nx/1.svs\ny/1.svs\n")
    sheet = made(tmp_path / "study_e", "--sheet", tmp_path / "e.csv")
    assert [(p.pair, p.her2) for p in sheet.pairs] == [("1", None), ("1_2", None)]
    saved = (tmp_path / "d.xlsx").read_bytes()
    book.active.merge_cells("C2:C3")
    book.save(tmp_path / "d.xlsx")
    text = refused(tmp_path / "study", caplog, "--sheet", tmp_path / "d.xlsx")
    assert "merged cells C2:C3; divide them" in text
    (tmp_path / "d.xlsx").write_text("no archive")
    text = refused(tmp_path / "study", caplog, "--sheet", tmp_path / "d.xlsx")
    assert "d.xlsx: cannot be read" in text
    damaged = bytearray(saved)
    damaged[len(saved) // 2] ^= 0xFF
    (tmp_path / "d.xlsx").write_bytes(damaged)
    text = refused(tmp_path / "study", caplog, "--sheet", tmp_path / "d.xlsx")
    assert "d.xlsx: cannot be read" in text
    for content, fault in (
        ("he\n" + "x" * 200_000, "cannot be read (field larger"),
        ("pair,her2\na,b\n", "no column he in pair, her2"),
        ("he,her2\n,b\n", "row 2: he is empty"),
        ("he,he\na,b\n", "two columns he"),
        ('he,her2\na,b\n"c\nd",e\n', "row 3: he has a tab or line break"),
        ("", "no column he"),
        ("he,score\na.png,3+\n,\nb.png,4\n", "e.csv row 4: score is '4'"),
        ("pair,he\n,\na,b.png\na,c.png\n", "e.csv row 4: pair 'a' is already in row 3"),
        (
            "pair,case,he\n,,\na,1,b.png\n,,\nb,2,b.png\n",
            "e.csv row 5: he b.png belongs to case 2 here and to 1 in row 3",
        ),
    ):
        (tmp_path / "e.csv").write_text(content)
        assert fault in refused(tmp_path / "study", caplog, "--sheet", tmp_path / "e.csv")


def test_faults_of_images_are_listed(
    cohort: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    he, her2 = cohort / "acrobat" / "0_HE_train.tif", cohort / "acrobat" / "0_HER2_train.tif"
    (folder / "swapped_HE.tif").write_bytes(her2.read_bytes())
    (folder / "swapped_HER2.tif").write_bytes(he.read_bytes())
    (folder / "cut_HE.tif").write_bytes(he.read_bytes()[: he.stat().st_size // 3])
    (folder / "cut_HER2.tif").write_bytes(her2.read_bytes())
    made(tmp_path / "study", "--he", folder / "*_HE.tif", "--her2", folder / "*_HER2.tif")
    assert "pairs.tsv swapped: " in caplog.text and "swap he and her2" in caplog.text
    assert "pairs.tsv cut: cut_HE.tif: " in caplog.text and "fetch" in caplog.text


def test_snakemake_runs_in_a_study(cohort: Path, tmp_path: Path) -> None:
    made(tmp_path / "study", "--release", "bci", cohort / "bci")
    names = {path.name for path in (tmp_path / "study").iterdir()}
    assert names == {"pairs.tsv", "config.yaml", "README.md", "Snakefile", "profiles", "slurm"}
    assert len((tmp_path / "study" / "config.yaml").read_text().splitlines()) == 6
    printed = snakemake(tmp_path / "study", "--cores", "2", "-n")
    assert "train_segmentation" in printed and "dry-run" in printed
    printed = snakemake(tmp_path / "study", "--profile", "slurm", "-n", "data")
    assert "report" in printed and "train_segmentation" not in printed
