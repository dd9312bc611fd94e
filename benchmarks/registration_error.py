"""How exact the estimate of the local registration error is; derives its coefficients.

Pairs of synthetic sections with known fields (`_sections`) are mapped by the engine's nonrigid
stage, started from the similarity nearest to the truth with the error that matching leaves. The
model of `hemera.registration.local_error` is fitted to points of the first slides, and its
estimates are compared with the true errors at points of the others. *Parts*: of maps of the others
that are wrong over a quarter to a third of the slide, the wrong and the right points that `filter`
refuses. With ``--images DIR`` also on
the kidney pair and its stressed versions, which are never fitted. Maps are kept in FOLDER; a slide
takes about 20 s of processor time.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import registration
import scipy.optimize
import scipy.spatial
import scipy.stats
from _sections import Sections, sections
from PIL import Image

from hemera.config import FilterOptions, RegisterOptions
from hemera.demo.grid import smooth_noise
from hemera.registration import deeperhistreg as engine
from hemera.registration import displacement as fields
from hemera.registration import local_error
from hemera.registration.attempts import ATTEMPTS, run_engine
from hemera.registration.canvas import Canvas
from hemera.registration.local_quality import LocalQuality
from hemera.registration.signals import SMOOTHING, measure, tissue

Floats = npt.NDArray[np.float64]

FIRST_SEED = 200
POINTS = 500
KINDS = {"nonrigid": 1.0, "rigid": 0.1, "halfway": 0.1, "bent": 0.1, "partly wrong": 0.4}
"""Maps of each slide and their weights: of the engine, its start, the mean of both, the truth with
a random bend, and the engine's with a shift over a part of the slide."""
QUANTILES = {"median": 0.5, "low": 0.05, "high": 0.95}
COVERED = 0.9
PARTS = ("left", "right", "top", "bottom", "corner", "disc")
SHIFTS = (0.021, 0.045, 0.085)
"""Of maps that are wrong over a part: the part, and its shift as a fraction of the diagonal."""
FAR = (0.5, 1.0, 1.5, 2.0)
"""Distances from a wrong place, in sides of a square of the local quality."""
FITTED_MAX = 6000
"""Points that are fitted, drawn at random."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A map on which the estimate is compared with the truth."""

    slide: str
    kind: str
    local: LocalQuality
    points_um: Floats
    errors_um: Floats


# --- maps ----------------------------------------------------------------------------------------


def nonrigid(pair: Sections, start_um: Floats) -> Floats:
    """Run the engine's nonrigid stage from a map (H, W, 2), um; return the map that it gives."""
    deeperhistreg, torch = (importlib.import_module(name) for name in ("deeperhistreg", "torch"))
    torch.set_num_threads(1)
    options = RegisterOptions(device="cpu", torch_threads=1)
    height, width = pair.he.shape[:2]
    parameters = engine._parameters(
        deeperhistreg.configs, options, "cpu", False, min(height, width)
    )
    pipeline = deeperhistreg.direct_registration.DeeperHistReg_FullResolution(parameters)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Image.fromarray(pair.he).save(folder / "fixed.ppm")
        Image.fromarray(pair.her2).save(folder / "moving.ppm")
        pipeline.source_path, pipeline.target_path = (
            str(folder / f"{name}.ppm") for name in ("moving", "fixed")
        )
        pipeline.save_path = name
        pipeline.load_images()
        pipeline.preprocessing()
    nodes = _nodes(pair)
    vectors = (start_um - nodes) / pair.mpp * 2 / np.array([width, height])
    pipeline.current_displacement_field = torch.from_numpy(vectors[None].astype(np.float32))
    pipeline.nonrigid_registration()
    utils = importlib.import_module("dhr_utils.utils")
    found = utils.tc_df_to_np_df(pipeline.current_displacement_field)
    return nodes + np.moveaxis(found, 0, -1) * pair.mpp


