"""hemera warp: two slides of unequal size and resolution under a map that is a formula."""

import csv
import json
import logging
import math

import cv2
import numpy as np
import openslide
import pytest
import tifffile
import tiffslide
from scipy import ndimage

from hemera.__main__ import main
from hemera.imaging.slide import open_slide
from hemera.registration import displacement
from hemera.registration.displacement import Displacement, none
from hemera.registration.displacement_files import write_displacement
from tests.small_displacements import field_of, to_he, to_her2
from tests.small_geojson import feature, geometry, rectangle, stray
from tests.small_sheets import write_certificate, write_sheet
from tests.small_slides import damage_tile, write_pyramid

HE_MPP, HER2_MPP = 0.5, 0.44
HE_SIZE, HER2_SIZE = (1030, 515), (1290, 670)
BACKGROUND = (236, 241, 243)


MARKS_UM = np.array([[x, y] for x in range(45, 480, 62) for y in range(38, 230, 41)], float)
"""Blobs of HER2, by where they belong on H&E."""


def blobs(size, mpp, centres_um, sigma_um=3.0):
    """A slide of glass with round dark blobs."""
    x, y = ((np.arange(side) + 0.5) * mpp for side in size)
    depth = np.zeros((size[1], size[0]))
    for centre in centres_um:
        depth += np.exp(-((y - centre[1]) ** 2) / (2 * sigma_um**2))[:, None] * np.exp(
            -((x - centre[0]) ** 2) / (2 * sigma_um**2)
        )
    return np.rint(np.array(BACKGROUND) - depth[..., None] * (60, 110, 150)).astype(np.uint8)


class Cohort:
    """A cohort of one pair in a folder."""

    def __init__(self, folder, **row):
        self.folder = folder
        self.config = folder / "config.yaml"
        self.sheet = folder / "pairs.tsv"
        self.config.write_text(f"preset: hemera\nsheet: {self.sheet}\n")
        self.write_sheet(**row)

    def write_sheet(self, **row):
        images = {"he": "he.tif", "her2": "her2.tif"}
        write_sheet(self.folder, [row], pair="p1", case="c1", dataset="acrobat", **images)

    def register(self, field, verdict="pass", reason=None, engine="test"):
        folder = self.folder / "results" / "register"
        write_displacement(folder / "p1.displacement.npz", field)
        write_certificate(folder / "p1.parquet", "p1", verdict, reason, engine)

    def run(self, kind, *words, pair="p1"):
        return main(
            [
                "warp",
                kind,
                *map(str, words),
                *("--pair", pair),
                *("--configfile", str(self.config)),
                *("--results", str(self.folder / "results")),
            ]
        )


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """H&E is blank, because nobody looks at it."""
    folder = tmp_path_factory.mktemp("slides")
    he = np.full((HE_SIZE[1], HE_SIZE[0], 3), 240, np.uint8)
    write_pyramid(folder / "he.tif", [he], (HE_MPP, HE_MPP))
    her2 = blobs(HER2_SIZE, HER2_MPP, to_her2(MARKS_UM))
    write_pyramid(folder / "her2.tif", [her2], (HER2_MPP, HER2_MPP))
    return folder


@pytest.fixture
def cohort(slides, tmp_path):
    for name in ("he.tif", "her2.tif"):
        (tmp_path / name).symlink_to(slides / name)
    made = Cohort(tmp_path)
    made.register(field_of(to_her2))
    return made


def said(caplog, level):
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def refused(caplog, cohort, *words, **more):
    """Run what must fail; return the one line that says why."""
    caplog.clear()
    assert cohort.run(*words, **more) == 1
    (line,) = said(caplog, logging.ERROR)
    assert "\n" not in line
    return line


# Points


def write_points(path, points):
    np.savetxt(path, points, fmt="%.17g", delimiter=",", header="X,Y", comments="")


def read_points(path):
    """The points of a table; NaN where cells are empty."""
    return np.genfromtxt(path, delimiter=",", skip_header=1).reshape(-1, 2)


@pytest.fixture
def wild(cohort):
    """A map so noisy that some points of HER2 have no corresponding point."""
    field = field_of(to_her2)
    noise = np.random.default_rng(1).normal(0, 40, field.vectors_um.shape).astype(np.float32)
    cohort.register(Displacement(field.vectors_um + noise, field.mpp))
    return cohort


