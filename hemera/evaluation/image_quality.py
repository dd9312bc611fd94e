"""How generated pictures are judged, by evaluate and by compare alike.

Each network, and each baseline that needs none, answers to every test tile; PSNR, SSIM and LPIPS
are of single tiles, FID and KID of all together. Tiles are read once, however many networks answer.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from hemera.config import JudgingOptions
from hemera.dataset.torch_dataset import TileDataset
from hemera.evaluation import metrics
from hemera.evaluation.metrics import Confusion, Resampling, Summary
from hemera.evaluation.perceptual import Inception, Lpips
from hemera.io.threads import in_order
from hemera.training import session

RGB = npt.NDArray[np.uint8]

IMAGE_METRICS = ("psnr_db", "ssim", "ssim_gaussian", "lpips")
SET_METRICS = ("fid", "kid")
COUNTS = tuple(f"{name}_px" for name in Confusion._fields)

BASELINES = ("mean_colour", "blurred")
CONSTANTS = ("all_positive", "all_negative")


# --- what answers --------------------------------------------------------------------------------


def answers(
    nets: Mapping[str, nn.Module],
    tiles: TileDataset,
    network: str,
    device: torch.device,
    batch_size: int,
) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """Yield each tile with what each network answers, (C, H, W) on the CPU, batch by batch.

    Args:
        nets: by name, all for the same task.
        tiles: the tiles.
        network: the task, generation or segmentation.
        device: where the networks are.
        batch_size: tiles that go through a network together.
    """
    starts = range(0, len(tiles), batch_size)
    for start in tqdm(starts, desc=f"evaluate {network}", unit="batch", disable=None):
        items = [tiles.stored(i) for i in range(start, min(start + batch_size, len(tiles)))]
        # Tiles of one size go through together; tiles of different data sets may differ.
        groups: dict[tuple[int, ...], list[int]] = {}
        for place, item in enumerate(items):
            groups.setdefault(item["he"].shape, []).append(place)
        found: dict[int, dict[str, Tensor]] = {place: {} for place in range(len(items))}
        for places in groups.values():
            images = np.stack([items[place]["he"] for place in places])
            for name, net in nets.items():
                for place, answer in zip(
                    places, predict(net, images, network, device), strict=True
                ):
                    found[place][name] = answer
        for place, item in enumerate(items):
            yield item, found[place]


@torch.inference_mode()
def predict(net: nn.Module, images: RGB, network: str, device: torch.device) -> Tensor:
    """Return what a network answers to (B, H, W, 3) H&E: (B, C, H, W) on the CPU."""
    unit = session.to_unit(torch.from_numpy(images).permute(0, 3, 1, 2), device)
    answer: Tensor = net(unit * 2 - 1 if network == "generation" else unit)
    return answer.cpu()


def to_image(generated: Tensor) -> RGB:
    """Return (H, W, 3) uint8, truncated, of GenerationNet's (3, H, W) in [-1, 1]."""
    return metrics.to_uint8(generated.permute(1, 2, 0).numpy())


# --- the baselines -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Colours:
    """Mean and standard deviation of each channel over the training tiles, 0 to 255."""

    her2_mean: npt.NDArray[np.float64]
    her2_std: npt.NDArray[np.float64]
    blurred_mean: npt.NDArray[np.float64]
    blurred_std: npt.NDArray[np.float64]


def blurred(image: RGB, sigma_px: float) -> npt.NDArray[np.float32]:
    """Return an image (H, W, 3) blurred by a Gaussian, in floats."""
    return np.asarray(cv2.GaussianBlur(image.astype(np.float32), (0, 0), sigma_px), np.float32)


