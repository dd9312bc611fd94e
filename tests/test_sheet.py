"""The sheet: every fault named at once with row and remedy, and units that stay where they are."""

from pathlib import Path
from typing import Any

import pytest

from hemera.errors import SheetError
from hemera.sheet import (
    COLUMNS,
    STAGE_COLUMNS,
    Pair,
    Sheet,
    digest,
    missing_files,
    read_sheet,
    unit_pairs,
    units,
)

HEADER = "pair\tcase\tdataset\the\ther2\tsplit\tscore\tregistered\tmirrored\the_mpp\ther2_mpp"


def write(tmp_path: Path, *rows: str, header: str = HEADER) -> Path:
    path = tmp_path / "pairs.tsv"
    path.write_text("\n".join((header, *rows)) + "\n", encoding="utf-8")
    return path


def cells(**values: str) -> str:
    """A row that is right but for the cells given."""
    row = {"pair": "p1", "case": "c1", "dataset": "mine", "he": "1_HE.tif", "her2": "1_HER2.tif"}
    return "\t".join({**row, **values}.get(name, "") for name in HEADER.split("\t"))


def faults(path: Path) -> list[str]:
    with pytest.raises(SheetError) as error:
        read_sheet(path)
    lines = str(error.value).splitlines()
    for line in lines:
        assert line.removeprefix(f"{path.parent}/").startswith("pairs.tsv"), line
        assert ";" in line, f"no remedy: {line}"
    return lines


def fault(path: Path) -> str:
    lines = faults(path)
    assert len(lines) == 1, lines
    return lines[0]


def pair(name: str, *, block: bool = True, dataset: str = "bci", **values: Any) -> Pair:
    suffix = "png" if block else "tif"
    base = Pair(
        pair=name,
        case=name,
        dataset=dataset,
        he=Path(f"HE/{name}.{suffix}"),
        her2=Path(f"IHC/{name}.{suffix}"),
        registered=block,
    )
    return base.model_copy(update=values)


def test_a_right_sheet(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "a-1\tA\tacrobat\tslides/1 HE.tif\t../2_HER2.tif\t\t3+\t\tTRUE\t0.92\t",
        "b_2\tB\tbci\tHE/å.png\tIHC/å.png\ttest\t0\ttrue\tfalse\t0.46\t0.46",
    )
    first, second = read_sheet(path).pairs
    assert first == Pair(
        pair="a-1",
        case="A",
        dataset="acrobat",
        he=tmp_path / "slides/1 HE.tif",
        her2=tmp_path / "../2_HER2.tif",
        score="3+",
        mirrored=True,
        he_mpp=0.92,
    )
    assert second.he == tmp_path / "HE/å.png"
    assert (second.split, second.score) == ("test", "0")
    assert (second.registered, second.mirrored) == (True, False)
    assert (first.in_block, second.in_block) == (False, True)


def test_paths_are_relative_to_the_sheets_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cohort"
    folder.mkdir()
    row = (
        cells(he="x/1.tif", her2=str(tmp_path / "abs.tif"))
        + "\tpoints.csv\tpoints.csv\troi.geojson\tfield.npz"
    )
    write(folder, row, header=f"{HEADER}\the_landmarks\ther2_landmarks\troi\tdisplacement")
    monkeypatch.chdir(tmp_path)
    (found,) = read_sheet(Path("cohort/pairs.tsv")).pairs
    assert found.he == Path("cohort/x/1.tif")
    assert found.her2 == tmp_path / "abs.tif"
    assert found.landmarks == (Path("cohort/points.csv"),), "one file that serves both"
    assert found.roi == Path("cohort/roi.geojson")
    assert found.displacement == Path("cohort/field.npz")
    assert not found.registered, "a map of one's own is assessed as the engine's is"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"pair": ""}, ["pair is empty"]),
        ({"pair": "../p1"}, ["pair", "'../p1'", "letters, digits, hyphens and underscores"]),
        ({"pair": "-rf"}, ["pair", "no hyphen in front"]),
        ({"pair": "päär"}, ["pair", "päär"]),
        ({"pair": "p\u20281"}, ["pair", "\\u2028"]),
        ({"pair": "p\x0b1"}, ["pair", "\\x0b"]),
        ({"pair": "p" * 101}, ["pair", "1 to 100"]),
        ({"case": "c 1"}, ["case", "'c 1'"]),
        ({"he": ""}, ["he is empty"]),
        ({"he": "a'b.tif"}, ["he", "quotes"]),
        *(({"he": f"a{mark}b.tif"}, ["he", "a shell"]) for mark in '"$`;&|*?<>{}\\\x1f'),
        ({"he": "~/a.tif"}, ["he", "~"]),
        ({"her2": "-o.tif"}, ["her2", "-"]),
        ({"split": "training"}, ["split", "'training'", "train, val or test"]),
        ({"score": "4+"}, ["score", "'4+'", "2+ or 3+"]),
        ({"mirrored": "horizontal"}, ["mirrored", "'horizontal'", "true or false"]),
        ({"he_mpp": "20x"}, ["he_mpp", "'20x'", "0.05 to 20"]),
        ({"he_mpp": "nan"}, ["he_mpp"]),
        ({"her2_mpp": "0.04"}, ["her2_mpp", "0.05"]),
        ({"her2_mpp": "20.01"}, ["her2_mpp", "20"]),
    ],
    ids=repr,
)
def test_a_bad_cell(tmp_path: Path, values: dict[str, str], words: list[str]) -> None:
    line = fault(
        write(tmp_path, cells(pair="p0", case="c0", he="0.tif", her2="0b.tif"), cells(**values))
    )
    assert line.startswith("pairs.tsv row 3: ")
    for word in words:
        assert word in line, line


