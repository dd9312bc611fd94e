"""Annotations in GeoJSON, as QuPath and others export them.

Frame: level-0 pixels of a slide, unshifted by its bounds, edges at the integers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hemera.errors import SheetError


def read_polygons(path: Path) -> list[list[npt.NDArray[np.float64]]]:
    """Read the polygons of a GeoJSON file, as QuPath and others export it.

    Args:
        path: a geometry, a feature, a collection or a list of these, in level-0 pixels of H&E.

    Returns:
        Of each polygon its outer ring and its holes, (M, 2) points (x, y).

    Raises:
        SheetError: when it is not GeoJSON or holds no polygon.
    """
    found: list[list[npt.NDArray[np.float64]]] = []

    def collect(node: Any) -> None:
        if isinstance(node, list):
            for item in node:
                collect(item)
            return
        kind = node.get("type")
        if kind == "FeatureCollection":
            collect(node["features"])
        elif kind == "Feature":
            collect(node["geometry"] or [])
        elif kind == "GeometryCollection":
            collect(node["geometries"])
        elif kind == "Polygon":
            found.append([_ring(ring) for ring in node["coordinates"]])
        elif kind == "MultiPolygon":
            found.extend([_ring(ring) for ring in rings] for rings in node["coordinates"])

    try:
        collect(json.loads(path.read_text()))
    except FileNotFoundError:
        raise SheetError(f"{path}: no such file; correct roi in pairs.tsv") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise SheetError(
            f"{path.name}: not GeoJSON ({' '.join(str(error).split())}); export the "
            "annotation again"
        ) from error
    found = [rings for rings in found if rings]
    if not found:
        raise SheetError(f"{path.name}: holds no polygon; draw the region as an area")
    return found


def _ring(points: Any) -> npt.NDArray[np.float64]:
    ring = np.asarray(points, np.float64)
    if ring.ndim != 2 or ring.shape[1] < 2 or len(ring) < 3 or not np.isfinite(ring).all():
        raise ValueError("a ring needs three points [x, y] or more")
    return ring[:, :2]
