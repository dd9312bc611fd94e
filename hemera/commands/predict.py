"""Predict HER2-positive regions from an H&E slide alone; see `hemera.inference`."""

from __future__ import annotations

import argparse
from pathlib import Path

from hemera import inference
from hemera.commands import flags
from hemera.training.session import PRECISIONS


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.description = (
        "Predict HER2-positive regions from an H&E slide alone. Writes a new folder, OUT/NAME: "
        "NAME.mask.tif (255 where HER2-positive, else 0), NAME.positive.geojson (its regions, for "
        "QuPath), NAME.overlay.png and NAME.json (areas, fractions, model, versions)."
    )
    parser.add_argument("slide", type=Path, metavar="SLIDE", help="an H&E slide or image")
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help="output of train_segmentation (results/train_segmentation)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results/predict"),
        metavar="DIR",
        help="where to write the folder (default results/predict)",
    )
    parser.add_argument(
        "--mpp", type=flags.positive, help="um/px of the slide, where its file does not state it"
    )
    parser.add_argument(
        "--model-mpp",
        type=flags.positive,
        metavar="MPP",
        help="um/px of the tiles the model was trained on, where its metadata does not state it",
    )
    parser.add_argument(
        "--upsample",
        action="store_true",
        help="enlarge a slide that is coarser than the model's tiles instead of refusing it",
    )
    parser.add_argument(
        "--threshold",
        type=_fraction,
        default=0.5,
        metavar="P",
        help="probability from which a pixel is positive (default 0.5)",
    )
    parser.add_argument(
        "--min-area-um2",
        type=_area,
        default=25.0,
        metavar="AREA",
        help="smaller regions are left out of the GeoJSON, not of mask and areas (default 25, "
        "half a nucleus)",
    )
    parser.add_argument(
        "--probability",
        action="store_true",
        help="also write NAME.probability.tif, the probability from 0 to 255",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default auto)"
    )
    parser.add_argument(
        "--precision",
        choices=tuple(PRECISIONS),
        default="float32",
        help="precision of the network; all but float32 need a GPU (default float32)",
    )
    parser.add_argument(
        "--batch-size",
        type=flags.workers,
        default=8,
        metavar="N",
        help="tiles that the network takes at once (default 8)",
    )
    parser.add_argument(
        "--torch-threads",
        type=flags.workers,
        metavar="N",
        help="threads of the network on a CPU (default: one per processor)",
    )
    parser.add_argument(
        "--workers",
        type=flags.workers,
        default=2,
        metavar="N",
        help="threads that read (default 2)",
    )


def main(namespace: argparse.Namespace) -> int:
    """Predict."""
    names = (
        "mpp", "model_mpp", "upsample", "threshold", "min_area_um2", "probability", "device",
        "precision", "batch_size", "torch_threads", "workers",
    )  # fmt: skip
    options = {name: getattr(namespace, name) for name in names}
    inference.predict(namespace.slide, namespace.model, namespace.out, **options)
    return 0


def _fraction(word: str) -> float:
    value = flags.positive(word)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not between 0 and 1")
    return value


def _area(word: str) -> float:
    return 0.0 if word == "0" else flags.positive(word)
