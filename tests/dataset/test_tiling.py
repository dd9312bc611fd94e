"""Tiles: the pixels of both stains, their places and what is measured in them."""

import json
import tarfile

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from hemera import tables
from hemera.registration.displacement import Displacement, mirrored
from hemera.registration.displacement_files import write_displacement
from tests.small_geojson import geometry
from tests.small_units import (
    HE_MPP,
    HER2_COLOURS,
    HER2_MPP,
    HER2_SIZE,
    Unit,
    field_at,
    registered,
    tissue,
    truth,
    whole_slides,
)


def cut(image, row):
    """The place of a tile in an image of the same resolution."""
    return image[row["y_px"] : row["y_px"] + 128, row["x_px"] : row["x_px"] + 128]


def test_registered_pairs_are_cut_not_resampled(unit, images_of_pair):
    _, he, her2 = images_of_pair
    rows = unit.tile()
    assert [(row["x_px"], row["y_px"]) for row in rows] == [
        (x, y) for y in (0, 128) for x in (0, 128, 256)
    ]
    assert rows[1]["tile"] == "p1_000128_000000"
    for row in rows:
        assert (unit.pixels(row, "he") == cut(he, row)).all()
        assert (unit.pixels(row, "her2") == cut(her2, row)).all()
        assert (row["her2_x_px"], row["her2_y_px"]) == (row["x_px"], row["y_px"])
        assert (row["size_px"], row["mpp"], row["he_mpp"], row["her2_mpp"]) == (128, 0.5, 0.5, 0.5)
        assert row["her2_coverage_fraction"] == 1
        assert row["shard"] == "tile/bci.000.tar"
        gray = cv2.cvtColor(cut(he, row), cv2.COLOR_RGB2GRAY)
        assert row["he_sharpness"] == pytest.approx(cv2.Laplacian(gray, cv2.CV_64F).var())
        assert row["tissue_fraction"] > 0.95
    assert unit.state == {
        "pair": "p1", "state": "tiled", "reason": None, "registration": "registered",
        "tiles_grid": 6, "tiles_tissue": 6, "tiles_artefact": 0, "tiles_unreadable": 0,
        "tiles_written": 6,
    }  # fmt: skip
    with tarfile.open(unit.shard) as archive:
        assert archive.getnames()[:2] == [
            "p1_000000_000000.he.png", "p1_000000_000000.her2.png",
        ]  # fmt: skip


def test_tiles_of_a_registered_pair_have_evidence_of_alignment(rng, tmp_path):
    """The same nuclei in two colours match in place; those of another section do not."""
    names = {"same": 1, "other": 2}
    for name, seed in names.items():
        for stain, color in (("he", (0.2, 0.9, 0.2)), ("her2", (0.3, 0.6, 0.8))):
            own = np.random.default_rng(1 if stain == "he" else seed)
            noise = own.integers(0, 256, (256, 384), dtype=np.uint8).astype(np.float32)
            dark = cv2.GaussianBlur(noise, (0, 0), 5) > np.median(noise)
            rgb = np.rint(245 * 10 ** -(np.where(dark, 0.5, 0.1)[..., None] * color))
            Image.fromarray(rgb.astype(np.uint8)).save(tmp_path / f"{name}.{stain}.png")
    rows = Unit(tmp_path, [registered(name) for name in names]).tile()
    margins = {name: [r["alignment_margin"] for r in rows if r["pair"] == name] for name in names}
    assert {name: len(found) for name, found in margins.items()} == {"same": 6, "other": 6}
    assert min(margins["same"]) > 0.3
    assert np.median(margins["other"]) < 0


def test_mirrored_pairs(images_of_pair):
    folder, _, her2 = images_of_pair
    Image.fromarray(her2[:, ::-1]).save(folder / "p1.her2.png")
    unit = Unit(folder, [registered("p1", mirrored="true")])
    for row in unit.tile():
        assert (unit.pixels(row, "her2") == cut(her2, row)).all()
        assert row["her2_x_px"] == 420 - row["x_px"]
        assert row["her2_coverage_fraction"] == 1


def test_registered_images_of_unequal_mpp_meet_in_micrometres(images_of_pair, rng):
    folder, _, _ = images_of_pair
    fine = tissue(rng, 600, 840, HER2_COLOURS)
    Image.fromarray(fine).save(folder / "p1.her2.png")
    unit = Unit(folder, [registered("p1", her2_mpp=0.25)])
    expected = np.rint(fine.reshape(300, 2, 420, 2, 3).mean(axis=(1, 3)))
    for row in unit.tile():
        assert (row["her2_x_px"], row["her2_y_px"]) == (2 * row["x_px"], 2 * row["y_px"])
        assert np.abs(unit.pixels(row, "her2") - cut(expected, row)).max() <= 1


