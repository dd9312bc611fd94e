"""evaluate: both networks on the tiles of unseen cases, beside trivial baselines.

Reads the index, the test subsets and both networks; writes metrics per tile, metrics per group
and a page. The threshold is an option, never fitted to the test tiles. A network without test
tiles is no error: its rows are missing, and the page says so. How pictures are judged stands in
`hemera.judging`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn

from hemera import tables
from hemera.config import EvaluateOptions
from hemera.dataset.index import TileIndex
from hemera.dataset.torch_dataset import TileDataset
from hemera.evaluation import image_quality, metrics
from hemera.evaluation.metrics import Confusion
from hemera.masks import label_format
from hemera.networks import storage
from hemera.reports import Example, evaluation_page
from hemera.training import session

log = logging.getLogger(__name__)


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
    opened = TileIndex(index)
    painter, painter_metadata = storage.load_generation(generator, generator_metadata)
    finder, finder_metadata = storage.load_segmentation(segmenter, segmenter_metadata)
    described = {"generation": painter_metadata, "segmentation": finder_metadata}
    for network, found in described.items():
        storage.check_index(network, found, opened.fingerprint)
    test = {network: TileDataset(opened, network=network, split="test") for network in described}
    rows: list[dict[str, Any]] = []
    features = image_quality.Features()
    with session.session(
        seed=options.seed, threads=options.torch_threads, device=options.device
    ) as device:
        judges = image_quality.Judges.load(options, device)
        painter.to(device)
        finder.to(device)
        facts = {network: opened.facts(network, "test") for network in test}
        if len(test["generation"]):
            rows, features = image_quality.judge_generation(
                {"model": painter},
                test["generation"],
                facts["generation"],
                colours=image_quality.measure_colours(index, options.blur_sigma_px),
                judges=judges,
                device=device,
                batch_size=options.batch_size,
                sigma_px=options.blur_sigma_px,
            )
        else:
            log.warning("no test tiles for GenerationNet: it is not evaluated")
        for item, found in image_quality.answers(
            {"model": finder}, test["segmentation"], "segmentation", device, options.batch_size
        ):
            fact = facts["segmentation"][item["tile"]]
            probability = to_probability(found["model"])
            rows += judge_masks(fact, item, probability >= options.threshold)
        if not len(test["segmentation"]):
            log.warning("no test tiles for SegmentationNet: it is not evaluated")
        examples = [
            show(tile, label, test, facts, painter, finder, device, rows)
            for tile, label in choose(rows, options.gallery_tiles)
        ]
    tile_table = pa.Table.from_pylist(rows, schema=tables.EVALUATION_TILES)
    metric_table = pa.Table.from_pylist(
        image_quality.summarise(rows, features, options), schema=tables.METRICS
    )
    provenance = {
        **tables.provenance(options),
        "fingerprint": opened.fingerprint,
        "networks": ", ".join(
            f"{network}: epoch {found.get('epoch')}, weight map "
            f"{found.get('options', {}).get('weight_map', 'none')}"
            for network, found in described.items()
        ),
        **judges.provenance(),
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
        index_metadata=opened.metadata,
        examples=examples,
        options=options,
        report=Path(os.path.relpath(report, page.parent)).as_posix(),
    )


def to_probability(logits: Tensor) -> npt.NDArray[np.float32]:
    """Return (H, W) probabilities of SegmentationNet's (1, H, W) logits."""
    return np.asarray(torch.sigmoid(logits)[0].numpy(), np.float32)


def judge_masks(
    fact: Mapping[str, str], item: Mapping[str, Any], predicted: npt.NDArray[np.bool_]
) -> list[dict[str, Any]]:
    """Return the rows of one tile: the network and both constants."""
    truth = label_format.positive(item["mask"])
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
            **dict(zip(image_quality.COUNTS, metrics.confusion(prediction, truth), strict=True)),
        }
        for method, prediction in predictions.items()
    ]


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
            count = Confusion(*(row[name] for name in image_quality.COUNTS))
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
    item = tiles.stored(tiles.position(tile))
    image = item["he"][None]
    values: dict[str, float | None] = {}
    for row in rows:
        if row["tile"] != tile or row["method"] != "model":
            continue
        if row["network"] == "generation":
            values |= {name: row[name] for name in ("psnr_db", "ssim")}
        else:
            scores = metrics.scores(Confusion(*(row[name] for name in image_quality.COUNTS)))
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
        generated=image_quality.to_image(
            image_quality.predict(painter, image, "generation", device)[0]
        ),
        truth=label_format.positive(item["mask"]),
        probability=to_probability(image_quality.predict(finder, image, "segmentation", device)[0]),
        values=values,
    )
