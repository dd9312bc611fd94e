"""The cohort at a glance: pairs and tiles that are left, staining by score, examples."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from hemera import tables
from hemera.dataset import statistics
from hemera.dataset.statistics import GROUP
from hemera.files import layout
from hemera.reports.data import STATES
from hemera.view.study import Study
from hemera.view.thresholds import Decided

EXAMPLES = 48
SEED = 20251
STEPS = ("tiles_grid", "tiles_tissue", "tiles_written")
PERCENTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def overview(study: Study, decided: Decided) -> dict[str, Any]:
    """Return what the page of the cohort shows; `decided` by the limits of the configuration."""
    outcomes = pa.concat_tables(
        [
            tables.read(path, tables.PAIRS)
            for path in (
                layout.path(layout.PAIRS, unit=unit) for unit in sorted({*study.units.values()})
            )
            if path.exists()
        ]
        or [tables.PAIRS.empty_table()]
    )
    states = outcomes.group_by("state").aggregate([([], "count_all")]).to_pylist()
    counts = {row["state"]: row["count_all"] for row in states}
    accepted = study.tiles.filter(pc.equal(study.tiles["accepted"], True)).to_pandas()
    accepted["score"] = accepted["score"].replace("", "unknown")
    chosen = statistics.sample(
        (accepted["dataset"] + "/" + accepted["score"]).tolist(),
        accepted["tile"].tolist(),
        EXAMPLES,
        SEED,
    )
    columns = ["tile", "pair", *GROUP]
    return {
        "states": {name: counts.get(name, 0) for name in STATES},
        "steps": {name: pc.sum(outcomes[name]).as_py() or 0 for name in STEPS},
        **decided.outcome(),
        "staining": {engine: _staining(accepted, engine) for engine in study.engines},
        "examples": accepted.iloc[chosen][columns].to_dict("records"),
        "report": Path(layout.REPORT).exists(),
    }


def _staining(accepted: Any, engine: str) -> list[dict[str, Any]]:
    """Return the masks of the accepted tiles of each group, with percentiles of their fraction."""
    if not len(accepted):
        return []
    groups = accepted.groupby(GROUP)[f"{engine}_positive_fraction"]
    spread = groups.quantile(list(PERCENTILES)).unstack()
    found = []
    for key, row in statistics.mask_statistics(accepted, engine).iterrows():
        own = dict(zip(GROUP, key, strict=True))
        found.append({**own, **row.to_dict(), "percentiles": spread.loc[key].tolist()})
    return found