def maps(seed: int, pair: Sections, truth: Floats, folder: Path) -> dict[str, Floats]:
    """Return the maps of a slide, (H, W, 2) um each, by `KINDS`."""
    nodes, diagonal_um = _nodes(pair), math.hypot(*pair.he.shape[:2]) * pair.mpp
    path = folder / f"{seed}.npz"
    if not path.exists():
        rng = np.random.default_rng([24, seed])
        step = (slice(None, None, 8),) * 2
        nearest = fields.nearest_affine(nodes[step].reshape(-1, 2), truth[step].reshape(-1, 2))
        angle, scale = rng.normal(0, 0.002), np.exp(rng.normal(0, 0.002))
        c, s = np.cos(angle) * scale, np.sin(angle) * scale
        centre = nodes.mean((0, 1))
        turned = (nodes - centre) @ np.array([[c, s], [-s, c]])
        turned += centre + rng.normal(0, 0.0015 * diagonal_um, 2)
        rigid = turned @ nearest.matrix.T + nearest.offset_um
        final = nonrigid(pair, rigid)
        np.savez_compressed(path, rigid=rigid.astype(np.float32), final=final.astype(np.float32))
    stored = np.load(path)
    rigid, final = (stored[name].astype(np.float64) for name in ("rigid", "final"))
    rng = np.random.default_rng([25, seed])
    height, width = pair.he.shape[:2]

    def noise(wavelength_px: float) -> npt.NDArray[np.float32]:
        return smooth_noise(rng, (height, width), wavelength_px)

    def length_um(low: float, high: float) -> float:
        return diagonal_um * float(np.exp(rng.uniform(np.log(low), np.log(high))))

    wavelength_px = rng.uniform(0.1, 0.5) * width
    bend = np.stack([noise(wavelength_px), noise(wavelength_px)], axis=-1)
    where = 1 / (1 + np.exp(-(noise(0.8 * width) - 0.4) / 0.1))
    angle = rng.uniform(0, 2 * np.pi)
    shift = length_um(0.006, 0.03) * np.array([np.cos(angle), np.sin(angle)])
    return {
        "nonrigid": final,
        "rigid": rigid,
        "halfway": (final + rigid) / 2,
        "bent": truth + length_um(0.001, 0.012) * bend,
        "partly wrong": final + where[..., None] * shift,
    }


def synthetic(seed: int, folder: Path) -> Iterator[Sample]:
    """Measure the maps of a slide."""
    pair = sections(seed)
    truth, nodes = pair.field.to_moving(_nodes(pair)), _nodes(pair)
    height, width = pair.he.shape[:2]
    sigma = max(SMOOTHING * math.hypot(height, width), 0.5)
    y, x = np.nonzero(tissue(pair.he, sigma))
    chosen = np.random.default_rng([26, seed]).permutation(len(x))[:POINTS]
    for kind, found in maps(seed, pair, truth, folder).items():
        d = fields.Displacement((found - nodes).astype(np.float32), pair.mpp)
        errors = np.linalg.norm(found - truth, axis=-1)
        local = _local(pair.he, pair.her2, d, pair.mpp)
        points = (np.stack([x, y], axis=-1)[chosen] + 0.5) * pair.mpp
        yield Sample(str(seed), kind, local, points, errors[y[chosen], x[chosen]])


def kidney_maps(
    images: Path, folder: Path
) -> Iterator[tuple[registration.Case, fields.Displacement]]:
    """Register the kidney pair and its stressed versions by the default options."""
    for case in registration.real_cases(images):
        if (
            case.he_points is None
            or case.her2_points is None
            or case.mirrored
            or "itself" in case.name
        ):
            continue
        path = folder / f"{case.name.replace(', ', '_').replace(' ', '_')}.npz"
        if not path.exists():
            attempt = ATTEMPTS[int("turned" in case.name)]
            options = RegisterOptions(device="cpu", torch_threads=1)
            canvas = Canvas(case.he, case.her2, case.mpp[0])
            with tempfile.TemporaryDirectory() as name:
                outcome, mirrored, _ = run_engine(
                    canvas, attempt, False, options, Path(name) / "engine"
                )
            assert outcome.nonrigid is not None, outcome.reason
            d = outcome.nonrigid
            d = fields.mirrored(d, case.her2.shape[1] * case.mpp[1]) if mirrored else d
            np.savez_compressed(path, v=d.vectors_um, mpp=d.mpp)
        stored = np.load(path)
        yield case, fields.Displacement(stored["v"], float(stored["mpp"]))


