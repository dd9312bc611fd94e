"""How well densities, H-scores and intervals of `stain` meet the truth of simulated cases.

A case is a synthetic tissue of 960 um with a random class, random fractions of intensities, stain
strengths and background; the engine sees 4 to 12 tiles of 160 um of it as JPEG with subsampled
chroma, as in the image pairs of the demo. The truth is that of the whole tissue: the stain each
cell was drawn with.

Goals: mean absolute error of densities at most 0.03, Spearman correlation at least 0.95, 90 %
intervals that contain the truth of 85 to 95 % of at least 400 cases. The intervals of cases with
fewer than four tiles, which resample quarters of tiles, are measured on the first one to three
tiles of the same cases.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import pickle
import sys
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd

from hemera.config import MaskOptions
from hemera.demo.cells import EPITHELIUM, EXPRESSION, TUMOUR, Cells, staining_class
from hemera.demo.render import Appearance, Densities, Renderer, rasterise
from hemera.demo.scanner import photograph
from hemera.demo.tissue import grow
from hemera.imaging.codecs import decode
from hemera.masks.agreement import MATCH_UM, matched
from hemera.masks.engine import Engine, module
from hemera.masks.her2_score import BLOCKS_MIN, CLASSES, Staining, staining

Frame = pd.DataFrame

MPP = 0.5
TILE_PX = 320
TILES_PER_SIDE = 6
SIDE_PX = TILES_PER_SIDE * TILE_PX
EDGE_UM = 8.0
"""Cells nearer to the edge of a tile are seen in part; their densities are not compared."""
NAMES = ("membrane", "cytoplasm", "nucleus")


def fractions(rng: np.random.Generator, score: str) -> npt.NDArray[np.float64]:
    """Draw the fractions of tumour cells of each intensity of a case."""
    if score == "0":
        return np.array(EXPRESSION[score])
    if score == "ultralow":
        stained = rng.uniform(0.01, 0.10)
        return np.array([1 - stained, stained, 0.0, 0.0])
    return rng.dirichlet(30 * np.array(EXPRESSION[score]) + 1e-3)


def engine() -> Engine:
    """Return the engine `stain` with default options."""
    options = MaskOptions(engines={"stain": {}})
    return module("stain").load(options.engines["stain"], options)


@dataclasses.dataclass(frozen=True)
class Case:
    """A simulated case: its cells, their true densities, and tiles as JPEG by their corner, px."""

    cells: Cells
    densities: Densities
    tiles: dict[tuple[int, int], bytes]


def simulate(number: int) -> Case:
    """Draw a case."""
    rng = np.random.default_rng([7, number])
    score = CLASSES[number % len(CLASSES)]
    size_um = (SIDE_PX * MPP, SIDE_PX * MPP)
    tissue = grow(rng, size_um, score, whole=False, expression=fractions(rng, score))
    renderer = Renderer(tissue, rasterise(tissue, MPP, (SIDE_PX, SIDE_PX)), rng)
    red, green, blue = rng.integers((240, 238, 236), (255, 253, 252)).tolist()
    strengths = rng.uniform(0.8, 1.1), rng.uniform(0.85, 1.1)
    look = Appearance((red, green, blue), *strengths, grain=0.7, blur_px=0.6)
    image = photograph(renderer.draw("her2", look), look, rng)
    places = rng.permutation(TILES_PER_SIDE**2)[: rng.integers(BLOCKS_MIN, 13)]
    tiles = {}
    for row, column in zip(*np.divmod(places, TILES_PER_SIDE), strict=True):
        y, x = int(row) * TILE_PX, int(column) * TILE_PX
        rgb = image[y : y + TILE_PX, x : x + TILE_PX]
        # With subsampled chroma.
        data = cv2.imencode(".jpg", rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
        tiles[x, y] = data.tobytes()
    return Case(tissue.cells, renderer.densities(look), tiles)


def measure(number: int, folder: Path | None) -> tuple[dict[str, object], Frame, Frame]:
    """Return truth of a case, cells found in its tiles, and found next to true densities.

    The drawn case is read from the folder, or written there.
    """
    cv2.setNumThreads(1)
    path = folder and folder / f"{number}.pickle"
    if path and path.exists():
        case = pickle.loads(path.read_bytes())
    else:
        case = simulate(number)
        if path:
            path.write_bytes(pickle.dumps(case))
    cells = case.cells
    truth: dict[str, object] = {
        "case": number,
        "class": staining_class(cells),
        "h_score": 100 * cells.intensity.mean(dtype=float),
        "membrane_od": case.densities.membrane.mean(),
    }
    stain = engine()
    tiles = {corner: decode(data) for corner, data in case.tiles.items()}
    state = stain.prepare(list(tiles.values()), MPP)
    found, compared = [], []
    for tile, (corner, rgb) in enumerate(tiles.items()):
        own = stain.segment(rgb, MPP, state).cells
        found.append(pd.DataFrame({**vars(own), "case": number, "tile": tile}))
        centres = np.column_stack([cells.x, cells.y]) / MPP - corner
        edge = EDGE_UM / MPP
        body = np.isin(cells.kind, (TUMOUR, EPITHELIUM))
        inside = np.flatnonzero(((centres > edge) & (centres < TILE_PX - edge)).all(axis=1) & body)
        at = matched(centres[inside], np.column_stack([own.x_px, own.y_px]), MATCH_UM / MPP)
        true, mine = inside[at >= 0], at[at >= 0]
        columns = {"case": number, "intensity": cells.intensity[true]}
        for name in NAMES:
            columns[f"true_{name}"] = getattr(case.densities, name)[true]
            columns[f"found_{name}"] = getattr(own, f"{name}_od")[mine]
        compared.append(pd.DataFrame(columns))
    return truth, pd.concat(found), pd.concat(compared)


def estimated(cells: pd.DataFrame, tiles: int, parts: int) -> Staining:
    """Return the staining of the first tiles of a case, each divided into parts x parts blocks."""
    cells = cells[cells["tile"] < tiles]
    side = TILE_PX / parts
    row, column = (np.minimum(cells[name] // side, parts - 1) for name in ("y_px", "x_px"))
    block = ((cells["tile"] * parts + row) * parts + column).astype(int)
    count = tiles * parts**2
    counts = np.zeros((count, 4), np.int64)
    np.add.at(counts, (block, cells["intensity"]), 1)
    sums = np.bincount(block, cells["membrane_od"], count)
    return staining(counts, sums, seed=0, parts=parts**2)


def densities(compared: pd.DataFrame) -> None:
    """Print errors and correlations of the densities of cells."""
    for name in NAMES:
        pairs = compared[[f"true_{name}", f"found_{name}"]].dropna()
        error = (pairs.iloc[:, 1] - pairs.iloc[:, 0]).abs()
        means = pairs.groupby(compared["case"]).mean()
        each = error.groupby(compared["intensity"]).mean()
        say(
            f"density of the {name}: mean absolute error {error.mean():.4f} of {len(pairs)} cells "
            f"(goal 0.03; by intensity {', '.join(f'{value:.3f}' for value in each)}), Spearman "
            f"{pairs.corr('spearman').iloc[0, 1]:.3f} of cells and "
            f"{means.corr('spearman').iloc[0, 1]:.3f} of cases (goal 0.95)"
        )


def intervals(truths: pd.DataFrame, cells: dict[int, pd.DataFrame]) -> None:
    """Print how often intervals contain the truth, and what is read as which class."""
    for tiles, parts in ((None, 1), (1, 2), (2, 2), (3, 2)):
        rows = []
        for case, own in cells.items():
            count = int(own["tile"].max()) + 1 if tiles is None else tiles
            found = estimated(own, count, parts)
            row = {"probability": dict(zip(CLASSES, found.probabilities, strict=True))}
            for name in ("h_score", "membrane_od"):
                estimate, true = getattr(found, name), truths.loc[case, name]
                row |= {name: estimate.value, f"{name}_in": estimate.low <= true <= estimate.high}
                row[f"{name}_width"] = estimate.high - estimate.low
            rows.append({**row, "case": case})
        table = pd.DataFrame(rows).set_index("case")
        words = "4 to 12 tiles" if tiles is None else f"{tiles} tile(s) in quarters"
        for name in ("h_score", "membrane_od"):
            values = pd.concat([table[name], truths[name]], axis=1).dropna()
            error = (values.iloc[:, 0] - values.iloc[:, 1]).abs().mean()
            by = table[f"{name}_in"].groupby(truths["class"]).mean().reindex(CLASSES)
            each = ", ".join(f"{key} {by[key]:.2f}" for key in CLASSES)
            say(
                f"{words}, {name}: 90 % interval contains the truth of "
                f"{100 * table[f'{name}_in'].mean():.1f} % of {len(table)} cases (goal 85 to 95; "
                f"{each}), mean width {table[f'{name}_width'].mean():.3g}; mean absolute error "
                f"{error:.3g}, Spearman {values.corr('spearman').iloc[0, 1]:.3f} (goal 0.95)"
            )
        # A tile without cells gives no probability.
        given = pd.DataFrame(list(table["probability"]), index=table.index).dropna()
        true = pd.get_dummies(truths["class"]).reindex(index=given.index, columns=CLASSES)
        say(
            f"{words}: mean probability of the true class of the tumour cells "
            f"{(given * true.fillna(False)).sum(axis=1).mean():.2f}, most probable class right in "
            f"{(given.idxmax(axis=1) == truths['class'][given.index]).mean():.2f} of the cases"
        )
        if tiles is None:
            counts = pd.crosstab(truths["class"], given.idxmax(axis=1))
            say(counts.reindex(index=CLASSES, columns=CLASSES, fill_value=0).to_string())


def say(words: str) -> None:
    """Print a line."""
    sys.stdout.write(words + "\n")


def main() -> None:
    """Print one line per figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=400, help="simulated cases")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--cache", type=Path, help="folder of drawn cases")
    given = parser.parse_args()
    if given.cache is not None:
        given.cache.mkdir(parents=True, exist_ok=True)
    run = functools.partial(measure, folder=given.cache)
    with concurrent.futures.ProcessPoolExecutor(given.workers) as pool:
        results = list(pool.map(run, range(given.cases)))
    truths = pd.DataFrame([truth for truth, _, _ in results]).set_index("case")
    densities(pd.concat([compared for _, _, compared in results], ignore_index=True))
    intervals(truths, {int(truth["case"]): found for truth, found, _ in results})


if __name__ == "__main__":
    main()
