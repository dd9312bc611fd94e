"""Registrations on the page: overlays, local quality, certificate, warnings."""

import json
import re
from typing import Any

import numpy as np
import pytest

from hemera import tables
from hemera.config import RegisterOptions
from hemera.registration.displacement import Displacement, none
from hemera.registration.local_quality import LocalQuality
from hemera.reports import pictures, registration
from tests.small_results import tissue


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
        "< 0.0 %",
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


def test_landmark_errors_in_pixels() -> None:
    row = {"error_median_um": 3.0, "error_p90_um": 4.6, "points": 5}
    found = registration.in_pixels(row, 0.5)
    assert (found["error_median_px"], found["error_p90_px"]) == (6.0, pytest.approx(9.2))
    assert found["points"] == 5
    assert registration.in_pixels(row, None)["error_median_px"] is None
    lacking = registration.in_pixels({"error_median_um": None, "error_p90_um": None}, 0.5)
    assert lacking["error_p90_px"] is None
