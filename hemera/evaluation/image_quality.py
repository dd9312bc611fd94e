"""Networks and trivial baselines on test tiles: metrics per tile, and per group of tiles."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

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
from hemera.evaluation import baselines, metrics, perceptual, stain_quality
from hemera.evaluation.metrics import Bootstrap, Confusion, Summary
from hemera.evaluation.perceptual import FeatureExtractors
from hemera.imaging.color import Color, normalise_background
from hemera.masks import her2_score, label_format

RGB = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
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


class Network(NamedTuple):
    """A network and whether its images are divided by their backgrounds."""

    module: nn.Module
    normalise_background: bool


class Item(NamedTuple):
    """A test tile as stored: images (H, W, 3) with the colours of their backgrounds, mask."""

    tile: str
    he: RGB
    her2: RGB
    mask: npt.NDArray[np.uint8]
    he_background: Color
    her2_background: Color

    def normalised(self, stain: str) -> RGB:
        """Return the image of he or her2, divided by its background."""
        return normalise_background(getattr(self, stain), getattr(self, f"{stain}_background"))


def stored(tiles: TileDataset, position: int) -> Item:
    """Return a tile of a dataset without `normalise_background`."""
    he, her2 = (tiles.background(position, stain) for stain in ("he", "her2"))
    return Item(**tiles.stored(position), he_background=he, her2_background=her2)


def predict(net: nn.Module, images: RGB, network: str, device: torch.device) -> Tensor:
    """Return the output (B, C, H, W) of a network, on the CPU, for H&E tiles (B, H, W, 3).

    The input of network ``generation`` is in [-1, 1], that of ``segmentation`` in [0, 1]. A network
    in training mode has the same dropout for every tile, so that no other network changes it.
    """
    if net.training:
        torch.manual_seed(0)
    with torch.inference_mode():
        unit = torch.from_numpy(images).permute(0, 3, 1, 2).to(device).float() / 255
        output: Tensor = net(unit * 2 - 1 if network == "generation" else unit)
        return output.cpu()


def predict_tiles(
    nets: Mapping[str, Network],
    tiles: TileDataset,
    network: str,
    device: torch.device,
    batch_size: int,
) -> Iterator[tuple[Item, dict[str, Tensor]]]:
    """Yield each tile with the output (C, H, W) of each network, see `predict`."""
    starts = range(0, len(tiles), batch_size)
    for start in tqdm(starts, desc=f"evaluate {network}", unit="batch", disable=None):
        items = [stored(tiles, i) for i in range(start, min(start + batch_size, len(tiles)))]
        outputs: list[dict[str, Tensor]] = [{} for _ in items]
        # Tiles of different data sets may differ in size.
        for shape in dict.fromkeys(item.he.shape for item in items):
            places = [place for place, item in enumerate(items) if item.he.shape == shape]
            for name, net in nets.items():
                images = np.stack([input_image(net, items[place]) for place in places])
                found = predict(net.module, images, network, device)
                for place, output in zip(places, found, strict=True):
                    outputs[place][name] = output
        yield from zip(items, outputs, strict=True)


def input_image(net: Network, item: Item) -> RGB:
    """Return the H&E image that a network takes, (H, W, 3)."""
    return item.normalised("he") if net.normalise_background else item.he


def to_image(net: Network, generated: Tensor, item: Item) -> RGB:
    """Return (H, W, 3) uint8, truncated, of a generator's (3, H, W) in [-1, 1].

    Divided by the background, for a network that generates it, by that of the real tile.
    """
    image = metrics.to_uint8(generated.permute(1, 2, 0).numpy())
    if net.normalise_background:
        return image
    return normalise_background(image, item.her2_background)


def to_probability(logits: Tensor) -> npt.NDArray[np.float32]:
    """Return (H, W) probabilities of SegmentationNet's (1, H, W) logits."""
    return np.asarray(torch.sigmoid(logits)[0].numpy(), np.float32)