def test_a_chosen_mpp_gives_tiles_of_that_mpp(unit, images_of_pair):
    _, he, _ = images_of_pair
    rows = unit.tile(mpp=1.0)
    assert [(row["x_px"], row["y_px"]) for row in rows] == [(0, 0)]
    assert rows[0]["mpp"] == 1.0
    halved = np.rint(he[:256, :256].reshape(128, 2, 128, 2, 3).mean(axis=(1, 3)))
    assert np.abs(unit.pixels(rows[0], "he") - halved).max() <= 1
    rows = unit.tile(mpp=0.7, stride_px=64)
    assert {row["x_px"] for row in rows} == {0, 90, 179}  # 64 x 1.4 = 89.6, rounded once


def test_tiles_without_tissue_are_not_written(rng, tmp_path):
    y, x = np.mgrid[:400, :700]
    he = np.repeat((240 + (x + y) % 3)[..., None], 3, axis=2).astype(np.uint8)
    he[:, :300] = tissue(rng, 400, 300)
    Image.fromarray(he).save(tmp_path / "p1.he.png")
    Image.fromarray(tissue(rng, 400, 700, HER2_COLOURS)).save(tmp_path / "p1.her2.png")
    unit = Unit(tmp_path, [registered("p1")])
    rows = unit.tile(tissue_floor=0.5)
    assert {row["x_px"] for row in rows} == {0, 128}
    assert (unit.state["tiles_grid"], unit.state["tiles_tissue"]) == (15, 6)
    rows = unit.tile(tissue_floor=0.05)
    assert {row["x_px"] for row in rows} == {0, 128, 256}
    part = [row["tissue_fraction"] for row in rows if row["x_px"] == 256]
    assert part == pytest.approx([44 / 128] * 3, abs=0.03)


def test_stored_tiles_are_copied_where_they_are_tiles(rng, tmp_path):
    for name in ("he", "her2"):
        tifffile.imwrite(
            tmp_path / f"{name}.tif", tissue(rng, 300, 420), tile=(128, 128), photometric="rgb",
            compression="jpeg", compressionargs={"level": 80}, resolution=(2e4, 2e4),
            resolutionunit="CENTIMETER",
        )  # fmt: skip
    row = {"pair": "case1", "dataset": "acrobat", "he": "he.tif", "her2": "her2.tif"}
    unit = Unit(tmp_path, [{**row, "he_mpp": "", "her2_mpp": "", "registered": "true"}], "case1")
    copied = unit.tile(codec="jpeg")
    pixels = [unit.pixels(row, stain) for row in copied for stain in ("he", "her2")]
    assert len(copied) == 6
    plain = unit.tile(codec="png")
    for number, row in enumerate(plain):
        for k, stain in enumerate(("he", "her2")):
            # To the bit what the slide holds: nothing was encoded a second time.
            np.testing.assert_array_equal(pixels[2 * number + k], unit.pixels(row, stain))
    again = unit.tile(codec="jpeg", copy_stored=False)
    assert sum(row["he_length"] for row in again) > 1.2 * sum(row["he_length"] for row in copied)
    location = ("offset", "length", "sha256")
    measured = [name for name in tables.TILE.names if not name.endswith(location)]
    assert [[row[name] for name in measured] for row in copied] == [
        [row[name] for name in measured] for row in plain
    ]


def test_artefacts_of_a_file_replace_those_that_are_detected(images_of_pair):
    """Three columns of two tiles; the file covers the first and a quarter of the second."""
    folder, _, _ = images_of_pair
    mask = folder / "mask.png"
    classes = np.ones((75, 105), np.uint8)
    classes[:, :40] = 4
    Image.fromarray(classes).save(mask)
    for stain, mirror in (("he", ""), ("her2", ""), ("her2", "true")):
        changes = {f"{stain}_artefacts": mask.name, "mirrored": mirror}
        rows = Unit(folder, [registered("p1", **changes)]).tile(artefact_max=1)
        assert len(rows) == 6
        for row in rows:
            left, right = row["x_px"], row["x_px"] + 128
            if mirror:
                left, right = 420 - right, 420 - left
            pen = np.clip(160 - left, 0, 128) / 128
            # The overview has pixels of 8 um, a tile is 64 um wide.
            assert row[f"{stain}_pen_fraction"] == pytest.approx(pen, abs=0.07)
            others = {"he", "her2"} - {stain}
            assert [row[f"{other}_pen_fraction"] for other in others] == [0]
            assert (row["artefacts"] is None) == (pen == 0)
    unit = Unit(folder, [registered("p1", he_artefacts=mask.name)])
    assert {row["x_px"] for row in unit.tile()} == {128, 256}
    assert unit.state["tiles_artefact"] == 2
    assert {row["x_px"] for row in unit.tile(artefact_max=0.2)} == {256}


