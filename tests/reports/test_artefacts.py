"""Artefacts on the page: each outline is where the artefact is, in the colour of its kind."""

import cv2
import numpy as np
import pandas as pd
import pytest

from hemera.dataset.excluded import pack
from hemera.imaging.artefacts import KINDS
from hemera.imaging.codecs import encode
from hemera.reports.artefacts import (
    COLORS,
    REASONS,
    WORDS,
    content,
    marked_tile,
    measures,
    overview,
)
from hemera.reports.data import Cohort

GRAY = np.full((300, 400, 3), 200, np.uint8)


def box(rgb, color):
    """The bounding box of the pixels of a colour: left, top, right, bottom."""
    y, x = np.nonzero((rgb == color).all(axis=2))
    return x.min(), y.min(), x.max() + 1, y.max() + 1


def kinds(name, shape, left, top, right, bottom):
    made = np.zeros(shape, np.uint8)
    made[top:bottom, left:right] = 1 + KINDS.index(name)
    return made


def test_every_kind_has_a_colour_and_every_reason_a_kind():
    assert list(COLORS) == list(WORDS) == list(KINDS)
    assert len(set(COLORS.values())) == len(KINDS)
    assert set(REASONS.values()) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_an_outline_is_around_its_artefact(kind):
    """A tile of 400 x 300 px, its artefacts at a quarter of that, on one stain."""
    stored = pack(None, kinds(kind, (75, 100), 20, 10, 50, 40), (None, None), (300, 400), 0.5)
    row = {"artefacts": stored, "reason": None, "mpp": 0.5}
    drawn = marked_tile(GRAY, row, "her2")
    assert box(drawn, COLORS[kind]) == pytest.approx((80, 40, 200, 160), abs=3)
    # The inside is seen.
    assert (drawn[100, 140] == 200).all()
    assert marked_tile(GRAY, row, "he") is GRAY


def test_blurred_cells_are_outlined_where_they_rejected_a_tile(rng):
    noise = rng.integers(0, 255, (400, 400), np.uint8)
    # Structures of all sizes, as in tissue.
    sharp = sum(cv2.GaussianBlur(noise, (0, 0), s) * s for s in (0.5, 1.0, 2.0, 4.0, 8.0)) / 16
    sharp = np.repeat(sharp.astype(np.uint8)[..., None], 3, axis=2)
    sharp[:, 200:] = cv2.GaussianBlur(sharp, (0, 0), 4)[:, 200:]
    row = {"artefacts": None, "reason": "partly_blurred", "mpp": 0.5}
    assert box(marked_tile(sharp, row, "he"), COLORS["blur"])[0] == pytest.approx(200, abs=4)
    assert marked_tile(sharp, {**row, "reason": "low_tissue"}, "he") is sharp


def test_a_slide_shows_its_outline_and_the_rejected_tiles():
    described = {
        stain: {
            "thumbnail": encode(GRAY, "png", 100), "width_px": 4000,
            "artefacts": encode_kinds(kinds("pen", (150, 200), 100, 20, 140, 60)),
        }
        for stain in ("he", "her2")
    }  # fmt: skip
    tile = {"size_px": 256, "mpp": 0.5, "he_mpp": 0.25, "x_px": 1000, "y_px": 1500}
    tiles = pd.DataFrame([{**tile, "reason": "dust"}, {**tile, "x_px": 0, "reason": "low_tissue"}])
    drawn = overview(described, tiles)
    assert box(drawn["H&E"], COLORS["pen"]) == pytest.approx((200, 40, 280, 120), abs=3)
    assert box(drawn["H&E"], COLORS["dust"]) == pytest.approx((100, 150, 152, 202), abs=2)
    assert box(drawn["HER2"], COLORS["pen"]) == pytest.approx((200, 40, 280, 120), abs=3)
    described["her2"]["thumbnail"] = None
    assert list(overview(described, tiles)) == ["H&E"]


def encode_kinds(image):
    return cv2.imencode(".png", image)[1].tobytes()


def test_counts_by_score_and_slides_in_order():
    pairs = pd.DataFrame(
        [
            ("a", "d", "0", False),
            ("b", "d", "3+", False),
            ("c", "d", "3+", False),
            ("e", "d", "0", True),
        ],
        columns=["pair", "dataset", "score", "in_block"],
    )
    outcomes = pairs[["pair"]].assign(tiles_tissue=[10, 8, 6, 4], tiles_artefact=[1, 0, 5, 0])
    tiles = [
        ("d", "0", "pen"),
        ("d", "0", "pen"),
        ("d", "3+", "dust"),
        ("d", "3+", None),
        ("d", "3+", "low_tissue"),
    ]
    images = [
        ("a", "he", 0.2),
        ("a", "her2", 0.1),
        ("b", "he", 0.0),
        ("b", "her2", 0.5),
        ("c", "he", 0.0),
        ("c", "her2", None),
        ("e", "he", 0.9),
        ("e", "her2", 0.9),
    ]
    cohort = Cohort(
        sheet="", preset="", metadata={}, pairs=pairs, outcomes=outcomes,
        images=pd.DataFrame(images, columns=["pair", "stain", "artefact_fraction"]),
        tiles=pd.DataFrame(tiles, columns=["dataset", "score", "reason"]),
    )  # fmt: skip
    found = content(cohort)
    assert found["table"].reset_index().to_numpy().tolist() == [
        ["d", "0", 14, 1, 2, 0], ["d", "3+", 14, 5, 0, 1]
    ]  # fmt: skip
    assert found["reasons"] == ["pen", "dust"]
    # Image pairs have no overview.
    assert found["slides"] == [("b", 0.0, 0.5), ("a", 0.2, 0.1)]


def test_the_measure_that_rejected_a_tile_is_marked():
    row = {f"{stain}_{kind}_fraction": 0.0 for stain in ("he", "her2") for kind in KINDS}
    row |= {"he_dust_fraction": 0.02, "her2_pen_fraction": 0.3, "reason": "pen"}
    limits = dict.fromkeys(("pen_max", "dust_max"), 0.05)
    assert measures(row, limits) == [("pen on HER2", 0.3, True), ("dust on H&E", 0.02, False)]