def kidney(images: Path, folder: Path) -> Iterator[Sample]:
    """Measure the kidney pair and its stressed versions at their landmarks."""
    for case, d in kidney_maps(images, folder):
        assert case.he_points is not None
        points = case.he_points * case.mpp[0]
        errors = np.linalg.norm(
            fields.map_points(d, points) - case.her2_points * case.mpp[1], axis=1
        )
        local = _local(case.he, case.her2, d, case.mpp[0])
        yield Sample(case.name, "nonrigid", local, points, errors)


def _nodes(pair: Sections) -> Floats:
    y, x = np.mgrid[: pair.he.shape[0], : pair.he.shape[1]]
    return (np.stack([x, y], axis=-1) + 0.5) * pair.mpp


def _local(
    he: registration.RGB, her2: registration.RGB, d: fields.Displacement, mpp: float
) -> LocalQuality:
    (height, width), (her2_height, her2_width) = he.shape[:2], her2.shape[:2]
    return measure(
        he, her2, d, mpp=mpp, fixed_size_um=(width * mpp, height * mpp),
        moving_size_um=(her2_width * mpp, her2_height * mpp),
    )[1]  # fmt: skip


# --- model ---------------------------------------------------------------------------------------


def rows(samples: Sequence[Sample]) -> dict[str, npt.NDArray[Any]]:
    """Return terms (N, 3), logarithm of the true error in sides, weight, kind and slide of points.

    Without points in misaligned regions, which have the worst values of the region.
    """
    found: dict[str, list[npt.NDArray[Any]]] = {}
    for sample in samples:
        side = sample.local.side_um
        (residuals, spreads, *_), regions = sample.local.measured_at(sample.points_um)
        terms = local_error.measures(residuals / side, spreads / side)
        used = np.isfinite(terms).all(axis=1) & (regions == 0)
        columns = {
            "terms": terms,
            "goal": np.log(sample.errors_um / side + local_error.ERROR_FLOOR),
            "weight": np.full(len(terms), KINDS[sample.kind]),
            "kind": np.full(len(terms), sample.kind),
            "slide": np.full(len(terms), sample.slide),
        }
        for name, values in columns.items():
            found.setdefault(name, []).append(values[used])
    joined = {name: np.concatenate(parts) for name, parts in found.items()}
    chosen = np.random.default_rng(0).permutation(len(joined["goal"]))[:FITTED_MAX]
    return {name: values[chosen] for name, values in joined.items()}


def quantile(terms: Floats, goal: Floats, weights: Floats, level: float) -> Floats:
    """Fit a quantile linear in `terms`, whose factors are not negative, by linear programming."""
    count, width = terms.shape
    costs = np.concatenate([np.zeros(width), level * weights, (1 - level) * weights])
    equal = scipy.sparse.hstack([terms, scipy.sparse.eye(count), -scipy.sparse.eye(count)])
    bounds = [(None, None), *[(0, None)] * (width - 1), *[(0, None)] * (2 * count)]
    return scipy.optimize.linprog(costs, A_eq=equal.tocsr(), b_eq=goal, bounds=bounds).x[:width]


def fit(samples: Sequence[Sample], folds: int = 5) -> dict[str, Floats]:
    """Fit the coefficients.

    The interval is widened so that it contains `COVERED` of the errors of the engine's maps on a
    new slide: on slides that are left out, a little more. The points of a slide are not
    independent; with K slides, one of K + 1 is the new one (hierarchical conformal prediction, Lee
    et al. 2023).
    """
    table = rows(samples)
    terms, goal, weights = (table[name] for name in ("terms", "goal", "weight"))
    beyond = np.full(len(goal), np.nan)
    names = np.unique(table["slide"])
    for fold in range(folds):
        out = np.isin(table["slide"], names[fold::folds])
        low, high = (
            terms[out] @ quantile(terms[~out], goal[~out], weights[~out], QUANTILES[name])
            for name in ("low", "high")
        )
        beyond[out] = np.maximum(low - goal[out], goal[out] - high)
    level = COVERED * (len(names) + 1) / len(names)
    wider = np.quantile(beyond[table["kind"] == "nonrigid"], level)
    found = {name: quantile(terms, goal, weights, level) for name, level in QUANTILES.items()}
    found["low"][0] -= wider
    found["high"][0] += wider
    return found