def test_tiles_under_artefacts_of_the_her2_slide_are_not_read(slides):
    """An oblique half of HER2 is pen: which tiles it covers depends on the displacement."""
    column, row = np.meshgrid(np.arange(110) + 0.5, np.arange(80) + 0.5)
    width, height = (side * HER2_MPP for side in HER2_SIZE)
    classes = np.where(column / 110 * width + 0.4 * row / 80 * height < 200, 4, 1)
    Image.fromarray(classes.astype(np.uint8)).save(slides / "pen.png")
    pixels = np.stack(np.meshgrid(np.arange(128) + 0.5, np.arange(128) + 0.5), axis=-1)

    def covered(row, field):
        x, y = np.moveaxis(field((pixels + np.array([row["x_px"], row["y_px"]])) * HE_MPP), -1, 0)
        on_her2 = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        return ((x + 0.4 * y < 200) & on_her2).mean()

    unit = whole_slides(slides, her2_artefacts="pen.png")
    everything = unit.tile(artefact_max=1)
    assert len(everything) == 15
    assert unit.state["tiles_artefact"] == 0
    kept = {row["tile"] for row in unit.tile()}
    assert unit.state["tiles_artefact"] == 15 - len(kept)
    fractions = {row["tile"]: covered(row, field_at) for row in everything}
    assert {name for name, part in fractions.items() if part < 0.45} <= kept
    assert kept <= {name for name, part in fractions.items() if part < 0.55}
    in_place = {row["tile"] for row in everything if covered(row, lambda points: points) < 0.5}
    assert in_place - kept or kept - in_place


def test_her2_is_resampled_through_the_displacement(slides):
    unit = whole_slides(slides)
    rows = unit.tile()
    assert len(rows) == 15
    assert unit.state["registration"] == "pass"
    errors = []
    for row in rows:
        x, y = np.meshgrid(np.arange(128) + 0.5, np.arange(128) + 0.5)
        fixed = np.stack([x + row["x_px"], y + row["y_px"]], axis=-1) * HE_MPP
        moving = field_at(fixed)
        inside = (
            (moving[..., 0] > 2) & (moving[..., 0] < HER2_SIZE[0] * HER2_MPP - 2)
            & (moving[..., 1] > 2) & (moving[..., 1] < HER2_SIZE[1] * HER2_MPP - 2)
        )  # fmt: skip
        got = unit.pixels(row, "her2").astype(float)
        errors.append((got - truth(moving[..., 0], moving[..., 1]))[inside])
        corner = field_at(np.array([row["x_px"], row["y_px"]]) * HE_MPP) / HER2_MPP
        assert (row["her2_x_px"], row["her2_y_px"]) == pytest.approx(tuple(corner), abs=0.1)
    assert np.abs(np.concatenate(errors)).mean() < 0.5


def test_artefacts_of_a_file_follow_the_displacement(slides):
    """A disc on HER2, drawn in level-0 pixels, is where its corresponding points are."""
    angles = np.linspace(0, 2 * np.pi, 49)
    centre, radius = np.array([430, 300]), 160
    ring = (centre + radius * np.stack([np.cos(angles), np.sin(angles)], -1)).tolist()
    (slides / "marks.geojson").write_text(json.dumps(geometry("Polygon", [ring])))
    rows = whole_slides(slides, her2_artefacts="marks.geojson").tile(artefact_max=1)
    assert len(rows) == 15
    for row in rows:
        x, y = np.meshgrid(np.arange(128) + 0.5, np.arange(128) + 0.5)
        fixed = np.stack([x + row["x_px"], y + row["y_px"]], axis=-1) * HE_MPP
        inside = np.linalg.norm(field_at(fixed) / HER2_MPP - centre, axis=-1) < radius
        assert row["her2_other_fraction"] == pytest.approx(inside.mean(), abs=0.05)
        assert row["he_other_fraction"] == row["her2_pen_fraction"] == 0
    assert max(row["her2_other_fraction"] for row in rows) > 0.6


def test_a_fold_is_found_in_its_tile(slides):
    vectors = np.zeros((63, 88, 2), np.float32)
    # To the right of x = 40 um on, within 24 um, points run backwards.
    vectors[5:12, 10:16, 0] = -np.arange(6) * 8
    d = Displacement(vectors, 4.0)
    # A mirror that the sheet does not declare does not fold: the registration may have found it.
    for field in (d, mirrored(d, HER2_SIZE[0] * HER2_MPP)):
        write_displacement(slides / "d.npz", field)
        rows = whole_slides(slides).tile()
        folded = {(row["x_px"], row["y_px"]) for row in rows if row["folding_fraction"] > 0}
        assert folded == {(0, 0)}
