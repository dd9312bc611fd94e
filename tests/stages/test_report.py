"""The page about the data, from cohorts of every kind."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest

from hemera.config import ReportOptions
from hemera.errors import ShardError, TableError
from hemera.reports import data, pictures
from hemera.stages import report
from tests.reports.test_pages import Page, check_page
from tests.small_results import BLOCK_COUNT, Made, make

SCORES = ("0", "1+", "2+", "3+")
SPLITS = ("train", "train", "train", "val", "test")

GOLDEN = {6: "94ecd9f16262545d"}
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
    engines = ("stain",)
    sheet = make(folder, pairs, engines=engines)
    return page_of(folder, sheet, preset=preset, **options)


def page_of(
    folder: Path, sheet: Path, *, preset: str = "hemera", logs: Path | None = None, **options: int
) -> Path:
    page = folder / "results" / "report" / "report.html"
    report.run(
        sheet=sheet,
        block_count=BLOCK_COUNT,
        preset=preset,
        results=folder / "results",
        page=page,
        pairs=page.parent / "pairs",
        logs=logs,
        options=ReportOptions(**options),
    )
    return page


def test_a_cohort_of_both_kinds(tmp_path: Path) -> None:
    path = write(tmp_path, image_pairs() + slides(), preset="demo")
    page = check_page(path)
    text = path.read_text()
    assert "Demo sizes." in text
    # 20 image pairs and three slides of 4 tiles, of each one glass; wsi_c is under review.
    assert ">66</b><span>of 92 tiles accepted" in text
    assert "of 26 pairs tiled" in text and "1 no tissue, 1 refused, 1 unreadable" in text
    assert "wsi_d_her2.tif: truncated" in text
    # Worst first: the two without a map, the bad one, then the one under review.
    for mark in ("<span>wsi_{}</span>", '<a href="#pair-wsi_{}">'):
        order = [text.index(mark.format(name)) for name in "bdecaf"]
        assert order == sorted(order)
    assert list((path.parent / "pairs").iterdir()) == []
    assert "a person's verdict: accept" in text
    assert "At 11 landmarks: median 6 µm (6.52 px, 0.13 % of the diagonal)" in text
    assert "11 landmarks and no map to measure there; unregistered, median 46 µm." in text
    assert "low_tissue" in text and "registration_review" in text
    assert "filter.tissue_fraction_min: 0.5" in text
    assert "Tiles of different resolution are mixed" in text
    assert "Mismatched pairs" in text
    assert "Estimated error of registration, 12 tiles" in text
    assert {"pairs", "registration", "funnel", "kept", "dropped", "masks", "splits"} <= set(
        page.ids
    )
    kept = text[text.index('id="kept"') : text.index('id="dropped"')]
    assert kept.count("<article") == 24 and kept.count("<img") == 72
    dropped = text[text.index('id="dropped"') : text.index('id="masks"')]
    # Glass falls by its tissue, and that is the value in bold.
    assert '<div class="decides"><dt>tissue</dt><dd>20 %</dd></div>' in dropped
    assert str(tmp_path) not in text


def test_the_same_again_and_golden(tmp_path: Path) -> None:
    cohort = image_pairs(2) + slides()[:2]
    sheet = make(tmp_path, cohort)
    first = page_of(tmp_path, sheet, gallery_tiles=3).read_bytes()
    assert page_of(tmp_path, sheet, gallery_tiles=3).read_bytes() == first


def test_no_whole_slides(tmp_path: Path) -> None:
    path = write(tmp_path, image_pairs(2))
    check_page(path)
    text = path.read_text()
    assert "No pair of this cohort was registered here" in text
    assert "every image pair was tiled" in text
    assert "Estimated error of registration" not in text
    assert list((path.parent / "pairs").iterdir()) == []
    assert "Demo sizes." not in text


def test_no_image_pairs(tmp_path: Path) -> None:
    path = write(tmp_path, [slides()[0], slides()[2]])
    check_page(path)
    text = path.read_text()
    assert "Pairs of ready-made images" not in text
    assert "Split val is empty" in text


def test_one_refused_registration_and_nothing_else(tmp_path: Path) -> None:
    path = write(tmp_path, [slides()[1]])
    check_page(path)
    text = path.read_text()
    assert "No tile was written" in text
    assert "There is no map, so there is no after." in text
    assert "1 pair refused and not tiled." in text


def test_nothing_accepted(tmp_path: Path) -> None:
    blurred = [Made(f"bci_{k}", score="3+", sharpness=1.0) for k in range(3)]
    path = write(tmp_path, blurred)
    check_page(path)
    text = path.read_text()
    assert (
        "Nothing was accepted: the funnel says why, and the thresholds are in config.yaml" in text
    )
    assert ">0</b><span>of 12 tiles accepted" in text
    assert "blurred_her2" in text


def test_every_unit_empty(tmp_path: Path) -> None:
    empty = [
        Made("bci_a", state="unreadable", reason="bci_a_he.png: not an image", tiles=0),
        Made("wsi_a", "acrobat", slide=True, state="no_tissue", reason="no tissue", tiles=0),
    ]
    path = write(tmp_path, empty)
    check_page(path)
    text = path.read_text()
    assert "No tile was written: the table of pairs says why" in text
    assert "bci_a_he.png: not an image" in text


def test_hostile_words_are_text(tmp_path: Path) -> None:
    hostile = "\"'><script>alert(1)</script><img src=http://example.org/x onerror=alert(1)>"
    pairs = [
        Made("bci_a", state="unreadable", reason=hostile),
        Made("wsi_a", "acrobat", slide=True, verdict="fail", state="refused", reason=hostile),
        Made("bci_b"),
    ]
    path = write(tmp_path, pairs)
    text = path.read_text()
    assert "<script" not in text and "<img src=http" not in text
    assert "&lt;script&gt;alert(1)" in text
    page = Page(text)
    assert page.faults == [] and "script" not in page.tags
    assert all(not address.startswith("http") for address in page.addresses)


def test_galleries_show_every_score_and_keep_their_tiles(tmp_path: Path) -> None:
    """Scores take turns, and a tile is drawn by its name: others may come and go."""
    names = [f"t{k}" for k in range(100)]
    groups = ["common"] * 95 + ["rare"] * 5
    places = np.arange(100)
    chosen = report.drawn(places, groups, names, 6, seed=3)
    assert sorted(groups[place] for place in chosen) == ["common"] * 3 + ["rare"] * 3
    backwards = report.drawn(places, groups[::-1], names[::-1], 6, seed=3)
    assert {names[::-1][place] for place in backwards} == {names[place] for place in chosen}
    assert report.drawn(places, groups, names, 6, seed=4) != chosen
    assert len(report.drawn(places[:2], groups[:2], names[:2], 6, seed=3)) == 2
    assert report.drawn(places[:0], [], [], 6, seed=3) == []


def test_the_tiles_two_engines_agree_on_least_are_shown_as_each_drew_them(tmp_path: Path) -> None:
    sheet = make(tmp_path, image_pairs(2), engines=("stain", "deepliif"))
    text = page_of(tmp_path, sheet).read_text()
    part = text[text.index('id="masks"') : text.index('id="splits"')]
    part = part[part.index("agree on least") : part.index("<h3>Do the masks agree")]
    table, gallery = part.split("</table>")
    names = re.findall(r'class="name">(\w+)<', table)
    scores = [float(found) for found in re.findall(r'class="n">(\d\.\d\d)<', table)]
    assert scores == sorted(scores) and scores[0] < 0.4
    assert re.findall(r"<strong>(\w+)</strong>", gallery) == names[:6]
    pictures = re.findall(r'<img src="([^"]+)"', gallery)
    assert len(pictures) == 18
    # The first engine calls nothing positive there, the second some cells.
    assert len(set(pictures[:3])) == 3
    assert "agree too little to trust either unseen" in text[: text.index('id="pairs"')]


def test_one_engine_has_nothing_to_agree_with(tmp_path: Path) -> None:
    text = write(tmp_path, image_pairs(1)).read_text()
    assert "How far do the engines agree?" not in text
    assert "agree too little" not in text


def test_a_full_page_leaves_tiles_out_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "GALLERY_BYTES", 60_000)
    path = write(tmp_path, image_pairs(3))
    text = path.read_text()
    assert "more would not fit into 30 MB" in text
    assert path.stat().st_size < 500_000
    assert pictures.Album(10).take(np.zeros((5, 7, 3), np.uint8), 7) is None


def links(page: Page) -> list[str]:
    return [address for address in page.addresses if not address.startswith(("data:", "#"))]


def test_pairs_beyond_the_worst_have_pages_of_their_own(tmp_path: Path) -> None:
    sheet = make(tmp_path, image_pairs(1) + slides())
    path = page_of(tmp_path, sheet, preset="demo", worst_pairs=2)
    page = check_page(path)
    folder = path.parent / "pairs"
    assert {own.stem for own in folder.iterdir()} == {"wsi_a", "wsi_c", "wsi_e", "wsi_f"}
    assert sorted(links(page)) == [f"pairs/wsi_{name}.html" for name in "acef"]
    text = path.read_text()
    assert text.count('<article class="pair"') == 2
    assert "The worst 2 pairs" in text
    for own in folder.iterdir():
        alone = check_page(own)
        assert links(alone) == ["../report.html#registration"]
        assert len(alone.images) == 8
        words = own.read_text()
        assert "Demo sizes." in words and f"The registration of {own.stem}" in words
        assert "mirror_probe" in words and "Estimated error: median" in words
        assert own.stat().st_size < 1_000_000
    # In the page, the same card as alone, but for its heading.
    card = (folder / "wsi_f.html").read_text()
    everything = page_of(tmp_path, sheet).read_text()
    assert "The worst" not in everything and "Pair by pair" in everything
    card = card[card.index('<article class="pair"') : card.index("</article>")]
    assert card.replace("<h3>", "<h3><span>wsi_f</span> ", 1) in everything
    assert list(folder.iterdir()) == [], "what stands on the page has no page of its own"


def test_pairs_that_do_not_fit_have_pages_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest in order: a better pair never stands on the page where a worse one does not."""
    sheet = make(tmp_path, slides())
    sizes = []
    take_all = pictures.Album.take_all

    def counted(self: pictures.Album, *args: object) -> dict[str, str]:
        made = take_all(self, *args)
        sizes.append(sum(map(len, made.values())))
        return made

    monkeypatch.setattr(pictures.Album, "take_all", counted)
    page_of(tmp_path, sheet, gallery_tiles=1)
    monkeypatch.setattr(report, "REGISTRATION_BYTES", sum(sizes[2:5]) + 10)
    path = page_of(tmp_path, sheet)
    check_page(path)
    text = path.read_text()
    shown = [name for name in "bdecaf" if f'id="pair-wsi_{name}"' in text]
    assert shown == ["b", "d", "e"]
    assert {own.stem for own in (path.parent / "pairs").iterdir()} == {"wsi_c", "wsi_a", "wsi_f"}


