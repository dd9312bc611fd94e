"""Train an encoder of views on tiles of cases outside of the test split."""

import collections
import dataclasses
import json
import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hemera import tables
from hemera.config import HER2_CNN, STAIN, STAIN_MAP, TUMOUR, TrainEncoderOptions
from hemera.dataset import cases as labelled
from hemera.dataset import labelled_views
from hemera.dataset.labelled_views import LabelledView, Source
from hemera.dataset.splits import draw, draw_inner
from hemera.errors import TrainingError
from hemera.files import layout
from hemera.networks import storage
from hemera.sheet import SCORES, read_sheet
from hemera.training.session import session
from hemera.training.view_networks import CLASSES, LabelledViews, Places, train

log = logging.getLogger(__name__)

LABELS = {
    HER2_CNN: SCORES, TUMOUR: ("no tumour", "tumour"), STAIN: SCORES,
    STAIN_MAP: ("background", *SCORES),
}  # fmt: skip
"""Names of the classes of each network."""


def run(
    *,
    network: str,
    cases: Path,
    case_tiles: Path,
    sheet: Path | None = None,
    engine: str | None = None,
    results: Path = Path(layout.RESULTS),
    weights: Path,
    metadata: Path,
    history: Path,
    options: TrainEncoderOptions,
) -> None:
    """Train a network on the tiles of cases that are neither of the test split nor held out.

    Args:
        network: her2_cnn, tumour, stain or stain_map.
        cases: table of stage cases.
        case_tiles: table of the tiles of stage cases.
        sheet: the sheet of pairs, whose column annotations tumour is trained with.
        engine: mask engine whose cells and masks stain and stain_map are trained with.
        results: folder of results, with tables and shards of the stages tile and mask.
        weights: written: weights of the best epoch, safetensors.
        metadata: written: JSON with options, and the cases that the network has seen.
        history: written: table with one row per epoch and quantity.

    Raises:
        LeakageError: when two cases have the same tile.
        TrainingError: without views of two classes.
    """
    rows = tables.read(cases, tables.STATUS_CASES).to_pylist()
    described = tables.read_metadata(cases)
    open_to = {row["case"]: row for row in rows if _may_be_seen(row, options)}
    source, labels_from = _source(network, open_to, described, sheet, engine, results, options)
    weights.parent.mkdir(parents=True, exist_ok=True)
    # On disk, because the views of a cohort are more than the memory of most machines.
    with tempfile.TemporaryDirectory(dir=weights.parent) as folder:
        found = labelled_views.labelled_views(
            source, case_tiles, results, split=options.split, tissue_min=options.min_view_tissue
        )
        cut = _write(network, found, Path(folder))
        seen = sorted({*cut.cases})
        fitted, chosen = _divide([open_to[case] for case in seen], options)
        first, second = (_drawn(cut, own, options) for own in (fitted, chosen))
        counts = [_counts(network, cut.views, own) for own in (first, second)]
        _check(network, counts[0])
        log.info("%s: views by class, training %s, validation %s", network, *counts)
        threads, seed = options.torch_threads, options.seed
        with session(seed=seed, threads=threads, device=options.device) as device:
            trained = train(network, cut.views, first, second, options, device)
        view_px = int(cut.views.pixels.shape[1])
    storage.write_weights(weights, trained.net.state_dict())
    storage.write_metadata(
        metadata,
        {
            "network": network,
            "model": trained.model,
            "parameters": sum(each.numel() for each in trained.net.parameters()),
            "options": options.model_dump(),
            "labels": labels_from,
            "pretrained_sha256": trained.pretrained_sha256,
            "trained_on": seen,
            "trained_on_sha256": labelled.digest(seen),
            "validation": chosen,
            "views": {"train": counts[0], "val": counts[1]},
            "mpp": cut.mpp,
            "view_px": view_px,
            "epoch": trained.epoch,
            "cases": described["fingerprint"],
            "versions": storage.versions(),
        },
        weights,
    )
    names = ("epoch", "part", "quantity", "value")
    listed = [dict(zip(names, row, strict=True)) for row in trained.history]
    tables.write(history, listed, tables.HISTORY)


def _may_be_seen(row: Mapping[str, Any], options: TrainEncoderOptions) -> bool:
    """Return whether networks may be trained on a case."""
    held_out = row["fold"] is not None and row["fold"] < options.held_out_folds
    return row["split"] != labelled.TEST and not held_out


def _source(
    network: str,
    rows: Mapping[str, Mapping[str, Any]],
    described: Mapping[str, str],
    sheet: Path | None,
    engine: str | None,
    results: Path,
    options: TrainEncoderOptions,
) -> tuple[Source, str]:
    """Return what a network is trained on, and where its labels are from."""
    limits = json.loads(described["options"])
    if network == TUMOUR:
        if sheet is None:
            raise TrainingError("train_encoder: tumour needs --sheet, for its annotations")
        pairs = [pair for pair in read_sheet(sheet).pairs if pair.case in rows and pair.annotations]
        files = {pair.pair: pair.annotations for pair in pairs if pair.annotations}
        labels = labelled_views.from_annotations(files, options.tumour_classes)
        cases = frozenset(pair.case for pair in pairs)
        return Source("he", labels, cases, limits), "annotations"
    limits |= {
        "tissue_fraction_min": options.her2_tissue_fraction_min,
        "her2_sharpness_min": options.her2_sharpness_min,
    }
    if network == HER2_CNN or (network == STAIN and options.labels == "slide"):
        scores = {case: row["score"] for case, row in rows.items() if row["score"]}
        labels = labelled_views.from_scores(scores)
        return Source("her2", labels, frozenset(scores), limits), "score of the case"
    if engine is None:
        raise TrainingError(f"train_encoder: {network} needs --engine, for cells and masks")
    labels = (
        labelled_views.from_cells(results, engine, options.cells_min)
        if network == STAIN
        else labelled_views.from_masks(results, engine)
    )
    kind = "cells" if network == STAIN else "masks"
    return Source("her2", labels, frozenset(rows), limits), f"{kind} of engine {engine} (silver)"


