"""Objects for QuPath: the tables' tiles, tissue and cells, in the pixels of each slide."""

import collections
import json
import math

import cv2
import numpy as np
import pytest
import shapely
import shapely.geometry

from hemera import tables
from hemera.__main__ import main
from hemera.imaging.codecs import decode_mask
from hemera.interop import qupath
from hemera.masks import label_format
from tests.small_units import HE_MPP, HER2_MPP, field_at


def objects(path, kind):
    """Return the objects of a kind, in order, after a check against RFC 7946 and QuPath's keys."""
    document = json.loads(path.read_text())
    assert document["type"] == "FeatureCollection"
    found = []
    for item in document["features"]:
        assert item["type"] == "Feature"
        properties = item["properties"]
        assert properties["objectType"] in ("annotation", "tile", "cell")
        assert len(properties["classification"]["color"]) == 3
        for member in {"geometry", "nucleusGeometry"} & set(item):
            shape = shapely.geometry.shape(item[member])
            assert shape.is_valid
            assert shape.area > 0
        if properties["objectType"] == kind:
            found.append((properties["classification"]["name"], item))
    return found


def export(unit, *words):
    out = unit.folder / "out"
    given = ("--configfile", str(unit.folder / "config.yaml"), "--results", str(unit.results))
    assert main(["export", "qupath", str(out), *given, *words]) == 0
    return out


def test_tiles_and_cells_of_both_slides_are_where_the_map_has_them(study):
    out = export(study)
    rows = tables.read(study.results / "filter" / "tiles.parquet", tables.filtered(("stain",)))
    rows = rows.to_pylist()
    tiles = objects(out / "case1.he.geojson", "tile")
    classes = ["Accepted" if row["accepted"] else f"Refused: {row['reason']}" for row in rows]
    assert [name for name, _ in tiles] == classes
    assert {*classes} == {"Accepted", "Refused: folded", "Refused: low_tissue"}
    moved = objects(out / "case1.her2.geojson", "tile")
    for row, (_, item), (name, other) in zip(rows, tiles, moved, strict=True):
        corner = row["x_px"], row["y_px"]
        box = shapely.geometry.shape(item["geometry"])
        assert box.equals(shapely.box(*corner, *np.add(corner, row["size_px"])))
        truth = field_at(shapely.get_coordinates(box.segmentize(2)) * HE_MPP) / HER2_MPP
        there = shapely.geometry.shape(other["geometry"])
        assert there.hausdorff_distance(shapely.Polygon(truth)) < 0.3
        assert name == item["properties"]["classification"]["name"]
    accepted = {row["tile"] for row in rows if row["accepted"]}
    cells = tables.read(study.results / "mask" / "case1.cells.parquet", tables.CELLS).to_pylist()
    expected = collections.Counter(
        qupath.INTENSITIES[cell["intensity"]][0] for cell in cells if cell["tile"] in accepted
    )
    assert expected
    for stain in tables.STAINS:
        found = objects(out / f"case1.{stain}.geojson", "cell")
        assert collections.Counter(name for name, _ in found) == expected


def test_tissue_and_regions_are_annotations(study):
    out = export(study, "--pair", "case1")
    for row in tables.read(study.images_table, tables.DESCRIBE).to_pylist():
        found = objects(out / f"case1.{row['stain']}.geojson", "annotation")
        tissue = decode_mask(row["tissue"])
        pixel = row["width_px"] * row["height_px"] / tissue.size
        area = sum(
            shapely.geometry.shape(item["geometry"]).area
            for name, item in found
            if name == "Tissue"
        )
        assert area == pytest.approx((tissue > 0).sum() * pixel)
        regions = [item for name, item in found if name == "Region"]
        assert len(regions) == 1
    he = objects(out / "case1.he.geojson", "annotation")
    (region,) = [item for name, item in he if name == "Region"]
    assert shapely.geometry.shape(region["geometry"]).bounds == (0, 0, 690, 500)