def test_a_long_table_of_pairs_is_cut_and_says_where_the_others_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "ROWS_MAX", 4)
    path = write(tmp_path, slides(), worst_pairs=3)
    check_page(path)
    text = path.read_text()
    assert (
        "2 more stand in <code>results/register/*.parquet</code>, and have their pages in "
        "<code>pairs</code>" in text
    )
    assert text.count('href="pairs/') == 1 and text.count('href="#pair-') == 3
    assert len(list((path.parent / "pairs").iterdir())) == 3


def test_a_map_that_was_kept_rigid_shows_so(tmp_path: Path) -> None:
    rigid = Made("wsi_r", "acrobat", slide=True, verdict="review", map="rigid", reason="kept")
    path = write(tmp_path, [rigid])
    page = check_page(path)
    text = path.read_text()
    assert "final: the rigid map was kept" in text and "map kept</dt><dd>rigid" in text
    alts = [str(image["alt"]) for image in page.images if "wsi_r" in str(image["alt"])]
    assert not any("by the rigid map" in alt for alt in alts)
    assert sum("after registration" in alt for alt in alts) == 2


def test_a_card_without_images_is_short(tmp_path: Path) -> None:
    path = write(tmp_path, [slides()[3]])
    check_page(path)
    text = path.read_text()
    card = text[text.index('<article class="pair"') : text.index("</article>")]
    assert "wsi_d_her2.tif: truncated; copy it again" in card
    # H&E could be read.
    assert card.count("<img") == 1
    assert "<table" not in card and "<dl" not in card and "not measured" not in card


