"""Grows tissue: outlines on a coarse grid, then cells with shapes, kinds and HER2 expression.

Everything is in um of the H&E frame, so the same tissue is drawn at any resolution.

The same seed has to give the same bytes. The last digits of OpenCV's blur of floats depend on
memory alignment, so smoothing here uses whole numbers or a Fourier transform.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import cv2
import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

Array = npt.NDArray[np.float32]

GRID_UM = 3.0
"""Spacing of the coarse grid."""

SPINDLE, LYMPHOCYTE, EPITHELIUM, TUMOUR, FAT = range(5)
"""Kinds of cells."""

EXPRESSION = {
    "0": (1.0, 0.0, 0.0, 0.0),
    "1+": (0.50, 0.43, 0.07, 0.0),
    "2+": (0.26, 0.22, 0.47, 0.05),
    "3+": (0.22, 0.08, 0.15, 0.55),
}
"""Fractions of tumour cells of intensity 0, 1, 2, 3 in a slide of each score."""


@dataclasses.dataclass(frozen=True)
class Cells:
    """Every cell of a tissue; arrays of one length, lengths in um, in the H&E frame."""

    x: Array
    y: Array
    kind: npt.NDArray[np.uint8]
    long_radius: Array
    short_radius: Array
    angle: Array
    chromatin: Array
    vesicular: Array
    nucleolus: Array
    cytoplasm: Array
    intensity: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        """Number of cells."""
        return len(self.x)


@dataclasses.dataclass(frozen=True)
class Tissue:
    """A piece of tissue: outlines as signed distances (um, positive inside) on the coarse grid."""

    size_um: tuple[float, float]
    score: str
    outline: Array
    epithelium: Array
    lumen: Array
    fat: Array
    loose: Array
    cleft: Array
    waves: Array
    fibre_angles: tuple[float, float]
    fat_seeds: Array
    cells: Cells


def smooth_noise(
    rng: np.random.Generator, shape: tuple[int, int], wavelength_nodes: float
) -> Array:
    """Return smooth noise (H, W) of mean 0 and variance 1 in expectation."""
    step = max(wavelength_nodes / 2, 1.0)
    rows, columns = (int(np.ceil(side / step)) + 5 for side in shape)
    coarse = rng.standard_normal((rows, columns)).astype(np.float32)
    full = cv2.resize(
        coarse, (int(columns * step), int(rows * step)), interpolation=cv2.INTER_CUBIC
    )
    margin = int(step)
    part = full[margin : margin + shape[0], margin : margin + shape[1]]
    return np.asarray(part * np.float32(1.35), dtype=np.float32)


def signed_distance(inside: npt.NDArray[np.bool_]) -> Array:
    """Return the distance (um) to the border of a region of the coarse grid, positive inside."""
    padded = np.pad(inside.astype(np.uint8), 1, mode="edge")
    within = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    outside = cv2.distanceTransform(1 - padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # With no pixel of the other class the transform is huge: far away is far enough. Squares are
    # whole numbers, whatever the last digit of a root; whole 64ths make the smoothing exact.
    near, far = (np.sqrt(np.rint(np.square(np.clip(d, 0, 300)))) for d in (within, outside))
    distance = np.rint((near - far) * 64)
    smooth = distance[:, :-2] + 2 * distance[:, 1:-1] + distance[:, 2:]
    smooth = smooth[:-2] + 2 * smooth[1:-1] + smooth[2:]
    return np.asarray(smooth * np.float32(GRID_UM / 1024), dtype=np.float32)


def _hexagons(
    rng: np.random.Generator, size_um: tuple[float, float], spacing: float, jitter: float
) -> npt.NDArray[np.float64]:
    """Return points (N, 2) of a jittered hexagonal grid over the area."""
    height = spacing * np.sqrt(3) / 2
    rows, columns = int(size_um[1] / height) + 2, int(size_um[0] / spacing) + 2
    row, column = np.mgrid[0:rows, 0:columns]
    points = np.stack([(column + 0.5 * (row % 2)) * spacing, row * height], axis=-1).reshape(-1, 2)
    points = points + rng.normal(0, jitter * spacing, points.shape)
    inside = (points > 1).all(axis=1) & (points < np.array(size_um) - 1).all(axis=1)
    return np.asarray(points[inside], dtype=np.float64)


def sample(field: Array, points: npt.NDArray[np.floating]) -> Array:
    """Read a coarse field bilinearly at points (N, 2), um."""
    position = np.asarray(points, dtype=np.float32) / np.float32(GRID_UM) - np.float32(0.5)
    # remap takes no image of more than 32,767 rows: fold the list into a rectangle.
    count = len(position)
    width = 1024
    rows = -(-count // width) if count else 1
    folded = np.zeros((rows * width, 2), np.float32)
    folded[:count] = position
    map_x = np.ascontiguousarray(folded[:, 0]).reshape(rows, width)
    map_y = np.ascontiguousarray(folded[:, 1]).reshape(rows, width)
    values = cv2.remap(field, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(values.reshape(-1)[:count], dtype=np.float32)


def _without_crumbs(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Remove components of less than a fiftieth of the largest one."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    areas = stats[:, cv2.CC_STAT_AREA].copy()
    areas[0] = 0
    return np.asarray((areas > areas.max() / 50)[labels], dtype=bool)


def _glands(
    rng: np.random.Generator,
    shape: tuple[int, int],
    where: Array,
    size_um: tuple[float, float],
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Paint ducts with a lumen where `where` is positive; return their outer and lumen masks."""
    outer = np.zeros(shape, bool)
    lumen = np.zeros(shape, bool)
    ripple = smooth_noise(rng, shape, 36 / GRID_UM)
    centres = _hexagons(rng, size_um, 125.0, 0.16)
    for (x, y), value in zip(centres, sample(where, centres), strict=True):
        radius = rng.uniform(26, 60)
        stretch = rng.uniform(0.7, 1.4)
        angle = rng.uniform(0, np.pi)
        wall = rng.uniform(11, 19)
        if value <= 0:
            continue
        reach = radius * 1.6
        j0, j1 = (int(np.clip((x + d) / GRID_UM, 0, shape[1])) for d in (-reach, reach))
        i0, i1 = (int(np.clip((y + d) / GRID_UM, 0, shape[0])) for d in (-reach, reach))
        i, j = np.mgrid[i0:i1, j0:j1]
        dx, dy = (j + 0.5) * GRID_UM - x, (i + 0.5) * GRID_UM - y
        u = (dx * np.cos(angle) + dy * np.sin(angle)) / stretch
        v = (-dx * np.sin(angle) + dy * np.cos(angle)) * stretch
        inside = radius - np.hypot(u, v) + 4.5 * ripple[i0:i1, j0:j1]
        outer[i0:i1, j0:j1] |= inside > 0
        lumen[i0:i1, j0:j1] &= inside < -4
        lumen[i0:i1, j0:j1] |= inside > wall + 2 * ripple[i0:i1, j0:j1]
    return outer, lumen


