"""What the mask engines get right where the truth is known, and what `stain` costs.

*Demo*: positive cells, nuclear pixels and intensity classes against the exact masks of the demo
cohort, mapped through its own field. Goals: F1 of positive cells 0.85, IoU of nuclei 0.6, class
right for 85 % of positive cells. *DeepLIIF*: nuclear pixels and signs of cells against the ground
truth of real Ki67 tiles. Goals: F1 of nuclear pixels 0.75 on average and 0.60 on each tile, sign
right for 85 % of matched cells. *BCI*: per real HER2 tile the cells by intensity, which should rise
with its score, and what ASCO/CAP's count makes of them. *Speed*: processor time of `stain` against
the JPEG decode of the same tile, in turn; goal: at most 40 times, stretch 25. Real tiles need
`--images`, DeepLIIF its weights (`--deepliif`), which are published apart (Zenodo record 4751737);
without them its column says so.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from _real_images import labelled, prepared
from _synthetic import interleaved, ratio

from hemera.__main__ import keep_freed_memory
from hemera.config import MaskOptions
from hemera.demo import load_truth, write_cohort
from hemera.masks import label_format
from hemera.masks.agreement import matched
from hemera.masks.engine import Engine, module
from hemera.masks.her2_score import CLASSES, her2_scores

RGB = npt.NDArray[np.uint8]

DEEPLIIF_MPP = 0.25
BCI_MPP = 0.46
APART_UM = 4.0
NO_TUMOUR = ("00003_test_3+", "00004_test_0", "00345_test_0", "00005_test_1+")
"""Real tiles that show fat, ducts, skin or stroma and no tumour."""


def picture(path: Path) -> RGB:
    """Read an image as RGB."""
    found = cv2.imread(str(path))
    assert found is not None, path
    return np.ascontiguousarray(found[..., ::-1])


def quarters(rgb: RGB, side: int = 512) -> list[RGB]:
    """Cut an image into tiles, as stage tile does."""
    return [
        np.ascontiguousarray(rgb[y : y + side, x : x + side])
        for y in range(0, rgb.shape[0] - side + 1, side)
        for x in range(0, rgb.shape[1] - side + 1, side)
    ]


def f1(right: float, found: float, true: float) -> tuple[float, float, float, float]:
    """Return precision, recall, F1 and IoU from counts."""
    union = found + true - right
    return (
        right / max(found, 1),
        right / max(true, 1),
        2 * right / max(found + true, 1),
        (right / max(union, 1)),
    )


def demo(name: str, engine: Engine, folder: Path) -> None:
    """Print how the engine does on the image pairs of the demo cohort."""
    with (folder / "pairs.tsv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["dataset"] == "bci"]
    cells = np.zeros(3)
    pixels = np.zeros(3)
    positives = np.zeros(3)
    graded = stained = 0
    for row in rows:
        truth = load_truth(folder, row["pair"])
        assert truth.field is not None
        rgb, mpp = picture(folder / row["her2"]), float(row["her2_mpp"])
        height, width = rgb.shape[:2]
        found = labelled(engine, rgb, mpp, prepared(engine, quarters(rgb), mpp))
        places = truth.field.to_moving(np.column_stack([truth.cells.x, truth.cells.y]))
        seen = ((places > 0) & (places < np.array([width, height]) * mpp)).all(axis=1)
        intensity = truth.cells.intensity[seen]
        own = np.column_stack([found.cells.x_px, found.cells.y_px]) * mpp
        at = matched(places[seen], own, APART_UM)
        both = (at >= 0) & (intensity > 0)
        called = found.cells.positive[at] & both
        cells += called.sum(), found.cells.positive.sum(), (intensity > 0).sum()
        graded += int((found.cells.intensity[at[both]] == intensity[both]).sum())
        stained += int(both.sum())
        # The truth is on the H&E grid: what was found is read there through the displacement.
        y, x = np.mgrid[: truth.labels.shape[0], : truth.labels.shape[1]] + 0.5
        there = truth.field.to_moving(np.stack([x, y], axis=-1) * float(row["he_mpp"])) / mpp
        inside = ((there >= 0) & (there < (width, height))).all(axis=-1)
        column, line = np.floor(there[inside]).astype(int).T
        for counts, layer in ((pixels, label_format.nuclei), (positives, label_format.positive)):
            mine, true = layer(found.mask)[line, column], layer(truth.labels)[inside]
            counts += (mine & true).sum(), mine.sum(), true.sum()
    say(f"{name}, demo, positive cells (goal F1 0.85)", f1(*cells))
    say(f"{name}, demo, nuclear pixels (goal IoU 0.60)", f1(*pixels))
    say(f"{name}, demo, positive pixels", f1(*positives))
    sys.stdout.write(
        f"{name}, demo, intensity class right for {graded / max(stained, 1):.3f} of {stained} "
        "positive cells (goal 0.85)\n"
    )


def say(words: str, values: tuple[float, float, float, float]) -> None:
    """Print one line of precision, recall, F1 and IoU."""
    sys.stdout.write(
        f"{words}: precision {values[0]:.3f}, recall {values[1]:.3f}, F1 {values[2]:.3f}, "
        f"IoU {values[3]:.3f}\n"
    )


def deepliif_tiles(images: Path) -> Iterator[tuple[str, RGB, RGB]]:
    """Return name, tile and ground truth of the real Ki67 tiles."""
    folder = images / "deepliif"
    for path in sorted((folder / "test_ihc").glob("*.png")):
        yield path.stem, picture(path), picture(folder / "test_groundtruth" / path.name)
    for path in sorted((folder / "train").glob("*.png")):
        strip = picture(path)
        side = strip.shape[0]
        yield path.stem, np.ascontiguousarray(strip[:, :side]), strip[:, -side:]


def against_deepliif(
    found: label_format.Labelled, truth: RGB
) -> tuple[tuple[float, ...], float, int]:
    """Return scores of nuclear pixels (contours count), sign agreement and cells matched."""
    mine, true = label_format.nuclei(found.mask), truth.max(axis=2) > 128
    red = truth[..., 0] > 128
    _, _, _, centres = cv2.connectedComponentsWithStats(red.astype(np.uint8))
    blue = (truth[..., 2] > 128).astype(np.uint8)
    _, _, _, others = cv2.connectedComponentsWithStats(blue)
    places = np.concatenate([centres[1:], others[1:]]) + 0.5
    positive = np.arange(len(places)) < len(centres) - 1
    own = np.column_stack([found.cells.x_px, found.cells.y_px])
    at = matched(places, own, APART_UM / DEEPLIIF_MPP)
    both = at >= 0
    agree = found.cells.positive[at[both]] == positive[both]
    return (
        f1((mine & true).sum(), mine.sum(), true.sum()),
        float(agree.mean()) if both.any() else 0.0,
        int(both.sum()),
    )


def nuclear(name: str, engine: Engine, images: Path) -> None:
    """Print how the engine does on the real Ki67 tiles with ground truth."""
    scores = []
    for tile, rgb, truth in deepliif_tiles(images):
        found = labelled(engine, rgb, DEEPLIIF_MPP, prepared(engine, [rgb], DEEPLIIF_MPP))
        values, agreement, count = against_deepliif(found, truth)
        scores.append(values[2])
        say(f"{name}, {tile}, nuclear pixels (goal F1 0.60)", values)  # type: ignore[arg-type]
        sys.stdout.write(
            f"{name}, {tile}, sign right for {agreement:.3f} of {count} matched cells (goal 0.85)\n"
        )
    sys.stdout.write(
        f"{name}, nuclear pixels on average: F1 {statistics.mean(scores):.3f} (goal 0.75)\n"
    )


def bci_tiles(images: Path) -> list[Path]:
    """Return the real HER2 tiles, by score."""
    paths = sorted(images.glob("bci_*_1024/IHC/test/*.png"))
    return sorted(paths, key=lambda path: path.stem.split("_")[-1])


def ordered(name: str, engine: Engine, images: Path) -> None:
    """Print what share of cells the engine finds stained on real HER2 tiles."""
    for path in bci_tiles(images):
        rgb = picture(path)
        found = labelled(engine, rgb, BCI_MPP, prepared(engine, quarters(rgb), BCI_MPP))
        counts = np.bincount(found.cells.intensity, minlength=4)
        shares = counts / max(counts.sum(), 1)
        note = " (no tumour)" if path.stem in NO_TUMOUR else ""
        sys.stdout.write(
            f"{name}, {path.stem}{note}: {counts.sum()} cells, 1+ {shares[1]:.3f}, "
            f"2+ {shares[2]:.3f}, 3+ {shares[3]:.3f}, positive "
            f"{found.cells.positive.mean() if counts.sum() else 0:.3f} of cells and "
            f"{label_format.positive(found.mask).mean():.4f} of the tile, read as "
            f"{(*CLASSES, 'nothing')[her2_scores(counts[None])[0]]}\n"
        )


def speed(words: str, rgb: RGB, mpp: float, engine: Engine) -> None:
    """Print stain's time against the decode of the tile as JPEG, both in turn."""
    tiles = quarters(rgb)
    stains = prepared(engine, tiles, mpp)
    stored = [simplejpeg.encode_jpeg(tile, 85, colorsubsampling="420") for tile in tiles]

    def decode() -> None:
        for data in stored:
            simplejpeg.decode_jpeg(data)

    def label() -> None:
        for tile in tiles:
            engine.segment(tile, mpp, stains)

    times = interleaved({"stain": label, "decode": decode}, rounds=5)
    middle, least, most = ratio(times, "stain", "decode")
    each = 1e3 * statistics.median(times["stain"]) / len(tiles)
    sys.stdout.write(
        f"stain, {words}: {middle:.1f} x the decode ({least:.1f} to {most:.1f}; goal 40, stretch "
        f"25), {each:.1f} ms per tile of 512\n"
    )


