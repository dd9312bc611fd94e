"""Train an aggregator in cross-validation and predict the status and score of each case."""

import dataclasses
import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hemera import tables
from hemera.config import CELLS, OYELADE, RULES, AggregateOptions
from hemera.dataset import cases as labelled
from hemera.dataset.bags import Bags
from hemera.dataset.cases import OOF, TEST
from hemera.dataset.fused import FusedReadings
from hemera.dataset.readings import Reading, Readings, VirtualReadings, read_cases
from hemera.dataset.splits import check_unseen
from hemera.errors import TrainingError
from hemera.files import layout
from hemera.networks import storage
from hemera.training.aggregation import Fitted, fit, predict_case
from hemera.training.protocol import CLASSES, TARGETS, Run, plan
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
    refused: Rows = dataclasses.field(default_factory=list)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


def run(
    *,
    method: str,
    cases: Path,
    case_tiles: Path,
    engine: str | None = None,
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
        engine: mask engine whose cells method virtual reads.
        results: folder of results, with the features of stage embed, or index and cells.
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
    made_with = json.loads(described["options"])
    if options.encoder in RULES:
        reading = _reading(case_tiles, engine, results, made_with, options)
        written = _read(method, rows, made_with["equivocal"], reading)
    else:
        written = _train(method, rows, int(made_with["folds"]), case_tiles, results, options)
        written.facts["stages"]["cases"] = made_with
    storage.write_weights(weights, written.weights)
    storage.write_metadata(
        metadata,
        {
            "network": "aggregate",
            "method": method,
            "options": options.model_dump(),
            "encoder": options.encoder,
            **written.facts,
            "cases": described["fingerprint"],
            "runs": written.runs,
            "refused": written.refused,
            "versions": storage.versions(),
        },
        weights,
    )
    tables.write(history, written.history, tables.HISTORY)
    tables.write(predictions, written.predictions, tables.STATUS_PREDICTIONS)
    tables.write(contributions, written.contributions, tables.CONTRIBUTIONS)


def _reading(
    case_tiles: Path,
    engine: str | None,
    results: Path,
    made_with: Mapping[str, Any],
    options: AggregateOptions,
) -> Reading:
    """Return what reads the score of cases for a method without training."""
    if options.encoder == CELLS:
        return Readings(results, options.cells_min)
    tiles = tables.read(case_tiles, tables.STATUS_TILES).to_pylist()
    if options.encoder == OYELADE:
        return FusedReadings(results, tiles, made_with, options)
    if engine is None:
        raise TrainingError("aggregate: method virtual needs --engine, whose cells it reads")
    return VirtualReadings(results, tiles, engine, options.cells_min)


def _read(method: str, rows: Rows, equivocal: str, reading: Reading) -> _Written:
    """Predict the labelled cases by a rule without training; networks behind it may have seen some.

    Raises:
        LeakageError: when a network has seen a case of the test split.
    """
    for target in TARGETS:
        test = [row["case"] for row in labelled.judged(rows, target)
                if row["split"] == labelled.TEST]  # fmt: skip
        check_unseen(test, reading.trained_on, f"{method}, test split")
    predictions, refused = read_cases(rows, TARGETS, reading, equivocal, method)
    log.info("%s: %d predictions, %d refused", method, len(predictions), len(refused))
    unseen: dict[str, Any] = {"fold": None, "left_out": None, "repeat": 0, "inner": []}
    unseen |= {"trained_on": [], "trained_on_sha256": labelled.digest([])}
    return _Written(
        predictions=predictions,
        refused=refused,
        runs=[{"name": f"{OOF}.{target}", "part": OOF, "target": target, **unseen}
              for target in TARGETS],
        facts={"features": reading.features, "encoder_sha256": reading.fingerprint,
               "encoder_trained_on": [*reading.trained_on], "pretraining": reading.engine,
               "read": reading.facts(row["case"] for row in rows)},
    )  # fmt: skip


def _train(
    method: str,
    rows: Rows,
    folds: int,
    case_tiles: Path,
    results: Path,
    options: AggregateOptions,
) -> _Written:
    """Train the models of a method on features and predict the cases that they have not seen."""
    tiles = tables.read(case_tiles, tables.STATUS_TILES).to_pylist()
    files = {
        unit: layout.path(layout.FEATURES, results, encoder=options.encoder, unit=unit)
        for unit in sorted({row["unit"] for row in tiles})
    }
    bags = Bags(files, tiles, options.memory_mb)
    with_views = [row for row in rows if bags.views.get(row["case"])]
    written = _Written()
    written.refused = [
        {"case": row["case"], "target": target, "reason": "no view with tissue"}
        for target in TARGETS
        for row in labelled.judged(rows, target)
        if not bags.views.get(row["case"])
    ]
    if lost := {row["case"] for row in written.refused}:
        log.warning("%d cases have no view with tissue and are not predicted", len(lost))
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
    written.facts = {
        "features": bags.width,
        "encoder_sha256": bags.encoder_sha256,
        "encoder_trained_on": bags.trained_on,
        "pretraining": bags.pretraining,
        "stages": bags.stages,
        "mpps": sorted({*bags.mpps}),
        "tile_sha256": _first_tiles(tiles),
    }
    return written


def _first_tiles(tiles: Rows) -> dict[str, str]:
    """Return the digest of the first accepted tile of each case, by which a slide is recognised."""
    accepted = sorted((row for row in tiles if row["accepted"]), key=lambda row: row["tile"])
    return {row["case"]: row["he_sha256"] for row in reversed(accepted)}


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


def _predict(
    row: dict[str, Any],
    fitted: Sequence[Fitted],
    bags: Bags,
    device: torch.device,
    written: _Written,
) -> None:
    """Add the prediction of a case, the mean of several models, and the contributions of views."""
    found = predict_case(fitted, bags.load(row["case"]).to(device), row["target"])
    written.predictions.append({**row, **found.columns})
    if row["target"] == "status" and row["part"] in (OOF, TEST):
        columns = zip(bags.views[row["case"]], found.attention, found.contribution, strict=True)
        written.contributions += [
            {"case": row["case"], **dataclasses.asdict(view), "attention": a, "contribution": c}
            for view, a, c in columns
        ]
