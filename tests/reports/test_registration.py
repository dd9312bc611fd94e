"""Registrations on the page: overlays, local quality, certificate, warnings."""

import json
import re
from html import unescape
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hemera import tables
from hemera.config import RegisterOptions
from hemera.registration.displacement import Displacement, none
from hemera.registration.local_quality import LocalQuality
from hemera.reports import html, pictures, registration
from tests.small_registration import plain_errors
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
        np.stack([x, y], axis=-1),
        ncc,
        best,
        np.stack([0 * x, residual], axis=-1),
        0 * x,
        100.0,
        50.0,
    )


def test_squares_lie_where_they_were_measured_in_the_class_of_their_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a slide of 2000 x 1000 um drawn at 400 x 300 px, so that a swapped axis shows."""
    plain_errors(monkeypatch)
    local = quality_of(
        [(500.0, 100.0, 0.5, 0.2, -9.9), (1000.0, 900.0, 0.1, 0.4, 120.0),
         (1500.0, 900.0, 0.3, 0.3, 9.0)]
    )  # fmt: skip
    found = registration.local_squares(local, (2000.0, 1000.0), (400, 300))
    # 0.2 px/um along x and 0.3 along y; a square is drawn at 0.72 of 50 um: 7.2 x 10.8 px.
    expected = [[96.4, 24.6, 7.2, 10.8], [196.4, 264.6, 7.2, 10.8], [296.4, 264.6, 7.2, 10.8]]
    assert found[["x", "y", "width", "height"]].to_numpy() == pytest.approx(np.array(expected))
    assert found["error_um"].tolist() == pytest.approx([9.9, 120, 9])
    names = [registration.ERROR_CLASSES[kind][0] for kind in found["kind"]]
    assert names == ["up to 10 µm", "100 to 200", "up to 10 µm"]
    # As good elsewhere as in place counts as worse.
    assert found["worse"].tolist() == [False, True, True]
    # Two squares are no region.
    assert not found["misaligned"].any()


def test_misaligned_regions_are_filled_and_counted() -> None:
    """Of 8 x 6 squares the left three columns match better elsewhere."""
    local = quality_of(
        [
            (50.0 * column, 50.0 * row, 0.5, 0.8 if column < 3 else 0.2, 3.0)
            for row in range(6)
            for column in range(8)
        ]
    )
    found = registration.local_squares(local, (400.0, 300.0), (400, 300))
    filled = found["misaligned"].to_numpy().reshape(6, 8)
    assert filled[:, :3].all() and not filled[:, 5:].any()
    item = {
        "row": {"pair": "p1"}, "squares": found, "size_px": (400, 300),
        "pictures": {"ground": "data:,"}, "classes": registration.ERROR_CLASSES,
    }  # fmt: skip
    template: Any = html._environment().get_template("registration.html").module
    made = unescape(str(template.local_quality(item)))
    assert made.count('class="misaligned"') == 1
    assert f"{100 * filled.mean():.0f} % are in misaligned regions" in made


def test_no_square_is_no_picture_of_squares() -> None:
    empty = LocalQuality.from_columns({name: [] for name in tables.QUALITY.names})
    squares = registration.local_squares(empty, (2000.0, 1000.0), (400, 300))
    images = {"he": tissue(1, 60, 90, (90, 60, 120))}
    album = pictures.Album(10**6)
    card = registration.card(certificate_row(options={}), images, squares, None, album)
    assert card is not None
    assert card["squares"] is None and "ground" not in card["pictures"]
    assert (
        registration.card(certificate_row(options={}), images, squares, None, pictures.Album(10))
        is None
    )


def test_tiles_are_where_the_index_has_them() -> None:
    """A slide of 2000 x 1000 um at 0.25 um/px, in a picture of 400 x 200 px: 5 um per pixel."""
    index = pd.DataFrame(
        {"x_px": [0, 4000], "y_px": [0, 2000], "size_px": [512, 256], "mpp": [0.5, 1.0],
         "he_mpp": [0.25, 0.25], "accepted": [True, False], "reason": ["", "he_blur"]}
    )  # fmt: skip
    found = registration.tile_squares(index, (2000.0, 1000.0), (400, 200))
    assert found[["x", "y"]].to_numpy().tolist() == [[0, 0], [200, 100]]
    assert found[["width", "height"]].to_numpy() == pytest.approx(256 / 5)
    assert found["reason"].tolist() == ["accepted", "he_blur"]
    item = {
        "row": {"pair": "p1"}, "tiles": found, "size_px": (400, 200),
        "colors": {"accepted": "#00f", "he_blur": "#f00", "tissue": "#0f0"},
    }  # fmt: skip
    template: Any = html._environment().get_template("registration.html").module
    made = unescape(str(template.tile_map(item)))
    assert 'd="M0.0 0.0h51.2v51.2h-51.2z" fill="#00f"' in made
    assert 'd="M200.0 100.0h51.2v51.2h-51.2z" fill="#f00"' in made
    assert "#0f0" not in made and made.count("1 tile") == 2


def certificate_row(**values: Any) -> dict[str, Any]:
    return {**dict.fromkeys(tables.CERTIFICATE.names), "pair": "a", "verdict": "pass", **values}


def test_the_certificate_shows_values_limits_and_grades() -> None:
    row = certificate_row(tile_ok=0.29, scale=1 / 1.5, match_count=7, mirror_probe=1.2)
    limits = json.loads(tables.provenance(RegisterOptions())["options"])
    item = {"signals": registration.signals(row, limits)}
    template: Any = html._environment().get_template("registration.html").module
    made = str(template.certificate(item))
    found = {
        name: [unescape(re.sub("<[^>]+>", "", cell)) for cell in re.findall("<td.*?</td>", line)]
        for name, line in re.findall("<tr><td><code>(.*?)</code>.*?</td>(.*?)</tr>", made)
    }
    assert found["tile_ok"] == ["29.0 %", "fail", "≥ 60.0 %", "< 30.0 %"]
    assert found["match_count"] == ["7", "", "", ""]
    assert found["mirror_probe"] == ["1.2", "review", "≥ 1.5", "< 1"]
    assert found["log_scale"] == ["0.405", "fail", "≤ 0.25", "> 0.25"]
    assert "lncc, ncc_margin, match_fraction, keypoint_fraction, coverage_fraction," in made


def test_mirrored_slides_that_the_sheet_does_not_know_are_named() -> None:
    probe = {"mirrored_by": "probe"}
    found = registration.mirrored(
        [
            certificate_row(pair="m", mirrored=True, **probe),
            certificate_row(pair="known", mirrored=True, mirrored_by="sheet"),
            certificate_row(pair="wrong", mirrored=True, verdict="fail", **probe),
            certificate_row(pair="back", mirrored=False, verdict="review", **probe),
            certificate_row(pair="plain", mirrored=False),
        ]
    )
    assert found == {True: ["m"], False: ["back"]}
