"""Artefacts that another program found: masks of HistoQC and GrandQC, other masks, GeoJSON.

Classes of GrandQC, by number in its mask and by name in its GeoJSON: 1 Normal Tissue, 2 Fold,
3 Darkspot & Foreign Object, 4 PenMarking, 5 Edge & Air Bubble, 6 OOF (out of focus), 7 Background;
0 is a margin that it did not process. HistoQC's `*_mask_use.png` is not 0 where tissue is usable.
"""

import logging
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import shapely
from skimage.draw import polygon

from hemera.errors import HemeraError, SheetError, SlideError
from hemera.files.geojson import read_features, read_polygons
from hemera.imaging.artefacts import KINDS
from hemera.imaging.label_images import read_labels

log = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]

GEOJSON_SUFFIXES = (".geojson", ".json")
USABLE_SUFFIX = "_mask_use.png"
"""End of the name of HistoQC's mask of usable tissue."""
ASPECT_TOLERANCE = 0.02
"""Relative difference of the proportions of a mask and of its slide: GrandQC rounds its tiles."""
TISSUE_MAX = 0.5
"""Largest fraction of the tissue that 1 covers in a mask of 0 and 1 where 1 is an artefact."""
OUTSIDE_MAX = 0.01
"""Largest fraction of the area of polygons beyond the slide; above it, a warning."""
CORNER = 1 / 16
"""Polygons that are all in this fraction of the width and height are probably no level-0 pixels."""

_OTHER = 1 + KINDS.index("other")
_GRANDQC = (None, None, "fold", "dust", "pen", "edge", "blur", None)
_NAMES = {
    "normal tissue": None,
    "fold": "fold",
    "darkspot & foreign object": "dust",
    "penmarking": "pen",
    "edge & air bubble": "edge",
    "oof": "blur",
    "out of focus": "blur",
    "background": None,
} | {kind: kind for kind in KINDS}


def read_artefacts(
    path: Path, size_px: tuple[int, int], tissue: npt.NDArray[np.bool_], column: str
) -> Bytes:
    """Read the artefacts of a slide from a mask of all of it, of any scale, or from GeoJSON.

    In a mask, every value but 0 is an artefact of kind `other`, with two exceptions: a file of
    HistoQC named `*_mask_use.png`, of which the tissue that it does not use is an artefact; and
    numbers up to 7 with one above 1, which are classes of GrandQC. A mask of 0 and 1 whose 1 covers
    most of the tissue may be one of GrandQC without artefacts and background, and is refused. The
    polygons of a GeoJSON file, level-0 pixels, are of the kind that their class names, else
    `other`.

    Args:
        size_px: (width, height) of the slide.
        tissue: (H, W), its tissue from edge to edge; the result has the same pixels.
        column: of the sheet, for messages.

    Returns:
        (H, W): 0, or 1 and the place of the artefact in `KINDS`.

    Raises:
        SlideError: the file is missing, cannot be read, is not of the whole slide, or has two
            meanings.
    """
    if not path.is_file():
        raise SlideError(f"{path}: no such file; correct {column} in the sheet, or leave it empty")
    try:
        if path.suffix.lower() in GEOJSON_SUFFIXES:
            return _drawn(path, size_px, tissue.shape)
        with tempfile.TemporaryDirectory() as folder:
            labels = np.array(read_labels(path, Path(folder)))
    except HemeraError as error:
        raise SlideError(f"{column}: {error}") from error
    height, width = labels.shape
    wide = width * size_px[1] / (height * size_px[0])
    # A pixel more or less is rounding.
    if abs(wide - 1) > ASPECT_TOLERANCE + 1 / min(height, width):
        raise SlideError(
            f"{column}: {path.name} has {width} x {height} px, which are not the proportions of "
            f"the slide of {size_px[0]} x {size_px[1]} px ({ASPECT_TOLERANCE:.0%} difference at "
            "most); give a mask of the whole slide, at any scale"
        )
    kinds = np.where(labels != 0, _OTHER, 0).astype(np.uint8)
    if path.name.endswith(USABLE_SUFFIX):
        kinds = np.where(labels == 0, _OTHER, 0).astype(np.uint8)
    elif 1 < labels.max() < len(_GRANDQC):
        kinds = np.array([_number(name) for name in _GRANDQC], np.uint8)[labels]
    elif kinds.all():
        raise SlideError(
            f"{column}: {path.name} is 0 nowhere, so that all of the image would be an artefact; "
            "give a mask that is 0 where there is none, or leave the column empty"
        )
    kinds = np.asarray(
        cv2.resize(kinds, tissue.shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT), np.uint8
    )
    covered = float((kinds[tissue] > 0).mean()) if tissue.any() else 0.0
    if labels.max() == 1 and covered > TISSUE_MAX and not path.name.endswith(USABLE_SUFFIX):
        raise SlideError(
            f"{column}: {path.name} has the values 0 and 1, and 1 covers {covered:.0%} of the "
            "tissue; in a mask of GrandQC, 1 is tissue without artefacts: leave the column empty "
            "then, or give a mask of artefacts as 0 and 255"
        )
    # HistoQC does not use the background either.
    return kinds * tissue.view(np.uint8) if path.name.endswith(USABLE_SUFFIX) else kinds