def main() -> None:
    """Print one line per figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, help="folder of real test images")
    parser.add_argument("--deepliif", type=Path, help="folder of a DeepLIIF model")
    given = parser.parse_args()
    # As the command line does.
    keep_freed_memory()
    cv2.setNumThreads(1)
    wanted: dict[str, dict[str, str]] = {"stain": {}}
    if given.deepliif is None:
        sys.stdout.write("deepliif: not measured, no model given (--deepliif)\n")
    else:
        wanted["deepliif"] = {"model": str(given.deepliif)}
    options = MaskOptions(engines=wanted)
    engines = {name: module(name).load(own, options) for name, own in options.engines.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_cohort(folder, "small", workers=1)
        for engine_name, engine in engines.items():
            demo(engine_name, engine, folder)
            if given.images is not None:
                nuclear(engine_name, engine, given.images)
                ordered(engine_name, engine, given.images)
        for drawn in sorted((folder / "bci" / "IHC").glob("*/*.png")):
            speed(f"demo {drawn.stem} at 0.46 um/px", picture(drawn), BCI_MPP, engines["stain"])
    if given.images is None:
        sys.stdout.write("real tiles: not measured, no folder given (--images)\n")
        return
    for path in bci_tiles(given.images):
        speed(f"{path.stem} at 0.46 um/px", picture(path), BCI_MPP, engines["stain"])
    for tile, rgb, _ in deepliif_tiles(given.images):
        speed(f"{tile} at 0.25 um/px", rgb, DEEPLIIF_MPP, engines["stain"])


if __name__ == "__main__":
    main()
