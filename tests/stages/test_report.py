"""The page about the data, from cohorts of every kind."""

import dataclasses
import hashlib
import re
from pathlib import Path

import pytest

from hemera import tables
from hemera.__main__ import main
from hemera.config import ReportOptions
from hemera.errors import ShardError, TableError
from hemera.reports import data, pictures, tiles
from hemera.stages import report
from tests.command_line import words
from tests.reports.test_pages import Page, check_page
from tests.small_results import BLOCK_COUNT, Made, make

SCORES = ("0", "1+", "2+", "3+")
SPLITS = ("train", "train", "train", "val", "test")

GOLDEN = {18: "8912bef6d45a4a57"}
"""Digest of the page and of a pair's for a fixed cohort, by version of ReportOptions."""


def image_pairs(count: int = 5) -> list[Made]:
    return [
        Made(f"bci_{k}_{score[0]}", score=score, split=SPLITS[k % 5])
        for score in SCORES
        for k in range(count)
    ]


def slides() -> list[Made]:
    return [
        Made("wsi_a", "acrobat", "3+", "train", slide=True, landmarks=True),
        Made("wsi_b", "acrobat", "1+", "train", slide=True, verdict="fail", state="refused",
             map="none", reason="the engine was killed for memory; give it more", landmarks=True),
        Made("wsi_c", "acrobat", "", "test", slide=True, verdict="review"),
        Made("wsi_d", "acrobat", "", "test", slide=True, verdict="fail", state="unreadable",
             map="none", reason="wsi_d_her2.tif: truncated; copy it again"),
        Made("wsi_e", "acrobat", "2+", "val", slide=True, verdict="fail", person="accept"),
        Made("wsi_f", "acrobat", "2+", "val", slide=True, state="no_tissue", tiles=0,
             reason="wsi_f_he.tif: no tissue found on it"),
    ]  # fmt: skip


def write(folder: Path, pairs: list[Made], *, preset: str = "hemera", **options: int) -> Path:
    return page_of(folder, make(folder, pairs, engines=("stain",)), preset=preset, **options)


def page_of(folder: Path, sheet: Path, *, preset: str = "hemera", **options: int) -> Path:
    page = folder / "results" / "report" / "report.html"
    report.run(
        sheet=sheet,
        block_count=BLOCK_COUNT,
        results=folder / "results",
        preset=preset,
        page=page,
        pairs=page.parent / "pairs",
        cases=page.parent / "cases.parquet",
        options=ReportOptions(**options),
    )
    return page


def section(text: str, name: str) -> str:
    """The text of a section of the page."""
    return text[text.index(f'<section id="{name}">') :].partition("</section>")[0]


def test_a_cohort_of_both_kinds(tmp_path: Path) -> None:
    path = write(tmp_path, image_pairs() + slides(), preset="demo")
    page = check_page(path)
    text = path.read_text()
    assert "Demo sizes." in text
    # 20 image pairs and three slides of 4 tiles, of each one glass; wsi_c is under review.
    assert ">66</b><span>of 92 tiles accepted" in text
    assert ">23</b><span>of 26 pairs tiled" in text
    assert "wsi_d_her2.tif: truncated" in section(text, "pairs")
    # Worst first: the two without a map, the bad one, then the one under review.
    for mark in ("<span>wsi_{}</span>", '<a href="#pair-wsi_{}">'):
        order = [text.index(mark.format(name)) for name in "bdecaf"]
        assert order == sorted(order)
    assert list((path.parent / "pairs").iterdir()) == []
    assert "manual verdict: accept" in text
    assert "At 11 landmarks: median 6 µm (6.52 px, 0.13 % of the diagonal)" in text
    # Pair a has errors of 1 to 11 um, pair b no displacement: 41 to 51 um count there.
    scores = text.partition("ACROBAT challenge")[2].partition("</table>")[0]
    median = re.findall(r"<td[^>]*>([^<]*)</td>", scores)[:8]
    assert median == ["median", "all", "2", "1", "30", "50", "26", "46"]
    filters = section(text, "funnel")
    assert "registration_review" in filters and "filter.tissue_fraction_min: 0.5" in filters
    assert "Tiles of different resolution are mixed" in text
    assert {"pairs", "registration", "funnel", "masks", "splits"} <= set(page.ids)
    accepted = section(text, "accepted")
    assert accepted.count("<article") == 24 and accepted.count("<img") == 72
    # Glass has too little tissue, and that is the value in bold.
    assert '<div class="decides"><dt>tissue</dt><dd>20 %</dd></div>' in section(text, "rejected")
    options = re.findall(r"<summary>(\w+)", section(text, "provenance"))
    assert options == ["describe", "register", "tile", "mask", "filter", "index"]
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (4, "Not testable: no data set has two scores with 20 tiles or more each."),
        (5, "None found in bci: no score with 20 tiles or more differs"),
    ],
)
def test_no_selection_bias_is_claimed_without_a_test(
    tmp_path: Path, count: int, expected: str
) -> None:
    """Four tiles a pair: 16 of each score, then 20."""
    text = section(write(tmp_path, image_pairs(count) + slides()[:1]).read_text(), "funnel")
    assert expected in text and ("None found" in text) == (count == 5)
    assert ("Not testable in acrobat" in text) == (count == 5)