def grow(
    rng: np.random.Generator,
    size_um: tuple[float, float],
    score: str,
    *,
    whole: bool,
    empty: bool = False,
) -> Tissue:
    """Grow one tissue.

    Args:
        rng: every choice is drawn from it.
        size_um: width and height of the H&E image.
        score: HER2 score of the slide; sets the fractions of cells of each intensity.
        whole: a whole section with background around it; else tissue from edge to edge.
        empty: almost only background.
    """
    shape = (int(np.ceil(size_um[1] / GRID_UM)), int(np.ceil(size_um[0] / GRID_UM)))
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float32)
    x = (x + 0.5) * GRID_UM - size_um[0] / 2
    y = (y + 0.5) * GRID_UM - size_um[1] / 2

    def noise(wavelength_um: float) -> Array:
        return smooth_noise(rng, shape, wavelength_um / GRID_UM)

    outline = _outline(rng, noise, x, y, size_um, whole=whole, empty=empty)
    fields, nests, bed = _regions(rng, noise, outline, size_um, whole=whole)
    loose = (0.8 * noise(300) + 0.5 * noise(90)).astype(np.float32)
    cleft = (0.9 * noise(130) + 0.4 * noise(40) - 0.35).astype(np.float32)
    angles = (rng.uniform(0, np.pi), rng.uniform(0.9, 1.9))
    fibre_angles = (angles[0], angles[0] + angles[1])
    # Displacements (x, y) that bend the fibres, and which of two families is on top.
    waves = np.stack(
        [
            26 * noise(330) + 7 * noise(95) + 2.2 * noise(34),
            26 * noise(330) + 7 * noise(95) + 2.2 * noise(34),
            1.6 * noise(200),
        ],
        axis=-1,
    ).astype(np.float32)
    # Ducts inside the bed are malignant; elsewhere they are normal glands.
    malignant = np.where(nests, 1.0, bed + 0.15).astype(np.float32)
    latent = (0.85 * noise(300) + 0.45 * noise(95)).astype(np.float32)
    cells = _cells(
        rng, size_um, score, fields, nests, malignant, latent, noise(210), waves, fibre_angles
    )
    fat_seeds = _hexagons(rng, size_um, 58.0, 0.17).astype(np.float32)
    return Tissue(
        size_um,
        score,
        **fields,
        loose=loose,
        cleft=cleft,
        waves=waves,
        fibre_angles=fibre_angles,
        fat_seeds=fat_seeds,
        cells=cells,
    )


