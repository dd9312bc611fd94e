"""The position of an annotation on the other slide.

The maps are formulas, so that the curve an edge becomes can be sampled as densely as one likes.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import shapely.geometry

from hemera.files.geojson import read_features, with_features
from hemera.registration.annotations import transform_features
from tests.small_geojson import collection, feature, geometry, rectangle, stray


def swirl(points):
    """A turn that dies away from the middle, sheared."""
    x, y = points[:, 0] - 3000, points[:, 1] - 2000
    angle = 0.5 * np.exp(-(x**2 + y**2) / 1500**2)
    cos, sin = np.cos(angle), np.sin(angle)
    turned = np.stack([cos * x - sin * y, sin * x + cos * y], axis=-1)
    return turned @ np.array([[1.02, 0.0], [0.1, 0.97]]) + (3500, 1800)


def affine(points):
    return points @ np.array([[0.5, 0.2], [-0.3, 0.6]]) + (700, -20)


def mirrored(points):
    return np.array([9000.0, 0.0]) + swirl(points) * (-1, 1)


def torn(points):
    """Nothing to the right of x = 1000 has a corresponding point."""
    return np.where(points[:, :1] > 1000, np.nan, points + 5.0)


def transformed(document, transform, tolerance_px=0.1, step_px=32.0):
    """The whole document on the other slide, as JSON, and how many features lost vertices."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "in.geojson")
        path.write_text(json.dumps(document))
        document, features = read_features(path)
    how = {"tolerance_px": tolerance_px, "step_px": step_px}
    results = list(transform_features(features, transform, **how))
    changed = with_features(document, [item for item, _ in results if item is not None])
    return json.loads(json.dumps(changed)), sum(lost for _, lost in results)


class TestEdges:
    """Long edges become curves."""

    @pytest.mark.parametrize("transform", [swirl, mirrored])
    def test_a_polygon_with_a_hole_follows_the_curves(self, transform):
        outer, hole = rectangle(500, 400, 5600, 3300), rectangle(2500, 1700, 3300, 2200)[::-1]
        document = geometry("Polygon", [outer, hole])
        result, lost = transformed(document, transform)
        assert lost == 0
        assert result["type"] == "Polygon"
        for before, after in zip((outer, hole), result["coordinates"], strict=True):
            assert after[0] == after[-1]
            assert stray(before, transform, after) < 0.1
            corners = transform(np.array(before, float))
            nearest = [np.hypot(*(np.array(after) - corner).T).min() for corner in corners]
            assert max(nearest) < 0.1
        assert len(result["coordinates"][0]) < 400, "no more points than it takes"

    def test_a_coarser_tolerance_takes_fewer_points(self):
        document = geometry("LineString", [[0, 100], [6000, 3900]])
        counts = []
        for tolerance in (0.01, 0.1, 10.0):
            line = transformed(document, swirl, tolerance)[0]["coordinates"]
            assert stray(document["coordinates"], swirl, line) < tolerance
            counts.append(len(line))
        assert counts[0] > counts[1] > counts[2] >= 2

    def test_a_straight_map_adds_nothing_and_closes_an_open_ring(self):
        ring = rectangle(10, 20, 40_000, 30_000)
        result, _ = transformed(geometry("Polygon", [ring[:-1]]), affine)
        expected = affine(np.array(ring, float))
        np.testing.assert_allclose(result["coordinates"][0], expected, atol=1e-3)