def evaluate_generators(
    nets: Mapping[str, Network],
    tiles: TileDataset,
    facts: Mapping[str, Mapping[str, Any]],
    colors: baselines.Colors,
    extractors: FeatureExtractors,
    device: torch.device,
    options: EvaluateOptions,
) -> tuple[Rows, Features]:
    """Measure the images of generators, by name, and of the trivial baselines.

    All are compared with the real tile after division by its background.

    Returns rows of `tables.EVALUATION_TILES`, to which `facts` has tile, case, dataset and score by
    tile, and the features, none without InceptionV3.
    """
    rows: Rows = []
    features: Features = {}
    cells = _cell_comparison(tiles, facts)
    places = np.linspace(0, len(tiles) - 1, min(options.cell_tiles, len(tiles))).round()
    compared = {tiles.tiles[int(place)] for place in places}
    batch_size = 1 if options.public_mode else options.batch_size
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for item, outputs in predict_tiles(nets, tiles, "generation", device, batch_size):
            images = {name: to_image(nets[name], output, item) for name, output in outputs.items()}
            images |= baselines.images(item.normalised("he"), colors)
            real, valid = item.normalised("her2"), ~label_format.excluded(item.mask)
            # Nothing is known of excluded pixels: every method has those of the real tile.
            images = {k: np.where(valid[..., None], image, real) for k, image in images.items()}
            positive = label_format.positive(item.mask)
            measure = functools.partial(_pixel_metrics, real=real, positive=positive, valid=valid)
            measured = pool.map(measure, images.values())
            stacked = np.stack([*images.values(), real])
            if extractors.inception is not None:
                found = extractors.inception(stacked)
                features[item.tile] = dict(zip([*images, REAL], found, strict=True))
            lpips: Sequence[float | None] = [None] * len(images)
            if extractors.lpips is not None:
                lpips = extractors.lpips(stacked[:-1], real)
            fact = _fact(facts, item.tile, "generation")
            shown = images if item.tile in compared else {}
            found_cells = cells.compare(shown, real, valid, fact["case"], facts[item.tile]["mpp"])
            rows += [
                fact | {"method": method, **values, "lpips": distance} | found_cells.get(method, {})
                for method, values, distance in zip(images, measured, lpips, strict=True)
            ]
            # What the figures of the stain are to be compared with.
            sums = stain_quality.tile_sums(real, real, positive, valid).tolist()
            rows.append(fact | {"method": REAL, "stain_sums": sums})
    return rows, features


def _fact(facts: Mapping[str, Mapping[str, Any]], tile: str, network: str) -> dict[str, Any]:
    """Return what every row of a tile begins with."""
    columns = ("tile", "case", "dataset", "score")
    return {name: facts[tile][name] for name in columns} | {"network": network}


def _cell_comparison(
    tiles: TileDataset, facts: Mapping[str, Mapping[str, Any]]
) -> stain_quality.CellComparison:
    cases: dict[str, list[str]] = {}
    for tile, fact in facts.items():
        cases.setdefault(fact["case"], []).append(tile)

    def read(tile: str) -> tuple[RGB, Mask]:
        item = stored(tiles, tiles.position(tile))
        return item.normalised("her2"), ~label_format.excluded(item.mask)

    return stain_quality.CellComparison(cases, read)


def _pixel_metrics(image: RGB, real: RGB, positive: Mask, valid: Mask) -> dict[str, Any]:
    return {
        "stain_sums": stain_quality.tile_sums(image, real, positive, valid).tolist(),
        "psnr_db": metrics.psnr(image, real, valid),
        "ssim": metrics.ssim(image, real, valid),
        "ssim_gaussian": metrics.ssim(image, real, valid, gaussian=True),
    }


def evaluate_segmenter(
    net: Network,
    tiles: TileDataset,
    facts: Mapping[str, Mapping[str, Any]],
    darkness: int,
    device: torch.device,
    options: EvaluateOptions,
) -> Rows:
    """Return the rows of SegmentationNet, both constant predictions and a threshold of darkness."""
    rows: Rows = []
    nets = {SEGMENTER: net}
    for item, outputs in predict_tiles(nets, tiles, "segmentation", device, options.batch_size):
        truth, valid = label_format.positive(item.mask), ~label_format.excluded(item.mask)
        predictions = {
            SEGMENTER: to_probability(outputs[SEGMENTER]) >= metrics.THRESHOLD,
            "all_positive": np.ones_like(truth),
            "all_negative": np.zeros_like(truth),
            "dark": baselines.dark(item.normalised("he"), darkness),
        }
        fact = _fact(facts, item.tile, "segmentation")
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
                    if method == REAL:
                        continue
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
    return found | _stain_metrics(tiles, bootstrap) | _cell_metrics(tiles, bootstrap)