def _outline(
    rng: np.random.Generator,
    noise: Callable[[float], Array],
    x: Array,
    y: Array,
    size_um: tuple[float, float],
    *,
    whole: bool,
    empty: bool,
) -> npt.NDArray[np.bool_]:
    """Return where there is tissue on the coarse grid; `x`, `y` are um from the centre."""
    rough = 0.075 * noise(900) + 0.03 * noise(240) + 0.010 * noise(60) + 0.006 * noise(20)
    if empty:
        return np.asarray((x / size_um[0] - 0.8 * y / size_um[1] - 0.62 + 0.5 * rough) > 0)
    if not whole:
        return np.asarray((noise(260) + 0.5 * noise(70)) > -2.9)
    u, v = np.abs(x / (0.465 * size_um[0])), np.abs(y / (0.455 * size_um[1]))
    radius = u * u * np.sqrt(u) + v * v * np.sqrt(v)
    edge = np.minimum(size_um[0] / 2 - np.abs(x), size_um[1] / 2 - np.abs(y))
    # A notch and a tear, so that no section looks like its own mirror image.
    turn = rng.uniform(0, 2 * np.pi)
    nx, ny = 0.42 * size_um[0] * np.cos(turn), 0.42 * size_um[1] * np.sin(turn)
    notch = 1 / (1 + ((x - nx) / 380) ** 2 + ((y - ny) / 300) ** 2) ** 2
    level = 0.97 - np.sqrt(radius) + rough - 0.35 * notch
    outline = (level > 0) & (edge > 45)
    tear = np.abs(noise(420) - 0.25) - 0.02
    return _without_crumbs(outline & ((tear > 0) | (noise(700) < 0.9)))


