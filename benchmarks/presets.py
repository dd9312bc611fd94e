"""Presets that tolerate misaligned pairs against preset pix2pix, on the demo cohort.

The data part of the graph is run, unless `--index` names an index; then pix2pix, asp and misaligned
are trained by the stage with the budget of preset demo, narrow networks and crops of 128 px, the
least that all three take, and their images of unseen tiles compared with the real ones. Goal: more
of the stain than pix2pix, by the concordance of DAB and by Dice of brown pixels. The amount alone,
`brown_ratio`, says little: an untrained generator is brown everywhere. LPIPS is left out of
misaligned, because no weights are given. Twenty-five minutes of processor time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from learning import figure, make_index, measured_row, print_line, reached

from hemera.config import EvaluateOptions, TrainGenerationOptions, load
from hemera.dataset.index import TileIndex
from hemera.dataset.torch_dataset import TileDataset
from hemera.evaluation import baselines, image_quality, summary
from hemera.evaluation.image_quality import Network
from hemera.evaluation.perceptual import FeatureExtractors
from hemera.files import layout
from hemera.networks import storage
from hemera.stages import train_generation
from hemera.training import session

PRESETS = ("pix2pix", "asp", "misaligned")
METRICS = (
    *("dab_r", "dab_concordance", "brown_ratio", "brown_dice", "brown_recall_8"),
    *("red_positive", "red_other"),
)


def options_of(preset: str, epochs: int) -> TrainGenerationOptions:
    """Return the preset's method with the budget of preset demo, and sizes for a processor."""
    config = load({"preset": "demo", "evaluate": {"generators": list(PRESETS)}})
    method = config.generator(preset)
    return method.replace(
        network=method.network if method.contrastive else "unet_128",
        base_width=16, discriminator_width=8, crop_px=128, epochs=epochs,
        decay_from_epoch=epochs // 2, torch_threads=1,
    )  # fmt: skip


def write_pictures(folder: Path, nets: dict[str, Network], tiles: TileDataset) -> None:
    """Write four test tiles side by side: H&E, HER2, and the image of each generator."""
    folder.mkdir(parents=True, exist_ok=True)
    for place in np.linspace(0, len(tiles) - 1, min(4, len(tiles))).round().astype(int):
        item = image_quality.stored(tiles, int(place))
        images = [item.over_white("he"), item.over_white("her2")]
        for net in nets.values():
            shown = image_quality.input_image(net, item)[None]
            (output,) = image_quality.predict(net, shown, "generation", session.find_device("cpu"))
            images.append(image_quality.to_image(net, output, item))
        cv2.imwrite(str(folder / f"{item.tile}.png"), np.hstack(images)[..., ::-1])


def main() -> None:
    """Train and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--index", type=Path, help="an index of the demo cohort; none: make it")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--results", type=Path, help="folder that keeps networks and pictures")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = given.results or Path(name)
        index = given.index.resolve() if given.index else make_index(folder / "graph")
        nets: dict[str, Network] = {}
        for preset in PRESETS:
            options = options_of(preset, given.epochs)
            weights, metadata, history = (
                layout.path(pattern, folder, generator=preset)
                for pattern in (
                    layout.GENERATOR, layout.GENERATOR_METADATA, layout.GENERATION_HISTORY
                )
            )  # fmt: skip
            started = time.process_time()
            train_generation.run(
                index=index, checkpoints=folder / "checkpoints" / preset, generator=weights,
                metadata=metadata, history=history, options=options,
            )  # fmt: skip
            took = time.process_time() - started
            net, described = storage.load_generation(weights, metadata)
            print_line(
                f"{preset}: {described['parameters']:,} parameters, {options.epochs} epochs, the "
                f"best is {described['best_epoch']}, {took:.0f} s of processor time"
            )
            nets[preset] = Network(net, storage.background_is_white(described))
        goals = compare(index, nets, given.results)
    if not all(goals):
        sys.exit(1)


def compare(index: Path, nets: dict[str, Network], pictures: Path | None) -> list[bool]:
    """Print the stain of each generator on test tiles, and whether the goals are met."""
    opened = TileIndex(index)
    tiles = TileDataset(opened, network="generation", split="test")
    options = EvaluateOptions(cell_tiles=0, bootstrap_samples=200)
    with session.session(seed=0, threads=1, device="cpu") as device:
        rows, features = image_quality.evaluate_generators(
            nets, tiles, opened.facts("generation", "test"), baselines.measure_colors(opened),
            opened.mask_options, FeatureExtractors(), device, options,
        )  # fmt: skip
        if pictures is not None:
            write_pictures(pictures / "pictures", nets, tiles)
    metrics: list[dict[str, Any]] = summary.summarise(rows, features, options)
    for method in (*PRESETS, "blurred"):
        shown = ", ".join(
            f"{name} {figure(measured_row(metrics, 'generation', method, name, of))}"
            for name, of in (("ssim", "mean"), *((name, "pooled") for name in METRICS))
        )
        print_line(f"  {method}: {shown}")

    def value(method: str, name: str) -> float:
        return float(measured_row(metrics, "generation", method, name, "pooled")["value"])

    return [
        reached(
            f"{preset} has a higher {name} than pix2pix",
            value(preset, name) > value("pix2pix", name),
        )
        for preset in PRESETS[1:]
        for name in ("dab_concordance", "brown_dice")
    ]  # fmt: skip


if __name__ == "__main__":
    main()
