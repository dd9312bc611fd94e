"""Train the encoder her2_cnn: HER2 tiles with the score of their case, without the test split."""

import collections
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from hemera import tables
from hemera.config import TrainEncoderOptions
from hemera.dataset import cases as labelled
from hemera.dataset import criteria
from hemera.dataset.shards import read_member
from hemera.dataset.splits import draw, draw_inner
from hemera.dataset.views import cut_views
from hemera.errors import TrainingError
from hemera.files import layout
from hemera.imaging.codecs import decode
from hemera.imaging.color import DENSITY_STEP, density
from hemera.networks import storage
from hemera.sheet import SCORES
from hemera.training.session import session
from hemera.training.tile_scores import Places, ScoredViews, train

log = logging.getLogger(__name__)

View = tuple[str, str]
"""Case of a view, and its name."""


def run(
    *,
    network: str,
    cases: Path,
    case_tiles: Path,
    results: Path = Path(layout.RESULTS),
    weights: Path,
    metadata: Path,
    history: Path,
    options: TrainEncoderOptions,
) -> None:
    """Train a network on the HER2 tiles of all cases with a score that are not of the test split.

    Args:
        network: its name, her2_cnn.
        cases: table of stage cases.
        case_tiles: table of the tiles of stage cases.
        results: folder of results, with tables and shards of stage tile.
        weights: written: weights of the best epoch, safetensors.
        metadata: written: JSON with options, and the cases that the network has seen.
        history: written: table with one row per epoch and quantity.

    Raises:
        LeakageError: when two cases have the same HER2 tile.
        TrainingError: without HER2 tiles of two scores.
    """
    rows = tables.read(cases, tables.STATUS_CASES).to_pylist()
    described = tables.read_metadata(cases)
    used = {row["case"]: row for row in rows if row["split"] != labelled.TEST and row["score"]}
    limits = json.loads(described["options"]) | {
        "tissue_fraction_min": options.her2_tissue_fraction_min,
        "her2_sharpness_min": options.her2_sharpness_min,
    }
    weights.parent.mkdir(parents=True, exist_ok=True)
    # On disk, because the views of a cohort are more than the memory of most machines.
    with tempfile.TemporaryFile(dir=weights.parent) as buffer:
        listed, pixels, mpp = _cut(case_tiles, results, used, limits, buffer, options)
        seen = sorted({case for case, _ in listed})
        fitted, chosen = _divide([used[case] for case in seen], options)
        scores = np.array([SCORES.index(used[case]["score"]) for case, _ in listed], np.int64)
        first, second = (_balanced(listed, scores, own, options) for own in (fitted, chosen))
        _check(scores[first])
        counts = [
            np.bincount(scores[own], minlength=len(SCORES)).tolist() for own in (first, second)
        ]
        log.info("%s: views by score, training %s, validation %s", network, *counts)
        views = ScoredViews(pixels, scores)
        threads, seed = options.torch_threads, options.seed
        with session(seed=seed, threads=threads, device=options.device) as device:
            trained = train(views, first, second, options, device)
    storage.write_weights(weights, trained.net.state_dict())
    storage.write_metadata(
        metadata,
        {
            "network": network,
            "model": {"base_width": options.base_width, "hidden": options.hidden},
            "parameters": sum(each.numel() for each in trained.net.parameters()),
            "options": options.model_dump(),
            "trained_on": seen,
            "trained_on_sha256": labelled.digest(seen),
            "validation": chosen,
            "views": {"train": counts[0], "val": counts[1]},
            "mpp": mpp,
            "view_px": int(pixels.shape[1]),
            "epoch": trained.epoch,
            "cases": described["fingerprint"],
            "versions": storage.versions(),
        },
        weights,
    )
    names = ("epoch", "part", "quantity", "value")
    found = [dict(zip(names, row, strict=True)) for row in trained.history]
    tables.write(history, found, tables.HISTORY)


