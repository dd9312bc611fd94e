"""Artefacts from files: each place of a mask or polygon, and what is no mask of the slide."""

import json
import re

import cv2
import numpy as np
import pytest
from PIL import Image

from hemera.errors import SlideError
from hemera.imaging.artefact_files import read_artefacts
from hemera.imaging.artefacts import KINDS
from tests.small_geojson import feature, geometry, rectangle

SIZE_PX = 2000, 1200
TISSUE = np.zeros((60, 100), np.bool_)
TISSUE[:, 30:] = True
"""The slide at a twentieth of its size; no tissue on its left."""


def found(path):
    """The fraction of the slide under each kind, and the centre of it on level 0."""
    kinds = read_artefacts(path, SIZE_PX, TISSUE, "he_artefacts")
    assert kinds.shape == TISSUE.shape
    assert kinds.dtype == np.uint8
    result = {}
    for number in np.unique(kinds[kinds > 0]).tolist():
        y, x = np.nonzero(kinds == number)
        result[KINDS[number - 1]] = (
            len(x) / kinds.size, (x.mean() + 0.5) * 20, (y.mean() + 0.5) * 20
        )  # fmt: skip
    return result


def expected(x0, y0, x1, y1):
    area = (x1 - x0) * (y1 - y0) / (SIZE_PX[0] * SIZE_PX[1])
    return pytest.approx((area, (x0 + x1) / 2, (y0 + y1) / 2), rel=0.02)


def write_mask(path, boxes, start=0, scale=0.25):
    mask = np.full((round(SIZE_PX[1] * scale), round(SIZE_PX[0] * scale)), start, np.uint8)
    for value, box in boxes:
        x0, y0, x1, y1 = (round(side * scale) for side in box)
        mask[y0:y1, x0:x1] = value
    Image.fromarray(mask).save(path)
    return path


BOXES = {
    "fold": (2, (600, 200, 1000, 400)),
    "dust": (3, (1000, 200, 1200, 400)),
    "pen": (4, (1200, 200, 1600, 1000)),
    "edge": (5, (600, 600, 800, 1000)),
    "blur": (6, (800, 600, 1000, 1000)),
}
"""Number of GrandQC and place of each kind, on level 0."""


@pytest.mark.parametrize("scale", [0.05, 0.25, 0.6])
def test_classes_of_grandqc_at_any_scale(tmp_path, scale):
    """Tissue is 1 and background 7; a margin of 0 was not processed."""
    boxes = [(1, (400, 0, 2000, 1160)), *BOXES.values(), (0, (0, 1160, 2000, 1200))]
    path = write_mask(tmp_path / "slide.svs_mask.png", boxes, 7, scale)
    assert found(path) == {kind: expected(*box) for kind, (_, box) in BOXES.items()}


def test_what_histoqc_does_not_use_of_the_tissue(tmp_path):
    path = write_mask(tmp_path / "slide.svs_mask_use.png", [(255, (600, 0, 1400, 1200))])
    assert found(path) == {"other": expected(1400, 0, 2000, 1200)}


@pytest.mark.parametrize("value", [1, 255])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_any_other_mask_is_not_zero_at_artefacts(tmp_path, value, suffix):
    path = write_mask(tmp_path / f"mask{suffix}", [(value, (0, 400, 600, 1200))])
    assert found(path) == {"other": expected(0, 400, 600, 1200)}
    assert found(write_mask(tmp_path / f"none{suffix}", [])) == {}


