"""Grows tissue: outlines on a coarse grid, then cells with shapes, kinds and HER2 expression.

Everything is in um of the H&E frame, so the same tissue is drawn at any resolution.

The same seed has to give the same bytes. OpenCV's blur of floats gives other last digits as memory
happens to lie: what it would do here is done in whole numbers, or by a Fourier transform.
"""

from __future__ import annotations

import dataclasses

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
"""Shares of tumour cells of intensity 0, 1, 2, 3 in a slide of each score."""


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


def _largest(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Drop crumbs: pieces of less than a fiftieth of the largest one."""
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
        score: HER2 score of the slide; sets the shares of cells of each intensity.
        whole: a whole section with glass around it; else tissue from edge to edge.
        empty: almost nothing but glass.
    """
    shape = (int(np.ceil(size_um[1] / GRID_UM)), int(np.ceil(size_um[0] / GRID_UM)))
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float32)
    x = (x + 0.5) * GRID_UM - size_um[0] / 2
    y = (y + 0.5) * GRID_UM - size_um[1] / 2

    def noise(wavelength_um: float) -> Array:
        return smooth_noise(rng, shape, wavelength_um / GRID_UM)

    rough = 0.075 * noise(900) + 0.03 * noise(240) + 0.010 * noise(60) + 0.006 * noise(20)
    if whole:
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
        outline &= (tear > 0) | (noise(700) < 0.9)
        outline = _largest(outline)
    elif empty:
        outline = (x / size_um[0] - 0.8 * y / size_um[1] - 0.62 + 0.5 * rough) > 0
    else:
        outline = (noise(260) + 0.5 * noise(70)) > -2.9

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
    ducts, lumens = _glands(rng, shape, np.where(fat_level < -0.3, noise(340) - 0.45, -1), size_um)
    nests &= cv2.dilate(ducts.astype(np.uint8), np.ones((5, 5), np.uint8)) == 0
    epithelium = (nests | ducts) & outline
    lumen = lumens & outline
    fields = {
        "outline": signed_distance(outline),
        "epithelium": signed_distance(epithelium),
        "lumen": signed_distance(lumen),
        "fat": signed_distance(fat & ~epithelium),
    }
    loose = (0.8 * noise(300) + 0.5 * noise(90)).astype(np.float32)
    cleft = (0.9 * noise(130) + 0.4 * noise(40) - 0.35).astype(np.float32)
    angles = (rng.uniform(0, np.pi), rng.uniform(0.9, 1.9))
    fibre_angles = (angles[0], angles[0] + angles[1])
    # Displacements (x, y) that bend the fibres, and which of two families lies on top.
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
    """Return the direction (radians) along which fibres of one family lie, on the coarse grid."""
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
    """Place cells by kind, the most particular first, and give each its looks."""
    shares = np.array(EXPRESSION[score])
    low_share = shares[0] + 0.5 * shares[1]
    inside_nests = latent[nests]
    # Crowded small cells below this level of the latent field, spread large cells above it.
    level = np.quantile(inside_nests, low_share) if inside_nests.size else 0.0
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
        lumen = sample(fields["lumen"], points)
        outline = sample(fields["outline"], points)
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
            keep = (
                (depth < -4)
                & (fat < -2)
                & (
                    rng.random(len(points))
                    < np.clip(0.62 - 0.25 * sample(crowd, points), 0.12, 0.95)
                )
            )
        else:
            keep = (fat > 4) & (depth < -6)
        keep &= (lumen < -2.4) & (outline > 4)
        groups.append((points[keep], np.full(int(keep.sum()), kind, np.uint8)))
    points = np.concatenate([group[0] for group in groups])
    kinds = np.concatenate([group[1] for group in groups])
    # Cells of two groups that meet: the later one yields.
    keep = _apart(points, 6.4)
    points, kinds = points[keep], kinds[keep]
    # Epithelium that no grid filled, at the rims of nests and in narrow cords.
    extra = _hexagons(rng, size_um, 5.0, 0.2)
    room = (sample(fields["epithelium"], extra) > 3.0) & (sample(fields["lumen"], extra) < -2.4)
    extra = extra[room & (sample(fields["outline"], extra) > 4)]
    if len(extra) and len(points):
        extra = extra[cKDTree(points).query(extra, k=1)[0] > 9.3]
    extra = extra[_apart(extra, 9.3)]
    cancer = sample(malignant, extra) > 0
    points = np.concatenate([points, extra])
    kinds = np.concatenate([kinds, np.where(cancer, TUMOUR, EPITHELIUM).astype(np.uint8)])
    count = len(points)

    normal = rng.standard_normal((8, count))
    tumour = kinds == TUMOUR
    expression = np.zeros(count)
    if tumour.any():
        rank = sample(latent, points)[tumour] + 0.14 * normal[0, tumour]
        order = np.argsort(np.argsort(rank, kind="stable"), kind="stable")
        quantile = (order + 0.5) / len(order)
        edges = np.concatenate([[0.0], np.cumsum(shares)])
        edges[-1] = 1.0 + 1e-9
        grade = np.searchsorted(edges, quantile, side="right") - 1
        grade = np.clip(grade, 0, 3)
        width = np.maximum(edges[grade + 1] - edges[grade], 1e-6)
        expression[tumour] = grade + (quantile - edges[grade]) / width
    intensity = np.where(tumour, np.floor(np.clip(expression, 0, 3.999)), 0).astype(np.uint8)

    # What HER2 shows, H&E betrays: expressing cells are larger, paler, with nucleoli and more
    # cytoplasm. A share of noise keeps it from being a code.
    looks = np.clip(expression + 0.35 * normal[1], 0, 4) / 4
    base = np.select(
        [kinds == SPINDLE, kinds == LYMPHOCYTE, kinds == EPITHELIUM, tumour, kinds == FAT],
        [1.75, 2.75, 3.1, 3.45 + 2.1 * looks, 1.2],
    )
    short = base * np.exp(0.10 * normal[2])
    ratio = np.select(
        [kinds == SPINDLE, kinds == LYMPHOCYTE, kinds == EPITHELIUM, tumour, kinds == FAT],
        [
            3.1 * np.exp(0.28 * normal[3]),
            1.04 + 0.05 * np.abs(normal[3]),
            1.35 + 0.15 * np.abs(normal[3]),
            1.14 + 0.20 * np.abs(normal[3]),
            4.0 + 0.5 * np.abs(normal[3]),
        ],
    )
    ratio = np.clip(ratio, 1.0, 6.0)
    top = sample(np.ascontiguousarray(waves[..., 2]), points) > 0
    along = np.where(
        top,
        sample(fibre_direction(waves, fibre_angles[0]), points),
        sample(fibre_direction(waves, fibre_angles[1]), points),
    )
    gy, gx = np.gradient(fields["epithelium"])
    gx, gy = (
        sample(np.ascontiguousarray(slope, dtype=np.float32), points).astype(np.float64)
        for slope in (gx, gy)
    )
    radial = np.arctan2(gy, gx)
    free = rng.uniform(0, np.pi, count)
    angle = np.select(
        [kinds == SPINDLE, kinds == EPITHELIUM],
        [along + 0.22 * normal[4], radial + 0.25 * normal[4]],
        default=free,
    )
    chromatin = np.select(
        [kinds == SPINDLE, kinds == LYMPHOCYTE, kinds == EPITHELIUM, tumour],
        [1.15, 1.55, 1.2, 1.36 - 0.58 * looks],
        default=1.0,
    ) * np.exp(0.13 * normal[5])
    vesicular = np.where(tumour, np.clip(1.15 * looks + 0.08 * normal[6], 0, 1), 0.12)
    nucleolus = np.where(tumour & (looks + 0.1 * normal[7] > 0.3), 0.55 + 0.75 * looks, 0.0)
    cytoplasm = np.select([tumour, kinds == EPITHELIUM], [0.16 + 0.50 * looks, 0.42], default=0.2)
    return Cells(
        x=points[:, 0].astype(np.float32),
        y=points[:, 1].astype(np.float32),
        kind=kinds,
        long_radius=(short * ratio**0.62).astype(np.float32),
        short_radius=(short * ratio**-0.38).astype(np.float32),
        angle=angle.astype(np.float32),
        chromatin=chromatin.astype(np.float32),
        vesicular=vesicular.astype(np.float32),
        nucleolus=nucleolus.astype(np.float32),
        cytoplasm=cytoplasm.astype(np.float32),
        intensity=intensity,
    )