def test_all_faults_stand_together(tmp_path: Path) -> None:
    lines = faults(
        write(
            tmp_path,
            cells(pair="../x", split="dev", he_mpp="20x"),
            "",
            cells(pair="p2", case="c2", he="", score="4"),
            cells(pair="p3", case="c3", he="3.tif", her2="3b.tif"),
            cells(pair="p3", case="c3", he="4.tif", her2="4b.tif"),
            cells(pair="p5", case="c3", he="5.tif", her2="5b.tif", split="test"),
            cells(pair="p6", case="c6", he="./3.tif", her2="6b.tif"),
            cells(pair="p2", case="c7", he="7.tif", her2="7b.tif"),
            "\t".join(["x"] * 12),
        )
    )
    found = [line.removeprefix("pairs.tsv ").split(" is ")[0].split(" has ")[0] for line in lines]
    assert sorted(found) == sorted(
        [
            "row 2: pair",
            "row 2: split",
            "row 2: he_mpp",
            "row 4: he",
            "row 4: score",
            "row 6: pair 'p3'",
            "row 7: case c3",
            "row 8: he 3.tif belongs to case c6 here and to c3 in row 5; give both rows the same "
            "case, or the image could be in two splits",
            "row 9: pair 'p2'",
            "row 10: 12 cells under 11 columns; separate cells by one tab",
        ]
    )


def test_columns(tmp_path: Path) -> None:
    with pytest.raises(SheetError) as error:
        read_sheet(write(tmp_path, cells(), header="pair\tcase\tcase\tscores"))
    assert str(error.value).splitlines() == [
        "pairs.tsv: column case is given 2 times; keep one",
        "pairs.tsv: column 'scores' is unknown; did you mean score?",
        "pairs.tsv: no column dataset, he, her2; add it (cells are separated by tabs, not by "
        "spaces)",
    ]
    line = fault(write(tmp_path, cells(), header=HEADER.replace("\t", " ")))
    assert line == "pairs.tsv: its cells are separated by spaces; separate them by tabs"


def test_a_pair_by_its_name() -> None:
    sheet = Sheet(Path("pairs.tsv"), (pair("acrobat_1"), pair("acrobat_2")))
    assert sheet.pair("acrobat_2").case == "acrobat_2"
    with pytest.raises(SheetError, match=r"pairs\.tsv: no pair acrobat_3; .* acrobat_1"):
        sheet.pair("acrobat_3")


def test_landmarks_and_displacement_in_their_company(tmp_path: Path) -> None:
    header = f"{HEADER}\the_landmarks"
    assert "only one is given" in fault(write(tmp_path, cells() + "\tp.csv", header=header))
    header = f"{HEADER}\tdisplacement"
    line = fault(write(tmp_path, cells(registered="true") + "\tfield.npz", header=header))
    assert "registered is true beside a displacement" in line
    line = fault(write(tmp_path, cells(mirrored="true") + "\tfield.npz", header=header))
    assert "mirrored is true beside a displacement" in line


def test_names_that_differ_only_in_case_are_one_file_on_some_disks(tmp_path: Path) -> None:
    line = fault(write(tmp_path, cells(pair="Ab"), cells(pair="aB", he="2.tif", her2="3.tif")))
    assert "row 3: pair 'aB' is already in row 2" in line and "not only in another case" in line


def test_many_columns_are_one_fault(tmp_path: Path) -> None:
    """Looking for a similar name for each of 100,000 took minutes."""
    header = "\t".join([HEADER, *(f"c{k}" for k in range(100_000))])
    line = fault(write(tmp_path, cells(), header=header))
    assert "columns, over 200; keep those of a sheet" in line and len(line) < 300


