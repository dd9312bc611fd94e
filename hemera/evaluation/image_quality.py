"""Networks and trivial baselines on test tiles: metrics per tile, and per group of tiles."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from hemera import tables
from hemera.config import EvaluateOptions
from hemera.dataset.statistics import Frame
from hemera.dataset.torch_dataset import TileDataset
from hemera.evaluation import baselines, metrics, perceptual
from hemera.evaluation.metrics import Bootstrap, Confusion, Summary
from hemera.evaluation.perceptual import FeatureExtractors
from hemera.masks import label_format

RGB = npt.NDArray[np.uint8]
Rows = list[dict[str, Any]]
Summaries = dict[tuple[str, str], Summary]
"""By metric and aggregation."""
Features = dict[str, dict[str, npt.NDArray[np.float32]]]
"""InceptionV3's features (2048,) of each tile, by tile and method; `REAL` is the HER2 tile."""

IMAGE_METRICS = ("psnr_db", "ssim", "ssim_gaussian", "lpips")
SET_METRICS = ("fid", "kid")
COUNTS = tuple(f"{name}_px" for name in Confusion._fields)

SEGMENTER = "segmenter"
"""Method of SegmentationNet's rows; those of generators are named after their preset."""
CONSTANTS = ("all_positive", "all_negative")
REAL = "real"

CONFIDENCE = 0.95
"""Level of the confidence intervals."""


def predict(net: nn.Module, images: RGB, network: str, device: torch.device) -> Tensor:
    """Return the output (B, C, H, W) of a network, on the CPU, for H&E tiles (B, H, W, 3).

    The input of network ``generation`` is in [-1, 1], that of ``segmentation`` in [0, 1].
    """
    with torch.inference_mode():
        unit = torch.from_numpy(images).permute(0, 3, 1, 2).to(device).float() / 255
        output: Tensor = net(unit * 2 - 1 if network == "generation" else unit)
        return output.cpu()


def predict_tiles(
    nets: Mapping[str, nn.Module],
    tiles: TileDataset,
    network: str,
    device: torch.device,
    batch_size: int,
) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """Yield each tile with the output (C, H, W) of each network, see `predict`."""
    starts = range(0, len(tiles), batch_size)
    for start in tqdm(starts, desc=f"evaluate {network}", unit="batch", disable=None):
        items = [tiles.stored(i) for i in range(start, min(start + batch_size, len(tiles)))]
        outputs: list[dict[str, Tensor]] = [{} for _ in items]
        # Tiles of different data sets may differ in size.
        for shape in dict.fromkeys(item["he"].shape for item in items):
            places = [place for place, item in enumerate(items) if item["he"].shape == shape]
            images = np.stack([items[place]["he"] for place in places])
            for name, net in nets.items():
                found = predict(net, images, network, device)
                for place, output in zip(places, found, strict=True):
                    outputs[place][name] = output
        yield from zip(items, outputs, strict=True)


def to_image(generated: Tensor) -> RGB:
    """Return (H, W, 3) uint8, truncated, of a generator's (3, H, W) in [-1, 1]."""
    return metrics.to_uint8(generated.permute(1, 2, 0).numpy())


def to_probability(logits: Tensor) -> npt.NDArray[np.float32]:
    """Return (H, W) probabilities of SegmentationNet's (1, H, W) logits."""
    return np.asarray(torch.sigmoid(logits)[0].numpy(), np.float32)


def evaluate_generators(
    nets: Mapping[str, nn.Module],
    tiles: TileDataset,
    facts: Mapping[str, Mapping[str, str]],
    colors: baselines.Colors,
    extractors: FeatureExtractors,
    device: torch.device,
    options: EvaluateOptions,
) -> tuple[Rows, Features]:
    """Measure the images of generators, by name, and of the trivial baselines.

    Returns rows of `tables.EVALUATION_TILES`, to which `facts` has tile, case, dataset and score by
    tile, and the features, none without InceptionV3.
    """
    rows: Rows = []
    features: Features = {}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for item, outputs in predict_tiles(nets, tiles, "generation", device, options.batch_size):
            images = {name: to_image(output) for name, output in outputs.items()}
            images |= baselines.images(item["he"], colors)
            real, valid = item["her2"], ~label_format.excluded(item["mask"])
            # Nothing is known of excluded pixels: every method has those of the real tile.
            images = {k: np.where(valid[..., None], image, real) for k, image in images.items()}
            measure = functools.partial(_pixel_metrics, real=real, valid=valid)
            measured = pool.map(measure, images.values())
            stacked = np.stack([*images.values(), real])
            if extractors.inception is not None:
                found = extractors.inception(stacked)
                features[item["tile"]] = dict(zip([*images, REAL], found, strict=True))
            lpips: Sequence[float | None] = [None] * len(images)
            if extractors.lpips is not None:
                lpips = extractors.lpips(stacked[:-1], real)
            fact = {**facts[item["tile"]], "network": "generation"}
            rows += [
                fact | {"method": method, **values, "lpips": distance}
                for method, values, distance in zip(images, measured, lpips, strict=True)
            ]
    return rows, features


def _pixel_metrics(image: RGB, real: RGB, valid: npt.NDArray[np.bool_]) -> dict[str, float]:
    return {
        "psnr_db": metrics.psnr(image, real, valid),
        "ssim": metrics.ssim(image, real, valid),
        "ssim_gaussian": metrics.ssim(image, real, valid, gaussian=True),
    }