def test_a_mirror_image_found_by_the_probe_is_said_on_top(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        [
            Made("wsi_m", "acrobat", slide=True, mirrored_by="probe"),
            Made("wsi_n", "acrobat", slide=True, mirrored_by="sheet"),
        ],
    )
    text = path.read_text()
    warnings = text[text.index('<ul class="warnings">') : text.index("<nav")]
    assert "mirrored (wsi_m)" in warnings and "wsi_n" not in warnings
    assert "yes, found against the sheet" in text and "yes, as the sheet says" in text


def test_what_was_tried_is_listed_as_text(tmp_path: Path) -> None:
    tries = ("fast at 768 px: fail (a < b & <b>c</b>)", "fast at 768 px, tissue alone: pass")
    path = write(tmp_path, [Made("wsi_a", "acrobat", slide=True, attempts=tries)])
    check_page(path)
    text = path.read_text()
    assert "<li>fast at 768 px: fail (a &lt; b &amp; &lt;b&gt;c&lt;/b&gt;)</li>" in text


def test_the_challenge_s_figures_stand_below_the_landmarks(tmp_path: Path) -> None:
    """Pair a has errors of 1 to 11 um, pair b no map: 41 to 51 um count there."""
    path = write(tmp_path, slides()[:2])
    check_page(path)
    text = path.read_text()
    score = text[text.index("ACROBAT challenge") : text.index("Pair by pair")]
    rows = [
        re.findall(r"<td[^>]*>([^<]*)</td>", row)
        for row in re.findall(r"<tr>(<td>.*?)</tr>", score)
    ]
    # 90th percentiles 10 and 50, means 6 and 46.
    assert rows == [
        ["median", "all", "2", "1", "30", "50", "26", "46"],
        ["mean", "all", "2", "1", "30", "50", "26", "46"],
        ["deviation", "all", "2", "1", "20", "0", "20", "0"],
    ]


