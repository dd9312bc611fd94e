"""evaluate: both networks on the tiles of unseen cases, beside trivial baselines.

Reads the index, the test subsets and both networks; writes metrics per tile, metrics per group
and a page. The threshold is an option, never fitted to the test tiles. A network without test
tiles is no error: its rows are missing, and the page says so.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn
from tqdm import tqdm

from hemera import masks, metrics, tables, training
from hemera.config import EvaluateOptions
from hemera.dataset import TileDataset
from hemera.metrics import Confusion
from hemera.pages import Example, evaluation_page

log = logging.getLogger(__name__)

RGB = npt.NDArray[np.uint8]

IMAGE_METRICS = ("psnr_db", "ssim", "ssim_gaussian")
COUNTS = tuple(f"{name}_px" for name in Confusion._fields)
SEED = 0
"""Of evaluation: nothing is drawn, but a session wants a seed."""


@dataclasses.dataclass(frozen=True)
class Colours:
    """Mean and standard deviation of each channel over the training tiles, 0 to 255."""

    her2_mean: npt.NDArray[np.float64]
    her2_std: npt.NDArray[np.float64]
    blurred_mean: npt.NDArray[np.float64]
    blurred_std: npt.NDArray[np.float64]


def run(
    *,
    index: Path,
    generator: Path,
    generator_metadata: Path,
    generation_history: Path,
    segmenter: Path,
    segmenter_metadata: Path,
    segmentation_history: Path,
    report: Path,
    preset: str,
    tiles: Path,
    metrics: Path,
    page: Path,
    options: EvaluateOptions,
) -> None:
    """Evaluate both networks.

    Args:
        index: the index; its columns generation_split and segmentation_split name the test tiles.
        generator: weights of GenerationNet.
        generator_metadata: the JSON beside them.
        generation_history: table of its training.
        segmenter: weights of SegmentationNet, the frozen branch included.
        segmenter_metadata: the JSON beside them.
        segmentation_history: table of its training.
        report: the page about the data, to which the page links.
        preset: preset of the cohort, shown on the page.
        tiles: written: `tables.EVALUATION_TILES`.
        metrics: written: `tables.METRICS`.
        page: written: the page.
        options: the options.

    Raises:
        TrainingError: weights that do not fit; networks of another index than this one.
    """
    index_metadata = training.index_metadata(index)
    engine = index_metadata["mask_target"]
    painter, painter_metadata = training.load_generation(generator, generator_metadata)
    finder, finder_metadata = training.load_segmentation(segmenter, segmenter_metadata)
    described = {"generation": painter_metadata, "segmentation": finder_metadata}
    for network, found in described.items():
        training.check_index(network, found, index_metadata["fingerprint"])
    test = {
        network: TileDataset(index, network=network, part="test", engine=engine)
        for network in described
    }
    rows: list[dict[str, Any]] = []
    with training.session(
        seed=SEED, threads=options.torch_threads, device=options.device
    ) as device:
        painter.to(device)
        finder.to(device)
        facts = {
            network: {row["tile"]: row for row in training.subset(index, network, "test")}
            for network in test
        }
        if len(test["generation"]):
            seen = TileDataset(index, network="generation", part="train", images=("he", "her2"))
            colours = measure_colours(seen, options.blur_sigma_px)
            for item, image in answers(painter, test["generation"], "generation", device, options):
                fact = facts["generation"][item["tile"]]
                rows += judge_images(fact, item, to_image(image), colours, options.blur_sigma_px)
        else:
            log.warning("no test tiles for GenerationNet: it is not evaluated")
        for item, logits in answers(finder, test["segmentation"], "segmentation", device, options):
            fact = facts["segmentation"][item["tile"]]
            rows += judge_masks(fact, item, to_probability(logits) >= options.threshold)
        if not len(test["segmentation"]):
            log.warning("no test tiles for SegmentationNet: it is not evaluated")
        examples = [
            show(tile, label, test, facts, painter, finder, device, rows)
            for tile, label in choose(rows, options.gallery_tiles)
        ]
    tile_table = pa.Table.from_pylist(rows, schema=tables.EVALUATION_TILES)
    metric_table = pa.Table.from_pylist(summarise(rows), schema=tables.METRICS)
    provenance = {
        **tables.provenance(options),
        "fingerprint": index_metadata["fingerprint"],
        "networks": ", ".join(
            f"{network}: epoch {found.get('epoch')}, weight map "
            f"{found.get('options', {}).get('weight_map', 'none')}"
            for network, found in described.items()
        ),
    }
    tables.write(tiles, tile_table, tables.EVALUATION_TILES, provenance)
    tables.write(metrics, metric_table, tables.METRICS, provenance)
    evaluation_page(
        page,
        preset=preset,
        metrics=metric_table,
        tiles=tile_table,
        histories={
            "generation": tables.read(generation_history, tables.HISTORY),
            "segmentation": tables.read(segmentation_history, tables.HISTORY),
        },
        metadata=described,
        index_metadata=index_metadata,
        examples=examples,
        options=options,
        report=Path(os.path.relpath(report, page.parent)).as_posix(),
    )


def answers(
    net: nn.Module,
    tiles: TileDataset,
    network: str,
    device: torch.device,
    options: EvaluateOptions,
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Yield each tile with what the network answers, (C, H, W) on the CPU, batch by batch."""
    starts = range(0, len(tiles), options.batch_size)
    for start in tqdm(starts, desc=f"evaluate {network}", unit="batch", disable=None):
        items = [tiles.stored(i) for i in range(start, min(start + options.batch_size, len(tiles)))]
        # Tiles of one size go through together; tiles of different data sets may differ.
        groups: dict[tuple[int, ...], list[int]] = {}
        for place, item in enumerate(items):
            groups.setdefault(item["he"].shape, []).append(place)
        found: dict[int, Tensor] = {}
        for places in groups.values():
            images = np.stack([items[place]["he"] for place in places])
            answer = predict(net, images, network, device)
            found.update(zip(places, answer, strict=True))
        for place, item in enumerate(items):
            yield item, found[place]


