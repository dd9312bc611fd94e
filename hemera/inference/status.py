"""HER2 status of a slide by the models of stage aggregate, with the contributions of its views."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import shapely
import torch

from hemera.config import RULES, AggregateOptions
from hemera.dataset.bags import View
from hemera.errors import TrainingError
from hemera.files.faults import translated
from hemera.imaging.slide import Slide
from hemera.networks import storage
from hemera.networks.aggregators import build_aggregator
from hemera.training.aggregation import Fitted, Predicted, predict_case

RGB = npt.NDArray[np.uint8]

OVERVIEW_SIDE_PX = 2048
TINT = 0.5
COLORS = ((33, 102, 172), (146, 197, 222), (200, 200, 200), (244, 165, 130), (178, 24, 43))
"""Of fifths of the views, from the least to the greatest contribution."""
NAMES = ("least", "low", "middle", "high", "greatest")
DISTANCE_MAX = 4.0
"""Distance from the training, see `distance`, above which a probability means nothing. The cases of
the synthetic cohort, each by models of the other folds, have at most 2.3; real H&E, by models of
the synthetic one, at least 5."""


@dataclasses.dataclass(frozen=True)
class StatusModel:
    """The models of a method: by target those of each fold.

    Attributes:
        described: metadata of stage aggregate.
    """

    folds: Mapping[str, Mapping[int, Sequence[Fitted]]]
    described: Mapping[str, Any]

    def of(self, target: str) -> list[Fitted]:
        """Return the models of all folds; empty where none was trained."""
        return [model for own in self.folds.get(target, {}).values() for model in own]


def load_status_model(folder: Path) -> StatusModel:
    """Load the models of stage aggregate from its folder, such as results/aggregate/floor.

    Raises:
        TrainingError: when the files are missing or damaged, of a method without models, or of an
            older version.
    """
    weights, path = folder / "weights.safetensors", folder / "metadata.json"
    if not weights.is_file():
        raise TrainingError(
            f"{weights}: no such file; name a folder such as results/aggregate/floor"
        )
    described = storage.read_metadata(path, "aggregate")
    if described.get("encoder") in RULES:
        raise TrainingError(f"{path}: a rule without models; name a method that has models of H&E")
    if {"describe", "tile", "embed", "cases"} - {*described.get("stages", {})}:
        raise TrainingError(f"{path}: lacks the options of its tiles; run snakemake status again")
    storage.check_digest(weights, described)
    tensors = storage.read_weights(weights)
    with translated(TrainingError, storage.UNBUILDABLE.format(path)):
        values = {name: value for name, value in described["options"].items() if name != "version"}
        options = AggregateOptions(**values)
        folds: dict[str, dict[int, list[Fitted]]] = {}
        for run in described["runs"]:
            if run["part"] != "oof" or "thresholds" not in run:
                continue
            chosen = zip(run["thresholds"], run["temperatures"], strict=True)
            for seed, (threshold, temperature) in enumerate(chosen):
                net = build_aggregator(options, described["features"], run["target"])
                prefix = f"{run['target']}.{run['fold']}.{seed}."
                own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()
                       if name.startswith(prefix)}  # fmt: skip
                storage.load_into(net, own, str(weights))
                fitted = Fitted(net.eval(), threshold, temperature, [])
                folds.setdefault(run["target"], {}).setdefault(run["fold"], []).append(fitted)
    if not folds.get("status"):
        raise TrainingError(f"{path}: no model of the status was trained; see reason in its runs")
    return StatusModel(folds, described)


def status_of(model: StatusModel, features: torch.Tensor) -> tuple[dict[str, Any], Predicted]:
    """Return status and score of a slide from the features (N, D) of its views.

    The interval has the least and the greatest calibrated probability of the folds: how much it
    depends on the cases of the training. It is no confidence interval of the status.
    """
    found = predict_case(model.of("status"), features, "status")
    by_fold = [
        float(predict_case(own, features, "status").columns["calibrated"])  # type: ignore[arg-type]
        for own in model.folds["status"].values()
    ]
    facts: dict[str, Any] = {
        "distance": None,
        "status": {
            **found.columns,
            "calibrated_low": min(by_fold),
            "calibrated_high": max(by_fold),
            "folds": len(by_fold),
        },
        "score": None,
    }
    if model.described["options"]["standardise"]:
        facts["distance"] = float(
            np.mean([distance(fitted, features) for fitted in model.of("status")])
        )
    if model.of("score"):
        facts["score"] = predict_case(model.of("score"), features, "score").columns
    return facts, found


def distance(fitted: Fitted, features: torch.Tensor) -> float:
    """Return how far the mean of the features (N, D) of views is from that of the training.

    The root mean square over the features, in standard deviations of the training.
    """
    net, mean = fitted.net, features.mean(0)
    away = ((mean - net.shift) * net.scale)[net.scale > 0]
    return float(away.square().mean().sqrt()) if len(away) else 0.0


def fifths(contribution: Sequence[float]) -> npt.NDArray[np.int64]:
    """Return the fifth of each view, 0 to 4, by its contribution; equal ones have the same."""
    values = np.asarray(contribution, float)
    edges = np.quantile(values, (0.2, 0.4, 0.6, 0.8))
    found: npt.NDArray[np.int64] = np.searchsorted(edges, values, side="left").astype(np.int64)
    return found


def contributions_geojson(views: Sequence[View], contribution: Sequence[float]) -> str:
    """Return the views of each fifth as one annotation with measurements, for QuPath.

    Squares in level-0 pixels; the contributions of all and the bias are the logit.
    """
    places = fifths(contribution)
    features = []
    for fifth, (name, color) in enumerate(zip(NAMES, COLORS, strict=True)):
        own = np.flatnonzero(places == fifth).tolist()
        if not own:
            continue
        squares = [
            shapely.box(
                views[k].x_px, views[k].y_px, views[k].x_px + views[k].size_px,
                views[k].y_px + views[k].size_px,
            ) for k in own
        ]  # fmt: skip
        values = np.array([contribution[k] for k in own])
        features.append(
            {
                "type": "Feature",
                "geometry": dict(shapely.geometry.mapping(shapely.union_all(squares))),
                "properties": {
                    "objectType": "annotation",
                    "name": f"contribution: {name}",
                    "classification": {"name": f"contribution: {name}", "color": list(color)},
                    "measurements": {
                        "views": len(own),
                        "sum of contributions": float(values.sum()),
                        "least contribution": float(values.min()),
                        "greatest contribution": float(values.max()),
                    },
                },
            }
        )
    return json.dumps({"type": "FeatureCollection", "features": features}) + "\n"


def contributions_overlay(
    slide: Slide, views: Sequence[View], contribution: Sequence[float]
) -> RGB:
    """Return an overview of the slide with its views tinted by their fifth."""
    view, _ = slide.overview(side_px=min(OVERVIEW_SIDE_PX, max(slide.size_px)))
    height, width = view.shape[:2]
    across, down = width / slide.size_px[0], height / slide.size_px[1]
    tinted = view.copy()
    for place, fifth in zip(views, fifths(contribution).tolist(), strict=True):
        start = round(place.x_px * across), round(place.y_px * down)
        end = (
            max(start[0], round((place.x_px + place.size_px) * across) - 1),
            max(start[1], round((place.y_px + place.size_px) * down) - 1),
        )
        cv2.rectangle(tinted, start, end, COLORS[fifth], -1)
    return np.asarray(cv2.addWeighted(view, 1 - TINT, tinted, TINT, 0), np.uint8)
