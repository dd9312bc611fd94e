"""Results of the stages before `aggregate`, with features drawn from a distribution."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hemera import tables
from hemera.config import METHODS, AggregateOptions, CasesOptions, MaskOptions
from hemera.dataset import cases as labelled
from hemera.dataset.features import ViewList, write_features
from hemera.files import layout
from hemera.stages import aggregate
from tests.small_tables import digest, tile_row

SCORES = ("0", "1+", "2+", "3+")
QUICK: dict[str, Any] = {
    "encoder": "statistics", "seeds": 1, "epochs": 4, "embed_width": 8, "attention_width": 4,
    "learning_rate": 0.01, "torch_threads": 1, "shuffles": 2,
}  # fmt: skip


def case_rows(count: int = 40, *, test: int = 0, **values: Any) -> list[dict[str, Any]]:
    """Return rows of `tables.STATUS_CASES`; the last `test` cases are of the test split."""
    rows = []
    for number in range(count):
        score = SCORES[number % 4]
        rows.append(
            {
                "case": f"c{number:03d}", "dataset": "d", "site": ("a", "b")[number // 4 % 2],
                "split": "test" if number >= count - test else "", "fold": None, "score": score,
                "status": "positive" if score in ("2+", "3+") else "negative",
                "label_source": "status", "pairs": 1, "he_tiles": 3, "state": "used",
                "reason": None, **values,
            }
        )  # fmt: skip
    divided = labelled.divided(rows)
    folds = labelled.assign_folds(labelled.strata(divided), 5, seed=1)
    return [{**row, "fold": folds.get(row["case"])} for row in rows]


def write_status(
    results: Path,
    rows: list[dict[str, Any]],
    *,
    signal: float = 2.0,
    site: float = 0.0,
    views: int = 3,
    seed: int = 1,
    trained_on: Sequence[str] = (),
) -> None:
    """Write cases, tiles and features.

    The first feature rises with the score by `signal`, the second by `site` at site b.
    """
    metadata = tables.provenance(CasesOptions()) | {"fingerprint": labelled.fingerprint(rows)}
    tables.write(layout.path(layout.STATUS_CASES, results), rows, tables.STATUS_CASES, metadata)
    draws = np.random.default_rng(seed)
    tiles, listed, features = [], ViewList(), []
    for row in rows:
        for number in range(views):
            tile = f"{row['case']}_{number}"
            tiles.append(
                {"tile": tile, "pair": row["case"], "case": row["case"], "unit": "u",
                 "he_sha256": digest(tile), "accepted": True, "reason": None}
            )  # fmt: skip
            listed.add(512 * number, 0, 512.0, tile, row["case"])
            features.append(draws.normal(size=6))
            features[-1][0] += signal * (SCORES.index(row["score"]) if row["score"] else 0)
            features[-1][1] += site * (row["site"] == "b")
    path = layout.path(layout.STATUS_TILES, results)
    tables.write(path, tiles, tables.STATUS_TILES)
    write_features(
        layout.path(layout.FEATURES, results, encoder="statistics", unit="u"),
        [np.array(features).reshape(-1, 6)], 6, listed,
        {"encoder": "statistics", "encoder_sha256": "statistics", "options": "{}",
         "trained_on": list(trained_on), "pretraining": "none"}, {},
    )  # fmt: skip


def run_method(results: Path, method: str, **options: Any) -> Path:
    """Run stage aggregate on these results; return its folder."""
    patterns = {
        "weights": layout.AGGREGATOR, "metadata": layout.AGGREGATOR_METADATA,
        "history": layout.AGGREGATOR_HISTORY, "predictions": layout.STATUS_PREDICTIONS,
        "contributions": layout.CONTRIBUTIONS,
    }  # fmt: skip
    aggregate.run(
        method=method,
        cases=layout.path(layout.STATUS_CASES, results),
        case_tiles=layout.path(layout.STATUS_TILES, results),
        results=results,
        **{name: layout.path(value, results, method=method) for name, value in patterns.items()},
        options=AggregateOptions(**{**QUICK, **METHODS[method], **options}),
    )
    return layout.path(layout.AGGREGATOR, results, method=method).parent


def write_readings(
    results: Path, counts: Mapping[str, Sequence[Sequence[int]]], rejected: Sequence[str] = ()
) -> None:
    """Write index and cells: by case, of each tile the cells of intensity 0 to 3.

    The tiles of the cases `rejected` are not accepted. Cells are evenly distributed in a tile.
    """
    draws = np.random.default_rng(1)
    rows, cells = [], []
    for case, tiles in counts.items():
        for number, own in enumerate(tiles):
            accepted = case not in rejected
            row = tile_row(
                case, 0, y_px=number, size_px=512, mpp=0.5, shard="tile/u.tar", dataset="d",
                score="", registration="pass", accepted=accepted, case=case, split="train",
                reason=None if accepted else "her2_sharpness", stain_cells=sum(own),
                stain_weak_cells=own[1], stain_moderate_cells=own[2], stain_strong_cells=own[3],
                stain_membrane_od=0.1, stain_cytoplasm_od=0.1,
            )  # fmt: skip
            rows.append(row)
            for place, intensity in enumerate(np.repeat(range(4), own).tolist(), 1):
                x, y = draws.uniform(0, 512, 2).tolist()
                cells.append(
                    {"tile": row["tile"], "engine": "stain", "cell": place, "x_px": x, "y_px": y,
                     "area_px": 50, "positive": intensity > 1, "intensity": intensity,
                     "membrane_od": 0.1}
                )  # fmt: skip
    made = tables.provenance(MaskOptions(engines={"stain": {}}))["options"]
    metadata = {"fingerprint": "f" * 64, "mask_target": "stain", "options_mask": made,
                "mask_engines": '["stain"]'}  # fmt: skip
    tables.write(layout.path(layout.INDEX, results), rows, tables.index(("stain",)), metadata)
    tables.write(layout.path(layout.CELLS, results, unit="u"), cells, tables.CELLS)
