"""The parts of the pages: numbers, charts, pictures, the certificate, and evaluate's page."""

import base64
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest

from hemera import tables
from hemera.config import (
    EvaluateOptions,
    RegisterOptions,
    TrainGenerationOptions,
    TrainSegmentationOptions,
)
from hemera.masks import label_format
from hemera.registration.displacement import Displacement, none
from hemera.registration.local_quality import LocalQuality
from hemera.reports import Example, charts, data, evaluation_page, pictures, registration
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


# --- evaluate's page -----------------------------------------------------------------------------


def metric_rows(better: bool = True) -> list[dict[str, Any]]:
    rows = []

    def add(network: str, method: str, group: str, metric: str, agg: str, value: float) -> None:
        deviation = 0.05 if agg.startswith("mean") else None
        rows.append(
            {"network": network, "method": method, "group": group, "metric": metric,
             "aggregation": agg, "value": value, "deviation": deviation, "tiles": 6,
             "low": value - 0.25, "high": value + 0.75}
        )  # fmt: skip

    level = 0.0 if better else -8.0
    for group in ("all", "dataset=bci", "score=3+", "score=", "case=bci_0", "case=bci_1"):
        for method, psnr in (("model", 19.5 + level), ("mean_colour", 16.25), ("blurred", 15.0)):
            add("generation", method, group, "psnr_db", "mean", psnr)
            add("generation", method, group, "ssim", "mean", psnr / 50)
            add("generation", method, group, "ssim_gaussian", "mean", psnr / 45)
        constants = {"all_positive": 0.4, "all_negative": 0.0, "best_constant": 0.4}
        for method, f1 in {"model": 0.7 + level / 20, **constants}.items():
            for metric in ("precision", "recall", "f1", "iou"):
                for aggregation in ("pooled", "mean", "mean_nonempty"):
                    add("segmentation", method, group, metric, aggregation, f1)
    return rows


def tile_rows() -> list[dict[str, Any]]:
    rows = []
    for k in range(6):
        base = dict.fromkeys(tables.EVALUATION_TILES.names)
        base |= {"tile": f"bci_{k}_000000_000000", "case": f"bci_{k % 2}", "dataset": "bci",
                 "score": "3+", "method": "model"}  # fmt: skip
        rows.append(base | {"network": "generation", "psnr_db": 18.0 + k, "ssim": 0.3 + 0.02 * k})
        counts = {"true_positive_px": 100 * k, "false_positive_px": 50, "false_negative_px": 60,
                  "true_negative_px": 4000}  # fmt: skip
        rows.append(base | {"network": "segmentation", **counts})
    return rows


def history(names: tuple[str, ...], epochs: int = 8) -> pa.Table:
    rows = [
        {"epoch": k, "part": part, "quantity": name, "value": 3 / k + (0.2 if part == "val" else 0)}
        for k in range(1, epochs + 1)
        for name in names
        for part in ("train", "val")
    ]
    return pa.Table.from_pylist(rows, schema=tables.HISTORY)


def write_evaluation(path: Path, **changed: Any) -> None:
    he, her2 = tissue(3, 128, 128, (110, 60, 150)), tissue(3, 128, 128, (125, 85, 55))
    truth = her2.min(axis=2) < 120
    examples = [
        Example(
            tile=f"bci_{k}_000000_000000",
            case=f"bci_{k % 2}",
            dataset="bci",
            score="3+",
            label=("best F1", "median F1", "worst F1")[k],
            he=he,
            her2=her2,
            generated=cv2.GaussianBlur(her2, (0, 0), 2),
            truth=truth,
            probability=cv2.GaussianBlur(truth.astype(np.float32), (0, 0), 3),
            values={"psnr_db": 18.2, "ssim": 0.41, "f1": 0.66},
        )
        for k in range(3)
    ]
    described = {
        "network": "generation",
        "parameters": 123456,
        "parameters_trained": 123000,
        "epoch": 6,
        "best_epoch": 6,
        "mask_engine": "stain",
        "tiles": {"train": 60, "val": 12},
        "model": {"generator": "unet_256"},
        "versions": {"torch": "2.13.0"},
        "index_fingerprint": "ab" * 32,
    }
    options = json.loads(tables.provenance(TrainGenerationOptions())["options"])
    more = json.loads(tables.provenance(TrainSegmentationOptions(epochs=3))["options"])
    given: dict[str, Any] = {
        "preset": "demo",
        "metrics": pa.Table.from_pylist(metric_rows(), schema=tables.METRICS),
        "tiles": pa.Table.from_pylist(tile_rows(), schema=tables.EVALUATION_TILES),
        "histories": {
            "generation": history(("generator", "discriminator", "psnr_db", "learning_rate")),
            "segmentation": history(("loss", "f1")),
        },
        "metadata": {
            "generation": described | {"options": options},
            "segmentation": described | {"options": more, "network": "segmentation"},
        },
        "index_metadata": {"fingerprint": "ab" * 32, "mask_target": "stain", "licences": "[]"},
        "examples": examples,
        "options": EvaluateOptions(),
        "report": "../report/report.html",
    }
    evaluation_page(path, **{**given, **changed})


def test_evaluation_page_has_it_all(tmp_path: Path) -> None:
    path = tmp_path / "evaluate" / "evaluate.html"
    write_evaluation(path)
    page = check_page(path)
    text = path.read_text()
    assert page.addresses.count("../report/report.html") == 2
    assert "Demo sizes." in text and "Not comparable with anything on this page" in text
    assert len(page.images) == 15
    assert "19.50 ± 0.05" in text and "16.25" in text and ".355" in text and ".513" in text
    assert "mean_nonempty" in text
    assert page.tags.count("svg") == 4 + 2 + 3
    assert "does not beat" not in text
    assert "worst F1" in text


