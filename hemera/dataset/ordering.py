"""Rows of many units in one order, without all of them in memory."""

from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

PART_ROWS = 1 << 18
"""Rows of a part: about 0.2 GB of a table of tiles."""
KEPT_ROWS = 1 << 19
"""Rows of loaded units that are kept for the next part: blocks have rows of many parts."""


def sorted_parts(
    ids: Sequence[pa.ChunkedArray],
    load: Callable[[int], pa.Table],
    *,
    rows: int = PART_ROWS,
) -> Iterator[pa.Table]:
    """Yield the rows of all units sorted by the column `tile`, in parts of at most `rows`.

    Args:
        ids: column `tile` of each unit; no value is there twice.
        load: returns the table of the unit with this number, with a column `tile`.
        rows: of a part.
    """
    bounds = [pc.min_max(column).as_py() for column in ids]
    everything = pa.chunked_array([chunk for column in ids for chunk in column.chunks], pa.string())
    if not len(everything):
        yield pa.concat_tables([load(number) for number in range(len(ids))])
        return
    order = pc.sort_indices(everything)
    lowest = [everything[place.as_py()].as_py() for place in order[::rows]]
    del everything, order
    kept: dict[int, pa.Table] = {}
    for low, high in zip(lowest, [*lowest[1:], None], strict=True):
        own = [
            number
            for number, bound in enumerate(bounds)
            if bound["min"] is not None
            and bound["max"] >= low
            and (high is None or bound["min"] < high)
        ]
        parts = []
        for number in own:
            table = kept.pop(number, None)
            table = load(number) if table is None else table
            parts.append(_between(table, low, high))
            beyond = high is not None and bounds[number]["max"] >= high
            if beyond and sum(other.num_rows for other in kept.values()) < KEPT_ROWS:
                kept[number] = table
        yield pa.concat_tables(parts).sort_by("tile")


def _between(table: pa.Table, low: str, high: str | None) -> pa.Table:
    names = table.column("tile")
    chosen = pc.greater_equal(names, low)
    if high is not None:
        chosen = pc.and_(chosen, pc.less(names, high))
    return table.filter(chosen)