def test_points_go_to_where_the_formula_leads_and_back(cohort, tmp_path):
    rng = np.random.default_rng(5)
    points = rng.uniform((0, 0), HE_SIZE, (300, 2)).round(2)
    write_points(tmp_path / "he.csv", points.tolist())
    assert cohort.run("points", tmp_path / "he.csv", tmp_path / "her2.csv", "--to", "her2") == 0
    there = read_points(tmp_path / "her2.csv")
    assert np.abs(there - to_her2(points * HE_MPP) / HER2_MPP).max() < 0.1
    assert cohort.run("points", tmp_path / "her2.csv", tmp_path / "again.csv", "--to", "he") == 0
    assert np.abs(read_points(tmp_path / "again.csv") - points).max() < 0.02


def test_other_columns_and_empty_cells_are_kept(cohort, tmp_path, caplog):
    (tmp_path / "in.csv").write_bytes(
        b'\xef\xbb\xbfname, y ,x,"note, long"\r\n'
        b'a,100,200,"1,5"\r\n'
        b"\xc3\xa4,,,nowhere\r\n"
        b"short\r\n"
        b"n,NaN,4,\r\n"
        b"007,50.5,60,NA\r\n"
    )
    assert cohort.run("points", tmp_path / "in.csv", tmp_path / "out.csv", "--to", "her2") == 0
    with open(tmp_path / "out.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file))
    first, second = to_her2([[100.0, 50.0], [30.0, 25.25]]) / HER2_MPP
    assert lines[0] == ["name", " y ", "x", "note, long"]
    assert [lines[1][0], lines[1][3]] == ["a", "1,5"]
    assert [float(lines[1][2]), float(lines[1][1])] == pytest.approx(first.tolist(), abs=0.1)
    assert lines[2:5] == [["ä", "", "", "nowhere"], ["short", "", "", ""], ["n", "", "", ""]]
    assert [lines[5][0], lines[5][3]] == ["007", "NA"]
    assert [float(lines[5][2]), float(lines[5][1])] == pytest.approx(second.tolist(), abs=0.1)
    assert not said(caplog, logging.WARNING)


def test_points_without_a_corresponding_point_are_empty_and_counted(
    wild, tmp_path, caplog, monkeypatch
):
    # Newton's method alone, which finds none in a fold.
    monkeypatch.setattr(displacement, "_SEARCHED_NODES", ())
    points = np.random.default_rng(2).uniform((0, 0), HER2_SIZE, (200, 2)).round(2)
    write_points(tmp_path / "her2.csv", points.tolist())
    assert wild.run("points", tmp_path / "her2.csv", tmp_path / "he.csv", "--to", "he") == 0
    found = read_points(tmp_path / "he.csv")
    kept = ~np.isnan(found).all(axis=1)
    assert 0 < kept.sum() < 200
    (line,) = said(caplog, logging.WARNING)
    assert f"{(~kept).sum()} points have no corresponding point on H&E" in line
    write_points(tmp_path / "kept.csv", found[kept].tolist())
    assert wild.run("points", tmp_path / "kept.csv", tmp_path / "back.csv", "--to", "her2") == 0
    back = read_points(tmp_path / "back.csv")
    # Such a map leads far out of the slide as well, from where nothing is carried.
    inside = ~np.isnan(back).any(axis=1)
    assert inside.mean() > 0.8
    # Thousandths of a pixel, times the slope of a map that is noise.
    assert np.abs(back - points[kept])[inside].max() < 0.1


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("X;Y\n1;2\n", "separated by commas"),
        ("X,Y,x\n1,2,3\n", "2 columns X"),
        ("X,Y\n1,2\nthree,4\n", "line 3, X: 'three' is no coordinate"),
        ("X,Y\ninf,2\n", "line 2, X: 'inf' is no coordinate"),
        ('X,Y\n"' + "9" * 200_000 + '",1\n', "is no coordinate"),
    ],
)
def test_a_table_that_is_none(cohort, tmp_path, caplog, text, why):
    (tmp_path / "in.csv").write_bytes(text.encode("utf-8", "surrogatepass"))
    words = ("points", tmp_path / "in.csv", tmp_path / "out.csv", "--to", "he")
    assert why in refused(caplog, cohort, *words)
    assert not (tmp_path / "out.csv").exists()