def test_evaluation_page_shows_intervals_and_of_how_many_tiles_a_distance_is(
    tmp_path: Path,
) -> None:
    rows = metric_rows() + [
        {"network": "generation", "method": "model", "group": "all", "metric": metric,
         "aggregation": aggregation, "value": value, "deviation": deviation, "tiles": tiles,
         "low": low, "high": high}
        for metric, aggregation, value, deviation, tiles, low, high in (
            ("lpips", "mean", 0.3125, 0.0625, 6, 0.25, 0.375),
            ("fid", "set", 123.456, None, 1234, None, None),
            ("kid", "set", -0.00125, 0.0002, 1234, None, None),
        )
    ]  # fmt: skip
    path = tmp_path / "evaluate.html"
    write_evaluation(path, metrics=pa.Table.from_pylist(rows, schema=tables.METRICS))
    text = check_page(path) and path.read_text()
    assert '0.312 ± 0.062<br><small class="quiet">0.250 to 0.375</small>' in text
    assert '123.46<br><small class="quiet">N 1\u202f234</small>' in text
    assert "−0.0013 ± 0.0002" in text
    assert "95 % interval 19.25 to 20.25" in text, "in the headline"
    assert "from drawing the 2 cases again 1\u202f000 times" in text


@pytest.mark.parametrize(
    ("options", "case", "said"),
    [
        ({"bootstrap_samples": 0}, None, "No intervals: evaluate.bootstrap_samples is 0."),
        ({}, "one", "No intervals: they come from drawing cases again, and all test tiles are of "),
        ({"confidence": 0.9}, None, "stands its 90 % interval"),
        ({}, None, "evaluate.fid_weights names no file"),
        ({"fid_weights": "a"}, None, "FID and KID by 2,048 features"),
        ({"lpips_weights": "a"}, None, "LPIPS by AlexNet"),
    ],
)
def test_evaluation_page_says_how_it_judges(
    tmp_path: Path, options: dict[str, Any], case: str | None, said: str
) -> None:
    path = tmp_path / "evaluate.html"
    rows = [row if case is None else row | {"case": case} for row in tile_rows()]
    write_evaluation(
        path,
        options=EvaluateOptions(**options),
        tiles=pa.Table.from_pylist(rows, schema=tables.EVALUATION_TILES),
    )
    check_page(path)
    assert said in path.read_text()


def test_evaluation_page_is_the_same_again(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_evaluation(tmp_path / f"{name}.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_evaluation_page_says_when_a_baseline_is_better(tmp_path: Path) -> None:
    path = tmp_path / "evaluate.html"
    metrics = pa.Table.from_pylist(metric_rows(better=False), schema=tables.METRICS)
    write_evaluation(path, metrics=metrics, preset="hemera")
    text = path.read_text()
    assert "GenerationNet does not beat a trivial answer by PSNR, dB: 11.50 against 16.25" in text
    assert "SegmentationNet does not beat a trivial answer by F1" in text
    assert "Demo sizes." not in text


def test_evaluation_page_without_anything(tmp_path: Path) -> None:
    path = tmp_path / "evaluate.html"
    write_evaluation(
        path,
        metrics=tables.METRICS.empty_table(),
        tiles=tables.EVALUATION_TILES.empty_table(),
        histories={name: tables.HISTORY.empty_table() for name in ("generation", "segmentation")},
        metadata={},
        index_metadata={},
        examples=[],
    )
    check_page(path)
    assert "SegmentationNet was tested on no tile" in path.read_text()


def test_evaluation_page_escapes_names(tmp_path: Path) -> None:
    hostile = '"><script>alert(1)</script>'
    path = tmp_path / "evaluate.html"
    rows = [row | {"case": hostile, "tile": hostile} for row in tile_rows()]
    more = [
        row | {"group": f"case={hostile}"} for row in metric_rows() if row["group"] == "case=bci_0"
    ]
    image = tissue(3, 64, 64, (110, 60, 150))
    example = Example(hostile, hostile, hostile, hostile, hostile, image, image)
    write_evaluation(
        path,
        tiles=pa.Table.from_pylist(rows, schema=tables.EVALUATION_TILES),
        metrics=pa.Table.from_pylist(metric_rows() + more, schema=tables.METRICS),
        histories={"generation": history((hostile,)), "segmentation": history(("loss",))},
        examples=[example],
        index_metadata={"licences": json.dumps([hostile]), "mask_target": hostile},
    )
    check_page(path)
    assert "<script" not in path.read_text()


def test_evaluation_page_stays_below_its_size(tmp_path: Path) -> None:
    """200 tiles of noise are more than a page may hold: some are left out, and it says so."""
    rng = np.random.default_rng(7)
    noise = rng.integers(0, 255, (448, 448, 3), np.uint8)
    example = Example("t", "c", "bci", "0", "", noise, noise, noise, noise[..., 0] > 9)
    path = tmp_path / "evaluate.html"
    write_evaluation(path, examples=[example] * 200)
    assert 20_000_000 < path.stat().st_size < 30_000_000
    assert "of 200 tiles are shown" in path.read_text()
    first = re.search(r"data:image/jpeg;base64,([^\"]+)", path.read_text())
    assert first is not None
    shown = cv2.imdecode(np.frombuffer(base64.b64decode(first.group(1)), np.uint8), 1)
    assert shown.shape == (448, 448, 3)


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