def _cut(
    case_tiles: Path,
    results: Path,
    used: Mapping[str, Any],
    limits: Mapping[str, Any],
    buffer: IO[bytes],
    options: TrainEncoderOptions,
) -> tuple[list[View], Any, float]:
    """Write the HER2 views of the cases into a file; return their names, pixels (N, S, S, 3), mpp.

    The pixels are mapped into memory. A tile of two cases, of which one may be judged, is a
    LeakageError.
    """
    known = tables.read(case_tiles, tables.STATUS_TILES).to_pylist()
    of_tile = {row["tile"]: row["case"] for row in known}
    listed: list[View] = []
    sizes: set[tuple[int, float]] = set()
    digests: list[tuple[str, str, str]] = []
    units = sorted({row["unit"] for row in known})
    for unit in tqdm(units, "HER2 tiles", unit="unit", disable=None):
        path = layout.path(layout.TILES, results, unit=unit)
        table = tables.read(path, tables.TILE)
        made_with = json.loads(tables.read_metadata(path).get("options", "{}"))
        density_min = float(made_with.get("density_min", 0.0)) / DENSITY_STEP
        shard = layout.path(layout.TILE_SHARD, results, unit=unit)
        refused = criteria.stain_refusals(table, limits, "her2").tolist()
        for row, reason in zip(table.to_pylist(), refused, strict=True):
            case = of_tile[row["tile"]]
            if reason:
                continue
            digests.append((row["her2_sha256"], case, row["tile"]))
            if case not in used:
                continue
            data = read_member(shard, row["her2_offset"], row["her2_length"], row["her2_sha256"])
            rgb = decode(data)
            tissue = density(rgb, tuple(row["her2_background"])) > density_min
            for i, j, view in cut_views(rgb, tissue, options.split, options.min_view_tissue):
                buffer.write(view.tobytes())
                sizes.add((len(view), row["mpp"]))
                listed.append((case, f"{row['tile']}_{i}_{j}"))
    labelled.check_images(digests)
    if not listed:
        raise TrainingError(
            "train_encoder: no HER2 tile of a case with a score outside of the test split; add "
            "such cases to the sheet, lower the limits of train_encoder, or leave oliveira out of "
            "evaluate_status.routes"
        )
    if len(sizes) > 1:
        raise TrainingError(
            f"train_encoder: HER2 views of different sides and resolutions, {sorted(sizes)}; run "
            "the stage tile again with one tile.size_px and tile.mpp"
        )
    buffer.flush()
    ((side, mpp),) = sizes
    pixels = np.memmap(buffer, np.uint8, mode="r", shape=(len(listed), side, side, 3))
    return listed, pixels, mpp


def _divide(
    rows: Sequence[Mapping[str, Any]], options: TrainEncoderOptions
) -> tuple[list[str], list[str]]:
    """Return the cases that are trained on, and those that choose the epoch.

    The latter are those of split val, or else drawn.
    """
    own = [row["case"] for row in rows if row["split"] == "val"]
    if 0 < len(own) < len(rows):
        return [row["case"] for row in rows if row["split"] != "val"], own
    strata = labelled.strata(rows, "score")
    return draw_inner(strata, options.validation_fraction, seed=options.seed)


def _balanced(
    listed: Sequence[View], scores: Places, cases: Sequence[str], options: TrainEncoderOptions
) -> Places:
    """Return the places of views of these cases, ascending, of each score equally many."""
    members = {*cases}
    of_score = collections.defaultdict(list)
    for place, ((case, _), score) in enumerate(zip(listed, scores.tolist(), strict=True)):
        if case in members:
            of_score[score].append(place)
    fewest = min((len(places) for places in of_score.values()), default=0)
    count = min(fewest, options.views_per_class or fewest)
    found: list[int] = []
    for places in of_score.values():
        names = [listed[place][1] for place in places]
        kept = draw(names, count, seed=options.seed, purpose="train_encoder")
        found += np.array(places)[kept].tolist()
    return np.array(sorted(found), np.int64)


def _check(scores: Places) -> None:
    """Check that views of two scores at least are trained on; warn of those that are missing."""
    present = [SCORES[score] for score in np.unique(scores).tolist()]
    if len(present) < 2:
        raise TrainingError(
            f"train_encoder: HER2 tiles of score {', '.join(present) or 'none'} alone; add cases "
            "of other scores, or leave oliveira out of evaluate_status.routes"
        )
    if missing := [score for score in SCORES if score not in present]:
        log.warning("train_encoder: no HER2 tile of score %s", ", ".join(missing))
