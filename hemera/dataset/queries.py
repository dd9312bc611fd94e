"""Reading those rows of the index that fulfil conditions."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hemera.dataset.splits import PARTS
from hemera.errors import ConfigError, ShardError
from hemera.io.faults import translated


def select(
    index: Path,
    columns: Sequence[str],
    *,
    where: str | pc.Expression | None = None,
    network: str | None = None,
    split: str | None = None,
    refused: bool = False,
) -> pa.Table:
    """Read columns of the rows of the index that fulfil all conditions, in its order.

    Args:
        index: the index.
        columns: the columns to return.
        where: a condition on the columns of the index: a pandas query, such as
            ``"dataset == 'bci' and he_sharpness > 40"``, or a pyarrow expression.
        network: generation or segmentation: only the tiles of its subset.
        split: train, val or test, of the network or, without one, of the cohort.
        refused: include tiles that filter did not accept.

    Raises:
        ShardError: when the file is not an index or lacks a column.
        ConfigError: when `where` is not a condition on the index, or there is no such split.
    """
    with translated(ShardError, f"{index}: not an index ({{error}}); run index again"):
        names = pq.read_schema(index).names
    if split is not None and split not in PARTS:
        raise ConfigError(f"split: {split!r} is unknown; choose from {', '.join(PARTS)}")
    split_column = "split" if network is None else f"{network}_split"
    needed = [*columns]
    conditions = []
    if not refused:
        needed.append("accepted")
        conditions.append(pc.field("accepted"))
    if network is not None or split is not None:
        needed.append(split_column)
        field = pc.field(split_column)
        conditions.append(field.is_valid() if split is None else field == split)
    missing = sorted({name for name in needed if name not in names})
    if missing:
        raise ShardError(
            f"{index}: no column {', '.join(missing)}; name a network and a mask engine it has"
        )
    queried: list[str] = []
    fault = translated(ShardError, f"{index}: cannot be read ({{error}}); run index again")
    if isinstance(where, str):
        words = set(re.findall(r"\w+", where))
        queried = [name for name in names if name in words]
    elif where is not None:
        conditions.append(where)
        fault = translated(
            ConfigError,
            f"where: {where} is not a condition on {index} ({{error}}); use its columns, and "
            "compare them with values of their own type",
        )
    with fault:
        table = pq.read_table(
            index,
            columns=list(dict.fromkeys([*columns, *queried])),
            filters=functools.reduce(operator.and_, conditions) if conditions else None,
            partitioning=None,
        )
    if isinstance(where, str):
        table = table.filter(pa.array(_evaluate(where, table.select(queried))))
    return table.select(list(columns))


def _evaluate(where: str, table: pa.Table) -> npt.NDArray[np.bool_]:
    """Return the value of a pandas query for every row of a table."""
    # Imported here: it takes a quarter of a second, and most uses need no query.
    import pandas as pd

    # A query may use no column; the frame needs the number of rows all the same.
    frame = table.to_pandas() if table.num_columns else pd.DataFrame(index=range(table.num_rows))
    with translated(
        ConfigError,
        f"where: {where!r} is not a query ({{error}}); write it as for pandas.DataFrame.query, "
        "with the columns of the index",
    ):
        values = np.asarray(frame.eval(where, local_dict={}, global_dict={}))
    if values.dtype != bool or values.shape != (table.num_rows,):
        raise ConfigError(
            f"where: {where!r} is not true or false for each tile; compare a column with a value"
        )
    return values
