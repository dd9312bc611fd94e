"""Reading of GeoJSON: what is a polygon, and what is refused."""

import json
import math

import pytest
import shapely

from hemera.errors import SheetError
from hemera.files.geojson import read_features, read_polygons
from tests.small_geojson import collection, feature, geometry

RING = [[0, 0], [200, 0], [200, 300], [0, 300], [0, 0]]
HOLE = [[20, 30], [40, 30], [40, 60], [20, 30]]


@pytest.mark.parametrize(
    "document",
    [
        geometry("Polygon", [RING, HOLE]),
        geometry("MultiPolygon", [[RING, HOLE]]),
        [
            feature(geometry("Polygon", [RING, HOLE])),
            feature(geometry("Point", [400, 10])),
            feature(None),
        ],
        collection(geometry("Polygon", [RING, HOLE])),
    ],
)
def test_outer_ring_and_holes(tmp_path, document):
    path = tmp_path / "roi.geojson"
    # With the mark that Windows puts in front.
    path.write_text(json.dumps(document), encoding="utf-8-sig")
    [found] = read_polygons(path)
    assert found.equals_exact(shapely.Polygon(RING, [HOLE]), 0)


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[" * 100_000,
        # a ring, not a list of rings
        '{"type": "Polygon", "coordinates": [[0, 0], [1, 1], [2, 2]]}',
    ],
)
def test_what_is_no_geojson_is_refused(tmp_path, text):
    path = tmp_path / "roi.geojson"
    path.write_text(text)
    with pytest.raises(SheetError, match=r"^roi\.geojson: not GeoJSON"):
        read_polygons(path)


def test_no_polygon_is_refused(tmp_path):
    path = tmp_path / "roi.geojson"
    path.write_text('{"type": "Point", "coordinates": [1, 2]}')
    with pytest.raises(SheetError, match="contains no polygon"):
        read_polygons(path)
    with pytest.raises(SheetError, match="no such file"):
        read_polygons(tmp_path / "other.geojson")


@pytest.mark.parametrize(
    "wrong",
    [
        3,
        feature(3),
        {"type": "Point"},
        geometry("Circle", [1, 2]),
        geometry("Point", [math.nan, 2]),
        geometry("Point", [1e9, 2]),
        geometry("Polygon", [[[1, 2], [3, 4]]]),
        geometry("MultiPolygon", [[[[1, 2], [3]]]]),
    ],
    ids=str,
)
def test_a_feature_that_is_not_geojson_is_named(tmp_path, wrong):
    path = tmp_path / "roi.geojson"
    path.write_text(json.dumps([feature(geometry("Point", [1, 2])), wrong]))
    with pytest.raises(SheetError, match=r"^roi\.geojson: not GeoJSON \((feature 2|'\w+' object)"):
        read_features(path)
