"""Sections of the page about the filters and the measures that they use."""

import itertools
import json
from collections.abc import Collection
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from hemera.dataset.criteria import ACCEPTED, CRITERIA, MEASURES, REASONS
from hemera.dataset.statistics import Frame
from hemera.reports import charts
from hemera.reports.data import Cohort
from hemera.reports.html import count, percent, plural

_PALETTE = (
    charts.ORANGE, charts.VERMILLION, charts.PURPLE, charts.GREEN, charts.SKY, charts.BROWN,
)  # fmt: skip


def reason_colors(present: Collection[str]) -> dict[str, str]:
    """Return the colour of each reason, the same on all pages of a cohort.

    Those that are present have the first colours; gray when there are more.
    """
    ordered = sorted(REASONS, key=lambda name: name not in present)
    return dict(
        zip(ordered, itertools.chain(_PALETTE, itertools.repeat(charts.GRAY)), strict=False)
    )


def filters(cohort: Cohort, table: Frame) -> dict[str, Any]:
    """Return the numbers of tiles after each filter; `table` is of `statistics.rejections`."""
    totals = table.sum()
    reasons = [name for name in table.columns if name != ACCEPTED and totals[name]]
    shown = reason_colors(reasons)
    colors = {ACCEPTED: charts.BLUE, **{name: shown[name] for name in reasons}}
    rates = table[ACCEPTED] / table.sum(axis=1)
    return {
        "steps": _steps(cohort, totals[reasons], totals.sum()),
        "fractions": charts.bars(
            "Tiles of each data set and score by reason",
            table[list(colors)].set_axis([", ".join(key) for key in table.index]),
            colors,
            [
                f"{percent(rate)} of {plural(tiles, 'tile')}"
                for rate, tiles in zip(rates, table.sum(axis=1), strict=True)
            ],
            relative=True,
        ),
        "colors": colors,
        "reasons": {
            name: {
                "words": REASONS[name].text,
                "limit": _limits(name, cohort),
                "tiles": totals[name],
            }
            for name in reasons
        },
        "table": table,
    }


def _steps(cohort: Cohort, totals: Frame, written: int) -> Markup:
    """Draw the tiles that are left after each step, from grid positions to accepted tiles."""
    grid, tissue = (cohort.outcomes[f"tiles_{name}"].sum() for name in ("grid", "tissue"))
    first = {"grid positions": grid, "above the tissue floor": tissue, "written": written}
    left = pd.concat([pd.Series(first), written - totals.cumsum()])
    steps = pd.DataFrame({"left": left, "removed": -left.diff().fillna(0).clip(upper=0)})
    steps = steps.astype(int)
    return charts.bars(
        "From grid positions to accepted tiles",
        steps,
        {"left": charts.BLUE, "removed": charts.ORANGE},
        [
            f"{count(left)} left" + (f", {count(removed)} removed" if removed else "")
            for left, removed in steps.to_numpy()
        ],
    )


def _limits(reason: str, cohort: Cohort) -> str:
    """Return the keys and values in config.yaml that a reason depends on."""
    limits = cohort.options("filter")
    # Both stains have the same limit.
    options = dict.fromkeys(each.option for each in CRITERIA if each.reason == reason)
    return ", ".join(
        f"filter.{option}: {json.dumps(limits[option])}"
        for option in options
        if limits[option] is not None
    )


def quality(cohort: Cohort) -> list[tuple[str, Markup]]:
    """Return a histogram of each measure with the limit of its filter, as (title, chart)."""
    limits = cohort.options("filter")
    tiles = cohort.tiles
    made = []
    for measure, (title, unit) in MEASURES.items():
        values = tiles[measure].to_numpy(np.float64, na_value=np.nan)
        if not np.isfinite(values).any():
            continue
        group = pd.Series("rejected for another reason", tiles.index)
        group[tiles["accepted"]] = "accepted"
        lines = []
        for criterion in CRITERIA:
            if criterion.column != measure or limits[criterion.option] is None:
                continue
            limit = float(limits[criterion.option])
            missed = criterion.missed(values, limit)
            group[(tiles["reason"] == criterion.reason) & missed] = "rejected by this measure"
            lines.append((f"{'≥' if criterion.direction == '>=' else '≤'} {limit:g}", limit))
        chart = charts.histogram(
            title,
            [
                (name, color, values[group == name])
                for name, color in (
                    ("accepted", charts.BLUE),
                    ("rejected for another reason", charts.GRAY),
                    ("rejected by this measure", charts.ORANGE),
                )
            ],
            limits=lines,
            unit=unit,
            span=(0.0, 1.0) if measure.endswith("_fraction") else None,
        )
        made.append((title, chart))
    return made
