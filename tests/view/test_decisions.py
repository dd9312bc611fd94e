"""Decisions in a sheet: what changes, what does not, and that none is lost."""

import threading
from pathlib import Path

import pytest

from hemera.errors import SheetError
from hemera.sheet import STAGE_COLUMNS, digest, read_sheet
from hemera.view.decisions import Backups, changed_row, decide

SHEET = (
    "pair\tcase\tdataset\the\ther2\tscore\tverdict\n"
    "a\tc1\tx\ta_he.tif\ta_her2.tif\t3+\t\n"
    "\n"
    "b\tc2\tx\tsub/b_he.tif\tb_her2.tif\n"
)


@pytest.fixture
def sheet(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.tsv"
    path.write_text(SHEET)
    return path


def test_only_the_cells_of_the_decision_change(sheet: Path) -> None:
    decide(sheet, "b", "refuse", "  torn\tat the\nedge ", Backups())
    assert sheet.read_text() == (
        "pair\tcase\tdataset\the\ther2\tscore\tverdict\tverdict_reason\n"
        "a\tc1\tx\ta_he.tif\ta_her2.tif\t3+\t\n"
        "\n"
        "b\tc2\tx\tsub/b_he.tif\tb_her2.tif\t\trefuse\ttorn at the edge\n"
    )
    pair = read_sheet(sheet).pair("b")
    assert (pair.verdict, pair.verdict_reason) == ("refuse", "torn at the edge")
    decide(sheet, "b", "", "", Backups())
    assert read_sheet(sheet).pair("b").verdict == ""


def test_a_file_of_a_spreadsheet_program() -> None:
    """Mark of the byte order, carriage returns, another order of the columns."""
    text = "\ufeffverdict\tpair\tcase\r\n\ta\tc1\r\n\tb\tc2\r\n"
    changed = changed_row(text, "b", {"verdict": "accept", "verdict_reason": "seen"})
    assert changed == (
        "\ufeffverdict\tpair\tcase\tverdict_reason\r\n\ta\tc1\r\naccept\tb\tc2\tseen\r\n"
    )


def test_the_reason_is_read_by_no_stage(sheet: Path) -> None:
    before = {stage: digest(read_sheet(sheet).pairs, stage) for stage in STAGE_COLUMNS}
    decide(sheet, "a", "", "to be discussed", Backups())
    reason = {stage: digest(read_sheet(sheet).pairs, stage) for stage in STAGE_COLUMNS}
    decide(sheet, "a", "refuse", "to be discussed", Backups())
    refused = {stage: digest(read_sheet(sheet).pairs, stage) for stage in STAGE_COLUMNS}
    assert before == reason
    assert {name for name in refused if refused[name] != before[name]} == {"tile", "report"}


@pytest.mark.parametrize(
    ("pair", "verdict", "words"),
    [("a", "perhaps", "verdict is 'perhaps'"), ("z", "accept", "no pair z")],
)
def test_a_faulty_decision_changes_nothing(
    sheet: Path, pair: str, verdict: str, words: str
) -> None:
    with pytest.raises(SheetError, match=words):
        decide(sheet, pair, verdict, "", Backups())
    assert sheet.read_text() == SHEET


def test_each_state_that_others_wrote_has_one_backup(sheet: Path) -> None:
    backups = Backups()
    first = decide(sheet, "a", "accept", "", backups)
    assert first is not None and first.read_text() == SHEET
    assert decide(sheet, "a", "refuse", "", backups) is None
    edited = sheet.read_text().replace("c2", "c3")
    sheet.write_text(edited)
    second = decide(sheet, "b", "accept", "", backups)
    assert second is not None and second.read_text() == edited
    assert read_sheet(sheet).pair("b").case == "c3"
    assert len(list(sheet.parent.glob("*.bak"))) == 2


def test_decisions_at_the_same_time(sheet: Path) -> None:
    """Two servers, each with several requests: every pair has its decision."""
    names = [f"p{number}" for number in range(24)]
    rows = [f"{name}\t{name}\tx\t{name}_he.tif\t{name}_her2.tif" for name in names]
    sheet.write_text("\n".join(["pair\tcase\tdataset\the\ther2", *rows]) + "\n")
    servers = Backups(), Backups()
    begin = threading.Barrier(len(names))

    def work(number: int, name: str) -> None:
        begin.wait()
        decide(sheet, name, ("accept", "refuse")[number % 2], name, servers[number % 2])

    threads = [threading.Thread(target=work, args=each) for each in enumerate(names)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {pair.pair: (pair.verdict, pair.verdict_reason) for pair in read_sheet(sheet).pairs}
    assert found == {
        name: (("accept", "refuse")[number % 2], name) for number, name in enumerate(names)
    }


def test_a_link_to_a_sheet_remains_one(sheet: Path, tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    link = tmp_path / "study" / "pairs.tsv"
    link.symlink_to(sheet)
    decide(link, "a", "accept", "", Backups())
    assert link.is_symlink() and read_sheet(sheet).pair("a").verdict == "accept"
