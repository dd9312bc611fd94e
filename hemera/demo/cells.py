"""Cells of the tissue: positions, kinds, shapes and HER2 expression."""

import dataclasses

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from hemera.demo.grid import GRID_UM, Array, hexagons, sample
from hemera.masks.her2_score import CLASSES, her2_scores

SPINDLE, LYMPHOCYTE, EPITHELIUM, TUMOUR, FAT = range(5)
"""Kinds of cells."""

EXPRESSION = {
    "0": (1.0, 0.0, 0.0, 0.0),
    "ultralow": (0.95, 0.05, 0.0, 0.0),
    "1+": (0.50, 0.43, 0.07, 0.0),
    "2+": (0.26, 0.22, 0.47, 0.05),
    "3+": (0.22, 0.08, 0.15, 0.55),
}
"""Fractions of tumour cells of intensity 0, 1, 2, 3 in a slide of each score. Weak membranes are
faint and have holes: at most a tenth of such cells, and more than none, is ultralow."""


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


def staining_class(cells: Cells) -> str:
    """Return the HER2 class of the tumour cells, one of `her2_score.CLASSES`; empty without any.

    Ultralow is staining of more than none and at most a tenth of them, see `EXPRESSION`.
    """
    counts = np.bincount(cells.intensity[cells.kind == TUMOUR], minlength=4)
    if not counts.any():
        return ""
    # A truth without detection errors needs no smallest fraction of ultralow.
    return CLASSES[max(her2_scores(counts[None])[0], int(counts[1:].any()))]


def place_cells(
    rng: np.random.Generator,
    size_um: tuple[float, float],
    expression: npt.ArrayLike,
    fields: dict[str, Array],
    nests: npt.NDArray[np.bool_],
    malignant: Array,
    latent: Array,
    crowd: Array,
    waves: Array,
    fibre_angles: tuple[float, float],
    visibility: float = 1.0,
) -> Cells:
    """Place cells by kind, the most particular first, and give each its appearance.

    `expression` are the fractions of tumour cells of intensity 0, 1, 2, 3. `visibility` scales how
    far the size, distance and chromatin of tumour cells depend on it, 0: not at all.
    """
    fractions = np.asarray(expression, np.float64)
    inside_nests = latent[nests]
    # Crowded small cells below this level of the latent field, spread large cells above it.
    low = fractions[0] + 0.5 * fractions[1]
    level = float(np.quantile(inside_nests, low)) if inside_nests.size else 0.0
    points, kinds = _place(rng, size_um, fields, malignant, latent, crowd, level, visibility)
    count = len(points)
    normal = rng.standard_normal((8, count))
    free_angle = rng.uniform(0, np.pi, count)

    spindle, lymphocyte, epithelium, tumour, fat = (
        kinds == kind for kind in (SPINDLE, LYMPHOCYTE, EPITHELIUM, TUMOUR, FAT)
    )
    expression = _expression(sample(latent, points), tumour, fractions, normal[0])
    # HER2 expression is visible in H&E: expressing cells are larger, paler, with nucleoli and more
    # cytoplasm. Noise keeps the relation from being exact.
    seen = visibility * expression + (1 - visibility) * 1.5
    atypia = np.clip(seen + 0.35 * normal[1], 0, 4) / 4
    long, short = _radii([spindle, lymphocyte, epithelium, tumour, fat], atypia, normal[2:4])
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
        [1.15, 1.55, 1.2, 1.36 - 0.58 * atypia],
        default=1.0,
    ) * np.exp(0.13 * normal[5])
    vesicular = np.where(tumour, np.clip(1.15 * atypia + 0.08 * normal[6], 0, 1), 0.12)
    nucleolus = np.where(tumour & (atypia + 0.1 * normal[7] > 0.3), 0.55 + 0.75 * atypia, 0.0)
    cytoplasm = np.select([tumour, epithelium], [0.16 + 0.50 * atypia, 0.42], default=0.2)
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
    visibility: float,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.uint8]]:
    """Return centres (N, 2), um, and kinds (N,) of all cells."""
    groups: list[tuple[npt.NDArray[np.float64], npt.NDArray[np.uint8]]] = []
    nearer = 1.5 * (1 - visibility)
    for kind, spacing, jitter in (
        (TUMOUR, 10.6 + nearer, 0.13),
        (TUMOUR, 13.6 - nearer, 0.12),
        (EPITHELIUM, 8.8, 0.11),
        (LYMPHOCYTE, 7.6, 0.16),
        (SPINDLE, 17.0, 0.28),
        (FAT, 46.0, 0.3),
    ):
        points = hexagons(rng, size_um, spacing, jitter)
        depth = sample(fields["epithelium"], points)
        fat = sample(fields["fat"], points)
        cancer = sample(malignant, points) > 0
        if kind == TUMOUR:
            high = sample(latent, points) > level
            keep = cancer & (high == bool(groups)) & (depth > 3.0)
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
    extra = hexagons(rng, size_um, 5.0, 0.2)
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
    """Return the HER2 expression, 0 to 4, of each cell; its integer part is the intensity.

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
    atypia: npt.NDArray[np.float64],
    normal: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return long and short radii of nuclei, um; `kinds` are five masks, spindle first."""
    base = np.select(kinds, [1.75, 2.75, 3.1, 3.45 + 2.1 * atypia, 1.2])
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