def measure_colours(index: Path, sigma_px: float) -> Colours:
    """Measure the colours of HER2 and of blurred H&E over GenerationNet's training tiles."""
    tiles = TileDataset(index, network="generation", split="train", images=("he", "her2"))
    own = threading.local()

    def measure(position: int) -> tuple[int, npt.NDArray[np.float64]]:
        if not hasattr(own, "tiles"):
            # A reader of shards is for one thread; a copy opens its own files.
            own.tiles = copy.deepcopy(tiles)
        item = own.tiles.stored(position)
        images = (item["her2"], blurred(item["he"], sigma_px))
        sums = [
            cv2.sumElems(how)[:3]
            for image in images
            for how in (image, np.square(image, dtype=np.float32))
        ]
        return images[0].shape[0] * images[0].shape[1], np.reshape(sums, (2, 2, 3))

    sums = np.zeros((2, 2, 3))
    pixels = 0
    measured = in_order(measure, range(len(tiles)), torch.get_num_threads())
    with (
        contextlib.closing(measured),
        tqdm(measured, desc="training colours", total=len(tiles), unit="tile", disable=None) as bar,
    ):
        # In the order of the tiles, however many threads there are.
        for count, of_tile in bar:
            pixels += count
            sums += of_tile
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


# --- the judgement -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Judges:
    """The networks that judge pictures; None where no weights were named."""

    inception: Inception | None
    lpips: Lpips | None

    @classmethod
    def load(cls, options: JudgingOptions, device: torch.device) -> Judges:
        """Load what the options name.

        Raises:
            TrainingError: weights that cannot be read or do not fit.
        """
        fid, lpips = options.fid_weights, options.lpips_weights
        return cls(
            None if fid is None else Inception(Path(fid), device),
            None if lpips is None else Lpips(Path(lpips), device),
        )

    def provenance(self) -> dict[str, str]:
        """Return the digests of their weights: a distance is of the network that saw it."""
        found = {}
        if self.inception is not None:
            found["fid_weights_sha256"] = self.inception.sha256
        if self.lpips is not None:
            found["lpips_weights_sha256"] = self.lpips.sha256
        return found


@dataclasses.dataclass
class Features:
    """What InceptionV3 sees in each tile, real and by method, (2048,) each, in one order."""

    tiles: list[str] = dataclasses.field(default_factory=list)
    real: list[npt.NDArray[np.float32]] = dataclasses.field(default_factory=list)
    methods: dict[str, list[npt.NDArray[np.float32]]] = dataclasses.field(default_factory=dict)

    def add(self, tile: str, methods: Iterable[str], features: npt.NDArray[np.float32]) -> None:
        """Take the features of one tile's pictures, those of the real one last."""
        self.tiles.append(tile)
        *made, real = features
        self.real.append(real)
        for method, one in zip(methods, made, strict=True):
            self.methods[method].append(one)

    def distances(self, method: str, tiles: set[str], seed: int) -> dict[str, Summary]:
        """Return fid and kid of a method over some tiles; no value where they are fewer than 2."""
        places = [place for place, tile in enumerate(self.tiles) if tile in tiles]
        if len(places) < 2:
            return dict.fromkeys(SET_METRICS, Summary(None, None, len(places)))
        real = np.stack([self.real[place] for place in places])
        own = np.stack([self.methods[method][place] for place in places])
        return {
            "fid": Summary(metrics.frechet_distance(own, real), None, len(places)),
            "kid": metrics.kernel_distance(own, real, seed=seed),
        }


def judge_generation(
    nets: Mapping[str, nn.Module],
    tiles: TileDataset,
    facts: Mapping[str, Mapping[str, str]],
    *,
    colours: Colours,
    judges: Judges,
    device: torch.device,
    batch_size: int,
    sigma_px: float,
) -> tuple[list[dict[str, Any]], Features]:
    """Judge what networks and baselines make of tiles.

    Args:
        nets: generators by the name of their method.
        tiles: the tiles, H&E and HER2.
        facts: tile, case, dataset and score of each.
        colours: of the training tiles, for the baselines.
        judges: the networks that judge.
        device: where the networks are.
        batch_size: tiles per step.
        sigma_px: blur of the baseline.

    Returns:
        Rows of `tables.EVALUATION_TILES`, and the features of FID and KID.
    """
    rows: list[dict[str, Any]] = []
    features = Features(methods={name: [] for name in (*nets, *BASELINES)})
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for item, found in answers(nets, tiles, "generation", device, batch_size):
            images = {name: to_image(answer) for name, answer in found.items()}
            images |= baselines(item["he"], colours, sigma_px)
            real = item["her2"]
            measured = pool.map(functools.partial(_pixel_metrics, real=real), images.values())
            stacked = np.stack([*images.values(), real])
            if judges.inception is not None:
                features.add(item["tile"], images, judges.inception(stacked))
            apart: list[float | None] = [None] * len(images)
            if judges.lpips is not None:
                apart = [*judges.lpips(stacked[:-1], real)]
            rows += [
                {
                    **facts[item["tile"]],
                    "network": "generation",
                    "method": method,
                    **values,
                    "lpips": distance,
                }
                for method, values, distance in zip(images, measured, apart, strict=True)
            ]
    return rows, features


