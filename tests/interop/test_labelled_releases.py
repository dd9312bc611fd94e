"""hemera sheet herohe and her2sc: folders made on the spot, with tables of labels."""

import logging
from pathlib import Path

import pytest

from hemera.__main__ import main
from hemera.errors import SheetError
from hemera.interop.labelled_releases import read_labels
from hemera.sheet import Sheet, read_sheet


def messages(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def mirax(folder: Path, *names: str) -> Path:
    """Slides of MIRAX: a file and a folder of the same name."""
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / f"{name}.mrxs").touch()
        (folder / name / "Slidedat.ini").touch()
    return folder


def files(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def labels(folder: Path, text: str) -> Path:
    path = folder / "labels.csv"
    path.write_text(text)
    return path


def made(kind: str, folder: Path, table: Path, output: Path) -> Sheet:
    words = ["sheet", kind, str(folder), "--labels", str(table), "--output", str(output)]
    assert main(words) == 0
    return read_sheet(output)


def test_herohe(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    release = mirax(tmp_path / "release", "train/1", "train/2", "train/3", "TestSet/1", "TestSet/7")
    files(release, "train/4.mrxs", "train/Thumbs.db")
    table = labels(
        tmp_path,
        "Name;Status;Score;remark\ntrain/1;Positive;;x\n2;negative;1;\n4;negative;;\n"
        "testset/1;negative;0;\n7.mrxs;positive;3+;\n99;positive;;\n",
    )
    sheet = made("herohe", release, table, tmp_path / "pairs.tsv")
    assert {pair.pair: (pair.status, pair.score, pair.split) for pair in sheet.pairs} == {
        "herohe_train-1": ("positive", "", ""),
        "herohe_2": ("negative", "1+", ""),
        "herohe_testset-1": ("negative", "0", "test"),
        "herohe_7": ("positive", "3+", "test"),
    }
    rows = {pair.pair: pair for pair in sheet.pairs}
    assert rows["herohe_testset-1"].he.resolve() == release / "TestSet/1.mrxs"
    assert {pair.dataset for pair in sheet.pairs} == {"herohe"}
    assert len({pair.case for pair in sheet.pairs}) == 4
    assert all(pair.her2 is None for pair in sheet.pairs)
    no_data, no_slide, no_label = messages(caplog, logging.WARNING)
    assert "4.mrxs: no folder 4 with its data; left out" in no_data
    assert "1 labels without an H&E slide, the first 99" in no_slide
    assert "no label for 1 slides" in no_label


def test_a_split_of_the_labels_goes_before_that_of_the_folder(tmp_path: Path) -> None:
    release = mirax(tmp_path / "r", "test/1", "2")
    table = labels(tmp_path, "name,status,split\n1,positive,train\n2,negative,test\n")
    sheet = made("herohe", release, table, tmp_path / "pairs.tsv")
    assert {pair.pair: pair.split for pair in sheet.pairs} == {
        "herohe_1": "train", "herohe_2": "test",
    }  # fmt: skip


def test_her2sc(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    release = files(
        tmp_path / "release", "01/01_HE.ndpi", "01/01_Her2.ndpi", "02_HE.ndpi", "10 he.svs",
        "10 HER2.svs", "11_HER2.ndpi", "12_HE.ndpi", "12_HER2.ndpi", "12_KI67.ndpi",
    )  # fmt: skip
    table = labels(tmp_path, "name,score\n1,0\n02,2\n10,3+\n11,1\n")
    sheet = made("her2sc", release, table, tmp_path / "lists" / "pairs.tsv")
    rows = {pair.pair: pair for pair in sheet.pairs}
    assert {name: (pair.score, pair.status) for name, pair in rows.items()} == {
        "her2sc_1": ("0", ""), "her2sc_02": ("2+", ""), "her2sc_10": ("3+", ""),
    }  # fmt: skip
    first = rows["her2sc_1"]
    assert first.he.resolve() == release / "01/01_HE.ndpi"
    assert first.her2 is not None and first.her2.resolve() == release / "01/01_Her2.ndpi"
    assert rows["her2sc_02"].her2 is None and rows["her2sc_10"].her2 is not None
    assert not any(pair.registered for pair in sheet.pairs)
    no_slide, no_label = messages(caplog, logging.WARNING)
    assert "1 labels without an H&E slide, the first 11" in no_slide
    assert "no label for 2 slides" in no_label


@pytest.mark.parametrize(
    ("kind", "table", "said"),
    [
        ("herohe", "name,status\n1,positive\n", "1 is the name of"),
        ("herohe", "name,status\na/1,positive\na/1.mrxs,positive\n", "are the same slide"),
        ("herohe", "name,status\n5,positive\n", "no slide NAME.mrxs"),
        ("herohe", "name,status\na/1,Unknown\n", "row 2: status is 'unknown'; give negative"),
        ("herohe", "name,score\na/1,4\n", "row 2: score is '4'; give 0, 1+, 2+ or 3+"),
        ("herohe", "name,status,split\na/1,positive,fold\n", "split is 'fold'"),
        ("herohe", "name,status\na/1,positive\na/1,negative\n", "'a/1' is there twice"),
        ("herohe", "name,status\n,positive\n", "name is empty"),
        ("herohe", "case,her2\n1,0\n", "its columns are case, her2; give name"),
        ("herohe", "", "its columns are missing"),
        ("her2sc", "name,score\n5,1\n05,1\n", "case 05 is there twice"),
        ("her2sc", "name,score\n9,1\n", "no slide {case}_HE.ndpi"),
    ],
)
def test_releases_that_make_no_sheet(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, table: str, said: str
) -> None:
    release = mirax(tmp_path / "r", "a/1", "b/1") if kind == "herohe" else tmp_path / "r"
    files(release, "5_HE.ndpi")
    output = tmp_path / "pairs.tsv"
    words = ["sheet", kind, str(release), "--labels", str(labels(tmp_path, table))]
    assert main([*words, "--output", str(output)]) == 1
    (line,) = messages(caplog, logging.ERROR)
    assert said in line and ";" in line
    assert not output.exists()


def test_two_slides_of_a_stain_are_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    release = files(tmp_path / "r", "a/5_HE.ndpi", "b/05_HE.ndpi")
    table = labels(tmp_path, "name,score\n5,1\n")
    assert main(["sheet", "her2sc", str(release), "--labels", str(table)]) == 1
    assert "has the same name" in messages(caplog, logging.ERROR)[0]


def test_tables_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SheetError, match="no such file"):
        read_labels(tmp_path / "none.csv")
    path = tmp_path / "latin.csv"
    path.write_bytes("name,status\nJosé,positive\n".encode("latin-1"))
    with pytest.raises(SheetError, match="save it as UTF-8"):
        read_labels(path)