def test_the_alignment_of_pairs_provided_registered_is_a_finding(tmp_path: Path) -> None:
    made = [
        dataclasses.replace(pair, aligned=0.5 if pair.score in ("2+", "3+") else 0.0)
        for pair in image_pairs(3)
    ]
    copy = dataclasses.replace(made[0], pair="copy")
    sheet = make(tmp_path, [*made, copy, *slides()[:2]], engines=("stain",))
    described = tmp_path / "results" / "describe"
    for path in described.glob("bci.*.parquet"):
        rows = tables.read(path, tables.DESCRIBE).to_pylist()
        for row in rows:
            row["digest"] = row["digest"].replace("copy", made[0].pair)
        tables.write(path, rows, tables.DESCRIBE)
    text = page_of(tmp_path, sheet).read_text()
    assert "<strong>6 of 13 pairs provided registered show measurable alignment</strong>" in text
    found = section(text, "registration").partition("provided registered")[2]
    rows = re.findall(r"<tr[^>]*><td>([^<]*)</td>(.*?)</tr>", found)
    cells = {name: re.findall(r">([^<]*)</td>", row) for name, row in rows}
    # Pairs, measurable, fraction, correlation, above the others, tiles, measurable, fraction.
    assert cells["bci 3+"] == ["3", "3", "100 %", "0.25", "3 of 3", "12", "12", "100 %"]
    assert cells["bci 0"][:5] == ["4", "0", "0 %", "0.25", "0 of 4"]
    assert cells["all"][:3] == ["13", "6", "46 %"]
    assert "One image in several cases: bci_0_0 he, copy he" in text
    separation = section(text, "quality").partition("true and shuffled")[2]
    tiles, auc, *_ = re.findall(r'<td class="n">([^<]*)</td>', separation)
    assert tiles == "48"
    assert 0 <= float(auc) <= 1


@pytest.mark.parametrize(
    ("error_um", "margin", "expected"),
    [(70.9, -0.094, {"registration_margin"}), (170.9, 0.1, {"registration_error_um"})],
)
def test_a_tile_shows_the_measure_that_rejected_it(
    error_um: float, margin: float, expected: set[str]
) -> None:
    """Two measures have the reason `misregistered`."""
    row = {"registration_error_um": error_um, "registration_margin": margin}
    limits = {"registration_error_max_um": 100.0, "registration_margin_min": -0.05}
    assert tiles.deciding({**row, "reason": "misregistered"}, limits) == expected


