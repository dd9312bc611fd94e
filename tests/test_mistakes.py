"""Mistakes of a new user: each is one sentence with a remedy, and nothing is written or changed."""

import errno
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import openpyxl
import pytest

from hemera.__main__ import main
from hemera.sheet import read_sheet

NEW = ["new", "study", "--he", "slides/*_HE.*", "--her2", "slides/*_HER2.*"]


def copies(cohort: Path, *names: str) -> None:
    """The slides of a pair, H&E and HER2, under other names in the folder slides."""
    Path("slides").mkdir()
    for stain, name in zip(("HE", "HER2"), names, strict=True):
        shutil.copy(cohort / "acrobat" / f"0_{stain}_train.tif", Path("slides", name))


def merged_cells(cohort: Path) -> None:
    book = openpyxl.Workbook()
    for line in (["he", "case"], ["1.tif", "a"], ["2.tif", None]):
        book.active.append(line)
    book.active.merge_cells("B2:B3")
    book.save("cohort.xlsx")


def same_slide(cohort: Path) -> None:
    copies(cohort, "1_HE.tif", "1_HER2.tif")
    shutil.copy("slides/1_HE.tif", "slides/1_HER2.tif")


def no_mpp(cohort: Path) -> None:
    Path("slides").mkdir()
    pair = next(pair for pair in read_sheet(cohort / "pairs.tsv").pairs if pair.dataset == "bci")
    for stain, path in zip(("HE", "HER2"), pair.images, strict=True):
        shutil.copy(path, Path("slides", f"1_{stain}.png"))


def truncated(cohort: Path) -> None:
    copies(cohort, "1_HE.tif", "1_HER2.tif")
    data = Path("slides/1_HE.tif").read_bytes()
    Path("slides/1_HE.tif").write_bytes(data[: len(data) // 3])


def nothing(cohort: Path) -> None:
    pass


def slide_and_folder(cohort: Path) -> None:
    copies(cohort, "1_HE.tif", "1_HER2.tif")
    Path("results/index").mkdir(parents=True)


PREDICT = ["predict", "slides/1_HE.tif", "--model"]
MISTAKES: dict[str, tuple[Callable[[Path], None], list[str], str]] = {
    "wrong path": (nothing, NEW, "slides/*_HE.*: 0 files; slides/*_HER2.*: 0 files; correct the"),
    "wrong path of a table": (nothing, ["new", "study", "--sheet", "a.csv"], "a.csv: no such file"),
    "wrong path of a release": (
        nothing, ["new", "study", "--release", "bci", "BCI"], "BCI: no such directory; give the"
    ),
    "swapped stains": (
        lambda cohort: copies(cohort, "1_HER2.tif", "1_HE.tif"), NEW, "; swap he and her2, or set"
    ),
    "the same slide twice": (same_slide, NEW, "1_HER2.tif: the same image twice; correct he or"),
    "xlsx with merged cells": (
        merged_cells, ["new", "study", "--sheet", "cohort.xlsx"],
        "cohort.xlsx: merged cells B2:B3; divide them",
    ),
    "no mpp": (no_mpp, NEW, "no file states a resolution (he_mpp: 1); give --mpp, um per pixel"),
    "truncated slide": (truncated, NEW, "it was cut off, fetch it again"),
    "wrong directory": (nothing, ["run", "data"], "config.yaml: No such file or directory; work"),
    "wrong directory of view": (nothing, ["view"], "config.yaml: No such file or directory; work"),
    "wrong directory of an export": (
        nothing, ["export", "card", "out"], "results/index/index.parquet: no such file; give"
    ),
    "no model folder": (slide_and_folder, [*PREDICT, "models"], "models/segmenter.safetensors: no"),
    "wrong model folder": (
        slide_and_folder, [*PREDICT, "results/index"],
        "results/index/segmenter.safetensors: no such file; name the output of train_segmentation",
    ),
    "wrong model folder of status": (
        slide_and_folder, ["status", *PREDICT[1:], "results/index"],
        "results/index/weights.safetensors: no such file; name a folder such as results/aggregate",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_with_a_remedy(
    mistake: str,
    cohort: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare, words, message = MISTAKES[mistake]
    prepare(cohort)
    before = set(tmp_path.rglob("*"))
    status = main(words)
    found = [record for record in caplog.records if record.levelno >= logging.WARNING]
    # Faults of files do not prevent a study, which is corrected in its sheet.
    if status == 0:
        *found, last = found
        assert "faults: 1; correct the rows in study/pairs.tsv" in last.getMessage()
    else:
        assert set(tmp_path.rglob("*")) == before
    (record,) = [each for each in found if "confirm" not in each.getMessage()]
    text = record.getMessage()
    assert record.exc_info is None
    assert message in text and ";" in text
    assert "\n" not in text and "Error" not in text and "errno" not in text.lower()


def test_names_with_dots_and_spaces_are_no_mistake(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    copies(cohort, "S 12.3 a_HE.tif", "S 12.3 a_HER2.tif")
    assert main(["new", "my study", *NEW[2:]]) == 0
    assert "letters, digits, - and _: 'S 12.3 a' is S-12-3-a" in caplog.text
    assert "next: cd 'my study' && " in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    (pair,) = read_sheet(tmp_path / "my study" / "pairs.tsv").pairs
    assert (pair.pair, pair.he) == ("S-12-3-a", tmp_path / "slides" / "S 12.3 a_HE.tif")


@pytest.mark.parametrize("with_name", [True, False])
@pytest.mark.parametrize("write", ["write_text", "write_bytes"])
def test_a_full_disk(
    write: str,
    with_name: bool,
    cohort: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A write has no file name in its error, an open file has one."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "any text of a library", *(["f.tsv"] if with_name else []))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, write, full)
    assert main(["new", "study", "--release", "bci", str(cohort / "bci")]) == 1
    (text,) = [each.getMessage() for each in caplog.records if each.levelno == logging.ERROR]
    where = "f.tsv" if with_name else tmp_path
    assert text.startswith(f"{where}: No space left on device; free space there and in ")
    assert text.endswith(", then run the same command again")
    assert not list(tmp_path.iterdir())