@torch.inference_mode()
def predict(net: nn.Module, images: RGB, network: str, device: torch.device) -> Tensor:
    """Return what a network answers to (B, H, W, 3) H&E: (B, C, H, W) on the CPU."""
    unit = training.to_unit(torch.from_numpy(images).permute(0, 3, 1, 2), device)
    answer: Tensor = net(unit * 2 - 1 if network == "generation" else unit)
    return answer.cpu()


def to_image(generated: Tensor) -> RGB:
    """Return (H, W, 3) uint8, truncated, of GenerationNet's (3, H, W) in [-1, 1]."""
    return metrics.to_uint8(generated.permute(1, 2, 0).numpy())


def to_probability(logits: Tensor) -> npt.NDArray[np.float32]:
    """Return (H, W) probabilities of SegmentationNet's (1, H, W) logits."""
    return np.asarray(torch.sigmoid(logits)[0].numpy(), np.float32)


def blurred(image: RGB, sigma_px: float) -> npt.NDArray[np.float64]:
    """Return an image (H, W, 3) blurred by a Gaussian, in floats."""
    return np.asarray(cv2.GaussianBlur(image.astype(np.float64), (0, 0), sigma_px), np.float64)


def measure_colours(tiles: TileDataset, sigma_px: float) -> Colours:
    """Measure the colours of HER2 and of blurred H&E over the training tiles."""
    sums = np.zeros((2, 2, 3))
    pixels = 0
    for position in tqdm(range(len(tiles)), desc="training colours", unit="tile", disable=None):
        item = tiles.stored(position)
        images = (item["her2"].astype(np.float64), blurred(item["he"], sigma_px))
        for which, image in enumerate(images):
            sums[which, 0] += image.sum((0, 1))
            sums[which, 1] += np.square(image).sum((0, 1))
        pixels += images[0].shape[0] * images[0].shape[1]
    mean = sums[:, 0] / pixels
    std = np.sqrt(np.maximum(sums[:, 1] / pixels - np.square(mean), 0))
    return Colours(mean[0], std[0], mean[1], std[1])


def baselines(he: RGB, colours: Colours, sigma_px: float) -> dict[str, RGB]:
    """Return what needs no training: the mean colour, and blurred H&E in the colours of HER2.

    Both know the training tiles' colours, and neither the target.
    """
    soft = (blurred(he, sigma_px) - colours.blurred_mean) / np.maximum(colours.blurred_std, 1e-6)
    images = {
        "mean_colour": np.broadcast_to(colours.her2_mean, he.shape),
        "blurred": soft * colours.her2_std + colours.her2_mean,
    }
    return {
        name: np.clip(np.rint(image), 0, 255).astype(np.uint8) for name, image in images.items()
    }


def judge_images(
    fact: Mapping[str, str],
    item: Mapping[str, Any],
    generated: RGB,
    colours: Colours,
    sigma_px: float,
) -> list[dict[str, Any]]:
    """Return the rows of one tile: the network and both baselines."""
    images = {"model": generated, **baselines(item["he"], colours, sigma_px)}
    return [
        {
            **fact,
            "network": "generation",
            "method": method,
            "psnr_db": metrics.psnr(image, item["her2"]),
            "ssim": metrics.ssim(image, item["her2"]),
            "ssim_gaussian": metrics.ssim(image, item["her2"], gaussian=True),
        }
        for method, image in images.items()
    ]


