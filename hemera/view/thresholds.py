"""Stage filter with other limits, on its table and without pixels, by its own functions."""

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from hemera.config import FilterOptions
from hemera.config.base import keys
from hemera.dataset import statistics
from hemera.dataset.criteria import CRITERIA, MEASURES, REASONS, changed_decisions, refusals
from hemera.errors import TableError

QUANTILES = 0.005, 0.995
"""Of a measure, between which its slider goes where the option has no range."""
BEYOND = 4
"""Where neither says more, a slider goes to this multiple of the default."""
PAGE_MAX = 500
"""Rows of a page of the table."""
PLAIN = ("tile", "pair", "dataset", "score", "decision")
MASKS = ("cells", "positive_fraction", "h_score")


def controls(table: pa.Table, options: FilterOptions) -> list[dict[str, Any]]:
    """Return a control per limit of section filter, in the order of the criteria."""
    found = []
    for name in dict.fromkeys(criterion.option for criterion in CRITERIA):
        key, value = keys(FilterOptions)[name], getattr(options, name)
        own = [criterion for criterion in CRITERIA if criterion.option == name]
        low, high = _range(table, [criterion.column for criterion in own], key.limits)
        given = [each for each in (value, key.default) if isinstance(each, float)]
        found.append(
            {
                "option": name,
                "help": key.help,
                "value": value,
                "default": key.default,
                "switch": key.type is bool,
                "optional": key.optional,
                "sign": "≥" if own[0].direction == ">=" else "≤",
                "low": min([low, *given]),
                "high": max([high, *(BEYOND * each for each in given if high < each)]),
            }
        )
    return found


def _range(
    table: pa.Table, columns: Sequence[str | None], limits: Mapping[str, float]
) -> tuple[float, float]:
    """Return the ends of a slider: the range of the option, else of the measures."""
    known = [limits.get("ge", limits.get("gt")), limits.get("le", limits.get("lt"))]
    if None in known:
        values = [
            table.column(name).cast(pa.float64()).to_numpy()
            for name in columns
            if name is not None and name in table.column_names
        ]
        finite = np.concatenate([*values, np.zeros(0)])
        finite = finite[np.isfinite(finite)]
        if finite.size:
            ends = np.quantile(finite, QUANTILES).tolist()
            known = [end if at is None else at for at, end in zip(known, ends, strict=True)]
    low, high = (default if at is None else at for at, default in zip(known, (0, 0), strict=True))
    return float(low), float(high)


@dataclasses.dataclass(frozen=True, eq=False)
class Decided:
    """The table of stage filter with the decisions by other limits."""

    table: pa.Table
    limits: Mapping[str, Any]
    engines: tuple[str, ...]
    reasons: npt.NDArray[np.str_]
    """(N,), empty for an accepted tile."""

    def outcome(self) -> dict[str, Any]:
        """Return the numbers of tiles by reason, by group, the selection bias, and the changes."""
        score = pc.replace_substring_regex(self.table["score"], "^$", "unknown")
        frame = pd.DataFrame(
            {
                "dataset": self.table["dataset"].to_pandas(),
                "score": score.to_pandas(),
                "reason": pd.Series(self.reasons.astype(object)).replace("", None),
            }
        )
        counts = statistics.rejections(frame)
        totals = counts.sum()
        changed = changed_decisions(self.table, self.limits, self.engines)
        return {
            "tiles": len(frame),
            "accepted": int(totals.get("accepted", 0)),
            "reasons": {name: int(totals[name]) for name in REASONS if name in totals},
            "groups": [
                {
                    "dataset": dataset,
                    "score": score,
                    "tiles": int(row.sum()),
                    "accepted": int(row["accepted"]),
                }
                for (dataset, score), row in counts.iterrows()
            ],
            "biases": [dataclasses.asdict(bias) for bias in statistics.selection_bias(counts)],
            "changed": sum(changed.values()),
        }

    def of_pair(self, pair: str) -> dict[str, str]:
        """Return the reason against each tile of a pair, empty for an accepted one."""
        own = np.flatnonzero(pc.equal(self.table["pair"], pair).to_numpy(zero_copy_only=False))
        names = self.table["tile"].take(own).to_pylist()
        return dict(zip(names, self.reasons[own].tolist(), strict=True))

    def page(self, query: Mapping[str, Any]) -> dict[str, Any]:
        """Return rows of the table: filtered, sorted, and a page of them.

        Args:
            query: `page` from 1, `size`, `sort` and `filter` as Tabulator sends them.

        Raises:
            TableError: for a column that is not shown, or another type of value.
        """
        names = self.columns
        decision = pa.array(np.where(self.reasons == "", "accepted", self.reasons).tolist())
        table = self.table.append_column("decision", decision).select(names)
        try:
            for each in query["filter"]:
                table = table.filter(_meets(table, each["field"], each["value"]))
            order = [
                (each["field"], {"asc": "ascending", "desc": "descending"}[each["dir"]])
                for each in query["sort"]
            ]
            size = min(max(int(query["size"]), 1), PAGE_MAX)
            first = max(int(query["page"]) - 1, 0) * size
            rows = table.sort_by(order) if order else table
        except (KeyError, TypeError, ValueError) as error:
            raise TableError(f"no such page of the table ({error}); load the page again") from error
        return {
            "last_page": max(1, -(-rows.num_rows // size)),
            "last_row": rows.num_rows,
            "data": rows.slice(first, size).to_pylist(),
        }

    @property
    def columns(self) -> list[str]:
        """The columns that the page shows: those with values."""
        masks = [f"{engine}_{name}" for engine in self.engines for name in MASKS]
        measured = [
            name for name in (*MEASURES, *masks)
            if self.table.column(name).null_count < self.table.num_rows
        ]  # fmt: skip
        return [*PLAIN, *measured]


def _meets(table: pa.Table, field: str, value: Any) -> Any:
    """Return which rows contain a text, or have at least a number."""
    column = table[field]
    if pa.types.is_string(column.type):
        return pc.match_substring(column, str(value), ignore_case=True)
    return pc.greater_equal(column, float(value))


class Thresholds:
    """The decisions by the limits that were asked for last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: tuple[int, FilterOptions, Decided] | None = None

    def decided(self, table: pa.Table, options: FilterOptions, engines: tuple[str, ...]) -> Decided:
        """Return the decisions on a table by these limits."""
        with self._lock:
            last = self._last
            if last is None or last[0] != id(table) or last[1] != options:
                limits = options.model_dump()
                reasons = refusals(table, limits, engines)
                last = id(table), options, Decided(table, limits, engines, reasons)
                self._last = last
            return last[2]
