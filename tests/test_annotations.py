"""Annotations: what is read of GeoJSON."""

import json

import numpy as np
import pytest

from hemera.annotations import read_polygons
from hemera.errors import SheetError

RING = [[0, 0], [200, 0], [200, 300], [0, 300], [0, 0]]
HOLE = [[20, 30], [40, 30], [40, 60], [20, 30]]


class TestReadPolygons:
    @pytest.mark.parametrize(
        "document",
        [
            {"type": "Polygon", "coordinates": [RING, HOLE]},
            {"type": "MultiPolygon", "coordinates": [[RING, HOLE]]},
            [
                {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [RING, HOLE]}},
                {"type": "Feature", "geometry": {"type": "Point", "coordinates": [400, 10]}},
                {"type": "Feature", "geometry": None},
            ],
            {
                "type": "GeometryCollection",
                "geometries": [{"type": "Polygon", "coordinates": [RING, HOLE]}],
            },
        ],
    )
    def test_outer_ring_and_holes(self, tmp_path, document):
        path = tmp_path / "roi.geojson"
        path.write_text(json.dumps(document))
        [[outer, hole]] = read_polygons(path)
        np.testing.assert_array_equal(outer, RING)
        np.testing.assert_array_equal(hole, HOLE)

    @pytest.mark.parametrize(
        "text",
        [
            "not json",
            "[3]",
            '{"type": "Polygon", "coordinates": [[[1, 2]]]}',
            # a ring, not a list of rings
            '{"type": "Polygon", "coordinates": [[0, 0], [1, 1], [2, 2]]}',
            '{"type": "Polygon", "coordinates": [[[0], [1], [2]]]}',
            '{"type": "Polygon", "coordinates": [[[[0, 0], [1, 1], [2, 2]]]]}',
        ],
    )
    def test_what_is_no_geojson_is_refused(self, tmp_path, text):
        path = tmp_path / "roi.geojson"
        path.write_text(text)
        with pytest.raises(SheetError, match=r"^roi\.geojson: not GeoJSON"):
            read_polygons(path)

    def test_no_polygon_is_refused(self, tmp_path):
        path = tmp_path / "roi.geojson"
        path.write_text('{"type": "Point", "coordinates": [1, 2]}')
        with pytest.raises(SheetError, match="holds no polygon"):
            read_polygons(path)
        with pytest.raises(SheetError, match="no such file"):
            read_polygons(tmp_path / "other.geojson")