# Annotations


@pytest.mark.parametrize("to", ["he", "her2"])
def test_annotations_follow_the_map(cohort, tmp_path, to):
    outer, hole = rectangle(70, 60, 950, 450), rectangle(400, 200, 640, 330)[::-1]
    properties = {"objectType": "annotation", "name": "Tumour"}
    marked = feature(geometry("Polygon", [outer, hole]), id="b9c1", properties=properties)
    features = [marked, feature(geometry("Point", [300, 200]))]
    document = {"type": "FeatureCollection", "features": features}
    (tmp_path / "in.geojson").write_text(json.dumps(document))
    out = tmp_path / "new" / "out.geojson"
    assert cohort.run("annotations", tmp_path / "in.geojson", out, "--to", to) == 0
    result = json.loads(out.read_text())
    area, point = result["features"]
    assert (area["id"], area["properties"]) == ("b9c1", properties)

    def truth(points):
        if to == "her2":
            return to_her2(np.asarray(points, float) * HE_MPP) / HER2_MPP
        return to_he(np.asarray(points, float) * HER2_MPP) / HE_MPP

    assert point["geometry"]["coordinates"] == pytest.approx(truth([300, 200]).tolist(), abs=0.1)
    for before, after in zip((outer, hole), area["geometry"]["coordinates"], strict=True):
        assert len(after) > 5
        assert after[0] == after[-1]
        # 0.1 px from the map's own curve, which itself is sampled at nodes of 8 px.
        assert stray(before, truth, after) < 0.12


# Labels