def evaluate_segmenter(
    net: nn.Module,
    tiles: TileDataset,
    facts: Mapping[str, Mapping[str, str]],
    device: torch.device,
    options: EvaluateOptions,
) -> Rows:
    """Return the rows of SegmentationNet and of both constant predictions."""
    rows: Rows = []
    nets = {SEGMENTER: net}
    for item, outputs in predict_tiles(nets, tiles, "segmentation", device, options.batch_size):
        truth, valid = label_format.positive(item["mask"]), ~label_format.excluded(item["mask"])
        predictions = {
            SEGMENTER: to_probability(outputs[SEGMENTER]) >= metrics.THRESHOLD,
            "all_positive": np.ones_like(truth),
            "all_negative": np.zeros_like(truth),
        }
        fact = {**facts[item["tile"]], "network": "segmentation"}
        for method, predicted in predictions.items():
            counts = metrics.confusion(predicted, truth, valid)
            rows.append(fact | {"method": method, **dict(zip(COUNTS, counts, strict=True))})
    return rows


def summarise(
    rows: Sequence[Mapping[str, Any]], features: Features, options: EvaluateOptions
) -> Rows:
    """Return the rows of `tables.METRICS`: all tiles, and each data set, score and case.

    `rows` are of `tables.EVALUATION_TILES`; without `features` there is no FID and KID.
    """
    table = pd.DataFrame(rows, columns=tables.EVALUATION_TILES.names)
    table = table.astype(dict.fromkeys(IMAGE_METRICS, float))
    found: Rows = []
    for (network, group), members in _groups(table):
        methods = dict(list(members.groupby("method", sort=False)))
        # Every method has the same tiles in the same order.
        bootstrap = Bootstrap(
            next(iter(methods.values()))["case"],
            samples=options.bootstrap_samples,
            confidence=CONFIDENCE,
            seed=options.seed,
        )
        if network == "segmentation":
            measured = _segmentation_metrics(methods, bootstrap)
        else:
            measured = {method: _image_metrics(own, bootstrap) for method, own in methods.items()}
            # One case has too few tiles to compare sets.
            if features and not group.startswith("case="):
                for method, own in methods.items():
                    measured[method] |= _set_metrics(own, method, features, options.seed)
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


def _groups(table: Frame) -> Iterator[tuple[tuple[str, str], Frame]]:
    """Yield (network, group) and its tiles; groups are all, dataset=..., score=..., case=...."""
    for network, own in table.groupby("network"):
        yield (network, "all"), own
        for key in ("dataset", "score", "case"):
            for value, members in own.groupby(key):
                yield (network, f"{key}={value}"), members


def _image_metrics(tiles: Frame, bootstrap: Bootstrap) -> Summaries:
    found = {
        (metric, "mean"): metrics.summarise(tiles[metric], bootstrap)
        for metric in IMAGE_METRICS
        if tiles[metric].notna().any()
    }
    infinite = float(np.isinf(tiles["psnr_db"]).sum())
    found["psnr_infinite", "count"] = Summary(infinite, None, len(tiles))
    return found


def _set_metrics(tiles: Frame, method: str, features: Features, seed: int) -> Summaries:
    """Return FID and KID of one method's tiles; without a value for fewer than two tiles."""
    generated, real = (
        np.stack([features[tile][name] for tile in tiles["tile"]]) for name in (method, REAL)
    )
    return {
        ("fid", "set"): Summary(perceptual.frechet_distance(generated, real), None, len(tiles)),
        ("kid", "set"): perceptual.kernel_distance(generated, real, seed=seed),
    }


def _segmentation_metrics(
    methods: Mapping[str, Frame], bootstrap: Bootstrap
) -> dict[str, Summaries]:
    measured = {
        method: metrics.aggregate(tiles[list(COUNTS)].to_numpy(np.int64), bootstrap)
        for method, tiles in methods.items()
    }
    measured["best_constant"] = {
        key: max(
            (measured[method][key] for method in CONSTANTS),
            key=lambda each: -math.inf if each.value is None else each.value,
        )
        for key in measured[CONSTANTS[0]]
    }
    return measured


def choose_examples(
    rows: Sequence[Mapping[str, Any]], generator: str, wanted: int
) -> list[tuple[str, str]]:
    """Choose tiles to show, evenly from the best to the worst: (tile, label).

    They are ordered by F1 of SegmentationNet where it was evaluated, otherwise by SSIM of one
    generator. Tiles without a positive pixel in truth and prediction come last.
    """
    order: dict[str, tuple[float, str]] = {}
    for row in rows:
        if row["method"] == SEGMENTER:
            counts = np.array([row[name] for name in COUNTS])
            f1 = float(metrics.rates(counts)["f1"])
            empty = not counts[:3].any()
            order[row["tile"]] = (-1.0, "no positive pixel") if empty else (f1, f"F1 {f1:.3f}")
        elif row["method"] == generator:
            order.setdefault(row["tile"], (row["ssim"], f"SSIM {row['ssim']:.3f}"))
    ranked = sorted(order, key=lambda tile: (-order[tile][0], tile))
    places = np.linspace(0, len(ranked) - 1, min(wanted, len(ranked))).round().astype(int)
    chosen = []
    for place in dict.fromkeys(places.tolist()):
        value, label = order[ranked[place]]
        rank = {0: "best: ", len(ranked) - 1: "worst: "}.get(place, "") if value >= 0 else ""
        chosen.append((ranked[place], rank + label))
    return chosen