REFUSED = slides()[1]
EMPTY = Made("bci_a", state="unreadable", reason="bci_a_he.png: not an image", tiles=0)


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (image_pairs(2), ["All pairs were provided registered"]),
        ([slides()[0], slides()[2]], ["Split val is empty"]),
        ([REFUSED], ["No tile was written", "1 pair: refused."]),
        ([EMPTY, slides()[5]], ["No tile was written", "bci_a_he.png: not an image"]),
        (
            [Made(f"bci_{k}", score="3+", sharpness=1.0) for k in range(3)],
            [">0</b><span>of 12 tiles accepted", "No tile was accepted", "blurred_her2"],
        ),
        ([slides()[3]], ["wsi_d_her2.tif: truncated; copy it again"]),
    ],
    ids=["images", "slides", "one refused", "all empty", "none accepted", "unreadable"],
)
def test_cohorts_that_lack_something(
    tmp_path: Path, pairs: list[Made], expected: list[str]
) -> None:
    path = write(tmp_path, pairs)
    check_page(path)
    text = path.read_text()
    assert all(word in text for word in expected)


def test_hostile_words_are_text(tmp_path: Path) -> None:
    hostile = "\"'><script>alert(1)</script><img src=http://example.org/x onerror=alert(1)>"
    pairs = [
        Made("bci_a", state="unreadable", reason=hostile),
        Made("wsi_a", "acrobat", slide=True, verdict="fail", state="refused", reason=hostile),
        Made("bci_b", "acrobat", slide=True, attempts=(hostile,)),
    ]
    path = write(tmp_path, pairs)
    text = path.read_text()
    assert "<script>alert" not in text and text.count("<script") == 1
    assert "<img src=http" not in text
    assert text.count("<li>&#34;&#39;&gt;&lt;script&gt;alert(1)") == 1
    page = Page(text)
    assert page.faults == [] and page.tags.count("script") == 1
    assert all(not address.startswith("http") for address in page.addresses)


def test_the_tiles_with_the_least_agreement_are_shown_with_both_masks(tmp_path: Path) -> None:
    sheet = make(tmp_path, image_pairs(2), engines=("stain", "deepliif"))
    text = page_of(tmp_path, sheet).read_text()
    gallery = section(text, "masks").partition("<h4>Least agreement")[2].partition("<h3>")[0]
    scores = [float(found) for found in re.findall(r"<dt>Dice</dt><dd>(\d\.\d\d)<", gallery)]
    assert len(scores) == 6 and scores == sorted(scores) and scores[0] < 0.4
    found = re.findall(r'<img src="([^"]+)"', gallery)
    assert len(found) == 18
    # The first engine calls nothing positive there, the second some cells.
    assert len(set(found[:3])) == 3
    assert "Low agreement of the mask engines" in text[: text.index('id="pairs"')]
    assert "Low agreement" not in write(tmp_path / "one", image_pairs(1)).read_text()


def test_what_could_not_be_measured_on_a_slide_is_a_warning(tmp_path: Path) -> None:
    """Default stain vectors of DAB alone are usual: an unstained slide has no brown to measure."""
    sheet = make(tmp_path, image_pairs(1), engines=("stain",))
    notes = {
        "bci_0_0": "not measured: colour of haematoxylin, density of nuclei",
        "bci_0_1": "not measured: colour of DAB",
    }
    assert "not measured" not in page_of(tmp_path, sheet).read_text()
    for path in (tmp_path / "results" / "mask").glob("*.parquet"):
        if path.name.endswith(".cells.parquet"):
            continue
        rows = tables.read(path, tables.MASK).to_pylist()
        tables.write(path, [{**r, "note": notes.get(r["pair"])} for r in rows], tables.MASK)
    text = page_of(tmp_path, sheet).read_text()
    assert "stain, 1 pair: not measured: colour of haematoxylin, density of nuclei" in text
    assert "colour of DAB" not in text


def links(page: Page) -> list[str]:
    return [address for address in page.addresses if not address.startswith(("data:", "#"))]