def judge_masks(
    fact: Mapping[str, str], item: Mapping[str, Any], predicted: npt.NDArray[np.bool_]
) -> list[dict[str, Any]]:
    """Return the rows of one tile: the network and both constants."""
    truth = masks.positive(item["mask"])
    predictions = {
        "model": predicted,
        "all_positive": np.ones_like(truth),
        "all_negative": np.zeros_like(truth),
    }
    return [
        {
            **fact,
            "network": "segmentation",
            "method": method,
            **dict(zip(COUNTS, metrics.confusion(prediction, truth), strict=True)),
        }
        for method, prediction in predictions.items()
    ]


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of `tables.METRICS`: all tiles, and each data set, score and case."""
    found = []
    for network in ("generation", "segmentation"):
        own = [row for row in rows if row["network"] == network]
        for group, members in _groups(own):
            methods: dict[str, list[Mapping[str, Any]]] = {}
            for row in members:
                methods.setdefault(row["method"], []).append(row)
            measured = {
                method: _image_metrics(of) if network == "generation" else _mask_metrics(of)
                for method, of in methods.items()
            }
            if network == "segmentation":
                measured["best_constant"] = {
                    key: max(
                        (measured[method][key] for method in ("all_positive", "all_negative")),
                        key=lambda summary: -math.inf if summary.value is None else summary.value,
                    )
                    for key in measured["all_positive"]
                }
            found += [
                {
                    "network": network,
                    "method": method,
                    "group": group,
                    "metric": metric,
                    "aggregation": aggregation,
                    **summary._asdict(),
                }
                for method, values in measured.items()
                for (metric, aggregation), summary in values.items()
            ]
    return found


def _groups(
    rows: Sequence[Mapping[str, Any]],
) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Return the groups of rows by name: all, dataset=..., score=..., case=...; none if no row."""
    groups: list[tuple[str, list[Mapping[str, Any]]]] = []
    if rows:
        groups.append(("all", list(rows)))
    for key in ("dataset", "score", "case"):
        for value in sorted({row[key] for row in rows}):
            groups.append((f"{key}={value}", [row for row in rows if row[key] == value]))
    return groups


def _image_metrics(
    rows: Sequence[Mapping[str, Any]],
) -> dict[tuple[str, str], metrics.Summary]:
    found = {
        (metric, "mean"): metrics.summarise(row[metric] for row in rows) for metric in IMAGE_METRICS
    }
    infinite = sum(math.isinf(row["psnr_db"]) for row in rows)
    found["psnr_infinite", "count"] = metrics.Summary(float(infinite), None, len(rows))
    return found


def _mask_metrics(
    rows: Sequence[Mapping[str, Any]],
) -> dict[tuple[str, str], metrics.Summary]:
    return metrics.aggregate(Confusion(*(row[name] for name in COUNTS)) for row in rows)


def choose(rows: Sequence[Mapping[str, Any]], wanted: int) -> list[tuple[str, str]]:
    """Choose the tiles of the page: evenly from the best to the worst, with their labels.

    They are ordered by F1 of SegmentationNet where it was asked, else by SSIM of GenerationNet.
    Tiles without a positive pixel in truth and answer come last: they show the least.
    """
    order: dict[str, tuple[float, str]] = {}
    for row in rows:
        if row["method"] != "model":
            continue
        if row["network"] == "segmentation":
            count = Confusion(*(row[name] for name in COUNTS))
            empty = count.true_positive + count.false_positive + count.false_negative == 0
            order[row["tile"]] = (-1.0 if empty else metrics.scores(count)["f1"], "F1")
        else:
            order.setdefault(row["tile"], (row["ssim"], "SSIM"))
    ranked = sorted(order, key=lambda tile: (-order[tile][0], tile))
    places = np.unique(
        np.linspace(0, len(ranked) - 1, min(wanted, len(ranked))).round().astype(int)
    )
    chosen = []
    for place in places:
        tile = ranked[int(place)]
        value, name = order[tile]
        rank = "best" if place == 0 else "worst" if place == len(ranked) - 1 else ""
        label = "nothing positive, nothing found" if value < 0 else f"{name} {value:.3f}"
        chosen.append((tile, f"{rank}: {label}" if rank else label))
    return chosen


def show(
    tile: str,
    label: str,
    test: Mapping[str, TileDataset],
    facts: Mapping[str, Mapping[str, Mapping[str, str]]],
    painter: nn.Module,
    finder: nn.Module,
    device: torch.device,
    rows: Sequence[Mapping[str, Any]],
) -> Example:
    """Return one tile as the page shows it, with the answers of both networks."""
    network = "segmentation" if tile in facts["segmentation"] else "generation"
    tiles = test[network]
    item = tiles.stored(tiles.tiles.index(tile))
    image = item["he"][None]
    values: dict[str, float | None] = {}
    for row in rows:
        if row["tile"] != tile or row["method"] != "model":
            continue
        if row["network"] == "generation":
            values |= {name: row[name] for name in ("psnr_db", "ssim")}
        else:
            scores = metrics.scores(Confusion(*(row[name] for name in COUNTS)))
            values |= {name: scores[name] for name in ("f1", "iou")}
    fact = facts[network][tile]
    return Example(
        tile=tile,
        case=fact["case"],
        dataset=fact["dataset"],
        score=fact["score"],
        label=label,
        he=item["he"],
        her2=item["her2"],
        generated=to_image(predict(painter, image, "generation", device)[0]),
        truth=masks.positive(item["mask"]),
        probability=to_probability(predict(finder, image, "segmentation", device)[0]),
        values=values,
    )
