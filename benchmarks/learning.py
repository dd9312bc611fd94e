"""What both networks learn of the demo cohort, on tiles of cases they have not seen.

The data part of the graph is run, unless `--index` names an index; then GenerationNet,
SegmentationNet with the frozen branch and SegmentationNet without it are trained and evaluated by
the stages, with the options of preset demo. Goals: GenerationNet
beats the mean colour and the blurred H&E on SSIM and PSNR, and generates the stain (`STAIN_LEAST`);
the pooled F1 of SegmentationNet is higher than that of a threshold on the darkness of blurred H&E
by `F1_GAIN_LEAST`, and the interval of the difference, over cases, excludes 0. A missed goal ends
in exit 1. About fifteen minutes on two processors.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from _graph import ROOT, lay_out, snakemake

from hemera.config import (
    DEMO_SHEET,
    EvaluateOptions,
    TrainGenerationOptions,
    TrainSegmentationOptions,
    load,
)
from hemera.files import layout
from hemera.stages import evaluate, train_generation, train_segmentation

F1_GAIN_LEAST = 0.15
"""F1 alone is no goal: a threshold on darkness has 0.69."""
STAIN_LEAST = {
    ("dab_r", "pooled"): 0.60,
    ("dab_r", "tiles"): 0.95,
    ("brown_recall_8", "pooled"): 0.50,
    ("brown_ratio", "pooled"): 0.25,
    ("red_positive", "pooled"): 5.0,
}
"""Least values of GenerationNet by metric and aggregation; the page warns below 0.25 of the DAB of
brown pixels."""
STAIN_SHOWN = (
    ("brown_precision", "pooled"),
    ("brown_precision_8", "pooled"),
    ("dab_kl", "pooled"),
    ("cell_f1", "pooled"),
    ("cell_score", "cases"),
)
"""What is printed without a goal."""


def make_index(folder: Path, **options: Any) -> Path:
    """Run the graph on the demo cohort up to its index, which has these options."""
    lay_out(folder, {"preset": "demo", "index": options})
    (folder / DEMO_SHEET).parent.mkdir()
    shutil.copy(ROOT / DEMO_SHEET, folder / DEMO_SHEET)
    snakemake(folder, "--cores", "all", "data")
    return folder / "results" / "index" / "index.parquet"


def print_line(text: str) -> None:
    """Print a line now."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def measured_row(
    metrics: list[dict[str, Any]], network: str, method: str, metric: str, of: str
) -> dict[str, Any]:
    """Return the row of a metric over all tiles."""
    (row,) = [
        row for row in metrics
        if (row["network"], row["method"], row["metric"], row["aggregation"], row["group"])
        == (network, method, metric, of, "all")
    ]  # fmt: skip
    return row


def figure(row: dict[str, Any]) -> str:
    """Return a metric with its interval where there is one."""
    if row["value"] is None:
        return "none"
    interval = "" if row["low"] is None else f" ({row['low']:.3f} to {row['high']:.3f})"
    return f"{row['value']:.3f}{interval}"


def reached(goal: str, met: bool) -> bool:
    """Print whether a goal was met, and return it."""
    print_line(f"  goal, {goal}: {'met' if met else 'missed'}")
    return met


def generation_goals(metrics: list[dict[str, Any]]) -> list[bool]:
    """Return whether GenerationNet met each of its goals, and print them."""

    def value(method: str, metric: str, of: str) -> float:
        found = measured_row(metrics, "generation", method, metric, of)["value"]
        return float("nan") if found is None else float(found)

    found = [
        reached(
            f"{metric} above that of {other}",
            value("demo", metric, "mean") > value(other, metric, "mean"),
        )
        for metric in ("ssim", "psnr_db")
        for other in ("blurred", "mean_colour")
    ]
    for (metric, of), least in STAIN_LEAST.items():
        own, real = (value(method, metric, of) for method in ("demo", "real"))
        print_line(f"  {metric}, {of}: {own:.3f} (real image {real:.3f})")
        found.append(reached(f"{metric}, {of}, at least {least}", own >= least))
    for metric, of in STAIN_SHOWN:
        print_line(
            f"  {metric}, {of}: {figure(measured_row(metrics, 'generation', 'demo', metric, of))}"
        )
    return found


def main() -> None:
    """Train and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--index", type=Path, help="an index of the demo cohort; none: make it")
    given = parser.parse_args()
    config = load({"preset": "demo"})
    generation = config.options(TrainGenerationOptions)
    segmentation = config.options(TrainSegmentationOptions)
    goals: list[bool] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.perf_counter()

        def minutes() -> str:
            nonlocal started
            took, started = (time.perf_counter() - started) / 60, time.perf_counter()
            return f"{took:.1f} min"

        index = given.index.resolve() if given.index else make_index(folder / "graph")
        print_line(f"demo cohort up to its index: {'given' if given.index else minutes()}")
        generator, generator_metadata, generation_history = (
            layout.path(pattern, folder, generator="demo")
            for pattern in (layout.GENERATOR, layout.GENERATOR_METADATA, layout.GENERATION_HISTORY)
        )
        train_generation.run(
            index=index, checkpoints=folder / "checkpoints", generator=generator,
            metadata=generator_metadata, history=generation_history, options=generation,
        )  # fmt: skip
        print_line(f"GenerationNet, {generation.epochs} epochs: {minutes()}")
        for branch in (segmentation.generation_branch, "none"):
            train_segmentation.run(
                index=index, checkpoints=folder / "checkpoints", generator=generator,
                generator_metadata=generator_metadata,
                segmenter=layout.path(layout.SEGMENTER, folder),
                metadata=layout.path(layout.SEGMENTER_METADATA, folder),
                history=layout.path(layout.SEGMENTATION_HISTORY, folder),
                options=segmentation.replace(generation_branch=branch),
            )  # fmt: skip
            took = minutes()
            measured = folder / f"{branch}.metrics.parquet"
            evaluate.run(
                index=index, results=folder, preset="demo",
                tiles=folder / f"{branch}.tiles.parquet", metrics=measured,
                page=folder / f"{branch}.html", options=config.options(EvaluateOptions),
            )  # fmt: skip
            metrics = pq.read_table(measured).to_pylist()
            if branch != "none":
                for method in ("demo", "blurred", "mean_colour"):
                    psnr, ssim = (
                        figure(measured_row(metrics, "generation", method, metric, "mean"))
                        for metric in ("psnr_db", "ssim")
                    )
                    print_line(f"  {method:<12} SSIM {ssim}, PSNR {psnr} dB")
                goals += generation_goals(metrics)
            print_line(f"SegmentationNet, branch {branch}, {segmentation.epochs} epochs: {took}")
            for method in ("segmenter", "dark", "best_constant"):
                network = ("segmentation", method)
                shown = ", ".join(
                    f"{metric} {figure(measured_row(metrics, *network, metric, 'pooled'))}"
                    for metric in ("f1", "iou", "precision", "recall")
                )
                print_line(f"  {method:<13} pooled {shown}")
            if branch != "none":
                gain = measured_row(metrics, "segmentation", "segmenter", "f1_over_dark", "pooled")
                print_line(f"  F1 minus that of darkness {figure(gain)}")
                met = gain["value"] is not None and gain["value"] >= F1_GAIN_LEAST
                goals += [
                    reached(f"F1 above that of darkness by {F1_GAIN_LEAST}", met),
                    reached("interval excludes 0", gain["low"] is not None and gain["low"] > 0),
                ]
            minutes()
    if not all(goals):
        sys.exit(1)


if __name__ == "__main__":
    main()