def test_pairs_beyond_the_worst_have_pages_of_their_own(tmp_path: Path) -> None:
    sheet = make(tmp_path, image_pairs(1) + slides())
    path = page_of(tmp_path, sheet, preset="demo", worst_pairs=2)
    page = check_page(path)
    folder = path.parent / "pairs"
    assert {own.stem for own in folder.iterdir()} == {"wsi_a", "wsi_c", "wsi_e", "wsi_f"}
    assert sorted(links(page)) == [f"pairs/wsi_{name}.html" for name in "acef"]
    assert path.read_text().count('<article class="pair"') == 2
    for own in folder.iterdir():
        alone = check_page(own)
        assert links(alone) == ["../report.html#registration"]
        assert len(alone.images) == 8
        text = own.read_text()
        assert "Demo sizes." in text and f"Registration of {own.stem}" in text
        assert own.stat().st_size < 1_000_000
    # In the page, the same card as alone, but for its heading.
    card = (folder / "wsi_f.html").read_text()
    everything = page_of(tmp_path, sheet).read_text()
    card = card[card.index('<article class="pair"') : card.index("</article>")]
    assert card.replace("<h3>", "<h3><span>wsi_f</span> ", 1) in everything
    assert list(folder.iterdir()) == [], "a pair on the page has no page of its own"


