"""Files transferred between the slides of a pair: points, annotations, labels, the HER2 slide."""

import contextlib
import functools
import json
import logging
import math
import tempfile
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from tqdm import tqdm

from hemera.errors import ConfigError, RegistrationError, TableError
from hemera.files.atomic import write_text
from hemera.files.geojson import read_features, with_features
from hemera.imaging.geometry import same_mpp
from hemera.imaging.label_images import TIFF_SUFFIXES, read_labels, write_labels
from hemera.imaging.pyramid import TILE_PX, tile_count, write_pyramid
from hemera.imaging.slide import open_slide
from hemera.imaging.tolerant import Losses, read_tiles
from hemera.registration.annotations import transform_features
from hemera.registration.landmarks import coordinates_of, read_cells
from hemera.registration.registered_pair import PairSlide, RegisteredPair
from hemera.registration.warping import lattice_px, read_displaced, warp_labels
from hemera.sheet import MPP_BOUNDS

log = logging.getLogger(__name__)

BAD_TILES_MAX = 0.10
"""A warped slide of which a larger fraction of the tiles cannot be read is refused."""

ANISOTROPY_MAX = 0.02
"""A label image whose pixels are less square than that may belong to another slide."""

_NAMES = {"he": "H&E", "her2": "HER2"}
_NAMED_MAX = 10


def transform_points(source: Path, output: Path, pair: RegisteredPair, to: str) -> None:
    """Transform the columns X and Y of a CSV file, level-0 pixels; the other columns are kept.

    X and Y of the output are empty where there is no corresponding point.
    """
    table = read_cells(source)
    columns = [_column(table, name, source) for name in "xy"]
    points = coordinates_of(source, table, columns)
    given = np.isfinite(points).all(axis=1)
    result = np.full_like(points, np.nan)
    result[given] = pair.transform_px(points[given], to)
    for column, values in zip(columns, result.T, strict=True):
        table[column] = ["" if math.isnan(value) else f"{value:.3f}" for value in values]
    write_text(output, table.to_csv(index=False, lineterminator="\n"))
    lost = int(np.isnan(result[given, 0]).sum())
    log.info("%s: %d points on %s", output, given.sum() - lost, _NAMES[to])
    if lost:
        log.warning(
            "%s: %d points have no corresponding point on %s", source.name, lost, _NAMES[to]
        )


def _column(table: pd.DataFrame, name: str, source: Path) -> str:
    found = [column for column in table.columns if column.strip().lower() == name]
    if len(found) != 1:
        raise TableError(
            f"{source.name}: {len(found) or 'no'} columns {name.upper()}; give one X and one Y, in "
            "level-0 pixels, separated by commas"
        )
    return str(found[0])


def transform_annotations(
    source: Path, output: Path, pair: RegisteredPair, to: str, *, tolerance_px: float = 0.1
) -> None:
    """Transform the geometries of a GeoJSON file, level-0 pixels; all else is kept.

    An edge deviates by `tolerance_px` at most from its curve on the other slide.
    """
    document, features = read_features(source)

    transform = functools.partial(pair.transform_px, to=to)
    step_px = pair.displacement.mpp / pair.ends(to)[0].mpp
    transformed = transform_features(
        features, transform, tolerance_px=tolerance_px, step_px=step_px
    )
    results = list(_shown(transformed, pair, len(features), "feature"))
    changed = with_features(document, [item for item, _ in results if item is not None])
    if changed is None:
        raise RegistrationError(
            f"{source.name}: no vertex has a corresponding point on {_NAMES[to]}; inspect the "
            "pair in the report"
        )
    write_text(output, json.dumps(changed) + "\n")
    left_out = [
        feature.title for feature, (item, _) in zip(features, results, strict=True) if item is None
    ]
    log.info("%s: %d features on %s", output, len(features) - len(left_out), _NAMES[to])
    cut = sum(lost and item is not None for item, lost in results)
    if cut:
        words = "%s: %d features are cut where they have no corresponding points on %s"
        log.warning(words, source.name, cut, _NAMES[to])
    if left_out:
        named = ", ".join(left_out[:_NAMED_MAX])
        log.warning("%s: %d features are left out: %s", source.name, len(left_out), named)