def test_the_script_reads_the_slides_of_the_export(study):
    out = export(study)
    slides = json.loads((out / "slides.json").read_text())
    assert [slide["image"] for slide in slides] == [
        str(study.folder / name) for name in ("he.tif", "her2.tif")
    ]
    assert [slide["mpp"] for slide in slides] == [HE_MPP, pytest.approx(HER2_MPP)]
    assert all((out / slide["objects"]).is_file() for slide in slides)
    assert f"new File(args ? args[0] : '{out}')" in (out / "project.groovy").read_text()


def test_an_anonymous_export_names_no_pair_and_no_slide(study):
    out = export(study, "--anonymous")
    names = sorted(path.name for path in out.iterdir())
    assert [name[16:] for name in names] == [".he.geojson", ".her2.geojson"]
    for path in out.iterdir():
        text = path.read_text() + path.name
        assert not [name for name in ("case1", "he.tif", "her2.tif", "bci") if name in text]


def test_an_unknown_pair_is_an_error(study, caplog):
    words = ["export", "qupath", str(study.folder / "out"), "--pair", "cas1"]
    assert main([*words, "--configfile", str(study.folder / "config.yaml")]) == 1
    assert "cas1" in caplog.text


def test_outlines_are_those_of_the_mask():
    """Two cells that touch, one apart, and one without a piece in the mask."""
    centres, radius, grown = [(30, 40), (52, 40), (100, 30)], 7, 11
    labels, nucleus = np.zeros((70, 130), np.int32), np.zeros((70, 130), np.uint8)
    for number, centre in enumerate(centres, 1):
        cv2.circle(labels, centre, grown, number, -1)
        cv2.circle(nucleus, centre, radius, 1, -1)
    classes = np.where(labels == 1, 2, np.minimum(labels, 1)).astype(np.uint8)
    classes[label_format.boundaries(labels)] = label_format.BOUNDARY
    image = label_format.pack(classes, nucleus > 0, np.zeros_like(classes))
    one = int((cv2.circle(np.zeros((70, 130), np.uint8), centres[0], radius, 1, -1)).sum())
    cells = [
        {"x_px": x + 0.5, "y_px": y + 0.5, "area_px": one, "intensity": n % 4,
         **dict.fromkeys(qupath.MEASURED, 0.25), "nucleus_od": None}
        for n, (x, y) in enumerate([*centres, (10, 8)])
    ]  # fmt: skip
    row = {"x_px": 1000, "y_px": 2000, "mpp": 0.5, "he_mpp": 0.25}
    found = list(qupath._cells(image, cells, row))
    assert [feature.title for feature in found] == ["Negative", "1+", "2+", "3+"]
    for number, feature in enumerate(found[:3], 1):
        assert feature.shapes["nucleusGeometry"].area == 4 * one
        # The contour between neighbours may go to either, a pixel wide.
        area = 4 * (labels == number).sum()
        assert feature.shapes["geometry"].area == pytest.approx(area, abs=4 * 12)
        x, y = centres[number - 1]
        centroid = feature.shapes["geometry"].centroid
        assert (centroid.x, centroid.y) == pytest.approx((1001 + 2 * x, 2001 + 2 * y), abs=1)
        assert feature.item["properties"]["measurements"] == {
            "completeness": 0.25, "membrane_od": 0.25, "cytoplasm_od": 0.25, "area_um2": one / 4,
        }  # fmt: skip
    total = sum(feature.shapes["geometry"].area for feature in found[:3])
    assert total == 4 * (labels > 0).sum()
    disc = found[3].shapes["geometry"]
    assert set(found[3].shapes) == {"geometry"}
    assert disc.area == pytest.approx(4 * one, rel=0.02)
    assert (disc.centroid.x, disc.centroid.y) == pytest.approx((1021, 2017))
    assert math.isclose(disc.bounds[2] - disc.bounds[0], 4 * math.sqrt(one / math.pi))
