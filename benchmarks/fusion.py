"""Whether SegmentationNet uses GenerationNet, where few tiles have masks and H&E shows HER2 less.

Synthetic image pairs (`hemera demo --size tiles`) whose tumour cells show their HER2 in H&E 0.4
times as much as those of the tutorial, or with ``--cohort demo`` the cohort of the tutorial. A
tenth of the tiles that GenerationNet learns from have masks for SegmentationNet, which is trained
once with each kind of generation branch and once without, and tested on cases that neither has
seen. Options are those of preset demo but for the epochs. Printed: pooled F1; its difference to the
network without a branch; the answers that change and the change of F1 when the branch is exchanged;
95 % intervals over cases. Goals, of both fusions that are not at 1/32 of the side: the branch of
another tile changes at least 2 % of the answers, and lowers F1, the interval without 0. Whether a
branch helps is printed and is no goal. About twenty minutes of processor time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from _graph import lay_out, snakemake
from learning import make_index as make_demo_index
from learning import print_line, reached

from hemera import demo
from hemera.config import (
    EvaluateOptions,
    TrainGenerationOptions,
    TrainSegmentationOptions,
    load,
)
from hemera.dataset.index import TileIndex
from hemera.dataset.torch_dataset import TileDataset
from hemera.evaluation import baselines, branch_swap, image_quality, metrics, summary
from hemera.evaluation.image_quality import COUNTS, SEGMENTER, Network
from hemera.files import layout
from hemera.networks import storage
from hemera.stages import train_generation, train_segmentation
from hemera.training import session

VISIBILITY = 0.4
MASKED_TILES = {"less_visible": 14, "demo": 10}
"""Training tiles with masks, by cohort."""
NEW_BRANCHES = ("virtual_rgb_input", "decoder_maps")
BRANCHES = ("none", "skip16", *NEW_BRANCHES)
CHANGED_LEAST = 0.02


def make_index(folder: Path, cohort: str) -> Path:
    """Write the cohort, and run the graph up to its index."""
    if cohort == "demo":
        return make_demo_index(folder, segmentation_train=MASKED_TILES[cohort])
    lay_out(
        folder,
        {
            "preset": "demo",
            "allow_demo_sizes": True,
            "sheet": "cohort/pairs.tsv",
            "index": {
                "segmentation_train": MASKED_TILES[cohort],
                "segmentation_val": 4,
                "test_fraction": 0.0,
                "val_fraction": 0.1,
            },
        },
    )
    demo.write_cohort(folder / "cohort", "tiles", visibility=VISIBILITY)
    snakemake(folder, "--cores", "all", layout.INDEX)
    return folder / layout.INDEX


def trained_generator(index: Path, folder: Path, epochs: int, seed: int) -> dict[str, Path]:
    """Train GenerationNet; return its weights and their description."""
    options = load({"preset": "demo"}).options(TrainGenerationOptions)
    paths = {
        name: layout.path(pattern, folder, generator="demo")
        for name, pattern in (
            ("generator", layout.GENERATOR),
            ("metadata", layout.GENERATOR_METADATA),
            ("history", layout.GENERATION_HISTORY),
        )
    }
    train_generation.run(
        index=index, checkpoints=folder / "checkpoints", **paths,
        options=options.replace(
            epochs=epochs, decay_from_epoch=epochs // 2, seed=seed, torch_threads=1
        ),
    )  # fmt: skip
    return {"generator": paths["generator"], "generator_metadata": paths["metadata"]}


def answers(
    index: Path, folder: Path, given: dict[str, Path], branch: str, epochs: int, seed: int
) -> tuple[image_quality.Rows, image_quality.Rows]:
    """Train SegmentationNet with a branch; return its rows, and the metrics of all tiles."""
    options = load({"preset": "demo"}).options(TrainSegmentationOptions)
    own = folder / branch
    paths = {
        name: layout.path(pattern, own)
        for name, pattern in (
            ("segmenter", layout.SEGMENTER),
            ("metadata", layout.SEGMENTER_METADATA),
            ("history", layout.SEGMENTATION_HISTORY),
        )
    }
    train_segmentation.run(
        index=index, checkpoints=folder / "checkpoints", **given, **paths,
        options=options.replace(
            generation_branch=branch, epochs=epochs, seed=seed, torch_threads=1
        ),
    )  # fmt: skip
    net, described = storage.load_segmentation(paths["segmenter"], paths["metadata"])
    network = Network(net, storage.background_is_white(described))
    opened = TileIndex(index)
    tiles = TileDataset(opened, network="segmentation", split="test")
    facts = opened.facts("segmentation", "test")
    evaluation = EvaluateOptions()
    with session.session(seed=evaluation.seed, threads=1, device="cpu") as device:
        darkness = baselines.fit_darkness(opened)
        rows = image_quality.evaluate_segmenter(network, tiles, facts, darkness, device, evaluation)
        swaps = branch_swap.measure(network, tiles, facts, device, evaluation)
    found = summary.summarise(rows, {}, evaluation)
    found += branch_swap.summarise(swaps, rows, evaluation)
    kept = [row for row in rows if row["method"] == SEGMENTER]
    return kept, [row for row in found if row["group"] == "all"]


def shown(row: Any) -> str:
    """Return a value and its interval, of a row of `tables.METRICS` or a Summary."""
    value, low, high = (
        (row["value"], row["low"], row["high"])
        if isinstance(row, dict)
        else (row[0], row[3], row[4])
    )
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def report(branch: str, found: image_quality.Rows) -> bool:
    """Print the metrics of a network; return whether the goals of its branch are met."""
    by = {(row["method"], row["metric"], row["aggregation"]): row for row in found}
    print_line(f"SegmentationNet, branch {branch}: F1 {shown(by[SEGMENTER, 'f1', 'pooled'])}")
    if branch == "none":
        print_line(f"  threshold on darkness: F1 {shown(by['dark', 'f1', 'pooled'])}")
        return True
    for swap in branch_swap.SWAPS:
        if (SEGMENTER, "branch_changed", swap) not in by:
            print_line(f"  {swap:<10} not applicable")
            continue
        changed, change = (
            by[SEGMENTER, metric, swap] for metric in ("branch_changed", "branch_f1_change")
        )
        print_line(f"  {swap:<10} answers that change {shown(changed)}, F1 {shown(change)}")
    if branch not in NEW_BRANCHES:
        return True
    changed, change = (
        by[SEGMENTER, metric, "other_tile"] for metric in ("branch_changed", "branch_f1_change")
    )
    met = changed["value"] >= CHANGED_LEAST and change["high"] < 0
    return reached("another tile's branch changes 2 % of the answers and lowers F1", met)


def main() -> None:
    """Train, exchange the branches, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cohort", choices=list(MASKED_TILES), default="less_visible")
    parser.add_argument("--index", type=Path, help="the index of an earlier run; none: make it")
    parser.add_argument("--folder", type=Path, help="keep the networks here, and resume")
    parser.add_argument("--generation-epochs", type=int, default=10)
    parser.add_argument("--segmentation-epochs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1, help="of all trainings")
    given = parser.parse_args()
    met = []
    with tempfile.TemporaryDirectory() as name:
        folder = given.folder.resolve() if given.folder else Path(name)
        index = given.index.resolve() if given.index else make_index(folder / "graph", given.cohort)
        folder = folder / f"seed{given.seed}"
        print_line(f"seed {given.seed}")
        generator = trained_generator(index, folder, given.generation_epochs, given.seed)
        reference = None
        for branch in BRANCHES:
            rows, found = answers(
                index, folder, generator, branch, given.segmentation_epochs, given.seed
            )
            met.append(report(branch, found))
            counts = np.array([[row[count] for count in COUNTS] for row in rows])
            if reference is None:
                reference = counts
                continue
            bootstrap = metrics.Bootstrap(
                [row["case"] for row in rows], samples=1000, confidence=summary.CONFIDENCE, seed=1
            )
            both = np.hstack([counts, reference])
            over = metrics.of_sums(both, metrics.f1_difference, len(both), bootstrap)
            print_line(f"  F1 minus that of the network without a branch: {shown(over)}")
    if not all(met):
        sys.exit(1)


if __name__ == "__main__":
    main()
