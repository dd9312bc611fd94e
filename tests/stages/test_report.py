"""The page about the data, from cohorts of every kind."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from hemera.config import ReportOptions
from hemera.errors import ShardError, TableError
from hemera.pages import pictures
from hemera.stages import report
from tests.small_results import BLOCK_COUNT, Made, make
from tests.test_pages import Page, check_page

SCORES = ("0", "1+", "2+", "3+")
SPLITS = ("train", "train", "train", "val", "test")

GOLDEN = {1: "7673fe409af2e743"}
"""Digest of the page for a fixed cohort, by version of ReportOptions."""


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
             reason="registration failed: tile_ok 0.12 below 0.30", landmarks=True),
        Made("wsi_c", "acrobat", "", "test", slide=True, verdict="review"),
        Made("wsi_d", "acrobat", "", "test", slide=True, verdict="fail", state="unreadable",
             reason="wsi_d_her2.tif: truncated; copy it again"),
        Made("wsi_e", "acrobat", "2+", "val", slide=True, verdict="fail", person="accept"),
        Made("wsi_f", "acrobat", "2+", "val", slide=True, state="no_tissue", tiles=0,
             reason="wsi_f_he.tif: no tissue found on it"),
    ]  # fmt: skip


def write(folder: Path, pairs: list[Made], *, preset: str = "hemera", **options: int) -> Path:
    engines = ("stain",)
    sheet = make(folder, pairs, engines=engines)
    return page_of(folder, sheet, preset=preset, **options)


def page_of(folder: Path, sheet: Path, *, preset: str = "hemera", **options: int) -> Path:
    page = folder / "results" / "report" / "report.html"
    report.run(
        sheet=sheet,
        block_count=BLOCK_COUNT,
        preset=preset,
        results=folder / "results",
        page=page,
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
    # Worst first: the two without a good map, then the one under review.
    order = [text.index(f"<span>wsi_{name}</span>") for name in "bdeca"]
    assert order == sorted(order)
    assert "a person's verdict: accept" in text
    assert "At 11 landmarks: median 6 µm (6.52 px" in text
    assert "low_tissue" in text and "registration_review" in text
    assert "filter.tissue_fraction_min: 0.5" in text
    assert "Tiles of different resolution are mixed" in text
    assert "Mismatched pairs" in text
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


def test_a_full_page_leaves_tiles_out_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "GALLERY_BYTES", 60_000)
    monkeypatch.setattr(report, "REGISTRATION_BYTES", 10)
    path = write(tmp_path, image_pairs(3) + slides()[:1])
    text = path.read_text()
    assert "more would not fit into 30 MB" in text
    assert "or the page is full" in text
    assert path.stat().st_size < 500_000
    assert pictures.Album(10).take(np.zeros((5, 7, 3), np.uint8), 7) is None


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


def test_digest_of_the_page_stands_by_version(tmp_path: Path) -> None:
    """A changed page without a raised version would not be made again by the graph."""
    sheet = make(tmp_path, slides()[:3])
    text = page_of(tmp_path, sheet, gallery_tiles=2).read_text()
    # Provenance prints versions of packages and the help of other stages' options.
    own = text[: text.index('<section id="provenance">')]
    assert hashlib.sha256(own.encode()).hexdigest()[:16] == GOLDEN[ReportOptions.version]