def test_time_and_memory_come_from_snakemake_where_it_is_known(tmp_path: Path) -> None:
    sheet = make(tmp_path, slides())
    logs = tmp_path / "logs"
    (logs / "register").mkdir(parents=True)
    head = "s\th:m:s\tmax_rss\tmax_vms\n"
    for name, text in {
        "wsi_a": f"{head}212.58\t0:03:32\t1755.51\t7430.19\n",
        "wsi_b": f"{head}2.1\t0:00:02\t-\t-\n",
        "wsi_c": "",
        "wsi_d": head,
        "wsi_e": f"{head}nan\tx\tinf\ty\n",
    }.items():
        (logs / "register" / f"{name}.tsv").write_text(text)
    (logs / "register" / "wsi_f.tsv").write_bytes(b"s\tmax_rss\n\xff\xfe\0\n")
    path = page_of(tmp_path, sheet, logs=logs)
    check_page(path)
    jobs = re.findall(r"<dt>job</dt><dd>([^<]*)</dd>", path.read_text())
    assert jobs == [
        "2 s, as Snakemake measured it",
        "3 min 33 s, 1.76 GB of memory at most, as Snakemake measured it",
    ]
    assert "as Snakemake measured it" not in page_of(tmp_path, sheet).read_text()


def test_a_missing_table_and_a_foreign_shard_are_named(tmp_path: Path) -> None:
    sheet = make(tmp_path, image_pairs(1))
    shard = next((tmp_path / "results" / "tile").glob("*.tar"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 8])
    with pytest.raises(ShardError, match=r"\.tar: .*run"):
        page_of(tmp_path, sheet)
    shard.write_bytes(whole)
    (tmp_path / "results" / "index" / "index.parquet").unlink()
    with pytest.raises(TableError, match="no such table"):
        page_of(tmp_path, sheet)
    assert not (tmp_path / "results" / "report" / "report.html").exists()


@pytest.mark.parametrize(
    "lost", ["register/wsi_a.quality.parquet", "landmarks/cohort.errors.parquet"]
)
def test_a_missing_table_of_registration_is_named(tmp_path: Path, lost: str) -> None:
    sheet = make(tmp_path, slides()[:1])
    (tmp_path / "results" / lost).unlink()
    with pytest.raises(TableError, match=f"{lost}: no such table"):
        page_of(tmp_path, sheet)
    assert not (tmp_path / "results" / "report" / "report.html").exists()


def test_digest_of_the_page_stands_by_version(tmp_path: Path) -> None:
    """A changed page without a raised version would not be made again by the graph."""
    sheet = make(tmp_path, slides()[:3])
    path = page_of(tmp_path, sheet, gallery_tiles=2, worst_pairs=2)
    text = path.read_text()
    # Provenance prints versions of packages and the help of other stages' options.
    own = text[: text.index('<section id="provenance">')]
    own += (path.parent / "pairs" / "wsi_a.html").read_text()
    assert hashlib.sha256(own.encode()).hexdigest()[:16] == GOLDEN[ReportOptions.version]