def _regions(
    rng: np.random.Generator,
    noise: Callable[[float], Array],
    outline: npt.NDArray[np.bool_],
    size_um: tuple[float, float],
    *,
    whole: bool,
) -> tuple[dict[str, Array], npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """Return signed distances of the regions, the nests of tumour, and the tumour bed's level."""
    bed = noise(760 if whole else 420) + 0.35 * noise(220) + (0.35 if whole else 0.55)
    fat_level = noise(620 if whole else 330) + 0.3 * noise(120) - (1.35 if whole else 1.6) - bed
    fat = (fat_level > 0) & outline
    nest_level = (
        noise(150)
        + 0.55 * noise(62)
        + 0.22 * noise(26)
        + 0.6 * (bed - 0.3) / (1 + np.abs(bed - 0.3))
        - 0.25
    )
    nests = (nest_level > 0) & (bed > 0) & (fat_level < -0.15)
    ducts, lumens = _glands(
        rng, outline.shape, np.where(fat_level < -0.3, noise(340) - 0.45, -1), size_um
    )
    nests &= cv2.dilate(ducts.astype(np.uint8), np.ones((5, 5), np.uint8)) == 0
    epithelium = (nests | ducts) & outline
    lumen = lumens & outline
    fields = {
        "outline": signed_distance(outline),
        "epithelium": signed_distance(epithelium),
        "lumen": signed_distance(lumen),
        "fat": signed_distance(fat & ~epithelium),
    }
    return fields, nests, bed


def _apart(points: npt.NDArray[np.float64], least_um: float) -> npt.NDArray[np.bool_]:
    """Return which points stay when, of two that are too close, the later one yields."""
    keep = np.ones(len(points), bool)
    if len(points):
        close = cKDTree(points).query_pairs(least_um, output_type="ndarray")
        order = np.lexsort((close.min(axis=1), close.max(axis=1)))
        for first, second in np.sort(close[order], axis=1).tolist():
            if keep[first]:
                keep[second] = False
    return keep


def fibre_direction(waves: Array, angle: float) -> Array:
    """Return the direction (radians) of the fibres of one family, on the coarse grid."""
    nx, ny = -np.sin(angle), np.cos(angle)
    across = nx * waves[..., 0].astype(np.float64) + ny * waves[..., 1].astype(np.float64)
    gy, gx = np.gradient(across, GRID_UM)
    return np.asarray(np.arctan2(-(nx + gx), ny + gy), dtype=np.float32)


def _cells(
    rng: np.random.Generator,
    size_um: tuple[float, float],
    score: str,
    fields: dict[str, Array],
    nests: npt.NDArray[np.bool_],
    malignant: Array,
    latent: Array,
    crowd: Array,
    waves: Array,
    fibre_angles: tuple[float, float],
) -> Cells:
    """Place cells by kind, the most particular first, and give each its appearance."""
    fractions = np.array(EXPRESSION[score])
    inside_nests = latent[nests]
    # Crowded small cells below this level of the latent field, spread large cells above it.
    low = fractions[0] + 0.5 * fractions[1]
    level = float(np.quantile(inside_nests, low)) if inside_nests.size else 0.0
    points, kinds = _place(rng, size_um, fields, malignant, latent, crowd, level)
    count = len(points)
    normal = rng.standard_normal((8, count))
    free_angle = rng.uniform(0, np.pi, count)

    spindle, lymphocyte, epithelium, tumour, fat = (
        kinds == kind for kind in (SPINDLE, LYMPHOCYTE, EPITHELIUM, TUMOUR, FAT)
    )
    expression = _expression(sample(latent, points), tumour, fractions, normal[0])
    # HER2 expression is visible in H&E: expressing cells are larger, paler, with nucleoli and more
    # cytoplasm. Noise keeps the relation from being exact.
    looks = np.clip(expression + 0.35 * normal[1], 0, 4) / 4
    long, short = _radii([spindle, lymphocyte, epithelium, tumour, fat], looks, normal[2:4])
    angle = np.select(
        [spindle, epithelium],
        [
            _fibre_angle(points, waves, fibre_angles) + 0.22 * normal[4],
            _radial_angle(points, fields["epithelium"]) + 0.25 * normal[4],
        ],
        default=free_angle,
    )
    chromatin = np.select(
        [spindle, lymphocyte, epithelium, tumour],
        [1.15, 1.55, 1.2, 1.36 - 0.58 * looks],
        default=1.0,
    ) * np.exp(0.13 * normal[5])
    vesicular = np.where(tumour, np.clip(1.15 * looks + 0.08 * normal[6], 0, 1), 0.12)
    nucleolus = np.where(tumour & (looks + 0.1 * normal[7] > 0.3), 0.55 + 0.75 * looks, 0.0)
    cytoplasm = np.select([tumour, epithelium], [0.16 + 0.50 * looks, 0.42], default=0.2)
    lengths = {
        "x": points[:, 0],
        "y": points[:, 1],
        "long_radius": long,
        "short_radius": short,
        "angle": angle,
        "chromatin": chromatin,
        "vesicular": vesicular,
        "nucleolus": nucleolus,
        "cytoplasm": cytoplasm,
    }
    return Cells(
        kind=kinds,
        intensity=np.where(tumour, np.floor(np.clip(expression, 0, 3.999)), 0).astype(np.uint8),
        **{name: values.astype(np.float32) for name, values in lengths.items()},
    )


def _place(
    rng: np.random.Generator,
    size_um: tuple[float, float],
    fields: dict[str, Array],
    malignant: Array,
    latent: Array,
    crowd: Array,
    level: float,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.uint8]]:
    """Return centres (N, 2), um, and kinds (N,) of all cells."""
    groups = []
    for kind, spacing, jitter in (
        (TUMOUR, 10.6, 0.13),
        (TUMOUR, 13.6, 0.12),
        (EPITHELIUM, 8.8, 0.11),
        (LYMPHOCYTE, 7.6, 0.16),
        (SPINDLE, 17.0, 0.28),
        (FAT, 46.0, 0.3),
    ):
        points = _hexagons(rng, size_um, spacing, jitter)
        depth = sample(fields["epithelium"], points)
        fat = sample(fields["fat"], points)
        cancer = sample(malignant, points) > 0
        if kind == TUMOUR:
            high = sample(latent, points) > level
            keep = cancer & (high == (spacing > 12)) & (depth > 3.0)
        elif kind == EPITHELIUM:
            keep = ~cancer & (depth > 2.6)
        elif kind == LYMPHOCYTE:
            dense = np.clip(sample(crowd, points) - 0.95, 0.0, 0.9)
            keep = (depth < -5) & (fat < 0) & (rng.random(len(points)) < dense + 0.006)
        elif kind == SPINDLE:
            dense = np.clip(0.62 - 0.25 * sample(crowd, points), 0.12, 0.95)
            keep = (depth < -4) & (fat < -2) & (rng.random(len(points)) < dense)
        else:
            keep = (fat > 4) & (depth < -6)
        keep &= _outside_lumen(fields, points)
        groups.append((points[keep], np.full(int(keep.sum()), kind, np.uint8)))
    points = np.concatenate([group[0] for group in groups])
    kinds = np.concatenate([group[1] for group in groups])
    # Of two cells that overlap the one of the later group is removed.
    keep = _apart(points, 6.4)
    points, kinds = points[keep], kinds[keep]
    # Epithelium that no grid filled, at the rims of nests and in narrow cords.
    extra = _hexagons(rng, size_um, 5.0, 0.2)
    extra = extra[(sample(fields["epithelium"], extra) > 3.0) & _outside_lumen(fields, extra)]
    if len(extra) and len(points):
        extra = extra[cKDTree(points).query(extra, k=1)[0] > 9.3]
    extra = extra[_apart(extra, 9.3)]
    cancer = sample(malignant, extra) > 0
    points = np.concatenate([points, extra])
    kinds = np.concatenate([kinds, np.where(cancer, TUMOUR, EPITHELIUM).astype(np.uint8)])
    return points, kinds