def test_files_without_rows(tmp_path: Path) -> None:
    assert "no pairs below the header; give one row per pair" in fault(write(tmp_path))
    for text in ("", " \t \n", "\ufeff"):
        (tmp_path / "pairs.tsv").write_text(text, encoding="utf-8")
        assert "no column pair, case, dataset, he, her2" in fault(tmp_path / "pairs.tsv")


def test_no_file_or_no_text(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "no.tsv", "no such file"), (tmp_path, "no such file")):
        with pytest.raises(SheetError, match=words):
            read_sheet(path)
    path = tmp_path / "pairs.tsv"
    path.write_bytes(HEADER.encode("utf-16"))
    assert "save it as UTF-8" in fault(path)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_marks_line_ends_and_blank_lines(tmp_path: Path, end: str, mark: str) -> None:
    path = tmp_path / "pairs.tsv"
    lines = [
        HEADER,
        "",
        cells(),
        "\t\t\t",
        f"{cells(pair='p2', case='c2', he='2.tif', her2='3.tif')} ",
    ]
    path.write_bytes((mark + end.join(lines) + end).encode())
    assert [found.pair for found in read_sheet(path).pairs] == ["p1", "p2"]


def test_units_are_slides_by_name_and_blocks_by_data_set() -> None:
    pairs = (
        pair("slide", block=False),
        pair("slide_own", block=False, displacement=Path("f.npz"), registered=True),
        pair("png_not_registered", registered=False),
        pair("png_own", registered=False, displacement=Path("f.npz")),
        pair("tiff_registered", block=False, registered=True),
        *(pair(f"b{number}") for number in range(40)),
        *(pair(f"m{number}", dataset="mist") for number in range(40)),
    )
    sheet = Sheet(Path("pairs.tsv"), pairs)
    found = units(sheet, 3)
    blocks = {name for name in found if "." in name}
    assert blocks == {
        f"{dataset}.{number:03d}" for dataset in ("bci", "mist") for number in range(3)
    }
    assert set(found) - blocks == {member.pair for member in pairs[:5]}
    assert list(found) == sorted(found)
    members = [member.pair for unit in found.values() for member in unit]
    assert sorted(members) == sorted(member.pair for member in pairs), "each pair in one unit"
    for name, unit in found.items():
        assert unit_pairs(sheet, name, 3) == unit
        assert all(member.dataset == name.split(".")[0] for member in unit if "." in name)
    with pytest.raises(
        SheetError, match=r"no unit bci\.003 when image pairs are divided into 3 blocks"
    ):
        unit_pairs(sheet, "bci.003", 3)


def test_an_added_pair_changes_one_block() -> None:
    pairs = [pair(f"b{number}") for number in range(60)]
    before = units(Sheet(Path("p"), tuple(pairs)), 7)
    for number in range(20):
        more = [*pairs[:17], pair(f"new{number}"), *pairs[17:]]
        after = units(Sheet(Path("p"), tuple(more)), 7)
        assert sum(after[name] != before.get(name) for name in after) == 1
        assert set(before) <= set(after)


def test_a_blocks_place_is_the_documented_hash() -> None:
    """By `printf b1 | sha256sum`: the first eight bytes, 0x7dc96f776c8423e5, modulo 19 are 17."""
    assert 0x7DC96F776C8423E5 % 19 == 17
    assert list(units(Sheet(Path("p"), (pair("b1"),)), 19)) == ["bci.017"]


def test_a_digest_changes_with_its_stages_columns_alone() -> None:
    base = pair("p", block=False)
    other: dict[str, object] = dict.fromkeys(COLUMNS, Path("other"))
    other |= dict.fromkeys(("pair", "case", "dataset"), "other")
    other |= {"split": "val", "score": "3+", "verdict": "accept"}
    other |= {"registered": True, "mirrored": True, "he_mpp": 0.5, "her2_mpp": 0.5}
    for stage, columns in STAGE_COLUMNS.items():
        before = digest([base], stage)
        for name, value in other.items():
            changed = digest([base.model_copy(update={name: value})], stage) != before
            assert changed == (name in columns), (stage, name)
        assert digest([base, pair("z")], stage) != before


def test_missing_and_unreachable_files_are_different_faults(tmp_path: Path) -> None:
    """A name that no file system allows is unreachable for every user, root too."""
    (tmp_path / "1_HE.tif").touch()
    path = write(tmp_path, cells(her2="2.tif"), cells(pair="p2", he=f"{'x' * 300}/3.tif"))
    sheet = read_sheet(path)
    faults = {name.name: fault for name, fault in missing_files(sheet).items()}
    assert faults == {
        "2.tif": "no such file", "3.tif": "file name too long", "1_HER2.tif": "no such file",
    }  # fmt: skip
    assert list(missing_files(sheet, images=False).values()) == ["file name too long"]
