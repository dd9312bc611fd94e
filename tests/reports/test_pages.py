"""The parts of the pages: numbers, charts, pictures and the certificate."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from hemera import tables
from hemera.config import RegisterOptions
from hemera.masks import label_format
from hemera.registration.displacement import Displacement, none
from hemera.registration.local_quality import LocalQuality
from hemera.reports import charts, data, pictures, registration
from hemera.reports.html import DASH, count, duration, fixed, number, percent, plural
from tests.small_results import tissue


class Page(HTMLParser):
    """What a page refers to, and whether its tags close."""

    VOID = ("meta", "link", "img", "br", "circle", "rect", "path", "line")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.anchors: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.open: list[str] = []
        self.faults: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name in ("src", "href", "srcset", "poster", "data", "action"):
            if name in found:
                self.addresses.append(found[name] or "")
        if tag == "img":
            self.images.append(found)
        if found.get("id"):
            self.ids.append(str(found["id"]))
        self.faults += [f"{tag} {name}" for name in found if name.startswith("on")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> closes another tag")


def check_page(path: Path) -> Page:
    """Hold what every page must hold: nothing is fetched, no script, images named, tags closed."""
    text = path.read_text()
    page = Page(text)
    assert page.faults == [] and page.open == []
    assert "script" not in page.tags
    outside = [a for a in page.addresses if not a.startswith(("data:", "#"))]
    assert all(not re.match(r"[a-z]*:|//|/", address) for address in outside), outside
    # The namespace of SVG is a name, not a request.
    bare = text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "http://" not in bare and "https://" not in bare and "url(" not in bare
    assert all(image.get("alt") for image in page.images)
    inside = {address[1:] for address in page.addresses if address.startswith("#")}
    assert inside <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert path.stat().st_size < 30_000_000
    return page


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (number(0.12345), "0.123"),
        (number(1234567.0), "1\u202f234\u202f567"),
        (number(98765.4), "98\u202f765"),
        (number(-0.5), "−0.5"),
        (number(0.00012345), "0.000123"),
        (number(float("nan")), DASH),
        (number(None), DASH),
        (number(float("inf")), "∞"),
        (fixed(0.5), "0.500"),
        (fixed(-1.25, 1), "−1.2"),
        (count(12), "12"),
        (percent(1.0), "100.0 %"),
        (percent(0.0), "0.0 %"),
        # Not all and not none must not read as all and none.
        (percent(0.99999), ">99.9 %"),
        (percent(0.00001), "<0.1 %"),
        (percent(0.5, 0), "50 %"),
        (plural(1, "tile"), "1 tile"),
        (plural(0, "tile"), "0 tiles"),
        (duration(0.2), "0 s"),
        (duration(59.6), "1 min 0 s"),
        (duration(212.58), "3 min 33 s"),
        (duration(7512), "2 h 5 min"),
    ],
)
def test_numbers_read_as_they_are(made: str, expected: str) -> None:
    assert made == expected


def areas(chart: str) -> dict[str, float]:
    """Areas of the filled shapes of a chart, by colour."""
    found = {}
    for path, color in re.findall(r'<path d="([^"]+)" style="fill: (#\w+)', chart):
        x, y = np.array([float(n) for n in re.findall(r"[\d.]+", path)]).reshape(-1, 2).T
        found[color] = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    return found


def test_histogram_draws_each_group_to_its_count() -> None:
    chart = charts.histogram(
        "a measure",
        [("in", "#111111", np.full(30, 0.25)), ("out", "#222222", np.full(10, 0.75))],
        limits=[("limit", 0.5)],
        span=(0.0, 1.0),
        bins=4,
    )
    found = areas(chart)
    assert found["#111111"] / found["#222222"] == pytest.approx(3)
    assert "limit" in chart


def test_bars_are_as_long_as_their_counts_or_of_one_length() -> None:
    rows = [
        ("a", [("x", "#111111", 30.0), ("y", "#222222", 10.0)], ""),
        ("b", [("z", "#333333", 5.0)], ""),
    ]
    for share, ratio in ((False, 8), (True, 1)):
        found = areas(charts.bars("t", rows, share=share))
        assert found["#111111"] / found["#222222"] == pytest.approx(3)
        total = found["#111111"] + found["#222222"]
        assert total / found["#333333"] == pytest.approx(ratio)


def test_boxes_show_the_quartiles() -> None:
    chart = charts.boxes("spread", [("a", np.arange(101.0)), ("b", np.arange(51.0))])
    found = [float(path.split()[1]) for path in re.findall(r'd="([^"]+)"[^>]*#56b4e9', chart)]
    # Lower quartiles 25 and 12.5 on an axis from 0 to 1.02 times the largest 95th percentile.
    plot = charts.WIDTH_PX - 16
    expected = [6 + q / (1.02 * 95) * plot for q in (25, 12.5)]
    assert found == pytest.approx(expected, abs=0.2)


def test_contours_lie_on_the_cells() -> None:
    """A positive and a negative cell: each contour has its colour, and the inside is untouched."""
    classes = np.zeros((60, 90), np.uint8)
    classes[10:30, 10:35] = label_format.POSITIVE
    classes[35:55, 50:80] = label_format.NEGATIVE
    label = label_format.pack(classes, classes > 0, np.zeros_like(classes))
    gray = np.full((60, 90, 3), 200, np.uint8)
    drawn = pictures.outlined(gray, label)
    assert tuple(drawn[10, 20]) == pictures.POSITIVE_COLOUR
    assert tuple(drawn[35, 60]) == pictures.NEGATIVE_COLOUR
    assert tuple(drawn[20, 22]) == tuple(drawn[45, 65]) == tuple(drawn[2, 2]) == (200, 200, 200)
    assert (gray == 200).all()


def test_album_gives_all_of_a_group_or_none_and_never_exceeds() -> None:
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 255, (90, 120, 3), np.uint8)
    one = len(pictures.Album(10**9).take(noise, 400) or "")
    album = pictures.Album(round(4.5 * one))
    groups = []
    while group := album.take_all({"a": noise, "b": noise}, 400):
        groups.append(group)
    assert [set(group) for group in groups] == [{"a", "b"}] * 2
    assert sum(len(address) for group in groups for address in group.values()) <= 4.5 * one
    left = album.left_bytes
    assert album.take_all({"a": noise[:8, :8], "b": noise}, 400) == {}
    assert album.left_bytes == left


def test_shrink_keeps_the_shape() -> None:
    image = np.zeros((300, 400, 3), np.uint8)
    assert pictures.shrink(image, 200).shape == (150, 200, 3)
    assert pictures.shrink(image, 500) is image


def test_steps_go_from_light_to_dark() -> None:
    """In gray, too, each colour is darker than the one before."""
    colours = pictures.steps(7)
    gray = [np.dot([int(c[k : k + 2], 16) for k in (1, 3, 5)], (0.3, 0.59, 0.11)) for c in colours]
    assert len(set(colours)) == 7
    assert all(np.diff(gray) < -10)


def test_a_pale_ground_keeps_its_shape_and_white() -> None:
    image = tissue(1, 60, 90, (90, 60, 120))
    pale = pictures.paled(image)
    assert pale.shape == image.shape and pale.dtype == np.uint8
    assert (pale >= image).all() and pale.min() > 100
    assert (pictures.paled(np.full((2, 3, 3), 255, np.uint8)) == 255).all()


def colours_apart(picture: np.ndarray) -> float:
    """How far a blend is from gray, away from its edges."""
    return float(np.abs(np.diff(picture.astype(int)[25:-25, 35:-35], axis=2)).mean())


def test_views_undo_a_known_shift() -> None:
    """HER2 is H&E moved by (300, -200) um: in the end both lie on each other, and not before."""
    whole = tissue(5, 500, 700, (90, 60, 120))
    he = whole[100:400, 100:500]
    her2 = whole[120:420, 70:470]  # a point at (x, y) of he lies at (x + 30, y - 20) px of her2
    vectors = np.zeros((6, 8, 2), np.float32)
    vectors[..., 0], vectors[..., 1] = 300.0, -200.0
    final = Displacement(vectors, 500.0)
    half = [1.0, 0.0, 150.0, 0.0, 1.0, -100.0]
    sizes = (4000.0, 3000.0), (4000.0, 3000.0)
    made = registration.views(he, her2, *sizes, (236, 226, 234), final, half)
    assert set(made) == {"he", "her2"} | {
        f"{name}_{kind}"
        for name in ("before", "rigid", "final")
        for kind in ("blend", "checkerboard")
    }
    before, rigid, after = (colours_apart(made[f"{n}_blend"]) for n in ("before", "rigid", "final"))
    # Where both stains agree, magenta and green make gray; half of the way they do not yet.
    assert after < 0.1 * rigid and after < 0.1 * before
    assert np.abs(made["final_checkerboard"].astype(int) - he)[25:-25, 35:-35].mean() < 1
    whole_way = [1.0, 0.0, 300.0, 0.0, 1.0, -200.0]
    same = registration.views(he, her2, *sizes, (236, 226, 234), final, whole_way)
    assert np.abs(same["rigid_blend"].astype(int) - made["final_blend"]).max() <= 2


def test_the_rigid_map_is_read_row_by_row() -> None:
    """HER2 is H&E turned by a quarter: a point (x, y) lies at (y, width - x) there."""
    he = tissue(5, 300, 400, (90, 60, 120))
    turned = np.ascontiguousarray(np.rot90(he))
    rigid = [0.0, 1.0, 0.0, -1.0, 0.0, 4000.0]
    made = registration.views(
        he, turned, (4000.0, 3000.0), (3000.0, 4000.0), (236, 226, 234), none(), rigid
    )
    assert np.abs(made["rigid_checkerboard"].astype(int) - he)[9:-9, 9:-9].mean() < 1
    assert colours_apart(made["rigid_blend"]) < 0.1 * colours_apart(made["before_blend"])


def test_views_without_a_map_have_no_after() -> None:
    he, her2 = tissue(1, 60, 90, (90, 60, 120)), tissue(2, 70, 80, (130, 90, 60))
    made = registration.views(he, her2, (900, 600), (800, 700), (240, 240, 240), none(), None)
    assert set(made) == {"he", "her2", "before_blend", "before_checkerboard"}
    assert made["before_blend"].shape == he.shape


def quality_of(rows: list[tuple[float, float, float, float, float]]) -> LocalQuality:
    """Squares of 100 um, 50 apart, from (x, y, in place, shifted, residual)."""
    x, y, ncc, best, residual = (np.array(column, float) for column in zip(*rows, strict=True))
    return LocalQuality(
        np.stack([x, y], axis=-1), ncc, best, np.stack([0 * x, residual], axis=-1), 100.0, 50.0
    )


def test_squares_lie_where_they_were_measured_in_the_colour_of_their_error() -> None:
    """On a slide of 2000 x 1000 um drawn at 400 x 300 px, so that a swapped axis shows."""
    local = quality_of(
        [(500.0, 100.0, 0.5, 0.2, -10.0), (1000.0, 900.0, 0.1, 0.4, 120.0),
         (1500.0, 900.0, 0.3, 0.3, 9.0), (200.0, 500.0, 0.5, 0.2, 1.0)]
    )  # fmt: skip
    made = registration.local_map(local, (2000.0, 1000.0), (400, 300))
    assert made is not None
    colours = pictures.steps(7)
    # 0.2 px/um along x and 0.3 along y; a square is drawn at 0.72 of 50 um: 7.2 x 10.8 px.
    found = dict(re.findall(r'<path d="([^"]+)" (?:fill|class)="([^"]+)"', str(made["squares"])))
    box = "h7.2v10.8h-7.2z"
    assert found == {
        f"M96.4 24.6{box}M296.4 264.6{box}M36.4 144.6{box}": colours[0],
        f"M196.4 264.6{box}": colours[4],
        # As good elsewhere as in place counts as worse.
        f"M196.4 264.6{box}M296.4 264.6{box}": "worse",
    }
    assert [share for _, _, share in made["legend"]] == [0.75, 0, 0, 0, 0.25, 0, 0]
    assert made["legend"][0][0] == "up to 10 µm" and made["legend"][4][0] == "100 to 200"
    assert (made["count"], made["worse_fraction"]) == (4, 0.5)
    assert made["median_um"] == pytest.approx(9.5)
    assert made["p90_um"] == pytest.approx(10 + 0.7 * 110)


def test_no_square_is_no_map() -> None:
    empty = LocalQuality.from_columns({name: [] for name in tables.QUALITY.names})
    assert registration.local_map(empty, (2000.0, 1000.0), (400, 300)) is None


def certificate_row(**values: Any) -> dict[str, Any]:
    return {**dict.fromkeys(tables.CERTIFICATE.names), "pair": "a", "verdict": "pass", **values}


def test_certificate_judges_as_the_options_say() -> None:
    row = certificate_row(
        tile_ok=0.29, lncc=0.1, ncc_margin=0.2, scale=1 / 1.5, folding_fraction=0.004,
        coverage_fraction=0.5, match_count=7, mirror_probe=1.2, error_median_um=31.0,
    )  # fmt: skip
    options = json.loads(tables.provenance(RegisterOptions())["options"])
    lines, missing = registration.certificate(row, options)
    found = {line["name"]: line for line in lines}
    assert {name: line["state"] for name, line in found.items()} == {
        "tile_ok": "fail",  # below 0.30
        "lncc": "review",  # between 0.08 and 0.15
        "ncc_margin": "pass",
        "mirror_probe": "review",  # between 1 and 1.5
        "log_scale": "fail",  # |log 1/1.5| = 0.405, over 0.25
        "folding_fraction": "pass",
        "coverage_fraction": "review",
        "match_count": "none",
        "error_median_um": "none",
    }
    assert missing == ["match_fraction", "anisotropy"]
    assert (found["tile_ok"]["passes"], found["tile_ok"]["fails"]) == ("≥ 60.0 %", "< 30.0 %")
    assert (found["log_scale"]["passes"], found["log_scale"]["fails"]) == ("≤ 0.25", "> 0.25")
    assert (found["coverage_fraction"]["passes"], found["coverage_fraction"]["fails"]) == (
        "≥ 90.0 %",
        "",
    )
    unknown, _ = registration.certificate(row, {})
    assert {line["state"] for line in unknown} == {"none"}


def test_worst_first() -> None:
    rows = [
        certificate_row(pair=name, verdict=verdict, tile_ok=tile_ok)
        for name, verdict, tile_ok in (
            ("b", "pass", 0.9), ("a", "pass", 0.9), ("c", "pass", 0.7), ("d", "review", 0.95),
            ("e", "fail", 0.4), ("f", "fail", None),
        )
    ]  # fmt: skip
    assert "".join(row["pair"] for row in sorted(rows, key=registration.worst_first)) == "fedcab"


def test_mirrored_slides_that_the_sheet_does_not_know_are_named() -> None:
    found = registration.warnings(
        [certificate_row(pair=f"m{k}", mirrored=True, mirrored_by="probe") for k in range(7)]
        + [
            certificate_row(pair="known", mirrored=True, mirrored_by="sheet"),
            certificate_row(pair="wrong", mirrored=True, mirrored_by="probe", verdict="fail"),
            certificate_row(pair="back", mirrored=False, mirrored_by="probe", verdict="review"),
            certificate_row(pair="plain", mirrored=False),
        ]
    )
    first, second = (item["words"] for item in found)
    assert "7 pairs" in first and "(m0, m1, m2, m3, m4 and 2 more)" in first
    assert "write mirrored: true" in first
    assert second.startswith("1 pair declared mirrored") and "(back)" in second
    assert not any(name in first + second for name in ("known", "wrong", "plain"))
    assert registration.warnings([]) == []


def test_facts_of_a_registration() -> None:
    row = certificate_row(
        engine="deeperhistreg", engine_version="1.0.1", preset="fast", size_px=768, map="rigid",
        attempts=["fast at 768 px: review"], mirrored=True, mirrored_by="probe",
    )  # fmt: skip
    assert registration.facts(row, {"seconds": 84.35, "memory_mb": 1435.9}) == [
        ("engine", "deeperhistreg 1.0.1"),
        ("preset", "fast"),
        ("canvas", "768 px, its shortest side"),
        ("map kept", "rigid"),
        ("mirrored", "yes, found against the sheet"),
        ("job", "1 min 24 s, 1.44 GB of memory at most, as Snakemake measured it"),
    ]
    own = certificate_row(engine="own", map="own", attempts=[], mirrored=False)
    assert registration.facts(own, {}) == [("engine", registration.OWN), ("mirrored", "no")]
    lost = certificate_row(engine="deeperhistreg", map="none", attempts=["x"], match_count=3)
    assert ("matches", "3") in registration.facts(lost, {})


def test_landmark_errors_in_pixels() -> None:
    row = {"error_median_um": 3.0, "error_p90_um": 4.6, "points": 5}
    found = registration.in_pixels(row, 0.5)
    assert (found["error_median_px"], found["error_p90_px"]) == (6.0, pytest.approx(9.2))
    assert found["points"] == 5
    assert registration.in_pixels(row, None)["error_median_px"] is None
    lacking = registration.in_pixels({"error_median_um": None, "error_p90_um": None}, 0.5)
    assert lacking["error_p90_px"] is None


def test_a_filter_that_leans_on_a_score_is_named_and_no_other_score() -> None:
    groups = {
        ("bci", "0"): {"accepted": 90, "low_tissue": 10},
        ("bci", "1+"): {"accepted": 88, "low_tissue": 12},
        ("bci", "3+"): {"accepted": 50, "low_tissue": 10, "blurred_her2": 40},
        ("acrobat", "3+"): {"accepted": 1, "low_tissue": 5},
    }
    found = data.leanings(groups, ["low_tissue", "blurred_her2"])
    assert len(found) == 1
    assert "50 % of its tiles of score 3+" in found[0] and "89 % of its other tiles" in found[0]
    assert "blurred_her2" in found[0]


def two_engines(**columns: list[Any]) -> data.Cohort:
    """Return a cohort of which only what compares the masks of two engines matters."""
    count = len(columns["tile"])
    table: dict[str, Any] = {"accepted": [True] * count, "dataset": ["bci"] * count, **columns}
    return data.Cohort(
        sheet="pairs.tsv",
        preset="hemera",
        pairs=(),
        outcomes=pa.table({}),
        images=pa.table({}),
        funnel=pa.table({}),
        index=pa.table(table),
        metadata={"mask_engines": '["a", "b"]'},
    )


def test_agreement_is_a_mean_over_tiles_that_are_not_empty_to_both_and_names_the_worst() -> None:
    cohort = two_engines(
        tile=["t1", "t2", "t3", "t4", "t5"],
        score=["0", "3+", "3+", "3+", "3+"],
        accepted=[True, True, True, True, False],
        a_agreement_dice=[1.0, 0.9, 0.5, None, 0.0],
        a_agreement_sign=[None, 0.8, 0.3, None, 0.0],
        a_positive_fraction=[0.0, 0.4, 0.2, 0.3, 0.9],
        b_positive_fraction=[0.0, 0.5, 0.6, 0.3, 0.1],
    )
    found = data.agreement(cohort)
    assert found["engines"] == ("a", "b")
    low, high = found["rows"]
    assert (low["score"], low["tiles"], low["empty"], low["dice"]) == ("0", 1, 1, None)
    assert (high["score"], high["tiles"], high["empty"]) == ("3+", 2, 0)
    assert high["dice"] == pytest.approx(0.7)
    assert high["sign"] == pytest.approx(0.55)
    assert high["verdict"] == "doubtful"
    assert (high["suitable"], high["doubtful"], high["unsuitable"]) == (1, 0, 1)
    assert found["all"]["tiles"] == 3
    assert [row["tile"] for row in found["worst"]] == ["t3", "t2", "t1"]
    assert found["worst"][0]["verdict"] == "unsuitable"


def test_one_engine_or_no_comparison_is_no_agreement() -> None:
    cohort = two_engines(
        tile=["t1"],
        score=["0"],
        a_agreement_dice=pa.array([None], pa.float64()),
        a_agreement_sign=pa.array([None], pa.float64()),
    )
    assert data.agreement(cohort) == {}
    assert data.agreement(dataclasses.replace(cohort, metadata={"mask_engines": '["a"]'})) == {}


def test_readings_add_the_cells_of_a_case_before_they_read_it() -> None:
    """By tile: 3+, 0, none, 1+; the first two are one case, whose 6 of 100 are a 0."""
    cohort = two_engines(
        tile=["t1", "t2", "t3", "t4"],
        case=["c1", "c1", "c2", "c3"],
        score=["3+", "3+", "1+", ""],
        **{f"a_{name}": v for name, v in (
            ("cells", [20, 80, 0, 9]), ("weak_cells", [0, 0, 0, 9]),
            ("moderate_cells", [0, 0, 0, 0]), ("strong_cells", [6, 0, 0, 0]),
        )},
        **{f"b_{name}cells": [0, 0, 0, 0] for name in ("", "weak_", "moderate_", "strong_")},
    )  # fmt: skip
    first, second = data.readings(cohort)
    by_case, by_tile = first["tables"]
    assert [(row["score"], row["counts"], row["without"]) for row in by_case["rows"]] == [
        ("1+", [0, 0, 0, 0], 1),
        ("3+", [1, 0, 0, 0], 0),
    ]
    assert by_case["right"] == 0
    assert [row["counts"] for row in by_tile["rows"]] == [[0, 0, 0, 0], [1, 0, 0, 1]]
    assert (by_tile["read"], by_tile["right"], by_tile["near"]) == (2, 0.5, 0.5)
    assert second["tables"][0]["right"] is None, "no cell, no reading"
    # Of the case's cells 6 % are strong: by the guideline of 2018 a 2+.
    by_case = data.readings(cohort, intense_share=0.01)[0]["tables"][0]
    assert [row["counts"] for row in by_case["rows"]] == [[0, 0, 0, 0], [0, 0, 1, 0]]
