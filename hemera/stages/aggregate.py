"""Train an aggregator in cross-validation and predict the status and score of each case."""

import dataclasses
import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hemera import tables
from hemera.config import AggregateOptions
from hemera.dataset import cases as labelled
from hemera.dataset.bags import Bags
from hemera.dataset.splits import check_unseen
from hemera.files import layout
from hemera.networks import storage
from hemera.networks.aggregators import score_probabilities
from hemera.training.aggregation import Fitted, fit
from hemera.training.protocol import CLASSES, OOF, TARGETS, TEST, Run, plan
from hemera.training.session import session

log = logging.getLogger(__name__)

Rows = list[dict[str, Any]]

RECORDED = ("name", "part", "target", "fold", "left_out", "repeat", "inner")
"""What the metadata state of a run beside the cases that it has seen."""


@dataclasses.dataclass
class _Written:
    """What accumulates over the runs of a method."""

    weights: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    history: Rows = dataclasses.field(default_factory=list)
    runs: Rows = dataclasses.field(default_factory=list)
    predictions: Rows = dataclasses.field(default_factory=list)
    contributions: Rows = dataclasses.field(default_factory=list)


def run(
    *,
    method: str,
    cases: Path,
    case_tiles: Path,
    results: Path = Path(layout.RESULTS),
    weights: Path,
    metadata: Path,
    history: Path,
    predictions: Path,
    contributions: Path,
    options: AggregateOptions,
) -> None:
    """Train the models of a method and predict the cases that they have not seen.

    Args:
        method: its name.
        cases: table of stage cases.
        case_tiles: table of the tiles of stage cases.
        results: folder of results, with the features of stage embed.
        weights: written: weights of the models of cross-validation, safetensors.
        metadata: written: JSON with options, encoder, and the cases that every model has seen.
        history: written: table with one row per model, epoch and quantity.
        predictions: written: table with one row per case and prediction.
        contributions: written: table with one row per view.

    Raises:
        LeakageError: when an encoder has seen a case that would be predicted.
    """
    rows = tables.read(cases, tables.STATUS_CASES).to_pylist()
    described = tables.read_metadata(cases)
    tiles = tables.read(case_tiles, tables.STATUS_TILES).to_pylist()
    files = {
        unit: layout.path(layout.FEATURES, results, encoder=options.encoder, unit=unit)
        for unit in sorted({row["unit"] for row in tiles})
    }
    bags = Bags(files, tiles, options.memory_mb)
    with_views = [row for row in rows if bags.views.get(row["case"])]
    if lost := len([row for row in rows if row["fold"] is not None]) - len(
        [row for row in with_views if row["fold"] is not None]
    ):
        log.warning("%d cases have no view with tissue and are not predicted", lost)
    folds = int(json.loads(described["options"])["folds"])
    written = _Written()
    with session(seed=options.seed, threads=options.torch_threads, device=options.device) as device:
        seen = bags.trained_on if options.encoder_cases == "train_only" else ()
        planned = list(plan(with_views, folds, options, seen))
        models: dict[str, list[Fitted]] = defaultdict(list)
        for each in tqdm(planned, method, unit="fold", disable=None):
            fitted = _run(each, bags, method, options, device, written)
            if each.part == OOF:
                models[each.target] += fitted
        for target in TARGETS:
            _predict_test(target, models[target], with_views, bags, method, device, written)
    storage.write_weights(weights, written.weights)
    storage.write_metadata(
        metadata,
        {
            "network": "aggregate",
            "method": method,
            "options": options.model_dump(),
            "features": bags.width,
            "encoder": options.encoder,
            "encoder_sha256": bags.encoder_sha256,
            "encoder_trained_on": bags.trained_on,
            "pretraining": bags.pretraining,
            "cases": described["fingerprint"],
            "runs": written.runs,
            "versions": storage.versions(),
        },
        weights,
    )
    tables.write(history, written.history, tables.HISTORY)
    tables.write(predictions, written.predictions, tables.STATUS_PREDICTIONS)
    tables.write(contributions, written.contributions, tables.CONTRIBUTIONS)