def test_pairs_that_do_not_fit_have_pages_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest in order: a better pair is never on the page where a worse one is not."""
    sheet = make(tmp_path, slides())
    sizes = []
    take = pictures.Album.take

    def counted(self: pictures.Album, *args: object) -> dict[str, str]:
        made = take(self, *args)
        sizes.append(sum(map(len, made.values())))
        return made

    monkeypatch.setattr(pictures.Album, "take", counted)
    page_of(tmp_path, sheet)
    monkeypatch.setattr(report, "REGISTRATION_BYTES", sum(sizes[:3]) + 10)
    path = page_of(tmp_path, sheet)
    check_page(path)
    text = path.read_text()
    assert [name for name in "bdecaf" if f'id="pair-wsi_{name}"' in text] == ["b", "d", "e"]
    assert {own.stem for own in (path.parent / "pairs").iterdir()} == {"wsi_c", "wsi_a", "wsi_f"}


def test_a_long_table_of_pairs_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "ROWS_MAX", 4)
    path = write(tmp_path, slides(), worst_pairs=3)
    check_page(path)
    text = path.read_text()
    assert '2 more: <a href="pairs/pairs.list.html">' in section(text, "pairs")
    registered = section(text, "registration")
    assert '2 more: <a href="pairs/registered.list.html">' in registered
    assert registered.count('href="pairs/wsi_') == 1 and registered.count('href="#pair-') == 3
    # The pages of the lists have all pairs, with links to the page or to that of a pair.
    names = {f"wsi_{letter}" for letter in "abcdef"}
    lists = path.parent / "pairs"
    check_page(lists / "pairs.list.html")
    found = re.findall(r'<td class="name">(\w+)<', (lists / "pairs.list.html").read_text())
    assert len(found) == 6 and set(found) == names
    check_page(lists / "registered.list.html")
    links = re.findall(r'<td class="name"><a href="([^"]+)">(\w+)<',
                       (lists / "registered.list.html").read_text())  # fmt: skip
    assert len(links) == 6 and {name for _, name in links} == names
    for link, name in links:
        target, _, place = link.partition("#")
        there = (lists / target).resolve().read_text()
        assert f'id="pair-{name}"' in there
        assert bool(place) == (target == "../report.html")


def test_a_full_gallery_leaves_tiles_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sheet = make(tmp_path, image_pairs(3))
    everything = section(page_of(tmp_path, sheet).read_text(), "accepted")
    assert "drawn tiles are shown" not in everything
    monkeypatch.setattr(tiles, "GALLERY_BYTES", 60_000)
    path = page_of(tmp_path, sheet)
    check_page(path)
    cut = section(path.read_text(), "accepted")
    count = cut.count("<article")
    assert 0 < count < everything.count("<article")
    assert f"{count} of {everything.count('<article')} drawn tiles are shown" in cut
    assert sum(map(len, re.findall(r'<img src="([^"]+)"', cut))) <= 60_000


def test_pictures_are_of_the_map_that_was_kept_and_of_readable_slides(tmp_path: Path) -> None:
    rigid = Made("wsi_r", "acrobat", slide=True, verdict="review", map="rigid", reason="kept")
    path = write(tmp_path, [rigid, slides()[3]])
    alts = [str(image["alt"]) for image in check_page(path).images]
    assert not any("after rigid" in alt for alt in alts)
    assert sum("after registration" in alt and "wsi_r" in alt for alt in alts) == 2
    assert [alt for alt in alts if "wsi_d" in alt] == ["H&E slide of wsi_d"]
    text = path.read_text()
    card = text[text.index('id="pair-wsi_d"') :].partition("</article>")[0]
    assert "<table" not in card and "<dl" not in card


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    sheet = make(tmp_path, image_pairs(1))
    shard = next((tmp_path / "results" / "tile").glob("*.tar"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 8])
    with pytest.raises(ShardError, match=r"\.tar: .*run"):
        page_of(tmp_path, sheet)
    assert not (tmp_path / "results" / "report" / "report.html").exists()


@pytest.mark.parametrize(
    "lost",
    ["register/wsi_a.quality.parquet", "landmarks/cohort.errors.parquet", "index/index.parquet"],
)
def test_a_missing_table_is_named(tmp_path: Path, lost: str) -> None:
    sheet = make(tmp_path, slides()[:1])
    (tmp_path / "results" / lost).unlink()
    with pytest.raises(TableError, match=f"{lost}: no such table"):
        page_of(tmp_path, sheet)
    assert not (tmp_path / "results" / "report" / "report.html").exists()


def test_staining_of_a_case_with_few_tiles_is_that_of_its_quarters(tmp_path: Path) -> None:
    """Cells are on the diagonal of a tile, the stained 9 of 12 first: two quarters are empty."""
    pairs = [Made("bci_1", score="3+", tiles=3), Made("bci_2", score="3+", tiles=6)]
    page = write(tmp_path, pairs)
    rows = tables.read(page.parent / "cases.parquet", tables.STAINING).to_pylist()
    few, many = sorted(rows, key=lambda row: row["tiles"])
    assert (few["blocks"], many["blocks"]) == ("quarters", "tiles")
    assert few["cells"] == 12 * few["tiles"] < 48
    assert few["h_score"] == many["h_score"] == 75
    assert few["h_score_low"] < many["h_score_low"] < 75
    assert 75 < many["h_score_high"] < few["h_score_high"]
    assert few["membrane_od"] == 0.0625
    text = section(page.read_text(), "masks")
    assert text.count(">quarters<") == text.count(">tiles</td>") == 1


def test_digest_of_the_page_stands_by_version(tmp_path: Path) -> None:
    """A changed page without a raised version would not be made again by the graph."""
    sheet = make(tmp_path, slides()[:3])
    path = page_of(tmp_path, sheet, gallery_tiles=2, worst_pairs=2)
    text = path.read_text()
    # Provenance prints versions of packages and the help of other stages' options.
    own = text[: text.index('<section id="provenance">')]
    own += (path.parent / "pairs" / "wsi_a.html").read_text()
    assert hashlib.sha256(own.encode()).hexdigest()[:16] == GOLDEN[ReportOptions.version]


def test_the_command_line_gives_the_same_bytes(tmp_path: Path) -> None:
    sheet = make(tmp_path, image_pairs(1) + slides()[:2])
    page = page_of(tmp_path, sheet, worst_pairs=1)
    again = tmp_path / "again" / "report.html"
    given = {"sheet": sheet, "block_count": BLOCK_COUNT, "results": tmp_path / "results"}
    given |= {"preset": "hemera", "worst_pairs": 1, "page": again, "pairs": again.parent / "pairs"}
    given["cases"] = again.parent / "cases.parquet"
    assert main(["report", *words(given)]) == 0
    for path in page.parent.rglob("*.html"):
        assert (again.parent / path.relative_to(page.parent)).read_bytes() == path.read_bytes()
