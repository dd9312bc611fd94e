"""Score and status of cases by rules without training; method cells: from real HER2."""

import collections
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from hemera import tables
from hemera.dataset import cases as labelled
from hemera.dataset.statistics import Frame, case_counts, case_staining, with_few_tiles
from hemera.errors import TableError
from hemera.files import layout
from hemera.masks.her2_score import CLASSES, her2_scores
from hemera.sheet import SCORES

Rows = list[dict[str, Any]]

SMALLEST = 1 / 4000
"""Of a probability that is estimated from 2,000 draws, so that its logit is finite."""

SEEN = "a network of this method was trained on it"

_CELL_COLUMNS = ("tile", "engine", "x_px", "y_px", "intensity", "membrane_od")
_PROBABILITIES = tuple(name for name in tables.STAINING.names if name.startswith("probability_"))


class Reading(Protocol):
    """What reads the score of cases by a rule.

    Attributes:
        features: numbers that are read per view or cell.
        fingerprint: SHA-256 of what is read.
        trained_on: cases that a network behind it has seen.
        engine: what is read, in words.
    """

    features: int
    fingerprint: str
    trained_on: Sequence[str]
    engine: str

    def refusal(self, case: str) -> str:
        """Return why the score of a case is not read; empty: it is."""

    def score(self, case: str) -> str:
        """Return the score of a case that is not refused, of `SCORES`."""

    def probabilities(self, case: str) -> list[float]:
        """Return the probabilities of the scores of a case that is not refused."""

    def facts(self, cases: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Return what else is stated of cases."""


class Readings:
    """The ASCO/CAP score of each case in the index, from the cells of its accepted tiles.

    Attributes:
        engine: whose cells are read: `index.target`.
        fingerprint: of the index.
        trained_on: no case.
    """

    features = 4
    trained_on: Sequence[str] = ()

    def __init__(self, results: Path, cells_min: int) -> None:
        """Read index and cells.

        Args:
            results: folder of results.
            cells_min: fewest cells of a case that is read.
        """
        path = layout.path(layout.INDEX, results)
        metadata = tables.read_metadata(path)
        target, self.fingerprint = metadata["mask_target"], metadata["fingerprint"]
        self.engine = f"mask engine {target}"
        schema = tables.index(json.loads(metadata["mask_engines"]))
        columns = ["tile", "pair", "case", "dataset", "score", "size_px", "shard", "accepted",
                   "reason"]  # fmt: skip
        columns += [name for name in schema.names if name.startswith(f"{target}_")
                    and name.endswith(("_cells", "_membrane_od", "_cytoplasm_od"))]  # fmt: skip
        tiles = tables.read(path, schema, columns).to_pandas()
        accepted = tiles[tiles["accepted"]]
        rejected = tiles[~tiles["accepted"]].groupby("case")["reason"]
        self._rejected = {case: str(reasons.mode().iloc[0]) for case, reasons in rejected}
        units = accepted["shard"].map(lambda shard: layout.unit(f"{layout.RESULTS}/{shard}"))
        self._count(accepted.assign(unit=units), target, layout.CELLS, results, cells_min)

    def _count(
        self, accepted: Frame, target: str, pattern: str, results: Path, cells_min: int
    ) -> None:
        """Count the cells of accepted tiles, which have columns of the index, case and unit."""
        self._cells_min = cells_min
        self._counts: dict[str, list[int]] = {}
        self._probabilities: dict[str, list[float]] = {}
        if len(accepted):
            counts = case_counts(accepted, target)
            self._counts = dict(zip(counts.index, counts.to_numpy(np.int64).tolist(), strict=True))
            few = _cells(results, pattern, with_few_tiles(accepted))
            staining = case_staining(accepted, target, few).set_index("case")
            found = staining[list(_PROBABILITIES)]
            self._probabilities = dict(zip(found.index, found.to_numpy().tolist(), strict=True))

    def refusal(self, case: str) -> str:
        """Return why the score of a case is not read; empty: it is."""
        if case in self._counts:
            cells = sum(self._counts[case])
            few = cells < self._cells_min
            return f"fewer than {self._cells_min} cells in its accepted tiles" if few else ""
        if case in self._rejected:
            return f"no tile of its HER2 is accepted, most for: {self._rejected[case]}"
        return "no tile of its HER2 in the index: H&E alone, or its registration was refused"

    def score(self, case: str) -> str:
        """Return the score of a case that is not refused, of `SCORES`; ultralow is 0."""
        place = int(her2_scores(np.array([self._counts[case]]))[0])
        return SCORES[max(0, place - 1)]

    def probabilities(self, case: str) -> list[float]:
        """Return the probabilities of the scores of a case that is not refused."""
        found = dict(zip(CLASSES, self._probabilities[case], strict=True))
        return [found["0"] + found["ultralow"], found["1+"], found["2+"], found["3+"]]

    def facts(self, cases: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Return nothing."""
        return {}


class VirtualReadings(Readings):
    """The same of cells on HER2 that was generated from H&E, of cases not seen by the generator.

    Attributes:
        trained_on: cases that the generator has seen.
    """

    def __init__(
        self, results: Path, tiles: Sequence[Mapping[str, Any]], engine: str, cells_min: int
    ) -> None:
        """Read tables of the stages restain and mask.

        Args:
            results: folder of results.
            tiles: rows of `tables.STATUS_TILES`.
            engine: whose cells are read.
            cells_min: fewest cells of a case that is read.

        Raises:
            TableError: when units are of different generators.
        """
        self.engine = f"generated HER2, mask engine {engine}"
        self._rejected = {}
        of_tile = {row["tile"]: row["case"] for row in tiles}
        frames, made = [], {}
        for unit in sorted({row["unit"] for row in tiles}):
            path = layout.path(layout.VIRTUAL_TILES, results, unit=unit)
            metadata = tables.read_metadata(path)
            made[metadata["generator_sha256"], metadata["trained_on"]] = path
            own = tables.read(path, tables.TILE, ["tile", "size_px"]).to_pandas()
            masks = tables.read(
                layout.path(layout.VIRTUAL_MASKS, results, unit=unit), tables.MASK
            ).to_pandas()
            counted = masks[masks["engine"] == engine].set_index("tile")
            columns = [name for name in counted if name.endswith(("_cells", "_od"))]
            counted = counted[["cells", *columns]].add_prefix(f"{engine}_")
            frames.append(own.join(counted, on="tile", how="inner").assign(unit=unit))
        if len(made) > 1:
            raise TableError(
                f"{', '.join(map(str, made.values()))}: made by different generators; delete the "
                "folder restain and run the stage again"
            )
        ((self.fingerprint, seen),) = made
        self.trained_on = [str(case) for case in json.loads(seen)]
        accepted = pd.concat(frames, ignore_index=True).assign(dataset="", score="")
        accepted["case"] = accepted["tile"].map(of_tile)
        self._count(accepted, engine, layout.VIRTUAL_CELLS, results, cells_min)

    def refusal(self, case: str) -> str:
        """Return why the score of a case is not read; empty: it is."""
        if case in self.trained_on:
            return SEEN
        return super().refusal(case)


def _cells(results: Path, pattern: str, tiles: Frame) -> Frame:
    """Return the cells of tiles, from the tables of their units."""
    tables_ = [tables.CELLS.empty_table().select(_CELL_COLUMNS)]
    for unit, own in tiles.groupby("unit"):
        path = layout.path(pattern, results, unit=str(unit))
        cells = tables.read(path, tables.CELLS, _CELL_COLUMNS)
        names = pa.array(own["tile"].tolist(), pa.string())
        tables_.append(cells.filter(pc.is_in(cells["tile"], names)))
    return pa.concat_tables(tables_).to_pandas()


def read_cases(
    rows: Sequence[Mapping[str, Any]],
    targets: Iterable[str],
    readings: Reading,
    equivocal: str,
    method: str,
) -> tuple[Rows, Rows]:
    """Return predictions of the labelled cases, and refusals.

    A reading of 2+ is no status for drop; 0 and 1+ are negative, 3+ is positive. The probability of
    positive is that of 3+, and of 2+ too: half of it for drop.

    Args:
        rows: of `tables.STATUS_CASES`.
        targets: status, score.
        equivocal: `cases.equivocal`: the status of 2+, or drop.

    Returns:
        Rows of `tables.STATUS_PREDICTIONS`, and case, target and reason of what is not read.
    """
    of_equivocal = {"drop": 0.5, "positive": 1.0, "negative": 0.0}[equivocal]
    predictions, refused = [], []
    for target in targets:
        for row in labelled.judged(rows, target):
            case = row["case"]
            reason = readings.refusal(case)
            read = "" if reason else readings.score(case)
            if target == "status" and read == labelled.EQUIVOCAL and equivocal == "drop":
                reason = "it is read as 2+, which is no status"
            if reason:
                refused.append({"case": case, "target": target, "reason": reason})
                continue
            shares = readings.probabilities(case)
            positive = shares[3] + shares[2] * (of_equivocal if target == "status" else 1)
            bounded = min(max(positive, SMALLEST), 1 - SMALLEST)
            logit = float(np.log(bounded / (1 - bounded)))
            part = "test" if row["split"] == labelled.TEST else "oof"
            found = {"case": case, "method": method, "target": target, "part": part, "repeat": 0,
                     "truth": row[target], "logit": logit, "bias": logit, "probability": positive,
                     "models": 0}  # fmt: skip
            if target == "score":
                found |= {"predicted": read, **{f"p{k}": share for k, share in enumerate(shares)}}
            else:
                above = read == "3+" or (read == labelled.EQUIVOCAL and equivocal == "positive")
                found["predicted"] = labelled.STATUSES[int(above)]
            predictions.append(found)
    return predictions, refused


def refusals(
    rows: Sequence[Mapping[str, Any]], predictions: Iterable[Mapping[str, Any]],
    method: Mapping[str, Any], target: str,
) -> dict[str, int]:  # fmt: skip
    """Return how many labelled cases a method has not predicted, by reason, most frequent first.

    `method`: its metadata.
    """
    done = {row["case"] for row in predictions
            if row["target"] == target and row["part"] in ("oof", "test")}  # fmt: skip
    own = [run for run in method["runs"] if run["target"] == target and run["part"] == "oof"]
    folds = {run["fold"]: run["reason"].partition(": ")[2] for run in own if "reason" in run}
    if folds and len(folds) == len(own):  # no model for the test split
        folds[None] = next(iter(folds.values()))
    reasons = {row["case"]: folds[row["fold"]] for row in rows if row["fold"] in folds}
    reasons |= dict.fromkeys(method["encoder_trained_on"], SEEN)
    reasons |= {row["case"]: row["reason"] for row in method["refused"] if row["target"] == target}
    missing = [row["case"] for row in labelled.judged(rows, target) if row["case"] not in done]
    counted = collections.Counter(reasons.get(case, "no prediction") for case in missing)
    return dict(counted.most_common())