def _pixel_metrics(image: RGB, real: RGB) -> dict[str, float]:
    return {
        "psnr_db": metrics.psnr(image, real),
        "ssim": metrics.ssim(image, real),
        "ssim_gaussian": metrics.ssim(image, real, gaussian=True),
    }


def summarise(
    rows: Sequence[Mapping[str, Any]], features: Features, options: JudgingOptions
) -> list[dict[str, Any]]:
    """Return the rows of `tables.METRICS`: all tiles, and each data set, score and case.

    Args:
        rows: of `tables.EVALUATION_TILES`.
        features: of the same tiles; empty: FID and KID are not measured.
        options: how intervals are drawn.
    """
    found = []
    for network in ("generation", "segmentation"):
        own = [row for row in rows if row["network"] == network]
        for group, members in _groups(own):
            methods: dict[str, list[Mapping[str, Any]]] = {}
            for row in members:
                methods.setdefault(row["method"], []).append(row)
            # Every method has the same tiles in the same order.
            first = next(iter(methods.values()))
            resampling = Resampling(
                [row["case"] for row in first],
                samples=options.bootstrap_samples,
                confidence=options.confidence,
                seed=options.seed,
            )
            measured = {
                method: _image_metrics(of, resampling)
                if network == "generation"
                else metrics.aggregate(
                    (Confusion(*(row[name] for name in COUNTS)) for row in of), resampling
                )
                for method, of in methods.items()
            }
            if network == "segmentation" and set(CONSTANTS) <= set(measured):
                measured["best_constant"] = {
                    key: max((measured[method][key] for method in CONSTANTS), key=_order)
                    for key in measured[CONSTANTS[0]]
                }
            # Of one case there are too few tiles to compare sets.
            if network == "generation" and features.tiles and not group.startswith("case="):
                tiles = {row["tile"] for row in first}
                for method, values in measured.items():
                    apart = features.distances(method, tiles, options.seed)
                    values |= {(metric, "set"): summary for metric, summary in apart.items()}
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


def _order(summary: Summary) -> float:
    return -math.inf if summary.value is None else summary.value


def _groups(
    rows: Sequence[Mapping[str, Any]],
) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Return the groups of rows by name: all, dataset=..., score=..., case=...; none if no row."""
    groups: list[tuple[str, list[Mapping[str, Any]]]] = []
    if rows:
        groups.append(("all", list(rows)))
    for key in ("dataset", "score", "case"):
        members: dict[str, list[Mapping[str, Any]]] = {}
        for row in rows:
            members.setdefault(row[key], []).append(row)
        groups += [(f"{key}={value}", members[value]) for value in sorted(members)]
    return groups


def _image_metrics(
    rows: Sequence[Mapping[str, Any]], resampling: Resampling
) -> dict[tuple[str, str], Summary]:
    found = {
        (metric, "mean"): metrics.summarise((row[metric] for row in rows), resampling)
        for metric in IMAGE_METRICS
        if rows[0].get(metric) is not None
    }
    infinite = sum(math.isinf(row["psnr_db"]) for row in rows)
    found["psnr_infinite", "count"] = Summary(float(infinite), None, len(rows))
    return found
