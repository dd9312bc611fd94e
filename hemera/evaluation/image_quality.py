"""Networks and trivial baselines on test tiles: metrics per tile. `summary` has those of groups."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from hemera.config import EvaluateOptions, MaskOptions
from hemera.dataset.torch_dataset import TileDataset
from hemera.evaluation import baselines, metrics, stain_quality
from hemera.evaluation.metrics import Confusion
from hemera.evaluation.perceptual import FeatureExtractors
from hemera.files.threads import in_order
from hemera.imaging.color import Color, normalise_background
from hemera.masks import label_format
from hemera.networks.outputs import copied, one_ahead

RGB = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Rows = list[dict[str, Any]]
Waiting = Callable[[], Tensor]
Features = dict[str, dict[str, npt.NDArray[np.float32]]]
"""InceptionV3's features (2048,) of each tile, by tile and method; `REAL` is the HER2 tile."""

IMAGE_METRICS = ("psnr_db", "ssim", "ssim_gaussian", "lpips")
COUNTS = tuple(f"{name}_px" for name in Confusion._fields)

SEGMENTER = "segmenter"
"""Method of SegmentationNet's rows; those of generators are named after their preset."""
CONSTANTS = ("all_positive", "all_negative")
REAL = "real"


class Network(NamedTuple):
    """A network and whether its images are divided by their backgrounds."""

    module: nn.Module
    normalise_background: bool
    precision: torch.dtype = torch.float32
    """Below float32: mixed precision."""

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return the context in which it computes."""
        return torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32)


class Item(NamedTuple):
    """A test tile as stored: images (H, W, 3) with the colours of their backgrounds, mask."""

    tile: str
    he: RGB
    her2: RGB
    mask: npt.NDArray[np.uint8]
    he_background: Color
    her2_background: Color

    def over_white(self, stain: str) -> RGB:
        """Return the image of he or her2, divided by its background."""
        return normalise_background(getattr(self, stain), getattr(self, f"{stain}_background"))


def stored(tiles: TileDataset, position: int) -> Item:
    """Return a tile of a dataset without `normalise_background`."""
    he, her2 = (tiles.background(position, stain) for stain in ("he", "her2"))
    return Item(**tiles.stored(position), he_background=he, her2_background=her2)


def predict(net: Network, images: RGB, network: str, device: torch.device) -> Tensor:
    """Return the output (B, C, H, W) of a network, on the CPU, for H&E tiles (B, H, W, 3).

    The input of network ``generation`` is in [-1, 1], that of ``segmentation`` in [0, 1]. A network
    in training mode has the same dropout for every tile, so that no other network changes it.
    """
    return launch(net, images, network, device)()


def launch(net: Network, images: RGB, network: str, device: torch.device) -> Waiting:
    """Start a network as `predict` does; what is returned waits for its output."""
    if net.module.training:
        torch.manual_seed(0)
    with torch.inference_mode(), net.autocast(device):
        unit = torch.from_numpy(images).permute(0, 3, 1, 2).to(device).float() / 255
        output: Tensor = net.module(unit * 2 - 1 if network == "generation" else unit)
        return copied(output.float())


def predict_tiles(
    nets: Mapping[str, Network],
    tiles: TileDataset,
    network: str,
    device: torch.device,
    batch_size: int,
    workers: int = 1,
) -> Iterator[tuple[Item, dict[str, Tensor]]]:
    """Yield each tile with the output (C, H, W) of each network, see `predict`.

    So many threads read tiles in advance, see `in_order`; a batch is read from a GPU while the next
    one is computed.
    """
    ready = in_order(functools.partial(stored, tiles), range(len(tiles)), workers)

    def launched() -> Iterator[tuple[list[Item], list[tuple[str, list[int], Waiting]]]]:
        for _ in tqdm(
            range(0, len(tiles), batch_size),
            desc=f"evaluate {network}", unit="batch", disable=None,
        ):  # fmt: skip
            items = list(itertools.islice(ready, batch_size))
            begun = []
            # Tiles of different data sets may differ in size.
            for shape in dict.fromkeys(item.he.shape for item in items):
                places = [place for place, item in enumerate(items) if item.he.shape == shape]
                for name, net in nets.items():
                    images = np.stack([input_image(net, items[place]) for place in places])
                    begun.append((name, places, launch(net, images, network, device)))
            yield items, begun

    for items, begun in one_ahead(launched()):
        outputs: list[dict[str, Tensor]] = [{} for _ in items]
        for name, places, wait in begun:
            for place, output in zip(places, wait(), strict=True):
                outputs[place][name] = output
        yield from zip(items, outputs, strict=True)


def input_image(net: Network, item: Item) -> RGB:
    """Return the H&E image that a network takes, (H, W, 3)."""
    return item.over_white("he") if net.normalise_background else item.he


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
    masks: MaskOptions,
    extractors: FeatureExtractors,
    device: torch.device,
    options: EvaluateOptions,
) -> tuple[Rows, Features]:
    """Measure the images of generators, by name, and of the trivial baselines.

    All are compared with the real tile after division by its background, and their cells by the
    mask engine with the options `masks`.

    Returns rows of `tables.EVALUATION_TILES`, to which `facts` has tile, case, dataset and score by
    tile, and the features, none without InceptionV3.
    """
    rows: Rows = []
    features: Features = {}
    cells = _cell_comparison(tiles, facts, masks)
    places = np.linspace(0, len(tiles) - 1, min(options.cell_tiles, len(tiles))).round()
    compared = {tiles.tiles[int(place)] for place in places}
    batch_size = 1 if options.public_mode else options.batch_size
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for item, outputs in predict_tiles(
            nets, tiles, "generation", device, batch_size, options.workers
        ):
            images = {name: to_image(nets[name], output, item) for name, output in outputs.items()}
            images |= baselines.images(item.over_white("he"), colors)
            real, valid = item.over_white("her2"), ~label_format.excluded(item.mask)
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
            fact = tile_facts(facts, item.tile, "generation")
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


def tile_facts(facts: Mapping[str, Mapping[str, Any]], tile: str, network: str) -> dict[str, Any]:
    """Return what every row of a tile begins with."""
    columns = ("tile", "case", "dataset", "score")
    return {name: facts[tile][name] for name in columns} | {"network": network}


def _cell_comparison(
    tiles: TileDataset, facts: Mapping[str, Mapping[str, Any]], masks: MaskOptions
) -> stain_quality.CellComparison:
    cases: dict[str, list[str]] = {}
    for tile, fact in facts.items():
        cases.setdefault(fact["case"], []).append(tile)

    def read(tile: str) -> tuple[RGB, Mask]:
        item = stored(tiles, tiles.position(tile))
        return item.over_white("her2"), ~label_format.excluded(item.mask)

    return stain_quality.CellComparison(cases, read, masks)


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
    for item, outputs in predict_tiles(
        nets, tiles, "segmentation", device, options.batch_size, options.workers
    ):
        truth, valid = label_format.positive(item.mask), ~label_format.excluded(item.mask)
        predictions = {
            SEGMENTER: to_probability(outputs[SEGMENTER]) >= metrics.THRESHOLD,
            "all_positive": np.ones_like(truth),
            "all_negative": np.zeros_like(truth),
            "dark": baselines.dark(item.over_white("he"), darkness),
        }
        fact = tile_facts(facts, item.tile, "segmentation")
        for method, predicted in predictions.items():
            counts = metrics.confusion(predicted, truth, valid)
            rows.append(fact | {"method": method, **dict(zip(COUNTS, counts, strict=True))})
    return rows


def choose_examples(
    rows: Sequence[Mapping[str, Any]], generator: str, wanted: int
) -> list[tuple[str, str]]:
    """Choose tiles to show, evenly from the best to the worst: (tile, label).

    They are ordered by F1 of SegmentationNet where it was evaluated, otherwise by SSIM of one
    generator. Tiles without a positive pixel in truth come last, by their false positives.
    """
    order: dict[str, tuple[float, str]] = {}
    for row in rows:
        if row["method"] == SEGMENTER:
            count = Confusion(*(row[name] for name in COUNTS))
            if count.true_positive + count.false_negative:
                f1 = metrics.scores(count)["f1"]
                order[row["tile"]] = f1, f"F1 {f1:.3f}"
            else:
                false = count.false_positive / max(1, count.false_positive + count.true_negative)
                label = f"none positive in truth, {100 * false:.1f} % predicted"
                order[row["tile"]] = -1 - false, label
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