# --- maps that are wrong over a part -------------------------------------------------------------


def corrupted(d: fields.Displacement, part: str, shift_um: Floats) -> tuple[Any, Floats]:
    """Shift a map over a quarter to a third of the slide; return it and the shift of each node."""
    nodes = fields.node_points(d)
    size = np.array(d.vectors_um.shape[1::-1]) * d.mpp
    x, y = np.moveaxis(nodes / size, -1, 0)
    apart = np.linalg.norm(nodes - size / 2, axis=-1)
    beyond = {
        "left": 0.36 - x, "right": x - 0.64, "top": 0.36 - y, "bottom": y - 0.64,
        "corner": x + y - 1.2, "disc": (0.33 * size.min() - apart) / size.mean(),
    }[part]  # fmt: skip
    shifts = shift_um / (1 + np.exp(-beyond[..., None] / 0.02))
    moved = fields.Displacement((d.vectors_um + shifts).astype(np.float32), d.mpp)
    return moved, np.linalg.norm(shifts, axis=-1)


def refused(local: LocalQuality, points_um: Floats) -> npt.NDArray[np.bool_]:
    """Return whether `filter` refuses a tile at each point, with its default options."""
    found, limits = local.at(points_um), FilterOptions()
    good = found["margin"] >= limits.registration_margin_min
    return ~(good & (found["error_um"] <= limits.registration_error_max_um))


def partly_wrong(
    he: registration.RGB, her2: registration.RGB, d: fields.Displacement, mpp: float
) -> npt.NDArray[np.int64]:
    """Count the points of 18 maps that are wrong over a part, (2 + len(FAR), 2): all and refused.

    Rows: points with more than half of the shift; points with less than a tenth of it by their
    distance from these. Only right points that are accepted with the map as it is are counted.
    """
    rng = np.random.default_rng(0)
    height, width = he.shape[:2]
    y, x = np.nonzero(tissue(he, max(SMOOTHING * math.hypot(height, width), 0.5)))
    chosen = rng.permutation(len(x))[: 2 * POINTS]
    points = (np.stack([x, y], axis=-1)[chosen] + 0.5) * mpp
    column, row = (points / d.mpp).astype(int).clip(0, np.array(d.vectors_um.shape[1::-1]) - 1).T
    accepted = ~refused(_local(he, her2, d, mpp), points)
    counts = np.zeros((2 + len(FAR), 2), np.int64)
    for part, fraction in itertools.product(PARTS, SHIFTS):
        length_um = fraction * math.hypot(height, width) * mpp
        angle = rng.uniform(0, 2 * np.pi)
        moved, shifts = corrupted(d, part, length_um * np.array([np.cos(angle), np.sin(angle)]))
        local, shift = _local(he, her2, moved, mpp), shifts[row, column]
        is_refused, wrong = refused(local, points), shift > 0.5 * length_um
        far = scipy.spatial.KDTree(points[wrong]).query(points)[0] / local.side_um
        bins = np.where(wrong, 0, 1 + np.digitize(far, FAR))
        known = wrong | (accepted & (shift < 0.1 * length_um))
        for column_, mask in enumerate((known, known & is_refused)):
            counts[:, column_] += np.bincount(bins[mask], minlength=len(counts))
    return counts


def partly_wrong_figures(title: str, counts: npt.NDArray[np.int64]) -> str:
    """Describe the counts of `partly_wrong`."""
    (wrong, found), right = counts[0], counts[1:]
    ends = [*(f"up to {far:g}" for far in FAR), "more"]
    lost = ", ".join(f"{end}: {b / a:.1%}" for end, (a, b) in zip(ends, right, strict=True))
    return (
        f"{title}: {found} of {wrong} wrong points refused; of {right[:, 0].sum()} right ones "
        f"{right[:, 1].sum() / right[:, 0].sum():.1%}, by distance in squares: {lost}\n"
    )


# --- report --------------------------------------------------------------------------------------


