"""Real labelled IHC images of several laboratories: the images, their truth, a simple baseline.

The folder is laid out as its README lists; resolutions are assumed from the size of nuclei where no
file states them. Nothing of it belongs to the project.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from _resolutions import MPP
from scipy import ndimage
from skimage import feature, filters, segmentation

from hemera.imaging.artefacts import artefact_pixels
from hemera.imaging.background import measure_background
from hemera.masks import label_format
from hemera.masks.engine import Engine
from hemera.masks.stain.stains import Stains

RGB = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]

POSITIVE, NEGATIVE, UNSIGNED = 1, 2, 3
RUIFROK = np.array([[0.650, 0.704, 0.286], [0.268, 0.570, 0.776]])


@dataclasses.dataclass(frozen=True)
class Image:
    """One image and what is known about it.

    `points` (N, 2) are centres of nuclei in pixels and `signs` (N,) their sign; `objects` (H, W)
    are numbered nuclei and `pixels` (H, W) nuclear pixels; `score` is the HER2 score 0 to 3 and
    `membrane` (H, W) the strongly stained membrane. None: not known.
    """

    source: str
    name: str
    rgb: RGB
    mpp: float
    points: npt.NDArray[np.float64] | None = None
    signs: npt.NDArray[np.int64] | None = None
    objects: Labels | None = None
    pixels: Mask | None = None
    score: int | None = None
    membrane: Mask | None = None


def picture(path: Path, flag: int = cv2.IMREAD_COLOR) -> RGB:
    """Read an image as RGB or, with another flag, gray."""
    found = cv2.imread(str(path), flag)
    assert found is not None, path
    return np.ascontiguousarray(found[..., ::-1]) if found.ndim == 3 else found  # type: ignore[return-value]


def images(folder: Path, source: str) -> Iterator[Image]:
    """Return the images of a source, by name."""
    readers = {"bcdata": _points, "shidc": _points, "glioma": _glioma, "deepliif": _deepliif,
               "membrane": _membranes}  # fmt: skip
    return readers.get(source, _scored)(folder, source)


def _points(folder: Path, source: str) -> Iterator[Image]:
    for path in sorted((folder / f"ki67_{source}").glob("*.json")):
        marks = json.loads(path.read_text())
        file = next(f for f in (path.with_suffix(s) for s in (".png", ".jpg")) if f.exists())
        points = np.array([[m["x"] + 0.5, m["y"] + 0.5] for m in marks], float).reshape(-1, 2)
        signs = np.array([m["label_id"] for m in marks])
        yield Image(source, path.stem, picture(file), MPP[source], points, signs)


def _numbered(
    first: Mask, second: Mask
) -> tuple[Labels, npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Number the pieces of positive and of negative nuclei; return also their centres and signs."""
    positive, p = ndimage.label(first, np.ones((3, 3)))
    negative, n = ndimage.label(second, np.ones((3, 3)))
    objects = np.where(positive > 0, positive, np.where(negative > 0, negative + p, 0))
    centres = [
        np.array(ndimage.center_of_mass(lab > 0, lab, range(1, k + 1))).reshape(-1, 2)[:, ::-1]
        + 0.5
        for lab, k in ((positive, p), (negative, n))
    ]
    signs = np.repeat([POSITIVE, NEGATIVE], [p, n])
    return objects.astype(np.int32), np.vstack(centres), signs


def _glioma(folder: Path, source: str) -> Iterator[Image]:
    for path in sorted((folder / "ki67_glioma").glob("*_original.jpg")):
        masks = [
            picture(path.with_name(path.name.replace("original.jpg", f"mask_{s}.png")), 0) > 127
            for s in ("positive", "negative")
        ]
        objects, points, signs = _numbered(*masks)
        name = path.stem.removesuffix("_original")
        yield Image(source, name, picture(path), MPP[source], points, signs, objects, objects > 0)


def _deepliif(folder: Path, source: str) -> Iterator[Image]:
    own = folder / "deepliif"
    pairs = [
        (path.stem, picture(path), picture(own / "test_groundtruth" / path.name))
        for path in sorted((own / "test_ihc").glob("*.png"))
    ]
    for path in sorted((own / "train").glob("*.png")):
        strip = picture(path)
        side = strip.shape[0]
        pairs.append((path.stem, np.ascontiguousarray(strip[:, :side]), strip[:, -side:]))
    for name, rgb, truth in pairs:
        inner, points, signs = _numbered(truth[..., 0] > 128, truth[..., 2] > 128)
        pixels = truth.max(axis=2) > 128
        apart, at = ndimage.distance_transform_edt(inner == 0, return_indices=True)
        objects = np.where(pixels & (apart <= 4), inner[at[0], at[1]], 0)
        yield Image(source, name, rgb, MPP[source], points, signs, objects, pixels)


def _scored(folder: Path, source: str) -> Iterator[Image]:
    patterns = {"tma": ("her2_tma/*.jpg",), "fields": ("her2_fields/*.jpg",),
                "bci": ("bci_ihc_only_1024/IHC/*/*.png", "bci_pairs_1024/IHC/*/*.png")}  # fmt: skip
    for pattern in patterns[source]:
        for path in sorted(folder.glob(pattern)):
            stem = path.stem
            score = int(stem[0] if source == "tma" else re.split("_", stem)[-1][0])
            rgb = picture(path)
            mpp = MPP[source] * (1280 / rgb.shape[1] if source == "fields" else 1)
            yield Image(source, stem[:16], rgb, mpp, score=score)