def _number(kind: str | None) -> int:
    return 0 if kind is None else 1 + KINDS.index(kind)


def _drawn(path: Path, size_px: tuple[int, int], shape: tuple[int, ...]) -> Bytes:
    """Return the kinds (H, W) of the polygons of a file, at the centres of the pixels."""
    document, features = read_features(path)
    kinds = np.zeros(shape, np.uint8)
    scale = np.array(shape[::-1]) / size_px
    for feature in features:
        number = _number(_NAMES.get(_class(feature.item).lower(), "other"))
        parts = shapely.get_parts(shapely.get_parts(list(feature.shapes.values())))
        for part in parts if number else ():
            if isinstance(part, shapely.Polygon):
                rings = [
                    np.array(ring.coords) * scale - 0.5 for ring in (part.exterior, *part.interiors)
                ]
                outer, *holes = (polygon(ring[:, 1], ring[:, 0], shape) for ring in rings)
                below = [kinds[hole] for hole in holes]
                kinds[outer] = number
                for hole, before in zip(holes, below, strict=True):
                    kinds[hole] = before
    if features:
        _check_frame(path, document, size_px, bool(kinds.any()))
    return kinds


def _check_frame(path: Path, document: Any, size_px: tuple[int, int], drawn: bool) -> None:
    """Raise an error, or log a warning, where polygons are not level-0 pixels of the slide.

    `drawn`: at least one covers a pixel of the outline.
    """
    # An error where there are features, yet no polygon.
    polygons = read_polygons(path)
    slide = shapely.box(0, 0, *size_px)
    x0, y0, x1, y1 = shapely.total_bounds(polygons)
    given = f"x {x0:.7g} to {x1:.7g}, y {y0:.7g} to {y1:.7g}"
    words = f"{path.name}: the polygons ({given}) %s the slide of {size_px[0]} x {size_px[1]} px"
    remedy = "export them in level-0 pixels, from the top left"
    corner = x0 >= 0 and x1 <= CORNER * size_px[0] and y0 >= 0 and y1 <= CORNER * size_px[1]
    if not shapely.intersects(polygons, slide).any():
        raise SheetError(f"{words % 'do not touch'}; {remedy}")
    if corner and not drawn:
        raise SheetError(f"{words % 'cover nothing of'}; {remedy}")
    if corner:
        log.warning("%s; %s", words % "are all in the top left corner of", remedy)
    # Of the bounding boxes: polygons that cross themselves have no area.
    boxes = shapely.box(*shapely.bounds(polygons).T)
    area = float(shapely.area(boxes).sum())
    outside = area - float(shapely.area(shapely.intersection(boxes, slide)).sum())
    if outside > OUTSIDE_MAX * area:
        log.warning("%s; %s", words % f"are {outside / area:.0%} outside", remedy)
    crs = document.get("crs") if isinstance(document, dict) else None
    if crs is not None and "pixel" not in str(crs).lower():
        log.warning("%s: its crs %.80s is not that of pixels; %s", path.name, crs, remedy)


def _class(item: Any) -> str:
    """Return the name of a feature's class: a text as of GrandQC, or in an object as of QuPath."""
    given = (item.get("properties") or {}).get("classification") or ""
    return str(given.get("name", "") if isinstance(given, dict) else given)