class TestMembers:
    """What is no coordinate is kept."""

    def test_ids_properties_and_order_are_kept(self):
        ring = rectangle(100, 100, 130, 120)
        members = {"plane": {"c": -1, "z": 2, "t": 0}, "isEllipse": True}
        properties = {
            "classification": {"name": "Tumor", "color": [200, 0, 0]},
            "measurements": {"Area": 1e-17, "count": 2**70, "none": None},
        }
        cell = {
            "type": "Feature",
            "id": "a0c1-\u00e4\ud800",
            "bbox": [1, 2, 3, 4],
            "geometry": geometry("Polygon", [ring]) | members,
            "nucleusGeometry": geometry("Polygon", [rectangle(110, 105, 118, 113)]),
            "properties": properties,
        }
        nowhere = feature(None, properties={"name": "without a place"})
        document = {"type": "FeatureCollection", "name": "export", "features": [cell, nowhere]}
        result, _ = transformed(document | {"bbox": [100, 100, 130, 120]}, affine)
        assert list(result) == ["type", "name", "features"]
        cell, nowhere = result["features"]
        assert nowhere == document["features"][1]
        before = document["features"][0]
        assert [*cell] == ["type", "id", "geometry", "nucleusGeometry", "properties"]
        assert (cell["id"], cell["properties"]) == (before["id"], before["properties"])
        assert cell["geometry"]["plane"] == {"c": -1, "z": 2, "t": 0}
        assert "isEllipse" not in cell["geometry"], "QuPath would draw it into the bounding box"
        for name in ("geometry", "nucleusGeometry"):
            expected = affine(np.array(before[name]["coordinates"][0], float))
            np.testing.assert_allclose(cell[name]["coordinates"][0], expected, atol=1e-3)

    def test_every_type_of_geometry(self):
        ring, far = rectangle(100, 0, 110, 6), rectangle(50, 0, 60, 6)
        geometries = [
            geometry("Point", [1, 2, 77]),
            geometry("MultiPoint", [[1, 2], [3, 4]]),
            geometry("LineString", [[1, 2], [3, 4], [5, 5]]),
            geometry("MultiLineString", [[[1, 2], [3, 4]], [[5, 6], [7, 7]]]),
            geometry("Polygon", [ring]),
            geometry(
                "MultiPolygon", [[far, rectangle(52, 1, 57, 5)[::-1]], [rectangle(0, 0, 3, 2)]]
            ),
            geometry("Polygon", []),
            geometry("Point", []),
        ]
        nested = collection(*geometries)
        document = [nested, feature(nested, properties=None)]
        result, _ = transformed(document, lambda points: points + (0.5, -1.0))  # noqa: RUF005

        def shifted(node):
            if node and isinstance(node[0], list):
                return [shifted(item) for item in node]
            return [node[0] + 0.5, node[1] - 1.0] if node else node

        for part, before in zip(result[0]["geometries"], geometries[:-2], strict=True):
            assert part == {**before, "coordinates": shifted(before["coordinates"])}
        assert result[1]["geometry"] == result[0]

    def test_no_feature_is_none(self):
        document = {"type": "FeatureCollection", "features": []}
        assert transformed(document, swirl) == (document, 0)

    def test_more_features_than_a_batch_keep_their_places_where_some_are_left_out(self):
        document = [feature(geometry("Point", [n, 2 * n]), id=n) for n in range(4500)]
        result, _ = transformed(document, torn)
        assert [item["id"] for item in result] == list(range(1001))
        assert result[7]["geometry"]["coordinates"] == [12, 19]
        backwards, _ = transformed(document[::-1], torn)
        assert backwards == result[::-1]

    def test_a_polygon_that_crosses_itself_becomes_valid(self):
        bow = [[0, 0], [20, 10], [20, 0], [0, 10], [0, 0]]
        document = feature(geometry("Polygon", [bow]))
        result, _ = transformed(document, affine)
        shape = shapely.geometry.shape(result["geometry"])
        assert shape.geom_type == "MultiPolygon"
        assert shape.is_valid
        # Two triangles of 10 x 10 / 2, scaled by the determinant.
        assert shape.area == pytest.approx(100 * 0.36, rel=1e-3)


FAR_RING = rectangle(2000, 0, 2100, 50)


class TestOutside:
    """Nothing to the right of x = 1000 has a corresponding point."""

    @pytest.mark.parametrize(
        ("given", "left"),
        [
            (geometry("Point", [1001, 5]), None),
            (geometry("MultiPoint", [[1001, 5], [10, 5]]), geometry("MultiPoint", [[15, 10]])),
            (geometry("LineString", [[999.5, 5], [1001, 5]]), None),
            (
                geometry("MultiLineString", [[[2000, 5], [2001, 5]], [[0, 0], [1, 1]]]),
                geometry("MultiLineString", [[[5, 5], [6, 6]]]),
            ),
            (
                geometry("MultiPolygon", [[FAR_RING], [rectangle(0, 0, 10, 6)]]),
                geometry("Polygon", [rectangle(5, 5, 15, 11)]),
            ),
            (
                collection(geometry("Point", [4000, 1]), geometry("Point", [40, 1])),
                collection(geometry("Point", [45, 6])),
            ),
            (geometry("Polygon", [FAR_RING]), None),
        ],
    )
    def test_what_is_left(self, given, left):
        whole = feature(given, id=7, properties={})
        expected = [] if left is None else [{**whole, "geometry": left}]
        assert transformed([whole], torn) == (expected, 1)
        assert transformed(given, torn) == (left, 1)

    def test_a_polygon_keeps_the_rest(self):
        ring = [[0, 0], [1500, 0], [400, 300], [0, 300], [0, 0]]
        result, lost = transformed(geometry("Polygon", [ring]), torn)
        assert lost == 1
        points = np.array(result["coordinates"][0])
        assert result["coordinates"][0][0] == result["coordinates"][0][-1]
        for corner in ([5, 5], [405, 305], [5, 305]):
            assert corner in result["coordinates"][0]
        # The edges go on to where the map ends, to a step.
        assert 1005 - 32 < points[:, 0].max() <= 1005

    def test_a_cell_may_lose_its_nucleus_and_not_itself(self):
        nucleus = geometry("Polygon", [rectangle(2000, 0, 2005, 3)])
        cell = feature(geometry("Polygon", [rectangle(0, 0, 10, 6)]), nucleusGeometry=nucleus)
        result, lost = transformed([cell], torn)
        assert lost == 1
        assert [*result[0]] == ["type", "geometry"]
        cell["geometry"], cell["nucleusGeometry"] = cell["nucleusGeometry"], cell["geometry"]
        assert transformed([cell], torn) == ([], 1)