def transform_labels(
    source: Path, output: Path, pair: RegisteredPair, to: str, *, mpp: float | None = None
) -> None:
    """Transform a label image, nearest neighbour; it covers its slide from edge to edge.

    The output is a TIFF with the resolution `mpp`, None: that of `source`.
    """
    begin, end = pair.ends(to)
    _check_tiff(output)
    if mpp is not None:
        _check_mpp(mpp, end)
    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output: the labels may be larger than the memory and the system's temporary folder.
    with tempfile.TemporaryDirectory(prefix=".", dir=output.parent) as folder:
        labels = read_labels(source, Path(folder))
        height, width = labels.shape
        label_um = begin.size_um[0] / width, begin.size_um[1] / height
        if abs(label_um[0] / label_um[1] - 1) > ANISOTROPY_MAX + 1 / min(width, height):
            log.warning(
                "%s: %d x %d px do not have the proportions of %s, %d x %d px; give its labels",
                source.name, width, height, begin.path.name, *begin.size_px,
            )  # fmt: skip
        wanted = math.sqrt(label_um[0] * label_um[1]) if mpp is None else mpp
        size = max(1, round(end.size_um[0] / wanted)), max(1, round(end.size_um[1] / wanted))
        pixel_um = end.size_um[0] / size[0], end.size_um[1] / size[1]
        step = lattice_px(pair.displacement, min(pixel_um))

        back = functools.partial(pair.transform_um, to="he" if to == "her2" else "her2")
        places = _places(size)
        tiles = (
            warp_labels(
                labels, back, x, y, size_px=TILE_PX, pixel_um=pixel_um, label_um=label_um,
                lattice_px=step,
            )
            for x, y in places
        )  # fmt: skip
        shown = _shown(tiles, pair, len(places), "tile")
        write_labels(output, shown, size_px=size, dtype=labels.dtype, pixel_um=pixel_um)
    log.info("%s: %d x %d px at %.4g um/px on %s", output, *size, wanted, _NAMES[to])


def write_warped_slide(
    output: Path,
    pair: RegisteredPair,
    *,
    mpp: float | None = None,
    quality: int = 90,
    workers: int = 2,
) -> None:
    """Write HER2 on the grid of H&E as a pyramidal OME-TIFF.

    Args:
        mpp: resolution of the result; None: that of H&E.
        workers: threads; any number gives the same bytes.
    """
    he, her2 = pair.he, pair.her2
    _check_tiff(output)
    if mpp is None or same_mpp(mpp, he.mpp):
        mpp, size = he.mpp, he.size_px
    else:
        _check_mpp(mpp, he if he.mpp < her2.mpp else her2)
        size = math.ceil(he.size_um[0] / mpp - 1e-6), math.ceil(he.size_um[1] / mpp - 1e-6)
    grid_mpp, places = mpp, _places(size)
    losses = Losses(her2.path.name, len(places), BAD_TILES_MAX)
    with open_slide(her2.path, mpp=her2.mpp) as slide:

        def read(place: tuple[int, int]) -> npt.NDArray[np.uint8]:
            left_um, top_um = place[0] * grid_mpp, place[1] * grid_mpp
            pixels, *_ = read_displaced(
                slide, pair.displacement, left_um, top_um, size_px=TILE_PX, mpp=grid_mpp
            )
            return pixels

        def tiles() -> Generator[npt.NDArray[np.uint8], None, None]:
            empty = np.full((TILE_PX, TILE_PX, 3), slide.background, np.uint8)
            with contextlib.closing(read_tiles(read, places, workers, losses)) as results:
                for pixels in results:
                    yield empty if pixels is None else pixels

        with contextlib.closing(tiles()) as made:
            shown = _shown(made, pair, len(places), "tile")
            write_pyramid(
                output, shown, size_px=size, mpp=mpp, quality=quality,
                name=f"{pair.name}: HER2 on H&E",
            )  # fmt: skip
    if losses.lost:
        log.warning(
            "%s: %d of %d tiles cannot be read and show the background; the first: %s",
            output, losses.lost, len(places), losses.first,
        )  # fmt: skip
    log.info("%s: %d x %d px at %.4g um/px", output, *size, mpp)


def _shown(items: Iterable[Any], pair: RegisteredPair, total: int, unit: str) -> Iterable[Any]:
    return tqdm(items, pair.name, total, unit=unit, disable=None, leave=False)


def _places(size_px: tuple[int, int]) -> list[tuple[int, int]]:
    across, down = tile_count(size_px)
    return [(x * TILE_PX, y * TILE_PX) for y in range(down) for x in range(across)]


def _check_tiff(output: Path) -> None:
    if output.suffix.lower() not in TIFF_SUFFIXES:
        raise ConfigError(f"{output.name}: the result is a TIFF; name it .tif")


def _check_mpp(mpp: float, slide: PairSlide) -> None:
    coarsest = MPP_BOUNDS[1]
    if (mpp < slide.mpp and not same_mpp(mpp, slide.mpp)) or mpp > coarsest:
        raise ConfigError(
            f"--mpp {mpp:g}: {slide.path.name} has {slide.mpp:.4g} um/px; give that or more, up to "
            f"{coarsest:g}"
        )