def figures(samples: Sequence[Sample]) -> str:
    """Compare the estimates with the truth over the points of several maps."""
    ranks, compared = [], []
    for sample in samples:
        # A copy, because it keeps the estimates of former coefficients.
        found = dataclasses.replace(sample.local).at(sample.points_um)
        known = np.isfinite(found["error_um"])
        names = ("error_um", "error_low_um", "error_high_um")
        row = np.stack([*(found[name][known] for name in names), sample.errors_um[known]])
        ranks.append(scipy.stats.spearmanr(row[0], row[3])[0])
        # Slides differ in size: errors are compared as fractions of the diagonal.
        compared.append(row / sample.local.side_um)
    estimate, low, high, true = np.concatenate(compared, axis=1)
    inside = ((true >= low) & (true <= high)).mean()
    rank = scipy.stats.spearmanr(estimate, true)[0]
    return (
        f"{len(samples):4} maps {len(true):6} points  Spearman {rank:.2f}"
        f", within a slide {np.nanmedian(ranks):.2f}"
        f"  ratio of medians {np.median(estimate) / np.median(true):.2f}"
        f"  within the interval {inside:.1%}, below {(true < low).mean():.1%}"
        f"  high / low {np.median(high / low):.1f}"
    )


def print_errors(given: argparse.Namespace, seeds: Sequence[int]) -> None:
    """Print the coefficients found, and figures of the estimate."""
    samples = [list(synthetic(seed, given.folder)) for seed in seeds]
    fitted = [sample for slide in samples[: given.fitted] for sample in slide]
    others = [sample for slide in samples[given.fitted :] for sample in slide]
    for name, values in fit(fitted).items():
        sys.stdout.write(f"{name}: ({', '.join(f'{value:.3f}' for value in values)})\n")
        if given.fit:
            local_error.COEFFICIENTS[name] = tuple(values)
    for title, chosen in (("fitted", fitted), ("not fitted", others)):
        if not chosen:
            continue
        sys.stdout.write(f"{title}, all maps\n{figures(chosen)}\n")
        for kind in KINDS:
            own = [sample for sample in chosen if sample.kind == kind]
            sys.stdout.write(f"{title}, {kind}\n{figures(own)}\n")
    if given.images:
        real = list(kidney(given.images, given.folder))
        for sample in real:
            sys.stdout.write(f"{sample.slide}\n{figures([sample])}\n")
        sys.stdout.write(f"all\n{figures(real)}\n")


def print_parts(given: argparse.Namespace, seeds: Sequence[int]) -> None:
    """Print how many right and wrong points of maps that are wrong over a part are refused."""
    total = np.zeros((2 + len(FAR), 2), np.int64)
    for seed in seeds:
        pair = sections(seed)
        truth, nodes = pair.field.to_moving(_nodes(pair)), _nodes(pair)
        final = maps(seed, pair, truth, given.folder)["nonrigid"]
        d = fields.Displacement((final - nodes).astype(np.float32), pair.mpp)
        total += partly_wrong(pair.he, pair.her2, d, pair.mpp)
    title = f"partly wrong maps of {len(seeds)} slides"
    sys.stdout.write(partly_wrong_figures(title, total))
    if given.images:
        case, d = next(kidney_maps(given.images, given.folder))
        counts = partly_wrong(case.he, case.her2, d, case.mpp[0])
        sys.stdout.write(partly_wrong_figures("of the kidney pair", counts))


def main() -> None:
    """Print coefficients and figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path("build/registration_error"),
        help="where maps are kept",
    )  # fmt: skip
    parser.add_argument("--slides", type=int, default=30)
    parser.add_argument("--fitted", type=int, default=20, help="the first of them")
    parser.add_argument("--images", type=Path, help="folder of real images, for the kidney pair")
    parser.add_argument(
        "--fit", action="store_true", help="use the coefficients found, not those of hemera"
    )
    parser.add_argument("--only", choices=("errors", "parts"), help="one of the two tables")
    given = parser.parse_args()
    cv2.setNumThreads(1)
    given.folder.mkdir(parents=True, exist_ok=True)
    seeds = range(FIRST_SEED, FIRST_SEED + given.slides)
    if given.only != "parts":
        print_errors(given, seeds)
    if given.only != "errors":
        print_parts(given, seeds[given.fitted :])


if __name__ == "__main__":
    main()