def pattern(points_um):
    """Labels as a function of the place, in fields of 17 x 23 um."""
    x, y = points_um[..., 0], points_um[..., 1]
    return ((x // 17 + 5 * (y // 23)) % 200 + 1).astype(np.uint16) * 300


@pytest.mark.parametrize(
    ("to", "suffix", "mpp"), [("he", "tif", None), ("her2", "tiff", None), ("her2", "tif", 3.1)]
)
def test_labels_lie_where_the_formula_leads(cohort, tmp_path, to, suffix, mpp):
    source_um, target_um = (
        np.array(size) * um for size, um in ((HER2_SIZE, HER2_MPP), (HE_SIZE, HE_MPP))
    )
    if to == "her2":
        source_um, target_um = target_um, source_um
    # Neither a whole fraction of the slide nor square pixels.
    width, height = 411, 207
    pixel_um = source_um / (width, height)
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    labels = pattern(np.stack([x, y], axis=-1) * pixel_um)
    tifffile.imwrite(tmp_path / "in.tif", labels)
    out = tmp_path / f"out.{suffix}"
    words = () if mpp is None else ("--mpp", mpp)
    assert cohort.run("labels", tmp_path / "in.tif", out, "--to", to, *words) == 0
    found = tifffile.imread(out)
    assert found.dtype == np.uint16
    wanted = math.sqrt(pixel_um.prod()) if mpp is None else mpp
    assert found.shape == tuple(round(side / wanted) for side in target_um[::-1])
    step = target_um / found.shape[::-1]
    x, y = np.meshgrid(np.arange(found.shape[1]) + 0.5, np.arange(found.shape[0]) + 0.5)
    points = np.stack([x, y], axis=-1) * step
    at = np.floor((to_her2(points) if to == "he" else to_he(points)) / pixel_um)
    inside = ((at >= 0) & (at < (width, height))).all(axis=-1)
    expected = np.where(inside, pattern((at + 0.5) * pixel_um), 0)
    # What differs lies where a pixel of the labels ends, to a hundredth of it.
    assert (found != expected).mean() < 0.01
    assert (found == 0).any() == (to == "her2") or not inside.all()
    assert (found[~inside] != 0).mean() < 0.05 if (~inside).any() else True


# The warped slide


def centroids(rgb, centres_px, radius):
    """Where the blobs nearest to some places have their middle, pixels with edges at integers."""
    dark = np.array(BACKGROUND, float).sum() - rgb.astype(float).sum(axis=-1)
    found = []
    for x, y in centres_px:
        left, top = round(x - radius), round(y - radius)
        part = dark[top : top + 2 * radius, left : left + 2 * radius]
        row, column = ndimage.center_of_mass(np.where(part > 12, part, 0))
        found.append([left + 0.5 + column, top + 0.5 + row])
    return np.array(found)


@pytest.mark.parametrize(
    ("words", "size", "mpp", "radius"),
    [
        (("--quality", 97), HE_SIZE, HE_MPP, 18),
        (("--quality", 97, "--mpp", 1.3, "--workers", 3), (397, 199), 1.3, 8),
    ],
)
def test_blobs_of_her2_lie_where_they_belong_on_he(cohort, tmp_path, words, size, mpp, radius):
    out = tmp_path / "warped.ome.tif"
    assert cohort.run("slide", out, *words) == 0
    levels = tuple(
        (size[0] // 2**n, size[1] // 2**n)
        for n in range(3)
        if n == 0 or size[0] > 512 * 2 ** (n - 1)
    )
    with openslide.OpenSlide(out) as slide:
        assert slide.level_dimensions == levels
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(mpp)
        seen = np.asarray(slide.read_region((0, 0), 0, size).convert("RGB"))
    with tiffslide.TiffSlide(out) as slide:
        assert slide.level_dimensions == levels
        assert float(slide.properties["tiffslide.mpp-y"]) == pytest.approx(mpp)
    with tifffile.TiffFile(out) as file:
        assert [level.shape[1::-1] for level in file.series[0].levels] == list(levels)
        image = tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]
        assert image["Name"] == "p1: HER2 on H&E"
        assert image["Pixels"]["PhysicalSizeX"] == mpp
    with open_slide(out) as slide:
        assert slide.mpp == mpp
    error = centroids(seen, MARKS_UM / mpp, radius) - MARKS_UM / mpp
    assert len(error) > 30
    assert np.abs(np.median(error, axis=0)).max() < 0.02, "half a pixel, or a part of it"
    assert np.abs(error).max() < 0.1
    assert np.median(np.abs(error)) < 0.05


def test_where_her2_does_not_reach_is_background(cohort, tmp_path):
    # HER2 reaches to 567 um; H&E from 367 um on leads beyond.
    cohort.register(field_of(lambda points: points + np.array([200.0, 0.0])))
    assert cohort.run("slide", tmp_path / "out.tif") == 0
    pixels = tifffile.imread(tmp_path / "out.tif", key=0).astype(int)
    edge = round((HER2_SIZE[0] * HER2_MPP - 200) / HE_MPP)
    assert np.abs(pixels[:, edge + 8 :] - BACKGROUND).max() <= 2
    assert np.abs(pixels[:, : edge - 8] - BACKGROUND).sum(axis=-1).max() > 100, "blobs"


@pytest.mark.parametrize("mirror", [False, True])
def test_a_pair_that_comes_registered(tmp_path, mirror):
    """Pixel for pixel, also on a slide smaller than a tile and through the mirror."""
    rng = np.random.default_rng(4)
    noise = rng.integers(60, 240, (23, 31, 3), dtype=np.uint8)
    rgb = cv2.resize(noise, (301, 217), interpolation=cv2.INTER_CUBIC)
    write_pyramid(tmp_path / "he.tif", [rgb], (0.5, 0.5))
    write_pyramid(tmp_path / "her2.tif", [rgb[:, ::-1] if mirror else rgb], (0.5, 0.5))
    cohort = Cohort(tmp_path, registered="true", mirrored="true" if mirror else "")
    assert cohort.run("slide", tmp_path / "out.ome.tif", "--quality", 100) == 0
    found = tifffile.imread(tmp_path / "out.ome.tif", key=0)
    assert found.shape == rgb.shape
    assert np.abs(found.astype(int) - rgb).mean() < 1
    write_points(tmp_path / "in.csv", [[10, 20], [300, 216]])
    assert cohort.run("points", tmp_path / "in.csv", tmp_path / "out.csv", "--to", "her2") == 0
    expected = [[291, 20], [1, 216]] if mirror else [[10, 20], [300, 216]]
    assert read_points(tmp_path / "out.csv").tolist() == expected


def test_a_part_of_her2_that_cannot_be_decoded(cohort, slides, tmp_path, caplog):
    large = 4200, 3100
    her2 = np.full((large[1], large[0], 3), 150, np.uint8)
    for name in ("he.tif", "her2.tif"):
        (tmp_path / name).unlink()
        write_pyramid(tmp_path / name, [her2], (0.5, 0.5))
    cohort.write_sheet(registered="true")
    damage_tile(tmp_path / "her2.tif", 33 * 10 + 9)
    out = tmp_path / "out.tif"
    assert cohort.run("slide", out) == 0
    (line,) = [line for line in said(caplog, logging.WARNING) if "show the background" in line]
    assert "1 of 63 tiles cannot be read and show the background" in line
    pixels = tifffile.imread(out, key=0)
    assert np.abs(pixels[:500, :500].astype(int) - 150).max() <= 2


@pytest.fixture
def points(tmp_path):
    write_points(tmp_path / "in.csv", [[100, 100]])
    return "points", tmp_path / "in.csv", tmp_path / "out.csv", "--to", "her2"


def test_a_pair_without_a_map(cohort, points, caplog):
    cohort.register(none(), "fail", "no matches")
    assert "gave no map" in refused(caplog, cohort, *points, "--allow-failed-registration")
    (cohort.folder / "results/register/p1.displacement.npz").unlink()
    assert "pair p1: not registered yet" in refused(caplog, cohort, *points)


@pytest.mark.parametrize(
    ("verdict", "manual", "refusal"),
    [("fail", "", "registration failed: low"), ("pass", "refuse", "refused by a person")],
)
def test_a_refused_registration_needs_a_flag(cohort, points, caplog, verdict, manual, refusal):
    cohort.register(field_of(to_her2), verdict, "low")
    cohort.write_sheet(verdict=manual)
    line = refused(caplog, cohort, *points)
    assert refusal in line
    assert "--allow-failed-registration" in line
    assert cohort.run(*points, "--allow-failed-registration") == 0


def test_an_existing_file_is_never_replaced(cohort, tmp_path, caplog):
    write_points(tmp_path / "in.csv", [[10, 10]])
    before = (tmp_path / "in.csv").read_bytes()
    words = ("points", tmp_path / "in.csv", tmp_path / "in.csv", "--to", "he")
    assert "in.csv: exists" in refused(caplog, cohort, *words)
    assert (tmp_path / "in.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("kind", "name", "mpp", "why"),
    [
        ("labels", "out.png", 0.5, "name it .tif"),
        ("labels", "out.tif", 0.2, "--mpp 0.2: he.tif has 0.5 um/px; give that or more"),
        ("slide", "out.svs", 0.5, "name it .tif"),
        ("slide", "out.tif", 0.2, "her2.tif has 0.44 um/px"),
        ("slide", "out.tif", 1e5, "up to 20"),
    ],
)
def test_images_that_cannot_be_written(cohort, tmp_path, caplog, kind, name, mpp, why):
    tifffile.imwrite(tmp_path / "in.tif", np.ones((40, 60), np.int32))
    before = sorted(tmp_path.iterdir())
    words = [tmp_path / "in.tif", tmp_path / name, "--to", "he"]
    given = words if kind == "labels" else words[1:2]
    assert why in refused(caplog, cohort, kind, *given, "--mpp", mpp)
    assert sorted(tmp_path.iterdir()) == before


def test_any_number_of_workers_gives_the_same_bytes(cohort, tmp_path):
    paths = [tmp_path / f"{workers}.tif" for workers in (1, 3)]
    for path in paths:
        assert cohort.run("slide", path, "--workers", path.stem) == 0
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_real_slide_onto_itself_is_unchanged(images, tmp_path):
    path = images / "wsi" / "CMU-1-Small-Region.svs"
    cohort = Cohort(tmp_path, he=path, her2=path, registered="true")
    out = tmp_path / "out.ome.tif"
    assert cohort.run("slide", out, "--quality", 95) == 0
    with openslide.OpenSlide(path) as before, openslide.OpenSlide(out) as after:
        assert after.dimensions == before.dimensions
        mpps = [float(slide.properties["openslide.mpp-x"]) for slide in (before, after)]
        assert mpps[1] == pytest.approx(mpps[0])
        views = [
            np.asarray(slide.read_region((700, 900), 0, (900, 800)).convert("RGB"), float)
            for slide in (before, after)
        ]
    assert np.abs(views[1] - views[0]).mean() < 2.5
    assert np.corrcoef(views[0].ravel(), views[1].ravel())[0, 1] > 0.995