def _stain_metrics(tiles: Frame, bootstrap: Bootstrap) -> Summaries:
    """Return `stain_quality.FIGURES` of all pixels together, and r of the mean DAB of tiles."""
    sums = np.stack(tiles["stain_sums"].tolist())
    of_tiles = stain_quality.tile_moments(sums)
    samples, tile_samples = bootstrap.sums(sums), bootstrap.sums(of_tiles)
    found: Summaries = {}
    for name, figure in stain_quality.FIGURES.items():
        bounds = (None, None) if samples is None else bootstrap.bounds(figure(samples))
        found[name, "pooled"] = _summary(figure(sums.sum(0)), len(tiles), bounds)
    r = stain_quality.correlation
    bounds = (None, None) if tile_samples is None else bootstrap.bounds(r(tile_samples))
    found["dab_r", "tiles"] = _summary(r(of_tiles.sum(0)), len(tiles), bounds)
    return found


def _summary(
    value: npt.NDArray[np.float64], tiles: int, bounds: tuple[float | None, float | None]
) -> Summary:
    defined = bool(np.isfinite(value))
    return Summary(float(value) if defined else None, None, tiles, *bounds)


def _cell_metrics(tiles: Frame, bootstrap: Bootstrap) -> Summaries:
    """Return F1 of positive cells, and the fraction of cases in which both have one HER2 score."""
    compared = tiles[tiles["matched_cells"].notna()]
    if compared.empty:
        return {}
    columns = ["matched_cells", "positive_cells", "positive_cells_real"]
    # Zero for tiles that were not compared: the samples are of all cases.
    counts = tiles[columns].fillna(0).to_numpy(np.float64)

    def f1(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return metrics.ratio(2 * sums[..., 0], sums[..., 1] + sums[..., 2])

    bounds = bootstrap.interval(counts, f1)
    scores = read_scores(compared)
    equal = (scores["generated"] == scores["real"]).to_numpy(float)
    return {
        ("cell_f1", "pooled"): _summary(f1(counts.sum(0)), len(compared), bounds),
        ("cell_score", "cases"): Summary(
            float(equal.mean()) if equal.size else None, None, len(compared)
        ),
    }


def read_scores(tiles: Frame) -> Frame:
    """Return the HER2 scores of `her2_score.CLASSES` by case, read from the cells of both images.

    `tiles` are rows of one method with compared cells; the result has columns generated and real,
    -1 for a generated case without cells, and no cases without cells on the real images.
    """
    by_case = tiles.groupby("case")[["cells", "cells_real"]].agg(
        lambda column: np.sum(column.tolist(), axis=0)
    )
    by_case = by_case[by_case["cells_real"].map(np.sum) > 0]
    read = {
        name: her2_score.her2_scores(np.array(by_case[column].tolist(), np.int64).reshape(-1, 4))
        for name, column in (("generated", "cells"), ("real", "cells_real"))
    }
    return pd.DataFrame(read, index=by_case.index)


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
    measured = {}
    for method, tiles in methods.items():
        counts = tiles[list(COUNTS)].to_numpy(np.int64)
        measured[method] = metrics.aggregate(counts, bootstrap)
        measured[method] |= _false_alarms(counts, bootstrap)
    measured["best_constant"] = {
        key: max(
            (measured[method][key] for method in CONSTANTS),
            key=lambda each: -math.inf if each.value is None else each.value,
        )
        for key in measured[CONSTANTS[0]]
        if key[0] in metrics.SEGMENTATION_METRICS
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


def _false_alarms(counts: npt.NDArray[np.int64], bootstrap: Bootstrap) -> Summaries:
    """Return the positive fraction of tiles with empty truth, whose F1 is 0 or 1; counts (T, 4)."""
    empty = counts[:, 0] + counts[:, 2] == 0
    columns = np.stack([counts[:, 1] * empty, (counts[:, 1] + counts[:, 3]) * empty], axis=1)

    def fraction(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return metrics.ratio(sums[..., 0], sums[..., 1])

    bounds = bootstrap.interval(columns, fraction)
    value = fraction(columns.sum(0).astype(np.float64))
    return {("false_positive_fraction", "empty"): _summary(value, int(empty.sum()), bounds)}