def _run(
    run: Run,
    bags: Bags,
    method: str,
    options: AggregateOptions,
    device: torch.device,
    written: _Written,
) -> list[Fitted]:
    """Train the models of a run and predict its cases; no model where there is one class only."""
    described: dict[str, Any] = {
        **{name: getattr(run, name) for name in RECORDED},
        "trained_on": run.seen,
        "trained_on_sha256": labelled.digest(run.seen),
    }
    classes = {run.labels[case] for case in run.train}
    if len(classes) < 2:
        only = CLASSES[run.target][classes.pop()] if classes else "no case"
        described["reason"] = f"{run.target}: only one class to train on ({only})"
        log.warning("%s: %s", run.name, described["reason"])
        written.runs.append(described)
        return []
    check_unseen(run.judged, [*run.seen, *bags.trained_on], f"{method}, {run.name}")
    fitted = []
    for seed in range(1 if options.aggregator == "mean" else options.seeds):
        model = fit(
            bags.load, run.labels, run.train, run.inner, run.target, options,
            options.seed + seed, device,
        )  # fmt: skip
        fitted.append(model)
        if run.part == OOF:
            for name, tensor in model.net.state_dict().items():
                written.weights[f"{run.target}.{run.fold}.{seed}.{name}"] = tensor
            for epoch, losses in enumerate(model.history, 1):
                for part, value in zip(("train", "val"), losses, strict=True):
                    if value is not None:
                        quantity = f"loss/{run.target}/fold {run.fold}/seed {seed}"
                        written.history.append(
                            {"epoch": epoch, "part": part, "quantity": quantity, "value": value}
                        )
    described |= {
        "thresholds": [model.threshold for model in fitted],
        "temperatures": [model.temperature for model in fitted],
    }
    written.runs.append(described)
    for case in run.judged:
        row = {"case": case, "method": method, "target": run.target, "part": run.part,
               "fold": run.fold, "left_out": run.left_out, "repeat": run.repeat,
               "truth": CLASSES[run.target][run.labels[case]]}  # fmt: skip
        _predict(row, fitted, bags, device, written)
    return fitted


def _predict_test(
    target: str,
    fitted: Sequence[Fitted],
    rows: Sequence[Mapping[str, Any]],
    bags: Bags,
    method: str,
    device: torch.device,
    written: _Written,
) -> None:
    """Predict the cases of the test split by the models of all folds."""
    judged = [row for row in rows if row["split"] == labelled.TEST and row[target]]
    # Of no case of the test split the encoder may have seen any tile, whatever encoder_cases is.
    seen = {case for run in written.runs if run["part"] == OOF for case in run["trained_on"]}
    check_unseen(
        [row["case"] for row in judged], [*seen, *bags.trained_on], f"{method}, test split"
    )
    for row in judged if fitted else ():
        base = {"case": row["case"], "method": method, "target": target, "part": TEST,
                "repeat": 0, "truth": row[target]}  # fmt: skip
        _predict(base, fitted, bags, device, written)


@torch.inference_mode()
def _predict(
    row: dict[str, Any],
    fitted: Sequence[Fitted],
    bags: Bags,
    device: torch.device,
    written: _Written,
) -> None:
    """Add the prediction of a case, the mean of several models, and the contributions of views."""
    features = bags.load(row["case"]).to(device)
    pooled = [model.net(features) for model in fitted]
    contribution = torch.stack([each.contribution.double() for each in pooled]).mean(0)
    attention = torch.stack([each.attention.double() for each in pooled]).mean(0) * len(features)
    bias = float(torch.stack([each.bias.double() for each in pooled]).mean())
    logits = torch.stack([each.bias.double() + each.contribution.double().sum() for each in pooled])
    temperatures = torch.tensor([model.temperature for model in fitted], device=device)
    probability = float(torch.sigmoid(logits).mean())
    threshold = float(np.mean([model.threshold for model in fitted]))
    predicted = CLASSES["status"][int(probability >= threshold)]
    scores: dict[str, float] = {}
    if row["target"] == "score":
        each = torch.stack([score_probabilities(one.logits.double()) for one in pooled])
        shares = each.mean(0).tolist()
        scores = {f"p{place}": share for place, share in enumerate(shares)}
        # The median: the score that is exceeded with a probability below one half.
        predicted = CLASSES["score"][int((np.cumsum(shares)[:-1] < 0.5).sum())]
    written.predictions.append(
        {
            **row,
            "predicted": predicted,
            "logit": float(logits.mean()),
            "bias": bias,
            "probability": probability,
            "calibrated": float(torch.sigmoid(logits / temperatures).mean()),
            "threshold": threshold,
            **scores,
            "models": len(fitted),
        }
    )
    if row["target"] == "status" and row["part"] in (OOF, TEST):
        columns = zip(
            bags.views[row["case"]], attention.tolist(), contribution.tolist(), strict=True
        )
        written.contributions += [
            {"case": row["case"], **dataclasses.asdict(view), "attention": a, "contribution": c}
            for view, a, c in columns
        ]
