"""Sections of the page about the filters and the measures that they use."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
from markupsafe import Markup

from hemera.dataset.criteria import CRITERIA, MEASURES, REASONS
from hemera.dataset.statistics import Frame
from hemera.reports import charts
from hemera.reports.data import Cohort, score_name
from hemera.reports.html import count, percent, plural

PALETTE = (
    charts.ORANGE, charts.VERMILLION, charts.PURPLE, charts.GREEN, charts.SKY, charts.BROWN,
)  # fmt: skip
"""Colours of the reasons."""


def filters(cohort: Cohort, table: Frame) -> dict[str, Any]:
    """Return the numbers of tiles after each filter, in total and per data set and score.

    Args:
        cohort: all tables.
        table: of `statistics.rejections`.
    """
    grid, tissue = (int(cohort.outcomes[f"tiles_{name}"].sum()) for name in ("grid", "tissue"))
    totals, written = table.sum(), int(table.to_numpy().sum())
    reasons = [name for name in table.columns[1:] if totals[name]]
    steps = [("grid positions", grid, 0), ("above the tissue floor", tissue, grid - tissue)]
    steps.append(("written", written, max(0, tissue - written)))
    for name in reasons:
        steps.append((name, steps[-1][1] - int(totals[name]), int(totals[name])))
    # Gray when there are more reasons than colours.
    palette = itertools.chain(PALETTE, itertools.repeat(charts.GRAY))
    legend = [("accepted", charts.BLUE), *zip(reasons, palette, strict=False)]
    rows = [
        {
            "dataset": dataset,
            "score": score_name(score),
            "tiles": int(row.sum()),
            "accepted": int(row["accepted"]),
            "rate": row["accepted"] / row.sum(),
            "rejected": [int(row[name]) for name in reasons],
        }
        for (dataset, score), row in table.iterrows()
    ]
    return {
        "steps": charts.bars(
            "From grid positions to accepted tiles",
            [
                (
                    label,
                    [("left", charts.BLUE, left), ("removed", charts.ORANGE, removed)],
                    f"{count(left)} left" + (f", {count(removed)} removed" if removed else ""),
                )
                for label, left, removed in steps
            ],
        ),
        "fractions": charts.bars(
            "Tiles of each data set and score by reason",
            [
                (
                    f"{row['dataset']}, {row['score']}",
                    [
                        (name, color, n)
                        for (name, color), n in zip(
                            legend, (row["accepted"], *row["rejected"]), strict=True
                        )
                    ],
                    f"{percent(row['rate'])} of {plural(row['tiles'], 'tile')}",
                )
                for row in rows
            ],
            relative=True,
        ),
        "legend": legend,
        "reasons": [
            {
                "name": name,
                "words": reason_words(name),
                "limit": limit_words(name, cohort),
                "tiles": int(totals[name]),
            }
            for name in reasons
        ],
        "rows": rows,
        "written": written,
    }


def reason_words(reason: str) -> str:
    """Return a reason in words."""
    return REASONS[reason].text if reason in REASONS else ""


def limit_words(reason: str, cohort: Cohort) -> str:
    """Return the keys and values in config.yaml that a reason depends on."""
    limits = cohort.options("filter")
    return ", ".join(
        f"filter.{criterion.option}: {json.dumps(limits[criterion.option])}"
        for criterion in CRITERIA
        if criterion.reason == reason and limits.get(criterion.option) is not None
    )


def quality(cohort: Cohort) -> list[tuple[str, Markup]]:
    """Return a histogram of each measure with the limit of its filter, as (title, chart)."""
    limits = cohort.options("filter")
    accepted = cohort.tiles["accepted"].to_numpy(bool)
    made = []
    for measure, (title, unit) in MEASURES.items():
        values = cohort.tiles[measure].to_numpy(np.float64, na_value=np.nan)
        if not np.isfinite(values).any():
            continue
        rejected, lines = np.zeros(len(values), bool), []
        for criterion in CRITERIA:
            limit = limits.get(criterion.option)
            if criterion.column == measure and limit is not None:
                own = (cohort.tiles["reason"] == criterion.reason).to_numpy(bool)
                rejected |= own & criterion.missed(values, limit)
                sign = "≥" if criterion.direction == ">=" else "≤"
                lines.append((f"{sign} {limit:g}", float(limit)))
        chart = charts.histogram(
            title,
            [
                ("accepted", charts.BLUE, values[accepted]),
                ("rejected for another reason", charts.GRAY, values[~accepted & ~rejected]),
                ("rejected by this measure", charts.ORANGE, values[rejected]),
            ],
            limits=lines,
            unit=unit,
            span=(0.0, 1.0) if measure.endswith("_fraction") else None,
        )
        made.append((title, chart))
    return made