def test_polygons_are_of_the_kind_of_their_class(tmp_path):
    names = {
        "fold": "Fold", "dust": "Darkspot & Foreign Object", "pen": {"name": "Pen"},
        "edge": "Edge & Air Bubble", "blur": "OOF",
    }  # fmt: skip
    items = [
        feature(geometry("Polygon", [rectangle(*BOXES[kind][1])]), properties={"classification": n})
        for kind, n in names.items()
    ]
    whole = geometry("Polygon", [rectangle(0, 0, *SIZE_PX)])
    items.append(feature(whole, properties={"classification": "Normal Tissue"}))
    # A square with a hole, without a class.
    ring, hole = rectangle(0, 200, 400, 600), rectangle(100, 300, 300, 500)
    items.append(feature(geometry("Polygon", [ring, hole]), properties=None))
    path = tmp_path / "marks.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": items}))
    kinds = found(path)
    assert kinds.pop("other") == pytest.approx((0.05, 200, 400), rel=0.02)
    assert kinds == {kind: expected(*BOXES[kind][1]) for kind in names}
    assert read_artefacts(path, SIZE_PX, TISSUE, "")[20, 10] == 0
    path.write_text(json.dumps({"type": "FeatureCollection", "features": []}))
    assert found(path) == {}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("absent.png", None, "no such file; correct he_artefacts"),
        ("absent.geojson", None, "no such file; correct he_artefacts"),
        ("empty.png", b"", "empty.png: cannot be read"),
        ("rgb.png", np.zeros((60, 100, 3), np.uint8), r"^he_artefacts: rgb\.png: .*one channel"),
        ("full.png", np.ones((60, 100), np.uint8), "full.png is 0 nowhere"),
        # GrandQC on a slide full of clean tissue: 1, and a margin that it did not process.
        (
            "slide.svs_mask.png",
            np.pad(np.ones((58, 99), np.uint8), ((0, 2), (0, 1))),
            r"0 and 1, and 1 covers 9[56]% of the tissue; in a mask of GrandQC, 1 is tissue",
        ),
        (
            "line.geojson",
            b'{"type": "LineString", "coordinates": [[0, 0], [9, 9]]}',
            "contains no polygon",
        ),
        ("part.png", np.zeros((60, 90), np.uint8), "90 x 60 px, which are not the proportions of"),
        ("turned.png", np.zeros((100, 60), np.uint8), "slide of 2000 x 1200 px"),
        ("empty.geojson", b"", "he_artefacts: empty.geojson: not GeoJSON"),
        ("text.json", b"[1, 2]", "he_artefacts: text.json: not GeoJSON"),
    ],
)
def test_what_is_no_mask_of_the_slide_is_refused(tmp_path, name, content, words):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        cv2.imwrite(str(path), content)
    with pytest.raises(SlideError, match=words):
        read_artefacts(path, SIZE_PX, TISSUE, "he_artefacts")


def write_polygon(path, box, **members):
    item = feature(geometry("Polygon", [rectangle(*box)]), properties=None)
    path.write_text(json.dumps({"type": "FeatureCollection", **members, "features": [item]}))
    return path


@pytest.mark.parametrize(
    ("box", "words"),
    [
        (
            (20000, 20000, 30000, 30000),
            r"x 20000 to 30000, y .* 30000\) do not touch the slide",
        ),
        (
            (200, -800, 800, -200),
            "do not touch the slide of 2000 x 1200 px; export them in",
        ),
        ((5.1, 45.2, 5.9, 45.8), r"x 5.1 to 5.9, y 45.2 to 45.8\) cover nothing of the slide"),
        ((1, 1, 4, 4), "cover nothing of the slide"),
    ],
    ids=["beyond", "y upwards", "degrees", "thumbnail"],
)
def test_polygons_that_are_not_pixels_of_the_slide(tmp_path, box, words):
    with pytest.raises(SlideError, match=f"^he_artefacts: marks.geojson: .*{words}"):
        found(write_polygon(tmp_path / "marks.geojson", box))


@pytest.mark.parametrize(
    ("box", "members", "words"),
    [
        ((1500, 600, 4000, 3000), {}, "are 9[0-9]% outside the slide"),
        ((0, 0, 100, 60), {}, "are all in the top left corner of the slide"),
        ((200, 200, 800, 800), {"crs": {"properties": {"name": "EPSG:3857"}}}, "crs .*EPSG:3857"),
    ],
)
def test_polygons_that_may_not_be_pixels_of_the_slide(tmp_path, caplog, box, members, words):
    inside = [min(side, limit) for side, limit in zip(box, SIZE_PX * 2, strict=True)]
    kinds = found(write_polygon(tmp_path / "marks.geojson", box, **members))
    assert kinds == {"other": pytest.approx(expected(*inside).expected, rel=0.1)}
    [record] = caplog.records
    assert re.search(words, record.getMessage())


def test_polygons_in_pixels_of_the_slide_give_no_warning(tmp_path, caplog):
    for members in ({}, {"crs": {"properties": {"name": "pixel"}}}):
        found(write_polygon(tmp_path / "marks.geojson", (200, 200, 2001, 800), **members))
    # Artefacts with another number than 1 have one meaning.
    write_mask(tmp_path / "all.png", [(255, (400, 0, 2000, 1200))])
    assert found(tmp_path / "all.png") == {"other": expected(400, 0, 2000, 1200)}
    assert not caplog.records