@dataclasses.dataclass(frozen=True)
class _Cut:
    """The views of all cases, with the case and the name of each, and their resolution."""

    views: LabelledViews
    cases: list[str]
    names: list[str]
    mpp: float


def _write(network: str, found: Iterable[LabelledView], folder: Path) -> _Cut:
    """Write views and labels to files that are mapped into memory."""
    cases, names = [], []
    sizes: set[tuple[int, float]] = set()
    with (folder / "pixels").open("wb") as pixels, (folder / "labels").open("wb") as labels:
        for view in found:
            pixels.write(view.rgb.tobytes())
            labels.write(np.asarray(view.label, np.uint8).tobytes())
            sizes.add((len(view.rgb), view.mpp))
            cases.append(view.case)
            names.append(view.name)
    route = "oliveira" if network == HER2_CNN else "oyelade"
    if not cases:
        what = {
            HER2_CNN: "HER2 tile of a case with a score",
            TUMOUR: "H&E tile in the annotations of the sheet",
        }.get(network, "HER2 tile with cells")
        instead = ", set aggregate.tumour_min: 0" if network == TUMOUR else ""
        raise TrainingError(
            f"train_encoder, {network}: no {what} outside of the test split and of the folds that "
            "are held out; add such cases to the sheet, lower the limits of train_encoder"
            f"{instead}, or leave {route} out of evaluate_status.routes"
        )
    if len(sizes) > 1:
        raise TrainingError(
            f"train_encoder: views of different sides and resolutions, {sorted(sizes)}; run the "
            "stage tile again with one tile.size_px and tile.mpp"
        )
    ((side, mpp),) = sizes
    of_pixels = (side, side) if network == STAIN_MAP else ()
    shape = (len(cases), side, side, 3)
    views = LabelledViews(
        np.memmap(folder / "pixels", np.uint8, mode="r", shape=shape),
        np.memmap(folder / "labels", np.uint8, mode="r", shape=(len(cases), *of_pixels)),
    )
    return _Cut(views, cases, names, mpp)


def _divide(
    rows: Sequence[Mapping[str, Any]], options: TrainEncoderOptions
) -> tuple[list[str], list[str]]:
    """Return the cases that are trained on, and those that choose the epoch.

    The latter are those of split val, or else drawn from the cases of each score, so that few cases
    are not of few scores.
    """
    own = [row["case"] for row in rows if row["split"] == "val"]
    if 0 < len(own) < len(rows):
        return [row["case"] for row in rows if row["split"] != "val"], own
    drawn: list[str] = []
    for score in (*SCORES, None):
        strata = labelled.strata([row for row in rows if row["score"] == score], "score")
        drawn += draw_inner(strata, options.validation_fraction, seed=options.seed)[1]
    return sorted({row["case"] for row in rows} - {*drawn}), sorted(drawn)


def _drawn(cut: _Cut, cases: Sequence[str], options: TrainEncoderOptions) -> Places:
    """Return the places of views of these cases, ascending, with `balance` equally many a class."""
    members = {*cases}
    own = [place for place, case in enumerate(cut.cases) if case in members]
    labels = cut.views.labels
    if labels.ndim > 1:
        return np.array(own, np.int64)
    of_class = collections.defaultdict(list)
    for place in own:
        of_class[int(labels[place])].append(place)
    most = (
        min((len(places) for places in of_class.values()), default=0) if options.balance else None
    )
    count = min((each for each in (most, options.views_per_class) if each), default=None)
    found: list[int] = []
    for places in of_class.values():
        names = [cut.names[place] for place in places]
        kept = draw(names, count, seed=options.seed, purpose="train_encoder")
        found += np.array(places)[kept].tolist()
    return np.array(sorted(found), np.int64)


def _counts(network: str, views: LabelledViews, places: Places) -> list[int]:
    """Return the number of views of each class; of a map, those with a pixel of it."""
    classes = range(CLASSES[network])
    if views.labels.ndim == 1:
        found: list[int] = np.bincount(views.labels[places], minlength=len(classes)).tolist()
        return found
    return [sum(bool((views.labels[place] == each).any()) for place in places) for each in classes]


def _check(network: str, counts: Sequence[int]) -> None:
    """Check that views of two classes at least are trained on; warn of those that are missing."""
    names = LABELS[network]
    present = [name for name, count in zip(names, counts, strict=True) if count]
    if len(present) < 2:
        route = "oliveira" if network == HER2_CNN else "oyelade"
        raise TrainingError(
            f"train_encoder, {network}: views of {', '.join(present) or 'no class'} alone; add "
            f"cases with other classes, or leave {route} out of evaluate_status.routes"
        )
    if missing := [name for name in names if name not in present]:
        log.warning("train_encoder, %s: no view of %s", network, ", ".join(missing))