def _outside_lumen(
    fields: dict[str, Array], points: npt.NDArray[np.float64]
) -> npt.NDArray[np.bool_]:
    """Return which points are inside the tissue and outside of lumens."""
    outside = sample(fields["lumen"], points) < -2.4
    inside = sample(fields["outline"], points) > 4
    return np.asarray(outside & inside, dtype=bool)


def _expression(
    latent: Array,
    tumour: npt.NDArray[np.bool_],
    fractions: npt.NDArray[np.float64],
    noise: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Return the HER2 expression, 0 to 4, of each cell; its whole part is the intensity.

    Tumour cells are ranked by the latent field and cut at the fractions of the slide's score.
    """
    expression = np.zeros(len(latent))
    if tumour.any():
        rank = latent[tumour] + 0.14 * noise[tumour]
        order = np.argsort(np.argsort(rank, kind="stable"), kind="stable")
        quantile = (order + 0.5) / len(order)
        edges = np.concatenate([[0.0], np.cumsum(fractions)])
        edges[-1] = 1.0 + 1e-9
        grade = np.clip(np.searchsorted(edges, quantile, side="right") - 1, 0, 3)
        width = np.maximum(edges[grade + 1] - edges[grade], 1e-6)
        expression[tumour] = grade + (quantile - edges[grade]) / width
    return expression


def _radii(
    kinds: list[npt.NDArray[np.bool_]],
    looks: npt.NDArray[np.float64],
    normal: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return long and short radii of nuclei, um.

    `kinds` are the masks of spindle, lymphocyte, epithelium, tumour and fat.
    """
    base = np.select(kinds, [1.75, 2.75, 3.1, 3.45 + 2.1 * looks, 1.2])
    mean = base * np.exp(0.10 * normal[0])
    spread = np.abs(normal[1])
    ratio = np.select(
        kinds,
        [
            3.1 * np.exp(0.28 * normal[1]),
            1.04 + 0.05 * spread,
            1.35 + 0.15 * spread,
            1.14 + 0.20 * spread,
            4.0 + 0.5 * spread,
        ],
    )
    ratio = np.clip(ratio, 1.0, 6.0)
    return mean * ratio**0.62, mean * ratio**-0.38


def _fibre_angle(
    points: npt.NDArray[np.float64], waves: Array, fibre_angles: tuple[float, float]
) -> Array:
    """Return the direction of the upper family of fibres at points (N, 2), radians."""
    first_on_top = sample(np.ascontiguousarray(waves[..., 2]), points) > 0
    first, second = (sample(fibre_direction(waves, angle), points) for angle in fibre_angles)
    return np.where(first_on_top, first, second)


def _radial_angle(points: npt.NDArray[np.float64], depth: Array) -> npt.NDArray[np.float64]:
    """Return the direction from the border of the epithelium to its inside, radians."""
    gy, gx = np.gradient(depth)
    gx, gy = (
        sample(np.ascontiguousarray(slope, dtype=np.float32), points).astype(np.float64)
        for slope in (gx, gy)
    )
    angle: npt.NDArray[np.float64] = np.arctan2(gy, gx)
    return angle