def _membranes(folder: Path, source: str) -> Iterator[Image]:
    for path in sorted((folder / "her2_membrane_128").glob("*.png")):
        if path.stem.endswith("_mask"):
            continue
        mask = picture(path.with_name(f"{path.stem}_mask.png"), 0) > 127
        yield Image(source, path.stem, picture(path), MPP[source], membrane=mask)


def prepared(engine: Engine, tiles: Sequence[RGB], mpp: float) -> Stains:
    """Return the stains of tiles without their artefacts, as stage mask does."""
    background = measure_background(tiles, mpp).color
    without = [artefact_pixels(tile, mpp, background) for tile in tiles]
    state: Stains = engine.prepare(tiles, mpp, background, without)
    return state


def labelled(engine: Engine, rgb: RGB, mpp: float, state: Stains) -> label_format.Labelled:
    """Label a tile and exclude its artefacts, as stage mask does."""
    artefacts = artefact_pixels(rgb, mpp, state.background)
    found = engine.segment(rgb, mpp, state, artefacts)
    return found if artefacts is None else label_format.exclude(found, artefacts)


def numbered_nuclei(mask: RGB) -> Labels:
    """Return the nuclei of a label image by number: pieces without their boundaries, grown back."""
    nuclear = label_format.nuclei(mask)
    inner = nuclear & (label_format.classes(mask) != label_format.BOUNDARY)
    pieces, _ = ndimage.label(inner)
    if not inner.any():
        return pieces.astype(np.int32)
    at = ndimage.distance_transform_edt(~inner, return_distances=False, return_indices=True)
    return np.where(nuclear, pieces[at[0], at[1]], 0).astype(np.int32)


# --- the simple baseline


def _unmixing() -> npt.NDArray[np.float32]:
    unit = RUIFROK / np.linalg.norm(RUIFROK, axis=1, keepdims=True)
    rest = np.cross(*unit)
    return np.linalg.inv(np.vstack([unit, rest / np.linalg.norm(rest)])).astype(np.float32)


def densities(rgb: RGB, background: npt.ArrayLike | None = None) -> npt.NDArray[np.float32]:
    """Return optical densities (H, W, 3) against the 99th percentile of every channel."""
    if background is None:
        background = np.percentile(rgb[::4, ::4].reshape(-1, 3), 99, axis=0)
    ratio = np.maximum(np.asarray(background, float), 1) / np.clip(rgb.astype(np.float32), 1, 255)
    return np.log10(ratio).astype(np.float32)


def dab(rgb: RGB, background: npt.ArrayLike | None = None) -> npt.NDArray[np.float32]:
    """Return the density of DAB (H, W) along the vectors of Ruifrok and Johnston."""
    return np.ascontiguousarray((densities(rgb, background) @ _unmixing())[..., 1])


def baseline_nuclei(rgb: RGB, mpp: float) -> tuple[npt.NDArray[np.void], Labels]:
    """Otsu on the logarithm of red density, watershed on the distance; DAB above haematoxylin.

    Returns:
        Cells with x, y (px) and positive, and their labels (H, W).
    """
    height, width = rgb.shape[:2]
    scale = min(1.0, mpp / 0.25)
    small = rgb
    if scale < 0.9:
        size = round(width * scale), round(height * scale)
        small = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
    m = mpp * width / small.shape[1]
    density = densities(small)
    logs = np.log(np.maximum(cv2.GaussianBlur(density[..., 0], (0, 0), 0.4 / m), 1e-3))
    inside = logs > filters.threshold_otsu(logs[logs > np.log(0.02)])
    side = 2 * round(0.75 / m) + 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    inside = cv2.morphologyEx(inside.astype(np.uint8), cv2.MORPH_OPEN, kernel) > 0
    pieces, _ = ndimage.label(ndimage.binary_fill_holes(inside))
    kept = np.bincount(pieces.ravel()) * m * m >= 12
    kept[0] = False
    inside = kept[pieces]
    distance = cv2.distanceTransform(inside.astype(np.uint8), cv2.DIST_L2, 5)
    distance = cv2.GaussianBlur(distance, (0, 0), 0.5 / m)
    peaks = feature.peak_local_max(
        distance, min_distance=max(1, round(2.5 / m)), threshold_abs=1 / m,
        labels=ndimage.label(inside)[0],
    )  # fmt: skip
    markers = np.zeros(inside.shape, np.int32)
    markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    labels = segmentation.watershed(-distance, markers, mask=inside).astype(np.int32)
    count = len(peaks)
    stains = density @ _unmixing()
    means = [np.bincount(labels.ravel(), stains[..., k].ravel(), count + 1)[1:] for k in (0, 1)]
    centres = np.array(ndimage.center_of_mass(labels > 0, labels, range(1, count + 1)))
    cells = np.zeros(count, [("x", "f4"), ("y", "f4"), ("positive", "?")])
    if count:
        cells["y"], cells["x"] = ((centres + 0.5) * width / small.shape[1]).T
    cells["positive"] = means[1] > means[0]
    if small is not rgb:
        labels = cv2.resize(
            labels.astype(np.float32), (width, height), interpolation=cv2.INTER_NEAREST
        )
    return cells, labels.astype(np.int32)


def dab_percentile(rgb: RGB, mpp: float, percent: float = 95) -> float:
    """Return a percentile of DAB where there is tissue, at 0.5 um/px; 0 without tissue."""
    height, width = rgb.shape[:2]
    scale = min(1.0, mpp / 0.5)
    size = round(width * scale), round(height * scale)
    small = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
    density = cv2.GaussianBlur(densities(small), (0, 0), 1.0)  # type: ignore[arg-type]
    tissue = density.sum(axis=2) > 0.15
    values = (density @ _unmixing())[..., 1][tissue]
    return float(np.percentile(values, percent)) if len(values) else 0.0
